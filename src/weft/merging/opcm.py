"""opcm: models one after the other, each without what would disturb those before it.

Tang et al. 2025, arXiv 2501.09522. With A the sum so far (A_1 = tau_1) and tau the increment of model t, each matrix is done
by itself; with the thin SVD A = U S V^T and r the smallest number of singular values that make up `alpha` of their sum:

    P = U^T tau V;  P_ij kept where i != j and not (i < r and j < r)       tau' = tau - U (M o P) V^T, M the ones that go
    A_t = A_(t-1) + tau'                                                   other tensors: tau' = tau
    theta = theta_0 + s A_t,  s = mean_i ||tau_i|| / ||A_t||               over all tensors, after the last model

so that the merged update is as long as the models are on average, whatever their number. The paper writes a rescaled A_t and
rescales it back at each step; the sum itself is the same and simpler. Only the thin SVD is needed, as tau' shows.

**One model at a time.** The delta stores A and s, and in the blob `opcm` the norms of its models. Given as the first input
of another `opcm` merge it stands for all of them: merging [merged, C] is merging [A, B, C], bit for bit, and nothing but one
delta is kept. To that end A is rounded to the dtype of increments after every model. Anywhere else it is one model.

Not followed: the code takes r one lower, and shuffles the models (here they come in the order given); pairs of singular
vectors that belong to s = 0 are arbitrary, so nothing is taken out along them (an A of low rank has many). The paper projects
the weights of linear layers; here every tensor of two axes but those that `skip` names, and stored copies of these. There
are no weights. Cost: each matrix is decomposed once for every model after the first, and that twice, as s is known last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from math import fsum, isfinite, sqrt
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from .. import canon
from ..delta import BLOB, Delta
from ..engine.stream import in_threads, one_blas_thread
from ..errors import FormatError, InputError
from ..methods import method
from ..stored import strict_json
from ._method import MergeMethod

if TYPE_CHECKING:
    import numpy as np

    from ..delta import Entry
    from ..engine.increments import Block, Increments, Target
    from ._depth import Settings

    Array = np.ndarray[Any, Any]

STATE = "opcm"
"""The blob that makes a merged delta a sum that goes on: canonical JSON, `norms` with ||tau_i|| of each model so far."""

_ZERO = 2.0**-23
"""Singular values below this part of the largest, times the longer side, are rounding of A."""


class OpcmConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `opcm`."""

    alpha: Annotated[float, msgspec.Meta(ge=0, le=1, description="Share of the sum of singular values that makes the leading block.")] = 0.5
    skip: Annotated[tuple[str, ...], msgspec.Meta(description="Matrices (globs of tensor names) that are added up as they are.")] = (
        "*embed*",
        "*wte*",
        "*wpe*",
        "*shared*",
    )


@dataclass(frozen=True)
class OpcmState:
    """`start` gives the stored sum of an input that is one (None elsewhere), `plain` has the tensors that are not projected."""

    start: Callable[[Target], Array | None]
    plain: frozenset[str]
    norms: tuple[float, ...] = ()
    scale: float = 1.0


@method(
    "merge",
    config=OpcmConfig,
    paper="Tang et al., 2025, arXiv:2501.09522",
    formula="A <- A + tau - U (M o U^T tau V) V^T, A = U S V^T; theta = theta_0 + A mean_i ||tau_i|| / ||A||",
    varies=("alpha",),
)
class Opcm(MergeMethod[OpcmConfig]):
    """Add models one by one, each without its part in the space that is taken already."""

    whole = True

    def problems(self, weights: Sequence[float], cfg: OpcmConfig) -> list[str]:
        return ["the models' norms decide how much they count; leave the weights out"] * any(w != 1 for w in weights)

    def prepare(self, models: Increments, settings: Settings[OpcmConfig]) -> OpcmState:
        first, cfg = models.updates[0], settings.whole.cfg
        before: tuple[float, ...] = ()
        start: Callable[[Target], Array | None] = _nothing
        if isinstance(first, Delta) and (before := _norms_of(first)):
            start = partial(_start, first, models.entries(0))
        twins = models.twins()
        skipped = {twins.get(name, name) for name in models.targets if any(fnmatchcase(name, pattern) for pattern in cfg.skip)}
        plain = frozenset(name for name, target in models.targets.items() if len(target.shape) != 2 or twins.get(name, name) in skipped)
        state = OpcmState(start, plain)

        def squares(target: Target) -> list[float]:
            """||.||^2 of each increment and of the sum."""
            taus = models.read_all(target.whole)
            return [_square(part) for part in (*taus, self.merge(taus, *settings.at(target), state, target.whole))]

        jobs = (partial(squares, target) for target in models.targets.values() if target.size)
        rows = list(in_threads(jobs, models.threads))
        *norms, length = (sqrt(fsum(column)) for column in zip(*rows, strict=True)) if rows else [0.0] * (len(models.updates) + 1)
        every = (*before, *norms[1:]) if before else tuple(norms)
        scale = fsum(every) / len(every) / length if length else 1.0
        if not isfinite(scale):
            raise InputError("the increments are too large for a norm", hint="check the run that made them")
        return OpcmState(start, plain, every, scale)

    def merge(self, taus: list[Array], weights: Sequence[float], cfg: OpcmConfig, state: OpcmState, block: Block) -> Array:
        import numpy as np

        target = block.target
        first = state.start(target)
        total: Array = taus[0] if first is None else first
        for tau in taus[1:]:
            part = tau.astype(np.float64)
            if target.name not in state.plain:
                part = _without(part, total.astype(np.float64), cfg.alpha)
            total = (total + part).astype(target.wide)
        return total

    def scale(self, state: OpcmState) -> float:
        return state.scale

    def blobs(self, state: OpcmState) -> dict[str, bytes]:
        return {STATE: canon.dumps({"norms": list(state.norms)})}


def _without(tau: Array, total: Array, alpha: float) -> Array:
    """tau without its components on the leading block and on the diagonal of the singular basis of `total`."""
    import numpy as np

    if not tau.any() or not total.any():
        return tau
    with one_blas_thread():  # the same bits for any number of threads
        u, s, v = np.linalg.svd(total, full_matrices=False)
        kept = int(np.count_nonzero(s > s[0] * _ZERO * max(total.shape)))
        u, v = u[:, :kept], v[:kept]
        share = np.cumsum(s[:kept])
        lead = int(np.searchsorted(share, alpha * share[-1])) + 1 if alpha else 0
        components = u.T @ tau @ v.T
        gone = np.diag(np.diagonal(components))
        gone[:lead, :lead] = components[:lead, :lead]
        out: Array = tau - u @ gone @ v
    return out


def _square(x: Array) -> float:
    import numpy as np

    with np.errstate(over="ignore"):
        return float(np.square(x.astype(np.float64)).sum())


# --- going on from a merge


def _norms_of(delta: Delta) -> tuple[float, ...]:
    """The norms of the models in a delta that `opcm` made; none for anything else, a scaled or a partial one included."""
    if (delta.recipe.get("verb"), delta.recipe.get("method")) != ("merge", STATE) or "shard" in delta.recipe:
        return ()
    where = f"{delta.path or 'the first input'}: {BLOB}{STATE}"
    blob = delta.tensors.get(BLOB + STATE)
    if blob is None:
        raise FormatError(f"{where} is missing: this delta says that opcm made it")
    found = strict_json(blob.read().tobytes().decode("utf-8", "replace"), where)
    norms = found.get("norms") if isinstance(found, dict) else None
    if not isinstance(norms, list) or not norms or not all(isinstance(n, int | float) and isfinite(n) and n >= 0 for n in norms):
        raise FormatError(f"{where}: expected the norms of its models, got {json.dumps(found)[:80]}")
    if any([op.op for op in entry.ops] != ["dense"] for entry in delta.entries.values()):
        raise FormatError(f"{where}: the sum it speaks of is not there; every tensor has one dense op")
    return tuple(float(n) for n in norms)


def _start(delta: Delta, entries: Mapping[str, Entry], target: Target) -> Array:
    """The stored sum on one tensor, without the factor that goes with it."""
    import numpy as np

    if target.name not in entries:
        return np.zeros(target.shape, target.wide)
    values: Array = delta.get(entries[target.name].ops[0].t["values"].key)
    return values.astype(target.wide, copy=False)


def _nothing(target: Target) -> None:
    """No sum yet: it starts with the first model."""
