"""`weft search`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .app import argument, declare, device, dtype, new_folder, option, pairs, params, seed, threads
from .output import Output, table


@declare("search")
@argument("method", metavar="METHOD")
@argument("source", metavar="[BASE|RUNS]", required=False)
@option("--data", metavar="FILE", multiple=True, type=click.Path(path_type=Path), help="Rows to tune on; again for more files.")
@option("--valid", metavar="FILE", multiple=True, type=click.Path(path_type=Path), help="Rows that trials are measured on.  [default: a share of --data]")
@option("--test", metavar="FILE", multiple=True, type=click.Path(path_type=Path), help="Rows that only what was chosen is measured on.")
@option("--space", metavar="FILE.yaml", type=click.Path(path_type=Path), help="What may be chosen.  [default: made from the catalogue]")
@option("--study", metavar="FILE|URL", help="Where trials are kept: to go on later, and to share them between processes.")
@option("-o", "--out", "target", metavar="DIR", type=click.Path(path_type=Path), callback=new_folder, help="A folder for the report, deltas and a plot.")
@option("--log", metavar="FILE", type=click.Path(path_type=Path), help="Add every event to this file, one JSON object a line.")
@params
@seed
@device
@dtype
@threads
def command(
    out: Output, method: str, source: str | None, params: tuple[str, ...], target: Path | None, device: str | None, dtype: str | None, **how: Any
) -> None:
    """Find what to tune and how, by trials; or fit laws to runs that were measured (METHOD: see `weft methods search`).

    Options of the method are given with -p; what it does not know is an option of every tuning run: -p objective=classification -p steps=50.

    \b
    Example:
      weft search law runs.jsonl -p x=N,D -p holdout=0.2
      weft search step-law -p at='[{"N": 1e9, "D": 1e11}]'
      weft search autopeft path/to/model --data train.jsonl -p objective=classification -p steps=50 --study trials.log -o pareto
    """
    from ..searching import search

    given = pairs(params, search) | {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
    where: dict[str, Any] = {name: [*how.pop(name)] or None for name in ("data", "valid", "test")}
    with out.progress("searching") as bar:

        def heard(event: dict[str, Any]) -> None:
            if "done" in event:
                bar(event["done"], event["total"])

        found = search(method, source, **where, **how, out=target, progress=heard, **given)
    human, quiet = _SHAPES[next(key for key in _SHAPES if key in found)](found)
    out.result(found, human, quiet)
    if target is not None:
        out.note(f"written: {target}")


def _laws(found: Mapping[str, Any]) -> tuple[str, str]:
    rows = [("family", "runs", "", "value", "interval")]
    for family in found["families"]:
        head = (family["name"], str(family["n"]))
        rows.append((*head, "E", *_number(family["E"])))
        for term in family["terms"]:
            rows.append(("", "", f"A of {term['x']}", *_number(term["factor"])))
            rows.append(("", "", f"a of {term['x']}", *_number(term["exponent"])))
        for kind in ("held_out", "at"):
            for each in family[kind]:
                measured = f", measured {each['measured']:.5g}" if "measured" in each else ""
                rows.append(("", "", f"at {_place(each['at'])}{measured}", *_number(each["predicted"])))
    parts = [table(rows)]
    parts += [
        f"{' and '.join(each['families'])}: exponents of {each['x']} {'may be the same' if each['overlap'] else 'differ'} ({each['difference']:+.3g})"
        for each in found["comparison"]
    ]
    return "\n".join(parts), "\n".join(f"{term['exponent']['value']:.6g}" for family in found["families"] for term in family["terms"])


def _steps(found: Mapping[str, Any]) -> tuple[str, str]:
    parts = []
    if found["fit"] is not None:
        rows = [("law", "", "value", "interval", "paper")]
        rows += [(knob, name, *_number(each), f"{found['paper'][knob][name]:g}") for knob, law in found["fit"].items() for name, each in law.items()]
        parts.append(table(rows))
        parts += [f"left out: N {cell['N']:g}, D {cell['D']:g}: {cell['why']}" for cell in found["cells"] if not cell["used"]]
    said = [(each["at"], name, each[name]) for each in found["at"] for name in ("fit", "paper") if name in each]
    if said:
        lines = [(_place(at), name, f"{law['lr']:.4g}", f"{law['batch']:,.0f} tokens" if "batch" in law else "") for at, name, law in said]
        parts.append(table([("at", "by", "lr", "batch"), *lines]))
    return "\n".join(parts), "\n".join(f"{law['lr']:.6g}" for _, name, law in said if name == ("fit" if found["fit"] else "paper"))


def _trials(found: Mapping[str, Any]) -> tuple[str, str]:
    names = [each["name"] for each in found["objectives"]]
    gap = any(each["gap"] is not None for each in found["front"])
    rows = [("trial", *names, *(["gap"] if gap else []), "what")]
    for each in found["front"]:
        what = ", ".join(f"{name}={_short(value)}" for name, value in each["shown"].items())
        gaps = ["" if each["gap"] is None else f"{each['gap']:+.3g}"] if gap else []
        rows.append((str(each["number"]), *(f"{each['values'][name]:.5g}" for name in names), *gaps, what))
    counts = found["counts"]
    head = f"{counts['done']} trials, {counts['failed']} of them failed; {len(found['front'])} that no other is better than in everything"
    return f"{head}\n{table(rows)}", "\n".join(str(each["number"]) for each in found["front"])


_SHAPES = {"families": _laws, "cells": _steps, "front": _trials}


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _place(at: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in at.items())


def _number(each: Mapping[str, Any]) -> tuple[str, str]:
    return f"{each['value']:.5g}", "" if each["low"] is None else f"{each['low']:.5g} .. {each['high']:.5g}"
