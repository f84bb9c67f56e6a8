"""l2: stay close to the base.

    penalty = strength / 2  sum over changed tensors of ||w' - w||^2  +  added / 2  sum over new tensors of ||w'||^2

w' - w is what the delta does to the stored weights, whatever the space: for LoRA s B A, measured as s^2 tr((B^T B)(A A^T)) without
forming it. The sum is over what is trained, so tensors that are not changed cost nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import torch

from ...engine.loop import Batch, Run
from ...methods import method
from . import Guard

if TYPE_CHECKING:
    from ..space import Job, Space


class L2Config(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of the L2 guard."""

    strength: Annotated[float, msgspec.Meta(description="pull towards the base's weights", ge=0)] = 0.1
    added: Annotated[float, msgspec.Meta(description="pull of new tensors (a head) towards zero", ge=0)] = 0.01


@method(
    "guard",
    config=L2Config,
    paper="Li, Grandvalet and Davoine, 2018, arXiv:1802.01483",
    formula="strength/2 ||w' - w||^2 + added/2 ||w'_new||^2",
)
class L2(Guard):
    """L2-SP: the squared distance from the base is added to the loss."""

    def __init__(self, cfg: L2Config, job: Job, space: Space) -> None:
        super().__init__(cfg, job, space)
        self.cfg = cfg

    def loss(self, run: Run, batch: Batch) -> torch.Tensor | None:
        terms = [value * ((self.cfg.added if new else self.cfg.strength) / 2) for _, value, new in self.space.squares()]
        return torch.stack(terms).sum()
