"""emmet: MEMIT's facts with an equality in the place of the least squares.

    dW = R D^-1 K^T (weight C)^-1        D = K^T (weight C)^-1 K + eps I

With eps = 0 each key is mapped to its residual exactly (Gupta, Sajnani and Anumanchipalli 2024, arXiv 2403.14236). The same as MEMIT with the
weight `weight * eps`, so the two differ only in what their options mean.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch

from ..engine.solve import Factors, Prior, exact
from ..methods import method
from ._method import Job
from .memit import MEMIT, MEMITConfig


class EMMETConfig(MEMITConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of EMMET."""

    weight: Annotated[float, msgspec.Meta(description="scale of the statistics of ordinary text", gt=0)] = 1.0
    eps: Annotated[float, msgspec.Meta(description="how far from equality; 0: equal", ge=0)] = 0.1


@method("edit", config=EMMETConfig, paper="Gupta et al., 2024, arXiv:2403.14236", formula="dW = R (K^T (weight C)^-1 K + eps I)^-1 K^T (weight C)^-1")
class EMMET(MEMIT):
    """MEMIT with an equality constraint: each key is mapped to its residual, as nearly as eps says."""

    def __init__(self, cfg: EMMETConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self._eps = cfg.eps

    def solve(self, keys: torch.Tensor, residuals: torch.Tensor, prior: Prior) -> Factors:
        return exact(keys, residuals, prior, self._eps)
