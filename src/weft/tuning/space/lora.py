"""lora: a low-rank product added to each chosen matrix.

    w' = w + (alpha / rank) B A        A uniform, B zero: w' = w at the start

rslora   alpha / sqrt(rank) in its place (Kalajdzievski 2023, arXiv 2312.03732)
dora     the direction is trained apart from the length: w' = m (w + s B A) / ||w + s B A|| (Liu et al. 2024, arXiv 2402.09353).
         Norms are of each output's weights, and gradients flow through them. m = ||w|| gives w back to within rounding.
pissa    A and B start as the leading singular vectors of w, times the roots of their values, and the same product is taken
         off: w' = w + s (B A - B0 A0) (Meng, Wang and Zhang 2024, arXiv 2404.02948). The base stays what it is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from ...delta import Builder
from ...engine.loop import Run
from ...methods import method
from ...ops import lowrank, magnitude
from . import Job, Part, Space


class LoRAConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of LoRA."""

    rank: Annotated[int, msgspec.Meta(description="columns of B, rows of A", ge=1)] = 8
    alpha: Annotated[float, msgspec.Meta(description="the product is scaled by alpha / rank", gt=0)] = 16.0
    targets: Annotated[tuple[str, ...], msgspec.Meta(description="what to change: roles, module names, globs, all-linear")] = ("all-linear",)
    exclude: Annotated[tuple[str, ...], msgspec.Meta(description="what to leave out of the targets")] = ()
    dropout: Annotated[float, msgspec.Meta(description="share of the product's inputs that are dropped while training", ge=0, lt=1)] = 0.0
    rslora: Annotated[bool, msgspec.Meta(description="scale by alpha / sqrt(rank)")] = False
    dora: Annotated[bool, msgspec.Meta(description="train the norm of each output's weights too")] = False
    init: Annotated[Literal["uniform", "pissa"], msgspec.Meta(description="A uniform and B zero, or both from the leading singular vectors")] = "uniform"


@method("space", config=LoRAConfig, paper="Hu et al., 2021, arXiv:2106.09685", formula="w' = w + (alpha / rank) B A")
class LoRA(Space):
    """Low-rank adaptation, with rsLoRA's scale, DoRA's magnitudes and PiSSA's start as options."""

    def __init__(self, cfg: LoRAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def build(self, build: Builder) -> None:
        scale = self.cfg.alpha / (self.cfg.rank**0.5 if self.cfg.rslora else self.cfg.rank)
        for part in self.job.matrices(self.cfg.targets, self.cfg.exclude):
            part.put(build, "lowrank", self._factors(part, scale), scale=scale)
            if self.cfg.dora:
                axis = 1 if part.site.kind == "conv1d" else 0
                part.put(build, "magnitude", {"m": magnitude.norms(self.job.weight(part), axis)}, axis=axis)

    def start(self, run: Run) -> None:
        self.job.attached[1].dropout = self.cfg.dropout

    def _factors(self, part: Part, scale: float) -> dict[str, Any]:
        if self.cfg.init == "uniform":
            return lowrank.OP.init(part.shape, self.job.gen, rank=self.cfg.rank)
        u, s, v = self.job.singular(part)
        root = (s[: self.cfg.rank] / scale).sqrt()
        b, a = u[:, : self.cfg.rank] * root, root[:, None] * v[: self.cfg.rank]
        return {"A": a, "B": b, "A0": a, "B0": b}
