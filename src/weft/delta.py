"""A delta: a set of ops on one base, plus the manifest that says what it is. The one artifact of every verb.

    delta = Delta.load("trec.safetensors")
    delta.entries["encoder.layer.0.attention.self.query.weight"].ops
    half = 0.5 * delta;  both = delta + other;  back = -delta

Nothing here imports numpy or torch until a tensor's data is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import canon
from .errors import FormatError, InputError, MismatchError
from .ops import chain
from .ops import get as op_named
from .ops.spec import At, Json, OpEntry, Ref, Term, _fields, _text, sizes
from .stored import FLOATS, ITEMSIZE, Tensor, hold

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
"""Version of the file format."""

CHANGES = ("add", "replace", "copy", "remove")
SHARED, BLOB, MODULE, INPUT = "@shared/", "@blob/", "@module/", "@input/"


@dataclass(frozen=True)
class BaseTensor:
    """The base tensor an entry was made for: dtype code, shape, sha256 of its bytes (hex)."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Change:
    """A declared change of structure: kind "add", "replace", "copy" or "remove"; the new dtype and shape; copy's source."""

    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Entry:
    """What happens to one target: ops in order, the base tensor they were made for, and a change of structure."""

    ops: tuple[OpEntry, ...] = ()
    base: BaseTensor | None = None
    change: Change | None = None

    @property
    def dtype(self) -> str:
        """The dtype of the result ("" for modules, inputs and removed tensors)."""
        return self.change.dtype if self.change else self.base.dtype if self.base else ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.change.shape if self.change else self.base.shape if self.base else ()

    def json(self) -> Json:
        out: dict[str, Json] = {"ops": [op.json() for op in self.ops]}
        if self.base is not None:
            out["base"] = {"dtype": self.base.dtype, "shape": list(self.base.shape), "sha256": self.base.sha256}
        if self.change is not None:
            change: dict[str, Json] = {"kind": self.change.kind}
            if self.change.kind != "remove":
                change |= {"dtype": self.change.dtype, "shape": list(self.change.shape)}
            if self.change.kind == "copy":
                change["from"] = self.change.source
            out["change"] = change
        return out

    @classmethod
    def parse(cls, obj: Json, where: str) -> Entry:
        obj = _fields(obj, where, {"ops"}, {"base", "change"})
        if not isinstance(obj["ops"], list):
            raise FormatError(f"{where}: ops must be a list")
        ops = tuple(OpEntry.parse(o, f"{where}, op {i}") for i, o in enumerate(obj["ops"]))
        base = change = None
        if "base" in obj:
            b = _fields(obj["base"], f"{where}, base", {"dtype", "shape", "sha256"}, set())
            base = BaseTensor(_dtype(b["dtype"], where), sizes(b["shape"], where), _hash(b["sha256"], where))
        if "change" in obj:
            c = obj["change"]
            kind = c.get("kind") if isinstance(c, dict) else None
            if kind not in CHANGES:
                raise FormatError(f"{where}: unknown change {str(kind)[:40]!r}; expected one of {', '.join(CHANGES)}")
            if kind == "remove":
                _fields(c, where, {"kind"}, set())
                change = Change(kind)
            else:
                _fields(c, where, {"kind", "dtype", "shape"} | ({"from"} if kind == "copy" else set()), set())
                source = _text(c["from"], where) if kind == "copy" else ""
                change = Change(kind, _dtype(c["dtype"], where), sizes(c["shape"], where), source)
        return cls(ops, base, change)


def _dtype(value: Json, where: str) -> str:
    if not isinstance(value, str) or value not in ITEMSIZE:
        raise FormatError(f"{where}: unknown dtype {str(value)[:40]!r}")
    return value


def _hash(value: Json, where: str) -> str:
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise FormatError(f"{where}: expected 64 hex digits, got {str(value)[:70]!r}")
    return value


class BaseLike(Protocol):
    """What a delta needs to know of its base (see `weft.base.Base`)."""

    @property
    def fingerprint(self) -> str | None: ...
    def tensor(self, name: str) -> Tensor: ...
    def sha256(self, name: str) -> str: ...


@dataclass(frozen=True)
class Delta:
    """An update to one base. Immutable; the algebra makes new ones.

    `base` is the base's fingerprint (None: known only by its tensors), `tensors` maps keys to data, `over` lists ids of
    deltas that were active when this one was made, `parents` ids it was made from, `recipe` how it was made, `config`
    a JSON merge patch for the model's config, `notes` whatever is not part of its identity.
    """

    base: str | None
    entries: Mapping[str, Entry]
    tensors: Mapping[str, Tensor]
    over: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    recipe: Mapping[str, Json] = field(default_factory=dict)
    config: Mapping[str, Json] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()
    quantisation: Mapping[str, Json] | None = None
    notes: Mapping[str, Json] = field(default_factory=dict)
    path: Path | None = None

    # --- identity

    def manifest(self, *, hashes: bool = True) -> dict[str, Json]:
        """Everything the id is made from, as JSON (without the list of tensors and their hashes, if so asked)."""
        base: dict[str, Json] = {"fingerprint": self.base}
        if self.quantisation is not None:
            base["quantisation"] = dict(self.quantisation)
        out: dict[str, Json] = {
            "format": FORMAT,
            "base": base,
            "over": list(self.over),
            "parents": list(self.parents),
            "recipe": dict(self.recipe),
            "config": dict(self.config),
            "tied": [list(group) for group in self.tied],
            "entries": {target: entry.json() for target, entry in self.entries.items()},
        }
        codes = {key: tensor.coding for key, tensor in self.tensors.items() if tensor.coding is not None}
        if codes:
            out["codes"] = codes
        if hashes:
            stored = {key: tensor.storage for key, tensor in self.tensors.items()}
            out["tensors"] = {k: {"dtype": t.dtype, "shape": list(t.shape), "sha256": t.sha256} for k, t in stored.items()}
        return out

    @property
    def id(self) -> str:
        """sha256 (hex) of the canonical JSON of `manifest()`, computed once: reading all tensors, unless their hashes are known."""
        known = self.__dict__.get("_id")
        if known is None:
            known = self.__dict__["_id"] = hashlib.sha256(canon.dumps(self.manifest())).hexdigest()
        return str(known)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, as stored."""
        return sum(tensor.storage.nbytes for tensor in self.tensors.values())

    @property
    def foldable(self) -> bool:
        """Whether every op changes a checkpoint tensor."""
        return not self.unfoldable

    @property
    def unfoldable(self) -> list[str]:
        """Targets that exist only at run time (modules and inputs)."""
        return [target for target in self.entries if target.startswith((MODULE, INPUT))]

    def __repr__(self) -> str:
        made = "/".join(str(self.recipe[k]) for k in ("verb", "method") if k in self.recipe)
        return f"<Delta {made or 'unnamed'}: {len(self.entries)} targets, {self.nbytes:,} bytes>"

    # --- reading and writing

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Read and validate a delta file (see `weft.file.read`)."""
        from .file import read

        return read(path)

    def save(self, path: str | Path) -> str:
        """Write atomically to `path`; return the id."""
        from .file import write

        return write(path, self)

    # --- meaning

    def get(self, key: str) -> np.ndarray[Any, Any]:
        """A tensor's data as a numpy array."""
        return self.tensors[key].read()

    def apply(self, target: str, w: Any) -> Any:
        """The chain of `target` on w (a numpy array or torch tensor, float32 or float64), before any rounding."""
        from . import xp

        get: Callable[[str], Any] = self.get
        if xp.is_torch(w):
            get = lambda key: xp.to_torch(self.get(key)).to(w.device)  # noqa: E731
        return chain.apply_chain(w, self.entries[target].ops, get)

    # --- checks

    def validate(self) -> None:
        """Check all that can be known without data; FormatError with target, op, expected and got."""
        used: set[str] = set()
        for target, entry in self.entries.items():
            self._validate_entry(target, entry)
            for op in entry.ops:
                used.update(op.tensor_keys())
        unused = [key for key in self.tensors if key not in used and not key.startswith(BLOB)]
        if unused:
            raise FormatError(f"tensor {unused[0]!r} is not used by any op ({len(unused)} such)")
        names = set(self.entries)
        for group in self.tied:
            if not names & set(group):
                raise FormatError(f"the tied group {list(group)} touches no entry")

    def _validate_entry(self, target: str, entry: Entry) -> None:
        live = target.startswith((MODULE, INPUT))
        if not target or (target.startswith("@") and not live):
            raise FormatError(f"{target!r} is not a target; reserved names are {MODULE}PATH and {INPUT}NAME")
        kind = entry.change.kind if entry.change else None
        if live and (entry.base or entry.change or not entry.ops):
            raise FormatError(f"{target}: needs ops, and neither base nor change")
        if not live and (entry.base is None) != (kind == "add"):
            raise FormatError(f"{target}: " + ("an added tensor has no base tensor" if entry.base else "base is missing"))
        if kind is None and not entry.ops:
            raise FormatError(f"{target}: no ops")
        if kind == "remove" and entry.ops:
            raise FormatError(f"{target}: a removed tensor takes no ops")
        if kind == "copy" and entry.base and (entry.dtype, entry.shape) != (entry.base.dtype, entry.base.shape):
            raise FormatError(f"{target}: a copy has the dtype and shape of its source")
        try:
            chain.require_first(entry.ops)
        except MismatchError as error:
            raise FormatError(f"{target}: {error.message}") from None
        for number, op in enumerate(entry.ops):
            where = f"{target}: op {number} ({op.op})"
            absent = [key for key in op.tensor_keys() if key not in self.tensors]
            if absent:
                raise FormatError(f"{where}: tensor {absent[0]!r} is missing from the file")
            for inner in op.walk():
                if inner.op != chain.SUM:
                    on = op_named(inner.op).on
                    if on != ("module" if target.startswith(MODULE) else "input" if target.startswith(INPUT) else "weight"):
                        raise FormatError(f"{where}: {inner.op} changes a {on}, not this target")
            try:
                chain.validate(entry.shape, entry.dtype or "F32", op, self.tensors)
            except ValueError as error:
                raise FormatError(f"{where}: {error}") from None

    def validate_values(self) -> None:
        """Check the numbers that index others (sparse positions, permutations); reads only those tensors, and where the blocks of coded ones lie."""
        for tensor in self.tensors.values():
            tensor.check()
        for target, entry in self.entries.items():
            for number, op in enumerate(entry.ops):
                try:
                    self._values(entry.shape, op)
                except ValueError as error:
                    raise FormatError(f"{target}: op {number} ({op.op}): {error}") from None

    def _values(self, shape: tuple[int, ...], op: OpEntry) -> None:
        view = op.at.shape(shape) if op.at is not None else shape
        for term in op.terms:
            for inner in term.ops:
                self._values(view, inner)
        for ref in op.t.values():
            if ref.take is not None:
                size, positions = self.tensors[ref.key].shape[0], self.get(ref.take)
                if positions.size and not (positions.min() >= 0 and positions.max() < size):
                    raise ValueError(f"{ref.take}: positions must be within 0..{size - 1}")
        if op.op == chain.SUM:
            return
        found = op_named(op.op)
        index = {f: r for f, r in op.t.items() if self.tensors[r.key].dtype in ("I64", "I32") and not (found.raw and f == "values")}
        for ref in index.values():
            if ref.take is not None and len(self.tensors[ref.key].shape) != 1:  # else a small file could ask for any amount of memory
                raise ValueError(f"{ref.key}: positions are taken from a pool of one axis, got shape {list(self.tensors[ref.key].shape)}")
        if index:
            found.check_values(view, found.config(op.cfg), {f: chain.gathered(r, self.get) for f, r in index.items()})

    def require_base(self, base: BaseLike, *, on: Iterable[str] = ()) -> None:
        """Refuse a wrong base, or a missing delta that this one was made over. `on`: ids of deltas applied before."""
        who = f"{self.path or 'this delta'} ({self.id[:12]})"
        if self.base is not None and base.fingerprint is not None and self.base != base.fingerprint:
            where = getattr(base, "path", None) or "the base"
            raise MismatchError(
                f"{who} was made for base {self.base[:12]}, but {where} is {base.fingerprint[:12]}",
                hint="open the base it was made for",
            )
        present = list(on)
        missing = [id for id in self.over if id not in present]
        if missing:
            raise MismatchError(
                f"{who} was made over {', '.join(id[:12] for id in self.over)}; missing: {', '.join(id[:12] for id in missing)}",
                hint="name them before it, in order (--on DELTA)",
            )
        if self.base is None or base.fingerprint is None:
            self.require_tensors(base)

    def require_tensors(self, base: BaseLike) -> None:
        """Refuse a base in which a tensor that this delta touches is not the one it was made for (dtype, shape, sha256)."""
        who = f"{self.path or 'this delta'} ({self.id[:12]})"
        for target, entry in self.entries.items():
            if entry.base is None:
                continue
            name = entry.change.source if entry.change and entry.change.kind == "copy" else target
            tensor = base.tensor(name)
            if (tensor.dtype, tensor.shape) != (entry.base.dtype, entry.base.shape) or base.sha256(name) != entry.base.sha256:
                raise MismatchError(
                    f"{who}: tensor {name!r} is not the one it was made for (expected {entry.base.dtype} {list(entry.base.shape)} "
                    f"{entry.base.sha256[:12]}, got {tensor.dtype} {list(tensor.shape)} {base.sha256(name)[:12]})",
                    hint="check that this is the same checkpoint",
                )

    # --- algebra: every result speaks of increments relative to the same base

    def scaled(self, factor: float) -> Delta:
        """The delta whose increment is `factor` times this one's, on every target."""
        entries = {}
        for target, entry in self.entries.items():
            if target.startswith((MODULE, INPUT)) or (entry.change and entry.change.kind != "add"):
                raise MismatchError(f"{target}: {_what(entry, target)} cannot be scaled")
            if entry.dtype not in FLOATS:
                raise MismatchError(f"{target}: new values of a {entry.dtype} tensor cannot be scaled", hint="leave it out: delta.only([...])")
            entries[target] = replace(entry, ops=scaled_ops(entry.ops, factor))
        return self._derived("scale", entries, self.tensors, {"factor": float(factor)}, (self,))

    def __neg__(self) -> Delta:
        return self.scaled(-1.0)

    def __mul__(self, factor: float) -> Delta:
        return self.scaled(factor)

    __rmul__ = __mul__

    def __add__(self, other: Delta) -> Delta:
        """The delta whose increment is the sum of both."""
        return self._join("add", other, added_ops)

    def then(self, other: Delta) -> Delta:
        """One delta that means: this one first, then `other` on the result (`other` may be made over this one)."""
        return self._join("stack", other, lambda a, b: a + b)

    def only(self, targets: Iterable[str]) -> Delta:
        """The part of this delta on `targets`; refused if it would split a group."""
        keep = set(targets)
        unknown = keep - set(self.entries)
        if unknown:
            from .errors import near

            name = sorted(unknown)[0]
            raise MismatchError(f"no entry for {name!r}{near(name, self.entries, 'the delta has')}")
        whole = {group for t in keep for group in _groups(self.entries[t])}
        split = [t for t, e in self.entries.items() if t not in keep and whole & _groups(e)]
        if split:
            raise MismatchError(f"{split[0]} belongs to a group of which other targets were chosen; a group is taken whole or not at all")
        return self._derived("only", {t: self.entries[t] for t in self.entries if t in keep}, self.tensors, {"targets": sorted(keep)}, (self,))

    def _join(self, verb: str, other: Delta, combine: Callable[[tuple[OpEntry, ...], tuple[OpEntry, ...]], tuple[OpEntry, ...]]) -> Delta:
        if self.base != other.base:
            raise MismatchError(
                f"the deltas belong to different bases: {(self.base or 'none')[:12]} and {(other.base or 'none')[:12]}", hint="deltas combine on one base only"
            )
        theirs, tensors = apart(other, self.tensors)
        entries = dict(self.entries)
        for target, entry in theirs.items():
            mine = entries.get(target)
            if mine is None:
                entries[target] = entry
                continue
            if mine.base != entry.base or mine.change != entry.change or (mine.change and mine.change.kind != "add"):
                raise MismatchError(f"{target}: the deltas change it in ways that do not combine ({_what(mine, target)}; {_what(entry, target)})")
            if combine is added_ops and mine.dtype not in FLOATS:
                raise MismatchError(f"{target}: new values of a {mine.dtype} tensor cannot be added; one can only follow the other: a.then(b)")
            entries[target] = replace(mine, ops=combine(mine.ops, entry.ops))
        made_over = tuple(id for id in (*self.over, *other.over) if not (verb == "stack" and id == self.id))
        joined = replace(
            self, over=tuple(dict.fromkeys(made_over)), config=merge_patches(self.config, other.config), tied=tuple(sorted({*self.tied, *other.tied}))
        )
        return joined._derived(verb, entries, {**self.tensors, **tensors}, {}, (self, other))

    def _derived(self, verb: str, entries: Mapping[str, Entry], tensors: Mapping[str, Tensor], cfg: dict[str, Json], parents: Sequence[Delta]) -> Delta:
        entries, tensors = renumbered(entries, tensors)
        recipe: dict[str, Json] = {"verb": verb, "config": cfg} if cfg else {"verb": verb}
        return replace(self, entries=entries, tensors=tensors, recipe=recipe, parents=tuple(p.id for p in parents), notes={}, path=None)


def loaded(deltas: Iterable[Delta | str | PathLike[str]] | Delta | str | PathLike[str]) -> list[Delta]:
    """Deltas that are given as such or as files, in order; one may stand alone."""
    listed = [deltas] if isinstance(deltas, Delta | str | PathLike) else deltas
    return [each if isinstance(each, Delta) else Delta.load(Path(each)) for each in listed]


def _groups(entry: Entry) -> set[str]:
    """The groups that an entry belongs to, also through what a sum holds."""
    return {op.group for outer in entry.ops for op in outer.walk() if op.group is not None}


def _what(entry: Entry, target: str) -> str:
    if target.startswith((MODULE, INPUT)):
        return "an op that runs on activations"
    return f"a {entry.change.kind} entry" if entry.change else "a change in place"


def _additive(ops: Iterable[OpEntry]) -> bool:
    return all(op.op != chain.SUM and op_named(op.op).additive for op in ops)


def added_ops(a: tuple[OpEntry, ...], b: tuple[OpEntry, ...]) -> tuple[OpEntry, ...]:
    """The chain whose increment is the sum of those of a and b."""
    return a + b if _additive(a) and _additive(b) else (OpEntry(chain.SUM, terms=(Term(1.0, a), Term(1.0, b))),)


def scaled_ops(ops: tuple[OpEntry, ...], factor: float) -> tuple[OpEntry, ...]:
    """The chain whose increment is `factor` times that of `ops`."""
    if _additive(ops):
        return tuple(replace(op, cfg={**op.cfg, "scale": float(op.cfg.get("scale", 1.0)) * factor}) for op in ops)
    if len(ops) == 1 and ops[0].op == chain.SUM and ops[0].at is None:
        return (replace(ops[0], terms=tuple(Term(term.scale * factor, term.ops) for term in ops[0].terms)),)
    return (OpEntry(chain.SUM, terms=(Term(float(factor), ops),)),)


def apart(delta: Delta, taken: Mapping[str, Tensor]) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """A delta's entries and tensors under keys that do not clash with `taken` (equal shared tensors stay shared)."""
    names, tensors = {}, {}
    for key, tensor in delta.tensors.items():
        name = key
        while name in taken and not (key.startswith(SHARED) and taken[name].sha256 == tensor.sha256 and taken[name].coding == tensor.coding):
            name += "'"
        names[key], tensors[name] = name, tensor
    entries = {t: replace(e, ops=tuple(op.renamed(names) for op in e.ops)) for t, e in delta.entries.items()}
    return entries, tensors


def renumbered(entries: Mapping[str, Entry], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """The same entries with tensor keys in their canonical form, `TARGET//N.FIELD`, and without unused tensors.

    N counts the ops of the target depth first. Shared tensors and blobs keep their names.
    """
    out: dict[str, Entry] = {}
    data = {key: tensor for key, tensor in tensors.items() if key.startswith(BLOB)}
    for target, entry in entries.items():
        names: dict[str, str] = {}
        for number, op in enumerate(inner for outer in entry.ops for inner in outer.walk()):
            for fieldname, ref in op.t.items():
                for key, suffix in ((ref.key, ""), (ref.take, ".take")):
                    if key is not None:
                        names.setdefault(key, key if key.startswith(SHARED) else f"{target}//{number}.{fieldname}{suffix}")
        data.update({new: tensors[old] for old, new in names.items()})
        out[target] = replace(entry, ops=tuple(op.renamed(names) for op in entry.ops))
    return out, data


def merge_patches(a: Mapping[str, Json], b: Mapping[str, Json], where: str = "config") -> dict[str, Json]:
    """Two config patches as one; MismatchError where they disagree."""
    out = dict(a)
    for name, value in b.items():
        if isinstance(value, dict) and isinstance(out.get(name), dict):
            out[name] = merge_patches(out[name], value, f"{where}.{name}")
        elif name in out and out[name] != value:
            raise MismatchError(f"the deltas disagree about {where}.{name}: {out[name]!r} and {value!r}")
        else:
            out[name] = value
    return out


class Builder:
    """Collects ops and tensors for a new delta: what methods use to write their result down.

    build = Builder(base)
    build.put("layer.0.weight", "lowrank", {"A": a, "B": b}, scale=2.0)
    build.add("classifier.weight", values)
    delta = build.done(recipe={"verb": "tune", "method": "lora"})
    """

    def __init__(self, base: BaseLike) -> None:
        self._base = base
        self._entries: dict[str, Entry] = {}
        self._tensors: dict[str, Tensor] = {}

    def share(self, name: str, value: Any) -> Ref:
        """Store a tensor once as `@shared/NAME`; use the reference as a field of any number of ops."""
        key = SHARED + name
        if key in self._tensors:
            raise InputError(f"{key} is shared twice")
        self._tensors[key] = hold(value)
        return Ref(key)

    def pick(self, pool: Ref, positions: Any, shape: tuple[int, ...], *, transpose: bool = False) -> Ref:
        """Rows of a shared tensor at `positions` (I64 or I32), reshaped to `shape`, then with its two axes exchanged: to use as a field of one op."""
        key = f"//{len(self._tensors)}"  # until `done`, which names it after its field
        self._tensors[key] = hold(positions)
        return Ref(pool.key, key, shape, transpose)

    def blob(self, name: str, data: bytes) -> None:
        """Store bookkeeping bytes as the U8 tensor `@blob/NAME`."""
        import numpy as np

        self._tensors[BLOB + name] = hold(np.frombuffer(data, np.uint8))

    def put(self, target: str, op: str, fields: Mapping[str, Any], *, at: At | None = None, group: str | None = None, **cfg: Any) -> None:
        """Append an op to a target's chain. Field values are arrays, `Tensor`s or `Ref`s from `share`."""
        number = len(self._entry(target).ops)
        t = {}
        for name, value in fields.items():
            if isinstance(value, Ref):
                t[name] = value
            else:
                t[name] = Ref(f"{target}//{number}.{name}")
                self._tensors[t[name].key] = hold(value)
        defaults = op_named(op).defaults
        cfg = {name: value for name, value in cfg.items() if name not in defaults or value != defaults[name]}
        self._append(target, OpEntry(op, cfg, t, at, group))

    def add(self, target: str, value: Any, *, kind: str = "add") -> None:
        """A tensor that the base does not have (or, with kind="replace", has in another shape), given whole."""
        tensor = hold(value)
        base = self._base_tensor(target) if kind == "replace" else None
        self._entries[target] = Entry((), base, Change(kind, tensor.dtype, tensor.shape))
        self.put(target, "assign", {"values": tensor})

    def copy(self, target: str, source: str) -> None:
        """A new tensor that starts as a copy of the base's `source`."""
        base = self._base_tensor(source)
        self._entries[target] = Entry((), base, Change("copy", base.dtype, base.shape, source))

    def remove(self, target: str) -> None:
        """Take a tensor of the base away."""
        self._entries[target] = Entry((), self._base_tensor(target), Change("remove"))

    def done(self, **manifest: Any) -> Delta:
        """The validated delta; `manifest` are fields of `Delta` (recipe, parents, over, config, tied, notes)."""
        entries, tensors = renumbered(self._entries, self._tensors)
        delta = Delta(self._base.fingerprint, entries, tensors, quantisation=getattr(self._base, "quantisation", None), **manifest)
        delta.validate()
        return delta

    def _base_tensor(self, name: str) -> BaseTensor:
        tensor = self._base.tensor(name)
        return BaseTensor(tensor.dtype, tuple(tensor.shape), self._base.sha256(name))

    def _entry(self, target: str) -> Entry:
        if target not in self._entries:
            live = target.startswith((MODULE, INPUT))
            self._entries[target] = Entry((), None if live else self._base_tensor(target))
        return self._entries[target]

    def _append(self, target: str, op: OpEntry) -> None:
        entry = self._entry(target)
        self._entries[target] = replace(entry, ops=(*entry.ops, op))
