"""bitfit: the biases, and nothing else."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ...delta import Builder
from ...methods import method
from ...ops import dense
from . import Job, Space


class BitFitConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of BitFit."""

    targets: Annotated[tuple[str, ...], msgspec.Meta(description="whose biases: roles, module names, globs, all")] = ("all",)
    exclude: Annotated[tuple[str, ...], msgspec.Meta(description="what to leave out of the targets")] = ()
    norms: Annotated[bool, msgspec.Meta(description="train the gains of norms too")] = False


@method("space", config=BitFitConfig, paper="Ben Zaken, Ravfogel and Goldberg, 2021, arXiv:2106.10199", formula="b' = b + d")
class BitFit(Space):
    """Trains an increment on every bias (those of norms included), optionally on the gains of norms."""

    def __init__(self, cfg: BitFitConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def build(self, build: Builder) -> None:
        kinds = ("bias", "norm") if self.cfg.norms else ("bias",)
        for part in self.job.parts(self.cfg.targets, self.cfg.exclude, kinds=kinds):
            part.put(build, "dense", dense.OP.init(part.shape, self.job.gen))
