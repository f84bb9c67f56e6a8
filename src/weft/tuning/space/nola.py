"""nola: low-rank factors that are sums of random ones, of which only the coefficients are trained.

    w' = w + (alpha / (rank sqrt(columns))) B A,    A = sum_i a_i A_i / sqrt(k),    B = sum_i b_i B_i / sqrt(k)

A_i (rank x columns) and B_i (rows x rank) are `k` bases of normal numbers each, made again from a seed whenever they are needed. The a
start normal and the b zero: w' = w at the start. Trained and stored are 2 k numbers for each matrix, whatever the rank and its size.

Bases are made in every forward and kept until the backward: time and memory grow with k rank (rows + columns). The paper's code has uniform
bases and other constants; the span is what counts.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np

from ... import xp
from ...delta import Builder
from ...methods import method
from ...ops.op import flat_shape
from . import Job, Space
from ._matrices import MatricesConfig


class NOLAConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of NOLA."""

    k: Annotated[int, msgspec.Meta(description="bases of each factor", ge=1)] = 64
    rank: Annotated[int, msgspec.Meta(description="columns of B, rows of A", ge=1)] = 8
    alpha: Annotated[float, msgspec.Meta(description="the product is scaled by alpha / (rank sqrt(columns))", gt=0)] = 16.0


@method("space", config=NOLAConfig, paper="Koohpayegani et al., 2023, arXiv:2310.02556", formula="w' = w + s (sum_i b_i B_i)(sum_i a_i A_i)")
class NOLA(Space):
    """Low-rank adaptation whose factors are combinations of seeded random bases."""

    lr = 1e-2

    def __init__(self, cfg: NOLAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def build(self, build: Builder) -> None:
        seed = xp.named_key(self.job.gen.seed, "nola") >> 12  # 52 bits: every reader of JSON has them
        for stream, part in enumerate(self.job.matrices(self.cfg.targets, self.cfg.exclude)):
            rows, columns = flat_shape(part.shape)
            rank = min(self.cfg.rank, rows, columns)
            fields = {"a": self.job.gen.normal((self.cfg.k,)), "b": np.zeros(self.cfg.k, np.float32)}
            part.put(build, "seeded", fields, rank=rank, seed=seed, stream=stream, scale=self.cfg.alpha / (rank * columns**0.5))
