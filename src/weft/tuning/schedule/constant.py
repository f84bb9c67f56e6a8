"""constant: the peak rate to the end, after a warmup."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ...methods import method
from . import Warmup, decay


class ConstantConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of the constant schedule."""

    warmup: Annotated[float, msgspec.Meta(description="share of all steps in which the rate rises to its peak", ge=0, lt=1)] = 0.0


@method("schedule", config=ConstantConfig, formula="f = 1")
def constant(step: int, total: int, cfg: ConstantConfig) -> float:
    """The same learning rate throughout, after an optional warmup."""
    return decay(step, total, Warmup(warmup=cfg.warmup, end=1.0), lambda z: 1.0)
