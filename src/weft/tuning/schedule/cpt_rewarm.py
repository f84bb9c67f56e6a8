"""cpt-rewarm: from where an earlier run ended up to the peak again, and down to where it was.

Gupta et al. 2023, arXiv 2308.04014, and Ibrahim et al. 2024, arXiv 2403.08763: going on with pretraining on new data, the rate is warmed up again from the
end of the last schedule, linearly, and decays by half a cosine wave to a tenth of the peak. The length of the warmup hardly matters; the peak (the
optimizer's rate) trades what is learnt against what is forgotten. `start` and `end` are 0.1, their ratio of lowest to highest rate.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from ...methods import method
from . import Warmup, decay


class CPTRewarmConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of re-warming."""

    warmup: Annotated[float, msgspec.Meta(description="share of all steps in which the rate rises to its peak", ge=0, lt=1)] = 0.01
    start: Annotated[float, msgspec.Meta(description="factor that the rise begins at: where the last run ended", ge=0, le=1)] = 0.1
    end: Annotated[float, msgspec.Meta(description="factor that the rate falls towards", ge=0, le=1)] = 0.1


@method(
    "schedule",
    config=CPTRewarmConfig,
    paper="Gupta et al., 2023, arXiv:2308.04014; Ibrahim et al., 2024, arXiv:2403.08763",
    formula="f = start to 1, straight, then end + (1 - end) (1 + cos(pi z)) / 2",
)
def cpt_rewarm(step: int, total: int, cfg: CPTRewarmConfig) -> float:
    """Re-warm from the last run's end, then a cosine down."""
    factor = decay(step, total, Warmup(warmup=cfg.warmup, end=cfg.end), lambda z: (1 + math.cos(math.pi * z)) / 2)
    return cfg.start + (1 - cfg.start) * factor if step < round(cfg.warmup * total) else factor
