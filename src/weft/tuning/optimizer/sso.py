"""sso: several steps on a surrogate of the loss for each gradient of the loss itself.

Target-based surrogates, Lavington et al. 2023, arXiv 2302.02607. With z(p) the model's logits for a batch, z_t those at the step's beginning, and
G_i the gradient of row i's loss with respect to its logits there, a step minimises, by `inner` steps of gradient descent,

    L(p) = mean over scored rows i of  <G_i, z_i(p)> + ||z_i(p) - z_t,i||^2 / (2 eta)

whose minimum over all z is a gradient step of length eta on the logits. Where the loss is 1/eta-smooth in the logits, L + constant is never below it; for
cross-entropy that is so for eta up to 2. The first inner step is the loss's own gradient: with inner = 1 this is SGD. The others need passes through
the model but no new gradient of the loss; each sees the hooks' terms and masks and is clipped, as any gradient. They see the same dropout as the first.

It pays where the loss is what costs (a simulator, a reward model, labels that are asked for), not where a pass through the model is.
Not followed: the authors' line search in the inner steps (Armijo, with a first step of 10), so the learning rate is that of SGD, and eta's
schedules. Their code minimises <G, z> / eta + ||z - z_t||^2: the same up to a factor, with 1 / (2 eta) for eta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...engine.loop import Part, Run, Stages, backward, settle
from ...errors import UsageError
from ...methods import method
from . import Rates, groups
from ._outputs import scored, watch


class SSOConfig(Rates, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of SSO."""

    lr: Annotated[float, msgspec.Meta(description="peak learning rate of the inner steps", gt=0)] = 0.1
    inner: Annotated[int, msgspec.Meta(description="steps for each gradient of the loss; 1: SGD", ge=1)] = 5
    eta: Annotated[float, msgspec.Meta(description="step on the logits that the surrogate is minimal at", gt=0)] = 1.0


@method(
    "optimizer",
    config=SSOConfig,
    paper="Lavington et al., 2023, arXiv:2302.02607",
    formula="p <- argmin mean <dl/dz, z(p)> + ||z(p) - z||^2 / (2 eta), by a few gradient steps",
)
def sso(tensors: Mapping[str, nn.Parameter], cfg: SSOConfig) -> torch.optim.Optimizer:
    """Many cheap steps for each gradient of the loss, on a surrogate in the space of the logits."""
    return SSO(groups(tensors, cfg), cfg)


class SSO(Stages, torch.optim.Optimizer):
    """See the head of this file. Works in the loop only: its steps need the batch."""

    def __init__(self, params: Sequence[dict[str, Any]], cfg: SSOConfig) -> None:
        super().__init__(params, {})
        self.cfg = cfg
        self._run: Run | None = None
        self._parts: Sequence[Part] = ()
        self._logits: list[torch.Tensor] = []
        self._random: list[list[torch.Tensor]] = []
        self._listening: list[RemovableHandle] = []

    def batches(self, run: Run, parts: Sequence[Part]) -> None:
        """Listen to the forwards of the step, for logits and the state of the random numbers."""
        self._run, self._parts, self._logits, self._random = run, parts, [], []

        def found(logits: torch.Tensor) -> None:
            logits.retain_grad()
            self._logits.append(logits)

        before = run.model.register_forward_pre_hook(lambda *_: self._random.append(_random(run)))
        self._listening = [before, watch(run.model, found, "sso")]

    def gradients(self, run: Run) -> None:
        self.close(run)

    def close(self, run: Run) -> None:
        while self._listening:
            self._listening.pop().remove()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The inner steps; the gradient of the first is there."""
        run, parts = self._run, self._parts
        if run is None:
            raise UsageError("sso works in the training loop only", hint="weft.tune(..., optimizer='sso')")
        if len(self._logits) != len(parts):
            raise UsageError(f"sso: the objective runs the model {len(self._logits)} times for {len(parts)} micro-batches, not once for each")
        self._descend()
        processes = run.accelerator.num_processes
        kept = {part: _Kept(z, part.share * processes, random) for part, z, random in zip(parts, self._logits, self._random, strict=True)}
        self._logits, self._random = [], []  # the graphs of the first pass

        def surrogate(model: nn.Module, part: Part) -> torch.Tensor:
            with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
                kept[part].repeat(run)
                now: list[torch.Tensor] = []
                handle = watch(run.model, now.append, "sso")
                try:
                    run.objective.loss(model, part.batch)
                finally:
                    handle.remove()
            return kept[part].loss(now[-1], self.cfg.eta)

        for _ in range(1, self.cfg.inner):
            self.zero_grad(set_to_none=True)
            backward(run, parts, surrogate)
            settle(run)
            self._descend()
        return None

    @torch.no_grad()
    def _descend(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])


class _Kept:
    """Of one micro-batch: the logits and their gradients at the step's beginning, at the rows that are scored, and the random numbers' state."""

    def __init__(self, logits: torch.Tensor, weight: float, random: list[torch.Tensor]) -> None:
        gradient = torch.zeros_like(logits) if logits.grad is None else logits.grad
        self.rows = scored(gradient)
        self.start = logits.detach()[self.rows].float()
        self.pull = gradient[self.rows].float() / (weight or 1.0)
        self.random = random

    def repeat(self, run: Run) -> None:
        """Draw what the first pass drew."""
        torch.set_rng_state(self.random[0])
        if len(self.random) > 1:
            torch.cuda.set_rng_state(self.random[1], run.device)

    def loss(self, logits: torch.Tensor, eta: float) -> torch.Tensor:
        """The surrogate; `pull` has the mean over rows in it."""
        now = logits[self.rows].float()
        return (self.pull * now).sum() + (now - self.start).square().sum() / (2 * eta * max(1, len(now)))


def _random(run: Run) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(run.device)] if run.device.type == "cuda" else [])]
