"""dare: drop entries of every increment at random, make the others larger, and add up.

Yu et al. 2023, arXiv 2311.03099. For models i = 1..n with increments tau_i and weights w_i, entry by entry:

    m_ij ~ Bernoulli(1 - drop),  t_ij = m_ij tau_ij / (1 - drop)       so that the mean of t_i over all seeds is tau_i
    theta = theta_0 + scale * sum_i w_i t_i                            (signs = "all")

`signs` = "mass" or "count" puts the t_i through steps 2 and 3 of `ties` in place of the sum: an elected sign for each entry
(by the sum of the t_i, or by the number of models), then scale * the mean of the w_i t_i that agree with it. Nothing is
trimmed, and the weights take no part in the election. With drop = 0 this is `task-arithmetic`, or `ties` at density 1.

Whether an entry is kept depends on the seed, the tensor's name, the model's place among the inputs and the entry's place
in the tensor, and on nothing else: u = 16-bit number `place` of the sequence key(key(seed, name), model), m = [u >= 65,536 drop].
The rate is therefore rounded to a multiple of 1/65,536, and the factor 1/(1 - drop) is that of the rounded rate.
So masks are the same for any block, thread and shard, and a model more does not change those of the models before it.
Tensors with the same bytes in the base have one mask, the one of the first name, because stored copies of a tied tensor
must stay equal.

Not followed: the authors draw from one global generator, so that masks depend on the order of tensors and on the device,
and can leave tensors out by name. mergekit's rescaling to the L1 norm of the tensor is not the paper's; dropping without
rescaling is what the paper argues against. The default rate is the one of the authors' merges of language models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from .. import xp
from .._fused import Combination
from ..methods import method
from ._method import MergeMethod
from .ties import TiesConfig, election, majority_is_plus

if TYPE_CHECKING:
    import numpy as np

    from ..engine.increments import Increments, Target
    from ._depth import Settings

    Array = np.ndarray[Any, Any]


class DareConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `dare`."""

    drop: Annotated[float, msgspec.Meta(ge=0, lt=1, description="Probability that an entry of an increment is dropped.")] = 0.2
    scale: Annotated[float, msgspec.Meta(description="Factor on the merged increment.")] = 1.0
    signs: Annotated[
        Literal["all", "mass", "count"],
        msgspec.Meta(description="Add up all that is left, or average what agrees with a sign elected by the sum of the entries or by the number of models."),
    ] = "all"
    seed: Annotated[int, msgspec.Meta(ge=0, description="Seed of the masks.")] = 0


@dataclass(frozen=True)
class DareState:
    """`keys` maps a tensor's name to the sequence of each model; `zero_is_plus` is the majority's sign."""

    keys: dict[str, list[int]]
    zero_is_plus: bool = False


@method(
    "merge",
    config=DareConfig,
    paper="Yu et al., 2023, arXiv:2311.03099",
    formula="theta = theta_0 + scale sum_i w_i m_i tau_i / (1 - p), m_i ~ Bernoulli(1 - p)",
    varies=("drop", "scale"),
)
class Dare(MergeMethod[DareConfig]):
    """Drop entries of each increment at random, rescale the others, add up."""

    def weighted(self, cfg: DareConfig) -> bool:
        return cfg.drop == 0 and cfg.signs == "all"

    def coefficients(self, weights: Sequence[float], cfg: DareConfig, state: Any, target: Target) -> list[float]:
        return [cfg.scale * w for w in weights]

    def prepare(self, models: Increments, settings: Settings[DareConfig]) -> DareState:
        cfg = settings.whole.cfg
        keys = mask_keys(models, cfg.seed)
        if cfg.signs == "all":
            return DareState(keys)
        return DareState(keys, majority_is_plus(models, lambda target: self.combination(*settings.at(target), DareState(keys), target)))

    def combination(self, weights: Sequence[float], cfg: DareConfig, state: DareState, target: Target) -> Combination:
        mask: dict[str, Any] = {"keys": state.keys[target.name], "dropped": dropped(cfg.drop)}
        scale = cfg.scale / (1 - mask["dropped"] / 65536)  # the same for every entry, so it can wait until here
        if cfg.signs == "all":
            return Combination([scale * w for w in weights], **mask)
        return election(weights, TiesConfig(scale=scale, elect=cfg.signs), zero_is_plus=state.zero_is_plus, **mask)


def mask_keys(models: Increments, seed: int) -> dict[str, list[int]]:
    """The sequence of random numbers of each tensor and model."""
    first = models.twins()
    return {name: [xp.key(xp.named_key(seed, first.get(name, name)), number) for number in range(len(models.updates))] for name in models.targets}


def dropped(drop: float) -> int:
    """How many of 65,536 entries are dropped: the rate that is used is this over 65,536."""
    return min(round(drop * 65536), 65535)
