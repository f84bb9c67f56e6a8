"""pcb-merging: parameter competition balancing: entries are weighed by how they score against their own model and the others.

Du et al. 2024, arXiv 2410.02396. For models i = 1..n with increments tau_i and weights w_i, entry by entry:

1. Clamp. a_i = |tau_i| clamped to [l_i, u_i], the (floor(clamp d) + 1)-th smallest and largest magnitudes of the model;
   t_i = sign(tau_i) a_i. d counts the entries of all tensors that model i changes.
2. Intra-balancing. p_i = ((a_i - l_i) / (u_i - l_i))^2 in [0, 1], 0 where u_i = l_i: how large the entry is in its own model.
3. Inter-balancing. c_i = tanh(tau_i sum_j tau_j): whether the models agree with it. Negative where they outvote it.
4. Score. s_i = exp(n (p_i - 1)) c_i.
5. Drop and rescale. With h_i the k-th largest score of model i, k = max(1, floor(density * d)), and m_i the largest,
   b_i = max(s_i - h_i, 0) / (m_i - h_i) in [0, 1]. Where m_i = h_i, b_i is 1 at entries with s_i = m_i > 0 and 0 elsewhere.
   A model has no say (b_i = 0) in a tensor that it does not change.

       merged = scale * sum_i b_i w_i t_i / sum_i b_i,   0 where every b_i is 0

The paper and the authors' code differ; this follows the code. (In the paper both balances are softmaxes, over an unclamped
tau_i^2 and over tau_i tau_j, and kept scores are not shifted by h_i.) Not followed, and why: their exp(n p_i) overflows for
many models, and the factor exp(-n) changes no b_i; their h_i is one rank lower where density * d is no whole number, and
their u_i where clamp * d is none, so that the largest entry of a small model is always cut; divisions by m_i = h_i and
u_i = l_i give NaN there; their floor of 1e-12 on sum_i b_i shrinks what it touches. Their scripts use density 0.05 and search
the weights on validation data in [0.8, 1.3].

Scores are computed in float64 and compared as float32, as are magnitudes of F64 tensors. Two passes over the inputs find the
limits, two the scores, one merges; no vector is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ..engine.select import kth_largest_of_streams
from ..methods import method
from ._method import MergeMethod

if TYPE_CHECKING:
    import numpy as np

    from ..engine.increments import Block, Increments
    from ._depth import Settings

    Array = np.ndarray[Any, Any]


class PcbMergingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `pcb-merging`."""

    density: Annotated[float, msgspec.Meta(gt=0, le=1, description="Share of the entries of each model that competes, those with the largest scores.")] = 0.1
    scale: Annotated[float, msgspec.Meta(description="Factor on the merged increment.")] = 1.0
    clamp: Annotated[
        float, msgspec.Meta(ge=0, lt=0.5, description="Share of the entries of each model at either end that is clamped to the magnitude of the next one.")
    ] = 0.0001


@dataclass(frozen=True)
class PcbState:
    """`limits` has (l_i, u_i) and `scores` (h_i, m_i) of each model; `touched` the models that change each tensor."""

    limits: list[tuple[float, float]]
    scores: list[tuple[float, float]]
    touched: dict[str, list[int]]


@method(
    "merge",
    config=PcbMergingConfig,
    paper="Du et al., 2024, arXiv:2410.02396",
    formula="theta = theta_0 + scale sum_i b_i w_i tau_i / sum_i b_i, b_i = top-k(exp(n |tau_i|^2 / max^2) tanh(tau_i sum_j tau_j)), scaled to [0, 1]",
    varies=("scale",),
)
class PcbMerging(MergeMethod[PcbMergingConfig]):
    """Average the increments, each entry weighed by its size in its own model and its agreement with the others."""

    def prepare(self, models: Increments, settings: Settings[PcbMergingConfig]) -> PcbState:
        count, cfg = len(models.updates), settings.whole.cfg
        sizes = [models.size(i) for i in range(count)]
        touched = {name: [i for i in range(count) if models.touches(i, name)] for name in models.targets}

        def magnitudes() -> Iterator[tuple[int, Array]]:
            for each in models.map(lambda block, taus: [(i, abs(taus[i])) for i in touched[block.target.name]]):
                yield from each

        cut = [int(cfg.clamp * d) for d in sizes]
        limits = _pairs(kth_largest_of_streams(magnitudes, [[d - c, c + 1] if d else [] for d, c in zip(sizes, cut, strict=True)]))

        def scores() -> Iterator[tuple[int, Array]]:
            for each in models.map(lambda block, taus: _scores(taus, touched[block.target.name], limits)):
                yield from each

        return PcbState(limits, _pairs(kth_largest_of_streams(scores, [[max(1, int(cfg.density * d)), 1] if d else [] for d in sizes])), touched)

    def merge(self, taus: list[Array], weights: Sequence[float], cfg: PcbMergingConfig, state: PcbState, block: Block) -> Array:
        import numpy as np

        total, divisor = np.zeros(block.shape), np.zeros(block.shape)
        for i, score in _scores(taus, state.touched[block.target.name], state.limits):
            share = _share(score, *state.scores[i])
            total += share * (cfg.scale * weights[i]) * np.sign(taus[i]) * _clamped(taus[i], *state.limits[i])
            divisor += share
        return np.asarray(total / (divisor + (divisor == 0)))


def _pairs(found: list[list[float]]) -> list[tuple[float, float]]:
    """Two numbers for each model; zeros for one that changes nothing."""
    return [(each[0], each[1]) if each else (0.0, 0.0) for each in found]


def _clamped(tau: Array, low: float, high: float) -> Array:
    """a_i in float64."""
    import numpy as np

    return np.clip(abs(tau.astype(np.float64)), low, high)


def _scores(taus: Sequence[Array], touched: Sequence[int], limits: Sequence[tuple[float, float]]) -> list[tuple[int, Array]]:
    """s_i in float32, with i, of each model that changes the tensor."""
    import numpy as np

    total = np.zeros(taus[0].shape)
    for tau in taus:
        total += tau
    out = []
    for i in touched:
        low, high = limits[i]
        part = (_clamped(taus[i], low, high) - low) / ((high - low) or 1.0)
        out.append((i, (np.exp(len(taus) * (part * part - 1)) * np.tanh(taus[i] * total)).astype(np.float32)))
    return out


def _share(score: Array, low: float, high: float) -> Array:
    """b_i in float64."""
    import numpy as np

    if high > low:
        return np.maximum(score.astype(np.float64) - low, 0) / (high - low)
    return ((score >= high) & (score > 0)).astype(np.float64)
