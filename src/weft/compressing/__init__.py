"""Compressing: an update becomes a smaller one that means nearly the same.

    small = weft.compress("tuned.safetensors", method="compeft", density=0.05)
    weft.compress("path/to/tuned", base="path/to/model", density=0.05, out="small.safetensors")

The result is a delta like any other: every verb takes it. What was lost is in its notes (`summary`). Methods are the other files of
this package. Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from ..base import Base
from ..config import as_dict, make
from ..delta import Delta, loaded
from ..diffing import diff
from ..engine.increments import lineage, open_update
from ..engine.stream import one_blas_thread, reuse_memory, thread_count
from ..errors import MismatchError, UsageError
from ..file import require_name
from ..methods import get
from ..stored import ITEMSIZE
from ._measure import summary
from ._method import CompressMethod, Job
from ._raw import as_increments, has_raw

__all__ = ["CompressMethod", "Job", "compress"]


def compress(
    update: Delta | Base | str | os.PathLike[str],
    method: str = "compeft",
    base: Base | str | os.PathLike[str] | None = None,
    *,
    on: Sequence[Delta | str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    **params: Any,
) -> Delta:
    """A smaller delta that does nearly what `update` does.

    update:  a delta (`Delta`, or the path of its file), or a checkpoint (`Base`, path, Hub id): its difference from the base
    method:  a name from `weft methods compress`; `params` are its options
    base:    the base; needed for a checkpoint, for a delta that sets values (full tuning, exact diffs) to be compressed as
             increments, and for methods that look at the base's values
    on:      deltas that `update` was made over, in order; only to measure what is lost where that depends on them
    out:     a .safetensors file to write the result to
    threads: blocks worked on at a time (None: the CPUs of this process, at most 8). Never changes a bit of the result

    Returns the compressed `Delta`: of the file if `out` is given. Its notes hold a `summary`:

        before, after     bytes of tensor data, as stored; before, of a checkpoint: of its tensors that differ from the base's
        ratio             before / after
        error             ||d' - d|| / ||d|| of the increments d of all tensors; null where the update is zero, or where no
                          increment can be known without the base
        entries, kept     entries of the increments, or for low rank of the factors, and how many are not 0 afterwards
        tensors           for each target `error`, `entries` and `kept`; none for `lossless`, which is not measured
        changes           how many tensors are added, removed, copied or replaced, where there are any; they are stored as they are

    Raises UsageError for a wrong method or option, MismatchError for an update that does not fit the base or has nothing that the
    method could compress.
    """
    record = get("compress", method)
    cfg = make(record.config, params, f"compress method {method!r}")
    rule: CompressMethod[Any] = record.run()
    workers = thread_count(threads)
    if out is not None:
        require_name(Path(out))
    root = None if base is None else base if isinstance(base, Base) else Base.open(os.fspath(base))
    given = open_update(update)
    reuse_memory()
    before = tuple(loaded(on))
    start = _as_delta(given, root, workers, exact=rule.exact)
    if root is not None and isinstance(given, Delta):  # a checkpoint's update was made of just this base
        start.require_base(root, on=start.over)
        if not rule.exact:
            start = as_increments(start, root, before, workers)
    job = Job(start, root, before, workers)
    with one_blas_thread():
        made = rule.compress(job, cfg)
        if isinstance(given, Delta) and all(made.tensors.get(key) is tensor for key, tensor in given.tensors.items()) and made.entries == given.entries:
            values = not rule.exact and root is None and any(map(has_raw, given.entries.values()))
            raise MismatchError(
                f"{given.path or 'this delta'}: {method} finds nothing to compress in it"
                + (": it sets values, which are increments only in relation to the base" if values else ""),
                hint="base=PATH (--base PATH)" if values else "weft methods compress",
            )
        found = summary(job, made, _size(given, job.delta), exact=rule.exact)
        recipe = {"verb": "compress", "method": method, "config": as_dict(cfg), "inputs": lineage([given])}
        parents = (given.id,) if isinstance(given, Delta) else ()
        made = replace(made, recipe=recipe, parents=parents, notes={"summary": found}, path=None)
        if out is None:
            return made
        made.save(Path(out))
    return Delta.load(Path(out))


def _size(given: Delta | Base, delta: Delta) -> int:
    """Bytes of what was given: a delta's tensors, or as much of a checkpoint as is not the base's."""
    if isinstance(given, Delta):
        return given.nbytes
    return sum(prod(entry.shape) * ITEMSIZE[entry.dtype] for entry in delta.entries.values() if entry.dtype)


def _as_delta(given: Delta | Base, base: Base | None, threads: int, *, exact: bool) -> Delta:
    """The update as a delta. That of a checkpoint reads the files whenever a value is asked for."""
    if isinstance(given, Delta):
        return given
    if base is None:
        raise UsageError(f"{given.source} is a checkpoint: an update only in relation to its base, which is not given", hint="base=PATH (--base PATH)")
    return diff(base, given, "exact" if exact else "dense", threads=threads)
