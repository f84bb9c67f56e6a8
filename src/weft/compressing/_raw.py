"""New values (`assign`) seen as what they add to the base: full tuning and exact diffs store values, which do not compress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..base import Base
from ..delta import Delta, Entry, renumbered
from ..engine.increments import Block, Increments, Target
from ..engine.stream import in_threads
from ..ops import chain
from ..ops import get as op_named
from ..ops.spec import OpEntry, Ref
from ..stored import FLOATS, Made

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def has_raw(entry: Entry) -> bool:
    """Whether a target of floats in place gets new values, so that its increment depends on the base."""
    ops = (inner for outer in entry.ops for inner in outer.walk() if inner.op != chain.SUM)
    return entry.change is None and entry.base is not None and entry.dtype in FLOATS and any(op_named(op.op).raw for op in ops)


def as_increments(delta: Delta, base: Base, on: Sequence[Delta], threads: int) -> Delta:
    """The same delta with a `dense` op in place of every chain that sets values. Its numbers are computed whenever they are read.

    MismatchError where what it was made over is needed and not given.
    """
    names = [name for name, entry in delta.entries.items() if has_raw(entry)]
    if not names:
        return delta
    keys = {key for name in names for op in delta.entries[name].ops for key in op.tensor_keys()}
    part = replace(delta, entries={name: delta.entries[name] for name in names}, tensors={key: delta.tensors[key] for key in sorted(keys)}, tied=(), config={})
    models = Increments([part], base, on=on if delta.over else (), threads=threads)
    entries, tensors = dict(delta.entries), dict(delta.tensors)
    for name in names:
        tensors[key := f"{name}//increment"] = Increment(models, models.targets[name])
        entries[name] = replace(delta.entries[name], ops=(OpEntry("dense", {}, {"values": Ref(key)}),))
    entries, tensors = renumbered(entries, tensors)
    return replace(delta, entries=entries, tensors=tensors)


@dataclass(frozen=True, eq=False)
class Increment(Made):
    """What the one update of `models` adds to a tensor."""

    models: Increments
    target: Target

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.target.stored_as

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.target.shape

    def parts(self) -> Iterator[Array]:
        return in_threads((partial(self.models.read, 0, block) for block in self.target.blocks(self.models.block_size)), self.models.threads)

    def rows(self, lo: int, hi: int) -> Array:
        return self.models.read(0, Block(self.target, lo, hi))

    def read(self) -> Array:
        return self.models.read(0, self.target.whole) if self.target.size else self.rows(0, self.target.rows)
