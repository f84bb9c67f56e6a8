"""sara: the smallest weights, which do little, are put to use.

    w'.flat[index] = w.flat[index] + values        index: the entries with the smallest |w|

Trained with nuclear ||V||_* added to the loss, V being the matrix of a part's values, zero elsewhere: each step takes one part, drawn at
random. After the share `reselect` of the run, only entries that are still small, |w + values| at most the largest |w| that was chosen, are
trained on; the others stay where they have got to, and what the optimizer knows of them is dropped. Hu et al. 2024, arXiv 2409.06633.

`threshold` chooses |w| < threshold instead of a share (the code's default for Stable Diffusion is 2e-3); small means that then.
Gradients and moments exist for the values only; the nuclear norm makes one dense matrix at a time.

Not followed: the code's penalty is on the weights at the chosen entries, w + values; as in the paper it is on what is learnt here. Its
learning rate falls with the threshold, exp(-350 threshold) 1e-3; here it is given.

Size: 12 bytes an entry (its position and its value).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
import torch
from torch import nn

from ...delta import Builder
from ...engine.loop import Batch, Run
from ...errors import UsageError
from ...methods import method
from ...ops import Generator
from ...ops.op import flat_shape
from .._positions import Budget, Positions, carry, smallest
from . import Job, Part
from ._masked import Masked


class SaRAConfig(Budget, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of SaRA."""

    density: Annotated[float, msgspec.Meta(description="share of the targets' entries that are trained", gt=0, le=1)] = 0.1
    threshold: Annotated[float, msgspec.Meta(description="train entries that are smaller than this, instead of a share; 0: the share", ge=0)] = 0.0
    nuclear: Annotated[float, msgspec.Meta(description="strength of the nuclear norm", ge=0)] = 5e-4
    reselect: Annotated[float, msgspec.Meta(description="share of the run after which only entries that are still small are trained; 1: never", gt=0, le=1)] = (
        0.5
    )


@method("space", config=SaRAConfig, paper="Hu et al., 2024, arXiv:2409.06633", formula="w' = w + values where |w| is smallest; loss + nuclear ||values||_*")
class SaRA(Masked):
    """Tunes the smallest weights, with a nuclear norm that keeps what they learn of low rank."""

    def __init__(self, cfg: SaRAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        self.small: list[torch.Tensor] = []
        """The base's weights at the positions of each part."""
        self.asleep: dict[int, torch.Tensor] = {}

    def choose(self, parts: Sequence[Part]) -> list[Positions]:
        weights = [self.job.weight(part) for part in parts]
        if not self.cfg.threshold:
            return smallest(weights, self.cfg)
        found = [np.flatnonzero(weight.reshape(-1).abs().numpy() < self.cfg.threshold) for weight in weights]
        if not any(index.size for index in found):
            raise UsageError(f"no entry of the targets is smaller than {self.cfg.threshold}", hint="a larger threshold, or density=0.1")
        return found

    def build(self, build: Builder) -> None:
        super().build(build)
        self.small = [self.job.weight(part).reshape(-1)[torch.from_numpy(index)] for part, index in zip(self.parts, self.positions, strict=True)]

    def start(self, run: Run) -> None:
        super().start(run)
        self.small = [weight.to(run.device) for weight in self.small]

    def state(self) -> dict[str, torch.Tensor]:
        return {**super().state(), **{f"asleep/{number}": mask for number, mask in self.asleep.items()}}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.asleep = {int(name.removeprefix("asleep/")): mask for name, mask in state.items() if name.startswith("asleep/")}

    def loss(self, run: Run, batch: Batch) -> torch.Tensor | None:
        parts = list(self.trained())
        number, _, values = parts[int(Generator(run.key).permutation(len(parts))[0])]
        rows, columns = flat_shape(self.parts[number].shape)
        if not self.cfg.nuclear or columns == 1 or not bool(values.any()):
            return None
        place = torch.from_numpy(self.positions[number]).to(values.device)
        whole = values.new_zeros(rows * columns).index_copy(0, place, values.float()).reshape(rows, columns)
        norm: torch.Tensor = torch.linalg.svdvals(whole).sum()
        return self.cfg.nuclear * norm

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        for number, _, values in self.trained():
            if number in self.asleep and values.grad is not None:
                values.grad[self.asleep[number]] = 0

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        if not self.asleep and self.cfg.reselect < 1 and run.place >= self.cfg.reselect * run.total:
            self._reselect(run)

    def _reselect(self, run: Run) -> None:
        whole = max(float(weight.abs().max()) for weight in self.small if weight.numel())
        for number, _, values in self.trained():
            small = self.small[number]
            limit = self.cfg.threshold or (whole if self.cfg.across == "model" else float(small.abs().max()))
            now = (small + values.float()).abs()
            self.asleep[number] = now >= limit if self.cfg.threshold else now > limit
            self._forget(run, values, self.asleep[number])

    def _forget(self, run: Run, values: nn.Parameter, mask: torch.Tensor) -> None:
        carry(run.optimizer, values, torch.where(mask, -1, torch.arange(mask.numel(), device=mask.device)))
