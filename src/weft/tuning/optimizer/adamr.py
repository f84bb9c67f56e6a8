"""adamr: Adam with decay towards where the run starts, so that what is learnt can be thinned out.

DAREx-L2 of Deng et al. 2024, arXiv 2410.09344: a delta whose entries have a smaller mean and variance loses less when most of
them are dropped (`dare`, `darex-q`). At step t, with theta_0 the tensors as they are before the first step, g the gradient,
m and v Adam's averages, m^ and v^ these without bias, and vbar the mean of v^ over the entries of all tensors:

    theta <- theta - min(1, lr decay / sqrt(vbar)) (theta - theta_0)
    theta <- theta - lr m^ / (sqrt(v^) + eps)

Dividing by sqrt(vbar) is the "stable" decay of Xie et al. 2020, arXiv 2011.11152: Adam's step does not get smaller with the
gradient, so that a decay beside it should not either. `norm` = "l1" puts the sign of theta - theta_0 in place of
the difference.

theta_0 is the base's weight in the space `full`, and what a new tensor (a head, the factors of LoRA) starts from elsewhere.
It is kept beside the tensors, one copy in all, and is no part of a saved state: a run that is resumed starts from the same.
Not followed: the code copies the model's start at every step; nothing keeps its decay from going past theta_0 when gradients
are small, which is what the 1 is for (with "l1" the step stops at theta_0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import sqrt
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import nn

from ...methods import method
from . import Rates, groups


class AdamRConfig(Rates, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of AdamR."""

    beta1: Annotated[float, msgspec.Meta(description="decay of the gradient's mean", ge=0, lt=1)] = 0.9
    beta2: Annotated[float, msgspec.Meta(description="decay of the squared gradient's mean", ge=0, lt=1)] = 0.999
    eps: Annotated[float, msgspec.Meta(description="added to the denominator", gt=0)] = 1e-8
    decay: Annotated[float, msgspec.Meta(description="pull towards the start a step, times the learning rate, over the root mean square gradient", ge=0)] = 1e-4
    norm: Annotated[Literal["l2", "l1"], msgspec.Meta(description="pull in proportion to the distance, or at the same pace for every entry")] = "l2"


@method(
    "optimizer",
    config=AdamRConfig,
    paper="Deng et al., 2024, arXiv:2410.09344",
    formula="theta <- theta - lr decay / sqrt(mean v^) (theta - theta_0) - lr m^ / (sqrt(v^) + eps)",
)
def adamr(tensors: Mapping[str, nn.Parameter], cfg: AdamRConfig) -> torch.optim.Optimizer:
    """Adam with decay towards the weights that training starts from."""
    return AdamR(groups(tensors, cfg), cfg)


class AdamR(torch.optim.Optimizer):
    """See the head of this file. Sparse gradients are not taken; a tensor without a gradient stays as it is."""

    def __init__(self, tensors: Iterable[Any], cfg: AdamRConfig) -> None:
        super().__init__(tensors, {})
        self._cfg = cfg
        self._start = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        cfg = self._cfg
        moving = [(group["lr"], p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        squares: list[torch.Tensor] = []
        for _, p in moving:
            state = self.state[p]
            if not state:
                state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - cfg.beta1)
            state["square"].mul_(cfg.beta2).addcmul_(p.grad, p.grad, value=1 - cfg.beta2)
            squares.append(state["square"].sum(dtype=torch.float32) / (1 - cfg.beta2 ** state["step"]))
        root = sqrt(float(torch.stack(squares).sum()) / sum(p.numel() for _, p in moving)) if moving else 0.0
        for lr, p in moving:
            state = self.state[p]
            pull, away = lr * cfg.decay / root if root else 0.0, p - self._start[p]
            p.sub_(away.clamp(-pull, pull) if cfg.norm == "l1" else min(1.0, pull) * away)
            scale = (state["square"] / (1 - cfg.beta2 ** state["step"])).sqrt_().add_(cfg.eps)
            p.addcdiv_(state["mean"], scale, value=-lr / (1 - cfg.beta1 ** state["step"]))
        return loss
