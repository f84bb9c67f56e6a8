"""fold: write deltas into a new checkpoint.

    report = fold(Base.open("model"), [delta], "folded")
    report.changed, report.relative, report.tensors["model.norm.weight"].relative

The result is a checkpoint like the base: the same files with the same tensors, where nothing of the structure changes
even the same headers. Bytes that no op touches are copied by the kernel; the rest is computed block of rows by block of
rows. The bytes do not depend on the number of threads or on the size of blocks. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from . import _fused
from ._write import atomic_file, atomic_folder, require_space
from .base import INDEX, PICKLES, WEIGHTS, merge_patch
from .delta import Delta, Entry
from .engine.routed import differs
from .engine.stream import BLOCK, Fields, in_threads, one_blas_thread, reuse_memory, row_blocks
from .errors import FormatError, InputError, MismatchError, UsageError
from .file import _order, container_header
from .ops import OpEntry, chain
from .ops import get as op_named
from .stored import FLOATS, ITEMSIZE, Relative, Stored, Tensor, kept_open, numpy_dtype, read_container

if TYPE_CHECKING:
    import numpy as np

    from .base import Base, Progress

_STALE = (".safetensors", ".index.json", *PICKLES, ".h5", ".msgpack", ".ot", ".onnx", ".gguf")
"""Endings of files that hold weights, or speak of them: a copy would be the old model's."""

_PIECE = 16
"""Blocks in one job: enough to read what all of them share once, few enough that threads end together."""

_TOGETHER = 256
"""The most tensors in one job."""

_COPY = 64 << 20
"""Bytes copied in one job."""


@dataclass(frozen=True)
class Changed:
    """What folding did to one tensor.

    entries: its number of entries (of the removed tensor, where `change` is "remove")
    changed: how many have other bits than before, after rounding; all of them where `change` is set
    norm:    ||w||, moved: ||w' - w||, good to six digits; None where `change` is set, or the dtype is not floating point
    change:  "add", "replace", "copy", "remove", or None for a tensor changed in place
    """

    entries: int
    changed: int
    norm: float | None = None
    moved: float | None = None
    change: str | None = None

    @property
    def relative(self) -> float | None:
        """||w' - w|| / ||w||; None where it is not a number."""
        return _ratio(self.moved, self.norm)

    def json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"entries": self.entries, "changed": self.changed, "relative": self.relative}
        return out if self.change is None else {**out, "change": self.change}


@dataclass(frozen=True)
class FoldReport:
    """What a fold did: the new checkpoint's `path`, the ids of base and deltas, and each touched tensor by name."""

    path: Path
    base: str | None
    deltas: tuple[str, ...]
    nbytes: int
    """Bytes of tensor data in the new checkpoint."""
    tensors: Mapping[str, Changed] = field(default_factory=dict)
    config_changed: bool = False

    @property
    def changed(self) -> int:
        """Entries whose bits changed, of all tensors."""
        return sum(t.changed for t in self.tensors.values())

    @property
    def relative(self) -> float | None:
        """||w' - w|| / ||w|| over all tensors that were changed in place."""
        both = [(t.moved, t.norm) for t in self.tensors.values() if t.moved is not None and t.norm is not None]
        return _ratio(sqrt(sum(m * m for m, _ in both)), sqrt(sum(n * n for _, n in both))) if both else None

    @property
    def lost(self) -> list[str]:
        """Tensors that a delta touches but whose bits are all as before: the change is below the dtype's resolution."""
        return [name for name, t in self.tensors.items() if not t.changed and t.entries and t.change is None]

    def json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "path": str(self.path),
            "base": self.base,
            "deltas": list(self.deltas),
            "nbytes": self.nbytes,
            "changed": self.changed,
            "relative": self.relative,
            "lost": self.lost,
            "config_changed": self.config_changed,
            "tensors": {name: t.json() for name, t in self.tensors.items()},
        }


def _ratio(moved: float | None, norm: float | None) -> float | None:
    if moved is None or norm is None or not isfinite(moved) or not isfinite(norm):
        return None
    return 0.0 if moved == 0 else moved / norm if norm else None


def fold(
    base: Base,
    deltas: Sequence[Delta],
    out: str | Path,
    *,
    threads: int = 1,
    block: int | None = None,
    allow_noop: bool = False,
    progress: Progress | None = None,
) -> FoldReport:
    """Write the checkpoint that `deltas`, in this order, make of `base`; return what changed.

    out:        a folder that does not exist or is empty. From a base of one file, also a name ending in .safetensors,
                which takes the weights alone
    threads:    jobs that run at once; each needs a few blocks of memory. The result is the same
    block:      entries computed at a time (default 2^18; at least one row). The result is the same
    allow_noop: write a copy even if no bit changes
    progress:   called with the bytes of tensor data done and the bytes in all

    Ops of several deltas on one tensor are applied one after the other, with one rounding at the end; so this is not
    the fold of a fold. Ops that do not work row by row need their whole tensor in memory. Where a delta names tied
    tensors of which the base stores several equal copies, all of them are changed.

    Of a folder, config.json is written with the deltas' patches, and other files are copied, but not weights in other
    formats and no subfolder that has weights.

    MismatchError if a delta does not belong to this base, was made over a delta that does not come before it, has ops
    that exist only at run time, contradicts another one, or if nothing changes; WeftError if the disk is too small.
    """
    if threads < 1 or (block is not None and block < 1):
        raise UsageError(f"threads and block must be at least 1, got {threads} and {block}")
    if base.path is None:
        raise InputError(f"{base.source} is known only as a live module; fold reads the base's files", hint="open its checkpoint: Base.open(PATH)")
    ids = _check(base, deltas)
    report = folded(base, deltas, out, threads=threads, block=block, allow_noop=allow_noop, progress=progress)
    return replace(report, base=base.fingerprint, deltas=ids)


def folded(
    base: Base,
    deltas: Sequence[Delta],
    out: str | Path,
    *,
    threads: int = 1,
    block: int | None = None,
    allow_noop: bool = False,
    progress: Progress | None = None,
) -> FoldReport:
    """`fold` of deltas that are known to fit (a merge on its way into a checkpoint): nobody is asked for a hash, and the report names none."""
    out = Path(out)
    entries, tensors = combined(base, deltas)
    shards = _plan(base, entries)
    work = _Work(tensors, block or BLOCK, threads, progress, sum(item.nbytes for shard in shards for item in shard.items))
    config: dict[str, Any] = base.config
    for delta in deltas:
        config = merge_patch(config, delta.config)
    if out.suffix == ".safetensors":
        _require_one_file(base, out, config != base.config)
        with atomic_file(out) as handle:
            require_space(out, shards[0].size)
            found = work.run(shards, [handle.fileno()])
            report = _report(out, base, entries, found, work.total, False, allow_noop)
    else:
        with atomic_folder(out) as folder, ExitStack() as stack:
            others = list(_others(base))
            require_space(out, sum(shard.size for shard in shards) + sum(path.stat().st_size for path, _ in others))
            fds = []
            for shard in shards:
                fds.append(os.open(folder / shard.file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
                stack.callback(os.close, fds[-1])
            found = work.run(shards, fds)
            report = _report(out, base, entries, found, work.total, config != base.config, allow_noop)
            for path, name in others:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
            if config != base.config:
                (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            _write_index(base, shards, folder)
    return report


# --- what is to be done, from headers alone


def _check(base: Base, deltas: Sequence[Delta]) -> tuple[str, ...]:
    ids: list[str] = []
    for delta in deltas:
        delta.validate()
        delta.require_base(base, on=ids)
        ids.append(delta.id)
        if delta.unfoldable:
            kinds = [f"{target} ({', '.join(op.op for op in delta.entries[target].ops)})" for target in delta.unfoldable]
            shown = ", ".join(kinds[:8]) + (f" and {len(kinds) - 8} more" if len(kinds) > 8 else "")
            raise MismatchError(
                f"{delta.path or 'this delta'} ({ids[-1][:12]}) cannot be folded, because no checkpoint tensor holds what it does at run time: {shown}",
                hint="choose one of its tasks: --task NAME (weft.of_task)"
                if differs(delta)
                else "attach it to the model instead, or fold the part that changes tensors: delta.only([...])",
            )
    return tuple(ids)


def combined(base: Base, deltas: Sequence[Delta]) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """All deltas as one: entries by target, ops in order, and the tensors, under keys that name the delta too."""
    entries: dict[str, Entry] = {}
    tensors: dict[str, Tensor] = {}
    for number, delta in enumerate(deltas):
        names = {key: f"{number}/{key}" for key in delta.tensors} if len(deltas) > 1 else {}
        tensors |= {names.get(key, key): tensor for key, tensor in delta.tensors.items()}
        for target, entry in with_tied(base, delta).items():
            if names:
                entry = replace(entry, ops=tuple(op.renamed(names) for op in entry.ops))
            _fits(base, target, entry)
            before = entries.get(target)
            if before is not None and (before.base, before.change) != (entry.base, entry.change):
                raise MismatchError(f"{target}: the deltas change it in ways that do not combine (as {_kind(before)}, and as {_kind(entry)})")
            entries[target] = entry if before is None else replace(before, ops=before.ops + entry.ops)
    return entries, tensors


def _kind(entry: Entry) -> str:
    if entry.change is None:
        return "a change in place"
    return f"{entry.change.kind} of {entry.dtype or 'nothing'} {list(entry.shape)}" + (f" from {entry.change.source}" if entry.change.source else "")


def with_tied(base: Base, delta: Delta) -> dict[str, Entry]:
    """The delta's entries, with those for the other stored copies of a tied tensor that it changes."""
    entries = dict(delta.entries)
    for group in delta.tied:
        for name in group:
            entry = delta.entries.get(name)
            if entry is None or entry.base is None or entry.change is not None:
                continue
            for other in group:
                twin = base.tensors.get(other)
                if (
                    other not in entries
                    and twin is not None
                    and (twin.dtype, twin.shape) == (entry.dtype, entry.shape)
                    and base.sha256(other) == entry.base.sha256
                ):
                    entries[other] = entry
    return entries


def _fits(base: Base, target: str, entry: Entry) -> None:
    if entry.base is None:
        if target in base.tensors:
            raise MismatchError(f"{target}: the delta adds it, but {base.source} has it already", hint="replace it, or change it in place")
        return
    tensor = base.tensor(entry.change.source if entry.change and entry.change.source else target)
    if (tensor.dtype, tensor.shape) != (entry.base.dtype, entry.base.shape):
        raise MismatchError(f"{target}: expected {entry.base.dtype} {list(entry.base.shape)} in the base, got {tensor.dtype} {list(tensor.shape)}")


@dataclass(eq=False)
class _Item(Tensor):
    """One tensor of the result: `ops` on `source`, or on zeros, written from byte `offset` of the output file `number`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Tensor | None
    ops: tuple[OpEntry, ...] = ()
    change: str | None = None
    number: int = 0
    offset: int = 0


@dataclass
class _Shard:
    """One output file: the base's file of the same name, its header, its tensors in order of their place."""

    file: Path
    header: bytes
    items: list[_Item]

    @property
    def size(self) -> int:
        return len(self.header) + sum(item.nbytes for item in self.items)


def _plan(base: Base, entries: Mapping[str, Entry]) -> list[_Shard]:
    added = [_item(base, name, entry) for name, entry in entries.items() if name not in base.tensors]
    last = max(base.files, key=lambda file: file.name)
    shards: list[_Shard] = []
    stored: dict[Path, dict[str, Stored]] = {file: {} for file in base.files}
    for name, tensor in base.tensors.items():
        if isinstance(tensor, Stored):
            stored[tensor.path][name] = tensor
    for file, tensors in stored.items():
        there = sorted(tensors, key=lambda name: (tensors[name].offset, tensors[name].nbytes))
        items = [_item(base, name, entries.get(name)) for name in there if not _removed(entries.get(name))]
        if file == last:
            items += added
        if not items and len(base.files) > 1:
            continue
        if [(item.name, item.dtype, item.shape) for item in items] == [(name, tensors[name].dtype, tensors[name].shape) for name in there]:
            header = _header(file)
        else:
            layout = {item.name: item for item in items}
            order = _order(layout)
            items = [layout[name] for name in order]
            header = container_header(layout, order, read_container(file)[1])
        position = len(header)
        for item in items:
            item.number, item.offset = len(shards), position
            position += item.nbytes
        shards.append(_Shard(file, header, items))
    return shards


def _removed(entry: Entry | None) -> bool:
    return entry is not None and entry.change is not None and entry.change.kind == "remove"


def _item(base: Base, name: str, entry: Entry | None) -> _Item:
    if entry is None:
        tensor = base.tensor(name)
        return _Item(name, tensor.dtype, tensor.shape, tensor)
    if entry.change is None:
        return _Item(name, entry.dtype, entry.shape, base.tensor(name), entry.ops)
    source = base.tensor(entry.change.source) if entry.change.kind == "copy" else None
    return _Item(name, entry.dtype, entry.shape, source, entry.ops, entry.change.kind)


def _header(file: Path) -> bytes:
    with open(file, "rb") as handle:
        length = handle.read(8)
        return length + handle.read(int.from_bytes(length, "little"))


def _require_one_file(base: Base, out: Path, config_changed: bool) -> None:
    if len(base.files) > 1:
        raise UsageError(f"{base.source} has {len(base.files)} files, but {out} is one", hint=f"name a folder: {out.with_suffix('')}")
    if config_changed:
        raise UsageError(f"the deltas change the model's config, which {out} cannot hold", hint=f"name a folder: {out.with_suffix('')}")
    if out.exists() and out.samefile(base.files[0]):
        raise InputError(f"{out} is the base itself, which is never changed", hint="choose another name")


# --- doing it


@dataclass
class _Found:
    """What was counted in one tensor so far: entries changed, sums of squares of the change and of the base's values."""

    changed: int = 0
    moved: float = 0.0
    norm: float = 0.0

    def add(self, changed: int, moved: float, norm: float) -> None:
        self.changed += changed
        self.moved += moved
        self.norm += norm


_Part = tuple[int, str, _Found]
"""Bytes written, the tensor's name and what was found in it."""

_Result = tuple[int, list[tuple[str, _Found]]]


class _Piece(NamedTuple):
    """Some rows of a tensor: what computes and writes them, and where base + increment may come straight from files, the increment."""

    item: _Item
    lo: int
    hi: int
    run: Callable[[], _Part]
    nbytes: int
    values: Relative | None = None

    def from_files(self) -> _fused.Piece | None:
        if self.values is None:
            return None
        before = self.lo * (self.nbytes // (self.hi - self.lo))
        piece = self.values.piece(self.lo, self.hi, self.item.offset + before)
        return piece if isinstance(piece, _fused.Piece) else None


def _together(pieces: Sequence[_Piece], fd: int) -> _Result:
    with kept_open():
        quick = [piece.from_files() for piece in pieces]
        done = iter(_fused.merged_files([each for each in quick if each is not None], fd))
        merged = [None if each is None else next(done) for each in quick]
        parts = [
            piece.run() if got is None else (piece.nbytes, piece.item.name, _Found(got.changed, got.moved, got.norm))
            for piece, got in zip(pieces, merged, strict=True)
        ]
    return sum(part[0] for part in parts), [(name, found) for _, name, found in parts]


@dataclass
class _Work:
    """The data's way into the output files."""

    tensors: Mapping[str, Tensor]
    block: int
    threads: int
    progress: Progress | None
    total: int

    def run(self, shards: Sequence[_Shard], fds: Sequence[int]) -> dict[str, _Found]:
        """Fill the files; return what was found in every tensor that has ops."""
        for shard, fd in zip(shards, fds, strict=True):
            os.ftruncate(fd, shard.size)
            _write_all(fd, shard.header, 0)
        reuse_memory()
        found: dict[str, _Found] = {}
        done = 0
        with one_blas_thread(), closing(in_threads(self._jobs(shards, fds), self.threads)) as results:
            for nbytes, parts in results:
                for name, part in parts:
                    found.setdefault(name, _Found()).add(part.changed, part.moved, part.norm)
                done += nbytes
                if self.progress is not None:
                    self.progress(done, self.total)
        return found

    def _jobs(self, shards: Sequence[_Shard], fds: Sequence[int]) -> Iterator[Callable[[], _Result]]:
        """All that is to be done, in pieces of some size each: many tiny tensors make one job."""
        for shard, fd in zip(shards, fds, strict=True):
            for source, position, offset, count in _copies(shard.items):
                for start in range(0, count, _COPY):
                    yield partial(_copy, source, position + start, fd, offset + start, min(_COPY, count - start))
            held: list[_Piece] = []
            size = 0
            for item in shard.items:
                if item.ops and item.nbytes:
                    for piece in self._pieces(item, fd):
                        held.append(piece)
                        size += piece.nbytes // ITEMSIZE[item.dtype]
                        if size >= _PIECE * self.block or len(held) >= _TOGETHER:
                            yield partial(_together, held, fd)
                            held, size = [], 0
            if held:
                yield partial(_together, held, fd)

    def _pieces(self, item: _Item, fd: int) -> Iterator[_Piece]:
        if not item.shape or not chain.streams(item.shape, item.ops):
            yield _Piece(item, 0, item.shape[0] if item.shape else 1, partial(self._whole, item, fd), item.nbytes)
            return
        row = prod(item.shape[1:]) * ITEMSIZE[item.dtype]
        values = self._increment(item)
        if values is not None:
            direct = values if isinstance(values, Relative) and item.change is None else None
            for lo, hi in row_blocks(item.shape, _PIECE * self.block):
                yield _Piece(item, lo, hi, partial(self._added, item, values, fd, lo, hi), (hi - lo) * row, direct)
            return
        walked = [op for entry in item.ops for op in entry.walk()]
        raw = {key for op in walked if op.op != chain.SUM and op_named(op.op).raw for key in op.tensor_keys()}
        floats = {key for op in walked for key in op.tensor_keys() if self.tensors[key].dtype in FLOATS} - raw
        fields = Fields(self.tensors, floats if item.dtype != "F64" else ())
        for lo, hi in row_blocks(item.shape, _PIECE * self.block):
            yield _Piece(item, lo, hi, partial(self._rows, item, fields, fd, lo, hi), (hi - lo) * row)

    def _increment(self, item: _Item) -> Tensor | None:
        """The float32 increment, where that and nothing else is what happens to a tensor in place."""
        if len(item.ops) == 1 and item.ops[0].op == "dense" and not item.ops[0].cfg and item.source is not None and item.dtype != "F64":
            values = self.tensors[item.ops[0].t["values"].key]
            return values if values.dtype == "F32" else None
        return None

    def _added(self, item: _Item, values: Tensor, fd: int, lo: int, hi: int) -> _Part:
        """base + increment on some rows: the same as `_rows`, which does it for any ops."""
        assert item.source is not None
        found = _Found()
        row = prod(item.shape[1:]) * ITEMSIZE[item.dtype]
        for start, stop in row_blocks(item.shape, self.block, lo, hi):
            old = item.source.rows(start, stop)
            by = values.beside(start, stop, old) if isinstance(values, Relative) else values.rows(start, stop)
            part = _fused.settled(old, by)
            _write_all(fd, _raw(part.new), item.offset + start * row)
            found.add(part.changed if item.change is None else part.new.size, part.moved, part.norm)
        return (hi - lo) * row, item.name, found

    def _whole(self, item: _Item, fd: int) -> _Part:
        old = item.source.read() if item.source is not None else _zeros(item.dtype, item.shape)
        new = _rewrite(item.name, old, item.ops, lambda key: self.tensors[key].read())
        _write_all(fd, _raw(new), item.offset)
        return item.nbytes, item.name, _compare(item, old, new)

    def _rows(self, item: _Item, fields: Fields, fd: int, lo: int, hi: int) -> _Part:
        found = _Found()
        row = prod(item.shape[1:])
        for start, stop in row_blocks(item.shape, self.block, lo, hi):
            old = item.source.rows(start, stop) if item.source is not None else _zeros(item.dtype, (stop - start, *item.shape[1:]))
            rows = chain.Rows(item.ops, fields, item.shape, start, stop)
            new = _rewrite(item.name, old, rows.ops, rows.get)
            _write_all(fd, _raw(new), item.offset + start * row * ITEMSIZE[item.dtype])
            part = _compare(item, old, new)
            found.add(part.changed, part.moved, part.norm)
        return (hi - lo) * row * ITEMSIZE[item.dtype], item.name, found


def _zeros(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.zeros(shape, numpy_dtype(dtype))


def _rewrite(name: str, old: Any, ops: Sequence[OpEntry], get: Callable[[str], Any]) -> Any:
    try:
        return chain.rewrite(old, ops, get)
    except (ValueError, IndexError) as error:  # positions outside the tensor: headers cannot show that
        raise InputError(f"{name}: {error}") from error


def _raw(x: Any) -> Any:
    import numpy as np

    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _compare(item: _Item, old: Any, new: Any) -> _Found:
    """What was found in one block."""
    if item.change is not None:
        return _Found(new.size)
    if item.dtype in FLOATS:
        return _Found(*_fused.compared(old, new))
    return _Found(int((old.view(f"u{old.itemsize}") != new.view(f"u{old.itemsize}")).sum()))


def _write_all(fd: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _copies(items: Sequence[_Item]) -> Iterator[tuple[Stored, int, int, int]]:
    """Runs of untouched bytes: first tensor, its position in its file, place in the output, length. Neighbours become one run."""
    run: tuple[Stored, int, int, int] | None = None
    for item in items:
        if item.ops or not isinstance(item.source, Stored):
            continue
        source = item.source
        if run is not None and (source.path, source.offset, item.offset) == (run[0].path, run[1] + run[3], run[2] + run[3]):
            run = (run[0], run[1], run[2], run[3] + item.nbytes)
            continue
        if run is not None:
            yield run
        run = (source, source.offset, item.offset, item.nbytes)
    if run is not None:
        yield run


def _copy(source: Stored, position: int, fd: int, offset: int, count: int) -> _Result:
    """Copy bytes from the file of `source`, inside the kernel where it can."""
    left = count
    with open(source.path, "rb", buffering=0) as handle:
        while left and hasattr(os, "copy_file_range"):
            try:
                done = os.copy_file_range(handle.fileno(), fd, left, position, offset)
            except OSError:  # between file systems, or not supported here
                break
            if not done:
                break
            position, offset, left = position + done, offset + done, left - done
        while left:
            data = os.pread(handle.fileno(), min(left, 1 << 20), position)
            if not data:
                raise FormatError(f"{source.path}: it is shorter than its header says (it ended at byte {position:,})")
            _write_all(fd, data, offset)
            position, offset, left = position + len(data), offset + len(data), left - len(data)
        source.require_same(handle.fileno())
    return count, []


# --- the rest of the folder, and the report


def _others(base: Base) -> Iterator[tuple[Path, Path]]:
    """The files that go along, with their names in the new folder."""
    top = base.files[0].parent
    if base.path != top:  # opened as a single file: of what lies beside it, only the config is known to belong to it
        if (top / "config.json").is_file():
            yield top / "config.json", Path("config.json")
        return
    for folder, below, files in os.walk(top):
        here = Path(folder)
        if here != top and any(name.endswith(_STALE) for name in files):
            below.clear()
            continue
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(files):
            if not name.endswith(_STALE) and not name.startswith("."):
                yield here / name, here.relative_to(top) / name


def _write_index(base: Base, shards: Sequence[_Shard], folder: Path) -> None:
    if base.path is None or not (base.path / INDEX).is_file() or base.files[0].name == WEIGHTS:
        return
    index = json.loads((base.path / INDEX).read_bytes())
    metadata = dict(index.get("metadata") or {}, total_size=sum(item.nbytes for shard in shards for item in shard.items))
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(prod(item.shape) for shard in shards for item in shard.items)
    weight_map = {item.name: shard.file.name for shard in shards for item in shard.items}
    index = {**index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_bytes(msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n")  # json's own indenting is slow for many tensors


def _report(
    out: Path, base: Base, entries: Mapping[str, Entry], found: Mapping[str, _Found], nbytes: int, config_changed: bool, allow_noop: bool
) -> FoldReport:
    tensors: dict[str, Changed] = {}
    for name in sorted(entries):
        entry, counts = entries[name], found.get(name, _Found())
        kind = entry.change.kind if entry.change else None
        if kind is not None:
            size = prod(base.tensor(name).shape if kind == "remove" else entry.shape)
            tensors[name] = Changed(size, size, change=kind)
        elif entry.dtype in FLOATS:
            tensors[name] = Changed(prod(entry.shape), counts.changed, sqrt(counts.norm), sqrt(counts.moved))
        else:
            tensors[name] = Changed(prod(entry.shape), counts.changed)
    report = FoldReport(out, None, (), nbytes, tensors, config_changed)
    if not allow_noop and not config_changed and not report.changed and not any(t.change for t in tensors.values()):
        what = f"all {len(tensors)} changes are below the resolution of their dtypes" if tensors else "the deltas have no entries"
        raise MismatchError(f"folding into {base.source} changes nothing: {what}", hint="check the deltas' scale, or allow it: --allow-noop")
    return report
