"""The size of a change, tensor by tensor, read from the files block by block: nothing here needs a model, or torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from .. import xp
from ..base import Base
from ..delta import Delta, Entry
from ..engine.stream import BLOCK, Fields, one_blas_thread, reuse_memory, row_blocks
from ..folding import combined
from ..ops import OpEntry, chain
from ..stored import FLOATS, Tensor

if TYPE_CHECKING:
    import numpy as np

Places = Mapping[str, tuple[int | None, str | None]]
"""Where each target lies: its layer and its role, None where it has none."""


def sizes(base: Base, on: Sequence[Delta], deltas: Sequence[Delta], places: Places) -> list[dict[str, Any]]:
    """Every target that `deltas` touch, sorted by name, as

    {"target", "layer", "role", "shape", "relative", "norm", "max_abs", "finite"}: norm is ||dW||_F, relative that divided by ||W||_F,
    max_abs the largest |dW|, all in float64 and before any rounding to the base's dtype; W is the tensor with `on`. finite says
    whether all of dW is, and `nonfinite` how many entries are not. None where there is no such number: ops on modules and
    inputs, removed tensors, integers; relative also where the tensor is new, or W is zero.
    """
    entries, tensors = combined(base, [*on, *deltas])
    touched = {target for delta in deltas for target in delta.entries} | set(combined(base, deltas)[0])
    before = {target: len(entry.ops) for target, entry in combined(base, on)[0].items()}
    reuse_memory()
    with one_blas_thread():
        return [_size(base, name, entries[name], before.get(name, 0), tensors, *places.get(name, (None, None))) for name in sorted(touched)]


def _size(base: Base, name: str, entry: Entry, before: int, tensors: Mapping[str, Tensor], layer: int | None, role: str | None) -> dict[str, Any]:
    out = {"target": name, "layer": layer, "role": role, "shape": list(entry.shape), "relative": None, "norm": None, "max_abs": None, "finite": True}
    if name.startswith("@") or entry.dtype not in FLOATS:
        return out | {"nonfinite": 0}
    found = _Sums()
    for old, new in _blocks(_source(base, name, entry), entry, before, tensors):
        found.add(old, new)
    if found.nonfinite:
        return out | {"finite": False, "nonfinite": found.nonfinite}
    norm, whole = sqrt(found.moved), sqrt(found.whole)
    relative = norm / whole if whole > 0 and entry.change is None else None
    return out | {"relative": relative, "norm": norm, "max_abs": found.largest, "nonfinite": 0}


def _source(base: Base, name: str, entry: Entry) -> Tensor | None:
    """What the ops start from; None for zeros."""
    if entry.change is None:
        return base.tensor(name)
    return base.tensor(entry.change.source) if entry.change.kind == "copy" else None


def _blocks(source: Tensor | None, entry: Entry, before: int, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Any, Any]]:
    """The tensor without and with the ops after the first `before`, rows by rows where all ops allow it."""
    import numpy as np

    wide = "float64" if entry.dtype == "F64" else "float32"
    fields = Fields(tensors)
    streams = bool(entry.shape) and chain.streams(entry.shape, entry.ops)
    for lo, hi in row_blocks(entry.shape, BLOCK) if streams else [(0, 0)]:
        if source is None:
            w: np.ndarray[Any, Any] = np.zeros((hi - lo, *entry.shape[1:]) if streams else entry.shape, wide)
        else:
            w = xp.cast(source.rows(lo, hi) if streams else source.read(), wide)
        old = _applied(w, entry.ops[:before], fields, entry.shape, lo, hi, streams)
        yield old, _applied(old, entry.ops[before:], fields, entry.shape, lo, hi, streams)


def _applied(w: Any, ops: tuple[OpEntry, ...], fields: Fields, shape: tuple[int, ...], lo: int, hi: int, streams: bool) -> Any:
    if not streams:
        return chain.apply_chain(w, ops, lambda key: fields(key).read())
    rows = chain.Rows(ops, fields, shape, lo, hi)
    return chain.apply_chain(w, rows.ops, rows.get)


@dataclass
class _Sums:
    """Sums of squares of the change and of what was there, the largest entry of the change, and entries that are not finite."""

    moved: float = 0.0
    whole: float = 0.0
    largest: float = 0.0
    nonfinite: int = 0

    def add(self, old: Any, new: Any) -> None:
        import numpy as np

        with np.errstate(all="ignore"):
            w = np.asarray(old, np.float64).reshape(-1)
            change = np.asarray(new, np.float64).reshape(-1) - w
            self.nonfinite += change.size - int(np.count_nonzero(np.isfinite(change)))
            self.moved += float(change @ change)
            self.whole += float(w @ w)
            self.largest = max(self.largest, float(np.abs(change).max(initial=0.0)))
