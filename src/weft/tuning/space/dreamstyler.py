"""dreamstyler: pivotal parameters. What a short trial moves most in each matrix is what the concept needs.

All entries of the targets are trained for `trial` steps; in each tensor the `density` share that moved most is kept, the weights go
back to the base, and only these entries are trained: w'.flat[index] = w.flat[index] + values. JEN-1 DreamStyler, Chen et al. 2024,
arXiv 2406.12292.

It differs from `lt-sft` in what it takes from the trial: the same share of every tensor instead of one threshold for the model, a short
trial, and no pull towards zero. That paper tunes a music model; its second part, several new tokens for each concept so that concepts
do not mix, is a matter of prompts, and not done here.

Size: 12 bytes an entry (its position and its value).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from ...methods import method
from .._positions import Budget, Positions, largest, movements
from . import Job, Part
from ._masked import Masked


class DreamStylerConfig(Budget, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of pivotal parameters tuning."""

    density: Annotated[float, msgspec.Meta(description="share of the targets' entries that are trained", gt=0, le=1)] = 0.1
    across: Annotated[Literal["model", "tensor"], msgspec.Meta(description="one budget for all targets, or the same share of each")] = "tensor"
    trial: Annotated[int, msgspec.Meta(description="steps of full tuning that choose the entries; 0: as many as the run has", ge=0)] = 20


@method(
    "space",
    config=DreamStylerConfig,
    paper="Chen et al., 2024, arXiv:2406.12292",
    formula="w' = w + values at the entries of each tensor that a trial moves most",
)
class DreamStyler(Masked):
    """Tunes the share of each tensor that a short trial moves most."""

    lr = 5e-5

    def __init__(self, cfg: DreamStylerConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def choose(self, parts: Sequence[Part]) -> list[Positions]:
        return largest(movements(self.job, parts, self.cfg.trial), self.cfg)
