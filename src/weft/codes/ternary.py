"""ternary: every entry is -scale, 0 or +scale.

cfg: {"scale": number above 0, "form": "golomb" or "bitmask"}. Decoded entries are F32: exactly float32(scale) with a sign, or +0. Coding keeps the sign
of each entry that is not zero and nothing else of it; float32(scale) must be finite and not 0.

golomb   a block of n entries, k of them not 0 at positions i_1 < ... < i_k, with gaps g_j = i_j - i_(j-1) - 1 (i_0 = -1):

             u32, little-endian: k * 256 + b
             k bits: the signs, 1 for minus
             b * k bits: the remainders g_j mod 2^b, as bit planes: the lowest bit of every remainder, then the next one, ...
             the quotients g_j div 2^b in unary: for each j as many 0 bits as the quotient says, then a 1

         each of the three filled up with 0 bits to whole bytes; bits fill a byte from its lowest. b is the Rice parameter that is optimal for gaps of a
         geometric distribution with the block's own density p = k / n (Golomb 1966; Gallager and van Voorhis 1975):

             b = max(0, 1 + floor(log2(log(phi - 1) / log(1 - p)))), phi = (sqrt(5) + 1) / 2; 0 for p = 1

         At a density of 5 % that is 0.6 % above the entropy of the positions and signs, H(p) + p bits an entry, plus 8 to 10 bytes a block.

bitmask  two bit planes of n bits, each filled up to whole bytes: not zero; minus (0 where the entry is zero). 2 bits an entry, whatever the density.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor, log, log2, sqrt
from typing import TYPE_CHECKING, Any

from ..errors import FormatError
from ._code import Code, Json

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_FORMS = ("golomb", "bitmask")
_HEAD = 4
_WIDEST = 16
"""The largest Rice parameter: gaps are shorter than a block."""


class Ternary(Code):
    """-scale, 0, +scale; positions as Golomb-coded gaps or as a bit mask."""

    name = "ternary"

    def check(self, dtype: str, shape: tuple[int, ...], cfg: Mapping[str, Json]) -> None:
        if set(cfg) != {"scale", "form"}:
            raise ValueError(f"cfg has scale and form, got {sorted(cfg)}")
        scale, form = cfg["scale"], cfg["form"]
        if type(scale) not in (int, float) or not 2**-149 <= scale <= (2 - 2**-23) * 2.0**127:
            raise ValueError(f"scale must be a positive number that float32 can hold, got {scale!r:.40}")
        if form not in _FORMS:
            raise ValueError(f"form must be one of {', '.join(_FORMS)}, got {form!r:.40}")
        if dtype != "F32":
            raise ValueError(f"its entries are F32, not {dtype}")

    def encode_block(self, values: Array, cfg: Mapping[str, Json], start: int) -> bytes:
        import numpy as np

        kept = values != 0
        if cfg["form"] == "bitmask":
            return _packed(kept) + _packed(kept & (values < 0))
        index = np.flatnonzero(kept)
        if not index.size:
            return bytes(_HEAD)
        b = rice(index.size, values.size)
        gaps: Array = np.diff(index.astype(np.int32), prepend=np.int32(-1))
        gaps -= 1
        ends = np.cumsum(gaps >> b) + np.arange(index.size)
        ones = np.zeros(int(ends[-1]) + 1, bool)
        ones[ends] = True
        low = np.array([gaps & (1 << place) for place in range(b)], np.bool_).reshape(-1)
        return (index.size << 8 | b).to_bytes(_HEAD, "little") + _packed(values[index] < 0) + _packed(low) + _packed(ones)

    def decode_block(self, data: memoryview, count: int, dtype: str, cfg: Mapping[str, Json], start: int) -> Array:
        import numpy as np

        scale = np.float32(cfg["scale"])
        if cfg["form"] == "bitmask":
            half = -(-count // 8)
            if len(data) != 2 * half:
                raise FormatError(f"two masks of {count:,} bits take {2 * half:,} bytes, got {len(data):,}")
            kept, minus = _bits(data[:half], count), _bits(data[half:], count)
            if (minus > kept).any():
                raise FormatError("a zero with a sign")
            return (kept.view(np.int8) - 2 * minus.view(np.int8)).astype(np.float32) * scale
        out = np.zeros(count, np.float32)
        index, minus = _positions(data, count)
        out[index] = np.array([scale, -scale])[minus]
        return out


def rice(k: int, n: int) -> int:
    """The Rice parameter for k of n positions, 1 <= k <= n."""
    if k == n:
        return 0
    phi = (sqrt(5) + 1) / 2
    return max(0, 1 + floor(log2(log(phi - 1) / log(1 - k / n))))


def _packed(bits: Array) -> bytes:
    import numpy as np

    return np.packbits(bits, bitorder="little").tobytes()


def _bits(data: memoryview, count: int) -> Array:
    """`count` bits, 0 or 1, from their bytes. FormatError if a bit after them is set."""
    import numpy as np

    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if bits[count:].any():
        raise FormatError("bits after the last one are set")
    return bits[:count]


def _positions(data: memoryview, count: int) -> tuple[Array, Array]:
    """Where the entries are that are not zero, and which of them are negative (0 or 1)."""
    import numpy as np

    k, b = int.from_bytes(data[:_HEAD], "little") >> 8, data[0] if len(data) else 0
    signs, low = -(-k // 8), -(-b * k // 8)
    first = _HEAD + signs
    if len(data) < _HEAD or k > count or b > _WIDEST or len(data) < first + low + signs:  # every quotient has a bit at least
        raise FormatError(f"{len(data):,} bytes cannot hold {k:,} of {count:,} positions, with {b} bits of each")
    unary = data[first + low :]
    if len(unary) > -(-(k + (count >> b)) // 8):  # before a byte becomes eight entries: the quotients add up to no more than count / 2^b
        raise FormatError(f"{len(unary):,} bytes of quotients for {k:,} of {count:,} positions")
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(unary, np.uint8), bitorder="little").view(bool))
    if ones.size != k or len(unary) != (ones[-1] // 8 + 1 if k else 0):
        raise FormatError(f"expected {k:,} positions, got {ones.size:,}, or bytes after the last one")
    steps = np.arange(k)
    index = ((ones - steps) << b) + steps  # the j-th one stands after j other ones and the sum of all quotients so far
    if b:
        planes = _bits(data[first : first + low], b * k).reshape(b, k)
        remainders = planes[0].astype(np.int64)
        for place in range(1, b):
            remainders |= planes[place].astype(np.int64) << place
        index += np.cumsum(remainders)
    if k and index[-1] >= count:
        raise FormatError(f"position {int(index[-1]):,} is outside a block of {count:,} entries")
    return index, _bits(data[_HEAD:first], k)


CODE = Ternary()
