"""rome: one fact at a time in one layer, exactly.

With k the key of a fact and d what is to be added to the matrix's output there (see `_latent.py`),

    dW = d u^T / (k . u)        u = C^-1 k

the smallest change on ordinary text, C = E[k k^T], that gives k the output W k + d (Meng et al. 2022, arXiv 2202.05262). k and the output are
averaged over the same prompts everywhere: taking k from the bare prompt and u from the average, as the first code did, makes k . u as good as zero
for some facts and ruins the model (Gupta, Baskaran and Anumanchipalli 2024, arXiv 2403.07175; Yang et al. 2024, arXiv 2406.11263). The facts of a turn are
made in order, each on the model with those before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec

from ..engine.solve import Factors, exact
from ..errors import UsageError
from ..methods import method
from ._latent import Latent, LatentConfig
from ._method import EditMethod, Fact, Job, Matrix


class ROMEConfig(LatentConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of ROME."""

    clamp: Annotated[float, msgspec.Meta(description="longest addition, in lengths of the output itself", gt=0)] = 4.0


@method("edit", config=ROMEConfig, paper="Meng et al., 2022, arXiv:2202.05262", formula="dW = d u^T / (k . u),  u = C^-1 k")
class ROME(EditMethod[ROMEConfig]):
    """Locate and edit one fact at a time with a rank-one change of one MLP (by default a fifth of the way up)."""

    subjects = True
    texts = True

    def __init__(self, cfg: ROMEConfig, job: Job) -> None:
        super().__init__(cfg, job)
        layer = 0 if cfg.sites else job.layers() // 5
        self.latent = Latent(cfg, job, layer, layer)
        if len(self.matrices) != 1:
            raise UsageError(f"rome edits one matrix, got {', '.join(matrix.name for matrix in self.matrices)}", hint="-p sites=mlp.down@5, or --method memit")
        self._prior = self.latent.priors(1.0)[self.matrices[0].name]

    @property
    def matrices(self) -> Sequence[Matrix]:
        return self.latent.matrices

    def turn(self, facts: Sequence[Fact]) -> Iterator[tuple[Matrix, Factors]]:
        (matrix,) = self.matrices
        for fact in facts:
            now = self.latent.outputs([fact], matrix.module, averaged=True)
            yield matrix, exact(self.latent.keys([fact], matrix), self.latent.wanted([fact], matrix.module, now), self._prior)
