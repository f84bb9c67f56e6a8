"""linear: straight down to the end factor."""

from __future__ import annotations

from ...methods import method
from . import Warmup, decay


class LinearConfig(Warmup, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of the linear schedule."""


@method("schedule", config=LinearConfig, formula="f(z) = 1 - z")
def linear(step: int, total: int, cfg: LinearConfig) -> float:
    """Warmup, then a straight line down."""
    return decay(step, total, cfg, lambda z: 1 - z)
