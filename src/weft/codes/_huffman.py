"""Canonical Huffman codes, both ways without a Python step for each symbol. Exact; what several codes use for one block.

    lengths = code_lengths(np.bincount(symbols, minlength=size))
    data = pack(symbols, lengths)
    symbols == unpack(data, symbols.size, lengths)

A code is known by the lengths of its words (0: the symbol does not occur), at most `LIMIT` bits: words of one length are consecutive numbers in the order
of their symbols, shorter words before longer ones. Bits fill each byte from its highest. Where only one symbol occurs its word has length 1
and takes no bits at all.

Decoding looks up, at every bit, the word that would begin there, which gives for every bit where the next word begins. That map is
composed with itself a few times, so that only every 16th word is found by walking; the words between are found all at once.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any

from ..errors import FormatError
from ._bits import pack_fields

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

LIMIT = 15
"""Bits of the longest word: a length fits in half a byte, and the table for decoding has 2^15 entries."""

_DOUBLINGS = 4


def code_lengths(counts: Array) -> Array:
    """The length of each symbol's word (U8) for symbols that occur `counts` times: Huffman's, with rare symbols rounded up until none is over `LIMIT`."""
    import numpy as np

    out = np.zeros(len(counts), np.uint8)
    there = np.flatnonzero(counts)
    if there.size == 1:
        out[there] = 1
    weights = [int(counts[s]) for s in there]
    while there.size > 1:
        depths = _depths(weights)
        if max(depths) <= LIMIT:
            out[there] = depths
            break
        weights = [(w + 1) // 2 for w in weights]
    return out


def _depths(weights: list[int]) -> list[int]:
    """The depth of each leaf in Huffman's tree; of equal weights the one made first is taken first."""
    parents = [0] * (2 * len(weights) - 1)
    heap = [(w, number) for number, w in enumerate(weights)]
    heapify(heap)
    for made in range(len(weights), len(parents)):
        (a, left), (b, right) = heappop(heap), heappop(heap)
        parents[left] = parents[right] = made
        heappush(heap, (a + b, made))
    depths = [0] * len(parents)
    for node in reversed(range(len(parents) - 1)):
        depths[node] = depths[parents[node]] + 1
    return depths[: len(weights)]


def _words(lengths: Array) -> Array:
    """The word of each symbol, as a number. FormatError unless the lengths are those of a complete code."""
    import numpy as np

    order = np.lexsort((np.arange(lengths.size), lengths))
    order = order[lengths[order] > 0]
    used = lengths[order].astype(np.int64)
    if used.size and (used[-1] > LIMIT or int((1 << (LIMIT - used)).sum()) != 1 << LIMIT) and used.tolist() != [1]:
        raise FormatError("the lengths of the Huffman words are not those of a complete code")
    room = 1 << (LIMIT - used)
    words = np.zeros(lengths.size, np.int64)
    words[order] = (np.cumsum(room) - room) >> (LIMIT - used)
    return words


def pack(symbols: Array, lengths: Array) -> bytes:
    """The words of `symbols` (integers), one after the other, filled up with zero bits to a whole byte."""
    if (lengths > 0).sum() < 2:
        return b""
    return pack_fields(_words(lengths)[symbols], lengths[symbols])


def unpack(data: memoryview | bytes, count: int, lengths: Array) -> tuple[Array, int]:
    """`count` symbols (U8) from the front of `data`, and how many bytes they take. FormatError if they are not there."""
    import numpy as np

    words = _words(lengths)
    there = np.flatnonzero(lengths)
    if there.size < 2 or not count:
        if count and not there.size:
            raise FormatError(f"{count:,} symbols of a Huffman code without words")
        return np.full(count, there[0] if count else 0, np.uint8), 0
    order = there[np.argsort(words[there] << (LIMIT - lengths[there].astype(np.int64)))]
    room = 1 << (LIMIT - lengths[order].astype(np.int64))  # how many of the numbers of `LIMIT` bits begin with each word
    windows = _windows(np.frombuffer(data, np.uint8)[: (count * LIMIT + 7) // 8])
    starts, end = _walk(np.repeat(lengths[order], room)[windows], count)
    return np.repeat(order.astype(np.uint8), room)[windows[starts]], (end + 7) // 8


def _windows(data: Array) -> Array:
    """The `LIMIT` bits from every bit of `data` on, zeros after the end."""
    import numpy as np

    padded = np.concatenate((data, np.zeros(2, np.uint8))).astype(np.int64)
    three = (padded[:-2] << 16) | (padded[1:-1] << 8) | padded[2:]
    return ((three[:, None] >> np.arange(24 - LIMIT, 16 - LIMIT, -1)) & ((1 << LIMIT) - 1)).reshape(-1)


def _walk(long: Array, count: int) -> tuple[Array, int]:
    """Where each of `count` words begins, and where the last one ends; `long` is the length of the word that would begin at each bit."""
    import numpy as np

    size = long.size
    after = np.arange(size + 2)
    after[:size] += long
    after[size] = size + 1  # there no word may begin, and where one ends beyond the last bit none may end
    maps = [np.minimum(after, size + 1, out=after)]
    for _ in range(_DOUBLINGS):
        maps.append(maps[-1][maps[-1]])
    far, place = maps.pop().data, 0
    found = []
    for _ in range(-(-count >> _DOUBLINGS)):
        found.append(place)
        place = far[place]
    starts = np.array(found, np.int64)
    for step in reversed(maps):
        starts = np.stack((starts, step[starts]), 1).reshape(-1)
    starts = starts[:count]
    end = int(after[starts[-1]])
    if end > size:
        raise FormatError(f"Huffman-coded data ends before its {count:,} symbols do")
    return starts, end
