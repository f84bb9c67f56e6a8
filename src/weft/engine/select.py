"""Order statistics of streams too long to hold: exact, in two passes, with 512 KB of counters.

`largest_magnitudes` is the fast one, where blocks can be had in any order: a sample tells between which two values the wanted
one lies, one pass counts what is above and gathers the few between. Where the sample was misleading, and for all else, there
are counters: the bits of a non-negative float32, read as an integer, are in the order of its value. So the first pass counts the
upper 16 bits of every magnitude, the second the lower 16 bits of those in the bucket that holds the wanted one. Values
with signs get that order when plus has its sign bit set and minus has every bit flipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .._fused import Near
from ..errors import InputError, UsageError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_SIGN = 0x80000000
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


Over = Callable[[Callable[[Any], Any], int], Iterable[Any]]
"""`over(function, every)`: function(block) of every block of a stream, or of each `every`-th one, in any order and any threads."""

Brackets = Sequence[tuple[float, float]]

Close = Callable[[Brackets], Iterable[list[Near]]]

_EVERY = 16
_SAMPLE = 1 << 20
"""About how many entries of every 16th block are a sample."""


def largest_magnitudes(over: Over, ranks: Sequence[int], size: int, close: Close | None = None) -> list[Kth]:
    """The k-th largest |x| (from 1) for each k of `ranks`, of a stream of `size` entries that is read once and a sixteenth.

    `close`: a quicker way to have `near` of all blocks, or of other pieces. The same answers as `kth_largest_magnitude`, and the
    same errors; the stream is read twice more where the sample was no guide.
    """
    import numpy as np

    step = 1 if size <= _SAMPLE else max(1, size // (_EVERY * _SAMPLE))
    sample = np.concatenate([np.zeros(0, np.float32), *over(partial(_magnitudes, step), 1 if size <= _SAMPLE else _EVERY)])
    sample.sort()
    possible = [k for k in ranks if 1 <= k <= size and sample.size and not np.isnan(sample[-1])]
    brackets = [_bracket(sample, k, size) for k in possible]
    if size <= _SAMPLE:
        parts = [near(brackets, sample)]
    else:
        parts = list(over(partial(near, brackets), 1) if close is None else close(brackets))
    found = {k: _settled(k, *bracket, [part[number] for part in parts]) for number, (k, bracket) in enumerate(zip(possible, brackets, strict=True))}
    return [found.get(k) or kth_largest_magnitude(lambda: over(_same, 1), k) for k in ranks]


def _same(block: Array) -> Array:
    return block


def _magnitudes(step: int, block: Array) -> Array:
    import numpy as np

    return np.abs(np.asarray(block, np.float32).reshape(-1)[::step])


def _bracket(sample: Array, k: int, size: int) -> tuple[Any, Any]:
    """Two values of a sorted sample, or its ends, between which the k-th largest of all should lie: six standard errors and half a per cent away."""
    import numpy as np

    share = 1 - (k - 0.5) / size
    margin = 0.0 if sample.size == size else 1 + 0.005 * sample.size + 6 * (sample.size * share * (1 - share)) ** 0.5
    low, high = int(share * sample.size - margin), int(share * sample.size + margin)
    return sample[low] if low >= 0 else np.float32(0), sample[high] if high < sample.size else np.float32("inf")


def near(brackets: Brackets, block: Array) -> list[Near]:
    """What lies above, at and between pairs of magnitudes in one block."""
    import numpy as np

    size = _magnitudes(1, block)
    if size.size and np.isnan(size.max()):
        raise InputError("a NaN among the entries: it has no place in the order of magnitudes")
    out = []
    for low, high in brackets:
        close = size[(size >= low) & (size <= high)]
        inner = close[(close > low) & (close < high)]
        top = int(np.count_nonzero(close == high))
        few = inner.size <= max(1024, size.size // 16)
        out.append(Near(int(np.count_nonzero(size > high)), top, close.size - inner.size - top, inner if few else None))
    return out


def _settled(k: int, low: Any, high: Any, parts: Sequence[Near]) -> Kth | None:
    """The k-th largest, if it is known from what was counted and gathered."""
    import numpy as np

    above, top, bottom = (sum(each) for each in zip(*(part[:3] for part in parts), strict=True))
    if above < k <= above + top:
        return Kth(high, above, top)
    gathered = [part.inner for part in parts if part.inner is not None]
    if k <= above or len(gathered) < len(parts):
        return None
    inner = np.sort(np.concatenate(gathered))
    place = k - above - top
    if place <= inner.size:
        value = inner[inner.size - place]
        first, last = (int(np.searchsorted(inner, value, side)) for side in ("left", "right"))
        return Kth(value, above + top + inner.size - last, last - first)
    return Kth(low, above + top + inner.size, bottom) if place <= inner.size + bottom else None


def kth_largest_of_streams(make_blocks: Callable[[], Iterable[tuple[int, Array]]], ranks: Sequence[Sequence[int]]) -> list[list[float]]:
    """The k-th largest values, signs included, of several streams read side by side.

    `make_blocks()` gives pairs (number of a stream, array of any shape) in any order; other dtypes are rounded to float32
    first. It is called twice and must give the same values both times. `ranks[i]` lists each k (from 1) wanted of stream i;
    the answer has the same form. Exact, as `kth_largest_magnitude` is, with 512 KB of counters for each rank; +0 and -0 are
    the same.

    Raises UsageError if a k is not between 1 and the number of entries, InputError for a NaN or for streams that change.
    """
    import numpy as np

    coarse = np.zeros((len(ranks), _BUCKETS), np.int64)
    for number, keys in _keys(make_blocks()):
        coarse[number] += np.bincount(keys >> np.uint32(16), minlength=_BUCKETS)
    for number, wanted in enumerate(ranks):
        total = int(coarse[number].sum())
        for k in wanted:
            if not 1 <= k <= total:
                raise UsageError(f"there is no {k}-th largest of {total:,} entries")
    found = [[_find(coarse[number], k) for k in wanted] for number, wanted in enumerate(ranks)]
    fine = {(number, bucket): np.zeros(_BUCKETS, np.int64) for number, places in enumerate(found) for bucket, _ in places}
    for number, keys in _keys(make_blocks()):
        high = keys >> np.uint32(16)
        for bucket in {bucket for bucket, _ in found[number]}:
            fine[number, bucket] += np.bincount(keys[high == bucket] & np.uint32(0xFFFF), minlength=_BUCKETS)
    for (number, bucket), counts in fine.items():
        if int(counts.sum()) != int(coarse[number, bucket]):
            raise InputError(
                f"the entries changed between two passes over them (expected {int(coarse[number, bucket]):,} in one bucket, got {int(counts.sum()):,})"
            )

    def value(number: int, k: int, bucket: int, above: int) -> float:
        key = (bucket << 16) | _find(fine[number, bucket], k - above)[0]
        bits = key ^ _SIGN if key & _SIGN else key ^ 0xFFFFFFFF
        return float(np.array([bits], np.uint32).view(np.float32)[0])

    return [
        [value(number, k, *place) for k, place in zip(wanted, places, strict=True)] for number, (wanted, places) in enumerate(zip(ranks, found, strict=True))
    ]


def _keys(pairs: Iterable[tuple[int, Array]]) -> Iterator[tuple[int, Array]]:
    """The entries of each stream as integers in the order of their values: sign bit flipped for plus, every bit for minus."""
    import numpy as np

    for number, block in _gathered_each(pairs):
        if np.isnan(block).any():
            raise InputError("a NaN among the entries: it has no place in the order of values")
        bits = (block + np.float32(0)).view(np.uint32)  # -0 + 0 is +0
        yield number, bits ^ np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(_SIGN))


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
    yield from (block for _, block in _gathered_each((0, block) for block in blocks))


def _gathered_each(pairs: Iterable[tuple[int, Array]]) -> Iterator[tuple[int, Array]]:
    """`_gathered` for each of several streams."""
    import numpy as np

    held: dict[int, list[Array]] = {}
    sizes: dict[int, int] = {}
    for number, block in pairs:
        held.setdefault(number, []).append(np.ascontiguousarray(block, np.float32).reshape(-1))
        sizes[number] = sizes.get(number, 0) + held[number][-1].size
        if sizes[number] >= _BUCKETS:
            mine = held.pop(number)
            del sizes[number]
            yield number, mine[0] if len(mine) == 1 else np.concatenate(mine)
    for number, size in sizes.items():
        if size:
            yield number, np.concatenate(held[number])
