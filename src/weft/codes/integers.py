"""integers: every entry is a small whole number times the scale of its group. What is commonly called int8 or int4.

    cfg  {"bits": 2 to 8, "group": entries in a group}

Decoded: q * scale, with q from -(2^(bits-1) - 1) to 2^(bits-1) - 1 and scale a bfloat16; float32 holds that product exactly, and it is then
rounded to the tensor's dtype. Encoded: scale = max |x| of the group / (2^(bits-1) - 1), rounded up to the next bfloat16, so that no entry
is cut; q = x / scale in float64, rounded to nearest even. The entries must be finite, and within float32, as must be q * scale. A group is
`group` entries in a row, row-major, within one block of the tensor (the last one of a block may be shorter): where `group` divides the last
axis and the block, that is along the last axis.

Layout of a block of n entries: the bfloat16 scale of each group, then n numbers q + 2^(bits-1) - 1 of `bits` bits (see `_bits`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, InputError
from ..stored import FLOATS, numpy_dtype
from . import _bits
from ._code import Code, Json

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_LARGEST = 0x7F7F
"""The bits of the largest finite bfloat16."""


class Integers(Code):
    """Whole numbers of a few bits, with one scale for each group of entries."""

    name = "integers"

    def check(self, dtype: str, shape: tuple[int, ...], cfg: Mapping[str, Json]) -> None:
        if set(cfg) != {"bits", "group"}:
            raise ValueError(f"the config has bits and group, got {sorted(cfg)}")
        if dtype not in FLOATS:
            raise ValueError(f"scaled integers have floating-point values, not {dtype}")
        if type(cfg["bits"]) is not int or not 2 <= cfg["bits"] <= 8:
            raise ValueError(f"bits must be from 2 to 8, got {str(cfg['bits'])[:20]}")
        if type(cfg["group"]) is not int or not 1 <= cfg["group"] <= 1 << 53:
            raise ValueError(f"a group has at least 1 entry, got {str(cfg['group'])[:20]}")

    def encode_block(self, values: Array, cfg: Mapping[str, Json], start: int) -> bytes:
        import numpy as np

        top = _top(cfg)
        wide = np.zeros(_shape(values.size, cfg))
        wide.reshape(-1)[: values.size] = values
        if not np.isfinite(wide).all():
            raise InputError(f"{int(np.count_nonzero(~np.isfinite(wide))):,} NaN or infinite entries have no place among scaled integers")
        scales = _round_up(np.abs(wide).max(1) / top)
        exact = _wide(scales).astype(np.float64)
        q = np.rint(wide / np.maximum(exact, 2.0**-200)[:, None])  # an all-zero group has scale 0
        beyond = int(np.count_nonzero(np.maximum(np.abs(q) * exact[:, None], np.abs(wide)) > np.finfo(np.float32).max))
        if beyond:
            raise InputError(f"{beyond:,} entries are beyond the range of F32")
        numbers = (q + top).astype(np.uint8).reshape(-1)[: values.size]
        return scales.astype("<u2").tobytes() + _bits.pack(numbers, cfg["bits"])

    def decode_block(self, data: memoryview, count: int, dtype: str, cfg: Mapping[str, Json], start: int) -> Array:
        import numpy as np

        from .. import xp

        shape = _shape(count, cfg)
        head = 2 * shape[0]
        if len(data) < head:
            raise FormatError(f"{shape[0]:,} scales take {head:,} bytes, got {len(data):,}")
        scales = np.frombuffer(data[:head], "<u2")
        if scales.max() > _LARGEST:
            raise FormatError("a scale is negative, infinite or NaN")
        numbers = np.full(shape, _top(cfg), np.uint8)
        numbers.reshape(-1)[:count] = _bits.unpack(data[head:], count, cfg["bits"])
        with np.errstate(over="ignore"):
            product = (numbers.astype(np.float32) - np.float32(_top(cfg))) * _wide(scales)[:, None]
        out: Array = xp.cast(product.reshape(-1)[:count], str(numpy_dtype(dtype)))
        return out


def _top(cfg: Mapping[str, Json]) -> int:
    return (1 << (int(cfg["bits"]) - 1)) - 1


def _shape(count: int, cfg: Mapping[str, Json]) -> tuple[int, int]:
    """Groups and entries in each, with the last group filled up."""
    group = min(int(cfg["group"]), count)
    return -(-count // group), group


def _wide(scales: Array) -> Array:
    """The bits of bfloat16 numbers as float32."""
    import numpy as np

    out: Array = (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return out


def _round_up(scales: Array) -> Array:
    """The bits of the least bfloat16 numbers that are not below `scales` (float64, not negative), the largest one at most."""
    import numpy as np

    with np.errstate(over="ignore"):
        single = scales.astype(np.float32)
        single = np.where(single < scales, np.nextafter(single, np.float32(np.inf)), single)
    bits = single.view(np.uint32)
    out: Array = np.minimum((bits >> np.uint32(16)) + ((bits & np.uint32(0xFFFF)) != 0), _LARGEST).astype(np.uint16)
    return out


CODE = Integers()
