"""`weft merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from .app import argument, declare, delta_name, device, new_folder, option, pairs, params, workers
from .output import Output, made, made_text


def _weights(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float | list[float]] | None:
    if value is None:
        return None
    try:
        several = [[float(number) for number in each.split(":")] for each in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers, one for each input (A:B:... for one that varies over depth), got {value!r}") from None
    return [numbers if len(numbers) > 1 else numbers[0] for numbers in several]


def _shard(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    number, slash, count = value.partition("/")
    if not (slash and number.isdigit() and count.isdigit()):
        raise click.BadParameter(f"expected I/N, the number of the part and of all parts, got {value!r}")
    return int(number), int(count)


@declare("merge")
@argument("inputs", metavar="X...", nargs=-1, required=True)
@option("--method", default="task-arithmetic", show_default=True, help="A name from `weft methods merge`.")
@params
@option("--weights", metavar="A,B,...", callback=_weights, help="One number for each input; A1:A2:... goes from the first layer to the last.")
@option("--base", metavar="BASE", help="The base of all inputs; needed when one is a checkpoint, and for --into.")
@option("--on", multiple=True, metavar="DELTA", type=click.Path(path_type=Path), help="A delta that inputs were made over; again for each, in order.")
@option("-o", "--out", "target", metavar="OUT.safetensors", type=click.Path(path_type=Path), callback=delta_name, help="Where the merged delta goes.")
@option("--rank", type=click.IntRange(1), help="Give what stays low-rank one pair of factors of at most this rank, the nearest one.")
@option("--energy", type=click.FloatRange(0, 1, min_open=True), help="The same, with the least rank that keeps this share of the squared norm.")
@option("--data", metavar="FILE", multiple=True, type=click.Path(path_type=Path), help="For methods that look at data: for all inputs, or one for each.")
@option("--shard", metavar="I/N", callback=_shard, help="Make only the I-th of N parts, as a delta of its own.")
@option("--join", is_flag=True, help="The inputs are all the parts of a merge; put them together.")
@device
@option("--into", metavar="DIR", type=click.Path(path_type=Path), callback=new_folder, help="Write base + merged delta as a checkpoint instead.")
@workers
def command(
    out: Output,
    inputs: tuple[str, ...],
    method: str,
    params: tuple[str, ...],
    weights: list[float | list[float]] | None,
    base: str | None,
    on: tuple[Path, ...],
    target: Path | None,
    into: Path | None,
    data: tuple[Path, ...],
    join: bool,
    **how: Any,
) -> None:
    """Merge deltas and checkpoints (X) of one base into one delta, or straight into a checkpoint.

    Weights, and the options of which `weft methods merge` says so, may be lists over depth: -p scale=0.2,0.5,1 is 0.2 in the first layer,
    0.5 in the middle, 1 in the last, and on straight lines between.

    \b
    Example:
      weft merge trec.safetensors subj.safetensors --method ties -p density=0.2 --base path/to/model -o both.safetensors
      weft merge trec.safetensors subj.safetensors --weights 1:0.2,0.5 -p scale=0.2,0.5,1 --base path/to/model -o both.safetensors
    """
    from ..merging import join as joined
    from ..merging import merge

    if (target is None) == (into is None):
        raise UsageError("weft merge: give one of -o OUT.safetensors and --into DIR", hint="weft merge --help")
    if join:
        _require_plain_join(into, params, weights, base, on, data, how)
        result = joined(list(inputs), target)
        out.result(made(result), made_text(result), result.id)
        return
    given = pairs(params, merge)
    sets = None if not data else data[0] if len(data) == 1 else [*data]
    result = merge(list(inputs), base, method, weights, out=target, into=into, on=list(on), data=sets, **how, **given)
    if into is not None:
        from .fold import summary

        out.result({**result.json(), "method": method}, summary(result), str(into))
        out.next("weft eval {} --data FILE.jsonl", into)
        return
    out.result({**made(result), "method": method}, made_text(result), result.id)
    out.next("weft eval {} {} --data FILE.jsonl", base or "BASE", target)


def _require_plain_join(into: Path | None, params: tuple[str, ...], weights: Any, base: Any, on: Any, data: Any, how: dict[str, Any]) -> None:
    """--join takes the parts and -o, and nothing that would be a merge of its own."""
    given = {"--into": into, "-p": params, "--weights": weights, "--base": base, "--on": on, "--data": data}
    given |= {f"--{name}": how.get(name) for name in ("rank", "energy", "shard")}
    odd = [name for name, value in given.items() if value]
    if odd:
        raise UsageError(
            f"weft merge --join puts parts together as they are; it takes no {', '.join(odd)}", hint="weft merge PART... --join -o OUT.safetensors"
        )
