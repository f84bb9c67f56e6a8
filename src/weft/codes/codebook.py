"""codebook: every entry is one of a few values, `table[index]`, and only the indices are stored.

    cfg  {"table": [values, ascending, each a float32], "form": "packed" | "huffman" | "gaps"}

Decoded: the table's float32 values, rounded to the tensor's dtype. Encoded: each entry takes the index of the nearest value, the
lower one where two are as near. The entries must be finite.

Layout of a block of n entries with a table of K values (bits: see `_bits`; a Huffman code is given by the lengths of its words,
4 bits each, filled up to a byte, then the words: see `_huffman`):

    packed   n indices of ceil(log2 K) bits
    huffman  K lengths, n words
    gaps     for tables with a 0. u32 m: the number of other entries. If m > 0: 17 lengths, K lengths, and three lists of m items, each filled
             up to a byte. An entry with g zeros before it (since the last such entry) has v = g + 1 and e = floor(log2 v):
             the words of the e; the e lower bits of the v; the words of the indices. What is left of n after the last one is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, InputError
from ..stored import FLOATS, numpy_dtype
from . import _bits, _huffman
from ._code import Code, Json

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_FORMS = ("packed", "huffman", "gaps")
_MOST = 256
_EXPONENTS = 17


class Codebook(Code):
    """Entries that take at most 256 values."""

    name = "codebook"

    def check(self, dtype: str, shape: tuple[int, ...], cfg: Mapping[str, Json]) -> None:
        if set(cfg) != {"table", "form"}:
            raise ValueError(f"the config has table and form, got {sorted(cfg)}")
        if dtype not in FLOATS:
            raise ValueError(f"a codebook has floating-point values, not {dtype}")
        if cfg["form"] not in _FORMS:
            raise ValueError(f"unknown form {str(cfg['form'])[:40]!r}; there are {', '.join(_FORMS)}")
        table = cfg["table"]
        if not isinstance(table, list) or not 1 <= len(table) <= _MOST or not all(type(v) in (int, float) and _is_float32(v) for v in table):
            raise ValueError(f"the table must be a list of 1 to {_MOST} float32 values")
        if any(a >= b for a, b in pairwise(table)):
            raise ValueError("the values of the table must ascend")
        if cfg["form"] == "gaps" and 0 not in table:
            raise ValueError("the form 'gaps' needs a 0 in the table")

    def encode_block(self, values: Array, cfg: Mapping[str, Json], start: int) -> bytes:
        import numpy as np

        table = np.array(cfg["table"], np.float64)
        index = nearest(values, table)
        if cfg["form"] == "packed":
            return _bits.pack(index, _width(table.size))
        if cfg["form"] == "huffman":
            lengths = _huffman.code_lengths(np.bincount(index, minlength=table.size))
            return _bits.pack(lengths, 4) + _huffman.pack(index, lengths)
        places = np.flatnonzero(table[index])
        head = places.size.to_bytes(4, "little")
        if not places.size:
            return head
        steps = np.diff(places, prepend=-1)
        exponents = np.frexp(steps.astype(np.float64))[1] - 1
        index = index[places]
        far, which = (_huffman.code_lengths(np.bincount(each, minlength=size)) for each, size in ((exponents, _EXPONENTS), (index, table.size)))
        lists = _huffman.pack(exponents, far), _bits.pack_fields(steps, exponents), _huffman.pack(index, which)
        return b"".join((head, _bits.pack(far, 4), _bits.pack(which, 4), *lists))

    def decode_block(self, data: memoryview, count: int, dtype: str, cfg: Mapping[str, Json], start: int) -> Array:
        import numpy as np

        from .. import xp

        table = xp.cast(np.array(cfg["table"], np.float32), str(numpy_dtype(dtype)))
        if cfg["form"] == "gaps":
            return _from_gaps(data, count, table)
        if cfg["form"] == "packed":
            index = _bits.unpack(data, count, _width(table.size))
            if index.max() >= table.size:
                raise FormatError(f"index {index.max()} in a table of {table.size} values")
        else:
            head = _bits.size(table.size, 4)
            index, used = _huffman.unpack(data[head:], count, _bits.unpack(data[:head], table.size, 4))
            _all_used(data, head + used)
        out: Array = table[index]
        return out


def _from_gaps(data: memoryview, count: int, table: Array) -> Array:
    import numpy as np

    out = np.zeros(count, table.dtype)
    there, done = int.from_bytes(data[:4], "little"), 4
    if len(data) < 4 or there > count:
        raise FormatError(f"{there:,} of {count:,} entries are not zero, says a block of {len(data):,} bytes")
    if there:
        lengths = []
        for size in (_EXPONENTS, table.size):
            lengths.append(_bits.unpack(data[done : done + _bits.size(size, 4)], size, 4))
            done += _bits.size(size, 4)
        exponents, used = _huffman.unpack(data[done:], there, lengths[0])
        lower, more = _bits.unpack_fields(data[done + used :], exponents)
        index, last = _huffman.unpack(data[done + used + more :], there, lengths[1])
        done += used + more + last
        places = np.cumsum((np.int64(1) << exponents.astype(np.int64)) + lower) - 1
        if places[-1] >= count:
            raise FormatError(f"an entry at place {places[-1]:,} of a block of {count:,}")
        out[places] = table[index]
    _all_used(data, done)
    return out


def _all_used(data: memoryview, used: int) -> None:
    if len(data) != used:
        raise FormatError(f"a block of {len(data):,} bytes of which {used:,} are used")


def _width(size: int) -> int:
    return (size - 1).bit_length()


def _is_float32(value: float) -> bool:
    """Whether a number is a finite float32."""
    import struct

    try:
        return isfinite(value) and bool(struct.unpack("<f", struct.pack("<f", value))[0] == value)
    except OverflowError:
        return False


def nearest(values: Array, table: Array) -> Array:
    """For each value the index (U8) of the nearest number of an ascending table (float64), of two the lower. InputError for NaNs and infinities."""
    import numpy as np

    wide = np.asarray(values, np.float64)
    if not np.isfinite(wide).all():
        raise InputError(f"{int(np.count_nonzero(~np.isfinite(wide))):,} NaN or infinite entries have no place in a codebook")
    return np.searchsorted((table[1:] + table[:-1]) / 2, wide, "left").astype(np.uint8)


CODE = Codebook()
