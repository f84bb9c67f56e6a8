"""`weft merge`."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from .app import argument, declare, delta_name, new_folder, option, pairs, params, workers
from .output import Output, made, made_text


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        return [float(each) for each in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers, one for each input, got {value!r}") from None


@declare("merge")
@argument("inputs", metavar="X...", nargs=-1, required=True)
@option("--method", default="task-arithmetic", show_default=True, help="A name from `weft methods merge`.")
@params
@option("--weights", metavar="A,B,...", callback=_numbers, help="One number for each input.")
@option("--base", metavar="BASE", help="The base of all inputs; needed when one is a checkpoint, and for --into.")
@option("--on", multiple=True, metavar="DELTA", type=click.Path(path_type=Path), help="A delta that inputs were made over; again for each, in order.")
@option("-o", "--out", "target", metavar="OUT.safetensors", type=click.Path(path_type=Path), callback=delta_name, help="Where the merged delta goes.")
@option("--into", metavar="DIR", type=click.Path(path_type=Path), callback=new_folder, help="Write base + merged delta as a checkpoint instead.")
@workers
def command(
    out: Output,
    inputs: tuple[str, ...],
    method: str,
    params: tuple[str, ...],
    weights: list[float] | None,
    base: str | None,
    on: tuple[Path, ...],
    target: Path | None,
    into: Path | None,
    threads: int,
) -> None:
    """Merge deltas and checkpoints (X) of one base into one delta, or straight into a checkpoint.

    \b
    Example:
      weft merge trec.safetensors subj.safetensors --method ties -p density=0.2 --base path/to/model -o both.safetensors
    """
    from ..merging import merge

    if (target is None) == (into is None):
        raise UsageError("weft merge: give one of -o OUT.safetensors and --into DIR", hint="weft merge --help")
    given = pairs(params, merge)
    result = merge(list(inputs), base, method, weights, out=target, into=into, on=list(on), threads=threads, **given)
    if into is not None:
        from .fold import summary

        out.result({**result.json(), "method": method}, summary(result), str(into))
        out.next("weft eval {} --data FILE.jsonl", into)
        return
    out.result({**made(result), "method": method}, made_text(result), result.id)
    out.next("weft eval {} {} --data FILE.jsonl", base or "BASE", target)
