"""memcontrol: which modules to tune, so that a model learns from its rows without learning them by heart.

    min over masks m in {0, 1}^k of ( quality(tuned(m)), memorisation(tuned(m)) )       outer: the study; inner: a tuning run of the modules in m

quality        nll a token (or a row's label) on held-out rows
memorisation   gap: nll of held-out rows - nll of the rows that were tuned on; or extraction: the share of these rows that greedy
               decoding would write whole, given what comes before each token

    --space FILE.yaml       modules: [attention.query, attention.value, mlp.up, mlp.down]      any tokens that `targets` takes

The modules are the roles of the base's linear weights, each in all layers, if nothing else is said. The result is the set of masks that
no other is better than in both.

Not followed: the paper's models are diffusion models, its quality the FID and its memorisation the distance of generated images to their
nearest training image (or those that an extraction attack finds); it tunes the mask's biases, norms and attention (DiffFit, SV-Diff,
attention), where any space can be had here (-p method=lora).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from ..methods import method
from ._method import Report, Task
from ._study import Objective, Params
from ._study import choices as distributions
from ._trials import TrialsConfig, Tuning, searched


class MemControlConfig(TrialsConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of MemControl."""

    metric: Annotated[str, msgspec.Meta(description="the quality, as `weft eval` measures it; empty: nll")] = "nll"
    memorisation: Annotated[Literal["gap", "extraction"], msgspec.Meta(description="nll held out - nll tuned on, or the share of rows written whole")] = "gap"
    rows: Annotated[int, msgspec.Meta(description="at most so many of the rows that were tuned on are looked at for it", ge=1)] = 500


@method(
    "search",
    config=MemControlConfig,
    paper="Dutt et al., 2024, arXiv:2405.19458",
    formula="min over masks m of (quality, memorisation) of the model tuned in m",
)
def memcontrol(task: Task, cfg: MemControlConfig) -> Report:
    """Which modules to tune: a good model for every amount of training rows known by heart."""
    base, rows = task.tuned("memcontrol")
    tuning = Tuning(task, base, rows, cfg)
    modules = [str(each) for each in task.space.get("modules") or _modules(tuning)]

    def options(params: Params) -> dict[str, Any] | None:
        targets = [each for each in modules if params[each]]
        return {"space.targets": targets} if targets else None

    def measure(delta: Any, tuning: Tuning) -> dict[str, float]:
        figures = tuning.measured(delta, tuning.valid)
        seen = tuning.measured(delta, tuning.train[: cfg.rows])
        known = figures["nll"] - seen["nll"] if cfg.memorisation == "gap" else seen.get("teacher_forced_exact", seen.get("accuracy", 0.0))
        return {**figures, cfg.memorisation: known}

    choices = distributions({each: [True, False] for each in modules})
    return searched(tuning, "memcontrol", choices, [tuning.metric, Objective(cfg.memorisation)], options, measure)


def _modules(tuning: Tuning) -> list[str]:
    from ..sites import sites

    return sorted({site.role for site in sites(tuning.base.model(), "all-linear")})
