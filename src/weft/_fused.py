"""The inner loops of merging and folding: several increments become one, and an increment is added to stored values.

What they mean is written in numpy here. Where a compiler was found when weft was installed there is the same in C
(`_fused.c`) for bfloat16 and float32, which works in one pass on entries that stay in the processor's cache, from the files into
the file if need be. The bits are the same either way.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from . import xp
from .errors import InputError
from .stored import ITEMSIZE, Stored

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_PIECE = 1 << 15
"""Entries that numpy works on at a time, so that they stay in cache."""

_NONE, _MASS, _COUNT = range(3)
_INFINITY = float("inf")


@cache
def _compiled() -> Any:
    """The compiled functions; None where there are none."""
    with suppress(OSError, AttributeError, ImportError):
        library = ctypes.CDLL(str(import_module("weft._fused_loops").__file__))
        number, pointer, size, word = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
        rule: list[Any] = [number, pointer, pointer, ctypes.c_uint32, number, number, number]
        library.weft_combined.argtypes = [*rule, pointer, pointer, word, size, pointer]
        library.weft_merged.argtypes = [*rule, pointer, pointer, word, size, number, ctypes.c_int64, pointer, pointer]
        library.weft_near.argtypes = [number, pointer, pointer, size, number, pointer, pointer, size, pointer]
        library.weft_settled.restype = ctypes.c_int64
        library.weft_settled.argtypes = [number, *[pointer] * 3, size, pointer]
        return library
    return None


def _loops(*arrays: Array) -> Any:
    """The compiled functions if they can take these arrays."""
    names = {xp.dtype(array) for array in arrays}
    return _compiled() if len(names) == 1 and names <= {"bfloat16", "float32"} and all(array.flags.c_contiguous for array in arrays) else None


class Combination(NamedTuple):
    """How several increments become one, entry by entry. Each sequence has one number for each increment.

    factors:  f_k of t_k in the result
    least, most: t_k is tau_k where least_k <= |tau_k| <= most_k (compared as float32), and 0 elsewhere
    keys:     sequences of random numbers: t_k is 0, too, where 16-bit number `place` of the entry is below `dropped`
    votes:    without them, the result is sum_k f_k t_k. With them, the sign of sum_k votes_k t_k is elected (`by_count`: of
              sum_k votes_k sign(t_k)); where that sum is 0, it is plus if `zero_is_plus`. The result is then sum f_k t_k / sum shares_k
              over those whose vote has that sign, 0 where there are none
    """

    factors: Sequence[float]
    least: Sequence[float] | None = None
    most: Sequence[float] | None = None
    keys: Sequence[int] | None = None
    dropped: int = 0
    votes: Sequence[float] | None = None
    shares: Sequence[float] | None = None
    by_count: bool = False
    zero_is_plus: bool = False

    def only(self, numbers: Sequence[int]) -> Combination:
        """The same for some of the increments; the others are 0."""
        if len(numbers) == len(self.factors):
            return self
        chosen: dict[str, Any] = {name: [value[k] for k in numbers] for name, value in self._asdict().items() if isinstance(value, Sequence)}
        return self._replace(**chosen)

    def _numbers(self) -> tuple[Any, ...]:
        """As the compiled functions take it. The arrays must live as long as they are used."""
        import numpy as np

        n = len(self.factors)
        rows = (self.least or [0.0] * n, self.most or [_INFINITY] * n, self.votes or [0.0] * n, self.factors, self.shares or [1.0] * n)
        keys = None if self.keys is None else np.array([key % (1 << 64) for key in self.keys], np.uint64)
        return np.array(rows, np.float32), keys, self.dropped, _NONE if self.votes is None else _COUNT if self.by_count else _MASS, self.zero_is_plus


def combined(taus: Sequence[Array], rule: Combination, start: int) -> Array:
    """The combination of increments on a block whose first entry has the number `start` in its tensor.

    In the dtype of the increments: each product is rounded, then each sum, in order, from 0 on.
    """
    import numpy as np

    kept = _kept(taus, rule, start)
    total = np.zeros_like(taus[0])
    if rule.votes is None:
        for t, factor in zip(kept, rule.factors, strict=True):
            total += t * t.dtype.type(factor)
        return total
    votes = _votes(kept, rule)
    mass = _summed(votes)
    plus = mass >= 0 if rule.zero_is_plus else mass > 0
    divisor = np.zeros_like(mass)
    for t, vote, factor, share in zip(kept, votes, rule.factors, rule.shares or [1.0] * len(kept), strict=True):
        agrees = ((vote > 0) & plus) | ((vote < 0) & ~plus)
        total += t * t.dtype.type(factor) * agrees
        divisor += agrees * divisor.dtype.type(share)
    return np.asarray(total / (divisor + (divisor == 0)))


def balance(taus: Sequence[Array], rule: Combination, start: int) -> int:
    """At how many entries of a block plus wins the election, less those at which minus does."""
    import numpy as np

    mass = _summed(_votes(_kept(taus, rule, start), rule))
    return int(np.count_nonzero(mass > 0)) - int(np.count_nonzero(mass < 0))


def _kept(taus: Sequence[Array], rule: Combination, start: int) -> list[Array]:
    """t_k."""
    import numpy as np

    out = []
    for k, tau in enumerate(taus):
        keep: Any = None
        if rule.least is not None or rule.most is not None:
            size = abs(tau).astype(np.float32, copy=False)
            keep = size >= np.float32(rule.least[k] if rule.least else 0)
            if rule.most is not None:
                keep = keep & (size <= np.float32(rule.most[k]))
        if rule.keys is not None:
            drawn = (xp.sixteen_bits(rule.keys[k], start, tau.size) >= rule.dropped).reshape(tau.shape)
            keep = drawn if keep is None else keep & drawn
        out.append(tau if keep is None else np.asarray(tau * keep))  # times 0 or 1: many times faster than choosing
    return out


def _votes(kept: Sequence[Array], rule: Combination) -> list[Array]:
    import numpy as np

    assert rule.votes is not None
    return [np.asarray((np.sign(t) if rule.by_count else t) * t.dtype.type(vote)) for t, vote in zip(kept, rule.votes, strict=True)]


def _summed(arrays: Sequence[Array]) -> Array:
    import numpy as np

    total = np.zeros_like(arrays[0])
    for array in arrays:
        total += array
    return total


def combined_stored(old: Array, models: Sequence[Array], rule: Combination, start: int = 0) -> Array | None:
    """`combined` of the increments model - old of stored values, in float32. None if one of them is infinite or NaN. Not for F64 tensors."""
    import numpy as np

    loops = _loops(old, *models)
    if loops is None:
        base = xp.cast(old, "float32")
        with np.errstate(invalid="ignore", over="ignore"):
            taus = [np.asarray(xp.cast(model, "float32") - base) for model in models]
        return combined(taus, rule, start) if all(np.isfinite(tau).all() for tau in taus) else None
    out = np.empty(old.shape, np.float32)
    places = (ctypes.c_void_p * len(models))(*[model.ctypes.data for model in models])
    numbers, keys, *rest = rule._numbers()
    bf16 = xp.dtype(old) == "bfloat16"
    failed = loops.weft_combined(len(models), *_pointers(numbers, keys), *rest, bf16, *_pointers(old), places, start, out.size, *_pointers(out))
    _require_done(failed, 0)
    return None if failed else out


def _pointers(*arrays: Array | None) -> list[Any]:
    return [None if array is None else array.ctypes.data for array in arrays]


class Merged(NamedTuple):
    """How many entries changed, |new - old|^2, |old|^2, and the balance of the election."""

    changed: int
    moved: float
    norm: float
    balance: int


def merged_files(base: Stored, models: Sequence[Stored], rule: Combination, start: int, count: int, out: tuple[int, int] | None) -> Merged | None:
    """Entries start..start+count of a tensor: read from the files of base and models, combined, added to the base's and written.

    out: an open file and the position of the first of these entries in it; None: nothing is written, for the balance alone. None if that cannot be
    done here (other dtypes, no compiler), or if an increment is infinite or NaN; then nothing useful was written. InputError
    where a file cannot be read, OSError where it cannot be written.
    """
    import numpy as np

    loops = _compiled()
    if loops is None or {each.dtype for each in (base, *models)} not in ({"BF16"}, {"F32"}):
        return None
    found, sums = np.zeros(2, np.int64), np.zeros(2)
    numbers, keys, *rest = rule._numbers()
    files = (base, *models)
    places = _places(files, start)
    with _opened(files) as opened:
        where = (*_pointers(opened, places), start, count, *(out or (-1, 0)), *_pointers(found, sums))
        failed = loops.weft_merged(len(models), *_pointers(numbers, keys), *rest, base.dtype == "BF16", *where)
    _require_done(failed, int(found[0]), files)
    return None if failed else Merged(int(found[0]), float(sums[0]), float(sums[1]), int(found[1]))


class Near(NamedTuple):
    """Of some entries and two magnitudes: how many are above the high one, equal to it, equal to the low one (if it is another), and those
    strictly between; None for too many of these."""

    above: int
    high: int
    low: int
    inner: Array | None


def near_files(base: Stored, model: Stored, brackets: Sequence[tuple[float, float]], start: int, count: int) -> list[Near] | None:
    """What `engine.select` asks of increments start..start+count, for each (low, high), from files; None where that cannot be done here."""
    import numpy as np

    loops = _compiled()
    if loops is None or {base.dtype, model.dtype} not in ({"BF16"}, {"F32"}):
        return None
    room = max(1024, count // 16)
    counts, inner = np.zeros((len(brackets), 5), np.int64), np.empty((len(brackets), room + 1), np.float32)
    places, limits = _places((base, model), start), np.array(brackets, np.float32)
    with _opened((base, model)) as opened:
        where = (*_pointers(opened, places), count, len(brackets), *_pointers(limits, inner), room, *_pointers(counts))
        failed = loops.weft_near(base.dtype == "BF16", *where)
    _require_done(failed, int(counts[0, 0]), (base, model))
    if failed:
        return None
    return [Near(int(c[0]), int(c[1]), int(c[2]), None if c[4] else some[: c[3]].copy()) for c, some in zip(counts, inner, strict=True)]


def _places(files: Sequence[Stored], start: int) -> Array:
    import numpy as np

    return np.array([each.offset + start * ITEMSIZE[each.dtype] for each in files], np.int64)


@contextmanager
def _opened(files: Sequence[Stored]) -> Iterator[Array]:
    """Descriptors of the files of some tensors, which must be the same files afterwards."""
    import numpy as np

    with ExitStack() as stack:
        found = [stack.enter_context(each._opened()) for each in files]
        yield np.array(found, np.intc)
        for each, fd in zip(files, found, strict=True):
            each.require_same(fd)


def _require_done(failed: int, error: int, files: Sequence[Stored] = ()) -> None:
    """InputError where a file could not be read, OSError where one could not be written."""
    if failed == -2:
        why = os.strerror(error) if error else "one is shorter than its header says"
        raise InputError(f"cannot read {', '.join(dict.fromkeys(str(each.path) for each in files))}: {why}", hint="copy the files again")
    if failed == -3:
        raise OSError(error, os.strerror(error))
    if failed < 0:
        raise MemoryError


class Settled(NamedTuple):
    """The stored values of old + by; how many differ from old's in any bit, |new - old|^2 and |old|^2."""

    new: Array
    changed: int
    moved: float
    norm: float


def settled(old: Array, by: Array) -> Settled:
    """Stored values plus a float32 increment: added in float32, rounded once to the nearest even. A zero that stays zero keeps its sign."""
    import numpy as np

    loops = _loops(old)
    if loops is not None and by.dtype == np.float32 and by.flags.c_contiguous:
        new, sums = np.empty_like(old), np.zeros(2)
        changed = loops.weft_settled(xp.dtype(old) == "bfloat16", old.ctypes.data, by.ctypes.data, new.ctypes.data, old.size, sums.ctypes.data)
        return Settled(new, int(changed), float(sums[0]), float(sums[1]))
    was = xp.cast(old, xp.dtype(by))
    with np.errstate(all="ignore"):
        total = np.asarray(was + by)
        new = np.where((total == 0) & (was == 0), old, xp.cast(total, xp.dtype(old)))
    return Settled(new, *compared(old, new))


def compared(old: Array, new: Array) -> tuple[int, float, float]:
    """How many entries differ in any bit, and |new - old|^2 and |old|^2 in float64."""
    import numpy as np

    old, new = np.ascontiguousarray(old).reshape(-1), np.ascontiguousarray(new).reshape(-1)
    bits = f"u{old.itemsize}"
    moved = norm = 0.0
    with np.errstate(all="ignore"):
        for start in range(0, old.size, _PIECE):
            before, after = (x[start : start + _PIECE].astype(np.float64) for x in (old, new))
            after -= before
            norm += float(before @ before)
            moved += float(after @ after)
    return int(np.count_nonzero(old.view(bits) != new.view(bits))), moved, norm
