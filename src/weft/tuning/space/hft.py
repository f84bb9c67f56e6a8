"""hft: half of the model is trained, half is as it was.

In every layer, of each kind of matrix (attention, mlp, norm, ...) a half drawn at random is trained, the rest is frozen; a bias goes
with its weight. Of an odd number the larger half is trained in every second layer, so that about half of all is. What lies outside
the layers (embeddings, heads, last norms) is drawn alike, one category for each role. Hui et al. 2024, arXiv 2404.18466.

The draw lasts for a run: in the paper a new one is made for each task or stage of tuning that follows. `period` makes a new one
every so many steps. Gradients and moments exist for the half that is trained only.

`outside` trains all that lies outside the layers; the paper speaks of the layers alone.

Size: the bytes of the tensors that were trained, in the base's dtype: about half of the model.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from ...methods import method
from ...ops import Generator
from . import Job
from ._shifts import Shifts
from .full import FullConfig


class HFTConfig(FullConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of half fine-tuning."""

    period: Annotated[int, msgspec.Meta(description="steps after which another half is drawn; 0: never", ge=0)] = 0
    outside: Annotated[bool, msgspec.Meta(description="train all that lies outside the layers, instead of half of it")] = False


@method("space", config=HFTConfig, paper="Hui et al., 2024, arXiv:2404.18466", formula="w' = anything for a random half of the tensors, w for the rest")
class HFT(Shifts):
    """Trains a random half of each layer's matrices, kind by kind."""

    def __init__(self, cfg: HFTConfig, job: Job) -> None:
        super().__init__(cfg, job, cfg.period)
        self.outside = cfg.outside

    def awake(self, gen: Generator) -> set[str]:
        groups: dict[tuple[str, int | None, str], dict[str, list[str]]] = {}
        names = set()
        for site in self._sites:
            if self._new(site) or (self.outside and site.layer is None):
                names.add(site.name)
            else:
                kind = site.role.partition(".")[0]
                groups.setdefault((site.stack, site.layer, kind), {}).setdefault(site.module, []).append(site.name)
        odd: dict[str, int] = {}
        for (_, _, kind), modules in groups.items():
            extra = 0
            if len(modules) % 2:
                extra = odd.setdefault(kind, int(gen.permutation(2)[0]))  # where the first goes is a coin's choice
                odd[kind] = 1 - extra
            order = gen.permutation(len(modules))[: len(modules) // 2 + extra]
            listed = list(modules.values())
            names |= {name for k in order for name in listed[k]}
        return names
