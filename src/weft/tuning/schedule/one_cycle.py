"""one-cycle: up from a small rate to the peak and down to next to nothing, in two half cosine waves.

Smith and Topin 2017, arXiv 1708.07120, in the form of torch's OneCycleLR with its defaults: the first step at 1/25 of the peak, the peak after
30 % of the steps, the last step at 1/250,000. Not followed: momentum, which the paper lets fall while the rate rises.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from ...methods import method
from . import fall


class OneCycleConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of the one-cycle schedule."""

    rise: Annotated[float, msgspec.Meta(description="share of all steps in which the rate rises", gt=0, lt=1)] = 0.3
    start: Annotated[float, msgspec.Meta(description="factor of the first step", gt=0, le=1)] = 0.04
    end: Annotated[float, msgspec.Meta(description="factor of the last step", ge=0, le=1)] = 4e-6


@method(
    "schedule",
    config=OneCycleConfig,
    paper="Smith and Topin, 2017, arXiv:1708.07120",
    formula="f = start to 1 to end, by half cosine waves",
)
def one_cycle(step: int, total: int, cfg: OneCycleConfig) -> float:
    """One rise and one longer fall, both cosine."""
    top = cfg.rise * total - 1
    if step <= top:
        return fall("cosine", step / top, cfg.start, 1.0) if top > 0 else 1.0
    last = total - 1
    return fall("cosine", (step - max(top, 0.0)) / max(last - max(top, 0.0), 1e-9), 1.0, cfg.end) if last > 0 else 1.0
