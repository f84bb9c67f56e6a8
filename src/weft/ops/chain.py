"""Lists of ops: the meaning of `ops` on a target, `sum`, references, and the one rounding at the end.

apply_chain(w, ops, get)   w' in w's own dtype (float32 or float64): what training and merging use
rewrite(stored, ops, get)  the stored bytes of the result: what folding and exact attaching use
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

from .. import xp
from ..errors import MismatchError
from ..stored import FLOATS, Tensor, dtype_code
from . import get as op_named
from .op import Array, Config, Info, Shape
from .spec import OpEntry, Ref, Term

Get = Callable[[str], Array]
"""From a tensor key to the array, in the engine that w is in."""

SUM = "sum"


def resolve(entry: OpEntry, get: Get, like: Array) -> dict[str, Array]:
    """The arrays of an entry's fields: floats widened to the dtype of `like`, gathers done, integers as they are."""
    return {field: _resolve(ref, get, like) for field, ref in entry.t.items()}


def _resolve(ref: Ref, get: Get, like: Array) -> Array:
    value = gathered(ref, get)
    return xp.narrow(value, like) if _is_float(value) else value


def gathered(ref: Ref, get: Get) -> Array:
    """The array that a reference stands for, as stored."""
    value = get(ref.key)
    if ref.take is None:
        return value
    taken = xp.take(value, get(ref.take).reshape(-1)).reshape(ref.shape)
    return xp.permute_axes(taken, (1, 0)) if ref.transpose else taken


def _is_float(x: Array) -> bool:
    return dtype_code(x.dtype) in FLOATS


def apply_op(w: Array, entry: OpEntry, get: Get) -> Array:
    """One op on w, through its view `at`."""
    view = entry.at.get(w) if entry.at is not None else w
    if entry.op == SUM:
        new = xp.wide(view)
        for term in entry.terms:
            new = new + term.scale * xp.change(apply_chain(view, term.ops, get), view)
        new = xp.narrow(new, w)
    else:
        op = op_named(entry.op)
        new = op.apply(view, resolve(entry, get, view), op.config(entry.cfg))
    return entry.at.set(w, new) if entry.at is not None else new


def apply_chain(w: Array, ops: Iterable[OpEntry], get: Get) -> Array:
    """All ops in order on w (float32 or float64), without the final rounding to a stored dtype."""
    ops = tuple(ops)
    require_first(ops)
    for entry in ops:
        w = apply_op(w, entry, get)
    return w


def _is_raw(entry: OpEntry) -> bool:
    return entry.op != SUM and op_named(entry.op).raw


def rewrite(stored: Array, ops: Sequence[OpEntry], get: Get) -> Array:
    """The new stored array: widened, ops in order, one rounding to nearest even; untouched entries keep their bytes.

    Trailing raw ops (`assign`, `xor`) act on the stored values themselves, so they replay any dtype and any NaN exactly. Call this
    inside `xp.exact()` when the arrays are torch tensors.
    """
    require_first(ops)
    last = len(ops)
    while last and _is_raw(ops[last - 1]):
        last -= 1
    whole = next((k for k in reversed(range(len(ops))) if _is_raw(ops[k]) and set(ops[k].t) == {"values"} and ops[k].at is None), None)
    start = 0
    if whole is not None:  # a whole-tensor assign forgets what was before it
        stored = _apply_raw(stored, ops[whole], get)
        start = whole + 1
    if start < last:
        if dtype_code(stored.dtype) not in FLOATS:
            raise ValueError(f"a {dtype_code(stored.dtype)} tensor takes only `assign`, got {ops[start].op!r}")
        old = xp.cast(stored, "float64" if xp.dtype(stored) == "float64" else "float32")
        new = apply_chain(old, ops[start:last], get)
        rounded = xp.narrow(new, stored)
        if bool((new != new).any()):  # NaNs: rounding may change their payload, so entries with unchanged bits are kept
            rounded = xp.where(xp.integers(old) == xp.integers(new), stored, rounded)
        zero = new == 0
        if bool(zero.any()):  # -0 + 0 is +0: an entry that was zero and stays zero keeps its sign
            rounded = xp.where(zero & (old == 0), stored, rounded)
        stored = rounded
    for entry in ops[max(start, last) :]:
        stored = _apply_raw(stored, entry, get)
    return stored


def _apply_raw(stored: Array, entry: OpEntry, get: Get) -> Array:
    op = op_named(entry.op)
    view = entry.at.get(stored) if entry.at is not None else stored
    t = {field: gathered(ref, get) for field, ref in entry.t.items()}
    new = op.apply(view, t, op.config(entry.cfg))
    return entry.at.set(stored, new) if entry.at is not None else new


def require_first(ops: Iterable[OpEntry], untouched: bool = True) -> None:
    """MismatchError if an op that must be the first on its tensor is not. `untouched`: nothing has changed the tensor before."""
    for number, entry in enumerate(ops):
        here = untouched and not number
        for term in entry.terms:
            require_first(term.ops, here)
        if not here and entry.op != SUM and op_named(entry.op).first:
            raise MismatchError(
                f"{entry.op!r} must be the first op on its tensor: it says which bits of the base differ",
                hint="put its delta first, or fold it into a checkpoint of its own",
            )


def validate(shape: Shape, dtype: str, entry: OpEntry, info: Mapping[str, Info]) -> None:
    """Check one op entry against a target of `shape` and `dtype` from headers alone. Raises ValueError."""
    view = entry.at.shape(shape) if entry.at is not None else shape
    if entry.op == SUM:
        if entry.cfg or entry.t or not entry.terms:
            raise ValueError("`sum` takes terms and nothing else")
        if dtype not in FLOATS:
            raise ValueError(f"a {dtype} tensor takes only `assign`, got 'sum'")
        for term in entry.terms:
            for inner in term.ops:
                validate(view, dtype, inner, info)
        return
    op = op_named(entry.op)
    if dtype not in FLOATS and not op.raw:
        raise ValueError(f"a {dtype} tensor takes only `assign`, got {entry.op!r}")
    fields: dict[str, Info] = {}
    for field, ref in entry.t.items():
        fields[field] = _Shape(info[ref.key].dtype, _taken(ref, info)) if ref.take else info[ref.key]
    op.validate(view, entry.cfg, fields)
    if op.raw:
        op.check_stored(dtype, op.config(entry.cfg), fields)


class _Shape:
    def __init__(self, dtype: str, shape: Shape) -> None:
        self.dtype, self.shape = dtype, shape


def _taken(ref: Ref, info: Mapping[str, Info]) -> Shape:
    pool, index = info[ref.key], info[str(ref.take)]
    if index.dtype not in ("I64", "I32") or not pool.shape:
        raise ValueError(f"{ref.take}: positions must be I64 or I32, got {index.dtype}")
    entries = prod(index.shape) * prod(pool.shape[1:])
    if ref.shape is None or prod(ref.shape) != entries:
        raise ValueError(f"{ref.key} taken at {list(index.shape)} positions has {entries} entries, not the shape {list(ref.shape or ())}")
    return ref.shape[::-1] if ref.transpose else ref.shape


def streams(shape: Shape, ops: Sequence[OpEntry]) -> bool:
    """Whether a chain can be computed block of rows by block of rows."""
    if not shape:
        return False
    for entry in ops:
        if entry.at is not None or any(ref.take for ref in entry.t.values()):
            return False
        if entry.op == SUM:
            if not all(streams(shape, term.ops) for term in entry.terms):
                return False
        else:
            op = op_named(entry.op)
            if not op.streams(shape, op.config(entry.cfg)):
                return False
    return True


class Rows:
    """A chain restricted to rows lo..hi of its target: the entries with local keys, and where those keys lead.

    `fetch` gives `weft.stored.Tensor`s. Use as `rewrite(block, rows.ops, rows.get)`.
    """

    def __init__(self, ops: Sequence[OpEntry], fetch: Callable[[str], Tensor], shape: Shape, lo: int, hi: int) -> None:
        self._arrays: dict[str, Array] = {}
        self._fetch, self._shape, self._lo, self._hi = fetch, shape, lo, hi
        self.ops = [self._cut(entry) for entry in ops]

    def get(self, key: str) -> Array:
        return self._arrays[key]

    def _cut(self, entry: OpEntry) -> OpEntry:
        if entry.op == SUM:
            terms = tuple(Term(term.scale, tuple(self._cut(inner) for inner in term.ops)) for term in entry.terms)
            return OpEntry(SUM, terms=terms)
        op = op_named(entry.op)
        parts, cfg = op.rows({f: self._fetch(ref.key) for f, ref in entry.t.items()}, op.config(entry.cfg), self._shape, self._lo, self._hi)
        number = len(self._arrays)
        t = {}
        for field, array in parts.items():
            key = f"{number}.{field}"
            self._arrays[key] = array
            t[field] = Ref(key)
        return OpEntry(entry.op, _known(cfg, op.defaults), t)


def _known(cfg: Config, defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cfg.items() if value != defaults[name]}
