"""power-scheduler: the rate falls as a power of the tokens seen; how long the run will be does not enter.

Shen et al. 2024, arXiv 2408.13359. With n the tokens seen, beta the batch size (sequences) and a, b fitted over many small runs:

    rate(n) = min(peak, beta a n^b)

At a constant number of tokens a step that is the peak for the first `hold` steps and peak ((step + 1) / hold)^b after them, which is what the factor is;
`hold` below gives the steps from the paper's numbers. So the schedule is the same for every length of run, and a run can be stopped or
taken on anywhere. Only the optional `cooldown` at the end looks at the total.

Not followed: the rate of muP, which makes a and b hold for all model sizes: here the peak is the optimizer's rate, and what was fitted for pretraining
need not fit tuning. Warmup is in steps for the same reason: a share of the total would make the schedule depend on it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ...methods import method
from . import fall


class PowerSchedulerConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of the power scheduler."""

    warmup_steps: Annotated[int, msgspec.Meta(description="steps in which the rate rises to its peak", ge=0)] = 10
    hold: Annotated[float, msgspec.Meta(description="step until which the peak is allowed", gt=0)] = 100.0
    exponent: Annotated[float, msgspec.Meta(description="power of the step with which the rate falls after that", lt=0)] = -0.51
    cooldown: Annotated[float, msgspec.Meta(description="share of all steps, the last, in which it falls to the end factor", ge=0, le=1)] = 0.0
    shape: Annotated[Literal["linear", "cosine", "sqrt", "exponential"], msgspec.Meta(description="how it falls then")] = "linear"
    end: Annotated[float, msgspec.Meta(description="factor that it falls towards then", ge=0, le=1)] = 0.0


@method("schedule", config=PowerSchedulerConfig, paper="Shen et al., 2024, arXiv:2408.13359", formula="f = min(1, ((step + 1) / hold)^b)")
def power_scheduler(step: int, total: int, cfg: PowerSchedulerConfig) -> float:
    """The peak for a while, then a power law in the steps, whatever their number will be."""
    if step < cfg.warmup_steps:
        return power(step, cfg) * (step + 1) / (cfg.warmup_steps + 1)
    falling = round(cfg.cooldown * total)
    left = total - step
    if left >= falling:
        return power(step, cfg)
    start = power(total - falling, cfg)
    return fall(cfg.shape, (falling - left) / falling, start, min(cfg.end, start))


def power(step: int, cfg: PowerSchedulerConfig) -> float:
    """The law itself."""
    return float(min(1.0, ((step + 1) / cfg.hold) ** cfg.exponent))


def hold(peak: float, batch: float, tokens: float, amplitude: float = 4.6, exponent: float = -0.51) -> float:
    """The step at which batch amplitude n^exponent comes down to `peak`, with `batch` sequences and `tokens` tokens a step."""
    return float((peak / (batch * amplitude)) ** (1 / exponent) / tokens)
