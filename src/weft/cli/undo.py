"""`weft undo`."""

from __future__ import annotations

from pathlib import Path

import click

from .app import argument, declare, out_file
from .output import Output, made, made_text


@declare("undo")
@argument("delta", metavar="DELTA", type=click.Path(path_type=Path))
@argument("which", metavar="WHICH...", nargs=-1, required=True)
@out_file
def command(out: Output, delta: Path, which: tuple[str, ...], target: Path) -> None:
    """Take single edits out of a delta; all others keep their bits.

    WHICH is an edit's number (from 0), the beginning of its id, or its subject, which takes every edit of that subject; weft show lists them.

    \b
    Example:
      weft undo edited.safetensors 3 "Ada Lovelace" -o fewer.safetensors
    """
    from ..editing import ledger, undo

    left = undo(delta, which, out=target)
    gone, kept = len(left.recipe["config"]["edits"]), len(ledger(left))
    out.result({**made(left), "undone": left.recipe["config"]["edits"], "edits": kept}, f"{made_text(left)}\n{gone} undone, {kept} left", left.id)
    out.next("weft show {}", target)
