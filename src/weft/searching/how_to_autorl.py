"""how-to-autorl: hyperparameters of a tuning run, with seeds to choose by and other seeds to report.

    choose   lambda^ = best over lambda of mean over tuning seeds of metric(lambda, s)
    report   mean over test seeds of metric(lambda^, s), and the gap: how much better lambda^ looked on the seeds that chose it

The gap is never negative on average (the best of many noisy means was lucky), and shrinks with more tuning seeds: -p tuning_seeds=0,1,2.
The paper's other advice: search all that may matter, over broad ranges, and say what was searched; both are in the report.

    --space FILE.yaml       lr: {low: 1e-5, high: 1e-2, log: true}      any options of `weft tune`
                            batch_size: [8, 16, 32, 64]

Not followed: reinforcement learning, whose environments are seeds too; DEHB and population-based training, which change
hyperparameters within a run; Optuna's samplers are there instead, random search among them.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from ..methods import method
from ._method import Report, Task
from ._study import choices as distributions
from ._trials import TrialsConfig, Tuning, searched

BROAD: dict[str, Any] = {
    "lr": {"low": 1e-5, "high": 3e-2, "log": True},
    "batch_size": [4, 8, 16, 32, 64],
    "optimizer.weight_decay": [0.0, 0.001, 0.01, 0.1],
    "clip": [0.1, 0.3, 1.0, 3.0],
}
"""What is searched where nothing else is said."""


class HowToAutoRLConfig(TrialsConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of how-to-autorl."""

    tuning_seeds: Annotated[tuple[int, ...], msgspec.Meta(description="seeds that a trial is run with; its value is their mean", min_length=1)] = (0, 1, 2)
    test_seeds: Annotated[tuple[int, ...], msgspec.Meta(description="seeds that only the chosen ones are run with, afterwards")] = (10, 11, 12, 13, 14)


@method(
    "search",
    config=HowToAutoRLConfig,
    paper="Eimer, Lindauer and Raileanu, 2023, arXiv:2306.01324",
    formula="choose by the mean over tuning seeds; report the mean over test seeds",
)
def how_to_autorl(task: Task, cfg: HowToAutoRLConfig) -> Report:
    """Hyperparameters, chosen by some seeds and reported on others, with the gap between the two."""
    base, rows = task.tuned("how-to-autorl")
    tuning = Tuning(task, base, rows, cfg)
    space = dict(task.space) or {name: said for name, said in BROAD.items() if name not in task.how}
    return searched(tuning, "how-to-autorl", distributions(space), [tuning.metric], dict, lambda delta, tuning: tuning.measured(delta, tuning.valid))
