"""mola: low-rank experts beside each matrix, of which a router picks some for every token; more of them in higher layers.

    y' = W x + (alpha / rank) sum_e p_e B_e A_e x,    p = softmax of the top_k largest of G x, zero for the others

`experts` says how many each matrix has, from the lowest layers to the highest: with (2, 4, 6, 8) those of the first quarter of the layers
have 2, those of the last 8. Whatever is outside the layers counts as the highest. The router G and A start uniform, B zero: the base at the
start. With one expert it is LoRA. `balance` times the mean of all routers' unevenness is added to the loss, E sum_e f_e p_e over a router's E
experts: f_e the share of choices that fall on expert e, p_e its mean softmax; padding does not count.

Rank, alpha, dropout, top-k and experts are those of the paper's code, the weight of the balance is Mixtral's (there the term is off unless
asked for). As there, dropout is before A and the router sees the whole input. The change of a token depends on the token, so nothing can be
folded; it is attached.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch

from ...delta import Builder
from ...engine.loop import Batch, Run
from ...errors import UsageError
from ...methods import method
from ...ops import mixture
from . import Job, Space
from ._beside import Linear, linears
from ._matrices import MatricesConfig


class MoLAConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of MoLA."""

    experts: Annotated[tuple[int, ...], msgspec.Meta(description="experts of a matrix, for equal parts of the layers from low to high")] = (2, 4, 6, 8)
    top_k: Annotated[int, msgspec.Meta(description="experts that a token uses", ge=1)] = 2
    rank: Annotated[int, msgspec.Meta(description="columns of each B, rows of each A", ge=1)] = 8
    alpha: Annotated[float, msgspec.Meta(description="the products are scaled by alpha / rank", gt=0)] = 16.0
    dropout: Annotated[float, msgspec.Meta(description="share of the products' inputs that are dropped while training", ge=0, lt=1)] = 0.05
    balance: Annotated[float, msgspec.Meta(description="weight of the term that keeps experts evenly used", ge=0)] = 0.001


@method(
    "space",
    config=MoLAConfig,
    paper="Gao et al., 2024, arXiv:2402.08562",
    formula="y' = W x + (alpha / rank) sum_e p_e B_e A_e x, p = softmax(top-k(G x))",
)
class MoLA(Space):
    """Mixtures of low-rank experts, with more experts in higher layers."""

    def __init__(self, cfg: MoLAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        if not cfg.experts or min(cfg.experts) < 1:
            raise UsageError(f"there must be one expert at least everywhere, got {list(cfg.experts)}", hint="-p experts=2,4,6,8")

    def build(self, build: Builder) -> None:
        for module in linears(self.job, self.cfg.targets, self.cfg.exclude):
            experts = self._experts(module)
            fields = mixture.OP.init(module.shape, self.job.gen, rank=self.cfg.rank, experts=experts)
            build.put(module.target, "mixture", fields, scale=self.cfg.alpha / self.cfg.rank, top_k=min(self.cfg.top_k, experts))

    def _experts(self, module: Linear) -> int:
        groups = len(self.cfg.experts)
        return self.cfg.experts[-1 if module.layer is None else module.layer * groups // module.layers]

    def start(self, run: Run) -> None:
        self.job.attached[1].dropout = self.cfg.dropout

    def loss(self, run: Run, batch: Batch) -> torch.Tensor | None:
        terms = self.job.attached[1].losses
        return self.cfg.balance * torch.stack(terms).mean() if self.cfg.balance and terms else None
