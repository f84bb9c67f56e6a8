"""Gates: limits that a check must keep, as a YAML file says them.

    edits/efficacy: {exact_match: {min: 0.9}}
    "unrelated*": {agreement: {min: 0.95}, kl_mean: {max: 0.02}}
    text: {perplexity_ratio: {max: 1.05}}
    "*": {nfr: {max: 0.01}, change.accuracy: {min: -0.005}}
    layers: {relative: {max: 0.1}}

A name is that of a task, or a glob, which means those tasks that have the metric. `layers` is about every tensor that
changes; the worst one is told. A value that is no number (NaN, or a perplexity without bound) keeps no limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..config import read_yaml
from ..errors import UsageError, near
from .tasks import LAYERS, Task

FLIPS = ("nfr", "pfr", "mcnemar_p")
AGREEMENT = ("agreement", "kl_mean", "kl_max")
RATIOS = {"perplexity_ratio": "pooled", "perplexity_ratio_mean": "mean", "perplexity_ratio_median": "median"}
SIZES = ("relative", "norm", "max_abs")
"""What limits can be about, besides the metrics of a task and `change.METRIC`: flips, agreement with the base, ratios of
perplexity, and the sizes of changes."""


@dataclass(frozen=True)
class Limit:
    """One limit: on `metric` of the task `where` (or `layers`), `side` "min" or "max"."""

    where: str
    metric: str
    side: str
    value: float

    @property
    def text(self) -> str:
        """As people write it: ">= 0.95"."""
        return f"{'>=' if self.side == 'min' else '<='} {self.value:.12g}"

    def keeps(self, value: float | None) -> bool:
        return value is not None and (value >= self.value if self.side == "min" else value <= self.value)


def names(task: Task) -> list[str]:
    """Everything of a task that a limit can be about."""
    own = {"text": [*RATIOS], "agreement": [*AGREEMENT], "generation": ["agreement"]}.get(task.kind, [])
    return [*task.metrics, *(f"change.{name}" for name in task.metrics), *(FLIPS if task.answers else ()), *own]


def read_limits(gate: Mapping[str, Any] | str | Path | None, tasks: Sequence[Task]) -> list[Limit]:
    """The limits of a gate file (or of the same as a mapping) on `tasks`; UsageError with all that is wrong."""
    if gate is None:
        return []
    place = "the gate" if isinstance(gate, Mapping) else str(gate)
    wrong: list[str] = []
    limits = [limit for where, asked in (gate if isinstance(gate, Mapping) else read_yaml(gate)).items() for limit in _of(str(where), asked, tasks, wrong)]
    if not wrong and not limits:
        wrong.append('it has no limit; write task: {metric: {min: 0.9}}, or "*" for every task')
    if wrong:
        raise UsageError(f"{place}: {len(wrong)} problem{'s' * (len(wrong) != 1)}", problems=wrong)
    return limits


def _of(where: str, asked: Any, tasks: Sequence[Task], wrong: list[str]) -> Iterator[Limit]:
    here = [] if where == LAYERS else [task for task in tasks if task.name == where] or [task for task in tasks if fnmatchcase(task.name, where)]
    if where != LAYERS and not here:
        wrong.append(f"{where}: no task has this name{near(where, [*(task.name for task in tasks), LAYERS], 'the tasks are')}")
    elif not isinstance(asked, Mapping):
        wrong.append(f"{where}: expected metrics with their limits, such as {{nfr: {{max: 0.01}}}}, got {asked!r}")
    else:
        known = {name for task in here for name in names(task)} if here else set(SIZES)
        for metric, sides in asked.items():
            if metric not in known:
                wrong.append(f"{where}: nothing is called {metric!r}{near(str(metric), known, 'there are')}")
                continue
            bounds = list(_bounds(f"{where}, {metric}", sides, wrong))
            for place in [task.name for task in here if metric in names(task)] or [LAYERS]:
                yield from (Limit(place, metric, side, value) for side, value in bounds)


def _bounds(where: str, sides: Any, wrong: list[str]) -> Iterator[tuple[str, float]]:
    if not isinstance(sides, Mapping) or not sides or not set(sides) <= {"min", "max"}:
        wrong.append(f"{where}: expected {{min: NUMBER}}, {{max: NUMBER}} or both, got {sides!r}")
        return
    for side, value in sides.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            wrong.append(f"{where}: {side} must be a number, got {value!r}")
        else:
            yield side, float(value)


def judge(limits: Sequence[Limit], tasks: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each limit against the tasks and layers of a report, as {"where", "metric", "limit", "value", "passed"}."""
    found = {task["name"]: _values(task) for task in tasks}
    judged = []
    for limit in limits:
        value = _worst(limit, layers) if limit.where == LAYERS else found[limit.where][limit.metric]
        passed = limit.keeps(value) and (limit.where != LAYERS or all(layer["finite"] for layer in layers))
        judged.append({"where": limit.where, "metric": limit.metric, "limit": limit.text, "value": value, "passed": passed})
    return judged


def _values(task: Mapping[str, Any]) -> dict[str, float | None]:
    """What limits are held against, by the names of `names`."""
    found = {name: metric["delta"] for name, metric in task["metrics"].items()}
    found |= {f"change.{name}": metric["change"] for name, metric in task["metrics"].items()}
    for part, keys in (("flips", {name: name for name in FLIPS}), ("against_base", {name: name for name in AGREEMENT}), ("ratio", RATIOS)):
        if task[part] is not None:
            found |= {name: task[part][key] for name, key in keys.items()}
    return found


def _worst(limit: Limit, layers: Sequence[Mapping[str, Any]]) -> float | None:
    """The value of the layer that is nearest to breaking a limit; layers that have none (ops on modules, added tensors) are left out."""
    values = [layer[limit.metric] for layer in layers if layer[limit.metric] is not None]
    return (min if limit.side == "min" else max)(values, default=None)
