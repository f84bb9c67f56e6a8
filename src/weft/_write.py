"""The one place that writes results.

A file or folder appears under its final name whole or not at all: it is written under a temporary name in the same
folder, synced, given the mode that the umask asks for, renamed, and the folder is synced. A killed process leaves only
a temporary name, `.NAME.PID-RANDOM.weft-tmp`; the next write into that folder removes those whose process is gone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import InputError, WeftError

_TMP = re.compile(r"^\..*\.(\d+)-[0-9a-f]{8}\.weft-tmp$")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # a number that no process can have
        return False
    except OSError:  # it exists but belongs to someone else, or we cannot ask
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        from shutil import rmtree  # here, for its import is a tenth of the time that `weft show` takes

        rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> list[Path]:
    """Remove temporary names in `folder` whose process no longer runs; return what was removed."""
    gone = []
    for entry in os.scandir(folder):
        match = _TMP.match(entry.name)
        if match and not _alive(int(match[1])):
            _remove(Path(entry.path))
            gone.append(Path(entry.path))
    return gone


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    """The process's umask. It can only be read by setting it; on Linux /proc tells it without the race."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _prepare(path: Path) -> Path:
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: the folder {folder} does not exist", hint=f"mkdir -p {folder}")
    sweep(folder)
    return folder / f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.weft-tmp"


def require_space(path: Path, needed: int) -> None:
    """WeftError if the disk of `path` has no room for `needed` bytes: to ask before the first of them is computed."""
    from shutil import disk_usage

    free = disk_usage(path.parent).free
    if needed > free:
        raise WeftError(f"cannot write {path}: it needs {needed:,} bytes, {free:,} are free; nothing was changed", hint="make room, or name another disk")


def _explain(path: Path, error: OSError) -> WeftError:
    from shutil import disk_usage

    free = ""
    with suppress(OSError):
        free = f" ({disk_usage(path.parent).free:,} bytes are free)"
    return WeftError(f"cannot write {path}: {error.strerror or error}{free}; nothing was changed")


@contextmanager
def _becoming(path: Path) -> Iterator[Path]:
    """A temporary name that is renamed to `path` when the block ends without an error, and removed if it does not."""
    tmp = _prepare(path)
    try:
        yield tmp
        os.replace(tmp, path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(tmp)
        raise _explain(path, error) from error
    except BaseException:
        _remove(tmp)
        raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file open for reading and writing that becomes `path` when the block ends without an error.

    On an error nothing is left and an existing `path` is untouched. OSErrors come out as WeftError that names `path`.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    with _becoming(path) as tmp:
        fd = os.open(tmp, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        with os.fdopen(fd, "w+b") as handle:
            yield handle
            handle.flush()
            os.fchmod(handle.fileno(), 0o666 & ~_umask())
            os.fsync(handle.fileno())


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A fresh folder to fill that becomes `path` when the block ends without an error. `path` must not exist, or be empty."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"cannot write {path}: it exists already", hint="choose another name, or remove it first")
    with _becoming(path) as tmp:
        tmp.mkdir(mode=0o700)
        yield tmp
        mask = _umask()
        for folder, _, files in os.walk(tmp):
            for name in files:
                fd = os.open(os.path.join(folder, name), os.O_RDONLY)
                try:
                    os.fchmod(fd, 0o666 & ~mask)
                    os.fsync(fd)
                finally:
                    os.close(fd)
            os.chmod(folder, 0o777 & ~mask)
            _sync_folder(Path(folder))
        if path.exists():
            path.rmdir()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a small result (JSON, HTML, a plot) atomically."""
    with atomic_file(path) as handle:
        handle.write(data)
