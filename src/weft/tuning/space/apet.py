"""apet: arbitrary few parameters, at random.

    w'.flat[index] = w.flat[index] + values        index drawn without replacement

The finding of Su et al. 2023, arXiv 2306.02320 (Arbitrary PET): the larger the model, the less it matters which entries are trained, and
the fewer are enough. `tensors` is the share of the targets that have any: at the same budget, a small share is a structure (whole
matrices at its smallest), all of them is the least structure there can be. The seed of the run draws both.

Not followed: the paper also arranges other kinds of module (adapters, prompts) at random; here it is entries of weights.

Size: 12 bytes an entry (its position and its value).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np

from ...errors import UsageError
from ...methods import method
from .._positions import Budget, Positions, chances, counts, largest
from . import Job, Part
from ._masked import Masked


class APETConfig(Budget, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of arbitrary PET."""

    tensors: Annotated[float, msgspec.Meta(description="share of the targets that the entries are in, drawn at random", gt=0, le=1)] = 1.0


@method("space", config=APETConfig, paper="Su et al., 2023, arXiv:2306.02320", formula="w' = w + values at random entries")
class APET(Masked):
    """Tunes entries at random positions, of all targets or of a random share of them."""

    def __init__(self, cfg: APETConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def choose(self, parts: Sequence[Part]) -> list[Positions]:
        kept = sorted(self.job.gen.permutation(len(parts))[: max(1, round(self.cfg.tensors * len(parts)))].tolist())
        whole = sum(counts([int(np.prod(part.shape)) for part in parts], self.cfg))
        room = sum(int(np.prod(parts[k].shape)) for k in kept)
        if whole > room:
            raise UsageError(f"{whole:,} entries do not fit into {len(kept)} of {len(parts)} targets, which have {room:,}", hint="a larger share: tensors=1.0")
        budget = Budget(count=whole, across=self.cfg.across)
        drawn = dict(zip(kept, largest(chances([parts[k] for k in kept], self.job.gen), budget), strict=True))
        return [drawn.get(k, np.zeros(0, np.int64)) for k in range(len(parts))]
