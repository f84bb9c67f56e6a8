"""Unsigned numbers of a few bits each, one after the other without gaps, both ways without a Python step for each number.

Numbers of one width (`pack`, `unpack`): number i is bits i*width to (i+1)*width, lowest bit first, from the lowest bit of the first byte on.
Numbers of different widths (`pack_fields`, `unpack_fields`): highest bit first, from the highest bit of the first byte on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import FormatError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def size(count: int, width: int) -> int:
    """Bytes that `count` numbers take."""
    return (count * width + 7) // 8


def pack(numbers: Array, width: int) -> bytes:
    """`numbers` (U8, below 2^width; width 0 to 8), filled up with zero bits to a whole byte."""
    import numpy as np

    padded = np.concatenate((numbers, np.zeros(-numbers.size % 8, np.uint8))).reshape(-1, 8)
    words = np.zeros(len(padded), "<u8")  # eight numbers fill `width` bytes
    for k in range(8):
        words |= padded[:, k].astype(np.uint64) << np.uint64(k * width)
    return words.view(np.uint8).reshape(-1, 8)[:, :width].tobytes()[: size(numbers.size, width)]


def unpack(data: memoryview | bytes, count: int, width: int) -> Array:
    """`count` numbers (U8). FormatError unless `data` has exactly the bytes that they take."""
    import numpy as np

    if len(data) != size(count, width):
        raise FormatError(f"{count:,} numbers of {width} bits take {size(count, width):,} bytes, got {len(data):,}")
    groups = np.zeros((-(-count // 8), 8), np.uint8)
    padded = np.zeros(len(groups) * width, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    groups[:, :width] = padded.reshape(len(groups), width)
    words = groups.view("<u8")
    out = np.empty((len(groups), 8), np.uint8)
    for k in range(8):
        out[:, k] = ((words >> np.uint64(k * width)) & np.uint64((1 << width) - 1)).reshape(-1)
    return out.reshape(-1)[:count]


def pack_fields(numbers: Array, widths: Array) -> bytes:
    """`numbers` (integers), the i-th in `widths[i]` bits, filled up with zero bits to a whole byte."""
    import numpy as np

    ends = np.cumsum(widths, dtype=np.int64)
    bits = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    for place in range(int(widths.max(initial=0))):  # the place-th bit from the end of each number that has one
        here = widths > place
        bits[ends[here] - 1 - place] = (numbers[here] >> place) & 1
    return np.packbits(bits).tobytes()


def unpack_fields(data: memoryview | bytes, widths: Array) -> tuple[Array, int]:
    """Numbers of `widths` bits (at most 16 each) from the front of `data`, and how many bytes they take. FormatError if they are not there."""
    import numpy as np

    ends = np.cumsum(widths, dtype=np.int64)
    used = (int(ends[-1]) + 7) // 8 if ends.size else 0
    if used > len(data):
        raise FormatError(f"numbers that take {used:,} bytes, of which {len(data):,} are there")
    padded = np.zeros(used + 3, np.int64)
    padded[:used] = np.frombuffer(data[:used], np.uint8)
    starts = ends - widths
    at = starts >> 3
    word = (padded[at] << 16) | (padded[at + 1] << 8) | padded[at + 2]
    return (word >> (24 - (starts & 7) - widths)) & ((1 << widths.astype(np.int64)) - 1), used
