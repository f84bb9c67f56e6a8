"""lt-sft: the entries that full tuning moves most are tuned again from the start, alone.

1. All entries of the targets are trained for `trial` steps (0: as many as the run has), w0 -> w1.
2. Those with the largest |w1 - w0| are kept, as many as the budget says; all weights go back to w0.
3. The chosen ones are trained, with lambda mean |values| added to the loss: w'.flat[index] = w.flat[index] + values.

Ansell et al. 2021, arXiv 2110.07560. Two such deltas, of a language and of a task, are composed by adding them (`first + second`): their
ops add up in any order, and where both change an entry the values are summed.

The trial is made with the run's own optimizer, schedule, data and learning rate, in float32 whatever the dtype of the run, and needs the
memory of full tuning. It leaves nothing behind but the positions, which are part of the state: a run that is resumed makes no trial.

Not followed: the paper repeats 1 to 3 in rounds with a part of the budget each; here there is one round, which is what its results are
from. Its L1 term is divided by the number of all weights of the model, here by that of the trained ones.

Size: 12 bytes an entry (its position and its value).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import torch

from ...engine.loop import Batch, Run
from ...methods import method
from .._positions import Budget, Positions, largest, movements
from . import Job, Part
from ._masked import Masked


class LTSFTConfig(Budget, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of LT-SFT."""

    trial: Annotated[int, msgspec.Meta(description="steps of full tuning that choose the entries; 0: as many as the run has", ge=0)] = 0
    l1: Annotated[float, msgspec.Meta(description="pull of the values towards zero: lambda mean |values|", ge=0)] = 0.1


@method("space", config=LTSFTConfig, paper="Ansell et al., 2021, arXiv:2110.07560", formula="w' = w + values at the entries that full tuning moves most")
class LTSFT(Masked):
    """Tunes the entries that full tuning moves most, from the start."""

    lr = 5e-5

    def __init__(self, cfg: LTSFTConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def choose(self, parts: Sequence[Part]) -> list[Positions]:
        return largest(movements(self.job, parts, self.cfg.trial), self.cfg)

    def loss(self, run: Run, batch: Batch) -> torch.Tensor | None:
        if not self.cfg.l1:
            return None
        values = [value for _, _, value in self.trained()]
        total = torch.stack([value.abs().sum() for value in values]).sum()
        return total * (self.cfg.l1 / sum(value.numel() for value in values))
