"""lisa: a few layers at a time.

Every `period` steps `layers` of the layers are drawn, each as likely as any other; they are trained until the next draw, and the others
are frozen. Embeddings, heads and all else outside the layers are always trained. Pan et al. 2024, arXiv 2403.17919.

A layer that is no longer drawn loses its gradients and what the optimizer keeps for it; it starts anew when it is drawn again. Memory is
that of full tuning for `layers` layers and what lies outside. With as many layers as the model has it is full tuning.

Not followed: the paper's code only marks layers as frozen, so that the optimizer keeps the moments of every layer that was ever drawn.

Size: the bytes of the tensors that were ever trained, in the base's dtype.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from ...errors import UsageError
from ...methods import method
from ...ops import Generator
from . import Job
from ._shifts import Shifts
from .full import FullConfig


class LISAConfig(FullConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of LISA."""

    layers: Annotated[int, msgspec.Meta(description="layers that are trained at a time", ge=1)] = 2
    period: Annotated[int, msgspec.Meta(description="steps after which others are drawn", ge=1)] = 20


@method("space", config=LISAConfig, paper="Pan et al., 2024, arXiv:2403.17919", formula="w' = anything for a few layers at a time, and outside the layers")
class LISA(Shifts):
    """Trains a few random layers at a time, and embeddings and heads always."""

    def __init__(self, cfg: LISAConfig, job: Job) -> None:
        super().__init__(cfg, job, cfg.period)
        self._layers = list(dict.fromkeys((site.stack, site.layer) for site in self._sites if site.layer is not None))
        if cfg.layers > len(self._layers):
            raise UsageError(f"layers = {cfg.layers}, but the targets lie in {len(self._layers)} layers", hint=f"layers={len(self._layers)} at most")
        self._count = cfg.layers

    def awake(self, gen: Generator) -> set[str]:
        drawn = {self._layers[k] for k in gen.permutation(len(self._layers))[: self._count]}
        return {site.name for site in self._sites if site.layer is None or (site.stack, site.layer) in drawn}
