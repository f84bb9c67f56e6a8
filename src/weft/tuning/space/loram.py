"""loram: low-rank factors are trained on a pruned model, and used on the whole one.

    training:   w_p' = w_p + (alpha / rank) B_p A_p        w_p: w without the rows and columns of pruned heads and hidden units
    the delta:  w' = w + (alpha / rank) B A                B_p and A_p with zeros where rows and columns were pruned

Of the heads (key/value heads with all their queries) and hidden units of each layer the share `ratio` is pruned: those with the smallest
weights, or at random; the first and last `spare` layers stay whole. The pruned model may be trained whole for `align` steps on general text
first (`align_data`, rows as for causal-lm), so that what it has lost is not what the factors learn to make up for; this is never part
of the delta. On the run's own data it would learn the task, and leave the factors nothing. Zhang et al. 2025, arXiv 2502.13533.

prune=unstructured sets the share `ratio` of each target's entries to zero, the smallest ones, as long as the training takes; the factors
have their full size and are used as they are. It saves no memory here.

Memory while training is that of the pruned model. Not followed: the paper's structured pruning asks LLM-Pruner (gradients of the whole
model), its alignment is done once for all tasks, and it can quantise what is left. A run that goes on aligns anew. Known
architectures are those of `weft.engine.symmetries`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch

from ...engine.events import Events
from ...engine.loop import LoopConfig, Run, train
from ...errors import UsageError
from ...methods import get, method
from . import Job, Part
from ._slim import Keep, Slim, SlimConfig, parameter, share_kept, sizes, units


class LoRAMConfig(SlimConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of LoRAM."""

    ratio: Annotated[float, msgspec.Meta(description="share that is pruned of each layer's heads and hidden units, or of each target", ge=0, lt=1)] = 0.65
    prune: Annotated[Literal["size", "random", "unstructured"], msgspec.Meta(description="which units go, or single entries")] = "size"
    spare: Annotated[int, msgspec.Meta(description="layers at either end that stay whole (of the stack, if it has more)", ge=0)] = 0
    align: Annotated[int, msgspec.Meta(description="steps in which the whole pruned model is trained first", ge=0)] = 0
    align_data: Annotated[str, msgspec.Meta(description="file with the text for these steps")] = ""
    align_lr: Annotated[float, msgspec.Meta(description="learning rate of these steps, with AdamW", gt=0)] = 1e-4


@method(
    "space", config=LoRAMConfig, paper="Zhang et al., 2025, arXiv:2502.13533", formula="w' = w + (alpha / rank) B A, trained as w_p + (alpha / rank) B_p A_p"
)
class LoRAM(Slim):
    """Low-rank adaptation trained on a pruned model, for the whole one."""

    def __init__(self, cfg: LoRAMConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        if bool(cfg.align) != bool(cfg.align_data):
            raise UsageError("to align takes steps and text", hint="-p align=200 -p align_data=TEXT.jsonl")

    def chosen(self, parts: Sequence[Part]) -> Keep:
        if self.cfg.prune == "unstructured":
            return {}
        groups = units(self.job)
        layers = sorted({number for group in groups for number in _layer(group.name)})
        spared = {*layers[: self.cfg.spare], *layers[len(layers) - self.cfg.spare :]}
        keep = {}
        for group in groups:
            if not spared & set(_layer(group.name)):
                score = self.job.gen.uniform((group.size,), 1.0) if self.cfg.prune == "random" else sizes(self.job, group)
                keep[group.name] = np.sort(np.argsort(-score, kind="stable")[: share_kept(group.size, self.cfg.ratio)])
        return keep

    @torch.no_grad()
    def _emptied(self) -> None:
        """Zeros in place of the smallest entries of each target."""
        for part in self.job.matrices(self.cfg.targets, self.cfg.exclude):
            if part.at is not None:
                raise UsageError(f"{part.target} holds several matrices, of which none is pruned by itself", hint=f"-p exclude={part.site.role}")
            flat = parameter(self.job, part.target)[2].data.view(-1)
            flat[flat.abs().argsort(stable=True)[: round(self.cfg.ratio * flat.numel())]] = 0

    def settle(self) -> None:
        if self.cfg.prune == "unstructured":
            self._emptied()
        if not self.cfg.align:
            return
        wanted = get("objective", "causal-lm")
        text = wanted.run(wanted.config(), self.job.base, self.job.base.tokenizer(), self.job.rows(self.cfg.align_data))
        values = {name: value for name, value in self.job.model.named_parameters() if value.is_floating_point()}
        dtypes = {name: value.dtype for name, value in values.items()}
        for value in values.values():
            value.data = value.data.float()
            value.requires_grad_(True)
        loop = LoopConfig(steps=self.cfg.align, batch_size=self.job.loop.batch_size, micro_batch_size=self.job.loop.micro_batch_size)
        optimizer = torch.optim.AdamW(list(values.values()), lr=self.cfg.align_lr, weight_decay=0.0)
        train(Run(self.job.model, text, values, optimizer, lambda place, total: 1.0, loop, self.job.gen.seed), Events())
        for name, value in values.items():
            value.requires_grad_(False)
            value.grad = None
            value.data = value.data.to(dtypes[name])


def _layer(name: str) -> list[int]:
    return [int(piece) for piece in name.split(".") if piece.isdecimal()]
