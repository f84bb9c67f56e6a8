"""s2-lora: one pair of factors for all matrices of a shape, and sparse coefficients for each.

    w_l' = w_l + (alpha / rank) B diag(g_l) A        B, A of all matrices with the same shape; g_l of one

A and B start normal (0.02) and all g zero: w' = w at the start. Trained are (rows + columns) rank numbers for each shape and `rank` for each matrix.

g is sparse by a soft threshold after each step, g <- sign(g) max(|g| - sparsity lr, 0): the proximal step of the paper's l1 penalty, which
makes entries that are not needed zero and not only small. With AdamW an entry of g moves by about lr a step where its gradient keeps its
sign, so `sparsity` is how much of that it must win to live.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch

from ...delta import Builder
from ...engine.loop import Run
from ...methods import method
from ...ops import Ref, svd
from ...ops.op import flat_shape
from . import Job, Space
from ._matrices import MatricesConfig


class S2LoRAConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of S2-LoRA."""

    rank: Annotated[int, msgspec.Meta(description="columns of B, rows of A, coefficients of each matrix", ge=1)] = 32
    alpha: Annotated[float, msgspec.Meta(description="the change is scaled by alpha / rank", gt=0)] = 64.0
    sparsity: Annotated[float, msgspec.Meta(description="how far each coefficient goes back at a step, over the learning rate", ge=0)] = 0.1


@method("space", config=S2LoRAConfig, paper="Liu, Qin, Peng and Lee, 2023, arXiv:2309.11756", formula="w_l' = w_l + (alpha / rank) B diag(g_l) A")
class S2LoRA(Space):
    """Sparsely shared LoRA: shared factors, and each matrix's own sparse coefficients."""

    def __init__(self, cfg: S2LoRAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        self._own: list[str] = []

    def build(self, build: Builder) -> None:
        shared: dict[tuple[int, int], dict[str, Ref]] = {}
        for part in self.job.matrices(self.cfg.targets, self.cfg.exclude):
            shape = flat_shape(part.shape)
            fields = svd.OP.init(part.shape, self.job.gen, rank=self.cfg.rank)
            if shape not in shared:
                shared[shape] = {field: build.share(f"{name}.{shape[0]}x{shape[1]}", fields[field]) for field, name in (("P", "B"), ("Q", "A"))}
            part.put(build, "svd", {**shared[shape], "lam": fields["lam"]}, scale=self.cfg.alpha / self.cfg.rank)

    def start(self, run: Run) -> None:
        delta, _ = self.job.attached
        self._own = [op.t["lam"].key for entry in delta.entries.values() for op in entry.ops if op.op == "svd"]

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        back = self.cfg.sparsity * run.optimizer.param_groups[0]["lr"]
        for key in self._own:
            g = run.tensors[key]
            g.copy_(torch.nn.functional.softshrink(g, back))
