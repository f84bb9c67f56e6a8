"""budgeted: a schedule of steps down that is squeezed into whatever budget there is.

Li, Yumer and Ramanan 2019, arXiv 1905.04753: a schedule is a function of the share of the budget that is used up, so that a short run goes through all of it
instead of the beginning only. This is their conversion of the usual steps (the rate falls by `gamma` at each of `milestones`). Smooth schedules
are converted by being laid out over the run, as `linear`, their best, `cosine` and `rex` are here.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from ...methods import method
from . import Warmup, decay


class BudgetedConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of the budgeted schedule."""

    warmup: Annotated[float, msgspec.Meta(description="share of all steps in which the rate rises to its peak", ge=0, lt=1)] = 0.0
    milestones: Annotated[tuple[float, ...], msgspec.Meta(description="shares of the steps after the warmup at which the rate falls")] = (0.33, 0.67, 0.9)
    gamma: Annotated[float, msgspec.Meta(description="what it is multiplied by", gt=0, lt=1)] = 0.1


@method(
    "schedule",
    config=BudgetedConfig,
    paper="Li, Yumer and Ramanan, 2019, arXiv:1905.04753",
    formula="f(z) = gamma^(number of milestones up to z)",
)
def budgeted(step: int, total: int, cfg: BudgetedConfig) -> float:
    """Steps down at shares of the budget."""
    return decay(step, total, Warmup(warmup=cfg.warmup), lambda z: cfg.gamma ** sum(z >= milestone for milestone in cfg.milestones))
