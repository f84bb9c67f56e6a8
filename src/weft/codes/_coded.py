"""Coded tensors: entries cut into blocks, each coded on its own, and the payload that holds them.

A payload is bytes: the lengths of all blocks as u32, little-endian, then the blocks. Block k has the entries k * BLOCK to
(k + 1) * BLOCK - 1, row-major. A tensor without entries has an empty payload.
"""

from __future__ import annotations

import sys
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import FormatError
from ..stored import BLOCK as BYTES
from ..stored import ITEMSIZE, Tensor, numpy_dtype
from ._code import Json
from ._spool import Spool

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

BLOCK = 1 << 16
"""Entries of one coded block. Part of the format."""

_TOGETHER = 16
"""Blocks that are read from the file at once."""

_SAID = 300
"""Characters of a message that may quote what a file holds."""

_RECENT = threading.local()
_FEW = 4

Run = Callable[[Iterable[Callable[[], bytes]]], Iterable[bytes]]
"""Runs jobs and gives their results in order: `engine.stream.in_threads` with a number of threads."""


@dataclass(frozen=True, eq=False)
class Coded(Tensor):
    """A tensor that is stored coded. `dtype` and `shape` are those of the decoded entries, `payload` a U8 tensor with one axis.

    Data is decoded whenever it is read, and only the blocks that are asked for. `nbytes` and `blocks` speak of the decoded
    data, `sha256` of the payload (as files do). FormatError for what does not fit; `where` begins its message.
    """

    dtype: str
    shape: tuple[int, ...]
    code: str
    cfg: Mapping[str, Json]
    payload: Tensor
    where: str = "a coded tensor"

    def __post_init__(self) -> None:
        from . import get

        try:
            if self.dtype not in ITEMSIZE:
                raise ValueError(f"unknown dtype {self.dtype[:40]!r}")
            get(self.code).check(self.dtype, self.shape, self.cfg)
        except (ValueError, TypeError, OverflowError, FormatError) as error:  # OverflowError: an integer too large for a float
            raise self._wrong(str(error)) from None
        size, least = self.payload.nbytes, 4 * self._count
        if self.payload.dtype != "U8" or len(self.payload.shape) != 1:
            raise self._wrong(f"a payload is U8 with one axis, got {self.payload.dtype} {list(self.payload.shape)}")
        if size < least or (size and not self._count):
            raise self._wrong(f"{self._count:,} blocks have a payload of at least {least:,} bytes (none: 0), got {size:,}")

    @property
    def storage(self) -> Tensor:
        return self.payload

    @property
    def coding(self) -> dict[str, Json]:
        return {"code": self.code, "cfg": dict(self.cfg), "dtype": self.dtype, "shape": list(self.shape)}

    @property
    def sha256(self) -> str:
        return self.payload.sha256

    @property
    def _count(self) -> int:
        return -(-prod(self.shape) // BLOCK)

    def _wrong(self, what: str) -> FormatError:
        return FormatError(f"{self.where}, code {self.code[:40]!r}: {what[:_SAID]}")

    def check(self) -> None:
        """FormatError unless the blocks fill the payload; reads their lengths alone."""
        self._places()

    def _places(self) -> array[int]:
        """Where each block begins in the payload, and where the last one ends; read once."""
        known: array[int] | None = self.__dict__.get("_found")
        if known is None:
            table, need = bytearray(), 4 * self._count
            for part in self.payload.blocks(BYTES) if need else ():
                table += part[: need - len(table)]
                if len(table) == need:
                    break
            lengths = array("I", bytes(table))
            if sys.byteorder == "big":
                lengths.byteswap()
            known = array("Q", accumulate(lengths, initial=need))
            if known[-1] != self.payload.nbytes:
                raise self._wrong(f"its blocks end at byte {known[-1]:,} of the payload, which has {self.payload.nbytes:,}")
            self.__dict__["_found"] = known
        return known

    def _decoded(self, first: int, last: int) -> Iterator[tuple[int, Array]]:
        """Blocks first..last, each with the position of its first entry."""
        from . import get

        rule, places, size, dtype = get(self.code), self._places(), prod(self.shape), numpy_dtype(self.dtype)
        for lo in range(first, last, _TOGETHER):
            hi = min(lo + _TOGETHER, last)
            data = self.payload.rows(places[lo], places[hi]).data
            for number in range(lo, hi):
                start = number * BLOCK
                count = min(BLOCK, size - start)
                try:
                    part = rule.decode_block(data[places[number] - places[lo] : places[number + 1] - places[lo]], count, self.dtype, self.cfg, start)
                    if part.shape != (count,) or part.dtype != dtype:
                        raise ValueError(f"expected {count} entries of {dtype}, got {part.dtype} {list(part.shape)}")
                except (ValueError, FormatError) as error:
                    raise self._wrong(f"block {number}: {error}") from None
                yield start, part

    def _recent(self, number: int) -> Array:
        """One block; the last few of each thread are kept, because a search in sorted positions comes back to them."""
        kept: tuple[tuple[weakref.ref[Coded], int, Array], ...] = getattr(_RECENT, "blocks", ())
        for tensor, which, part in kept:
            if tensor() is self and which == number:
                return part
        part = next(self._decoded(number, number + 1))[1]
        _RECENT.blocks = ((weakref.ref(self), number, part), *kept)[:_FEW]  # weak: a thread must not keep whole payloads
        return part

    def _entries(self, lo: int, hi: int) -> Array:
        """Flat entries lo..hi."""
        import numpy as np

        if hi <= lo:
            return np.empty(0, numpy_dtype(self.dtype))
        first, last = lo // BLOCK, (hi - 1) // BLOCK + 1
        if last - first == 1:
            return self._recent(first)[lo - first * BLOCK : hi - first * BLOCK].copy()
        out = np.empty(hi - lo, numpy_dtype(self.dtype))
        for start, part in self._decoded(first, last):
            inside = part[max(lo - start, 0) : hi - start]
            at = max(start - lo, 0)
            out[at : at + inside.size] = inside
        return out

    def read(self) -> Array:
        return self._entries(0, prod(self.shape)).reshape(self.shape)

    def rows(self, lo: int, hi: int) -> Array:
        step = prod(self.shape[1:])
        return self._entries(lo * step, hi * step).reshape(hi - lo, *self.shape[1:])

    def blocks(self, size: int = BYTES) -> Iterator[bytes | memoryview]:
        import numpy as np

        for _, part in self._decoded(0, self._count):
            raw = part.view(np.uint8)
            for start in range(0, raw.size, size):
                yield raw[start : start + size].data


def entries(tensor: Tensor, count: int = BLOCK) -> Iterator[Array]:
    """All entries of a tensor, row-major, in arrays of `count` (the last one may be shorter), however it gives its bytes. Treat them as read-only."""
    import numpy as np

    dtype, size, held, left = numpy_dtype(tensor.dtype), count * ITEMSIZE[tensor.dtype], bytearray(), prod(tensor.shape)
    for block in tensor.blocks(size):
        data = memoryview(block)
        while data:
            if not held and len(data) >= size:
                piece, data = data[:size], data[size:]
            else:
                part = data[: size - len(held)]
                data = data[len(part) :]
                held += part
                if len(held) < min(size, left * ITEMSIZE[tensor.dtype]):
                    break
                piece, held = memoryview(held), bytearray()
            values = np.frombuffer(piece, dtype)
            left -= values.size
            yield values
    if left:
        raise FormatError(f"a tensor of shape {list(tensor.shape)} gave {left:,} entries too few")


def encode(
    tensor: Tensor,
    code: str,
    cfg: Mapping[str, Json],
    *,
    dtype: str | None = None,
    each: Callable[[Array], Array] | None = None,
    run: Run | None = None,
    spool: Spool | None = None,
) -> Coded:
    """A tensor in coded form. It is read once, block by block; only the payload is kept.

    dtype: what is decoded (default: the tensor's own)
    each:  called with every block (one axis, the tensor's dtype, read-only) before it is coded: thresholds and the like
    run:   runs the jobs (default: one after the other). The result does not depend on it
    spool: keeps the payload (default: one of its own)
    """
    from . import get

    rule = get(code)

    def one(values: Array, start: int) -> bytes:
        return rule.encode_block(values if each is None else each(values), cfg, start)

    jobs = (partial(one, values, number * BLOCK) for number, values in enumerate(entries(tensor)))
    parts = (job() for job in jobs) if run is None else run(jobs)
    payload = (spool or Spool()).keep(parts, -(-prod(tensor.shape) // BLOCK))
    return Coded(dtype or tensor.dtype, tensor.shape, code, cfg, payload)
