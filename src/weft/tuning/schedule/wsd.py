"""wsd: warmup, stable, decay. The peak rate for most of the run, and a short fall at its end.

Hu et al. 2024 (MiniCPM), arXiv 2404.06395: a run can be taken further from any point of the stable phase, and a tenth of the steps is enough for the
fall. `decay` = 0 leaves it out, to be taken later. The shape of the fall is linear here; MiniCPM's is exponential, and 1 - sqrt did best in
Haegele et al. 2024, arXiv 2405.18392.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ...methods import method
from . import Warmup, decay, fall


class WSDConfig(Warmup, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of warmup-stable-decay."""

    decay: Annotated[float, msgspec.Meta(description="share of all steps, the last, in which the rate falls", ge=0, le=1)] = 0.1
    shape: Annotated[Literal["linear", "cosine", "sqrt", "exponential"], msgspec.Meta(description="how it falls")] = "linear"


@method("schedule", config=WSDConfig, paper="Hu et al., 2024, arXiv:2404.06395", formula="f = 1, and at the end a fall from 1 to end")
def wsd(step: int, total: int, cfg: WSDConfig) -> float:
    """Warmup, the peak rate, and a short decay at the end."""
    falling = round(cfg.decay * total)
    rise = decay(step, total, Warmup(warmup=cfg.warmup, end=1.0), lambda z: 1.0)
    left = total - step  # steps to go, this one included
    return min(rise, fall(cfg.shape, (falling - left) / falling, 1.0, cfg.end)) if left < falling else rise
