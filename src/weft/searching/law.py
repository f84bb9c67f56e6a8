"""law: power laws of a loss over sizes, with intervals and predictions.

    L = E + sum_i A_i x_i^-a_i          one variable, or several: N (parameters), D (tokens) as in Hoffmann et al. 2022

Fitted to the Huber loss of log L^ - log L, delta 1e-3, from several starts. Intervals are percentiles of laws that
are fitted to redrawn residuals. With `holdout` the largest runs stay out of the fit and are predicted; their intervals are those of a single
new run. With `by` each family of runs has its own law, and exponents of two families are said to differ where their intervals do not
overlap (Yao et al. 2024, arXiv 2410.12360, who compare encoder-only and decoder-only models of time series, on data from within and from
without); that is stricter than a test of the difference at the same level.

Not followed: L-BFGS (a bounded least-squares descent with exact slopes finds the same minimum from fewer starts), and Yao's laws
without E, unless floor=false.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ..engine.data import Row
from ..errors import InputError
from ..methods import method
from . import _plot
from ._method import Report, Task, columns, points

if TYPE_CHECKING:
    from ._powers import Power


class LawConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of law."""

    x: Annotated[tuple[str, ...], msgspec.Meta(description="fields of the runs that the loss depends on", min_length=1)] = ("N", "D")
    y: Annotated[str, msgspec.Meta(description="field of the loss")] = "loss"
    by: Annotated[str, msgspec.Meta(description="field that says which family a run belongs to; empty: one family")] = ""
    floor: Annotated[bool, msgspec.Meta(description="whether there is an E")] = True
    delta: Annotated[float, msgspec.Meta(description="where the Huber loss of log L becomes linear", gt=0)] = 0.001
    level: Annotated[float, msgspec.Meta(description="of the intervals", gt=0, lt=1)] = 0.95
    samples: Annotated[int, msgspec.Meta(description="redrawn fits that the intervals come from", ge=10)] = 200
    holdout: Annotated[float, msgspec.Meta(description="share of the runs, the largest by the product of x, that is only predicted", ge=0, lt=1)] = 0.0
    at: Annotated[tuple[dict[str, float], ...], msgspec.Meta(description="where else to predict: maps of x")] = ()


@method("search", config=LawConfig, paper="Hoffmann et al., 2022, arXiv:2203.15556; Yao et al., 2024, arXiv:2410.12360", formula="L = E + sum_i A_i x_i^-a_i")
def law(task: Task, cfg: LawConfig) -> Report:
    """Power laws of a loss over sizes: fit, intervals, held-out prediction, comparison of families."""
    rows = task.runs("law")
    if cfg.by and any(cfg.by not in row for row in rows):
        raise InputError(f"{sum(cfg.by not in row for row in rows)} of {len(rows)} runs have no field {cfg.by!r}", hint="-p by=FIELD names the family of a run")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row[cfg.by]) if cfg.by else "all", []).append(row)
    families = []
    for number, (name, members) in enumerate(groups.items()):
        families.append(_family(name, members, cfg, task.seed))
        task.events("trial", done=number + 1, total=len(groups), family=name)
    plot = _plot.save(task.out, lambda axes: _draw(axes, families, groups, cfg))
    return {"families": families, "comparison": _compared(families), "plot": plot}


def _family(name: str, rows: Sequence[Row], cfg: LawConfig, seed: int) -> dict[str, Any]:
    import numpy as np

    from ._powers import bootstrap, fit, interval

    order = sorted(rows, key=lambda row: float(np.log(columns([row], cfg.x)).sum()))
    kept = len(order) - int(cfg.holdout * len(order))
    inside, outside = order[:kept], order[kept:]
    x, loss = columns(inside, cfg.x), columns(inside, [cfg.y])[:, 0]
    try:
        best = fit(x, loss, delta=cfg.delta, floor=cfg.floor)
    except InputError as error:
        raise InputError(f"family {name!r}: {error.message}" if cfg.by else error.message, hint=error.hint) from None
    laws, rest = bootstrap(x, loss, best, samples=cfg.samples, seed=seed, delta=cfg.delta, floor=cfg.floor)
    noise = np.random.default_rng([seed, 1]).choice(rest, (cfg.samples, 1))

    def number(value: float, drawn: Sequence[float]) -> dict[str, float]:
        low, high = interval(drawn, cfg.level)
        return {"value": value, "low": low, "high": high}

    def predicted(where: Any) -> list[dict[str, float]]:
        drawn = np.stack([each(where) for each in laws]) * np.exp(noise)
        return [number(float(value), drawn[:, k]) for k, value in enumerate(best(where))]

    terms = [
        {
            "x": variable,
            "factor": number(best.factors[k], [each.factors[k] for each in laws]),
            "exponent": number(best.exponents[k], [each.exponents[k] for each in laws]),
        }
        for k, variable in enumerate(cfg.x)
    ]
    held = columns(outside, [*cfg.x, cfg.y])
    return {
        "name": name,
        "n": len(inside),
        "E": number(best.floor, [each.floor for each in laws]),
        "terms": terms,
        "error": float(np.median(np.abs(np.log(best(x) / loss)))),
        "held_out": [
            {"at": dict(zip(cfg.x, map(float, row), strict=False)), "measured": float(row[-1]), "predicted": told, "error": told["value"] / float(row[-1]) - 1}
            for row, told in zip(held, predicted(held[:, :-1]), strict=True)
        ],
        "at": [{"at": dict(each), "predicted": told} for each, told in zip(cfg.at, predicted(points(cfg.at, cfg.x)), strict=True)],
    }


def _compared(families: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each variable and two families: whether the intervals of the exponents overlap."""
    found = []
    for one, other in combinations(families, 2):
        for first, second in zip(one["terms"], other["terms"], strict=True):
            a, b = first["exponent"], second["exponent"]
            overlap = a["low"] <= b["high"] and b["low"] <= a["high"]
            found.append({"x": first["x"], "families": [one["name"], other["name"]], "difference": b["value"] - a["value"], "overlap": overlap})
    return found


def _of(family: Mapping[str, Any]) -> Power:
    from ._powers import Power

    terms = family["terms"]
    return Power(family["E"]["value"], tuple(each["factor"]["value"] for each in terms), tuple(each["exponent"]["value"] for each in terms))


def _draw(axes: Any, families: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[Row]], cfg: LawConfig) -> None:
    """One variable: the law through its runs. Several: what is predicted of each run beside what was measured."""
    import numpy as np

    for number, family in enumerate(families):
        x, loss = columns(groups[family["name"]], cfg.x), columns(groups[family["name"]], [cfg.y])[:, 0]
        colour = f"C{number}"
        if len(cfg.x) == 1:
            line = np.geomspace(x.min(), x.max(), 100)[:, None]
            axes.plot(line[:, 0], _of(family)(line), color=colour)
            axes.scatter(x[:, 0], loss, s=12, color=colour, label=family["name"])
        else:
            axes.scatter(loss, _of(family)(x), s=12, color=colour, label=family["name"])
    axes.set(xscale="log", yscale="log")
    if len(cfg.x) == 1:
        axes.set(xlabel=cfg.x[0], ylabel=cfg.y)
    else:
        ends = [axes.get_xlim()[0], axes.get_xlim()[1]]
        axes.plot(ends, ends, color="0.7", linewidth=1, zorder=0)
        axes.set(xlabel=f"{cfg.y}, measured", ylabel=f"{cfg.y}, predicted")
    axes.legend()
