"""truncate: each matrix of an update becomes one pair of factors of low rank, the nearest there is.

For each tensor of an update with two axes or more, as a matrix D (first axis by the others) with singular values s_1 >= s_2 >= ...:

    D' = sum_{i <= r} s_i u_i v_i^T        r = rank, or the least r with sum_{i <= r} s_i^2 >= energy sum_i s_i^2

which no matrix of rank r comes nearer to (Eckart and Young 1936). With both given, both limits hold. Without either, energy = 0.95.

    lowrank ops alone   all of them are joined into one pair by `engine.lowrank.recompress`; D is never formed. Cost: 4 (rows + columns) R^2
                        operations, with R the sum of their ranks
    other additive ops  (dense, sparse, mixtures, ...) `engine.lowrank.leading` of D: LAPACK's SVD of the whole up to rows x columns x smaller
                        side = 2^33 (a second or so), a randomised one of the leading part beyond that, which reads D 14 times

Left as they are: vectors, added tensors, ops relative to the weight or at run time, what several tensors share, dense views of a
tensor, and whatever would not take fewer bytes. Factors keep their dtype if they all have the same, else they are float32. Singular values come
from LAPACK: the id of the result is the same on one machine with one numpy, and elsewhere the factors agree to about 1e-6 (see `weft diff --as lowrank`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from .. import xp
from ..delta import SHARED, Delta, Entry, renumbered
from ..engine.increments import Block, Increments, independent
from ..engine.lowrank import Factors, Matrix, leading, pairs_of, recompress
from ..engine.stream import in_threads
from ..errors import InputError
from ..methods import method
from ..ops.op import flat_shape
from ..ops.spec import OpEntry, Ref
from ..stored import FLOATS, ITEMSIZE, Tensor, hold, numpy_dtype
from ._method import CompressMethod, Job

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_ENERGY = 0.95


class TruncateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `truncate`."""

    rank: Annotated[int, msgspec.Meta(ge=1, description="Largest rank of a pair of factors.")] | None = None
    energy: Annotated[float, msgspec.Meta(gt=0, le=1, description="Share of each tensor's squared norm to keep; without a rank 0.95.")] | None = None


@method(
    "compress",
    config=TruncateConfig,
    paper="Eckart and Young, 1936, Psychometrika 1",
    formula="D' = sum_{i <= r} s_i u_i v_i^T of each matrix D of the update",
)
class Truncate(CompressMethod[TruncateConfig]):
    """Low rank for each matrix of the update, by a rank or a share of its energy; factors are never multiplied out."""

    def compress(self, job: Job, cfg: TruncateConfig) -> Delta:
        energy = _ENERGY if cfg.rank is None and cfg.energy is None else cfg.energy
        targets = [name for name, entry in job.delta.entries.items() if entry.dtype in FLOATS and entry.change is None and independent(entry.ops)]
        jobs = (partial(_truncated, job.delta, name, cfg.rank, energy) for name in targets)
        entries, tensors = dict(job.delta.entries), dict(job.delta.tensors)
        for name, (ops, made) in zip(targets, in_threads(jobs, job.threads), strict=True):
            entries[name] = replace(entries[name], ops=ops)
            tensors |= made
        entries, tensors = renumbered(entries, tensors)
        return replace(job.delta, entries=entries, tensors=tensors)


def _truncated(delta: Delta, name: str, rank: int | None, energy: float | None) -> tuple[tuple[OpEntry, ...], dict[str, Tensor]]:
    """The new ops of a target and their tensors. All its ops are additive, so those of one view can be taken together."""
    entry = delta.entries[name]
    ops: list[OpEntry] = []
    made: dict[str, Tensor] = {}
    for same in _by_view(entry.ops):
        view = same[0].at.shape(entry.shape) if same[0].at is not None else entry.shape
        found, dtype = None, _dtype(delta, entry, same)
        if len(view) > 1 and not any(op.group for op in same):
            if all(_is_factors(delta, op) for op in same):
                found = _of_factors(delta, name, same, rank, energy)
            elif len(same) == len(entry.ops) and same[0].at is None and any(op.op != "lowrank" for op in same):
                found = _of_increment(delta, name, entry, rank, energy)
        if found is None or (found.a.size + found.b.size) * ITEMSIZE[dtype] >= _bytes(delta, same):
            ops += same
            continue
        keys = {field: f"{name}//truncated.{len(ops)}.{field}" for field in ("A", "B")}
        ops.append(OpEntry("lowrank", {}, {field: Ref(key) for field, key in keys.items()}, same[0].at))
        made |= {key: hold(xp.cast(factor, str(numpy_dtype(dtype)))) for key, factor in zip(keys.values(), (found.a, found.b), strict=True)}
    return tuple(ops), made


def _by_view(ops: Iterable[OpEntry]) -> list[list[OpEntry]]:
    """Ops that change the same view of their target, in the order in which each view comes first."""
    views: list[list[OpEntry]] = []
    for op in ops:
        mine = next((same for same in views if same[0].at == op.at), None)
        if mine is None:
            views.append([op])
        else:
            mine.append(op)
    return views


def _is_factors(delta: Delta, op: OpEntry) -> bool:
    return op.op == "lowrank" and not any(ref.take is not None or ref.key.startswith(SHARED) for ref in op.t.values())


def _bytes(delta: Delta, ops: Iterable[OpEntry]) -> int:
    """Bytes that the tensors of some ops take, as stored; shared ones, which stay, are not counted."""
    keys = {key for op in ops for key in op.tensor_keys() if not key.startswith(SHARED)}
    return sum(delta.tensors[key].storage.nbytes for key in keys)


def _of_factors(delta: Delta, name: str, ops: Sequence[OpEntry], rank: int | None, energy: float | None) -> Factors:
    """All pairs as one."""
    try:
        return recompress(pairs_of(ops, delta.get), rank, energy)
    except InputError as error:
        raise InputError(f"{name}: {error.message}", hint=error.hint) from None


def _of_increment(delta: Delta, name: str, entry: Entry, rank: int | None, energy: float | None) -> Factors | None:
    """The leading part of what the ops add together."""
    import numpy as np

    alone = replace(delta, entries={name: entry}, tensors={key: delta.tensors[key] for op in entry.ops for key in op.tensor_keys()}, over=(), tied=())
    models = Increments([alone])
    target = models.targets[name]
    norm = sum(float(np.square(models.read(0, block), dtype=np.float64).sum()) for block in target.blocks())
    return leading(Matrix(flat_shape(entry.shape), lambda lo, hi: models.read(0, Block(target, lo, hi))), norm, rank, energy)


def _dtype(delta: Delta, entry: Entry, ops: Sequence[OpEntry]) -> str:
    """The dtype of factors that take the place of these ops."""
    codes = {delta.tensors[ref.key].dtype for op in ops for ref in op.t.values()}
    return codes.pop() if len(codes) == 1 and all(op.op == "lowrank" for op in ops) else "F64" if entry.dtype == "F64" else "F32"
