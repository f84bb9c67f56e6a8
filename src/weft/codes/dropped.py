"""dropped: entries that a random mask keeps; the others are 0. The mask is made again from its key, so positions cost nothing.

    cfg  {"key": 16 hex digits, "drop": 0 to 65535, "factor": c > 0, "dtype": "F32" | "BF16" | "F16" | "F64"}

Entry i of the tensor is kept where the 16-bit number i of the sequence `key` (`xp.sixteen_bits`) is at least `drop`: all but drop / 65,536 of the
entries. Decoded: the kept entries as stored, in `dtype`, widened or rounded to the tensor's dtype; 0 elsewhere. Encoded: c x in float32 with c rounded to it
(in float64 for F64 tensors), then rounded to `dtype`, nearest even. The entries must be finite, and so must c x be in `dtype`.

Layout of a block: the kept entries in order, little-endian.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import xp
from ..errors import FormatError, InputError
from ..stored import FLOATS, ITEMSIZE, numpy_dtype
from ._code import Code, Json

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class Dropped(Code):
    """What is left after dropping entries at random."""

    name = "dropped"

    def check(self, dtype: str, shape: tuple[int, ...], cfg: Mapping[str, Json]) -> None:
        if set(cfg) != {"key", "drop", "factor", "dtype"}:
            raise ValueError(f"the config has key, drop, factor and dtype, got {sorted(cfg)}")
        if dtype not in FLOATS or cfg["dtype"] not in FLOATS:
            raise ValueError(f"dropped entries are floating-point values, not {dtype} stored as {str(cfg['dtype'])[:20]}")
        key = cfg["key"]
        if not isinstance(key, str) or len(key) != 16 or not set(key) <= set("0123456789abcdef"):
            raise ValueError(f"the key must be 16 hex digits, got {str(key)[:40]!r}")
        if type(cfg["drop"]) is not int or not 0 <= cfg["drop"] < 1 << 16:
            raise ValueError(f"drop must be from 0 to 65,535, got {str(cfg['drop'])[:40]}")
        if type(cfg["factor"]) not in (int, float) or not 0 < cfg["factor"] < 1e300:
            raise ValueError(f"factor must be a number above 0, got {str(cfg['factor'])[:40]}")

    def encode_block(self, values: Array, cfg: Mapping[str, Json], start: int) -> bytes:
        import numpy as np

        wide = values if values.dtype == np.float64 else xp.cast(values, "float32")
        with np.errstate(over="ignore"):
            kept = xp.cast(wide[_mask(values.size, cfg, start)] * wide.dtype.type(cfg["factor"]), str(numpy_dtype(cfg["dtype"])))
        bad = int(np.count_nonzero(~np.isfinite(wide)) or np.count_nonzero(~np.isfinite(kept)))
        if bad:
            raise InputError(f"{bad:,} entries are NaN, infinite or beyond the range of {cfg['dtype']}")
        return bytes(kept.tobytes())

    def decode_block(self, data: memoryview, count: int, dtype: str, cfg: Mapping[str, Json], start: int) -> Array:
        import numpy as np

        mask = _mask(count, cfg, start)
        need = int(mask.sum()) * ITEMSIZE[cfg["dtype"]]
        if len(data) != need:
            raise FormatError(f"the mask keeps entries of {need:,} bytes, got {len(data):,}")
        out = np.zeros(count, numpy_dtype(dtype))
        out[mask] = xp.cast(np.frombuffer(data, numpy_dtype(cfg["dtype"])), str(out.dtype))
        return out


def _mask(count: int, cfg: Mapping[str, Json], start: int) -> Array:
    """Which of the entries from `start` on are kept."""
    kept: Array = xp.sixteen_bits(int(cfg["key"], 16), start, count) >= cfg["drop"]
    return kept


CODE = Dropped()
