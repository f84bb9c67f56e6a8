"""`weft demo`."""

from __future__ import annotations

from pathlib import Path

import click

from .app import declare, option, threads
from .output import Output


@declare("demo")
@option("--out", "target", metavar="DIR", default="weft-demo", show_default=True, type=click.Path(path_type=Path), help="Where the files go.")
@option(
    "--data",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Only write the demo's data into DIR (made if need be), and the microcosm with its bases into DIR/microcosm.",
)
@threads
def command(out: Output, target: Path, data: Path | None) -> None:
    """The whole story in a few minutes, offline: a real model is tuned, measured, folded, merged and taken back.

    \b
    Example:
      weft demo --out weft-demo
      weft demo --data .          first.jsonl, second.jsonl and test.jsonl; microcosm/, see the README.md in it
    """
    if data is not None:
        from ..demo import docstrings, editions, microcosm

        paths = {**docstrings.write(data), **microcosm.write(data / "microcosm"), **editions(data / "microcosm")}
        out.result({name: str(path) for name, path in paths.items()}, "\n".join(map(str, paths.values())), str(data))
        out.next("weft edit {} --edits {} -o edited.safetensors", paths["first-base"], paths["edits-20"])
        return
    from ..demo.story import run

    with out.training() as progress:
        figures = run(target, out.say, progress=progress)
    out.result(figures, "", str(target))
