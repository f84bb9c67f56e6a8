"""sophia: momentum over an estimate of the Hessian's diagonal, each entry of a step at most the learning rate.

Liu, Li, Hall, Liang and Ma 2023, arXiv 2305.14342. At step t, with g the gradient and, in every `every` steps, h^ an estimate of the diagonal:

    m <- b1 m + (1 - b1) g,    h <- b2 h + (1 - b2) h^
    p <- p - lr decay p - lr clip(m / max(gamma h, eps), 1)

gnb          Gauss-Newton-Bartlett. Labels y^ are drawn from the model's own predictions, g^ is the gradient of the mean of their N
             losses, and h^ = N g^ g^: without bias the Gauss-Newton matrix's diagonal, and never negative. For a cross-entropy on logits
hutchinson   h^ = u (H u) with u standard normal: without bias the Hessian's diagonal. For any loss that can be differentiated twice. Where h
             is negative the step is clipped

h starts at zero and is not corrected for it, as with the authors, so first steps are clipped. `gamma` says how much is: they want 10 to 50 % of the
entries not clipped (0.05 to 0.08 for GPT-2). The estimate is made of the whole batch, at the step's own dropout; their code takes the next batch for it, and
after the first `every` steps only. It is the loss's without the guards' terms, which are in g.

Labels for gnb: the positions that are scored are those where the loss has a gradient. Hutchinson's second pass needs attention without fused kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import xp
from ...engine.loop import Part, Run, Stages
from ...methods import method
from . import Rates, groups
from ._outputs import scored, watch

_DIRECTION = 1


class SophiaConfig(Rates, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of Sophia."""

    beta1: Annotated[float, msgspec.Meta(description="decay of the gradient's mean", ge=0, lt=1)] = 0.965
    beta2: Annotated[float, msgspec.Meta(description="decay of the curvature's mean, an estimate", ge=0, lt=1)] = 0.99
    gamma: Annotated[float, msgspec.Meta(description="scale of the curvature; none: 0.05 for gnb, 0.01 for hutchinson", gt=0)] | None = None
    eps: Annotated[float, msgspec.Meta(description="least denominator", gt=0)] = 1e-12
    every: Annotated[int, msgspec.Meta(description="steps from one estimate of the curvature to the next", ge=1)] = 10
    estimator: Annotated[Literal["gnb", "hutchinson"], msgspec.Meta(description="how the curvature is estimated")] = "gnb"
    weight_decay: Annotated[float, msgspec.Meta(description="decoupled decay a step, times the learning rate; vectors have none", ge=0)] = 0.01


@method("optimizer", config=SophiaConfig, paper="Liu et al., 2023, arXiv:2305.14342", formula="p <- p - lr clip(m / max(gamma h, eps), 1)")
def sophia(tensors: Mapping[str, nn.Parameter], cfg: SophiaConfig) -> torch.optim.Optimizer:
    """Clipped second-order steps: momentum over a running estimate of the Hessian's diagonal."""
    return Sophia(groups(tensors, cfg, decay=cfg.weight_decay), cfg)


class Sophia(Stages, torch.optim.Optimizer):
    """See the head of this file. Without the loop, `curvature` takes the estimates."""

    def __init__(self, params: Sequence[dict[str, Any]], cfg: SophiaConfig) -> None:
        super().__init__(params, {})
        self.cfg = cfg
        self.gamma = cfg.gamma or (0.05 if cfg.estimator == "gnb" else 0.01)

    def batches(self, run: Run, parts: Sequence[Part]) -> None:
        if run.step % self.cfg.every == 0:
            estimate = gauss_newton_bartlett if self.cfg.estimator == "gnb" else hutchinson
            with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):  # the step itself draws what it would without this
                self.curvature(estimate(run, parts, [p for p in run.tensors.values() if p.requires_grad]))  # a space may let some sleep

    @torch.no_grad()
    def curvature(self, found: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Take an estimate of the Hessian's diagonal into the average."""
        for p, value in found.items():
            self.state[p].setdefault("curvature", torch.zeros_like(p)).lerp_(value.to(p.dtype), 1 - self.cfg.beta2)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - self.cfg.beta1)
                scale = (self.gamma * state.setdefault("curvature", torch.zeros_like(p))).clamp_min_(self.cfg.eps)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((mean / scale).clamp_(-1, 1), alpha=-group["lr"])
        return loss


def gauss_newton_bartlett(run: Run, parts: Sequence[Part], tensors: Sequence[nn.Parameter]) -> dict[nn.Parameter, torch.Tensor]:
    """N g^ g^ of each tensor, g^ the mean gradient of N losses with labels drawn from the model."""
    logits: list[torch.Tensor] = []
    total, count = [torch.zeros_like(p) for p in tensors], torch.zeros((), device=run.device)
    handle = watch(run.model, logits.append, "sophia with estimator=gnb")
    try:
        for part in parts:
            logits.clear()
            with run.autocast():
                loss = run.objective.loss(run.model, part.batch)
            rows = scored(torch.autograd.grad(loss, logits[-1], retain_graph=True)[0])
            guess = logits[-1][rows].detach().float().softmax(-1)
            pull = torch.zeros_like(logits[-1])
            # the gradient of each cross-entropy with respect to its logits: what was predicted less what was drawn
            pull[rows] = guess.scatter_add(-1, torch.multinomial(guess, 1), -torch.ones_like(guess[:, :1])).to(pull.dtype)
            _add(total, torch.autograd.grad(logits[-1], tensors, pull, allow_unused=True))
            count += rows.sum() if part.share else 0
    finally:
        handle.remove()
    count = run.summed(count).clamp_min(1)
    return {p: run.summed(value).square() / count for p, value in zip(tensors, total, strict=True)}


def hutchinson(run: Run, parts: Sequence[Part], tensors: Sequence[nn.Parameter]) -> dict[nn.Parameter, torch.Tensor]:
    """u (H u) of each tensor, with the same u in all processes."""
    generator = torch.Generator().manual_seed(xp.key(run.key, _DIRECTION) >> 1)
    u = [torch.randn(p.shape, generator=generator).to(p) for p in tensors]
    total = [torch.zeros_like(p) for p in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        for part in parts:
            with run.autocast():
                loss = run.objective.loss(run.model, part.batch) * part.share
            grads = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
            slope = torch.stack([(g * d).sum() for g, d in zip(grads, u, strict=True) if g is not None]).sum()
            if slope.requires_grad:  # else the loss is linear
                _add(total, torch.autograd.grad(slope, tensors, allow_unused=True))
    return {p: d * run.summed(value) for p, d, value in zip(tensors, u, total, strict=True)}


def _add(total: Sequence[torch.Tensor], found: Sequence[torch.Tensor | None]) -> None:
    for sum_, value in zip(total, found, strict=True):
        if value is not None:
            sum_.add_(value)
