"""mixture-of-shards: low-rank factors put together from two pools of shards that all matrices of a shape share.

    w_l' = w_l + (alpha / rank) B_l A_l;  each row of A_l, and each column of B_l, is `shards` pieces of a pool, one after the other

A pool has as many shards as L matrices would have at rank `budget`: L budget shards. Of its `rank` vectors each matrix has `private` ones
whose shards nobody else uses; the shards of the others are picked at random from the rest, no shard twice as long as there are others, and
for A and B apart (subset selection, pair dissociation, vector sharding, shard privatisation). The A pool starts uniform and the B pool
zero: w' = w at the start. With private = budget = rank this is LoRA.

Trained are (rows + columns) budget numbers for each matrix, whatever the rank. The positions are a function of the run's seed; they are in
the file as well, rank shards numbers for each factor. The number of shards of a side is the greatest common divisor of `shards` and the
side.
"""

from __future__ import annotations

from math import gcd
from typing import Annotated

import msgspec
import numpy as np

from ...delta import Builder
from ...errors import UsageError
from ...methods import method
from ...ops import Ref
from ...ops.op import flat_shape
from . import Job, Part, Space
from ._matrices import MatricesConfig


class MixtureOfShardsConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of mixture-of-shards."""

    rank: Annotated[int, msgspec.Meta(description="columns of each B, rows of each A", ge=1)] = 8
    budget: Annotated[int, msgspec.Meta(description="the rank at which LoRA trains as much", ge=1)] = 2
    shards: Annotated[int, msgspec.Meta(description="pieces of each vector", ge=1)] = 4
    private: Annotated[int, msgspec.Meta(description="vectors of each matrix that no other uses", ge=0)] = 1
    alpha: Annotated[float, msgspec.Meta(description="the product is scaled by alpha / rank", gt=0)] = 16.0


@method("space", config=MixtureOfShardsConfig, paper="Wang et al., 2024, arXiv:2410.00938", formula="w_l' = w_l + (alpha / rank) B_l A_l, from shared shards")
class MixtureOfShards(Space):
    """Low-rank adaptation from pools of shards: more rank for the same number of trained numbers."""

    def __init__(self, cfg: MixtureOfShardsConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        if not cfg.private <= cfg.budget <= cfg.rank or (cfg.private == cfg.budget < cfg.rank):
            raise UsageError(
                f"private vectors are part of the budget, and the budget of the rank: got {cfg.private}, {cfg.budget} and {cfg.rank}",
                hint="private < budget <= rank, or all the same",
            )

    def build(self, build: Builder) -> None:
        found: dict[tuple[int, int], list[Part]] = {}
        for part in self.job.matrices(self.cfg.targets, self.cfg.exclude):
            found.setdefault(flat_shape(part.shape), []).append(part)
        for (rows, columns), parts in found.items():
            a, b = self._picked(build, "A", rows, columns, len(parts)), self._picked(build, "B", rows, columns, len(parts))
            for number, part in enumerate(parts):
                part.put(build, "lowrank", {"A": a[number], "B": b[number]}, scale=self.cfg.alpha / self.cfg.rank)

    def _picked(self, build: Builder, name: str, rows: int, columns: int, count: int) -> list[Ref]:
        """A pool for `count` matrices, and each one's factor from it."""
        cfg, gen, size = self.cfg, self.job.gen, columns if name == "A" else rows
        pieces = gcd(cfg.shards, size)
        shape = (count * cfg.budget * pieces, size // pieces)
        pool = build.share(f"{name}.{rows}x{columns}", gen.uniform(shape, columns**-0.5) if name == "A" else np.zeros(shape, np.float32))
        private, public = count * cfg.private * pieces, shape[0] - count * cfg.private * pieces
        refs = []
        for number in range(count):
            own = np.arange(cfg.private * pieces) + number * cfg.private * pieces
            wanted = (cfg.rank - cfg.private) * pieces
            order = [private + gen.permutation(public) for _ in range(-(-wanted // public))] if wanted else []
            positions = np.concatenate([own, *order])[: cfg.rank * pieces].astype(np.int32)
            refs.append(build.pick(pool, positions, (cfg.rank, size), transpose=name == "B"))
        return refs
