"""kasa: the smallest singular components of each matrix give way to learnt ones.

    w = U diag(s) V^T;  w' = w - U_0 diag(s_0) V_0^T + (alpha / rank) P diag(lam) Q        U_0, s_0, V_0: the `rank` smallest components

P starts zero, lam normal and Q uniform (as A in LoRA), so the start is w without its `rank` smallest components: not w itself, which no
method of this kind can avoid. The loss gets beta ||lam||^2 + gamma (||P^T P - I|| + ||Q Q^T - I||), summed over the matrices; beta and
gamma are those of the paper's GLUE runs.

The base stays what it is: what is taken out of it is in the delta (rows U_0, columns V_0), so it is taken back exactly. In HF PEFT the base
itself is truncated, rounded to its dtype.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
import torch

from ...delta import Builder
from ...engine.loop import Batch, Run
from ...errors import UsageError
from ...methods import method
from .._ranks import Group, components
from . import Job, Space
from ._matrices import MatricesConfig
from .adalora import departure


class KaSAConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of KaSA."""

    rank: Annotated[int, msgspec.Meta(description="components taken out of each matrix, and put in", ge=1)] = 8
    alpha: Annotated[float, msgspec.Meta(description="what is put in is scaled by alpha / rank", gt=0)] = 16.0
    small: Annotated[float, msgspec.Meta(description="beta, the weight of the penalty on lam", ge=0)] = 1e-4
    orthogonal: Annotated[float, msgspec.Meta(description="gamma, the weight of the penalty that keeps P and Q near orthogonal", ge=0)] = 1e-3


@method(
    "space",
    config=KaSAConfig,
    paper="Wang et al., 2024, arXiv:2412.06071",
    formula="w' = w - U_0 diag(s_0) V_0^T + (alpha / rank) P diag(lam) Q",
)
class KaSA(Space):
    """Takes the least singular components out of each matrix and trains others in their place."""

    def __init__(self, cfg: KaSAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        self._groups: list[Group] = []

    def build(self, build: Builder) -> None:
        rank, scale = self.cfg.rank, self.cfg.alpha / self.cfg.rank
        for part in self.job.matrices(self.cfg.targets, self.cfg.exclude):
            u, s, v = self.job.singular(part)
            if rank >= len(s):
                raise UsageError(f"{rank} components cannot be taken out of {part.target}, which has {len(s)}", hint="a smaller rank")
            fields = {
                "P": np.zeros((u.shape[0], rank), np.float32),
                "lam": self.job.gen.normal((rank,)),
                "Q": self.job.gen.uniform((rank, v.shape[1]), v.shape[1] ** -0.5),
                "P0": u[:, -rank:].contiguous(),
                "lam0": s[-rank:] / scale,
                "Q0": v[-rank:].contiguous(),
            }
            part.put(build, "svd", fields, scale=scale)

    def start(self, run: Run) -> None:
        self._groups = components(self.job.attached[0])

    def loss(self, run: Run, batch: Batch) -> torch.Tensor | None:
        terms = []
        for group in self._groups:
            p, lam, q = (run.tensors[group.keys[field]] for field in ("P", "lam", "Q"))
            terms.append(self.cfg.small * lam.square().sum() + self.cfg.orthogonal * (departure(p, 1) + departure(q, 0)))
        return torch.stack(terms).sum()
