"""planes: any entries, to the bit. Bytes of equal weight are put next to each other and compressed with zstd.

    cfg  {"level": zstd's level, "steps": whether whole numbers are stored as differences}

The signs and exponents of floats hardly vary, their last bits do; apart, zstd finds what there is to find in either. With `steps`, which
suits ascending positions, each entry but a block's first is stored minus the one before it, wrapping around.

Layout of a block of n entries: one zstd frame that states its content's size, n times the item size. The content is byte 0 (the lowest) of
every entry, then byte 1 of every entry, and so on (each best in zstd blocks of its own). The frame depends on zstd's version, the entries do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import FormatError
from ..stored import ITEMSIZE, numpy_dtype
from ._code import Code, Json

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_INTEGERS = frozenset({"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"})


class Planes(Code):
    """Byte planes and zstd."""

    name = "planes"
    lossless = True

    def check(self, dtype: str, shape: tuple[int, ...], cfg: Mapping[str, Json]) -> None:
        if set(cfg) != {"level", "steps"}:
            raise ValueError(f"the config has level and steps, got {sorted(cfg)}")
        if type(cfg["level"]) is not int or not 1 <= cfg["level"] <= 22:
            raise ValueError(f"the level must be from 1 to 22, got {str(cfg['level'])[:20]}")
        if type(cfg["steps"]) is not bool or (cfg["steps"] and dtype not in _INTEGERS):
            raise ValueError(f"steps must be true or false, and false for {dtype}, got {str(cfg['steps'])[:20]}")

    def encode_block(self, values: Array, cfg: Mapping[str, Json], start: int) -> bytes:
        import numpy as np
        import zstandard

        if cfg["steps"]:
            values = np.diff(values, prepend=values.dtype.type(0))
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(values.size, -1)
        made = zstandard.ZstdCompressor(level=cfg["level"]).compressobj(size=raw.size)
        parts = [made.compress(plane.tobytes()) + made.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for plane in raw.T]  # statistics of its own for each plane
        return b"".join((*parts, made.flush()))

    def decode_block(self, data: memoryview, count: int, dtype: str, cfg: Mapping[str, Json], start: int) -> Array:
        import numpy as np
        import zstandard

        size = count * ITEMSIZE[dtype]
        try:
            about = zstandard.get_frame_parameters(data)
            if about.content_size != size:  # checked first: memory is taken for what a frame claims
                raise FormatError(f"a zstd frame of {about.content_size:,} bytes where {size:,} were expected")
            content = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise FormatError(f"not a zstd frame ({error})") from None
        if len(content) != size:
            raise FormatError(f"a zstd frame gave {len(content):,} bytes where {size:,} were expected")
        values = np.frombuffer(np.frombuffer(content, np.uint8).reshape(-1, count).T.tobytes(), numpy_dtype(dtype))
        return np.cumsum(values, dtype=values.dtype) if cfg["steps"] else values


CODE = Planes()
