"""What compressing has cost: sizes, and how far increments are from what they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, prod, sqrt
from typing import TYPE_CHECKING, Any

from ..codes import entries
from ..delta import Delta, Entry
from ..engine.increments import Block, Increments, independent
from ..engine.lowrank import pairs_of
from ..engine.stream import BLOCK, in_threads
from ..errors import InputError
from ..ops.spec import Json, OpEntry
from ..stored import FLOATS
from ._method import Job

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass
class _Lost:
    """Of one target: ||d||^2, ||d' - d||^2, entries, and how many are not 0 afterwards."""

    before: float = 0.0
    moved: float = 0.0
    entries: int = 0
    kept: int = 0

    def __iadd__(self, other: _Lost) -> _Lost:
        self.before, self.moved = self.before + other.before, self.moved + other.moved
        self.entries, self.kept = self.entries + other.entries, self.kept + other.kept
        return self

    def json(self) -> dict[str, Json]:
        return {"error": float(f"{sqrt(self.moved / self.before):.4g}") if self.before else None, "entries": self.entries, "kept": self.kept}


def summary(job: Job, made: Delta, before: int, *, exact: bool = False) -> dict[str, Json]:
    """The `summary` of a compressed delta; see `weft.compress`. `before`: bytes of what was compressed; `exact`: nothing can have been lost."""
    found: dict[str, _Lost] = {}
    if not exact:
        found = _by_factors(job.delta, made)
        found |= _by_values(job, made, [name for name in made.entries if name not in found])
        found |= _by_increments(job, made, [name for name in made.entries if name not in found])
    total = _Lost()
    for name, lost in found.items():
        if not isfinite(lost.before + lost.moved):
            raise InputError(f"{name}: its increment is NaN, infinite or too large to be measured", hint="check the run that made it")
        total += lost
    after = made.nbytes
    sizes: dict[str, Json] = {"before": before, "after": after, "ratio": float(f"{before / after:.4g}") if after else None}
    kinds = Counter(entry.change.kind for entry in made.entries.values() if entry.change is not None)
    if kinds:
        sizes["changes"] = dict(sorted(kinds.items()))
    if exact:
        sizes["error"] = 0.0
    return total.json() | sizes | {"tensors": {name: found[name].json() for name in sorted(found)}}


def _changed(old: Delta, new: Delta, name: str) -> bool:
    """Whether a target has other ops or other data than before."""
    a, b = old.entries[name], new.entries[name]
    return a.ops != b.ops or any(old.tensors[key] is not new.tensors[key] for op in a.ops for key in op.tensor_keys())


# --- low rank: without the product


def _by_factors(old: Delta, new: Delta) -> dict[str, _Lost]:
    """Targets that have nothing but factors on both sides: the cost is that of the factors."""
    found = {}
    for name, entry in new.entries.items():
        before = old.entries.get(name)
        if before is not None and before.shape == entry.shape and all(map(_is_factors, (*before.ops, *entry.ops))) and entry.ops and before.ops:
            was, now = pairs_of(before.ops, old.get), pairs_of(entry.ops, new.get)
            lost = _Lost(_norm2(was), 0.0)
            if _changed(old, new, name):
                lost.moved = _norm2([*now, *((b, a, -scale) for b, a, scale in was)])
            lost.entries = sum(b.size + a.size for b, a, _ in now)
            lost.kept = sum(int((b != 0).sum()) + int((a != 0).sum()) for b, a, _ in now)
            found[name] = lost
    return found


def _is_factors(op: OpEntry) -> bool:
    return op.op == "lowrank" and op.at is None and set(op.t) == {"A", "B"} and all(ref.take is None for ref in op.t.values())


def _norm2(pairs: Sequence[tuple[Array, Array, float]]) -> float:
    """||sum scale B A||^2."""
    import numpy as np

    left: Any = np.linalg.qr(np.concatenate([scale * b for b, _, scale in pairs], 1), mode="r")
    right: Any = np.linalg.qr(np.concatenate([a for _, a, _ in pairs]).T, mode="r")
    return float(((left @ right.T) ** 2).sum())


# --- one op that adds values: without the target, whose other entries are 0


def _by_values(job: Job, made: Delta, names: Sequence[str]) -> dict[str, _Lost]:
    """Targets with one `dense` or `sparse` op that is the same on both sides but for the values."""
    found = {}
    for name in names:
        old, new = job.delta.entries.get(name), made.entries[name]
        if old is None or old.shape != new.shape or len(new.ops) != 1 or old.ops != new.ops or new.ops[0].op not in ("dense", "sparse"):
            continue
        keys = {field: ref.key for field, ref in new.ops[0].t.items() if ref.take is None}
        if "values" not in keys or any(job.delta.tensors[key] is not made.tensors[key] for field, key in keys.items() if field != "values"):
            continue
        found[name] = lost = _Lost()
        key, scale = keys["values"], float(new.ops[0].cfg.get("scale", 1.0))
        pairs = zip(entries(job.delta.tensors[key], BLOCK), entries(made.tensors[key], BLOCK), strict=True)
        for part in in_threads((partial(_compare, was, now, scale) for was, now in pairs), job.threads):
            lost += part
        lost.entries = prod(new.shape)
    return found


def _compare(was: Array, now: Array, scale: float = 1.0) -> _Lost:
    import numpy as np

    from .. import xp

    was, now = (xp.cast(each.reshape(-1), "float64") * scale for each in (was, now))
    kept = int(np.count_nonzero(now))
    now -= was
    return _Lost(float(was @ was), float(now @ now), now.size, kept)


# --- everything else: increments, block by block


def _by_increments(job: Job, made: Delta, names: Sequence[str]) -> dict[str, _Lost]:
    names = [name for name in names if all(_known(job, delta.entries.get(name)) for delta in (job.delta, made))]
    both = [_part(job, delta, names) for delta in (job.delta, made)]
    if not names:
        return {}
    alone = all(independent(entry.ops) for each in both for entry in each.entries.values())
    models = Increments(both, None if alone else job.base, on=job.on if both[0].over else (), threads=job.threads)

    def compare(block: Block, taus: list[Array]) -> tuple[str, _Lost]:
        return block.target.name, _compare(taus[0], taus[1])

    found = {name: _Lost() for name in names}
    for name, lost in models.map(compare):
        found[name] += lost
    return found


def _known(job: Job, entry: Entry | None) -> bool:
    """Whether the increment of a target can be known here: of floats in place, from its ops alone or with what they stand on at hand."""
    if entry is None or entry.change is not None or entry.base is None or entry.dtype not in FLOATS:
        return False
    return independent(entry.ops) or (job.base is not None and len(job.on) == len(job.delta.over))


def _part(job: Job, delta: Delta, names: Sequence[str]) -> Delta:
    entries = {name: delta.entries[name] for name in names}
    keys = {key for entry in entries.values() for op in entry.ops for key in op.tensor_keys()}
    over = () if all(independent(entry.ops) for entry in entries.values()) else delta.over
    return replace(delta, entries=entries, tensors={key: delta.tensors[key] for key in sorted(keys)}, tied=(), config={}, over=over)
