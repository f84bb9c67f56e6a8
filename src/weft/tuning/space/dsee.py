"""dsee: sparse twice. A low-rank and a sparse increment, over weights that may be pruned.

    w' = S1 w + (alpha / rank) B A,    w'.flat[index] += values

The `entries` positions of each matrix are found by decomposing it, w ~ L + S with L of rank `rank` and S with `entries` entries: in turn L is
the best of its rank for w - S, and S the largest entries of w - L. S1 takes out the share `prune` of the entries, the smallest |w|; it
starts as all ones and comes into force after the share `pruned_after` of the run, so that the rest retunes what is left. Chen et al. 2021,
arXiv 2111.00160. A is uniform, B and values are zero: w' = w at the start. With entries = 0 and prune = 0 it is LoRA.

Not followed: the code decomposes with GreBsmo, a greedy approximation of the above; here each turn is an exact SVD. Heads are not pruned
(its structured form), and pruned weights are those of the base, before anything is learnt. The default is not to prune.

Size: 4 rank (rows + columns) bytes a matrix, 12 an entry, and 8 plus the base's width for each pruned one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec
import numpy as np
import torch

from ... import xp
from ...delta import Builder
from ...engine.loop import Run
from ...methods import method
from ...ops import lowrank
from ...stored import numpy_dtype
from .._positions import Budget, Positions, top
from . import Job, Part
from ._masked import Masked


class DSEEConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of DSEE."""

    targets: Annotated[tuple[str, ...], msgspec.Meta(description="what to change: roles, module names, globs, all-linear")] = ("all-linear",)
    exclude: Annotated[tuple[str, ...], msgspec.Meta(description="what to leave out of the targets")] = ()
    rank: Annotated[int, msgspec.Meta(description="columns of B, rows of A", ge=1)] = 16
    alpha: Annotated[float, msgspec.Meta(description="the product is scaled by alpha / rank", gt=0)] = 16.0
    entries: Annotated[int, msgspec.Meta(description="entries of the sparse increment in each matrix", ge=0)] = 64
    rounds: Annotated[int, msgspec.Meta(description="turns of the decomposition that finds them", ge=1)] = 5
    prune: Annotated[float, msgspec.Meta(description="share of the base's entries that become zero", ge=0, lt=1)] = 0.0
    pruned_after: Annotated[float, msgspec.Meta(description="share of the run before they do", ge=0, lt=1)] = 0.5


@method("space", config=DSEEConfig, paper="Chen et al., 2021, arXiv:2111.00160", formula="w' = S1 w + (alpha / rank) B A + S2")
class DSEE(Masked):
    """A low-rank and a sparse increment, over weights of which a share may be pruned."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "conv", "parameter")

    def __init__(self, cfg: DSEEConfig, job: Job) -> None:
        super().__init__(Budget(targets=cfg.targets, exclude=cfg.exclude), job)
        self.cfg = cfg

    def choose(self, parts: Sequence[Part]) -> list[Positions]:
        return [outstanding(self.job.weight(part), self.cfg.rank, self.cfg.entries, self.cfg.rounds) for part in parts]

    def put(self, build: Builder, part: Part, index: Positions) -> None:
        w = self.job.weight(part)
        (kept,) = top([w], w.numel() - int(self.cfg.prune * w.numel()))
        gone = np.setdiff1d(np.arange(w.numel()), kept, assume_unique=True)
        if gone.size:
            stored = xp.cast(w.reshape(-1)[torch.from_numpy(gone)], str(numpy_dtype(self.job.base.tensor(part.target).dtype)))
            part.put(build, "assign", {"index": gone, "values": stored})
        part.put(build, "lowrank", lowrank.OP.init(part.shape, self.job.gen, rank=self.cfg.rank), scale=self.cfg.alpha / self.cfg.rank)
        super().put(build, part, index)

    def start(self, run: Run) -> None:
        super().start(run)
        self.after_step(run)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        if self.cfg.prune and run.place >= self.cfg.pruned_after * run.total:
            for _, values in self._fixed():
                values.zero_()


def outstanding(w: torch.Tensor, rank: int, entries: int, rounds: int) -> Positions:
    """The positions of the `entries` entries that a matrix of rank `rank` explains least, from turns of low-rank and sparse approximation."""
    flat = w.reshape(w.shape[0], -1)
    entries = min(entries, flat.numel())
    sparse, index = torch.zeros_like(flat), np.zeros(0, np.int64)
    for _ in range(rounds if entries else 0):
        u, s, v = torch.linalg.svd(flat - sparse, full_matrices=False)
        left = flat - (u[:, :rank] * s[:rank]) @ v[:rank]
        (index,) = top([left], entries)
        place = torch.from_numpy(index)
        sparse = torch.zeros(flat.numel()).index_copy(0, place, left.reshape(-1)[place]).reshape(flat.shape)
    return index
