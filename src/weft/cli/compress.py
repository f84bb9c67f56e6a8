"""`weft compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .app import argument, declare, option, out_file, pairs, params, workers
from .output import Output, amount, made, made_text

if TYPE_CHECKING:
    from ..delta import Delta

_DONE = {"add": "added", "copy": "copied", "remove": "removed", "replace": "replaced"}


@declare("compress")
@argument("update", metavar="X")
@option("--method", default="compeft", show_default=True, help="A name from `weft methods compress`.")
@params
@option("--base", metavar="BASE", help="The base; needed when X is a checkpoint or sets values (full tuning, exact diffs).")
@option("--on", multiple=True, metavar="DELTA", type=click.Path(path_type=Path), help="A delta that X was made over; again for each, in order.")
@out_file
@workers
def command(out: Output, update: str, method: str, params: tuple[str, ...], base: str | None, on: tuple[Path, ...], target: Path, threads: int) -> None:
    """Make a delta (X), or the update from a base to a checkpoint, smaller; say what it cost.

    \b
    Example:
      weft compress tuned.safetensors --method compeft -p density=0.05 -o small.safetensors
      weft compress path/to/tuned --base path/to/model --method compeft -o small.safetensors
    """
    from ..compressing import compress

    given = pairs(params, compress)
    result = compress(update, method, base, on=list(on), out=target, threads=threads, **given)
    out.result({**made(result), "method": method}, f"{made_text(result)}\n{_told(result, base is not None)}", result.id)
    out.next("weft eval {} {} --data FILE.jsonl", base or "BASE", target)


def _told(delta: Delta, based: bool) -> str:
    summary: dict[str, Any] = dict(delta.notes["summary"])
    before, after, error = summary["before"], summary["after"], summary["error"]
    size = f"{before / after:.1f} times smaller than" if 0 < after < before else "NOT smaller than" if after else "nothing is stored of what was there"
    entries = f"; {summary['kept']:,} of {summary['entries']:,} entries are not zero" if summary["entries"] else ""
    lost = (
        "every bit is kept"
        if error == 0 and not entries
        else "its increments are zero"
        if error is None and summary["tensors"]
        else "the error of its increments is not known" + ("" if based else " (give the base)")
        if error is None
        else f"the relative error of its increments is {error:.3g}"
    )
    changes = ", ".join(f"{count} {_DONE[kind]}" for kind, count in summary.get("changes", {}).items())
    whole = f"\ntensors stored as they are: {changes}" if changes else ""
    return f"{size} before ({amount(before)}); {lost}{entries}{whole}"
