"""`weft import`."""

from __future__ import annotations

from pathlib import Path

import click

from .app import argument, declare, option, out_file, threads
from .output import Output, made, made_text


@declare("import")
@argument("folder", metavar="PEFT_DIR", type=click.Path(path_type=Path))
@option("--base", metavar="BASE", required=True, help="The checkpoint that the adapter was trained on.")
@option("--initial", metavar="DIR", type=click.Path(path_type=Path), help="The adapter before training, for PiSSA and other starts that change the base.")
@out_file
@threads
def command(out: Output, folder: Path, base: str, initial: Path | None, target: Path) -> None:
    """Turn a PEFT adapter folder into a delta on its base.

    \b
    Example:
      weft import path/to/adapter --base path/to/model -o adapter.safetensors
    """
    from ..base import Base
    from ..delta import Delta
    from ..interchange import import_peft

    opened = Base.open(base)
    with out.progress("hashing the base") as progress:
        opened.hash_all(progress)
    import_peft(folder, opened, initial=initial).save(target)
    delta = Delta.load(target)
    out.result(made(delta), made_text(delta), delta.id)
    out.next("weft show {}", target)
