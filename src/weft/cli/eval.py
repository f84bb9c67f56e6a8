"""`weft eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .app import base, declare, deltas, device, dtype, mode, option, threads
from .output import Output, table


@declare("eval")
@base
@deltas
@option("--data", metavar="FILE", required=True, type=click.Path(path_type=Path), help='Rows of {"text", "label"}, {"text"} or {"prompt", "completion"}.')
@option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Rows that pass through the model at once.")
@option("--max-length", type=click.IntRange(2), default=512, show_default=True, help="Tokens after which a row is cut.")
@mode
@device
@dtype
@threads
def command(out: Output, base: str, deltas: tuple[Path, ...], data: Path, **how: Any) -> None:
    """Measure a base, with deltas in the order given, on data: one number per metric.

    Accuracy for labelled texts; perplexity, and how often the next token is right, for plain texts and completions.

    \b
    Example:
      weft eval path/to/model trec.safetensors --data trec.test.jsonl
    """
    from ..checking import evaluate

    with out.progress("evaluating") as progress:
        found = evaluate(base, deltas, data, progress=progress, **how)
    rows = [(name, _number(value)) for name, value in found["metrics"].items()]
    counted = [("rows", f"{found['n']:,}")] + [(name, f"{found[name]:,}") for name in ("tokens", "truncated") if found.get(name)]
    out.result(found, table([*rows, *counted], indent=""), "\n".join(f"{name} {_number(value)}" for name, value in found["metrics"].items()))
    if deltas:
        out.next(f"weft fold {{}} {'{} ' * len(deltas)}-o DIR", base, *deltas)
    else:
        out.next("weft tune {} --data TRAIN.jsonl --method lora -o OUT.safetensors", base)


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.6g}"
