"""adadagrad: AdaGrad whose batches grow when the gradient's noise asks for it.

Lau, Liu and Kolar 2024, arXiv 2402.11215. With G the sum of squared gradients so far, entry by entry (`scalar`: one number, the sum of ||g||^2):

    G <- G + g^2,    p <- p - lr g / (sqrt(G) + eps)

Every `every` steps, the norm test (Byrd, Chin, Nocedal and Wu 2012): the variance of a batch's gradient should be at most eta^2 of its square. With S
micro-batches, each with a share w_s of the B examples and gradient g_s, the variance of one example's gradient is estimated as

    v = B (sum_s w_s ||g_s||^2 - ||g||^2) / (S - 1)    and the next batches have at least v / (eta^2 ||g||^2) examples

in multiples of `batch_size`, and up to `largest` of it. They never shrink. The loop goes on by the data: `epochs` and `steps` say how many batches of
`batch_size` there are, and a run with larger ones makes fewer steps; schedules go by the data too. No batch reaches over the end of an epoch.

Of the authors' code the norm test, with AdaGrad and AdaGrad-Norm. It takes gradients example by example with torch.func, from a copy of the model;
here they are those of the step's own micro-batches, at no cost, and each process cuts its step into `pieces` at least. The estimate is as unbiased, and
noisier the fewer pieces there are. Not taken: the inner-product test, and the coordinate-wise test, which wants second moments of every entry.
Where hooks mask gradients, the test is of the gradient as it was before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...engine.loop import Batch, Part, Run, Stages
from ...methods import method
from . import Rates, groups


class AdAdaGradConfig(Rates, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of AdAdaGrad."""

    eps: Annotated[float, msgspec.Meta(description="added to the denominator", gt=0)] = 1e-8
    scalar: Annotated[bool, msgspec.Meta(description="AdaGrad-Norm: one denominator for all entries, from the gradients' lengths")] = False
    eta: Annotated[float, msgspec.Meta(description="largest ratio of the batch gradient's deviation to its length", gt=0)] = 0.5
    every: Annotated[int, msgspec.Meta(description="steps from one test to the next", ge=1)] = 1
    pieces: Annotated[int, msgspec.Meta(description="micro-batches whose gradients are compared, at least", ge=2)] = 4
    largest: Annotated[int, msgspec.Meta(description="most batches that a step may grow to", ge=1)] = 32


@method(
    "optimizer",
    config=AdAdaGradConfig,
    paper="Lau, Liu and Kolar, 2024, arXiv:2402.11215",
    formula="p <- p - lr g / (sqrt(sum g^2) + eps); B <- max(B, v / (eta^2 ||g||^2))",
)
def adadagrad(tensors: Mapping[str, nn.Parameter], cfg: AdAdaGradConfig) -> torch.optim.Optimizer:
    """AdaGrad with batches that grow by the norm test on the gradient's noise."""
    return AdAdaGrad(groups(tensors, cfg), cfg)


class AdAdaGrad(Stages, torch.optim.Optimizer):
    """See the head of this file."""

    def __init__(self, params: Sequence[dict[str, Any]], cfg: AdAdaGradConfig) -> None:
        super().__init__(params, {})
        self.cfg = cfg
        self._listening: list[RemovableHandle] = []
        self._parts: Sequence[Part] = ()
        self._at = -1
        self._spread = torch.zeros(())

    def start(self, run: Run) -> None:
        run.pieces = max(run.pieces, self.cfg.pieces)

    def batches(self, run: Run, parts: Sequence[Part]) -> None:
        """Listen to the gradients of each micro-batch, where a test is due."""
        if run.step % self.cfg.every == 0 and run.width < self.cfg.largest:
            self._parts, self._at, self._spread = parts, -1, torch.zeros((), device=run.device)
            self._listening = [p.register_hook(self._heard) for p in run.tensors.values()]  # type: ignore[no-untyped-call]

    def loss(self, run: Run, batch: Batch) -> None:
        """The next micro-batch begins."""
        self._at += 1

    def _heard(self, gradient: torch.Tensor) -> None:
        share = self._parts[self._at].share
        if share:  # w ||gradient of the part's own loss||^2; what comes here has been multiplied by w
            self._spread += gradient.detach().float().square().sum() / share

    def gradients(self, run: Run) -> None:
        """The norm test."""
        if not self._listening:
            return
        self.close(run)
        processes = run.accelerator.num_processes  # a process's gradients have been multiplied by this, to be averaged
        count = sum(part.share > 0 for part in self._parts)
        examples = sum(len(next(iter(part.batch.values()))) for part in self._parts if part.share)
        facts = run.summed(torch.stack([self._spread / processes**2, *torch.tensor([count, examples]).to(self._spread)]))
        spread, pieces, whole = (float(value) for value in facts)
        square = sum(float(p.grad.float().square().sum()) for p in run.tensors.values() if p.grad is not None)
        if pieces > 1 and square > 0:
            needed = math.ceil(variance(spread, square, pieces, whole) / (self.cfg.eta**2 * square * run.config.batch_size))
            run.width = max(run.width, min(needed, self.cfg.largest, run.per_epoch))

    def close(self, run: Run) -> None:
        while self._listening:
            self._listening.pop().remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(group["lr"], p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.cfg.scalar:
            first = self.param_groups[0]
            first["sum"] = first.get("sum", 0.0) + sum(float(g.float().square().sum()) for _, _, g in moving)
        for lr, p, g in moving:
            if self.cfg.scalar:
                p.sub_(g, alpha=lr / (math.sqrt(self.param_groups[0]["sum"]) + self.cfg.eps))
            else:
                total = self.state[p].setdefault("sum", torch.zeros_like(p)).addcmul_(g, g)
                p.addcdiv_(g, total.sqrt().add_(self.cfg.eps), value=-lr)
        return loss


def variance(spread: float, square: float, pieces: float, examples: float) -> float:
    """How much the gradient of one example varies: the trace of its covariance, estimated from micro-batches; not below 0.

    spread: the sum of w ||g_s||^2 over micro-batches; square: ||g||^2 of the whole; examples: how many they have together
    """
    return max(0.0, examples * (spread - square) / (pieces - 1))
