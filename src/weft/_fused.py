"""The inner loops of merging and folding, each in one pass: weighted increments, elected signs, and the rounding.

Both are compiled (`_fused.c`) where a compiler was found when weft was installed, for bfloat16 and float32; else, and for
the other dtypes, they are numpy. The bits are the same either way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from . import xp

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_PIECE = 1 << 15
"""Entries that numpy works on at a time, so that they stay in cache."""


@cache
def _compiled() -> Any:
    """The compiled functions; None where there are none."""
    with suppress(OSError, AttributeError, ImportError):
        library = ctypes.CDLL(str(import_module("weft._fused_loops").__file__))
        library.weft_weighted.restype = ctypes.c_int
        library.weft_weighted.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        library.weft_elected.restype = ctypes.c_int64
        library.weft_elected.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        library.weft_settled.restype = ctypes.c_int64
        library.weft_settled.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_size_t, ctypes.c_void_p]
        return library
    return None


def _loops(*arrays: Array) -> Any:
    """The compiled functions if they can take these arrays."""
    names = {xp.dtype(array) for array in arrays}
    return _compiled() if len(names) == 1 and names <= {"bfloat16", "float32"} and all(array.flags.c_contiguous for array in arrays) else None


def weighted(old: Array, models: Sequence[Array], coefficients: Sequence[float]) -> Array | None:
    """0 + sum_k c_k (model_k - old) of stored values in float32, in order: a difference is rounded, then its product, then each sum.

    None if a difference is infinite or NaN. Coefficients are rounded to float32 first. F64 tensors are not for here.
    """
    import numpy as np

    loops = _loops(old, *models)
    if loops is None:
        base = xp.cast(old, "float32")
        with np.errstate(invalid="ignore", over="ignore"):
            out = np.zeros(old.shape, np.float32)
            for model, c in zip(models, coefficients, strict=True):
                tau = np.asarray(xp.cast(model, "float32") - base)
                if not np.isfinite(tau).all():
                    return None
                out += tau * np.float32(c)
        return out
    out = np.empty(old.shape, np.float32)
    places = (ctypes.c_void_p * len(models))(*[model.ctypes.data for model in models])
    factors = np.array(coefficients, np.float32)
    odd = loops.weft_weighted(xp.dtype(old) == "bfloat16", old.ctypes.data, places, factors.ctypes.data, len(models), out.ctypes.data, out.size)
    return None if odd else out


class Election(NamedTuple):
    """For each of several increments the magnitude below which an entry counts as 0, and the factors on its vote, on its value and on
    its share in the divisor. What is voted with is the increments themselves, unless `ballots` are other arrays of their shape."""

    least: Sequence[float]
    votes: Sequence[float]
    factors: Sequence[float]
    shares: Sequence[float]
    zero_is_plus: bool = False
    ballots: Sequence[Array] | None = None


def elected(taus: Sequence[Array], election: Election) -> Array:
    """Entry by entry: the sign of the sum of the votes wins (where that is 0, what `zero_is_plus` says), and the values of those that voted
    for it are added up and divided by the sum of their shares. 0 where nobody did. In the dtype of the increments, in order."""
    import numpy as np

    out = np.empty_like(taus[0])
    if _count(taus, election, out) is not None:
        return out
    votes = _votes(taus, election)
    mass = _summed(votes)
    plus = mass >= 0 if election.zero_is_plus else mass > 0
    minus = ~plus
    total, divisor = np.zeros_like(mass), np.zeros_like(mass)
    for tau, vote, factor, share in zip(taus, votes, election.factors, election.shares, strict=True):
        agrees = ((vote > 0) & plus) | ((vote < 0) & minus)
        total += tau * tau.dtype.type(factor) * agrees
        divisor += agrees * divisor.dtype.type(share)
    return np.asarray(total / (divisor + (divisor == 0)))


def balance(taus: Sequence[Array], election: Election) -> int:
    """At how many entries plus wins an election, less those at which minus does."""
    import numpy as np

    found = _count(taus, election, None)
    if found is None:
        mass = _summed(_votes(taus, election))
        found = int(np.count_nonzero(mass > 0)) - int(np.count_nonzero(mass < 0))
    return found


def _count(taus: Sequence[Array], election: Election, out: Array | None) -> int | None:
    """The balance, and the result in `out`, from the compiled function, if the increments are float32."""
    import numpy as np

    ballots = taus if election.ballots is None else election.ballots
    loops = _loops(*taus, *ballots)
    if loops is None or taus[0].dtype != np.float32:
        return None
    places, cast = ((ctypes.c_void_p * len(taus))(*[array.ctypes.data for array in arrays]) for arrays in (taus, ballots))
    numbers = np.array(election[:4], np.float32)
    where = None if out is None else out.ctypes.data
    return int(loops.weft_elected(places, cast, len(taus), numbers.ctypes.data, election.zero_is_plus, where, taus[0].size))


def _votes(taus: Sequence[Array], election: Election) -> list[Array]:
    import numpy as np

    ballots = taus if election.ballots is None else election.ballots
    each = zip(taus, ballots, election.least, election.votes, strict=True)
    return [ballot * (abs(tau).astype(np.float32, copy=False) >= np.float32(h)) * tau.dtype.type(e) for tau, ballot, h, e in each]


def _summed(arrays: Sequence[Array]) -> Array:
    import numpy as np

    total = np.zeros_like(arrays[0])
    for array in arrays:
        total += array
    return total


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
