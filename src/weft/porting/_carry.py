"""Carrying: the entries of an update, made for one base, as entries on another. What port methods share.

Tensors are matched by name (after `rename`), and must have the same shape. Tensors with a row for each token are matched row by
row where the vocabularies differ. Everything that does not fit is found from headers and reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from ..base import Base
from ..delta import BLOB, INPUT, MODULE, BaseTensor, Delta, Entry, renumbered, scaled_ops
from ..engine.finite import require_finite
from ..engine.increments import Block, Increments, Target
from ..engine.replacing import replacing
from ..engine.stream import in_threads, row_blocks
from ..errors import MismatchError, UsageError, near
from ..ops.spec import OpEntry, Ref
from ..stored import FLOATS, Made, Tensor, hold
from ._vocabulary import Vocabulary, by_token

if TYPE_CHECKING:
    import numpy as np

    from ._method import Job

    Array = np.ndarray[Any, Any]

_SHOWN = 40


class CarryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of every method that carries tensor by tensor."""

    missing: Annotated[
        Literal["refuse", "skip"], msgspec.Meta(description="What does not fit the target: an error that lists it, or left out (and listed in the notes).")
    ] = "refuse"
    rename: Annotated[
        tuple[str, ...], msgspec.Meta(description="Tensor names of the target, as OLD=NEW; each * of OLD fills one of NEW. The first that fits counts.")
    ] = ()


@dataclass(frozen=True)
class Place:
    """Where a tensor of the source goes. `takes`: for some axes, for each position in the target the one in the source, -1 for none."""

    old: str
    new: str
    takes: Mapping[int, Array] = field(default_factory=dict)

    def of(self, values: Array, skip: int | None = None) -> Array:
        """Values on the source's axes in the target's order, zero where the source has none; axis `skip` is left alone."""
        for axis, positions in self.takes.items():
            if axis != skip:
                values = _taken(values, positions, axis)
        return values


Places = Mapping[str, Place]
Rule = Callable[[Entry, Place, bool], str]
"""How an entry is carried: "ops" (as it is), "dense" (as an increment), or else why it cannot be. The boolean: the base tensor is the same."""


def renamer(rules: Sequence[str], names: Sequence[str]) -> Callable[[str], str]:
    """A function from the source's names to the target's. UsageError for a rule that is malformed or fits none of `names`."""
    parsed: list[tuple[re.Pattern[str], str]] = []
    problems = []
    for rule in rules:
        old, equals, new = rule.partition("=")
        if not equals or not old or not new or old.count("*") != new.count("*"):
            problems.append(f"{rule!r}: expected OLD=NEW with as many * on both sides")
            continue
        pattern = re.compile("(.*)".join(map(re.escape, old.split("*"))))
        parsed.append((pattern, new))
        if not any(pattern.fullmatch(name) for name in names):
            problems.append(f"{rule!r} fits none of the tensors{near(old, names, 'they are')}")
    if problems:
        raise UsageError("rename cannot be understood", problems=problems, hint="-p rename='model.*=language_model.model.*'")

    def rename(name: str) -> str:
        for pattern, new in parsed:
            if found := pattern.fullmatch(name):
                parts = new.split("*")
                return parts[0] + "".join(filled + part for filled, part in zip(found.groups(), parts[1:], strict=True))
        return name

    return rename


def place(tensors: Mapping[str, Tensor | BaseTensor], source: Base, target: Base, rename: Callable[[str], str]) -> tuple[dict[str, Place], dict[str, str]]:
    """Where each of the source's `tensors` goes, by its name there; and why some go nowhere."""
    vocabulary = Vocabulary(source, target)
    found: dict[str, Place] = {}
    left: dict[str, str] = {}
    for name, mine in tensors.items():
        new = rename(name)
        there = target.tensors.get(new)
        if there is None:
            left[name] = f"the target has no tensor {new!r}"
        elif mine.dtype != there.dtype and not {mine.dtype, there.dtype} <= FLOATS:
            left[name] = f"it is {mine.dtype}, the target's {there.dtype}"
        elif by_token(name) and mine.shape and mine.shape[1:] == there.shape[1:] and not (mine.shape == there.shape and vocabulary.same):
            if vocabulary.known:
                found[name] = Place(name, new, {0: vocabulary.rows(mine.shape[0], there.shape[0])})
            else:
                left[name] = f"it has {mine.shape[0]} rows, the target's {there.shape[0]}, and without both tokenizers it is not known which row is which token"
        elif mine.shape != there.shape:
            left[name] = f"its shape is {list(mine.shape)}, the target's {list(there.shape)}"
        else:
            found[name] = Place(name, new)
    return found, left


def carry(job: Job, cfg: CarryConfig, rule: Rule, alpha: float = 1.0, move: Callable[[Places], Places] = lambda places: places) -> Delta:
    """The update as a delta on the target: alpha times what it is, entry by entry as `rule` says.

    `move` may add to where things go (permutations). What is added (a classification head) and what runs on activations is carried
    as it is. Raises MismatchError with everything that does not fit, unless cfg.missing is "skip".
    """
    if job.rows is not None:
        raise UsageError("this port method looks at no data", hint="leave data out; weft.porting.predict takes some")
    whole = replacing(Increments([job.update], job.source), 0) if isinstance(job.update, Base) else job.update
    inside = {name: entry for name, entry in whole.entries.items() if entry.base is not None and entry.change is None}
    rename = renamer(cfg.rename, [*whole.entries, *job.source.tensors])
    found, left = place({name: entry.base for name, entry in inside.items() if entry.base is not None}, job.source, job.target, rename)
    found = dict(move(found))
    out = _Out(job, whole, alpha)
    for name, entry in whole.entries.items():
        if name in left:
            continue
        if name in inside:
            why = out.inside(entry, found[name], rule)
        else:
            why = out.outside(name, rename(name), entry)
        if why:
            left[name] = why
    # where the source has one tensor under two names and the target has two tensors, both are changed, each by its own rule
    copies = {other: name for group in whole.tied for name in group if name in found and name not in left for other in group if other not in whole.entries}
    apart, _ = place({other: base for other, name in copies.items() if (base := inside[name].base)}, job.source, job.target, rename)
    for other, each in apart.items():
        name = copies[other]
        if each.new not in {known.new for known in found.values()} and (why := out.inside(inside[name], move({name: replace(each, old=name)})[name], rule)):
            left[other] = why
    left |= out.split(left)
    if left and cfg.missing == "refuse":
        listed = [f"{name}: {why}" for name, why in left.items()]
        shown = listed[:_SHOWN] + ([f"and {len(listed) - _SHOWN} more"] if len(listed) > _SHOWN else [])
        raise MismatchError(
            f"{len(left)} of the {len(whole.entries)} tensors that the update changes cannot be carried to {job.target.source}"
            + "".join(f"\n  - {line}" for line in shown),
            hint="leave them out: -p missing=skip; if they have other names there: -p rename=OLD=NEW",
        )
    require_finite(whole, out.kept, str(whole.path or "the update"))
    return out.done(left, rename)


class _Out:
    """The delta in the making."""

    def __init__(self, job: Job, whole: Delta, alpha: float) -> None:
        self._job, self._whole, self._alpha = job, whole, alpha
        self._entries: dict[str, Entry] = {}
        self._tensors: dict[str, Tensor] = dict(whole.tensors)
        self._names: dict[str, str] = {}
        self._dense: dict[str, Place] = {}
        self._takes: dict[str, Place] = {}

    @property
    def kept(self) -> list[str]:
        """The source's names of what is carried with its own ops."""
        return [self._names[new] for new in self._entries if new in self._names and new not in self._dense]

    def inside(self, entry: Entry, place: Place, rule: Rule) -> str:
        """Carry a change in place; returns why it cannot be, or ""."""
        job = self._job
        there = job.target.tensors[place.new]
        assert entry.base is not None
        same = entry.dtype == there.dtype and not place.takes and entry.base.sha256 == job.target.sha256(place.new)
        how = rule(entry, place, same)
        if how not in ("ops", "dense"):
            return how
        if there.dtype not in FLOATS and not same:
            return f"it is {there.dtype} and differs in the target; only floating-point tensors can be carried there"
        ops = entry.ops
        if how == "dense":
            self._dense[place.new] = place
        elif place.takes:
            ops = tuple(self._moved(op, number, place) for number, op in enumerate(ops))
        if place.takes:
            self._takes[place.new] = place
        self._put(place.old, place.new, replace(entry, ops=ops, base=BaseTensor(there.dtype, there.shape, job.target.sha256(place.new))))
        return ""

    def outside(self, name: str, new: str, entry: Entry) -> str:
        """Carry what changes no tensor of the base."""
        if name.startswith((MODULE, INPUT)):
            self._entries[name] = entry
            return "" if self._alpha == 1 else "it runs on activations, which cannot be scaled"
        if entry.change is None or entry.change.kind != "add":
            return f"a {entry.change.kind if entry.change else 'missing'} entry changes the structure of the source"
        if new in self._job.target.tensors:
            return "it is added, but the target has it already"
        self._put(name, new, entry)
        return ""

    def _put(self, old: str, new: str, entry: Entry) -> None:
        if new in self._entries:
            raise UsageError(f"rename gives two tensors the name {new!r}: {self._names[new]!r} and {old!r}")
        self._names[new], self._entries[new] = old, entry

    def _moved(self, op: OpEntry, number: int, place: Place) -> OpEntry:
        """A low-rank op on the target's rows and columns."""
        t = {}
        for name, ref in op.t.items():
            axis = 0 if name in ("B", "B0") else 1
            values = self._tensors[ref.key].read()
            key = f"{place.new}//{number}.{name} moved"
            self._tensors[key] = hold(_taken(values, place.takes[axis], axis)) if axis in place.takes else self._tensors[ref.key]
            t[name] = Ref(key)
        return replace(op, t=t)

    def split(self, left: Mapping[str, str]) -> dict[str, str]:
        """Take out what belongs to a group of which another part was left out; it is taken whole or not at all."""
        gone = {group for name in left if name in self._whole.entries for group in _groups(self._whole.entries[name])}
        torn: dict[str, str] = {}
        while more := [new for new, entry in self._entries.items() if new not in self._dense and gone & _groups(entry)]:
            for new in more:  # its other groups go with it
                gone |= _groups(self._entries.pop(new))
            torn |= {self._names[new]: "it belongs to a group that does not fit as a whole" for new in more}
        return torn

    def done(self, left: Mapping[str, str], rename: Callable[[str], str]) -> Delta:
        """The delta, with what was done as notes."""
        job, whole = self._job, self._whole
        if not self._entries:
            raise MismatchError(f"nothing of the update fits {job.target.source}", hint="are these two bases of one kind of model?")
        entries = {
            new: entry if self._alpha == 1 or entry.base is None or new in self._dense else replace(entry, ops=scaled_ops(entry.ops, self._alpha))
            for new, entry in self._entries.items()
        }
        entries |= self._increments() if self._dense else {}
        data = self._tensors if not left and not self._dense else {key: tensor for key, tensor in self._tensors.items() if not key.startswith(BLOB)}
        entries, tensors = renumbered(entries, data)
        tied = tuple(group for group in (tuple(rename(name) for name in names) for names in whole.tied) if entries.keys() & set(group))
        rows = {new: place.takes[0] for new, place in self._takes.items() if 0 in place.takes and by_token(new)}
        tokens = {new: {"moved": int((taken >= 0).sum()), "new": int((taken < 0).sum())} for new, taken in rows.items()}
        notes: dict[str, Any] = {"carried": len(entries) - len(self._dense), "dense": len(self._dense), "left": dict(left)}
        notes |= {"vocabulary": tokens} if tokens else {}
        made = Delta(job.target.fingerprint, entries, tensors, config=whole.config, tied=tied, quantisation=job.target.quantisation, notes=notes)
        made.validate()
        return made

    def _increments(self) -> dict[str, Entry]:
        """The dense entries."""
        job, whole = self._job, self._whole
        old = {self._names[new]: whole.entries[self._names[new]] for new in self._dense}
        models = Increments([replace(whole, entries=old)] if isinstance(job.update, Delta) else [job.update], job.source, threads=job.threads)
        found = {}
        for new, place in self._dense.items():
            key = f"{new}//0.values carried"
            self._tensors[key] = Carried(models, models.targets[place.old], place)
            found[new] = Entry((OpEntry("dense", {} if self._alpha == 1 else {"scale": self._alpha}, {"values": Ref(key)}),), self._entries[new].base)
        return found


def _groups(entry: Entry) -> set[str]:
    return {op.group for outer in entry.ops for op in outer.walk() if op.group is not None}


def movable(entry: Entry, place: Place) -> bool:
    """Whether ops can be carried to other rows and columns as they are: low-rank ones, whose factors can be taken row by row.

    The columns of a tensor with more than two axes are several of them in one.
    """
    axes = {0, 1} if len(entry.shape) == 2 else {0}
    return place.takes.keys() <= axes and all(op.op == "lowrank" and op.at is None and not any(ref.take for ref in op.t.values()) for op in entry.ops)


@dataclass(frozen=True, eq=False)
class Carried(Made):
    """The increment on one tensor of the source, in the target's order, computed whenever it is read."""

    models: Increments
    source: Target
    place: Place

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.source.stored_as

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        takes = self.place.takes
        return tuple(len(takes[axis]) if axis in takes else size for axis, size in enumerate(self.source.shape))

    def rows(self, lo: int, hi: int) -> Array:
        if 0 not in self.place.takes:
            return self.place.of(self.models.read(0, Block(self.source, lo, hi)))
        return self.place.of(self._gathered(self.place.takes[0][lo:hi]), skip=0)

    def _gathered(self, positions: Array) -> Array:
        """Rows of the source's increment at `positions`, neighbours read together; zeros for -1."""
        import numpy as np

        out = np.zeros((len(positions), *self.source.shape[1:]), self.source.wide)
        order = np.flatnonzero(positions >= 0)
        order = order[np.argsort(positions[order], kind="stable")]
        for run in np.split(order, np.flatnonzero(np.diff(positions[order]) != 1) + 1) if len(order) else ():
            out[run] = self.models.read(0, Block(self.source, int(positions[run[0]]), int(positions[run[-1]]) + 1))
        return out

    def parts(self) -> Iterator[Array]:
        return in_threads(self._jobs(), self.models.threads)

    def _jobs(self) -> Iterator[Callable[[], Array]]:
        if not self.source.shape:
            yield self.read
        else:
            for lo, hi in row_blocks(self.shape, self.models.block_size):
                yield partial(self.rows, lo, hi)

    def read(self) -> Array:
        if not self.source.shape:
            return self.models.read(0, self.source.whole)
        return self.rows(0, self.shape[0])


def _taken(values: Array, positions: Array, axis: int) -> Array:
    """Entries along an axis in another order; zeros where the position is -1."""
    import numpy as np

    out = np.take(values, np.maximum(positions, 0), axis)
    if (positions < 0).any():
        out[(slice(None),) * axis + (positions < 0,)] = 0
    return out
