"""`weft demo`."""

from __future__ import annotations

from pathlib import Path

import click

from .app import declare, option, threads
from .output import Output


@declare("demo")
@option("--out", "target", metavar="DIR", default="weft-demo", show_default=True, type=click.Path(path_type=Path), help="Where the files go.")
@option("--data", metavar="DIR", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Only write the demo's text files into DIR.")
@threads
def command(out: Output, target: Path, data: Path | None) -> None:
    """The whole story in a few minutes, offline: a real model is tuned, measured, folded, merged and taken back.

    \b
    Example:
      weft demo --out weft-demo
      weft demo --data .          first.jsonl, second.jsonl and test.jsonl, to try the other commands on
    """
    if data is not None:
        from ..demo.docstrings import write

        paths = write(data)
        out.result({name: str(path) for name, path in paths.items()}, "\n".join(map(str, paths.values())), str(data))
        out.next("weft tune MODEL --data {} --objective classification -o first.safetensors", paths["first"])
        return
    from ..demo.story import run

    with out.training() as progress:
        figures = run(target, out.say, progress=progress)
    out.result(figures, "", str(target))
