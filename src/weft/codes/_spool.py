"""A place for payloads while a delta is made: memory for the first megabytes, then an unnamed temporary file."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable, Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..errors import WeftError
from ..stored import BLOCK, Tensor

if TYPE_CHECKING:
    import numpy as np

_IN_MEMORY = 64 << 20


class Spool:
    """Keeps any number of payloads, in one file if they are large. It goes when the last tensor in it goes."""

    def __init__(self, in_memory: int = _IN_MEMORY) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=in_memory)  # noqa: SIM115 (closed when nothing refers to the spool)
        weakref.finalize(self, self._file.close)
        self._size = 0
        self._lock = Lock()

    def keep(self, parts: Iterable[bytes], table: int) -> Tensor:
        """A payload: the lengths of `table` parts as u32, then the parts, which are written as they come. One at a time."""
        start, lengths = self._size, bytearray()
        self._size += 4 * table
        try:
            for part in parts:
                lengths += len(part).to_bytes(4, "little")
                self._write(part, self._size)
                self._size += len(part)
            self._write(lengths, start)
        except OSError as error:
            where = tempfile.gettempdir()
            raise WeftError(f"cannot keep coded data in {where}: {error.strerror or error}", hint="set TMPDIR to a folder with more room") from error
        return _Spooled(self, start, self._size - start)

    def _write(self, data: bytes | bytearray, position: int) -> None:
        with self._lock:
            self._file.seek(position)
            self._file.write(data)

    def read(self, position: int, count: int) -> bytes:
        """`count` bytes from `position`."""
        with self._lock:
            self._file.seek(position)
            return self._file.read(count)


class _Spooled(Tensor):
    """One payload in a spool: bytes, with one axis."""

    dtype = "U8"

    def __init__(self, spool: Spool, offset: int, size: int) -> None:
        self.shape = (size,)
        self._spool, self._offset = spool, offset

    def blocks(self, size: int = BLOCK) -> Iterator[bytes | memoryview]:
        end = self._offset + self.shape[0]
        for position in range(self._offset, end, size):
            yield self._spool.read(position, min(size, end - position))

    def rows(self, lo: int, hi: int) -> np.ndarray[Any, Any]:
        import numpy as np

        return np.frombuffer(self._spool.read(self._offset + lo, hi - lo), np.uint8)

    def read(self) -> np.ndarray[Any, Any]:
        return self.rows(0, self.shape[0])
