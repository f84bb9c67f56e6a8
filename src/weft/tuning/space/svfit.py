"""svfit: the largest singular values of each matrix.

    w = U diag(s) V^T;  w' = w + U_r diag(d) V_r^T        d zero: w' = w at the start

Only d, the change of the `rank` largest singular values, is trained: `rank` numbers for each matrix. U_r and V_r are in the file (they
cannot be computed again with the same bits elsewhere), so it is rank (rows + columns + 1) numbers for each matrix.

The paper trains s itself, and the base is w - U_r diag(s_r) V_r^T; with d = s' - s the function is the same, but weight decay pulls towards
the base's values and not towards zero.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch

from ...delta import Builder
from ...methods import method
from . import Job, Space
from ._matrices import MatricesConfig


class SVFitConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of SVFit."""

    rank: Annotated[int, msgspec.Meta(description="singular values of each matrix; all where it has fewer", ge=1)] = 256


@method("space", config=SVFitConfig, paper="Sun et al., 2024, arXiv:2409.05926", formula="w' = w + U_r diag(d) V_r^T, w = U diag(s) V^T")
class SVFit(Space):
    """Trains the largest singular values of each matrix, between its own singular vectors."""

    lr = 1e-2
    frozen = frozenset({"P", "Q"})

    def __init__(self, cfg: SVFitConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def build(self, build: Builder) -> None:
        for part in self.job.matrices(self.cfg.targets, self.cfg.exclude):
            u, s, v = self.job.singular(part)
            rank = min(self.cfg.rank, len(s))
            part.put(build, "svd", {"P": u[:, :rank].contiguous(), "lam": torch.zeros(rank), "Q": v[:rank].contiguous()})
