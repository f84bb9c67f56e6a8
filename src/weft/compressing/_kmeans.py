"""Few values for many numbers: k-means in one dimension, from counts, the same bits every time.

The numbers are counted in 65,536 buckets, by the upper 16 bits of their float32 (a bfloat16 has a bucket of its own). The buckets are put
together into at most 512 groups, narrow where there are many numbers; dynamic programming finds the best k-means of these groups,
and Lloyd's iteration goes on from there with the buckets, until nothing moves. What is not exact is the grouping.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_BUCKETS = 1 << 16
_GROUPS = 512
_ROUNDS = 100


class Counts(NamedTuple):
    """How many numbers lie in each bucket, and their sum; buckets ascend."""

    size: Array
    total: Array


def counted(values: Array) -> Counts:
    """The counts of one block of finite numbers, of any float dtype."""
    import numpy as np

    with np.errstate(over="ignore"):
        bits = (values.astype(np.float32, copy=False) + np.float32(0)).view(np.uint32) >> np.uint32(16)  # -0 + 0 is +0
    bucket = bits ^ np.where(bits >> np.uint32(15), np.uint32(0xFFFF), np.uint32(0x8000))
    return Counts(np.bincount(bucket, minlength=_BUCKETS), np.bincount(bucket, values.astype(np.float64), minlength=_BUCKETS))


def added(parts: Iterable[Counts]) -> Counts:
    """The counts of all blocks together, added up in their order."""
    import numpy as np

    out = Counts(np.zeros(_BUCKETS, np.int64), np.zeros(_BUCKETS))
    for part in parts:
        out.size[:] += part.size
        out.total[:] += part.total
    return out


def levels(counts: Counts, k: int) -> list[float]:
    """At most k float32 values, ascending, so that the squared distance of all numbers from the nearest one is small."""
    import numpy as np

    there = np.flatnonzero(counts.size)
    size, total = counts.size[there].astype(np.float64), counts.total[there]
    mean = total / size
    if there.size > k:
        cuts = _partition(*_groups(size, total, mean), k)
        found = np.array([total[lo:hi].sum() / size[lo:hi].sum() for lo, hi in pairwise(cuts)])
        for _ in range(_ROUNDS):
            nearest = np.searchsorted((found[1:] + found[:-1]) / 2, mean)
            weight = np.bincount(nearest, size, minlength=found.size)
            moved = np.bincount(nearest, total, minlength=found.size)[weight > 0] / weight[weight > 0]
            if np.array_equal(moved, found):
                break
            found = moved
        mean = found
    return sorted({float(v) + 0.0 for v in mean.astype(np.float32)})  # JSON has no -0


def _groups(size: Array, total: Array, mean: Array) -> tuple[Array, Array, Array, Array]:
    """Where each group of buckets begins (and the end), and its size, sum and sum of squares. Widths follow the density to the power -1/3, which
    is best for many values (Panter and Dite 1951)."""
    import numpy as np

    starts = np.arange(size.size)
    if size.size > _GROUPS:
        starts = np.flatnonzero(np.diff(_shares(size, mean), prepend=-1))
    parts = [np.add.reduceat(each, starts) for each in (size, total, total * mean)]
    return np.append(starts, size.size), parts[0], parts[1], parts[2]


def _shares(size: Array, mean: Array) -> Array:
    """The number of each bucket's group."""
    import numpy as np

    mass = np.cumsum(np.cbrt(size) * np.cbrt(np.gradient(mean) ** 2))
    out: Array = np.minimum((mass / mass[-1] * _GROUPS).astype(np.int64), _GROUPS - 1)
    return out


def _partition(edges: Array, size: Array, total: Array, square: Array, k: int) -> list[int]:
    """The first bucket of each of k runs of groups with the least sum of squared distances from the runs' means, and the end."""
    import numpy as np

    n = size.size
    sums = [np.concatenate(([0.0], np.cumsum(each))) for each in (size, total, square)]
    count, first, second = (each[None, :] - each[:, None] for each in sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(count > 0, second - first * first / count, np.inf)  # cost[i, j]: of groups i to j - 1 as one run
    best, came = cost[0], []
    for _ in range(min(k, n) - 1):
        through = best[:, None] + cost
        came.append(through.argmin(0))
        best = through[came[-1], np.arange(n + 1)]
    ends = [n]
    for back in reversed(came):
        ends.append(int(back[ends[-1]]))
    return [int(edges[e]) for e in (0, *reversed(ends))]
