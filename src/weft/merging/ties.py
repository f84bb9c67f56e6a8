"""ties: trim every increment, elect a sign for each entry, average the increments that agree with it.

Yadav et al. 2023, arXiv 2306.01708. For models i = 1..n with increments tau_i and weights w_i:

1. Trim. t_i keeps the entries of tau_i with |tau_i| >= h_i and is 0 elsewhere, where h_i is the k-th largest magnitude,
   k = max(1, floor(density * d)). d counts the entries of all tensors that model i changes (trim = "global", as in the
   paper) or of the one tensor at hand (trim = "tensor", and only then may density vary over depth). Entries exactly as
   large as h_i are all kept, so ties at the threshold can make it a few more than k. (The authors' code keeps the
   (k + 1)-th as well.) Magnitudes of F64 tensors are compared as float32.
2. Elect. m = sum_i t_i (elect = "mass") or sum_i sign(t_i) (elect = "count"); the sign is plus where m > 0 and minus where
   m < 0. Where m = 0 (the models cancel exactly, or changed nothing) it is the sign of the majority: plus if m > 0 at
   more entries of the whole model than m < 0, else minus. `elect_weighted` uses w_i t_i in place of t_i, here and below.
3. Merge. A_j = the models whose entry j is not 0 and has the elected sign;

       merged_j = scale * (sum_{i in A_j} w_i t_ij) / |A_j|,   0 where A_j is empty

   `normalize` divides by sum_{i in A_j} w_i instead of |A_j|.

The paper has no weights. mergekit's variant is trim = "tensor", elect_weighted and normalize together (but there a tie of
signs is always plus). Arithmetic is float32 (float64 for F64 tensors), sums in the order of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from .._fused import Combination
from ..engine.select import Close, Over, largest_magnitudes
from ..engine.stream import in_threads
from ..methods import method
from ._method import MergeMethod

if TYPE_CHECKING:
    import numpy as np

    from ..engine.increments import Increments, Target
    from ._depth import Settings

    Array = np.ndarray[Any, Any]


class TiesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `ties`."""

    density: Annotated[float, msgspec.Meta(gt=0, le=1, description="Share of the entries of each model that is kept, the largest ones.")] = 0.2
    scale: Annotated[float, msgspec.Meta(description="Factor on the merged increment.")] = 1.0
    trim: Annotated[
        Literal["global", "tensor"], msgspec.Meta(description="Keep the largest entries of the whole model (as in the paper) or of each tensor.")
    ] = "global"
    elect: Annotated[Literal["mass", "count"], msgspec.Meta(description="Elect signs by the sum of the entries or by the number of models.")] = "mass"
    elect_weighted: Annotated[bool, msgspec.Meta(description="Weights count in the election too, not only in the average.")] = False
    normalize: Annotated[bool, msgspec.Meta(description="Divide by the weights of the models that agree, not by their number.")] = False


@dataclass(frozen=True)
class TiesState:
    """`thresholds` maps a tensor's name to h_1..h_n; `zero_is_plus` is the majority's sign."""

    thresholds: dict[str, list[float]]
    zero_is_plus: bool


@method(
    "merge",
    config=TiesConfig,
    paper="Yadav et al., 2023, arXiv:2306.01708",
    formula="theta = theta_0 + scale mean_{i: sign(t_i) = s} w_i t_i, t_i = top-k(tau_i), s = sign(sum_i t_i)",
    varies=("density", "scale"),
)
class Ties(MergeMethod[TiesConfig]):
    """Trim each increment, elect a sign for each entry, average those that agree."""

    def problems(self, weights: Sequence[float], cfg: TiesConfig) -> list[str]:
        return ["normalize: every weight must be positive"] if cfg.normalize and min(weights) <= 0 else []

    def fixed(self, cfg: TiesConfig) -> dict[str, str]:
        return {"density": "trim=global ranks the entries of all tensors together; trim=tensor does not"} if cfg.trim == "global" else {}

    def prepare(self, models: Increments, settings: Settings[TiesConfig]) -> TiesState:
        thresholds = _thresholds(models, settings)
        return TiesState(thresholds, majority_is_plus(models, lambda target: election(*settings.at(target), least=thresholds[target.name])))

    def combination(self, weights: Sequence[float], cfg: TiesConfig, state: TiesState, target: Target) -> Combination:
        return election(weights, cfg, least=state.thresholds[target.name], zero_is_plus=state.zero_is_plus)


def election(weights: Sequence[float], cfg: TiesConfig, **more: Any) -> Combination:
    """Steps 2 and 3."""
    votes = list(weights) if cfg.elect_weighted else [1.0] * len(weights)
    if cfg.elect == "count":
        votes = [float((w > 0) - (w < 0)) for w in votes]
    shares = list(weights) if cfg.normalize else [1.0] * len(weights)
    return Combination([cfg.scale * w for w in weights], votes=votes, shares=shares, by_count=cfg.elect == "count", **more)


def majority_is_plus(models: Increments, rule: Callable[[Target], Combination]) -> bool:
    """Whether m > 0 at more entries of the whole model than m < 0 (step 2)."""
    return len(models.updates) > 1 and models.balance(rule) > 0  # one model cannot cancel itself


def _thresholds(models: Increments, settings: Settings[TiesConfig]) -> dict[str, list[float]]:
    """h_i of every tensor; infinity where a model changes nothing."""
    cfg = settings.whole.cfg
    if cfg.trim == "global":
        each = [_threshold(models.each(i), models.close(i), models.size(i), cfg) for i in range(len(models.updates))]
        return dict.fromkeys(models.targets, each)
    found = in_threads((partial(_of_tensor, models, target, settings.at(target).cfg) for target in models.targets.values()), models.threads)
    return dict(zip(models.targets, found, strict=True))


def _of_tensor(models: Increments, target: Target, cfg: TiesConfig) -> list[float]:
    sizes = [target.size if models.touches(i, target.name) else 0 for i in range(len(models.updates))]
    return [_threshold(models.each(i, target), models.close(i, target), size, cfg) for i, size in enumerate(sizes)]


def _threshold(over: Over, close: Close, size: int, cfg: TiesConfig) -> float:
    return float(largest_magnitudes(over, [max(1, int(cfg.density * size))], size, close)[0].value) if size else float("inf")
