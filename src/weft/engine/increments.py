"""Increments: what several updates add to one base, tensor by tensor, in blocks of rows.

An update is a `Delta` or a whole checkpoint (a `Base`), whose increment on a tensor is checkpoint - base. Whoever
combines updates (merging, averaging over clients) reads them here and never sees which kind it has:

    models = Increments([delta, Base.open("tuned")], Base.open("base"))
    for block in models.blocks():
        taus = models.read_all(block)            # one float32 array for each update

Everything that can be known from headers is checked first, and all that is wrong is reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from .. import xp
from .._fused import Combination, Near, Piece, balance, combined, combined_files, combined_stored, merged_files, near_files
from ..base import Base
from ..delta import BaseTensor, Change, Delta, Entry, merge_patches
from ..errors import InputError, MismatchError, UsageError
from ..file import KEY, read
from ..folding import with_tied
from ..ops import chain
from ..ops import get as op_named
from ..ops.spec import Json, OpEntry
from ..stored import FLOATS, Stored, Tensor, heads, kept_open, read_container
from .select import Brackets, Close, Over, near
from .stream import BLOCK, Fields, in_threads, row_blocks

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_SHOWN = 40
_TOGETHER = 256
"""The most tensors in one job."""

_R = TypeVar("_R")

Span = tuple["Target", int, int]
"""Rows lo..hi of a target."""


@dataclass(frozen=True)
class Target:
    """A tensor that at least one update changes: dtype code and shape as in the base, what a delta says of the base tensor,
    the change that declares it if the updates add it (increments are then relative to zeros), and the base that has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    known: BaseTensor | None = None
    change: Change | None = None
    origin: Base | None = field(default=None, compare=False, repr=False)

    @property
    def added(self) -> bool:
        """Whether the base does not have it."""
        return self.change is not None

    @property
    def base(self) -> BaseTensor | None:
        """The base tensor, None for an added one. Asks for its hash, which may mean reading it."""
        if self.known is None and self.origin is not None and not self.added:
            return BaseTensor(self.dtype, self.shape, self.origin.sha256(self.name))
        return self.known

    def disagrees(self, other: Target) -> bool:
        """Whether both cannot be the same tensor of the same base."""
        hashes = {each.known.sha256 for each in (self, other) if each.known is not None}
        return (self.dtype, self.shape, self.change) != (other.dtype, other.shape, other.change) or len(hashes) > 1

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def wide(self) -> str:
        """The dtype of increments: "float64" for an F64 tensor, else "float32"."""
        return "float64" if self.dtype == "F64" else "float32"

    @property
    def stored_as(self) -> str:
        """The dtype code of increments: "F64" or "F32"."""
        return "F64" if self.wide == "float64" else "F32"

    @property
    def whole(self) -> Block:
        """The block of all rows."""
        return Block(self, 0, self.rows)

    def blocks(self, entries: int = BLOCK) -> Iterator[Block]:
        """The tensor in blocks of whole rows, about `entries` entries or one row each. None if it is empty."""
        if self.size:
            for lo, hi in row_blocks(self.shape or (1,), entries):
                yield Block(self, lo, hi)


@dataclass(frozen=True)
class Block:
    """Rows lo..hi of a target."""

    target: Target
    lo: int
    hi: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.hi - self.lo, *self.target.shape[1:]) if self.target.shape else ()

    @property
    def start(self) -> int:
        """Flat position of the first entry in the target."""
        return self.lo * (self.target.size // self.target.rows)


def independent(ops: Iterable[OpEntry]) -> bool:
    """Whether a chain's increment is the same for every w, so that the base is not needed to know it."""
    return all(all(independent(term.ops) for term in op.terms) if op.op == chain.SUM else op_named(op.op).additive for op in ops)


class _Checkpoint:
    """A whole checkpoint as an update. Tensors with the base's own bytes are no part of it."""

    def __init__(self, ckpt: Base, base: Base, label: str) -> None:
        self.ckpt, self.base, self.label = ckpt, base, label

    def problems(self) -> Iterator[str]:
        for name, tensor in self.base.tensors.items():
            mine = self.ckpt.tensors.get(name)
            if mine is None:
                yield f"{self.label}: tensor {name!r} of the base is missing"
            elif mine.shape != tensor.shape or (mine.dtype != tensor.dtype and not {mine.dtype, tensor.dtype} <= FLOATS):
                yield f"{self.label}: tensor {name!r}: expected {tensor.dtype} {list(tensor.shape)}, got {mine.dtype} {list(mine.shape)}"
        for name in self.ckpt.tensors:
            if name not in self.base.tensors:
                yield f"{self.label}: tensor {name!r} is not in the base (make a delta of this checkpoint with `weft diff`, and merge that)"

    def changed(self, threads: int) -> Iterator[str]:
        """Names of the tensors whose bytes differ, found by comparing them up to the first difference. Only for a checkpoint without problems."""
        names = list(self.base.tensors)
        parts = [names[k : k + _TOGETHER] for k in range(0, len(names), _TOGETHER)]
        for some in in_threads((partial(self._differing, part) for part in parts), threads):
            yield from some

    def _differing(self, names: Sequence[str]) -> list[str]:
        with kept_open():
            return [
                name for name, same in zip(names, _alike([self.base.tensors[n] for n in names], [self.ckpt.tensors[n] for n in names]), strict=True) if not same
            ]

    def by_rows(self, target: Target) -> bool:
        return bool(target.shape)

    def increment(self, block: Block, old: Array | None = None) -> Array:
        """theta - theta_0; `old`: the base's stored values there, if they have been read already."""
        before = stored_rows(self.base.tensors[block.target.name], block) if old is None else old
        after = stored_rows(self.ckpt.tensors[block.target.name], block)
        if block.target.wide == "float32" and (out := combined_stored(before, [after], Combination([1.0]))) is not None:
            return out
        return _difference(xp.cast(after, block.target.wide), xp.cast(before, block.target.wide), block, self.label)


class _Update:
    """A delta as an update. `start`: the deltas it was made over, whose effect comes before its own."""

    def __init__(self, delta: Delta, base: Base | None, label: str) -> None:
        self.delta, self.base, self.label = delta, base, label
        live = set(delta.unfoldable)
        self.entries = {name: entry for name, entry in delta.entries.items() if name not in live}
        self.start: tuple[Delta, ...] = ()
        self._fields: tuple[str, list[Fields]] = ("", [])

    def problems(self) -> Iterator[str]:
        for name in self.delta.unfoldable:
            yield f"{self.label}: {name} changes activations, not a tensor; such an entry cannot be merged"
        for name, entry in self.entries.items():
            kind = entry.change.kind if entry.change else None
            if kind not in (None, "add"):
                yield f"{self.label}: tensor {name!r}: a {kind} entry changes the structure and cannot be merged"
            elif entry.dtype not in FLOATS:
                yield f"{self.label}: tensor {name!r} is {entry.dtype}; only floating-point tensors can be merged"
            elif self.base is not None:
                yield from self._against(self.base, name, entry)
            for before in self.start:
                if name in before.entries and before.entries[name].change:
                    yield f"{self.label}: tensor {name!r}: a delta that it was made over changes the structure there"

    def _against(self, base: Base, name: str, entry: Entry) -> Iterator[str]:
        there = base.tensors.get(name)
        if entry.change is not None:
            if there is not None:
                yield f"{self.label}: tensor {name!r} is added, but the base has it already"
        elif there is None:
            yield f"{self.label}: tensor {name!r} is not in the base"
        elif (there.dtype, there.shape) != (entry.dtype, entry.shape):
            yield f"{self.label}: tensor {name!r}: made for {entry.dtype} {list(entry.shape)}, the base has {there.dtype} {list(there.shape)}"

    def needs_base(self, name: str) -> bool:
        entry = self.entries[name]
        return entry.change is None and not independent(entry.ops)

    def _chain(self, name: str) -> list[tuple[Delta, Sequence[OpEntry]]]:
        """What is applied to get the increment: this delta's ops, after those it was made over if they matter."""
        before = [(d, d.entries[name].ops) for d in self.start if name in d.entries] if self.needs_base(name) else []
        return [*before, (self.delta, self.entries[name].ops)]

    def _read_once(self, name: str) -> list[Fields]:
        """For each delta of the chain its tensors, of which the small factors are kept until another target is asked for."""
        kept = self._fields
        if kept[0] != name:
            kept = self._fields = (name, [Fields(delta.tensors) for delta, _ in self._chain(name)])
        return kept[1]

    def by_rows(self, target: Target) -> bool:
        return all(chain.streams(target.shape, ops) for _, ops in self._chain(target.name))

    def increment(self, block: Block, old: Array | None = None) -> Array:
        """What its ops add; `old`: the base's stored values there, if they have been read already."""
        import numpy as np

        name = block.target.name
        if not self.needs_base(name):
            before = after = np.zeros(block.shape, block.target.wide)
        elif self.base is None:
            raise UsageError(f"{self.label}: tensor {name!r}: its change depends on the base's values; give the base", hint="base=PATH (--base PATH)")
        else:
            before = after = xp.cast(stored_rows(self.base.tensors[name], block) if old is None else old, block.target.wide)
        steps = self._chain(name)
        chain.require_first([op for _, ops in steps for op in ops])
        for (delta, ops), fields in zip(steps, self._read_once(name), strict=True):
            before, after = after, _apply(after, delta, ops, fields, block)
        return _difference(after, before, block, self.label)


def _alike(a: Sequence[Tensor], b: Sequence[Tensor]) -> Iterator[bool]:
    """Which of several pairs of tensors, each of one shape, have the same dtype and bytes. Most that differ do so at once."""
    size = 1 << 12
    for x, y, one, other in zip(a, b, heads(a, size), heads(b, size), strict=True):
        yield x.dtype == y.dtype and one == other and (x.nbytes <= size or all(p == q for p, q in zip(x.blocks(), y.blocks(), strict=True)))


def _apply(w: Array, delta: Delta, ops: Sequence[OpEntry], fields: Fields, block: Block) -> Array:
    """A chain on the rows of a block, or on the whole tensor."""
    target = block.target
    if block == target.whole and not chain.streams(target.shape, ops):
        out: Array = chain.apply_chain(w, ops, delta.get)
        return out
    rows = chain.Rows(ops, fields, target.shape, block.lo, block.hi)
    out = chain.apply_chain(w, rows.ops, rows.get)
    return out


def stored_rows(tensor: Tensor, block: Block) -> Array:
    """A block of a tensor as it is stored."""
    out: Array = tensor.rows(block.lo, block.hi) if block.target.shape else tensor.read()
    return out


def _difference(new: Array, old: Array, block: Block, label: str) -> Array:
    """new - old; 0 where the bits are the same (an infinity that nobody changed). InputError if that is not finite."""
    import numpy as np

    with np.errstate(invalid="ignore", over="ignore"):
        out = np.asarray(new - old)
    if not np.isfinite(out).all():
        bits = f"u{out.itemsize}"
        out = np.where(np.asarray(new).view(bits) == np.asarray(old).view(bits), out.dtype.type(0), out)
        bad = int(np.count_nonzero(~np.isfinite(out)))
        if bad:
            raise InputError(
                f"{label}: tensor {block.target.name!r}: the increment is NaN or infinite at {bad:,} entries of rows {block.lo} to {block.hi}",
                hint="check the run that made it; such a model cannot be combined with others",
            )
    return out


Update = Delta | Base


def open_update(given: Update | str | os.PathLike[str]) -> Update:
    """A delta or a checkpoint, opened if it is a path or a Hub id: a .safetensors file is a delta if its metadata say so.

    InputError for a live module, which has no file to be known by.
    """
    if isinstance(given, Delta | Base):
        update: Update = given
    else:
        path = Path(given)
        is_delta = path.is_file() and path.suffix == ".safetensors" and KEY in read_container(path)[1]
        update = read(path) if is_delta else Base.open(os.fspath(given))
    if isinstance(update, Base) and update.path is None:
        raise InputError(f"{update.source} is no update: it has no file to be known by", hint="save it, or make a delta of it")
    return update


def lineage(updates: Iterable[Update]) -> list[dict[str, str | None]]:
    """The identity of each update, in order, as a recipe records it."""
    return [{"delta": each.id} if isinstance(each, Delta) else {"checkpoint": each.fingerprint} for each in updates]


class Increments:
    """Several updates of one base, checked against each other and the base, and read as increments.

    updates: deltas and checkpoints in any mix
    base:    needed for checkpoints, and for tensors where `needs_base` is not empty
    on:      deltas that some of the updates were made over and that are no updates themselves
    block:   entries in one block of rows
    threads: how many blocks are computed at a time; results never depend on it

    `targets` has every tensor that an update changes, sorted by name. `fingerprint` (of the base; asking may read it), `over`, `config`, `tied`
    and `quantisation` are what a delta made of these increments must carry. Raises MismatchError with all problems.
    """

    def __init__(self, updates: Sequence[Update], base: Base | None = None, *, on: Sequence[Delta] = (), block: int = BLOCK, threads: int = 1) -> None:
        self.updates, self.base, self.block_size, self.threads = tuple(updates), base, block, threads
        names = [_label(update, number) for number, update in enumerate(updates, 1)]
        self.labels = tuple(name if names.count(name) == 1 else f"{name} (input {number})" for number, name in enumerate(names, 1))
        self._models: list[_Checkpoint | _Update] = []
        for update, label in zip(self.updates, self.labels, strict=True):
            if isinstance(update, Delta):
                self._models.append(_Update(update, base, label))
            elif base is None:
                raise UsageError(f"{label} is a checkpoint: an update only in relation to its base, which is not given", hint="base=PATH (--base PATH)")
            else:
                self._models.append(_Checkpoint(update, base, label))
        self._touched: list[dict[str, Target]] = []
        self._whole: dict[tuple[str, int], Array] = {}
        self._lock = Lock()
        deltas = [model.delta for model in self._models if isinstance(model, _Update)]
        known = {delta.id: delta for delta in (*on, *deltas)}
        for model in self._models:
            if isinstance(model, _Update):
                model.start = tuple(known[id] for id in model.delta.over if id in known)
        needed = {id for delta in deltas for id in delta.over} - {delta.id for delta in deltas}
        self.start = tuple(delta for delta in on if delta.id in needed)
        self.over = tuple(delta.id for delta in self.start)
        self.quantisation = next((delta.quantisation for delta in deltas), base.quantisation if base is not None else None)
        self.tied = tuple(sorted({group for delta in deltas for group in delta.tied}))
        self.config: dict[str, Json] = {}
        self._check(deltas, on, known)
        found: dict[str, Target] = {}
        for claims in self._touched:
            found = {**claims, **found}
        self.targets = {name: found[name] for name in sorted(found)}

    @property
    def fingerprint(self) -> str | None:
        """The base's; of a base whose hashes are not known yet, all of it is read."""
        if self.base is not None:
            return self.base.fingerprint
        return next((update.base for update in self.updates if isinstance(update, Delta)), None)

    # --- checks

    def _check(self, deltas: Sequence[Delta], on: Sequence[Delta], known: Iterable[str]) -> None:
        problems = [*self._origins(deltas, on, known), *(problem for model in self._models for problem in model.problems())]
        for model in self._models:
            if isinstance(model, _Update):
                try:
                    self.config = merge_patches(self.config, model.delta.config)
                except MismatchError as error:
                    problems.append(f"{model.label}: {error.message}")
        if not problems:
            self._touched = self._claims()
            problems += self._conflicts()
        if problems:
            shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
            raise MismatchError("the inputs do not fit together; nothing was written" + "".join(f"\n  - {line}" for line in shown))

    def _origins(self, deltas: Sequence[Delta], on: Sequence[Delta], known: Iterable[str]) -> Iterator[str]:
        """What is wrong with the bases and deltas that each delta was made for."""
        present = set(known)
        for model in self._models:
            if not isinstance(model, _Update):
                continue
            missing = [id[:12] for id in model.delta.over if id not in present]
            if missing:
                yield f"{model.label} was made over other deltas; missing: {', '.join(missing)} (merge them too, or name them with on=)"
            if self.base is not None:
                try:
                    model.delta.require_base(self.base, on=model.delta.over)
                except MismatchError as error:
                    yield f"{model.label}: {error.message}"
        if self.base is None and len({delta.base for delta in deltas}) > 1:
            each = ", ".join(f"{model.label} for {(model.delta.base or 'none')[:12]}" for model in self._models if isinstance(model, _Update))
            yield f"the deltas were made for different bases: {each}"
        if any(delta.quantisation != self.quantisation for delta in deltas):
            yield "the deltas disagree about how the base is quantised"
        named = {id for delta in deltas for id in delta.over}
        for delta in on:
            if delta.id not in named:
                yield f"{delta.path or 'a delta'} ({delta.id[:12]}) is given as `on`, but no input was made over it"

    def _claims(self) -> list[dict[str, Target]]:
        """Every tensor that each update changes. Asks for hashes, so only after the headers have passed."""
        claims: list[dict[str, Target]] = []
        known: dict[str, Target] = {}
        for model in self._models:
            if isinstance(model, _Update):
                claims.append({name: Target(name, entry.dtype, entry.shape, entry.base, entry.change) for name, entry in model.entries.items()})
            else:
                changed = list(model.changed(self.threads))
                for name in changed:
                    if name not in known:
                        known[name] = Target(name, model.base.tensors[name].dtype, model.base.tensors[name].shape, origin=model.base)
                claims.append({name: known[name] for name in changed})
        if self.base is not None:
            self._add_tied(self.base, claims, {name for each in claims for name in each})
        return claims

    def _add_tied(self, base: Base, claims: list[dict[str, Target]], named: set[str]) -> None:
        """Where one update names a stored copy of a tied tensor that another changes by a name of its own, both change both."""
        for model, mine in zip(self._models, claims, strict=True):
            if isinstance(model, _Update) and model.delta.tied:
                for name, entry in with_tied(base, model.delta).items():
                    if name in named and name not in mine:
                        model.entries[name] = entry
                        mine[name] = Target(name, entry.dtype, entry.shape, entry.base, entry.change)

    def _conflicts(self) -> Iterator[str]:
        """Disagreement between updates about one tensor, and what cannot be merged because it is not floating point."""
        first: dict[str, tuple[Target, str]] = {}
        for claims, label in zip(self._touched, self.labels, strict=True):
            for name, target in claims.items():
                if target.dtype not in FLOATS:
                    yield f"{label}: tensor {name!r} is {target.dtype} and differs from the base; only floating-point tensors can be merged"
                other, who = first.setdefault(name, (target, label))
                if target is not other and target.disagrees(other):
                    yield f"tensor {name!r}: {_what(other)} in {who}, {_what(target)} in {label}"

    # --- what is there

    def touches(self, number: int, name: str) -> bool:
        """Whether update `number` (from 0) changes the tensor `name`; its increment is zero everywhere else."""
        return name in self._touched[number]

    def entries(self, number: int) -> dict[str, Entry]:
        """The entries of update `number`; none for a checkpoint."""
        model = self._models[number]
        return model.entries if isinstance(model, _Update) else {}

    def size(self, number: int) -> int:
        """The number of entries of the tensors that update `number` changes."""
        return sum(target.size for target in self._touched[number].values())

    def needs_base(self, name: str) -> bool:
        """Whether increments on a tensor cannot be known without the base's data."""
        return any(
            isinstance(model, _Checkpoint) or model.needs_base(name) for model, claims in zip(self._models, self._touched, strict=True) if name in claims
        )

    def by_algebra(self, name: str) -> bool:
        """Whether a weighted sum of the updates can be written with their own ops on this tensor: they are deltas, and each
        means on the result's starting point (the base and `over`) what it meant on its own."""
        here = [delta.id for delta in self.start if name in delta.entries]
        for model, claims in zip(self._models, self._touched, strict=True):
            if name in claims:
                if isinstance(model, _Checkpoint):
                    return False
                own = [delta.id for delta in model.start if name in delta.entries]
                if own != here and not independent(model.entries[name].ops):
                    return False
        return True

    def all_dense(self, name: str) -> bool:
        """Whether several updates, all of them deltas, change a tensor by full increments alone: their sum is best stored as one."""
        chains = [model.entries[name].ops for model in self._models if isinstance(model, _Update) and name in model.entries]
        return len(chains) > 1 and all(op.op == "dense" for ops in chains for op in ops)

    def twins(self) -> dict[str, str]:
        """For each target of which the base has the same bytes under another name (stored copies of a tied tensor), the first such target."""
        with kept_open():
            return self._twins()

    def _twins(self) -> dict[str, str]:
        alike: dict[Any, list[str]] = {}
        present = [name for name, target in self.targets.items() if not target.added and self.base is not None]
        starts = dict(zip(present, map(bytes, heads([self.base.tensors[name] for name in present], 64) if self.base is not None else ()), strict=True))
        for name, target in self.targets.items():
            if not target.added:
                mark = starts[name] if self.base is not None else target.known
                alike.setdefault((target.dtype, target.shape, mark), []).append(name)
        found: dict[str, str] = {}
        for names in alike.values():
            while len(names) > 1:
                first, *others = names
                same = [name for name in others if self.base is None or all(_alike([self.base.tensors[first]], [self.base.tensors[name]]))]
                found |= dict.fromkeys(same, first)
                names = [name for name in others if name not in same]
        return found

    # --- increments

    def read(self, number: int, block: Block, old: Array | None = None) -> Array:
        """The increment of update `number` on a block: float32 (float64 for an F64 tensor), zeros where it changes nothing.

        `old`: the base's stored values on the block, if they have been read already. Raises InputError, with the update and the
        tensor named, if an increment is NaN or infinite. Treat it as read-only.
        """
        import numpy as np

        model, target = self._models[number], block.target
        if target.name not in self._touched[number]:
            return np.zeros(block.shape, target.wide)
        if block == target.whole or model.by_rows(target):
            return model.increment(block, old)
        with self._lock:  # a chain that needs its whole tensor: kept until another tensor is asked for
            if (target.name, number) not in self._whole:
                self._whole = {key: value for key, value in self._whole.items() if key[0] == target.name}
                self._whole[target.name, number] = model.increment(target.whole)
            return self._whole[target.name, number][block.lo : block.hi]

    def read_all(self, block: Block, old: Array | None = None) -> list[Array]:
        """The increments of every update on a block, in the order of the updates."""
        name = block.target.name
        if old is None and self.base is not None and not block.target.added and self.needs_base(name):
            old = stored_rows(self.base.tensors[name], block)  # once for all
        return [self.read(number, block, old) for number in range(len(self.updates))]

    def combined(self, rule: Combination, block: Block, old: Array | None = None) -> Array:
        """The combination of all updates on a block, in the dtype of increments. `old`: the base's stored values there, if at hand."""
        name = block.target.name
        movers = self._movers(name)
        rule = rule.only(movers)
        ckpts = self._checkpoints(name, movers)
        if block.target.wide == "float32" and ckpts and self.base is not None:
            old = stored_rows(self.base.tensors[name], block) if old is None else old
            out = combined_stored(old, [stored_rows(ckpt, block) for ckpt in ckpts], rule, block.start)
            if out is not None:
                return out
        return combined([self.read(number, block, old) for number in movers], rule, block.start)

    def piece(self, rule: Combination, target: Target, lo: int, hi: int, position: int = 0, only: int | None = None) -> Piece | None:
        """base + combination on some rows (or, with `only`, what one update adds), from the files of checkpoints; None where an update is no such file."""
        movers = self._movers(target.name) if only is None else [only]
        ckpts = [each for each in self._checkpoints(target.name, movers) if isinstance(each, Stored)]
        base = self.base.tensors.get(target.name) if self.base is not None else None
        if not isinstance(base, Stored) or not ckpts or len(ckpts) < len(movers):
            return None
        row = target.size // target.rows
        return Piece(base, ckpts, rule.only(movers) if only is None else rule, lo * row, (hi - lo) * row, position)

    def balance(self, rule: Callable[[Target], Combination]) -> int:
        """At how many entries of all tensors plus wins the election of a combination, less those at which minus does."""
        return sum(in_threads((partial(self._balances, rule, spans) for spans in self._together(self.targets.values())), self.threads))

    def _balances(self, rule: Callable[[Target], Combination], spans: Sequence[Span]) -> int:
        with kept_open():
            rules = [rule(target) for target, _, _ in spans]
            pieces = [None if span[0].added else self.piece(rule, *span) for rule, span in zip(rules, spans, strict=True)]
            found = iter(merged_files([piece for piece in pieces if piece], None))
            merged = [next(found) if piece else None for piece in pieces]
            return sum(each.balance if each else self._balance(rule, *span) for each, rule, span in zip(merged, rules, spans, strict=True))

    def _balance(self, rule: Combination, target: Target, lo: int, hi: int) -> int:
        movers = self._movers(target.name)
        blocks = (Block(target, *rows) for rows in row_blocks(target.shape or (1,), self.block_size, lo, hi))
        return sum(balance([self.read(number, block) for number in movers], rule.only(movers), block.start) for block in blocks)

    def _together(self, targets: Iterable[Target], every: int = 1, entries: int = 8) -> Iterator[list[Span]]:
        """Rows of tensors for one job each: of a large tensor some blocks (about `entries`), of tiny ones many. Of all these, each `every`-th."""
        held: list[Span] = []
        size = number = 0
        for target in targets:
            for lo, hi in row_blocks(target.shape or (1,), entries * self.block_size) if target.size else ():
                held.append((target, lo, hi))
                size += (hi - lo) * (target.size // target.rows)
                if size >= entries * self.block_size or len(held) >= _TOGETHER:
                    if number % every == 0:
                        yield held
                    held, size, number = [], 0, number + 1
        if held and number % every == 0:
            yield held

    def _movers(self, name: str) -> list[int]:
        return [number for number, claims in enumerate(self._touched) if name in claims]

    def _checkpoints(self, name: str, numbers: Sequence[int]) -> list[Tensor]:
        """A tensor as some updates have it, if all of them are checkpoints; else nothing."""
        models = [self._models[number] for number in numbers]
        found = [model.ckpt.tensors[name] for model in models if isinstance(model, _Checkpoint)]
        return found if len(found) == len(models) else []

    def blocks(self) -> Iterator[Block]:
        """All blocks of all tensors, in order."""
        for target in self.targets.values():
            yield from target.blocks(self.block_size)

    def each(self, number: int, target: Target | None = None) -> Over:
        """One update's increments on all that it changes, or on one tensor (then in this thread), for `engine.select`."""
        targets = self._changed(number, target)

        def over(function: Callable[[Any], Any], every: int) -> Iterator[Any]:
            jobs = (partial(self._with_one, function, number, spans) for spans in self._together(targets, every, 1))
            return (each for some in in_threads(jobs, 1 if target else self.threads) for each in some)

        return over

    def close(self, number: int, target: Target | None = None) -> Close:
        """What `engine.select.near` finds in one update's increments on all that it changes, or on one tensor, from the files where that is possible."""
        targets = self._changed(number, target)

        def close(brackets: Brackets) -> Iterator[list[Near]]:
            found = in_threads((partial(self._close, number, brackets, spans) for spans in self._together(targets)), 1 if target else self.threads)
            return (each for some in found for each in some)

        return close

    def _changed(self, number: int, target: Target | None) -> list[Target]:
        return [target] if target else [each for each in self.targets.values() if self.touches(number, each.name)]

    def _alone(self, number: int, spans: Sequence[Span]) -> list[Piece]:
        """One update's increments on some rows, from its file; nothing where that is not possible for all of them."""
        pieces = [self.piece(Combination([1.0]), *span, only=number) for span in spans]
        found = [piece for piece in pieces if piece]
        return found if len(found) == len(pieces) else []

    def _close(self, number: int, brackets: Brackets, spans: Sequence[Span]) -> list[list[Near]]:
        with kept_open():
            pieces = self._alone(number, spans)
            found = near_files(pieces, brackets) if pieces else None
            return [found] if found is not None else [near(brackets, block) for block in self._blocks(number, spans)]

    def _with_one(self, function: Callable[[Array], _R], number: int, spans: Sequence[Span]) -> list[_R]:
        with kept_open():
            pieces = self._alone(number, spans) if len(spans) > 1 else []
            together = combined_files(pieces) if pieces else None
            return [function(block) for block in (self._blocks(number, spans) if together is None else [together])]

    def _blocks(self, number: int, spans: Sequence[Span]) -> Iterator[Array]:
        for target, lo, hi in spans:
            for rows in row_blocks(target.shape or (1,), self.block_size, lo, hi):
                yield self.read(number, Block(target, *rows))

    def map(self, function: Callable[[Block, list[Array]], _R]) -> Iterator[_R]:
        """`function(block, increments of all updates)` over all blocks, in order, computed ahead in threads."""
        return in_threads((partial(self._with_all, function, block) for block in self.blocks()), self.threads)

    def _with_all(self, function: Callable[[Block, list[Array]], _R], block: Block) -> _R:
        return function(block, self.read_all(block))


def _label(update: Update, number: int) -> str:
    where = update.path if isinstance(update, Delta) else update.source
    return str(where) if where is not None else f"input {number}"


def _what(target: Target) -> str:
    kind = "added" if target.change else "changed in place"
    return f"{kind} {target.dtype} {list(target.shape)}" + (f" {target.known.sha256[:12]}" if target.known else "")
