"""infinite: warm up once, cool down to a rate that holds for as long as one likes, and anneal at the very end.

Ibrahim et al. 2024, arXiv 2403.08763. Because nothing before the annealing depends on an end, tasks can follow each other without warming up
again: all but the last take `anneal` = 0, and all but the first `warmup` = `cooldown` = 0, at the same `hold`. Phases, as shares of all steps:

    warmup     0 to 1, straight
    cooldown   1 to `hold`, by `shape`
    constant   `hold`, for what the others leave
    anneal     `hold` to `end`, exponentially

The paper's shares are of 300 billion tokens; these are for shorter runs.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ...methods import method
from . import Warmup, decay, fall


class InfiniteConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of the infinite schedule."""

    warmup: Annotated[float, msgspec.Meta(description="share of all steps in which the rate rises to its peak", ge=0, lt=1)] = 0.06
    cooldown: Annotated[float, msgspec.Meta(description="share of all steps in which it then falls to what is held", ge=0, lt=1)] = 0.3
    anneal: Annotated[float, msgspec.Meta(description="share of all steps, the last, in which it falls to the end factor", ge=0, lt=1)] = 0.1
    hold: Annotated[float, msgspec.Meta(description="factor that is held in between", gt=0, le=1)] = 0.5
    end: Annotated[float, msgspec.Meta(description="factor that the rate falls towards", ge=0, le=1)] = 0.1
    shape: Annotated[Literal["linear", "cosine", "sqrt", "exponential"], msgspec.Meta(description="how it cools down")] = "cosine"


@method(
    "schedule",
    config=InfiniteConfig,
    paper="Ibrahim et al., 2024, arXiv:2403.08763",
    formula="f = 0 to 1, 1 to hold, hold, hold (end / hold)^z",
)
def infinite(step: int, total: int, cfg: InfiniteConfig) -> float:
    """Warmup, cooldown to a constant rate, and an exponential end."""
    warm, cool, last = round(cfg.warmup * total), round(cfg.cooldown * total), round(cfg.anneal * total)
    left = total - step
    if left < last:
        return fall("exponential", (last - left) / last, cfg.hold, min(cfg.end, cfg.hold))
    if step < warm:
        return decay(step, total, Warmup(warmup=cfg.warmup), lambda z: 1.0)
    return fall(cfg.shape, (step - warm) / cool, 1.0, cfg.hold) if step - warm < cool else cfg.hold
