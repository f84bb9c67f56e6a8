"""step-law: the best learning rate and batch size of a pretraining run, from its size.

    lr*(N, D) = c N^alpha D^beta        B*(D) = d D^gamma          N: parameters without embeddings, D: tokens, B: tokens a step

The paper's constants, from 3,700 language models: c 1.79, alpha -0.713, beta 0.307, d 0.58, gamma 0.571. The loss is convex in log lr and
log B around its minimum, so of each (N, D) with a grid of runs a quadratic surface is fitted to the better part of the grid; where its lowest
point lies (a "cell" of the report), and least squares of the logs over cells give constants of one's own, with t intervals. Cells whose
surface has no minimum, or has it outside the grid, are listed and left out.

Without runs only the paper's constants answer; with runs that all have one batch size (or no such field) the law of lr alone is fitted.
Not followed: how the paper finds the lowest point of a cell, for which it has hundreds of runs each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ..engine.data import Row
from ..errors import InputError, UsageError
from ..methods import method
from . import _plot
from ._method import Report, Task, columns, points

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

PAPER = {"lr": {"factor": 1.79, "N": -0.713, "D": 0.307}, "batch": {"factor": 0.58, "D": 0.571}}
"""Constants of Li et al.: `factor` times powers of N and D."""


class StepLawConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of step-law."""

    n: Annotated[str, msgspec.Meta(description="field of the number of parameters")] = "N"
    d: Annotated[str, msgspec.Meta(description="field of the number of tokens")] = "D"
    lr: Annotated[str, msgspec.Meta(description="field of the peak learning rate")] = "lr"
    batch: Annotated[str, msgspec.Meta(description="field of the batch size, in tokens")] = "batch"
    y: Annotated[str, msgspec.Meta(description="field of the loss")] = "loss"
    share: Annotated[float, msgspec.Meta(description="share of a cell's runs, the best, that its surface is fitted to", gt=0, le=1)] = 0.5
    level: Annotated[float, msgspec.Meta(description="of the intervals", gt=0, lt=1)] = 0.95
    at: Annotated[tuple[dict[str, float], ...], msgspec.Meta(description="maps of N and D to predict for")] = ()


@method("search", config=StepLawConfig, paper="Li et al., 2025, arXiv:2503.04715", formula="lr* = 1.79 N^-0.713 D^0.307; B* = 0.58 D^0.571 tokens")
def step_law(task: Task, cfg: StepLawConfig) -> Report:
    """The best learning rate and batch size by model and data size: the paper's law, and one fitted to one's own runs."""
    if task.source is None and not cfg.at:
        raise UsageError("step-law needs runs to fit to, or sizes to predict for", hint='weft search step-law -p at=\'[{"N": 1e9, "D": 1e11}]\'')
    asked = points(cfg.at, ("N", "D"))
    report: Report = {"paper": PAPER, "fit": None, "cells": [], "at": [], "plot": None}
    if task.source is not None:
        report["cells"] = cells = _cells(task.runs("step-law"), cfg)
        report["fit"] = _fitted([each for each in cells if each["used"]], cfg.level)
        report["plot"] = _plot.save(task.out, lambda axes: _draw(axes, report))
    for place, (n, d) in zip(cfg.at, asked, strict=True):
        told = {"paper": predict(PAPER, n, d)}
        if report["fit"] is not None:
            told["fit"] = predict({name: {key: each["value"] for key, each in law.items()} for name, law in report["fit"].items()}, n, d)
        report["at"].append({"at": dict(place), **told})
    return report


def predict(laws: Mapping[str, Mapping[str, float]], n: float, d: float) -> dict[str, float]:
    """What laws, given like `PAPER`, say of a size: {"lr": ..., "batch": ...}."""
    return {name: float(law["factor"] * n ** law.get("N", 0.0) * d ** law.get("D", 0.0)) for name, law in laws.items()}


def _cells(rows: Sequence[Row], cfg: StepLawConfig) -> list[dict[str, Any]]:
    """Where the loss of each (N, D) is lowest."""
    import numpy as np

    sizes = columns(rows, [cfg.n, cfg.d])
    knobs = {"lr": columns(rows, [cfg.lr])[:, 0]}
    if any(cfg.batch in row for row in rows):
        batch = columns(rows, [cfg.batch])[:, 0]
        if batch.min() != batch.max():
            knobs["batch"] = batch
    loss = columns(rows, [cfg.y])[:, 0]
    if not all((each > 0).all() and np.isfinite(each).all() for each in (sizes, *knobs.values())):
        raise InputError("sizes, learning rates and batch sizes must be positive; some are not")
    found = []
    for n, d in sorted({(float(n), float(d)) for n, d in sizes}):
        of = (sizes == (n, d)).all(1) & np.isfinite(loss)
        best, why = _lowest(np.log(np.stack([each[of] for each in knobs.values()], 1)), loss[of], cfg.share)
        told = {} if best is None else {name: float(np.exp(value)) for name, value in zip(knobs, best, strict=True)}
        found.append({"N": n, "D": d, "n": int(of.sum()), "used": not why, "why": why, **told})
    return found


def _lowest(knobs: Array, loss: Array, share: float) -> tuple[Array | None, str]:
    """The lowest point of a quadratic surface through the best runs, and why it is of no use (or "")."""
    import numpy as np

    k = knobs.shape[1]
    unknowns = 1 + k + k * (k + 1) // 2
    if len(loss) < unknowns:
        return None, f"{len(loss)} runs, and a surface has {unknowns} unknowns"
    best = np.argsort(loss, kind="stable")[: max(unknowns + k, round(share * len(loss)))]
    middle = knobs[best].mean(0)
    x = knobs[best] - middle
    pairs = [(i, j) for i in range(k) for j in range(i, k)]
    design = np.column_stack([np.ones(len(x)), x, *(x[:, i] * x[:, j] for i, j in pairs)])
    solution, _, rank, _ = np.linalg.lstsq(design, loss[best], rcond=None)
    if rank < unknowns:
        return None, "its best runs do not span a surface"
    hessian = np.zeros((k, k))
    for (i, j), value in zip(pairs, solution[1 + k :], strict=True):
        hessian[i, j] += value
        hessian[j, i] += value
    if np.linalg.eigvalsh(hessian)[0] <= 0:
        return None, "its surface is not convex"
    place: Array = middle - np.linalg.solve(hessian, solution[1 : 1 + k])
    outside = (place < knobs.min(0)) | (place > knobs.max(0))
    return place, "its lowest point is outside the grid" if outside.any() else ""


def _fitted(cells: Sequence[Mapping[str, Any]], level: float) -> dict[str, dict[str, dict[str, float]]]:
    """Constants like `PAPER`, each with an interval."""
    laws = {"lr": _line(cells, "lr", ("N", "D"), level)}
    if all("batch" in cell for cell in cells):
        laws["batch"] = _line(cells, "batch", ("D",), level)
    return laws


def _line(cells: Sequence[Mapping[str, Any]], knob: str, sizes: tuple[str, ...], level: float) -> dict[str, dict[str, float]]:
    """Least squares of log knob on the logs of sizes, with t intervals."""
    import numpy as np
    from scipy.stats import t

    design = np.array([[1.0, *(np.log(cell[size]) for size in sizes)] for cell in cells]).reshape(len(cells), 1 + len(sizes))
    if np.linalg.matrix_rank(design) < design.shape[1]:
        told = f"{len(cells)} usable size{'s' * (len(cells) != 1)} (N, D)"
        raise InputError(f"{told}: the powers of {' and '.join(sizes)} in {knob} cannot be told apart", hint="more sizes, and a wider grid of lr and batch")
    target = np.log([cell[knob] for cell in cells])
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    free = len(target) - len(solution)
    spread = np.full(len(solution), np.inf)
    if free:
        variance = ((target - design @ solution) ** 2).sum() / free
        spread = t.ppf((1 + level) / 2, free) * np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    ends = [(value, value - each, value + each) if free else (value, None, None) for value, each in zip(solution, spread, strict=True)]
    ends[0] = tuple(None if each is None else np.exp(each) for each in ends[0])  # type: ignore[assignment]
    return {
        name: dict(zip(("value", "low", "high"), (None if each is None else float(each) for each in three), strict=True))  # type: ignore[misc]
        for name, three in zip(("factor", *sizes), ends, strict=True)
    }


def _draw(axes: Any, report: Mapping[str, Any]) -> None:
    """Predicted learning rates beside those of the cells."""
    laws = {name: {key: each["value"] for key, each in law.items()} for name, law in report["fit"].items()}
    used = [cell for cell in report["cells"] if cell["used"]]
    found = [cell["lr"] for cell in used]
    for name, constants in (("fit", laws), ("paper", PAPER)):
        axes.scatter(found, [predict(constants, cell["N"], cell["D"])["lr"] for cell in used], s=14, label=name)
    axes.plot([min(found), max(found)], [min(found), max(found)], color="0.7", linewidth=1, zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="best learning rate, from the grid", ylabel="predicted")
    axes.legend()
