"""lamda: a small square matrix between the leading singular vectors of each matrix.

    w = U diag(s) V^T;  w' = w + (alpha / rank) B M A        A = V_r^T stays, B starts as U_r, M (r x r) zero: w' = w at the start

A never changes. B learns only in the first share `freeze` of the run, and less and less of it: its columns come to rest one after the
other, evenly over that time, that of the smallest singular value first. Then only M is trained, r^2 numbers for each matrix; the
optimizer's state of B is dropped.

adaptive (LaMDA++)  ranks differ: `rank` is their mean, and each matrix gets a share after the number of leading components that have the share
                    `energy` of its squared singular values. So the flatter its spectrum, the more.

The paper takes the leading part out of the base and starts M as diag(s_r), which is the same function at the start; with M zero, nothing
has to be taken out (and put into the file), and weight decay pulls towards the base. Where the paper leaves open in which order B comes to
rest, and how energy becomes ranks, that is what is said here.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch

from ...delta import Builder
from ...engine.loop import Run
from ...methods import method
from ...ops.op import flat_shape
from .._ranks import Pace, shared_out
from . import Job, Part, Space
from ._matrices import MatricesConfig


class LaMDAConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of LaMDA."""

    rank: Annotated[int, msgspec.Meta(description="side of M; the mean of all with adaptive", ge=1)] = 32
    alpha: Annotated[float, msgspec.Meta(description="the product is scaled by alpha / rank", gt=0)] = 32.0
    freeze: Annotated[float, msgspec.Meta(description="share of the run after which B is at rest", ge=0, le=1)] = 0.3
    adaptive: Annotated[bool, msgspec.Meta(description="give matrices with flat spectra more rank (LaMDA++)")] = False
    energy: Annotated[float, msgspec.Meta(description="share of the squared singular values that is counted for that", gt=0, le=1)] = 0.5


@method("space", config=LaMDAConfig, paper="Azizi, Kundu and Pedram, 2024, arXiv:2406.12832", formula="w' = w + (alpha / rank) B M A, A = V_r^T")
class LaMDA(Space):
    """A small matrix between singular vectors, of which those on the output side learn at first."""

    frozen = frozenset({"A"})

    def __init__(self, cfg: LaMDAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        self._pace = Pace()
        self._left: list[str] = []

    def build(self, build: Builder) -> None:
        parts = self.job.matrices(self.cfg.targets, self.cfg.exclude)
        sides = [min(flat_shape(part.shape)) for part in parts]
        ranks = [min(self.cfg.rank, side) for side in sides]
        if self.cfg.adaptive:
            ranks = shared_out([self._components(part) for part in parts], sum(ranks), sides)
        for part, rank in zip(parts, ranks, strict=True):
            u, _, v = self.job.singular(part)
            fields = {"A": v[:rank].contiguous(), "M": torch.zeros(rank, rank), "B": u[:, :rank].contiguous()}
            part.put(build, "bilinear", fields, scale=self.cfg.alpha / self.cfg.rank)

    def _components(self, part: Part) -> int:
        """How many leading components have the share `energy` of a part's squared singular values."""
        squares = torch.linalg.svdvals(self.job.weight(part).reshape(flat_shape(part.shape))).double().square()
        return int((squares.cumsum(0) < self.cfg.energy * squares.sum()).sum()) + 1

    def start(self, run: Run) -> None:
        delta, _ = self.job.attached
        self._left = [op.t["B"].key for entry in delta.entries.values() for op in entry.ops if op.op == "bilinear"]
        self._rest(run)

    def gradients(self, run: Run) -> None:
        moving = 1 - run.place / max(self.cfg.freeze * run.total, 1e-9)
        speed = {}
        for key in self._left:
            rank = run.tensors[key].shape[1]
            speed[key] = (torch.arange(rank) < round(rank * moving)).float()
        self._pace.before(run.tensors, speed)

    def after_step(self, run: Run) -> None:
        self._pace.after(run.tensors)
        self._rest(run)

    def _rest(self, run: Run) -> None:
        """Take B out of training once its time is over."""
        if run.place >= self.cfg.freeze * run.total:
            for key in self._left:
                run.tensors[key].requires_grad_(False)
                run.tensors[key].grad = None
                run.optimizer.state.pop(run.tensors[key], None)
            self._left = []
