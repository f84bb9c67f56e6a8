"""Searches whose trials are tuning runs: rows to tune on and rows to measure on, the study, and what was chosen as deltas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ..config import as_dict
from ..engine.data import Row, data_hash, read_rows, shuffled
from ..engine.rows import kind_of
from ..errors import UsageError, near
from . import _plot
from ._method import Report, Task
from ._study import Figures, Objective, Params, Study, StudyConfig, Trial

if TYPE_CHECKING:
    from ..base import Base
    from ..delta import Delta

LARGER = {
    "accuracy": True,
    "nll": False,
    "perplexity": False,
    "teacher_forced_token_accuracy": True,
    "teacher_forced_exact": True,
}
"""What `weft.evaluate` measures, and whether it should be large."""


class TrialsConfig(StudyConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of searches that tune."""

    metric: Annotated[str, msgspec.Meta(description="what `weft eval` measures and trials are judged by; empty: accuracy of classifiers, else nll")] = ""
    holdout: Annotated[float, msgspec.Meta(description="share of the data that trials are measured on where no other rows are given", gt=0, lt=1)] = 0.2
    final_steps: Annotated[int, msgspec.Meta(description="steps of the final runs of what was chosen; 0: those of a trial", ge=0)] = 0


@dataclass(eq=False)
class Tuning:
    """Tunes the base of a task and measures what comes out.

    train, valid: rows to tune on and to measure on, apart from each other; test: rows for the final figures
    """

    task: Task
    base: Base
    rows: list[Row]
    cfg: TrialsConfig
    how: dict[str, Any] = field(init=False)
    train: list[Row] = field(init=False)
    valid: list[Row] = field(init=False)
    test: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        given = self.task.valid
        if given is None:
            order = shuffled(len(self.rows), self.task.seed)
            kept = max(1, round(self.cfg.holdout * len(order)))
            if kept == len(order):
                raise UsageError(f"{len(order)} row of data cannot be split into rows to tune on and rows to measure on", hint="--valid FILE")
            self.valid, self.train = [self.rows[k] for k in sorted(order[:kept])], [self.rows[k] for k in sorted(order[kept:])]
        else:
            self.valid, self.train = read_rows(given), self.rows
        self.test = [] if self.task.test is None else read_rows(self.task.test)
        objective = "classification" if kind_of(self.valid) == "classification" else "causal-lm"
        self.how = {"objective": objective, **self.task.how}

    @cached_property
    def metric(self) -> Objective:
        """What trials are judged by."""
        name = self.cfg.metric or ("accuracy" if kind_of(self.valid) == "classification" else "nll")
        if name not in LARGER:
            raise UsageError(f"there is no metric {name!r}{near(name, LARGER)}", hint="-p metric=nll")
        return Objective(name, LARGER[name])

    def tuned(self, options: Mapping[str, Any], seed: int, *, steps: int = 0) -> Delta:
        """The delta of one configuration: `options` are arguments of `weft.tune`. UsageError for one that all trials have already."""
        from ..tuning import tune

        both = sorted({*options} & {*self.task.how})
        if both:
            raise UsageError(f"{', '.join(both)}: chosen by the search, and fixed as well", hint="take it out of the search space (--space FILE.yaml)")
        more = {"steps": steps} if steps else {}
        return tune(self.base, self.train, seed=seed, progress=lambda event: None, **{**self.how, **options, **more})

    def measured(self, delta: Delta, rows: Sequence[Row]) -> Figures:
        """What `weft.evaluate` says of a delta, without figures that are infinite."""
        from ..checking import evaluate

        where = {name: self.how[name] for name in ("device", "dtype") if name in self.how}
        found = evaluate(self.base, [*self.how.get("on", ()), delta], rows, **where)["metrics"]
        return {name: float(value) for name, value in found.items() if value is not None}

    def identity(self, method: str) -> dict[str, Any]:
        """What must be the same to go on with a study."""
        free = ("trials", "sampler", "startup", "test_seeds", "final_steps")
        how = {name: str(value) for name, value in self.how.items() if name not in ("device", "threads", "log")}
        cfg = {name: value for name, value in as_dict(self.cfg).items() if name not in free}
        base = self.base.fingerprint
        return {"method": method, "base": base, "train": data_hash(self.train), "valid": data_hash(self.valid), "how": how, "config": cfg}


Measure = Callable[["Delta", Tuning], Figures]
"""The figures of a delta, those of all objectives among them."""


def searched(
    tuning: Tuning,
    method: str,
    choices: Mapping[str, Any],
    objectives: Sequence[Objective],
    options: Callable[[Params], Mapping[str, Any] | None],
    measure: Measure,
) -> Report:
    """Try configurations, run those that none is better than again, and write them as deltas.

    options: the arguments of `weft.tune` that a configuration stands for; None: it cannot be run
    """
    task, cfg = tuning.task, tuning.cfg
    study = Study(choices, objectives, cfg, seed=task.seed, storage=task.study, identity=tuning.identity(method), meaning=options)
    study.run(lambda params, seed: measure(tuning.tuned(options(params) or {}, seed), tuning), task.events)
    chosen = study.front
    if not chosen:
        raise UsageError(f"all {len(study.trials)} trials failed", problems=[f"trial {each.number}: {each.why}" for each in study.trials[:5]])
    files: dict[int, dict[str, Any]] = {}

    def final(trial: Trial, seed: int) -> Figures:
        delta = tuning.tuned(options(trial.params) or {}, seed, steps=cfg.final_steps)
        if trial.number not in files and task.out is not None:
            name = f"{trial.number:04d}.safetensors"
            delta.save(task.out / name)
            files[trial.number] = {"file": name, "id": delta.id, "nbytes": delta.nbytes}
        tested = {f"test.{name}": value for name, value in tuning.measured(delta, tuning.test).items()} if tuning.test else {}
        return {**measure(delta, tuning), **tested}

    records = study.judge(chosen, final, task.events)
    if not cfg.test_seeds and task.out is not None:
        for trial in chosen:
            final(trial, cfg.tuning_seeds[0])
    for record, trial in zip(records, chosen, strict=True):
        record |= {"delta": files.get(trial.number), "shown": dict(options(trial.params) or {})}
    report = study.report()
    gaps = [record["gap"] for record in records if record["gap"] is not None]
    task.events("end", trials=len(report["trials"]), front=len(records))
    plot = _plot.save(task.out, lambda axes: _draw(axes, report, records)) if len(objectives) == 2 else None
    return {**report, "front": records, "gap": sum(gaps) / len(gaps) if gaps else None, "plot": plot}


def _draw(axes: Any, report: Mapping[str, Any], front: Sequence[Mapping[str, Any]]) -> None:
    """All trials, and the line of those that none is better than."""
    first, second = (each["name"] for each in report["objectives"])
    done = [each["values"] for each in report["trials"] if each["values"]]
    axes.scatter([each[second] for each in done], [each[first] for each in done], s=10, color="0.7", label="trials")
    best = sorted((each["values"][second], each["values"][first]) for each in front)
    axes.plot([x for x, _ in best], [y for _, y in best], "o-", markersize=4, color="C0", label="none is better")
    if min(x for x, _ in best) > 0:
        axes.set_xscale("log")
    axes.set(xlabel=second, ylabel=first)
    axes.legend()
