"""`weft diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .app import argument, base, declare, option, out_file, workers
from .output import Output, made, made_text

if TYPE_CHECKING:
    from ..delta import Delta


@declare("diff")
@base
@argument("checkpoint", metavar="CHECKPOINT")
@option("--as", "mode", type=click.Choice(["exact", "dense", "lowrank", "sparse"]), default="exact", show_default=True, help="exact: bit for bit.")
@option("--rank", type=click.IntRange(1), help="Of lowrank: the rank of every factor pair.")
@option("--energy", type=click.FloatRange(0, 1, min_open=True), help="Of lowrank, instead: the share of the squared norm to keep.")
@option("--tolerance", type=click.FloatRange(0), default=0.0, help="Of sparse: leave out entries that change by no more than this.")
@out_file
@workers
def command(out: Output, base: str, checkpoint: str, target: Path, **how: Any) -> None:
    """The delta that turns a base into a checkpoint.

    \b
    Example:
      weft diff path/to/model path/to/tuned -o tuned.safetensors
      weft diff path/to/model path/to/tuned --as lowrank --rank 16 -o tuned.safetensors
    """
    from ..base import Base
    from ..delta import Delta
    from ..diffing import diff

    old, new = Base.open(base), Base.open(checkpoint)
    with out.progress("hashing the base") as progress:
        old.hash_all(progress)
    with out.progress("comparing") as progress:
        found = diff(old, new, progress=progress, **how)
    found.save(target)
    delta = Delta.load(target)
    out.result(made(delta), f"{made_text(delta)}\n{', '.join(_told(delta))}", delta.id)
    out.next("weft fold {} {} -o DIR", base, target)


def _told(delta: Delta) -> list[str]:
    summary: dict[str, Any] = dict(delta.notes["summary"])
    told = [f"{summary['entries']:,} entries of {summary['tensors']:,} tensors differ"]
    told += [f"{summary[kind]:,} {kind}" for kind in ("added", "removed") if summary.get(kind)]
    return told + ([f"{summary['lost']:.3g} of the squared norm is lost"] if "lost" in summary else [])
