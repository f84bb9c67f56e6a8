"""spt: the budget goes where the loss is most sensitive; where that is most of a matrix, it is tuned as a whole.

    s = sum over batches of g^2                                  how much the loss falls by training an entry, to first order
    the tau entries with the largest s are chosen
    w' = w + B A                        matrices with at least r (rows + columns) / alpha of them
    w'.flat[index] = w.flat[index] + values                      all others

He et al. 2023, arXiv 2303.08566. tau is the largest for which all that is trained fits into the budget (`density` or `count`). A is uniform
and B zero, values are zero. As in the paper's code alpha is 5 and sensitivities come from 8 batches; they are of the base, with the
head as it starts. The choice is part of the state: a run that is resumed does not make it again.

Not followed: the code also trains a vector as a whole once a fifth of it is chosen, which a sparse op of nearly all of it comes to; its
other whole form, an adapter, is another space. Dropout is off while gradients are gathered.

Size: 12 bytes an entry where entries are trained, 4 r (rows + columns) where a product is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import torch

from ...delta import Builder
from ...methods import method
from ...ops import lowrank
from ...ops.op import flat_shape
from .._positions import Budget, Positions, counts, sensitivities, top
from . import Job, Part
from ._masked import Masked


class SPTConfig(Budget, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of SPT."""

    batches: Annotated[int, msgspec.Meta(description="batches that the sensitivity is summed over", ge=1)] = 8
    rank: Annotated[int, msgspec.Meta(description="of matrices that are tuned as a whole", ge=1)] = 8
    alpha: Annotated[float, msgspec.Meta(description="a matrix is tuned as a whole if so many times its chosen entries are the product's size", gt=0)] = 5.0


@method(
    "space", config=SPTConfig, paper="He et al., 2023, arXiv:2303.08566", formula="w' = w + values where sum g^2 is largest, w + B A for matrices full of such"
)
class SPT(Masked):
    """Tunes the most sensitive entries, and matrices that have many of them by a low-rank product."""

    def __init__(self, cfg: SPTConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def choose(self, parts: Sequence[Part]) -> list[Positions]:
        scores = sensitivities(self.job, parts, self.cfg.batches)
        budget = sum(counts([score.numel() for score in scores], self.cfg))
        low, high = 1, min(sum(score.numel() for score in scores), int(budget * max(1.0, self.cfg.alpha)))
        while low < high:
            tau = (low + high + 1) // 2
            if self._size(parts, self._top(scores, tau)) <= budget:
                low = tau
            else:
                high = tau - 1
        return self._top(scores, low)

    def _top(self, scores: Sequence[torch.Tensor], tau: int) -> list[Positions]:
        if self.cfg.across == "model":
            return top(scores, tau)
        shares = counts([score.numel() for score in scores], msgspec.structs.replace(self.cfg, count=tau))
        return [top([score], share)[0] for score, share in zip(scores, shares, strict=True)]

    def _size(self, parts: Sequence[Part], positions: Sequence[Positions]) -> int:
        """What is trained, in numbers."""
        return sum(self._product(part) if self._whole(part, index) else index.size for part, index in zip(parts, positions, strict=True))

    def _product(self, part: Part) -> int:
        return self.cfg.rank * sum(flat_shape(part.shape))

    def _whole(self, part: Part, index: Positions) -> bool:
        return len(part.shape) > 1 and part.site.kind != "embedding" and self.cfg.alpha * index.size >= self._product(part)

    def put(self, build: Builder, part: Part, index: Positions) -> None:
        if self._whole(part, index):
            part.put(build, "lowrank", lowrank.OP.init(part.shape, self.job.gen, rank=self.cfg.rank))
        else:
            super().put(build, part, index)
