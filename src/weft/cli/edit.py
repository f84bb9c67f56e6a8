"""`weft edit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .app import base, declare, device, dtype, option, out_file, pairs, params, seed, threads
from .output import Output, made, made_text

FEW = 0.5
"""The share of edits that succeed below which the command says what could be tried."""


@declare("edit")
@base
@option("--edits", metavar="FILE", required=True, type=click.Path(path_type=Path), help="What is to be true: JSON Lines; zsRE and CounterFact as they are.")
@option("--method", default="ultraedit", show_default=True, help="A name from `weft methods edit`.")
@params
@option("--data", metavar="FILE", multiple=True, type=click.Path(path_type=Path), help="Ordinary text, for methods that need it; again for more files.")
@option("--on", multiple=True, metavar="DELTA", type=click.Path(path_type=Path), help="A delta that is active meanwhile; again for more, in order.")
@option("--turn-size", type=click.IntRange(1), default=100, show_default=True, help="Edits that are made at once.")
@option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Sequences in a forward; changes no result but by rounding.")
@out_file
@seed
@device
@dtype
@threads
def command(out: Output, base: str, edits: Path, method: str, params: tuple[str, ...], data: tuple[Path, ...], target: Path, **how: Any) -> None:
    """Change facts of a language model; the result is a delta from which single edits can be taken out again (weft undo).

    A row is {"prompt", "target_new"}, and "subject" for methods that look for it. With --on a delta of the same method, what it keeps for later
    turns is taken up: two runs are then as one.

    \b
    Example:
      weft edit path/to/model --edits edits.jsonl --method ultraedit -o edited.safetensors
    """
    from ..editing import edit

    given = pairs(params, edit)
    with out.progress("editing") as progress:
        delta = edit(base, edits, method, data=[*data] or None, out=target, progress=progress, **how, **given)
    notes = delta.notes
    if delta.recipe["continues"]:
        out.note(f"goes on from {delta.recipe['continues'][:12]}")
    before, after = (notes[when]["success"] for when in ("before", "after"))
    told = f"{notes['edits']} edits, {notes['seconds_per_edit']:.3f} s each; success {before:.0%} before, {after:.0%} after"
    told += f"; lr {notes['lr']:.3g}" if isinstance(notes.get("lr"), float) else ""
    if after < FEW:
        out.note(f"only {after:.0%} of the edits took: other matrices (-p sites=...) or other options may suit this model, see weft methods {method}")
    out.result(made(delta), f"{made_text(delta)}\n{told} (teacher-forced)", delta.id)
    out.next(f"weft check {{}} {'{} ' * (len(how['on']) + 1)}--data {{}}", base, *how["on"], target, edits)
