"""light-peft: what the model and the factors do not need is found early in the run, pruned at once, and the rest is tuned.

    w' = (w + (alpha / rank) B A) M        M: ones, and zeros where the units of pruned heads and hidden units come in

For the share `early` of the run, on the whole model, the factors are trained with a factor m (one at the start) on each head's and each
hidden unit's output, and l1 sum |m| is added to the loss. Then the smallest |m| of each layer go: the share `heads` of the heads
(key/value heads with all their queries) and `units` of the hidden units. Of the pairs of factors the share `modules` goes, those with
the smallest mean ||B A x|| / ||w x||; of the components of each that stays the share `ranks`, those with the smallest sum of |p dL/dp| over
the row of A and the column of B (both means over the second half of these steps). The run itself is then on a model that is
really smaller (see `weft.tuning.space.loram`), from the factors as they were, with m = 1. Gu et al. 2024, arXiv 2406.03792.

The delta is for the base as it is: zeros in w' take the pruned units' effect away. The early steps come on top of the run's; a new head
is not trained in them. Not followed: the code takes the components' importance from A alone, and its head learns from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from torch import nn

from ...attaching import attach, detach
from ...delta import Builder
from ...engine.events import Events
from ...engine.loop import Batch, Hooks, Run, train
from ...errors import UsageError
from ...methods import method
from ...ops import layout, lowrank
from . import Job, Part
from ._slim import Keep, Slim, SlimConfig, entries, leaving, parameter, share_kept, span, units


class LightPEFTConfig(SlimConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of Light-PEFT."""

    early: Annotated[float, msgspec.Meta(description="steps before pruning, as a share of the run's, on top of them", gt=0, le=1)] = 0.1
    early_lr: Annotated[float, msgspec.Meta(description="learning rate of these steps, with AdamW", gt=0)] = 1e-3
    l1: Annotated[float, msgspec.Meta(description="weight of the masks' absolute sum in the loss", ge=0)] = 1e-4
    heads: Annotated[float, msgspec.Meta(description="share of each layer's heads that is pruned", ge=0, lt=1)] = 0.5
    units: Annotated[float, msgspec.Meta(description="share of each layer's hidden units that is pruned", ge=0, lt=1)] = 0.5
    modules: Annotated[float, msgspec.Meta(description="share of the pairs of factors that is pruned", ge=0, lt=1)] = 0.5
    ranks: Annotated[float, msgspec.Meta(description="share of the components of each other pair that is pruned", ge=0, lt=1)] = 0.5


class Estimate(Hooks):
    """The early steps: masks that are trained, and what is measured of the factors on the way."""

    def __init__(self, job: Job, l1: float, scale: float, parts: Sequence[Part], keys: Sequence[tuple[str, str]]) -> None:
        self.l1, self.scale, self.keys = l1, scale, keys
        self.masks = {group.name: nn.Parameter(torch.ones(group.size, device=next(job.model.parameters()).device)) for group in units(job)}
        self.ratios = [torch.zeros(()) for _ in parts]
        self.ranks = [torch.zeros(()) for _ in parts]
        self._late, self._tensors = False, dict[str, nn.Parameter]()
        self._hooks: list[Any] = []
        for group in units(job):
            place = leaving(job, group)
            module = parameter(job, place.tensor)[0]
            self._hooks.append(module.register_forward_pre_hook(self._masked(self.masks[group.name], span(group, place))))
        for number, part in enumerate(parts):
            self._hooks.append(job.model.get_submodule(part.site.module).register_forward_hook(self._measured(number)))

    def _masked(self, mask: nn.Parameter, times: int) -> Callable[..., Any]:
        return lambda module, inputs: (inputs[0] * mask.repeat_interleave(times).to(inputs[0].dtype), *inputs[1:])

    def _measured(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if self._late:
                with torch.no_grad():
                    b, a = (self._tensors[key] for key in self.keys[number])
                    change = self.scale * layout.product(module, inputs[0].float(), a, b)
                    self.ratios[number] = self.ratios[number] + change.norm() / (output.float() - change).norm().clamp_min(1e-12)

        return hook

    def start(self, run: Run) -> None:
        self._tensors = run.tensors
        self._late = run.total == 1

    def loss(self, run: Run, batch: Batch) -> torch.Tensor | None:
        return self.l1 * torch.stack([mask.abs().sum() for mask in self.masks.values()]).sum()

    def gradients(self, run: Run) -> None:
        for number, keys in enumerate(self.keys if self._late else ()):
            for axis, key in zip((0, 1), keys, strict=True):
                value = run.tensors[key]
                if value.grad is not None:
                    self.ranks[number] = self.ranks[number] + (value.detach() * value.grad).abs().sum(axis)

    def after_step(self, run: Run) -> None:
        self._late = run.step >= run.total // 2

    def close(self, run: Run) -> None:
        for hook in self._hooks:
            hook.remove()


@method(
    "space", config=LightPEFTConfig, paper="Gu et al., 2024, arXiv:2406.03792", formula="w' = (w + (alpha / rank) B A) M, M zero for pruned heads and units"
)
class LightPEFT(Slim):
    """Low-rank adaptation that prunes the model and its own factors early, and goes on with what is left."""

    def __init__(self, cfg: LightPEFTConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        self.components = {name.removeprefix("components/"): index for name, index in job.earlier.items() if name.startswith("components/")}
        self._learnt: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def chosen(self, parts: Sequence[Part]) -> Keep:
        if odd := [part for part in parts if part.at is not None or part.site.kind not in ("linear", "conv1d")]:
            raise UsageError(f"only what linear layers put out is measured here, not {odd[0].target}", hint=f"-p exclude={odd[0].site.role}")
        estimate = self._estimated(parts)
        order = torch.stack(estimate.ratios).argsort(descending=True, stable=True)
        for number in order[: share_kept(len(parts), self.cfg.modules)].tolist():
            score = estimate.ranks[number].expand(self.cfg.rank).cpu()
            best = score.argsort(descending=True, stable=True)[: share_kept(self.cfg.rank, self.cfg.ranks)]
            self.components[parts[number].target] = best.sort().values
        keep = {}
        for group in units(self.job):
            share = self.cfg.heads if group.name.endswith("heads") else self.cfg.units
            size = estimate.masks[group.name].detach().abs().cpu().numpy()
            keep[group.name] = np.sort(np.argsort(-size, kind="stable")[: share_kept(group.size, share)])
        return keep

    def _estimated(self, parts: Sequence[Part]) -> Estimate:
        """The early steps; the factors that they end with are kept."""
        goal, loop = self.job.goal, self.job.loop
        assert goal is not None
        self.job.fill()
        build = Builder(self.job.base)
        for part in parts:
            part.put(build, "lowrank", lowrank.OP.init(part.shape, self.job.gen, rank=self.cfg.rank), scale=self.scale)
        delta = build.done()
        handle = attach(self.job.model, delta, base=self.job.base, trainable=True, names=self.job.names)
        keys = [(f"{part.target}//0.B", f"{part.target}//0.A") for part in parts]
        estimate = Estimate(self.job, self.cfg.l1, self.scale, parts, keys)
        values = {key: value for key, value in handle.tensors().items() if isinstance(value, nn.Parameter)}
        whole = loop.steps or max(1, round(loop.epochs * ceil(len(goal.examples) / loop.batch_size)))
        loop = msgspec.structs.replace(loop, steps=max(1, round(self.cfg.early * whole)), best="", patience=0)
        trained = {**values, **{f"masks/{name}": mask for name, mask in estimate.masks.items()}}
        optimizer = torch.optim.AdamW(list(trained.values()), lr=self.cfg.early_lr, weight_decay=0.0)
        train(Run(self.job.model, goal, trained, optimizer, lambda place, total: 1.0, loop, self.job.gen.seed, [estimate]), Events())
        self._learnt = {part.target: (values[b].detach().cpu(), values[a].detach().cpu()) for part, (b, a) in zip(parts, keys, strict=True)}
        detach(self.job.model, handle)
        return estimate

    def factors(self, part: Part, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        index = self.components.get(part.target)
        if index is None:
            return None
        if part.target not in self._learnt:  # a run that goes on: the loop has them
            return torch.zeros(shape[0], len(index)), torch.zeros(len(index), shape[1])
        b, a = self._learnt[part.target]
        axes = self.cuts.get(part.target, {})
        rows, columns = (torch.from_numpy(axes[axis]) if axis in axes else torch.arange(part.shape[axis]) for axis in (0, 1))
        return b[rows][:, index], a[index][:, columns]

    def last(self, build: Builder) -> None:
        for group in units(self.job):
            place = leaving(self.job, group)
            scale = np.zeros(self.job.base.tensor(place.tensor).shape[place.axis], np.float32)
            scale[entries(group, place, self.keep[group.name])] = 1
            build.put(place.tensor, "scale_shift", {"scale": scale}, axis=place.axis)

    def state(self) -> dict[str, torch.Tensor]:
        return {**super().state(), **{f"components/{target}": index for target, index in self.components.items()}}
