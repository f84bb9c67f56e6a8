"""`weft check`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import GateFailed
from .app import argument, base, declare, device, dtype, mode, option, require_folder, seed, threads
from .output import Output, table

SHOWN = 5
"""Tensors whose changes are shown: the largest ones."""


def _writable(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Looked at before the work is done, not after it."""
    if value is not None:
        require_folder(value)
    return value


@declare("check")
@base
@argument("deltas", metavar="DELTA...", nargs=-1, required=True, type=click.Path(path_type=Path))
@option(
    "--data", metavar="FILE", required=True, multiple=True, type=click.Path(path_type=Path), help="Rows to check on, one kind in a file; again for more files."
)
@option("--on", multiple=True, metavar="DELTA", type=click.Path(path_type=Path), help="A delta below both sides; again for more, in order.")
@option("--gate", metavar="FILE.yaml", type=click.Path(path_type=Path), help="Limits; the exit code is 1 if one is not kept.")
@option("--report", metavar="FILE.html", type=click.Path(path_type=Path), callback=_writable, help="Write the report as a page to read.")
@option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Rows that pass through the model at once.")
@option("--max-length", type=click.IntRange(2), default=512, show_default=True, help="Tokens after which a row is cut.")
@option("--max-new-tokens", type=click.IntRange(1), help="The longest free answer.  [default: a little more than the longest right one]")
@option("--stop", multiple=True, metavar="TEXT", help="Where free answers end; again for more.  [default: a line break or a full stop]")
@option("--samples", type=click.IntRange(1), default=1000, show_default=True, help="Draws for a bootstrap interval.")
@seed
@mode
@device
@dtype
@threads
def command(out: Output, base: str, deltas: tuple[Path, ...], data: tuple[Path, ...], stop: tuple[str, ...], **how: Any) -> None:
    """Hold a base against the same base with deltas: what got better, what broke, how large the change is.

    Labelled texts are classified; plain texts give ratios of perplexity; prompts with completions are answered freely; prompts alone
    show whether unrelated answers stay the same; rows of edits show all of it. Right answers that became wrong are counted.

    \b
    Example:
      weft check path/to/model edits.safetensors --data edits.jsonl --data unrelated.jsonl --gate gate.yaml --report check.html
    """
    from ..checking import check
    from ..checking.comparing import STOP

    with out.progress("checking") as progress:
        found = check(base, deltas, data, stop=stop or STOP, progress=progress, **how)
    verdict = found["verdict"]
    state = {True: "passed", False: "failed", None: "no gate"}[verdict["passed"]]
    out.result(found, _human(found, state), state)
    if how["report"] is not None:
        out.note(f"report: {how['report']}")
    if failed := [gate for gate in verdict["gates"] if not gate["passed"]]:
        listed = [f"{gate['where']}, {gate['metric']}: {_number(gate['value'])}, limit {gate['limit']}" for gate in failed]
        hint = "" if how["report"] is not None else "--report FILE.html, to see which answers changed"
        raise GateFailed(f"{len(failed)} of {len(verdict['gates'])} limits not kept" + "".join(f"\n  - {line}" for line in listed), hint=hint)


def _human(found: Mapping[str, Any], state: str) -> str:
    parts = [f"{state}: {found['verdict']['summary']}", table([("task", "n", "metric", "base", "delta", "change", "flips", "p"), *_tasks(found["tasks"])])]
    if others := list(_others(found["tasks"])):
        parts.append(table(others))
    sized = sorted((layer for layer in found["layers"] if layer["relative"] is not None), key=lambda layer: -layer["relative"])
    if sized:
        many = f", the largest {SHOWN} of {len(sized)}" if len(sized) > SHOWN else ""
        parts.append(f"relative change of tensors{many}:\n" + table([(layer["target"], _number(layer["relative"])) for layer in sized[:SHOWN]]))
    return "\n\n".join(parts)


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each metric; what is known of flips stands beside the first one, which they are about."""
    rows = []
    for task in tasks:
        for number, (name, metric) in enumerate(task["metrics"].items()):
            flips = task["flips"] if number == 0 else None
            change = "n/a" if metric["change"] is None else f"{metric['change']:+.4g}"
            if flips:
                change += " [{:+.3g}, {:+.3g}]".format(*flips["interval"])
            first = (task["name"], f"{task['n']:,}") if number == 0 else ("", "")
            counts = (f"-{flips['negative']:,} +{flips['positive']:,}", f"{flips['mcnemar_p']:.2g}") if flips else ("", "")
            rows.append((*first, name, _number(metric["base"]), _number(metric["delta"]), change, *counts))
        if not task["metrics"]:
            rows.append((task["name"], f"{task['n']:,}", "", "", "", "", "", ""))
    return rows


def _others(tasks: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for task in tasks:
        if ratio := task["ratio"]:
            rows.append((task["name"], "perplexity ratio " + ", ".join(f"{name} {_number(ratio[name], '#.5g')}" for name in ("pooled", "mean", "median"))))
        if against := task["against_base"]:
            told = f"agreement with the base {_number(against['agreement'])}"
            if against["kl_rows"]:
                told += f", KL mean {_number(against['kl_mean'])}, max {_number(against['kl_max'])} nats"
                told += f" (first {against['kl_rows']:,} rows)" if against["kl_rows"] < task["n"] else ""
            rows.append((task["name"], told))
        if task["truncated"]:
            rows.append((task["name"], f"rows cut: {task['truncated']:,}"))
    return rows


def _number(value: float | None, how: str = ".4g") -> str:
    return "n/a" if value is None else format(value, how)
