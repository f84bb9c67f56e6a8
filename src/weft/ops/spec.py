"""How an op is written down: references to tensors, views of a target, op entries. Plain values, no arithmetic.

    OpEntry("lowrank", {"scale": 2.0}, {"A": Ref("T//0.A"), "B": Ref("T//0.B")})

The JSON form is what a delta file holds (docs/format.md). Reading JSON is strict: anything unknown is a FormatError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from ..errors import FormatError

Json = Any

MAX_AXES = 32
"""The most axes of a shape or view: what every version of numpy can hold."""


def _fields(obj: Json, where: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(obj, dict):
        raise FormatError(f"{where}: expected an object, got {str(obj)[:60]}")
    missing, extra = required - set(obj), set(obj) - required - optional
    if missing or extra:
        problem = f"lacks {sorted(missing)}" if missing else f"has unknown {sorted(extra)}"
        raise FormatError(f"{where}: {problem}")
    return obj


def _text(value: Json, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise FormatError(f"{where}: expected a name, got {str(value)[:60]}")
    return value


def sizes(value: Json, where: str) -> tuple[int, ...]:
    """A JSON list of at most `MAX_AXES` non-negative integers as a tuple."""
    if not isinstance(value, list) or len(value) > MAX_AXES or not all(type(v) is int and v >= 0 for v in value):
        raise FormatError(f"{where}: expected a list of at most {MAX_AXES} sizes, got {str(value)[:60]}")
    return tuple(value)


@dataclass(frozen=True)
class Ref:
    """Where an op's field comes from: the tensor `key`, or its rows at the positions in tensor `take`, reshaped (and then transposed: two axes)."""

    key: str
    take: str | None = None
    shape: tuple[int, ...] | None = None
    transpose: bool = False

    def tensor_keys(self) -> tuple[str, ...]:
        return (self.key,) if self.take is None else (self.key, self.take)

    def json(self) -> Json:
        if self.take is None:
            return self.key
        return {"key": self.key, "take": self.take, "shape": list(self.shape or ()), **({"transpose": True} if self.transpose else {})}

    @classmethod
    def parse(cls, obj: Json, where: str) -> Ref:
        if isinstance(obj, str):
            return cls(_text(obj, where))
        obj = _fields(obj, where, {"key", "take", "shape"}, {"transpose"})
        shape = sizes(obj["shape"], where)
        if "transpose" in obj and (obj["transpose"] is not True or len(shape) != 2):
            raise FormatError(f"{where}: transpose is true for a shape of two axes or not there, got {str(obj['transpose'])[:60]} for {list(shape)}")
        return cls(_text(obj["key"], where), _text(obj["take"], where), shape, "transpose" in obj)


Index = int | tuple[int, int]


@dataclass(frozen=True)
class At:
    """A view of a tensor: reshape, then transpose, then index, each optional.

    `index` speaks of the leading axes: an integer picks and drops an axis, a (start, stop) pair keeps a range.
    """

    reshape: tuple[int, ...] | None = None
    transpose: tuple[int, ...] | None = None
    index: tuple[Index, ...] = ()

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The view's shape on a tensor of `shape`; ValueError if it does not fit."""
        now = tuple(shape)
        if self.reshape is not None:
            if prod(self.reshape) != prod(now):
                raise ValueError(f"cannot reshape {list(now)} to {list(self.reshape)}")
            now = self.reshape
        if self.transpose is not None:
            if sorted(self.transpose) != list(range(len(now))):
                raise ValueError(f"transpose {list(self.transpose)} does not name each axis of {list(now)} once")
            now = tuple(now[axis] for axis in self.transpose)
        if len(self.index) > len(now):
            raise ValueError(f"index {list(self.index)} has more axes than {list(now)}")
        kept = []
        for part, size in zip(self.index, now, strict=False):
            start, stop = part if isinstance(part, tuple) else (part, part + 1)
            if not 0 <= start < stop <= size:
                raise ValueError(f"index {part} is outside an axis of size {size}")
            if isinstance(part, tuple):
                kept.append(stop - start)
        return (*kept, *now[len(self.index) :])

    def _slices(self) -> tuple[int | slice, ...]:
        return tuple(slice(*part) if isinstance(part, tuple) else part for part in self.index)

    def get(self, w: Any) -> Any:
        """The view of w (numpy or torch)."""
        from .. import xp

        if self.reshape is not None:
            w = w.reshape(self.reshape)
        if self.transpose is not None:
            w = xp.permute_axes(w, self.transpose)
        return w[self._slices()] if self.index else w

    def set(self, w: Any, part: Any) -> Any:
        """A copy of w whose view is `part`."""
        from .. import xp

        whole = At(self.reshape, self.transpose).get(w)
        whole = xp.set_part(whole, self._slices(), part) if self.index else part
        if self.transpose is not None:
            inverse = sorted(range(len(self.transpose)), key=self.transpose.__getitem__)
            whole = xp.permute_axes(whole, inverse)
        return whole.reshape(w.shape)

    def json(self) -> Json:
        out: dict[str, Json] = {}
        if self.reshape is not None:
            out["reshape"] = list(self.reshape)
        if self.transpose is not None:
            out["transpose"] = list(self.transpose)
        if self.index:
            out["index"] = [list(part) if isinstance(part, tuple) else part for part in self.index]
        return out

    @classmethod
    def parse(cls, obj: Json, where: str) -> At:
        obj = _fields(obj, where, set(), {"reshape", "transpose", "index"})
        if not obj or not isinstance(obj.get("index", [0]), list) or not obj.get("index", [0]):
            raise FormatError(f"{where}: `at` needs reshape, transpose or a list index that is not empty, got {str(obj)[:60]}")
        index: list[Index] = []
        for part in obj.get("index", []):
            if isinstance(part, list):
                pair = sizes(part, where)
                if len(pair) != 2:
                    raise FormatError(f"{where}: an index range is [start, stop], got {part}")
                index.append((pair[0], pair[1]))
            else:
                index.append(*sizes([part], where))
        shape = {name: sizes(obj[name], where) for name in ("reshape", "transpose") if name in obj}
        return cls(shape.get("reshape"), shape.get("transpose"), tuple(index))


@dataclass(frozen=True)
class Term:
    """One summand of a `sum`: `scale * (chain(w) - w)`."""

    scale: float
    ops: tuple[OpEntry, ...]


@dataclass(frozen=True)
class OpEntry:
    """One op on one target. `cfg` holds only what differs from the op's defaults; `t` maps fields to references."""

    op: str
    cfg: Mapping[str, Any] = field(default_factory=dict)
    t: Mapping[str, Ref] = field(default_factory=dict)
    at: At | None = None
    group: str | None = None
    terms: tuple[Term, ...] = ()

    def walk(self) -> Iterator[OpEntry]:
        """This entry and every one inside its terms, depth first."""
        yield self
        for term in self.terms:
            for inner in term.ops:
                yield from inner.walk()

    def tensor_keys(self) -> tuple[str, ...]:
        """All tensor keys used here, inside terms too."""
        return tuple(key for entry in self.walk() for ref in entry.t.values() for key in ref.tensor_keys())

    def renamed(self, names: Mapping[str, str]) -> OpEntry:
        """The same entry with tensor keys replaced."""
        t = {f: replace(r, key=names[r.key], take=None if r.take is None else names[r.take]) for f, r in self.t.items()}
        terms = tuple(Term(term.scale, tuple(op.renamed(names) for op in term.ops)) for term in self.terms)
        return replace(self, t=t, terms=terms)

    def json(self) -> Json:
        out: dict[str, Json] = {"op": self.op, "cfg": dict(self.cfg), "t": {f: r.json() for f, r in self.t.items()}}
        if self.at is not None:
            out["at"] = self.at.json()
        if self.group is not None:
            out["group"] = self.group
        if self.terms:
            out["terms"] = [{"scale": term.scale, "ops": [op.json() for op in term.ops]} for term in self.terms]
        return out

    @classmethod
    def parse(cls, obj: Json, where: str) -> OpEntry:
        obj = _fields(obj, where, {"op", "cfg", "t"}, {"at", "group", "terms"})
        op = _text(obj["op"], where)
        where = f"{where} ({op})"
        for name in ("cfg", "t"):
            if not isinstance(obj[name], dict):
                raise FormatError(f"{where}: {name} must be an object")
        terms = []
        if "terms" in obj:
            if op != "sum" or not isinstance(obj["terms"], list) or not obj["terms"]:
                raise FormatError(f"{where}: only `sum` has terms, as a list that is not empty")
            for number, term in enumerate(obj["terms"]):
                inside = f"{where}, term {number}"
                term = _fields(term, inside, {"scale", "ops"}, set())
                if type(term["scale"]) not in (int, float) or not isinstance(term["ops"], list):
                    raise FormatError(f"{inside}: expected a number `scale` and a list `ops`")
                terms.append(Term(float(term["scale"]), tuple(cls.parse(o, f"{inside}, op {i}") for i, o in enumerate(term["ops"]))))
        return cls(
            op,
            obj["cfg"],
            {_text(f, where): Ref.parse(r, f"{where}, field {f}") for f, r in obj["t"].items()},
            At.parse(obj["at"], where) if "at" in obj else None,
            _text(obj["group"], where) if "group" in obj else None,
            tuple(terms),
        )
