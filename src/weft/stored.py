"""Tensors where they lie: the safetensors container, read strictly and in part.

`read_container` validates a whole header before a byte of data is used; `Stored` is one tensor inside such a file,
`Held` one in memory. Both give their data whole (`read`), by rows (`rows`) or as raw bytes in blocks (`blocks`), so
that whoever works with them never has to know which one it has. Nothing here imports numpy until data is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FormatError, InputError

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1 << 20
"""Bytes in one block of raw data."""

_AT_ONCE = 1 << 26
"""Bytes asked of the system at a time: Linux never gives more than 2 GiB, and copies in pieces stay in memory once."""

HEADER_LIMIT = 100_000_000
"""The largest safetensors header that is read (the format's own limit)."""

ITEMSIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes of one entry for each dtype code of the safetensors format that weft knows."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Dtypes that ops may compute on; every other one takes only `assign`."""

_NUMPY = {
    "F64": "float64", "I64": "int64", "U64": "uint64", "F32": "float32", "I32": "int32", "U32": "uint32",
    "F16": "float16", "I16": "int16", "U16": "uint16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_ML = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


def numpy_dtype(code: str) -> np.dtype[Any]:
    """The numpy dtype of a safetensors dtype code (bfloat16 and float8 through ml-dtypes)."""
    import numpy as np

    if code in _ML:
        import ml_dtypes

        odd: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _ML[code]))
        return odd
    return np.dtype(_NUMPY[code])


_CODES: dict[Any, str] = {}
# a plain dict, because torch.compile traces through functools.cache; it saves numpy's slow way of naming a dtype


def dtype_code(dtype: Any) -> str:
    """The safetensors code of a numpy or torch dtype."""
    code = _CODES.get(dtype)
    if code is None:
        code = _CODES[dtype] = _named_code(str(dtype).removeprefix("torch."))
    return code


def _named_code(name: str) -> str:
    for table in (_NUMPY, _ML):
        for code, known in table.items():
            if known == name:
                return code
    raise InputError(f"tensors of dtype {name} cannot be stored", hint=f"use one of {', '.join(ITEMSIZE)}")


def _stamp(fd: int) -> tuple[int, ...]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


_OPEN = threading.local()


@contextmanager
def kept_open() -> Iterator[None]:
    """Inside, on this thread, a file that tensors are read from stays open until the end: for many tensors of a few files."""
    if getattr(_OPEN, "files", None) is not None:
        yield
        return
    files: dict[Path, int] = {}
    _OPEN.files = files
    try:
        yield
    finally:
        _OPEN.files = None
        for fd in files.values():
            os.close(fd)


class Tensor:
    """One tensor, wherever its data is. `dtype` is a safetensors code, `shape` a tuple."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def storage(self) -> Tensor:
        """What a delta file holds of it: the tensor itself; of a coded one (`weft.codes`) its payload."""
        return self

    @property
    def coding(self) -> dict[str, Any] | None:
        """How to decode `storage`, as the manifest says it; None for a tensor that is stored as it is."""
        return None

    def check(self) -> None:
        """FormatError where it can be told without its numbers that they are not all there."""

    def blocks(self, size: int = BLOCK) -> Iterator[bytes | memoryview]:
        """The raw little-endian bytes, in order, in blocks of at most `size` bytes."""
        raise NotImplementedError

    def head(self, count: int) -> bytes | memoryview:
        """The first `count` raw bytes, or all if there are fewer."""
        return next(self.blocks(count), b"")

    def rows(self, lo: int, hi: int) -> np.ndarray[Any, Any]:
        """Rows lo..hi of the first axis, as a fresh array of the stored dtype."""
        raise NotImplementedError

    def read(self) -> np.ndarray[Any, Any]:
        """All data, as an array of the stored dtype. Treat it as read-only."""
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        """Hex sha256 of the raw bytes, computed once. (Not a cached_property: in Python 3.11 its one lock would serialise threads.)"""
        known = self.__dict__.get("_sha256")
        if known is None:
            known = self.__dict__["_sha256"] = digest(self)
        return str(known)


def digest(tensor: Tensor) -> str:
    """Hex sha256 of a tensor's raw bytes as they are now; nothing is kept."""
    found = hashlib.sha256()
    for block in tensor.blocks():
        found.update(block)
    return found.hexdigest()


@dataclass(frozen=True, eq=False)
class Stored(Tensor):
    """A tensor in a file: `nbytes` bytes from `offset`. `stamp`: what the file was when its header was read, to know it again."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    stamp: tuple[int, ...] | None = None

    def require_same(self, fd: int) -> None:
        """InputError unless the open file is the one whose header was read: in another one, the bytes at this place would be nonsense."""
        if self.stamp is not None and _stamp(fd) != self.stamp:
            raise InputError(f"{self.path} changed while it was being read", hint="open it again; give results names of their own")

    @contextmanager
    def _opened(self) -> Iterator[int]:
        held: dict[Path, int] | None = getattr(_OPEN, "files", None)
        fd = None if held is None else held.get(self.path)
        if fd is None:
            fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))  # io.open takes three times as long, and tensors can be many and tiny
            if held is not None:
                held[self.path] = fd
        try:
            yield fd
        finally:
            if held is None:
                os.close(fd)

    def _pread(self, fd: int, count: int, position: int) -> bytes | memoryview:
        data: bytes | memoryview = os.pread(fd, min(count, _AT_ONCE), position)
        self.require_same(fd)
        if count > _AT_ONCE:
            whole = memoryview(bytearray(count))
            done = len(data)
            whole[:done] = data
            while done < count and data:
                data = os.pread(fd, min(count - done, _AT_ONCE), position + done)
                whole[done : done + len(data)] = data
                done += len(data)
            data = whole[:done].toreadonly()
        if len(data) != count:
            raise FormatError(f"{self.path}: it is shorter than its header says (it ended at byte {position + len(data):,}, expected {position + count:,})")
        return data

    def head(self, count: int) -> bytes | memoryview:
        with self._opened() as fd:
            return self._pread(fd, min(count, self.nbytes), self.offset)

    def blocks(self, size: int = BLOCK) -> Iterator[bytes | memoryview]:
        end = self.offset + self.nbytes
        with self._opened() as fd:
            for position in range(self.offset, end, size):
                yield self._pread(fd, min(size, end - position), position)

    def rows(self, lo: int, hi: int) -> np.ndarray[Any, Any]:
        import numpy as np

        step = prod(self.shape[1:]) * ITEMSIZE[self.dtype]
        with self._opened() as fd:
            data = self._pread(fd, (hi - lo) * step, self.offset + lo * step)
        return np.frombuffer(data, numpy_dtype(self.dtype)).reshape(hi - lo, *self.shape[1:])

    def read(self) -> np.ndarray[Any, Any]:
        import numpy as np

        with self._opened() as fd:
            return np.frombuffer(self._pread(fd, self.nbytes, self.offset), numpy_dtype(self.dtype)).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Held(Tensor):
    """A tensor in memory."""

    array: np.ndarray[Any, Any]

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return dtype_code(self.array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.array.shape)

    def blocks(self, size: int = BLOCK) -> Iterator[bytes | memoryview]:
        import numpy as np

        flat = np.ascontiguousarray(self.array).reshape(-1).view(np.uint8)
        for start in range(0, flat.size, size):
            yield flat[start : start + size].data

    def rows(self, lo: int, hi: int) -> np.ndarray[Any, Any]:
        return self.array[lo:hi]

    def read(self) -> np.ndarray[Any, Any]:
        return self.array


@dataclass(frozen=True, eq=False)
class Computed(Tensor):
    """A tensor whose data is made on demand, block by block: results too large to hold, on their way into a file.

    `make()` starts a fresh iteration over the raw bytes, in order; the data is made again at every reading.
    """

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Iterator[bytes | memoryview]]

    def blocks(self, size: int = BLOCK) -> Iterator[bytes | memoryview]:
        return self.make()

    def read(self) -> np.ndarray[Any, Any]:
        import numpy as np

        return np.frombuffer(b"".join(self.make()), numpy_dtype(self.dtype)).reshape(self.shape)

    def rows(self, lo: int, hi: int) -> np.ndarray[Any, Any]:
        return self.read()[lo:hi]


class Made(Tensor):
    """A tensor that is computed whenever it is read, part by part."""

    def parts(self) -> Iterator[np.ndarray[Any, Any]]:
        """All its entries, in order, as arrays of its dtype and of any shapes."""
        raise NotImplementedError

    def blocks(self, size: int = BLOCK) -> Iterator[bytes | memoryview]:
        import numpy as np

        for part in self.parts():
            raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            for start in range(0, raw.size, size):
                yield raw[start : start + size].data


class Relative(Made):
    """A tensor of increments that are made of the base's values: whoever has read those may hand them over."""

    def piece(self, lo: int, hi: int, position: int) -> Any:
        """How base + increment on some rows comes from files (a `_fused.Piece`, written from `position` on); None where it takes `beside`."""
        return None

    def beside(self, lo: int, hi: int, old: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """`rows(lo, hi)` (of a scalar: all of it), `old` being the base's stored values there."""
        raise NotImplementedError


_NEAR = 1 << 12


def heads(tensors: Sequence[Tensor], count: int) -> list[bytes | memoryview]:
    """`head(count)` of several tensors; what lies close together in one file is read in one go."""
    found: list[bytes | memoryview] = [b""] * len(tensors)
    files: dict[Path, tuple[Stored, list[tuple[int, int, int]]]] = {}
    for number, tensor in enumerate(tensors):
        if isinstance(tensor, Stored):
            files.setdefault(tensor.path, (tensor, []))[1].append((tensor.offset, min(count, tensor.nbytes), number))
        else:
            found[number] = tensor.head(count)
    for file, places in files.values():
        places.sort()
        with file._opened() as fd:
            first = 0
            while first < len(places):
                begin = end = places[first][0]
                last = first
                while last < len(places) and places[last][0] - end <= _NEAR and places[last][0] - begin <= BLOCK:
                    end = places[last][0] + places[last][1]
                    last += 1
                data = memoryview(file._pread(fd, end - begin, begin))
                for offset, size, number in places[first:last]:
                    found[number] = data[offset - begin : offset - begin + size]
                first = last
    return found


def hold(value: Any) -> Tensor:
    """A numpy array, torch tensor or Tensor as a Tensor in memory (torch data is copied to the CPU)."""
    if isinstance(value, Tensor):
        return value
    if type(value).__module__.split(".")[0] == "torch" or hasattr(value, "detach"):
        from .xp import to_numpy

        value = to_numpy(value)
    import numpy as np

    return Held(np.asarray(value))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise FormatError(f"the key {key!r} stands twice in one JSON object")
        out[key] = value
    return out


def _no_constant(name: str) -> Any:
    raise FormatError(f"{name} is not JSON")


def strict_json(text: str | bytes, where: str, *, integer: Callable[[str], Any] = int) -> Any:
    """Parse JSON; duplicate keys, NaN, Infinity, deep nesting and bad UTF-8 are FormatErrors that name `where`.

    `integer` makes a value of the digits of an integer.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=integer)
    except FormatError as error:
        raise FormatError(f"{where}: {error.message}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON ({error})") from None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


@dataclass(slots=True)
class _Info:
    """What a header says of one tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_Header = tuple[dict[str, _Info], dict[str, str]]
_LONG = 1 << 16
"""Bytes of a header from which msgspec is worth its import, which a command as short as `show` would feel."""


def _plain_header(text: bytes, path: Path) -> _Header | None:
    """Tensors and metadata of a header; None where it is short, or anything is odd about it, for `_strict_header` to say what.

    A model can have many thousands of tensors, so this leaves the work to msgspec. That keeps the last of several equal keys, which are refused
    here: without escapes there are ten quotes for each tensor (its name, three fields, the dtype), and each further key would bring two more.
    """
    if len(text) < _LONG:
        return None
    import msgspec

    decoder = msgspec.json.Decoder(_Info)
    try:
        parts = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        keys = len(parts)
        said = bytes(parts.pop("__metadata__", b"{}"))
        if text.count(b"\\") != said.count(b"\\") or text.count(b'"') != 2 * keys + 8 * len(parts) + said.count(b'"'):
            return None
        infos = {name: decoder.decode(part) for name, part in parts.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return infos, _metadata(strict_json(said, f"{path}: __metadata__"), f"{path}: __metadata__")


def _strict_header(text: bytes, path: Path) -> _Header:
    """The same, slowly, with a FormatError for whatever is wrong."""
    header = strict_json(text, str(path))
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header is not a JSON object")
    metadata = _metadata(header.pop("__metadata__", {}), f"{path}: __metadata__")
    infos: dict[str, _Info] = {}
    for name, info in header.items():
        where = f"{path}: tensor {name!r}"
        if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"{where}: expected dtype, shape and data_offsets")
        if not isinstance(info["dtype"], str):
            raise FormatError(f"{where}: unknown dtype {info['dtype']!r}")
        for field, what in (("shape", "the shape must be a list of sizes"), ("data_offsets", "data_offsets must be two byte positions")):
            if not isinstance(info[field], list) or not all(map(_is_count, info[field])):
                raise FormatError(f"{where}: {what}, got {str(info[field])[:80]}")
        if len(info["data_offsets"]) != 2:
            raise FormatError(f"{where}: data_offsets must be two byte positions, got {str(info['data_offsets'])[:80]}")
        infos[name] = _Info(info["dtype"], info["shape"], (info["data_offsets"][0], info["data_offsets"][1]))
    return infos, metadata


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(f"{where} must map strings to strings")
    return value


def read_container(path: str | Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Validate the header of a safetensors file; return its tensors and its metadata.

    Refused, with the file and the tensor named: a header that is too large, truncated or not JSON, duplicate keys,
    unknown dtypes, negative or overflowing shapes, sizes that do not fit the shape, and data that overlaps, leaves
    a hole, or does not end where the file ends.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # opening a pipe would wait for its writer
            raise InputError(f"{path} is not a regular file; expected a .safetensors file")
        with open(path, "rb", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size
            head = handle.read(8)
            if len(head) < 8:
                raise FormatError(f"{path}: {size} bytes is too short for a safetensors file")
            length = int.from_bytes(head, "little")
            if length > HEADER_LIMIT or length > size - 8:
                raise FormatError(f"{path}: the header claims {length:,} bytes, but the file has {size:,} (it is truncated or not a safetensors file)")
            text, stamp = os.pread(handle.fileno(), length, 8), _stamp(handle.fileno())
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; expected a .safetensors file") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    infos, metadata = _plain_header(text, path) or _strict_header(text, path)
    tensors: dict[str, Stored] = {}
    spans = []
    for name, info in infos.items():
        where = f"{path}: tensor {name!r}"
        dtype, shape, (begin, end) = info.dtype, info.shape, info.data_offsets
        if dtype not in ITEMSIZE:
            raise FormatError(f"{where}: unknown dtype {dtype!r}")
        if len(shape) > 64 or not all(map(_is_count, shape)):
            raise FormatError(f"{where}: the shape must be a list of sizes, got {str(shape)[:80]}")
        if not _is_count(begin) or not _is_count(end):
            raise FormatError(f"{where}: data_offsets must be two byte positions, got {str([begin, end])[:80]}")
        need = prod(shape) * ITEMSIZE[dtype]
        if end - begin != need:
            raise FormatError(f"{where}: {dtype} of shape {shape} needs {need:,} bytes, data_offsets give {end - begin:,}")
        spans.append((begin, end, name))
        tensors[name] = Stored(path, dtype, tuple(shape), 8 + length + begin, stamp)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps another tensor" if begin < position else "leaves a hole before it"
            raise FormatError(f"{path}: tensor {name!r} {what} (starts at {begin}, expected {position})")
        position = end
    if 8 + length + position != size:
        raise FormatError(f"{path}: the tensors end at byte {8 + length + position:,}, the file has {size:,}")
    return tensors, metadata
