"""cosine: half a cosine wave down to the end factor."""

from __future__ import annotations

import math

from ...methods import method
from . import Warmup, decay


class CosineConfig(Warmup, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of the cosine schedule."""


@method("schedule", config=CosineConfig, paper="Loshchilov and Hutter, 2016, arXiv:1608.03983", formula="f(z) = (1 + cos(pi z)) / 2")
def cosine(step: int, total: int, cfg: CosineConfig) -> float:
    """Warmup, then half a cosine wave down, without restarts."""
    return decay(step, total, cfg, lambda z: (1 + math.cos(math.pi * z)) / 2)
