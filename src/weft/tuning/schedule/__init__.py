"""Schedules: the factor on the learning rate as a pure function of the step.

A schedule is a function `(step, total, cfg) -> factor` for step 0 to total - 1, registered as a method of kind
"schedule". Most are a shape on [0, 1) after a warmup, which is `decay` with one line of mathematics. All of these are laid out over the
whole budget and reach their end when it does, whatever it is.

With batches that grow (`adadagrad`) a step counts as many times as it takes batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

Shape = Literal["linear", "cosine", "sqrt", "exponential"]


class Warmup(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of a schedule that rises to its peak and then only falls."""

    warmup: Annotated[float, msgspec.Meta(description="share of all steps in which the rate rises to its peak", ge=0, lt=1)] = 0.06
    end: Annotated[float, msgspec.Meta(description="factor that the rate falls towards", ge=0, le=1)] = 0.0


def decay(step: int, total: int, cfg: Warmup, shape: Callable[[float], float]) -> float:
    """A linear rise over the first `warmup` of the steps, then `end + (1 - end) shape(z)`, z from 0 up to (not including) 1.

    `shape` falls from 1 at z = 0 to 0 at z = 1.
    """
    warm = round(cfg.warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    return cfg.end + (1 - cfg.end) * shape((step - warm) / max(1, total - warm))


def fall(shape: Shape, z: float, start: float, end: float) -> float:
    """A factor on its way from `start` (z = 0) to `end` (z = 1).

    linear       straight
    cosine       half a cosine wave
    sqrt         1 - sqrt(z): steep at first (Haegele et al. 2024, arXiv 2405.18392)
    exponential  the same share at every step; to a thousandth of `start` where `end` is zero
    """
    if shape == "exponential":
        return float(start * (max(end, start / 1000) / start) ** z)
    left = {"linear": 1 - z, "cosine": (1 + math.cos(math.pi * z)) / 2, "sqrt": 1 - math.sqrt(z)}[shape]
    return end + (start - end) * left
