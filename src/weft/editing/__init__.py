"""edit: facts of a language model, changed by closed-form editors; and undo, which takes single edits back.

    delta = weft.edit("path/to/model", "edits.jsonl", method="ultraedit", turn_size=100)
    fewer = weft.undo(delta, "Ada Lovelace")

Each matrix gets one `lowrank` op whose rows belong to single edits; the ledger says which (see `ledger`). Importing this package does not
import torch. Methods are the other files of this package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import config, methods
from ..delta import BLOB, INPUT, Builder, Delta, loaded
from ..errors import FormatError, UsageError
from ._ledger import LEDGER, STATE, ledger, undo, written

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..base import Base

__all__ = ["edit", "ledger", "undo"]


def edit(
    base: Base | str | Path,
    edits: Any,
    method: str = "ultraedit",
    *,
    data: Any = None,
    on: Sequence[Delta | str | Path] = (),
    turn_size: int = 100,
    batch_size: int = 32,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    threads: int | None = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **params: Any,
) -> Delta:
    """Change facts of a causal language model; returns the delta.

    base:       a `Base`, or what `Base.open` takes; with `Base.of(module)` that module is used and left as it was
    edits:      a path, rows or `Edit`s; weft's own layout, zsRE's and CounterFact's are read (see `weft.engine.edits`)
    method:     a name from `weft methods edit`; `params` are its options
    data:       ordinary text, rows of {"text"}, for methods that need statistics of the model
    on:         deltas that are active meanwhile, in order; the new delta is made over them. What the last one keeps for later turns is
                taken up if the same method made it, so that two runs are one
    turn_size:  edits that are made at once; the next turn sees the model with those before it
    batch_size: sequences that pass through the model at once; it changes no result but by rounding
    seed:       of whatever is random in the method. The same seed, machine and thread count give the same id
    device:     default: what Accelerate finds; dtype: of the model meanwhile, default: the base's own. A live model has its own
    threads:    of torch, for the time of the call
    tokenizer:  default: the base's
    out:        a .safetensors file to write the delta to
    progress:   called after each turn with the edits that are made and those there are in all

    The notes say what teacher forcing gave before and after (`loss`, the mean -log p of an answer's tokens; `success`, the share of edits each of
    whose answer tokens was the most likely one), and how long it took.

    Raises UsageError for wrong options and matrices that cannot be edited, InputError with every edit that cannot be made or that
    contradicts another, MismatchError, and WeftError if the edits change nothing or a change is not finite.
    """
    found = methods.get("edit", method)
    cfg = config.make(found.config, params, f"edit method {method!r}")
    kind: Any = found.run
    wrong = [f"{name} must be at least 1, got {value}" for name, value in (("turn_size", turn_size), ("batch_size", batch_size)) if value < 1]
    wrong += [f"threads must be at least 1, got {threads}"] if threads is not None and threads < 1 else []
    wrong += [f"out must be one .safetensors file, got {out}"] if out is not None and Path(out).suffix != ".safetensors" else []
    if kind.texts and data is None:
        wrong.append(f"{method} needs data: ordinary text of the kind the model was trained on, rows of {{'text'}} (data=..., --data FILE)")
    if not kind.texts and data is not None:
        wrong.append(f"{method} takes no data: it needs no statistics of text")
    if wrong:
        raise UsageError(f"edit: {len(wrong)} option{'s' * (len(wrong) != 1)} that cannot be", problems=wrong, hint="weft methods edit")

    from ..attaching import attach, detach
    from ..base import Base, LiveBase
    from ..engine import borrowing
    from ..engine.data import data_hash, field, most_tokens, read_rows
    from ..engine.edits import distinct, read_edits
    from ..engine.products import widened
    from ..engine.surroundings import default_device, surroundings
    from ..names import NameMap
    from . import _run
    from ._method import Job

    base = base if isinstance(base, Base) else Base.open(base)
    if isinstance(base, LiveBase) and (dtype is not None or device is not None):
        raise UsageError("a live model is edited as it is: device and dtype are its own", hint="model.to(...) before, or open its checkpoint: Base.open(PATH)")
    before = loaded(on)
    wanted = distinct(read_edits(edits))
    for number, delta in enumerate(before):  # before gigabytes are read
        delta.require_base(base, on=[each.id for each in before[:number]])
        if any(target.startswith(INPUT) for target in delta.entries):
            raise UsageError(
                f"{delta.path or delta.id[:12]} puts vectors in front of the tokens, so it cannot be told what a matrix is given for which of them",
                hint="edit without it, and attach both afterwards",
            )
    rows = None if data is None else read_rows(data)
    texts = None if rows is None else [field(row, "text", number) for number, row in enumerate(rows)]
    tokenizer = tokenizer if tokenizer is not None else base.tokenizer()
    taken_up = _state_of(before[-1], method) if before else None
    with borrowing.threads(threads):
        model: Any = base.module if isinstance(base, LiveBase) else base.model(before, dtype=dtype, device=device or default_device())
        _run.require_language_model(model)
        most = most_tokens(tokenizer, base.config, 1 << 20)
        job = Job(base, model, tokenizer, NameMap.of(base, model, before), texts, seed, batch_size, most)
        with borrowing.borrowed(model), widened(model):
            model.eval()
            active = attach(model, before, base=base)
            try:
                facts = _run.facts(job, wanted, method, kind.subjects)
                first = _run.measured(job, facts)
                began = time.monotonic()
                worker = kind(cfg, job)
                continues = before[-1].id if taken_up is not None and worker.load(taken_up) else None
                edited = _run.run(job, worker, facts, turn_size, progress or _silent)
                seconds = time.monotonic() - began
                last = _run.measured(job, facts)
            finally:
                job.weights.restore()
                for handle in reversed(active):
                    detach(model, handle)
        recipe = {
            "verb": "edit",
            "method": method,
            "config": config.as_dict(cfg),
            "turn_size": turn_size,
            "seed": seed,
            "edits": data_hash([each.json() for each in wanted]),
            "data": None if rows is None else data_hash(rows),
            "continues": continues,
            **surroundings(model, tokenizer),
        }
    build = Builder(base)
    for matrix, (a, b) in edited.factors:
        build.put(matrix.target, "lowrank", {"A": a, "B": b}, at=matrix.at)
    build.blob(LEDGER, written(edited.records))
    if state := worker.state():
        build.blob(STATE, _packed(state))
    notes = {
        "edits": len(facts),
        "seconds": round(seconds, 3),
        "seconds_per_edit": round(seconds / len(facts), 4),
        "before": first,
        "after": last,
        **worker.notes(),
    }
    delta = build.done(over=tuple(each.id for each in before), recipe=recipe, notes=notes)
    if out is not None:
        delta.save(out)
        delta = replace(delta, path=Path(out))
    return delta


def _silent(done: int, total: int) -> None:
    pass


def _packed(state: dict[str, np.ndarray[Any, Any]]) -> bytes:
    from safetensors.numpy import save

    return bytes(save(state))


def _state_of(delta: Delta, method: str) -> dict[str, np.ndarray[Any, Any]] | None:
    """What a delta keeps for later turns of a method; None if another method made it, or it keeps nothing."""
    if delta.recipe.get("verb") not in ("edit", "undo") or delta.recipe.get("method") != method or BLOB + STATE not in delta.tensors:
        return None
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(delta.get(BLOB + STATE).tobytes()))
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"{delta.path or 'the delta'}: what it keeps for later turns cannot be read ({error})") from None
