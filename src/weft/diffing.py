"""diff: the delta between two checkpoints.

    delta = diff(Base.open("model"), Base.open("tuned"), "lowrank", rank=16)

exact    every tensor comes back bit for bit: new values at the entries that differ, or whole tensors; any dtype
dense    float32 increments (float64 for F64): scale and add them like any other update
lowrank  the leading part of each matrix's increment, at a rank or at a share of its energy; vectors dense
sparse   float32 increments at the entries whose values differ

In every mode, tensors that only one side has, or in another shape or dtype, become declared changes; the difference of
the configs becomes a merge patch; and tensors that are not floating point are replayed exactly. Both checkpoints are
read in blocks, and again when the delta is saved or applied: keep them until it is saved. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from .delta import Builder, Delta
from .engine.lowrank import Matrix, leading
from .engine.stream import BLOCK, flat, in_threads, one_blas_thread, reuse_memory, row_blocks
from .errors import MismatchError, UsageError, near
from .ops.op import flat_shape
from .ops.spec import Json
from .stored import FLOATS, ITEMSIZE, Computed, Made, Tensor, numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    from .base import Base, Progress

    Array = np.ndarray[Any, Any]

MODES = ("exact", "dense", "lowrank", "sparse")

_NOT_THE_MODEL = ("_name_or_path", "transformers_version")
"""Keys of config.json that say where a checkpoint came from, not what it is."""


def diff(
    base: Base,
    checkpoint: Base,
    mode: str = "exact",
    *,
    rank: int | None = None,
    energy: float | None = None,
    tolerance: float = 0.0,
    threads: int = 1,
    block: int | None = None,
    notes: Mapping[str, Json] | None = None,
    progress: Progress | None = None,
) -> Delta:
    """The delta that turns `base` into `checkpoint`: `fold(base, [delta])` gives the checkpoint, exactly or nearly.

    mode:      "exact", "dense", "lowrank" or "sparse" (see above)
    rank:      of lowrank: the largest rank of a factor pair
    energy:    of lowrank, instead: the share of the increment's squared norm to keep, in (0, 1]
    tolerance: of sparse: entries that change by no more than this are left out (default 0)
    threads:   tensors compared at once; the result is the same
    block:     entries compared at a time (default 2^18); the result is the same
    notes:     notes of the delta; a `summary` is added: how many tensors and entries changed, and for lowrank each
               tensor's rank and the share of the increment's squared norm that is lost in all
    progress:  called with the bytes of the base compared and the bytes in all

    The id depends on the two checkpoints' tensors and the arguments alone, not on sharding, threads or blocks. lowrank
    uses LAPACK, in float64 with canonical signs and one thread a product: there the id is the same on one machine with
    one numpy, and elsewhere the factors agree to about 1e-6. A config can be patched to anything but an explicit null:
    keys that are null in the checkpoint are removed. A live module (`Base.of`) has no config.json to compare.

    MismatchError if the checkpoints are identical or have no tensor in common, or if a change cannot be written as an increment (infinities and
    NaNs; use "exact").
    """
    _require(mode, rank, energy, tolerance, threads, block)
    build = Builder(base)
    base.fingerprint  # noqa: B018 (hashes all tensors in threads; the entries would ask for them one by one)
    reuse_memory()
    both = [name for name in base.names if name in checkpoint.tensors]
    if not both:
        raise MismatchError(
            f"the checkpoints have no tensor in common: {base.source} ({base.names[0]!r}, ...) and {checkpoint.source} ({checkpoint.names[0]!r}, ...)",
            hint="a delta needs a base of the same kind of model",
        )
    total, done = sum(base.tensor(name).nbytes for name in both), 0
    summary: dict[str, Json] = {"tensors": 0, "entries": 0}
    ranks: dict[str, Json] = {}
    kept = norm = 0.0
    label = f"{checkpoint.source}: tensor "
    jobs = (
        partial(_compare, f"{label}{name!r}", base.tensor(name), checkpoint.tensor(name), mode, rank, energy, tolerance, block or BLOCK, threads)
        for name in both
    )
    with one_blas_thread(), closing(in_threads(jobs, threads)) as results:
        for name, found in zip(both, results, strict=True):
            if found is not None:
                if found.op is None:
                    build.add(name, checkpoint.tensor(name), kind="replace")
                else:
                    build.put(name, found.op, found.fields)
                summary["tensors"] += 1
                summary["entries"] += found.changed
                kept, norm = kept + found.kept, norm + found.norm
                if found.op == "lowrank":
                    ranks[name] = found.fields["A"].shape[0]
            done += base.tensor(name).nbytes
            if progress is not None:
                progress(done, total)
    summary |= _structure(build, base, checkpoint)
    if mode == "lowrank":
        summary |= {"ranks": ranks, "lost": float(f"{max(0.0, 1 - kept / norm) if norm else 0.0:.3g}")}
    patch = _config_patch(base, checkpoint)
    if not patch and not any(summary[key] for key in ("tensors", "added", "removed")):
        raise MismatchError(f"the checkpoints are identical: {base.source} and {checkpoint.source}", hint="check that these are the two you mean")
    settings = {"rank": rank, "energy": energy, "tolerance": tolerance or None}
    recipe = {"verb": "diff", "method": mode, "config": {name: value for name, value in settings.items() if value is not None}}
    return build.done(recipe=recipe, config=patch, notes={**(notes or {}), "summary": summary})


def _require(mode: str, rank: int | None, energy: float | None, tolerance: float, threads: int, block: int | None) -> None:
    problems = []
    if mode not in MODES:
        raise UsageError(f"there is no diff {mode!r}{near(mode, MODES, 'there are')}")
    if mode == "lowrank":
        if (rank is None) == (energy is None):
            problems.append("lowrank takes either a rank or an energy")
        if rank is not None and rank < 1:
            problems.append(f"rank must be at least 1, got {rank}")
        if energy is not None and not 0 < energy <= 1:
            problems.append(f"energy is a share above 0 and at most 1, got {energy}")
    elif rank is not None or energy is not None:
        problems.append(f"rank and energy belong to lowrank, not to {mode}")
    if tolerance and mode != "sparse":
        problems.append(f"tolerance belongs to sparse, not to {mode}")
    if not tolerance >= 0:
        problems.append(f"tolerance must be at least 0, got {tolerance}")
    if threads < 1 or (block is not None and block < 1):
        problems.append(f"threads and block must be at least 1, got {threads} and {block}")
    if problems:
        raise UsageError("this diff cannot be made", problems=problems)


def _structure(build: Builder, base: Base, checkpoint: Base) -> dict[str, Json]:
    """Tensors that only one side has. An added one with the bytes of a base tensor is a copy of it, which costs nothing."""
    added = [name for name in checkpoint.names if name not in base.tensors]
    known: dict[tuple[str, tuple[int, ...], str], str] = {}
    if added:
        known = {(base.tensor(name).dtype, base.tensor(name).shape, base.sha256(name)): name for name in reversed(base.names)}
    for name in added:
        tensor = checkpoint.tensor(name)
        source = known.get((tensor.dtype, tensor.shape, checkpoint.sha256(name)))
        if source is not None:
            build.copy(name, source)
        else:
            build.add(name, tensor)
    removed = [name for name in base.names if name not in checkpoint.tensors]
    for name in removed:
        build.remove(name)
    return {"added": len(added), "removed": len(removed)}


def _config_patch(base: Base, checkpoint: Base) -> dict[str, Json]:
    """The merge patch (RFC 7386) from one config.json to the other; {} if either side has none."""
    if base.path is None or checkpoint.path is None or not base.config or not checkpoint.config:
        return {}
    return _patch(*({key: value for key, value in side.config.items() if key not in _NOT_THE_MODEL} for side in (base, checkpoint)))


def _patch(old: Mapping[str, Json], new: Mapping[str, Json]) -> dict[str, Json]:
    patch: dict[str, Json] = {key: None for key, value in old.items() if value is not None and new.get(key) is None}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            if inner := _patch(before, value):
                patch[key] = inner
        elif value is not None and (key not in old or _differ(before, value)):
            patch[key] = value
    return patch


def _differ(a: Json, b: Json) -> bool:
    """Whether two JSON values differ; true and 1 do, and 1 and 1.0 do not (they are one JSON number)."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) != len(b) or any(map(_differ, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() != b.keys() or any(_differ(a[key], b[key]) for key in a)
    return isinstance(a, bool) != isinstance(b, bool) or bool(a != b)


# --- one tensor


@dataclass
class _Change:
    """How one tensor changed: the op with its fields (None: it is replaced), entries changed, and for lowrank the squared
    norm of the increment and of the part that is kept."""

    op: str | None
    fields: Mapping[str, Any]
    changed: int
    norm: float = 0.0
    kept: float = 0.0


def _compare(
    what: str, old: Tensor, new: Tensor, mode: str, rank: int | None, energy: float | None, tolerance: float, block: int, threads: int
) -> _Change | None:
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return _Change(None, {}, prod(new.shape))
    if mode == "exact" or old.dtype not in FLOATS:
        return _exact(old, new, block)
    increments = _Increments(what, flat(old), flat(new), block, old.shape)
    changed = sum(int(part.size) for part, _ in increments.entries(tolerance))
    if not changed:
        return None
    code = "F64" if old.dtype == "F64" else "F32"
    if mode == "sparse":
        return _Change("sparse", _picked(partial(increments.entries, tolerance), old, code, changed), changed)
    norm = increments.norm() if mode == "lowrank" else 0.0
    if mode == "lowrank" and len(old.shape) > 1 and (found := leading(increments.matrix(), norm, rank, energy)) is not None:
        dtype = numpy_dtype(code)
        return _Change("lowrank", {"A": found.a.astype(dtype), "B": found.b.astype(dtype)}, changed, norm, found.captured)
    values = _Dense(code, old.shape, increments, threads)
    return _Change("dense", {"values": values}, changed, norm, norm)


def _exact(old: Tensor, new: Tensor, block: int) -> _Change | None:
    entries = partial(_differing, flat(old), flat(new), block)
    changed = sum(int(index.size) for index, _ in entries())
    if not changed:
        return None
    if changed * (ITEMSIZE[_index_code(old)] + ITEMSIZE[old.dtype]) >= new.nbytes:
        return _Change("assign", {"values": new}, changed)
    return _Change("assign", _picked(entries, old, old.dtype, changed), changed)


def _differing(old: Tensor, new: Tensor, block: int) -> Iterator[tuple[Array, Array]]:
    """Positions and new values of the entries whose bits differ, block by block."""
    import numpy as np

    bits = f"u{ITEMSIZE[old.dtype]}"
    for lo, hi in row_blocks(old.shape, block):
        after = new.rows(lo, hi)
        index = np.flatnonzero(old.rows(lo, hi).view(bits) != after.view(bits))
        yield index + lo, after[index]


def _index_code(tensor: Tensor) -> str:
    return "I32" if prod(tensor.shape) < 1 << 31 else "I64"


def _picked(entries: Callable[[], Iterator[tuple[Array, Array]]], old: Tensor, code: str, count: int) -> dict[str, Tensor]:
    """The fields `index` and `values` of a sparse op."""
    wide = numpy_dtype(_index_code(old))
    return {
        "index": Computed(_index_code(old), (count,), lambda: (index.astype(wide).tobytes() for index, _ in entries())),
        "values": Computed(code, (count,), lambda: (values.tobytes() for _, values in entries())),
    }


@dataclass(frozen=True, eq=False)
class _Dense(Made):
    """An increment, computed whenever it is read."""

    dtype: str
    shape: tuple[int, ...]
    increments: _Increments
    threads: int

    def parts(self) -> Iterator[Array]:
        return self.increments.ahead(self.threads)

    def rows(self, lo: int, hi: int) -> Array:
        step = prod(self.shape[1:])
        return self.increments.part(lo * step, hi * step).reshape(hi - lo, *self.shape[1:])

    def read(self) -> Array:
        return self.increments.part(0, prod(self.shape)).reshape(self.shape)


@dataclass
class _Increments:
    """new - old, rounded to float32 (float64 for F64); both tensors flat. Entries with equal bits, NaNs too, give 0."""

    what: str
    old: Tensor
    new: Tensor
    block: int
    shape: tuple[int, ...]

    def part(self, lo: int, hi: int) -> Array:
        import numpy as np

        from . import xp

        old, new = self.old.rows(lo, hi), self.new.rows(lo, hi)
        bits, wide = f"u{ITEMSIZE[self.old.dtype]}", "float64" if self.old.dtype == "F64" else "float32"
        with np.errstate(all="ignore"):
            out: Array = xp.cast(new, wide) - xp.cast(old, wide)
        if not np.isfinite(out).all():  # only there do equal bits not give 0
            out = np.where(old.view(bits) == new.view(bits), out.dtype.type(0), out)
        if not np.isfinite(out).all():
            at = lo + int(np.flatnonzero(~np.isfinite(out))[0])
            raise MismatchError(
                f"{self.what}: the change of entry {at} (flat position) from {float(old[at - lo])} to {float(new[at - lo])} is no finite increment",
                hint="make the diff exact",
            )
        return out

    def blocks(self) -> Iterator[Array]:
        for lo, hi in row_blocks(self.old.shape, self.block):
            yield self.part(lo, hi)

    def ahead(self, threads: int) -> Iterator[Array]:
        """The same blocks, computed ahead in threads."""
        return in_threads((partial(self.part, lo, hi) for lo, hi in row_blocks(self.old.shape, self.block)), threads)

    def matrix(self) -> Matrix:
        """The increment as a matrix."""
        rows, columns = flat_shape(self.shape)
        return Matrix((rows, columns), lambda lo, hi: self.part(lo * columns, hi * columns))

    def norm(self) -> float:
        """The squared norm, summed over blocks of a fixed size."""
        parts = (self.part(lo, hi).astype("float64") for lo, hi in row_blocks(self.old.shape, BLOCK))
        return sum(float(part @ part) for part in parts)

    def entries(self, tolerance: float) -> Iterator[tuple[Array, Array]]:
        """Positions and increments of the entries that change by more than `tolerance`."""
        import numpy as np

        start = 0
        for part in self.blocks():
            index = np.flatnonzero(abs(part) > tolerance)
            yield index + start, part[index]
            start += part.size
