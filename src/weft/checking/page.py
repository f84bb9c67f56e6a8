"""The report of `weft check` as one HTML page: self-contained, readable in light and dark, on paper and without JavaScript.

The page asks the network for nothing, and a Content-Security-Policy holds it to that: only the page's own script and style
may run, by their hashes. All text of the report is escaped. The report itself is in the page as JSON, complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import floor, isfinite, log10
from typing import Any

AXIS, EDGE = 170, 14
"""Width in pixels of the drawing of an interval, and of its margins."""

SCORES = ("exact_match", "accuracy")
"""The metrics that flips are about: right or wrong, row by row. The first one that a task has."""

OUTCOMES = {
    "negative": "negative flip",
    "positive": "positive flip",
    "changed": "changed, both wrong",
    "different": "differs from the base",
    "both_wrong": "both wrong",
    "both_right": "both right",
    "same": "same as the base",
}
"""The outcomes of a row, with what the page calls them; those that deserve a look first."""


def page(report: Mapping[str, Any]) -> str:
    """The page for a report (see `weft.check`). The same report gives the same bytes.

    ValueError if the report holds what JSON cannot say, such as NaN: a figure that is no number is None there.
    """
    import base64
    import hashlib
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    from .flips import bound
    from .heatmap import heatmap

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {
        "number": number,
        "signed": signed,
        "exact": lambda value: json.dumps(value, allow_nan=False),
        "plain": plain,
        "size": size,
        "digest": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
    }
    template = environment.from_string(files(__package__).joinpath("page.html").read_text("utf-8"))
    tasks = report["tasks"]
    text = template.render(
        report=report,
        verdict=report["verdict"],
        identity=report["identity"],
        tasks=tasks,
        gates=sorted(report["verdict"]["gates"], key=lambda gate: bool(gate["passed"])),
        state={True: "passed", False: "failed", None: "no gate"}[report["verdict"]["passed"]],
        score=score,
        bound=bound,
        direction=direction,
        whiskers=whiskers(tasks),
        outcomes=OUTCOMES,
        kept=sum(len(task["examples"]) for task in tasks),
        heat=heatmap(report["layers"]),
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # halves of surrogate pairs, which JSON can hold and a file cannot


def number(value: float | None) -> str:
    """A number for reading, with four digits or so; the page has the exact one beside it."""
    if value is None:
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(value)
    if isinstance(value, int) or not isfinite(value):
        return f"{value:,}".replace("-", "\N{MINUS SIGN}")
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:,.{4 if abs(value) < 10 else 3 if abs(value) < 100 else 1}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float | None) -> str:
    """A difference: as `number`, with its sign."""
    return f"+{number(value)}" if value is not None and value > 0 else number(value)


def plain(value: Any) -> str:
    """A setting: text as it is, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def size(nbytes: int) -> str:
    """A number of bytes, as 412 B, 3.1 kB, 12.0 MB."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def score(task: Mapping[str, Any]) -> str | None:
    """The metric of a task that its flips are about; None if it has none."""
    return next((name for name in SCORES if name in task["metrics"]), None)


def direction(metric: Mapping[str, Any]) -> str:
    """Whether a metric changed for the "better" or the "worse", is the "same", or "" where there is nothing to compare."""
    change = metric["change"]
    if change is None:
        return ""
    if change == 0:
        return "same"
    return "better" if (change > 0) == (metric["better"] == "higher") else "worse"


def whiskers(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """The drawings of the changes of scores, all on one axis: `ticks` are positions with labels, `of` has positions by task name. In pixels."""
    drawn = {}
    for task in tasks:
        name = score(task)
        if name is None or task["metrics"][name]["change"] is None:
            continue
        change = task["metrics"][name]["change"]
        low, high = (task["flips"] or {}).get("interval") or (change, change)
        drawn[task["name"]] = (change, low, high, direction(task["metrics"][name]))
    values = [value for *three, _ in drawn.values() for value in three]
    left, right = -_round_up(-min(values, default=0.0)), _round_up(max(values, default=0.0))
    if left == right:
        left, right = -0.01, 0.01

    def place(value: float) -> float:
        return round(EDGE + (value - left) / (right - left) * (AXIS - 2 * EDGE), 1)

    # a label needs room: zero has one, and an end only if it is far enough from it
    ticks = [(place(0), "0")] + [(place(end), f"{end:+g}") for end in (left, right) if abs(place(end) - place(0)) > 3 * EDGE]
    return {
        "width": AXIS,
        "ticks": ticks,
        "of": {
            name: {"dot": place(dot), "low": place(low), "high": place(high), "tone": tone if low > 0 or high < 0 else "unsure"}
            for name, (dot, low, high, tone) in drawn.items()
        },
    }


def _round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten; 0 for what is not positive."""
    if value <= 0:
        return 0.0
    power = 10.0 ** floor(log10(value))
    return next(end for end in (float(f"{k * power:.1g}") for k in (1, 2, 5, 10)) if end >= value)
