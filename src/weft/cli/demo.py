"""`weft demo`."""

from __future__ import annotations

from pathlib import Path

import click

from .app import declare, option, threads
from .output import Output


@declare("demo")
@option("--out", "target", metavar="DIR", default="weft-demo", show_default=True, type=click.Path(path_type=Path), help="Where the files go.")
@threads
def command(out: Output, target: Path) -> None:
    """The whole story in a few minutes, offline: a real model is tuned, measured, folded, merged and taken back.

    \b
    Example:
      weft demo --out weft-demo
    """
    from ..demo.story import run

    out.result(run(target, out.say), "", str(target))
