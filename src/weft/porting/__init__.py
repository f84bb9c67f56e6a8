"""Porting: an update made for one base becomes an update of another.

    old, new = weft.Base.open("model-v1"), weft.Base.open("model-v2")
    predict(old, new, style).sentence            # "porting is likely to work: ..."
    delta = weft.port(style, old, new)

The result is a delta like any other, with the target's fingerprint and the hashes of the target's tensors. Methods are the other
files of this package whose names do not begin with an underscore.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base import Base
from ..config import as_dict, make
from ..delta import Delta
from ..engine.data import data_hash, read_rows
from ..engine.increments import Update, open_update
from ..engine.stream import thread_count
from ..errors import MismatchError
from ..file import require_name
from ..methods import get
from ._method import Job
from ._prediction import Prediction, predict

__all__ = ["Prediction", "port", "predict"]


def port(
    update: Delta | Base | str | os.PathLike[str],
    source: Base | str | os.PathLike[str],
    target: Base | str | os.PathLike[str],
    method: str = "diff-vector-transfer",
    *,
    out: str | os.PathLike[str] | None = None,
    data: Any = None,
    seed: int = 0,
    device: str | None = None,
    threads: int | None = 1,
    **params: Any,
) -> Delta:
    """Carry an update from the base it was made for to another one.

    update:  a delta (`Delta`, or its file) made for `source`, or a checkpoint (`Base`, path, Hub id) that was tuned from it
    source:  the base that the update belongs to
    target:  the base that gets it
    method:  a name from `weft methods port`; `params` are its options
    out:     a .safetensors file to write the delta to
    data:    rows or files (see `weft.engine.data.read_rows`), for methods that need some (UsageError for the others)
    seed:    of whatever is random
    device:  where models run, for methods that run them
    threads: blocks computed at a time (None: the CPUs of this process, at most 8); the result does not depend on it

    Returns the delta for the target: of the file if `out` is given, else one whose dense tensors are computed from the source when they
    are read. Its parent is the update's id; its notes say what was carried, and how (`carried` with their own ops, `dense`, `left` out
    and why, `vocabulary`: rows moved and rows of new tokens).

    Raises UsageError for a wrong method or option, MismatchError for an update of another base, and with every tensor that does not fit.
    """
    record = get("port", method)
    cfg = make(record.config, params, f"port method {method!r}")
    workers = thread_count(threads)
    if out is not None:
        require_name(Path(out))
    old, new, given = opened(source), opened(target), open_update(update)
    _require(given, old)
    rows = None if data is None else read_rows(data)
    made: Delta = record.run(Job(given, old, new, rows, seed, device, workers), cfg)
    recipe: dict[str, Any] = {"verb": "port", "method": method, "config": as_dict(cfg), "from": old.fingerprint}
    recipe |= {"update": given.id} if isinstance(given, Delta) else {"checkpoint": given.fingerprint}
    recipe |= {"seed": seed} | ({"data": data_hash(rows)} if rows is not None else {})
    recipe |= {"made": made.recipe} if made.recipe else {}
    delta = replace(made, recipe=recipe, parents=(given.id,) if isinstance(given, Delta) else (), path=None)
    if out is not None:
        delta.save(Path(out))
        return Delta.load(Path(out))
    return delta


def opened(base: Base | str | os.PathLike[str]) -> Base:
    """A base, opened if it is not."""
    return base if isinstance(base, Base) else Base.open(os.fspath(base))


def _require(given: Update, source: Base) -> None:
    """Refuse a delta that does not stand on the source alone."""
    if isinstance(given, Base):
        return
    if given.over:
        raise MismatchError(
            f"{given.path or 'the delta'} was made over other deltas ({', '.join(id[:12] for id in given.over)}), which do not go with it",
            hint="join them to one delta first, and port that: first.then(second)",
        )
    given.require_base(source)
