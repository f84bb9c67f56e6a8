"""What a code is. Each code is one file beside this one, with one object called `CODE`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Json = Any


class Code:
    """Turns blocks of entries into bytes and back. Stateless; all that both ways must know is in `cfg`, plain JSON values.

    A tensor's entries, row-major, are coded in blocks of `codes.BLOCK` (the last one may be shorter), each on its own, so that
    any of them can be read alone. Methods may be called from several threads.
    """

    name: ClassVar[str]
    """The name in files: that of the code's own file."""
    lossless: ClassVar[bool] = False
    """Whether decoding gives back every entry to the bit; else what the code's docstring says."""

    def check(self, dtype: str, shape: tuple[int, ...], cfg: Mapping[str, Json]) -> None:
        """Raise ValueError unless `cfg` is complete and right, and entries of `dtype` (a safetensors code) in `shape` can be decoded.

        `cfg` comes from a file: trust nothing in it.
        """

    def encode_block(self, values: Array, cfg: Mapping[str, Json], start: int) -> bytes:
        """The bytes of one block: `values` has one axis and any dtype that the code takes, `start` is its first entry's flat position in the tensor."""
        raise NotImplementedError

    def decode_block(self, data: memoryview, count: int, dtype: str, cfg: Mapping[str, Json], start: int) -> Array:
        """The `count` entries (at least 1) of one block, a fresh array of `dtype` with one axis.

        FormatError for bytes that `encode_block` cannot have made, before memory is taken that they do not need. All of `data` must be used.
        """
        raise NotImplementedError
