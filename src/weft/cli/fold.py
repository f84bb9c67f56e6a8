"""`weft fold`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .app import argument, base, declare, option, out_folder, read_deltas, workers
from .output import Output, amount, table

if TYPE_CHECKING:
    from ..folding import FoldReport


@declare("fold")
@base
@argument("deltas", metavar="DELTA...", nargs=-1, required=True, type=click.Path(path_type=Path))
@out_folder
@option("--task", metavar="NAME", help="The task to fold, of deltas that differ by task.")
@option("--allow-noop", is_flag=True, help="Write the checkpoint even if no bit of it changes.")
@workers
def command(out: Output, base: str, deltas: tuple[Path, ...], target: Path, task: str | None, allow_noop: bool, threads: int) -> None:
    """Write deltas, in the order given, into a full checkpoint that any tool can load.

    \b
    Example:
      weft fold path/to/model trec.safetensors -o folded
    """
    from ..base import Base
    from ..folding import fold

    opened, loaded = Base.open(base), read_deltas(deltas)
    with out.progress("hashing the base") as progress:
        opened.hash_all(progress)
    if task is not None:
        from ..engine.routed import differs, of_task

        chosen = [differs(delta) for delta in loaded]
        loaded = [of_task(delta, opened, task) if differ or not any(chosen) else delta for delta, differ in zip(loaded, chosen, strict=True)]
    with out.progress("folding") as progress:
        report = fold(opened, loaded, target, threads=threads, allow_noop=allow_noop, progress=progress)
    out.result(report.json(), summary(report), str(target))
    out.next("weft eval {} --data FILE.jsonl", target)


def summary(report: FoldReport) -> str:
    """What a fold did, for people: how much changed, and where most."""
    facts = [
        ("wrote", f"{report.path}, {amount(report.nbytes)}"),
        ("changed", f"{report.changed:,} entries in {sum(bool(t.changed) for t in report.tensors.values())} of {len(report.tensors)} touched tensors"),
    ]
    if report.relative is not None:
        facts.append(("relative", f"{report.relative:.4g} = ||w' - w|| / ||w|| over all tensors changed in place"))
    moved = sorted(((t.relative, name) for name, t in report.tensors.items() if t.relative is not None), reverse=True)
    facts += [("most" if not k else "", f"{relative:.4g}  {name}") for k, (relative, name) in enumerate(moved[:3])]
    if report.lost:
        facts.append(("lost", f"{len(report.lost)} touched tensors are as before: the change is below their dtype's resolution ({report.lost[0]}, ...)"))
    if report.config_changed:
        facts.append(("config", "config.json was changed as the deltas ask"))
    return table(facts, indent="")
