"""Order statistics of streams too long to hold: exact, in two passes, with 512 KB of counters.

The bits of a non-negative float32, read as an integer, are in the order of its value. So the first pass counts the
upper 16 bits of every magnitude, the second the lower 16 bits of those in the bucket that holds the wanted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError, UsageError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_BUCKETS = 1 << 16


class Kth(NamedTuple):
    """The k-th largest magnitude of a stream: its value, how many are larger, and how many are exactly as large."""

    value: np.float32
    above: int
    ties: int


def kth_largest_magnitude(make_blocks: Callable[[], Iterable[Array]], k: int) -> Kth:
    """The k-th largest |x| (k counts from 1) over all blocks that `make_blocks()` gives.

    The blocks are arrays of any shape and size; other dtypes are rounded to float32 first. `make_blocks` is called twice
    and must give the same values both times. Exact: the value is the one that sorting the whole stream would give;
    +0 and -0 are both 0, denormal numbers count by their value, infinities are the largest.

    Raises UsageError if k is not between 1 and the number of entries, InputError for a NaN or for a stream that changes.
    """
    coarse = _count(high for high, _ in _halves(make_blocks()))
    total = int(coarse.sum())
    if not 1 <= k <= total:
        raise UsageError(f"there is no {k}-th largest of {total:,} entries")
    bucket, above = _find(coarse, k)
    fine = _count(low[high == bucket] for high, low in _halves(make_blocks()))
    if int(fine.sum()) != int(coarse[bucket]):
        raise InputError(f"the entries changed between two passes over them (expected {int(coarse[bucket]):,} in one bucket, got {int(fine.sum()):,})")
    low, between = _find(fine, k - above)
    import numpy as np

    return Kth(np.array([(bucket << 16) | low], np.uint32).view(np.float32)[0], above + between, int(fine[low]))


def _find(counts: Array, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th largest, and how many entries are in the buckets above it."""
    import numpy as np

    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
    return counts.size - 1 - place, int(from_top[place] - counts[counts.size - 1 - place])


def _count(buckets: Iterable[Array]) -> Array:
    import numpy as np

    counts = np.zeros(_BUCKETS, np.int64)
    for each in buckets:
        counts += np.bincount(each, minlength=_BUCKETS)
    return counts


def _halves(blocks: Iterable[Array]) -> Iterator[tuple[Array, Array]]:
    """Upper and lower 16 bits of the magnitudes."""
    import numpy as np

    for block in _gathered(blocks):
        bits = block.view(np.uint32) & np.uint32(_MAGNITUDE)
        if bits.max() > _INFINITY:
            raise InputError("a NaN among the entries: it has no place in the order of magnitudes")
        yield bits >> np.uint32(16), bits & np.uint32(0xFFFF)


def _gathered(blocks: Iterable[Array]) -> Iterator[Array]:
    """The same entries as flat float32 arrays that are not tiny, so that thousands of small tensors cost no 65,536 counters each."""
    import numpy as np

    held: list[Array] = []
    size = 0
    for block in blocks:
        held.append(np.ascontiguousarray(block, np.float32).reshape(-1))
        size += held[-1].size
        if size >= _BUCKETS:
            yield held[0] if len(held) == 1 else np.concatenate(held)
            held, size = [], 0
    if size:
        yield np.concatenate(held)
