"""pst: pruning while tuning, with an importance that is itself of low rank.

    w' = M (w + (alpha / rank) B A)        M keeps the share `density` of each matrix, where the importance is largest:
    importance = |w + (alpha / rank) B A| + data (P Q + r 1^T + 1 c^T)

P (rows x rank), Q (rank x columns), r and c learn what the data says of an entry. Their gradient is straight through M: that of the loss
with respect to w', times w + (alpha / rank) B A, summed as they are. So movement pruning's score, a number for each entry, takes
rank (rows + columns) + rows + columns numbers. Every `every` steps the mask is made anew; the number of entries stays the same.
Li et al. 2022, arXiv 2205.11005. A and P are uniform, B, Q, r and c zero. The start is the base pruned by magnitude, not the base.

Gradients and moments exist for these small tensors alone; the gradient of one matrix at a time is made, used and dropped.
P, Q, r and c are not part of the delta: it has B, A and which entries are zero.

Not followed: the code raises the sparsity from zero by a cubic schedule; here it is the same at every step. It multiplies a matrix that
it stores; here what is pruned is assigned zero, so that it is zero to the bit. Linear layers only.

Size: 4 rank (rows + columns) bytes a matrix, and 8 plus the base's width for each pruned entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from torch import nn

from ... import xp
from ...attaching.quantized import values
from ...delta import Builder, Delta
from ...engine.loop import Run
from ...errors import UsageError
from ...methods import method
from ...ops import lowrank
from ...stored import hold, numpy_dtype
from . import Job, Part
from ._masked import Fixed


class PSTConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of PST."""

    targets: Annotated[tuple[str, ...], msgspec.Meta(description="what to change: roles, module names, globs, all-linear")] = ("all-linear",)
    exclude: Annotated[tuple[str, ...], msgspec.Meta(description="what to leave out of the targets")] = ()
    density: Annotated[float, msgspec.Meta(description="share of each matrix that stays", gt=0, lt=1)] = 0.5
    rank: Annotated[int, msgspec.Meta(description="of the increment and of the importance", ge=1)] = 8
    alpha: Annotated[float, msgspec.Meta(description="the increment is scaled by alpha / rank", gt=0)] = 16.0
    data: Annotated[float, msgspec.Meta(description="weight of what is learnt in the importance", ge=0)] = 1.0
    every: Annotated[int, msgspec.Meta(description="steps after which the mask is made anew", ge=1)] = 1


@dataclass
class Importance:
    """What is learnt about the importance of one matrix's entries."""

    part: Part
    p: nn.Parameter
    q: nn.Parameter
    r: nn.Parameter
    c: nn.Parameter

    def value(self) -> torch.Tensor:
        return self.p @ self.q + self.r[:, None] + self.c

    def learn(self, grad: torch.Tensor) -> None:
        """Adds the gradient of P Q + r 1^T + 1 c^T, given that of the whole."""
        for parameter, own in ((self.p, grad @ self.q.T), (self.q, self.p.T @ grad), (self.r, grad.sum(1)), (self.c, grad.sum(0))):
            parameter.grad = own if parameter.grad is None else parameter.grad + own


@method("space", config=PSTConfig, paper="Li et al., 2022, arXiv:2205.11005", formula="w' = M (w + (alpha / rank) B A), M from |w + B A| + P Q + r + c")
class PST(Fixed):
    """Prunes while it tunes: a low-rank increment, and a mask from a low-rank importance."""

    lr = 1e-3

    def __init__(self, cfg: PSTConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        self.scale = cfg.alpha / cfg.rank
        self.all: list[Importance] = []
        self._hooks: list[Any] = []

    def build(self, build: Builder) -> None:
        device = next(self.job.model.parameters()).device
        for part in self.job.parts(self.cfg.targets, self.cfg.exclude, kinds=("linear", "conv1d")):
            places = self.job.names.live(part.target)
            if part.at is not None or len(places) != 1 or places[0].at is not None or places[0].part is not None:
                raise UsageError(f"{part.target} is laid out differently in the model than in the checkpoint", hint=f"exclude={part.target}")
            w = self.job.weight(part)
            (rows, columns), rank = w.shape, self.cfg.rank
            start = [self.job.gen.uniform((rows, rank), rank**-0.5), *(np.zeros(shape, np.float32) for shape in ((rank, columns), (rows,), (columns,)))]
            self.all.append(Importance(part, *(nn.Parameter(torch.from_numpy(values).to(device)) for values in start)))
            index = self._pruned(w.abs())
            part.put(build, "lowrank", lowrank.OP.init(part.shape, self.job.gen, rank=rank), scale=self.scale)
            zeros = xp.cast(torch.zeros(index.numel()), str(numpy_dtype(self.job.base.tensor(part.target).dtype)))
            part.put(build, "assign", {"index": index.numpy(), "values": zeros})

    def tensors(self) -> dict[str, nn.Parameter]:
        learnt = {f"{each.part.target}//importance.{name}": getattr(each, name) for each in self.all for name in "pqrc"}
        return {**super().tensors(), **learnt}

    def start(self, run: Run) -> None:
        super().start(run)
        if run.accelerator.num_processes > 1:
            raise UsageError("the importance is learnt in one process only", hint="train in one process")
        for each in self.all:
            self._hooks.append(self.job.model.get_submodule(each.part.site.module).register_forward_hook(self._listener(each)))

    def close(self, run: Run) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def after_step(self, run: Run) -> None:
        if run.step % self.cfg.every == 0:
            self._mask()

    def state(self) -> dict[str, torch.Tensor]:
        return {f"index/{number}": self._index(each) for number, each in enumerate(self.all)}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        for number, each in enumerate(self.all):
            self._index(each).copy_(state[f"index/{number}"])

    def finish(self) -> Delta:
        delta = super().finish()
        now = {delta.entries[each.part.target].ops[-1].t["index"].key: hold(self._index(each).cpu()) for each in self.all}
        return replace(delta, tensors={**delta.tensors, **now})

    def _listener(self, each: Importance) -> Callable[..., None]:
        """A hook on the module: where its output's gradient is known, that of w' is G^T X."""

        def forward(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                x = inputs[0].detach()
                output.register_hook(lambda grad: self._learn(each, x, grad))  # type: ignore[no-untyped-call]

        return forward

    @torch.no_grad()
    def _learn(self, each: Importance, x: torch.Tensor, grad: torch.Tensor) -> None:
        x, grad = x.reshape(-1, x.shape[-1]).float(), grad.reshape(-1, grad.shape[-1]).float()
        dense = x.T @ grad if each.part.site.kind == "conv1d" else grad.T @ x
        each.learn(self.cfg.data * dense * self._now(each))

    @torch.no_grad()
    def _now(self, each: Importance) -> torch.Tensor:
        """w + (alpha / rank) B A."""
        delta, handle = self.job.attached
        tensors, op = handle.tensors(), delta.entries[each.part.target].ops[0]
        w = self.job.model.get_submodule(each.part.site.module)._parameters[each.part.site.param]
        assert w is not None
        return values(w).float() + self.scale * (tensors[op.t["B"].key] @ tensors[op.t["A"].key]).float()

    @torch.no_grad()
    def _mask(self) -> None:
        for each in self.all:
            self._index(each).copy_(self._pruned(self._now(each).abs() + self.cfg.data * each.value()))

    def _index(self, each: Importance) -> torch.Tensor:
        delta, handle = self.job.attached
        return handle.tensors()[delta.entries[each.part.target].ops[-1].t["index"].key]

    def _pruned(self, importance: torch.Tensor) -> torch.Tensor:
        """Where the importance is smallest: the positions that become zero."""
        flat = importance.reshape(-1)
        many = flat.numel() - max(1, round(self.cfg.density * flat.numel()))
        if not many:
            return flat.new_zeros(0, dtype=torch.int64)
        limit = flat.kthvalue(many).values
        gone = flat < limit
        equal = (flat == limit).nonzero()[:, 0]  # of which the first stay
        gone[equal[len(equal) - (many - int(gone.sum())) :]] = True
        return gone.nonzero()[:, 0]
