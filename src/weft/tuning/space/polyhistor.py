"""polyhistor: one hypernetwork writes every task's low-rank change of every matrix, from what it knows of the task.

    y' = W x + (alpha / rank) B_lt A_lt x        for x in a row of task t, which the data names in the field "task"
    A_lt = k_l (x) U_t,  U_t = (sum_e z_te P_e)(sum_e z_te Q_e)        (x): Kronecker; rank x inner times inner x c
    B_lt = h_l (x) V_t,  V_t = (sum_e z_te R_e)(sum_e z_te S_e)        c x inner times inner x rank

z_t, the embedding of a task, has `embedding` numbers. P, Q, R, S (the decomposed hypernetwork), and so the templates U_t and V_t, are
shared by the matrices of one kind in all layers, whatever their widths; k_l and h_l, the scaling kernels, are each matrix's own: width / c
numbers on either side, c being the greatest width that divides those of all. z normal, P and Q such that U_t is about as large as
LoRA's A, kernels near one, S zero: the base at the start. Liu et al. 2022, arXiv 2210.03265 (Polyhistor-Lite).

Trained are embedding x tasks numbers, those of the hypernetwork, 2 embedding inner (rank + c) for each kind, and a few for each matrix: with
another task `embedding` more. The delta has what the hypernetwork wrote: A_lt and B_lt, rank (input + output) numbers for each task
and matrix; for one of the tasks `weft.of_task` makes a low-rank delta that folds.

Not followed: the paper puts adapters with a nonlinearity into the blocks of a hierarchical vision transformer; here the pairs stand
beside linear modules, and kernels scale widths only, not the bottleneck. The defaults are ours. The product of many factors wants a
learning rate no higher than the default.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from math import gcd
from typing import Annotated, Any

import msgspec
import torch
from torch import nn

from ...delta import MODULE, Builder
from ...engine.loop import Run
from ...errors import UsageError
from ...methods import method
from . import Job, Space
from ._beside import Linear, linears, named_tasks
from ._matrices import MatricesConfig


class PolyhistorConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of Polyhistor."""

    rank: Annotated[int, msgspec.Meta(description="columns of B, rows of A: the bottleneck", ge=1)] = 8
    alpha: Annotated[float, msgspec.Meta(description="the product is scaled by alpha / rank", gt=0)] = 16.0
    embedding: Annotated[int, msgspec.Meta(description="numbers that stand for a task", ge=1)] = 16
    inner: Annotated[int, msgspec.Meta(description="rank of what the hypernetwork writes", ge=1)] = 4


@method("space", config=PolyhistorConfig, paper="Liu et al., 2022, arXiv:2210.03265", formula="y' = W x + s (h_l (x) V_t)(k_l (x) U_t) x")
class Polyhistor(Space):
    """Low-rank changes for several tasks, all written by one small hypernetwork and scaled to each matrix."""

    def __init__(self, cfg: PolyhistorConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        self.network: dict[str, nn.Parameter] = {}
        self._modules: list[Linear] = []
        self._hooks: list[Any] = []

    def build(self, build: Builder) -> None:
        cfg, tasks = self.cfg, named_tasks(self.job)
        self._modules = linears(self.job, cfg.targets, cfg.exclude)
        self.network = self._started(len(tasks), gcd(*(side for module in self._modules for side in module.shape)))
        for module in self._modules:
            fields = {name: self.written(module, name).detach().cpu().numpy() for name in ("A", "B")}
            build.put(module.target, "by_task", fields, scale=cfg.alpha / cfg.rank, tasks=tasks)

    def _started(self, tasks: int, width: int) -> dict[str, nn.Parameter]:
        cfg, gen = self.cfg, self.job.gen
        widest = max(side for module in self._modules for side in module.shape)
        size = (cfg.embedding**2 * cfg.inner * widest) ** -0.25
        made = {"z": gen.normal((tasks, cfg.embedding))}
        for kind in dict.fromkeys(kind_of(module) for module in self._modules):
            made |= {
                f"P.{kind}": size * gen.normal((cfg.embedding, cfg.rank, cfg.inner)),
                f"Q.{kind}": size * gen.normal((cfg.embedding, cfg.inner, width)),
                f"R.{kind}": cfg.embedding**-0.5 * gen.normal((cfg.embedding, width, cfg.inner)),
                f"S.{kind}": 0 * gen.normal((cfg.embedding, cfg.inner, cfg.rank)),
            }
        for number, module in enumerate(self._modules):
            out, into = module.shape
            made |= {f"k.{number}": 1 + gen.uniform((into // width,), 0.1), f"h.{number}": 1 + gen.uniform((out // width,), 0.1)}
        device = next(self.job.model.parameters()).device
        return {name: nn.Parameter(torch.from_numpy(value).float().to(device)) for name, value in made.items()}

    def written(self, module: Linear, field: str) -> torch.Tensor:
        """A (tasks x rank x input) or B (tasks x output x rank) of one module, differentiable."""
        net, number = self.network, self._modules.index(module)
        left, right, kernel = ("P", "Q", "k") if field == "A" else ("R", "S", "h")
        first, second = (torch.tensordot(net["z"], net[f"{name}.{kind_of(module)}"], 1) for name in (left, right))
        template = first @ second
        scale = net[f"{kernel}.{number}"]
        wide: torch.Tensor = scale[:, None] * template[:, :, None, :] if field == "A" else scale[:, None, None] * template[:, None]
        return wide.flatten(2) if field == "A" else wide.flatten(1, 2)

    def _places(self) -> list[tuple[Linear, str, nn.Parameter]]:
        """What the ops use of each module: A and B as they are on the model."""
        delta, handle = self.job.attached
        tensors, found = handle.tensors(), []
        for module in self._modules:
            (op,) = delta.entries[module.target].ops
            for field in ("A", "B"):
                value = tensors[op.t[field].key]
                assert isinstance(value, nn.Parameter)
                found.append((module, field, value))
        return found

    def tensors(self) -> dict[str, nn.Parameter]:
        delta, _ = self.job.attached
        ours = {ref.key for target, entry in delta.entries.items() if target.startswith(MODULE) for op in entry.ops for ref in op.t.values()}
        head = {key: value for key, value in super().tensors().items() if key not in ours}
        return {**head, **{f"hypernetwork/{name}": value for name, value in self.network.items()}}

    def start(self, run: Run) -> None:
        if run.accelerator.num_processes > 1:
            raise UsageError("the hypernetwork is trained in one process only", hint="train in one process")
        for module, field, value in self._places():
            value.requires_grad_(True)
            onwards = self._passed_on(partial(self.written, module, field))
            self._hooks.append(value.register_post_accumulate_grad_hook(onwards))  # type: ignore[no-untyped-call]
        self.after_step(run)

    def _passed_on(self, written: Callable[[], torch.Tensor]) -> Callable[[torch.Tensor], None]:
        """Takes the gradient of what was written to the network, at once: so it is there whoever asks for gradients, and how often."""

        def hook(value: torch.Tensor) -> None:
            with torch.enable_grad():
                written().backward(value.grad)  # type: ignore[no-untyped-call]
            value.grad = None

        return hook

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        for module, field, value in self._places():
            value.copy_(self.written(module, field))

    def close(self, run: Run) -> None:
        for hook in self._hooks:
            hook.remove()


def kind_of(module: Linear) -> str:
    """What modules of different layers have in common: their path without the layer's number."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1N", module.path)
