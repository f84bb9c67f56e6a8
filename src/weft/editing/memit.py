"""memit: many facts at once, spread over a few layers of MLPs that hold them.

z_f is the output of the last edited layer, at the end of the subject (or of the prompt), that makes fact f true (see `_latent.py`). Then, from
the lowest edited layer up, with K the keys of that layer (averaged over prompts, and with the layers below already edited),

    R = (Z - what the last layer gives now) / (layers left)        dW = R K^T (weight C + K K^T)^-1

C = E[k k^T] over ordinary text, of the model before the first edit (Meng et al. 2022, arXiv 2210.07229). The prompts are the fact's own and the
same after a few texts that the model writes; Z and "now" are read on the fact's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
import torch

from ..engine.solve import Factors, Prior, ridge
from ..methods import method
from ._latent import Latent, LatentConfig, block
from ._method import EditMethod, Fact, Job, Matrix


class MEMITConfig(LatentConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of MEMIT."""

    weight: Annotated[float, msgspec.Meta(description="how much a change costs on ordinary text; the larger, the less is changed", gt=0)] = 15_000.0


@method("edit", config=MEMITConfig, paper="Meng et al., 2022, arXiv:2210.07229", formula="dW = R K^T (weight C + K K^T)^-1 a layer,  R = (Z - now) / left")
class MEMIT(EditMethod[MEMITConfig]):
    """Locate and edit: many facts at once, spread over the MLPs of several layers (by default an eighth to a quarter of the way up)."""

    subjects = True
    texts = True

    def __init__(self, cfg: MEMITConfig, job: Job) -> None:
        super().__init__(cfg, job)
        depth = 0 if cfg.sites else job.layers()
        self.latent = Latent(cfg, job, depth // 8, depth // 4)
        self._priors = self.latent.priors(cfg.weight)

    @property
    def matrices(self) -> Sequence[Matrix]:
        return self.latent.matrices

    def turn(self, facts: Sequence[Fact]) -> Iterator[tuple[Matrix, Factors]]:
        top = block(self.job.model, self.matrices[-1])
        start = self.latent.outputs(facts, top)
        goal = start + self.latent.wanted(facts, top, start)
        for number, matrix in enumerate(self.matrices):
            keys, now = self.latent.keys(facts, matrix), self.latent.outputs(facts, top)
            yield matrix, self.solve(keys, (goal - now) / (len(self.matrices) - number), self._priors[matrix.name])

    def solve(self, keys: torch.Tensor, residuals: torch.Tensor, prior: Prior) -> Factors:
        """The change of one matrix."""
        return ridge(keys, residuals, prior)
