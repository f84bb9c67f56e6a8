"""full: every weight.

The model's own parameters are trained, in float32 whatever the base is stored in. The delta assigns the result to each tensor
that changed, rounded once to the base's dtype: what `weft diff --as exact` would make of the trained model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
import torch
from torch import nn

from ... import xp
from ...base import LiveBase
from ...delta import Builder, Delta
from ...errors import UsageError, WeftError
from ...methods import method
from ...sites import Site, sites
from ...stored import hold, numpy_dtype
from . import Job, Space


class FullConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of full tuning."""

    targets: Annotated[tuple[str, ...], msgspec.Meta(description="what to change: roles, module names, globs, all")] = ("all",)
    exclude: Annotated[tuple[str, ...], msgspec.Meta(description="what to leave out of the targets")] = ()


@method("space", config=FullConfig, formula="w' = anything")
class Full(Space):
    """Trains all weights, or those of the targets, themselves."""

    live = True
    lr = 5e-5

    def __init__(self, cfg: FullConfig, job: Job) -> None:
        super().__init__(cfg, job)
        if isinstance(job.base, LiveBase):
            raise UsageError("full tuning changes the model itself, so its base must be a checkpoint", hint="Base.open(PATH), or method='lora'")
        chosen = sites(job.model, cfg.targets, cfg.exclude)
        names = {site.name for site in chosen}
        heads = [site for site in sites(job.model, "all") if site.name not in names and self._new(site)]
        self._sites: list[Site] = [site for site in [*chosen, *heads] if job.names.stored(site.name)]
        parameters = dict(job.model.named_parameters())
        self._tensors = {site.name: parameters[site.name] for site in self._sites}
        self._before: dict[str, torch.Tensor] = {}

    def _new(self, site: Site) -> bool:
        return any(place.name in self.job.head for place in self.job.names.stored(site.name))

    def build(self, build: Builder) -> None:
        """Nothing is attached."""

    def tensors(self) -> dict[str, nn.Parameter]:
        return self._tensors

    def squares(self) -> Iterator[tuple[str, torch.Tensor, bool]]:
        for site in self._sites:
            new = self._new(site)
            value = self._tensors[site.name]
            change = value if new else value - self._original(site, value)
            yield site.name, change.square().sum(), new

    def _original(self, site: Site, like: torch.Tensor) -> torch.Tensor:
        """The base's values of a live tensor, kept from the first time they are asked for."""
        if site.name not in self._before:
            whole = torch.empty_like(like, requires_grad=False)
            for place in self.job.names.stored(site.name):
                value = xp.to_torch(self.job.base.tensor(place.name).read())
                (place.at.get(whole) if place.at else whole).copy_(place.part.get(value) if place.part else value)
            self._before[site.name] = whole
        return self._before[site.name]

    def finish(self) -> Delta:
        base, build, changed = self.job.base, Builder(self.job.base), 0
        live = self.job.model.state_dict(keep_vars=True)
        for name in [*base.names, *self.job.head]:
            places = self.job.names.live(name)
            if not places:
                continue
            dtype, shape = ("F32", self.job.head[name].shape) if name in self.job.head else (base.tensor(name).dtype, base.tensor(name).shape)
            whole = live[places[0].name].detach().new_empty(tuple(shape))
            for place in places:
                value = live[place.name].detach()
                (place.part.get(whole) if place.part else whole).copy_(place.at.get(value) if place.at else value)
            tensor = hold(xp.cast(whole, str(numpy_dtype(dtype))))
            if name in self.job.head:
                build.add(name, tensor, kind="replace" if name in base.tensors else "add")
            elif tensor.sha256 != base.sha256(name):
                build.put(name, "assign", {"values": tensor})
                changed += 1
        if not changed:
            raise WeftError("after rounding to the base's dtype no tensor has changed", hint="a higher learning rate, or more steps")
        return build.done()
