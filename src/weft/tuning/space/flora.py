"""flora: a core of low rank along every axis of a weight.

    w' = w + scale * core x_0 U0 x_1 U1 ...        one factor for each axis; U normal (1 / sqrt of its size), core zero: w' = w at the start

A kernel of a convolution keeps its axes (out, in, height, width), each with a rank of its own, and so does any other tensor with more than
two; a matrix gets U0 core U1^T, which with a core held at one is LoRA. Trained are the core, prod_k r_k numbers, and sum_k n_k r_k of the
factors.

`rank` is that of the first two axes, `kernel` that of the others, each at most the axis's size. The scale is a number of its own, as in the
paper (4 for convolutions and 0.04 for linear modules there, with other starts).
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np

from ...delta import Builder
from ...methods import method
from . import Job, Space
from ._matrices import MatricesConfig


class FLoRAConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of FLoRA."""

    rank: Annotated[int, msgspec.Meta(description="rank along the first two axes", ge=1)] = 8
    kernel: Annotated[int, msgspec.Meta(description="rank along the others; 0: as many as they have", ge=0)] = 0
    scale: Annotated[float, msgspec.Meta(description="the change is scaled by this", gt=0)] = 1.0


@method("space", config=FLoRAConfig, paper="Si et al., 2024, arXiv:2405.14739", formula="w' = w + scale core x_0 U0 x_1 U1 ...")
class FLoRA(Space):
    """A Tucker decomposition of the change: low-rank adaptation that keeps the axes of convolutions."""

    def __init__(self, cfg: FLoRAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def build(self, build: Builder) -> None:
        for part in self.job.matrices(self.cfg.targets, self.cfg.exclude):
            ranks = [min(size, self.cfg.rank if axis < 2 else self.cfg.kernel or size) for axis, size in enumerate(part.shape)]
            fields: dict[str, Any] = {"core": np.zeros(ranks, np.float32)}
            for axis, (size, rank) in enumerate(zip(part.shape, ranks, strict=True)):
                fields[f"U{axis}"] = self.job.gen.normal((size, rank), size**-0.5)
            part.put(build, "tucker", fields, scale=self.cfg.scale)
