"""Merging: several updates of one base become one.

    delta = weft.merge(["a.safetensors", "b.safetensors"], method="task-arithmetic", weights=[0.7, 0.3])
    weft.merge(["tuned-a", "tuned-b"], base="base", method="ties", density=0.1, out="merged.safetensors")

Inputs are deltas and checkpoints in any mix; nothing is ever loaded whole. Methods are the other files of this package.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base import Base
from ..delta import BLOB, BaseTensor, Delta, Entry, added_ops, apart, loaded, merge_patches, renumbered, scaled_ops
from ..engine.finite import require_finite
from ..engine.increments import Increments, Target, Update, lineage, open_update
from ..engine.lowrank import pairs_of, recompress
from ..engine.stream import BLOCK, in_threads, one_blas_thread, reuse_memory, thread_count
from ..errors import UsageError
from ..file import require_name
from ..methods import get
from ..ops.spec import OpEntry, Ref
from ..stored import Tensor, hold
from ._depth import Depth, Settings, Weight, asked
from ._method import DataMethod, MergeMethod
from ._parts import Shard, joined, part, require_shard
from ._result import Kernel, MergedTensor

if TYPE_CHECKING:
    import numpy as np

    from ._data import Study

    Array = np.ndarray[Any, Any]

    Given = Update | str | os.PathLike[str]

__all__ = ["join", "merge"]


def merge(
    inputs: Sequence[Given],
    base: Base | str | os.PathLike[str] | None = None,
    method: str = "task-arithmetic",
    weights: Sequence[Weight] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    into: str | os.PathLike[str] | None = None,
    on: Sequence[Delta | str | os.PathLike[str]] = (),
    rank: int | None = None,
    energy: float | None = None,
    shard: Shard | None = None,
    data: Any = None,
    device: Any = None,
    batch_size: int = 32,
    threads: int | None = None,
    block: int = BLOCK,
    **params: Any,
) -> Any:
    """Merge deltas and checkpoints into one delta, or straight into a checkpoint.

    inputs:  deltas (`Delta`, or paths of their files) and checkpoints (`Base`, paths, Hub ids), in any mix
    base:    the base that all belong to; needed for checkpoints, for `into`, for lists over depth, and where a change
             depends on the base's values and the method is not a weighted sum
    method:  a name from `weft methods merge`; `params` are its options
    weights: one number for each input; what they do and what they are by default is the method's business. A weight, and every option of
             which the catalogue says so, may be a list of numbers over depth: the first is that of the first layer, the last of the last,
             the others lie evenly between, on straight lines (`weft.merging._depth`)
    out:     a .safetensors file to write the merged delta to
    into:    a folder to write base + merged delta to, without a delta file
    on:      deltas that inputs were made over, if they are no inputs themselves; the result is then made over them too
    rank:    what the merge keeps in low rank is made one pair of factors of at most this rank, the nearest ones; `energy`: of the least
             rank that keeps this share of the squared norm. In time and memory proportional to the factors. Without either, the factors
             of all inputs stand side by side
    shard:   (i, n): only the i-th of n parts, for `join`. Every part reads what the method needs to know of the whole
    data:    for methods that look at data: one set (rows or a file) for all inputs, or a list of one for each; `device` is where
             the live models run (default: what Accelerate finds), `batch_size` the rows that pass at once
    threads: blocks computed at a time (None: the CPUs of this process, at most 8); block: entries in one block of rows.
             Neither changes a bit of the result

    Returns the merged `Delta`: of the file if `out` is given, else one whose tensors are computed when they are read. With
    `into`, returns the report of `weft.fold`. Where the method is a weighted sum and all inputs that touch a tensor are
    deltas, their ops are kept (low rank stays low rank); else the merged increment is a `dense` op in float32.

    Raises UsageError for a wrong method, option or weight, MismatchError with every input that does not fit.
    """
    if isinstance(inputs, Delta | Base | str | os.PathLike) or not inputs:
        raise UsageError("merge takes a list of at least one delta or checkpoint", hint="weft.merge([A, B], ...)")
    if out is not None and into is not None:
        raise UsageError("a merge goes into a delta file (out) or a checkpoint (into), not both")
    if into is not None and base is None:
        raise UsageError("a checkpoint is base + increments; give the base", hint="base=PATH (--base PATH)")
    record = get("merge", method)
    rule: MergeMethod[Any] = record.run()
    settings = asked(method, record, rule, weights, len(inputs), params)
    workers = thread_count(threads)
    if block < 1:
        raise UsageError(f"a block has at least 1 entry, got {block}")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise UsageError(f"a rank is at least 1 and an energy in (0, 1], got {rank} and {energy}")
    require_shard(shard)
    if shard is not None and into is not None:
        raise UsageError("a part of a merge is a delta", hint="out=PART.safetensors (-o), then join the parts")
    if out is not None:
        require_name(Path(out))
    root = None if base is None else base if isinstance(base, Base) else Base.open(os.fspath(base))
    updates = [open_update(given) for given in inputs]
    before = loaded(on)
    models = Increments(updates, root, on=before, block=block, threads=workers)
    if settings.varies:
        settings = settings.over(Depth.of(models))
        settings.require(method, rule)
    named = into is None or any(isinstance(each, Delta) for each in updates)  # a checkpoint needs no names, which cost more time to find than to merge
    recipe: dict[str, Any] = {"verb": "merge", "method": method, **settings.recipe(), "inputs": lineage(updates) if named else []}
    study = _study(rule, settings.whole.cfg, models, data, method, device, batch_size)
    if study is not None:
        recipe |= study.recipe()
    if rank is not None or energy is not None:
        recipe |= {"rank": rank, "energy": energy}
    merged = _merged(models, rule, settings, recipe, study, named)
    if rank is not None or energy is not None:
        merged = _recompressed(merged, rank, energy, workers)
    if shard is not None:
        merged = part(merged, shard)
    if out is not None:
        merged.save(Path(out))
        return Delta.load(Path(out))
    if into is not None and root is not None:
        from ..folding import folded

        report = folded(root, [*models.start, merged], Path(into), threads=workers, block=block)
        return replace(report, base=root.fingerprint) if named else report
    return merged


# --- what was asked for


def _study(rule: MergeMethod[Any], cfg: Any, models: Increments, data: Any, method: str, device: Any, batch_size: int) -> Study | None:
    """The models with their data, for a method that looks at it; one set of data may serve all."""
    if not isinstance(rule, DataMethod) or not rule.looks(cfg):
        if data is not None:
            raise UsageError(f"the merge method {method!r} looks at no data", hint="leave data out (--data)")
        return None
    if data is None:
        raise UsageError(f"the merge method {method!r} needs data", hint="data=FILE, or a list of one for each input (--data FILE, again for each)")
    if models.base is None:
        raise UsageError(f"the merge method {method!r} runs the models; give the base", hint="base=PATH (--base PATH)")
    sets = list(data) if isinstance(data, list | tuple) and not (data and isinstance(data[0], dict)) else [data]
    if len(sets) not in (1, len(models.updates)):
        raise UsageError(f"expected one set of data, or one for each of {len(models.updates)} inputs, got {len(sets)}")
    from ._data import Study

    return Study(models, sets * (len(models.updates) // len(sets)), device=device, batch_size=batch_size, seed=getattr(cfg, "seed", 0))


# --- the merged delta


def _merged(models: Increments, rule: MergeMethod[Any], settings: Settings[Any], recipe: dict[str, Any], study: Study | None, named: bool) -> Delta:
    weighted = [target for target in models.targets.values() if rule.weighted(settings.at(target).cfg)]
    keep = {target.name: target for target in weighted if models.by_algebra(target.name) and not models.all_dense(target.name)}
    dense = [target for name, target in models.targets.items() if name not in keep]
    lacking = [target.name for target in dense if models.base is None and models.needs_base(target.name)]
    if lacking:
        raise UsageError(
            f"what the inputs do to {lacking[0]!r} depends on the base's values ({len(lacking)} such tensors); give the base", hint="base=PATH (--base PATH)"
        )
    reuse_memory()
    state = rule.measure(study, settings) if isinstance(rule, DataMethod) and study is not None else rule.prepare(models, settings)
    entries, tensors = _combined(models, {name: rule.coefficients(*settings.at(target), state, target) for name, target in keep.items()})
    kernel = Kernel(models, rule, settings, state)
    scale = rule.scale(state)
    for target in rule.targets(dense, state):
        key = f"{target.name}//0.values"
        entries[target.name] = Entry((OpEntry("dense", {} if scale == 1 else {"scale": scale}, {"values": Ref(key)}),), _of_base(target, named), target.change)
        tensors[key] = MergedTensor(kernel, target)
    tensors |= {BLOB + name: hold(bytearray(data)) for name, data in rule.blobs(state).items()}
    parents = tuple(each.id for each in models.updates if isinstance(each, Delta))
    config = merge_patches(models.config, rule.config(state))
    tied = tuple(group for group in models.tied if entries.keys() & set(group))
    return Delta(models.fingerprint if named else None, entries, tensors, models.over, parents, recipe, config, tied, models.quantisation)


def _of_base(target: Target, named: bool) -> BaseTensor | None:
    """The base tensor of an entry; without its hash where nothing will ask for it."""
    return target.base if named or target.added else BaseTensor(target.dtype, target.shape, "")


def _combined(models: Increments, coefficients: Mapping[str, Sequence[float]]) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """sum_i c_i delta_i on some tensors by the algebra of deltas: numbers are read to refuse NaN alone. Models with c = 0 are left out."""
    entries: dict[str, Entry] = {}
    tensors: dict[str, Tensor] = {}
    for number, update in enumerate(models.updates):
        if not isinstance(update, Delta):
            continue
        chosen = {name: entry for name, entry in models.entries(number).items() if name in coefficients and coefficients[name][number] != 0}
        require_finite(update, [name for name in chosen if name in update.entries], models.labels[number])
        used = {key: update.tensors[key] for entry in chosen.values() for op in entry.ops for key in op.tensor_keys()}
        theirs, data = apart(replace(update, entries=chosen, tensors=used), tensors)
        tensors |= data
        for name, entry in theirs.items():
            c = coefficients[name][number]
            ops = entry.ops if c == 1 else scaled_ops(entry.ops, c)
            entries[name] = replace(entry, ops=added_ops(entries[name].ops, ops) if name in entries else ops)
    return renumbered(entries, tensors)


def _recompressed(merged: Delta, rank: int | None, energy: float | None, threads: int) -> Delta:
    """The same delta with one pair of factors, the nearest of low rank, on each tensor where all it has are low-rank ops."""
    names = [name for name, entry in merged.entries.items() if len(entry.ops) and all(op.op == "lowrank" and op.at is None for op in entry.ops)]
    entries, tensors = dict(merged.entries), dict(merged.tensors)
    with one_blas_thread():
        found = in_threads((partial(_one_pair, merged, merged.entries[name].ops, rank, energy) for name in names), threads)
        for name, (b, a) in zip(names, found, strict=True):
            keys = {field: f"{name}//0.{field}'" for field in ("A", "B")}
            entries[name] = replace(entries[name], ops=(OpEntry("lowrank", {}, {field: Ref(key) for field, key in keys.items()}),))
            tensors |= {keys["A"]: hold(a), keys["B"]: hold(b)}
    entries, tensors = renumbered(entries, tensors)
    return replace(merged, entries=entries, tensors=tensors)


def _one_pair(merged: Delta, ops: Sequence[OpEntry], rank: int | None, energy: float | None) -> tuple[Array, Array]:
    found = recompress(pairs_of(ops, merged.get), rank, energy)
    return found.b.astype("float32"), found.a.astype("float32")


def join(parts: Sequence[Delta | str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Delta:
    """The merge whose parts were made with `shard`, all of them, in any order: the same bytes as in one go.

    With `out`, written to that .safetensors file. MismatchError, with every reason, for parts that are not of one merge or not all.
    """
    if isinstance(parts, Delta | str | os.PathLike) or not parts:
        raise UsageError("join takes a list of all the parts of a merge", hint="weft.merging.join([PART, ...], OUT)")
    if out is not None:
        require_name(Path(out))
    whole = joined(loaded(parts))
    if out is None:
        return whole
    whole.save(Path(out))
    return Delta.load(Path(out))
