"""adalora: a low-rank change in the form of a singular value decomposition, whose rank goes to where it matters.

    w' = w + (alpha / rank) P diag(lam) Q        P, Q normal (0.02), lam zero: w' = w at the start

All matrices start with `rank` components. After a warm-up the number that may live over all of them falls along a cubic curve to
`target_rank` for each matrix on average; every `interval` steps the least important ones have their lam set to zero. Importance is |w
dL/dw| of lam, and its mean over the column of P and the row of Q, each smoothed and times its uncertainty. A component that was set to zero
may come back until the last `settle` of the run, in which the choice is final. P and Q are kept near orthogonal by `orthogonal` times the
mean of ||P^T P - I|| and ||Q Q^T - I||. The optimizer keeps the moments of components that are set to zero. What is written has only the
components that are left.

As in the paper's code, the w of the importance is that after the step and the gradient that before it. Not as there: the budget is met
exactly where scores are equal (the first ones stay), steps are shares of the run, the gradients are those before clipping, and the scale
has no 1e-5 added to the rank.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch

from ...delta import Builder, Delta
from ...engine.loop import Batch, Run
from ...methods import method
from ...ops import svd
from .._ranks import Group, Importance, budget, compacted, components, kept, triplet_scores
from . import Job, Space
from ._matrices import MatricesConfig


class AdaLoRAConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of AdaLoRA."""

    rank: Annotated[int, msgspec.Meta(description="components of each matrix at the start", ge=1)] = 12
    target_rank: Annotated[float, msgspec.Meta(description="components of each matrix at the end, on average", gt=0)] = 8.0
    alpha: Annotated[float, msgspec.Meta(description="the change is scaled by alpha / rank", gt=0)] = 32.0
    begin: Annotated[float, msgspec.Meta(description="share of the run before any is taken away", ge=0, lt=1)] = 0.1
    settle: Annotated[float, msgspec.Meta(description="share of the run, at its end, with a final choice", gt=0, lt=1)] = 0.3
    interval: Annotated[int, msgspec.Meta(description="steps from one choice to the next", ge=1)] = 10
    smoothing: Annotated[float, msgspec.Meta(description="smoothing of the importance", ge=0, lt=1)] = 0.85
    doubt: Annotated[float, msgspec.Meta(description="smoothing of its uncertainty", ge=0, lt=1)] = 0.85
    orthogonal: Annotated[float, msgspec.Meta(description="weight of the penalty that keeps P and Q near orthogonal", ge=0)] = 0.5


@method("space", config=AdaLoRAConfig, paper="Zhang et al., 2023, arXiv:2303.10512", formula="w' = w + (alpha / rank) P diag(lam) Q")
class AdaLoRA(Space):
    """Low-rank adaptation under one budget of components for all matrices, which the important ones keep."""

    def __init__(self, cfg: AdaLoRAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        self.importance = Importance(cfg.smoothing, cfg.doubt)
        self.final: dict[str, torch.Tensor] = {}
        self._groups: list[Group] = []
        self._gradients: dict[str, torch.Tensor] = {}

    def build(self, build: Builder) -> None:
        for part in self.job.matrices(self.cfg.targets, self.cfg.exclude):
            fields = svd.OP.init(part.shape, self.job.gen, rank=self.cfg.rank)
            part.put(build, "svd", fields, scale=self.cfg.alpha / self.cfg.rank)

    def start(self, run: Run) -> None:
        self._groups = components(self.job.attached[0])

    def loss(self, run: Run, batch: Batch) -> torch.Tensor | None:
        if not self.cfg.orthogonal:
            return None
        return (
            self.cfg.orthogonal
            * torch.stack([departure(run.tensors[group.keys[field]], axis) for group in self._groups for field, axis in (("P", 1), ("Q", 0))]).mean()
        )

    def gradients(self, run: Run) -> None:
        if not self.final:
            for group in self._groups:
                for key in group.keys.values():
                    gradient = run.tensors[key].grad
                    self._gradients[key] = torch.zeros_like(run.tensors[key]) if gradient is None else gradient.clone()

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        last = run.total - round(self.cfg.settle * run.total)
        if not self.final:
            if run.place < last or not self.importance:
                for key, gradient in self._gradients.items():
                    self.importance.add(key, (run.tensors[key] * gradient).abs())
            if self.importance and (run.place >= last or (run.step % self.cfg.interval == 0 and run.place > self._first(run))):
                self._choose(run, last)
        for name, mask in self.final.items():
            run.tensors[f"{name}.lam"].mul_(mask)

    def _first(self, run: Run) -> int:
        return round(self.cfg.begin * run.total)

    def _choose(self, run: Run, last: int) -> None:
        start = sum(group.rank for group in self._groups)
        goal = min(start, round(self.cfg.target_rank * len(self._groups)))
        masks = kept({group.name: triplet_scores(group, self.importance) for group in self._groups}, budget(run.place, start, goal, self._first(run), last, 3))
        for group in self._groups:
            run.tensors[group.keys["lam"]].mul_(masks[group.name])
        if run.place >= last:
            self.final = masks
            self.importance.clear()

    def finish(self) -> Delta:
        return compacted(super().finish(), self.final)

    def state(self) -> dict[str, torch.Tensor]:
        return {**self.importance.state(), **{f"final/{name}": mask for name, mask in self.final.items()}}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.importance.load(state)
        self.final = {name.removeprefix("final/"): mask for name, mask in state.items() if name.startswith("final/")}


def departure(value: torch.Tensor, axis: int) -> torch.Tensor:
    """How far the vectors that lie along `axis` are from orthogonal of length one: ||V^T V - I||, of Frobenius."""
    product = value @ value.T if axis == 0 else value.T @ value
    away: torch.Tensor = torch.linalg.matrix_norm(product - torch.eye(len(product), device=value.device, dtype=value.dtype))
    return away
