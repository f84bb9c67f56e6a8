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

_LOOPS = 2
"""What `weft_loops` of the compiled file says; of one that was left behind by another version the arguments would be others."""

_NONE, _MASS, _COUNT = range(3)
_INFINITY = float("inf")


@cache
def _compiled() -> Any:
    """The compiled functions; None where there are none."""
    with suppress(OSError, AttributeError, ImportError):
        library = ctypes.CDLL(str(import_module("weft._fused_loops").__file__))
        if library.weft_loops() != _LOOPS:
            return None
        number, pointer, size, word = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
        rule: list[Any] = [number, pointer, pointer, ctypes.c_uint32, number, number, number]
        library.weft_combined.argtypes = [*rule, pointer, word, size, pointer]
        library.weft_merged.argtypes = [number, *rule, *[pointer] * 4, number, *[pointer] * 4]
        library.weft_near.argtypes = [number, number, *[pointer] * 3, number, pointer, pointer, size, pointer]
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

    @property
    def _kind(self) -> tuple[Any, ...]:
        """What combinations that the compiled functions apply together have in common."""
        elect = _NONE if self.votes is None else _COUNT if self.by_count else _MASS
        return len(self.factors), self.keys is None, self.dropped, elect, self.zero_is_plus

    def _numbers(self) -> list[float]:
        """The rest, in their order."""
        n = len(self.factors)
        return [*(self.least or [0.0] * n), *(self.most or [_INFINITY] * n), *(self.votes or [0.0] * n), *self.factors, *(self.shares or [1.0] * n)]


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
    places = (ctypes.c_void_p * (len(models) + 1))(*[each.ctypes.data for each in (*models, old)])
    with _as_compiled([rule]) as rules:
        failed = loops.weft_combined(*rules, xp.dtype(old) == "bfloat16", places, start, out.size, out.ctypes.data)
    _require_done(failed, 0)
    return None if failed else out


@contextmanager
def _as_compiled(rules: Sequence[Combination]) -> Iterator[tuple[Any, ...]]:
    """The first arguments of the compiled functions, for combinations of one kind."""
    import numpy as np

    n, unmasked, dropped, elect, zero_is_plus = rules[0]._kind
    numbers = np.array([rule._numbers() for rule in rules], np.float32)
    keys = None if unmasked else np.array([[key % (1 << 64) for key in rule.keys or ()] for rule in rules], np.uint64)
    yield n, numbers.ctypes.data, None if keys is None else keys.ctypes.data, dropped, elect, zero_is_plus


class Piece(NamedTuple):
    """`entries` entries of one tensor, from number `first` on: the increments of `models` over `base`, to be combined by `rule`.

    `position`: of the first of them in the file that is written.
    """

    base: Stored
    models: Sequence[Stored]
    rule: Combination
    first: int
    entries: int
    position: int = 0

    @property
    def files(self) -> tuple[Stored, ...]:
        """Where to read, in the order of the compiled functions."""
        return (*self.models, self.base)


class Merged(NamedTuple):
    """How many entries changed, |new - old|^2, |old|^2, and the balance of the election."""

    changed: int
    moved: float
    norm: float
    balance: int


def merged_files(pieces: Sequence[Piece], out: int | None) -> list[Merged | None]:
    """Pieces of tensors read from the files of base and models, combined, added to the base's and written to an open file.

    out: its descriptor; None: nothing is written, for the balance alone. None for a piece that cannot be done here (other dtypes, no compiler), or
    where an increment is infinite or NaN; then nothing useful was written. InputError where a file cannot be read, OSError where it
    cannot be written.
    """
    import numpy as np

    merged: list[Merged | None] = [None] * len(pieces)
    for numbers in _alike(pieces).values():
        some = [pieces[number] for number in numbers]
        found, sums = np.zeros((len(some), 2), np.int64), np.zeros((len(some), 2))
        outs = np.array([piece.position for piece in some], np.int64)
        where = (-1 if out is None else out, outs.ctypes.data, None, found.ctypes.data, sums.ctypes.data)
        if _run_merged(some, where, found):
            for number, (changed, balance), (moved, norm) in zip(numbers, found.tolist(), sums.tolist(), strict=True):
                merged[number] = Merged(changed, moved, norm, balance)
    return merged


def combined_files(pieces: Sequence[Piece]) -> Array | None:
    """The combined increments of pieces of tensors, one after the other, in float32; None where that cannot be done here, or if one is infinite or NaN."""
    import numpy as np

    if [len(group) for group in _alike(pieces).values()] != [len(pieces)]:
        return None
    into, found, sums = np.empty(sum(piece.entries for piece in pieces), np.float32), np.zeros((len(pieces), 2), np.int64), np.zeros((len(pieces), 2))
    outs = np.cumsum([0, *(piece.entries for piece in pieces[:-1])])
    return into if _run_merged(pieces, (-1, outs.ctypes.data, into.ctypes.data, found.ctypes.data, sums.ctypes.data), found) else None


def _alike(pieces: Sequence[Piece]) -> dict[Any, list[int]]:
    """The places of those pieces that the compiled functions can take, by what they have in common."""
    groups: dict[Any, list[int]] = {}
    if _compiled() is not None:
        for number, piece in enumerate(pieces):
            dtypes = {each.dtype for each in piece.files}
            if dtypes in ({"BF16"}, {"F32"}):
                groups.setdefault((piece.base.dtype, piece.rule._kind), []).append(number)
    return groups


def _run_merged(pieces: Sequence[Piece], where: tuple[Any, ...], found: Array) -> bool:
    """Whether it was done; False if an increment is not finite."""
    with _as_compiled([piece.rule for piece in pieces]) as rules, _opened(pieces) as places:
        failed = _compiled().weft_merged(len(pieces), *rules, pieces[0].base.dtype == "BF16", *places, *where)
        if failed > 0:
            return False
        _require_done(failed, int(found.flat[1]), pieces[int(found.flat[0])].files if failed else ())
    return True


class Near(NamedTuple):
    """Of some entries and two magnitudes: how many are above the high one, equal to it, equal to the low one (if it is another), and those
    strictly between; None for too many of these."""

    above: int
    high: int
    low: int
    inner: Array | None


def near_files(pieces: Sequence[Piece], brackets: Sequence[tuple[float, float]]) -> list[Near] | None:
    """What `engine.select` asks of the increments of one model, for each (low, high), from files; None where that cannot be done here."""
    import numpy as np

    if [len(group) for group in _alike(pieces).values()] != [len(pieces)]:
        return None
    room = max(1024, sum(piece.entries for piece in pieces) // 16)
    counts, inner = np.zeros((len(brackets), 5), np.int64), np.empty((len(brackets), room + 1), np.float32)
    limits = np.array(brackets, np.float32)
    with _opened(pieces) as (fds, places, _, sizes):
        where = (fds, places, sizes, len(brackets), limits.ctypes.data, inner.ctypes.data, room, counts.ctypes.data)
        failed = _compiled().weft_near(len(pieces), pieces[0].base.dtype == "BF16", *where)
        if failed > 0:
            return None
        _require_done(failed, int(counts[0, 1]), pieces[int(counts[0, 0])].files if failed else ())
    return [Near(int(c[0]), int(c[1]), int(c[2]), None if c[4] else some[: c[3]].copy()) for c, some in zip(counts, inner, strict=True)]


@contextmanager
def _opened(pieces: Sequence[Piece]) -> Iterator[tuple[int, int, int, int]]:
    """Pointers to where pieces are: descriptors of their files (which must be the same files afterwards) and positions in these for each model and the
    base, and the first entry and the number of entries of each piece."""
    import numpy as np

    distinct = {each.path: each for piece in pieces for each in piece.files}
    with ExitStack() as stack:
        found = {path: stack.enter_context(each._opened()) for path, each in distinct.items()}
        width = ITEMSIZE[pieces[0].base.dtype]
        fds = np.array([found[each.path] for piece in pieces for each in piece.files], np.intc)
        places = np.array([each.offset + piece.first * width for piece in pieces for each in piece.files], np.int64)
        spans = np.array([[piece.first for piece in pieces], [piece.entries for piece in pieces]], np.int64)
        yield fds.ctypes.data, places.ctypes.data, spans[0].ctypes.data, spans[1].ctypes.data
        for path, each in distinct.items():
            each.require_same(found[path])


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
