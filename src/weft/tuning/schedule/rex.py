"""rex: stays high for long and falls steeply at the end; made for any budget of steps."""

from __future__ import annotations

from ...methods import method
from . import Warmup, decay


class RexConfig(Warmup, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of the REX schedule."""


@method("schedule", config=RexConfig, paper="Chen, Wolfe and Kyrillidis, 2021, arXiv:2107.04197", formula="f(z) = (1 - z) / (1/2 + (1 - z)/2)")
def rex(step: int, total: int, cfg: RexConfig) -> float:
    """Warmup, then a reflected exponential: above the straight line all the way down."""
    return decay(step, total, cfg, lambda z: (1 - z) / (0.5 + (1 - z) / 2))
