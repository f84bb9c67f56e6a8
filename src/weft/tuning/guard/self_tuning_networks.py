"""self-tuning-networks: L2 strengths that are learned within the run, from rows that are kept out of the training.

    t(lambda + e) = t + U * (V e)            the best response of each trained tensor, linear in e; V e scales its rows
    t, U, V       descend the training loss + penalty(lambda + e) at t(lambda + e), with e ~ N(0, scale^2) drawn anew each step
    lambda        descends the loss of the held-out rows at t(lambda), through U and V; t moves along its response

lambda holds the logs of two strengths, that on changed tensors and that on new ones (a head), of the penalty of the guard `l2`:
exp(lambda_1) / 2 sum ||w' - w||^2 + exp(lambda_2) / 2 sum ||w'_new||^2. They start where `strength` and `added` say, stay there for the
first `warmup` of the run, and are then moved by Adam after every `every`-th step; the delta's notes have where they ended. U starts at zero,
so with scale 0 this is the guard `l2`. U and its moments take three times the memory of what is trained.

The response is centred at the current lambda (as Bae and Grosse do it, 2020, arXiv 2010.13514), so that what is trained is the delta itself. Not
followed: the scale is fixed where the paper tunes it too, with the entropy of e as its reward; one e a step, not one an example; dropout
and augmentation are not tuned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch

from ... import xp
from ...engine.data import shuffled
from ...engine.loop import Batch, Part, Run
from ...errors import UsageError
from ...methods import method
from . import Guard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..space import Job, Space

_KNOBS = 2


class SelfTuningNetworksConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of self-tuning networks."""

    strength: Annotated[float, msgspec.Meta(description="pull towards the base's weights, at the start", gt=0)] = 0.1
    added: Annotated[float, msgspec.Meta(description="pull of new tensors (a head) towards zero, at the start", gt=0)] = 0.01
    holdout: Annotated[float, msgspec.Meta(description="share of the rows that is not trained on: strengths are judged by them", gt=0, lt=1)] = 0.2
    scale: Annotated[float, msgspec.Meta(description="standard deviation of the logs of the strengths that are tried out", ge=0)] = 0.5
    warmup: Annotated[float, msgspec.Meta(description="share of the run before the strengths move", ge=0, lt=1)] = 0.1
    every: Annotated[int, msgspec.Meta(description="steps between two moves", ge=1)] = 2
    lr: Annotated[float, msgspec.Meta(description="rate of the logs of the strengths; it follows the schedule of the run", ge=0)] = 0.003


@method(
    "guard",
    config=SelfTuningNetworksConfig,
    paper="MacKay, Vicol, Lorraine, Duvenaud and Grosse, 2019, arXiv:1903.03088",
    formula="t(lambda + e) = t + U * (V e); lambda descends the held-out loss",
)
class SelfTuningNetworks(Guard):
    """Strengths of the L2 guard that tune themselves, by a best response that is learned along."""

    def __init__(self, cfg: SelfTuningNetworksConfig, job: Job, space: Space) -> None:
        super().__init__(cfg, job, space)
        self.cfg = cfg
        self._kept: dict[str, torch.Tensor] = {}
        self._centre: dict[str, torch.Tensor] = {}
        self._e = torch.zeros(_KNOBS)
        goal = job.goal
        if goal is None or len(goal.examples) < 2:
            raise UsageError("self-tuning networks keep rows out of the training, and need two at least")
        order = shuffled(len(goal.examples), job.gen.seed)
        count = min(max(1, round(cfg.holdout * len(order))), len(order) - 1)
        self.held = [goal.examples[k] for k in sorted(order[:count])]
        goal.examples = [goal.examples[k] for k in sorted(order[count:])]

    def start(self, run: Run) -> None:
        if self._kept:
            return
        self._keep("log", torch.tensor([self.cfg.strength, self.cfg.added], device=run.device).log())
        gen = torch.Generator().manual_seed(xp.key(run.seed, 1) >> 1)
        for name, value in run.tensors.items():
            self._keep(f"U/{name}", torch.zeros_like(value, dtype=torch.float32))
            self._keep(f"V/{name}", torch.randn(*(value.shape[:1] or (1,)), _KNOBS, generator=gen).to(run.device))

    def batches(self, run: Run, parts: Sequence[Part]) -> None:
        gen = torch.Generator().manual_seed(xp.key(run.key, 1) >> 1)
        self._e = self.cfg.scale * torch.randn(_KNOBS, generator=gen).to(run.device)
        self._centre = {name: value.detach().clone() for name, value in run.tensors.items()}
        self._move(run, self._e)

    def loss(self, run: Run, batch: Batch) -> torch.Tensor | None:
        strengths = (self._kept["log"] + self._e).exp()
        return torch.stack([value * (strengths[int(new)] / 2) for _, value, new in self.space.squares()]).sum()

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        rate = float(run.optimizer.param_groups[0]["lr"])
        for name, value in run.tensors.items():
            if value.grad is not None:
                slope, u, v = value.grad.float(), self._kept[f"U/{name}"], self._kept[f"V/{name}"]
                of_v = _by_row(slope * u)[:, None] * self._e
                self._adam(f"U/{name}", slope * _along(v @ self._e, u), rate)
                self._adam(f"V/{name}", of_v, rate)
            value.copy_(self._centre[name])

    def after_step(self, run: Run) -> None:
        if run.place < self.cfg.warmup * run.total or run.step % self.cfg.every:
            return
        size = min(run.config.micro_batch_size or run.config.batch_size, len(self.held))
        chosen = [(run.step // self.cfg.every * size + k) % len(self.held) for k in range(size)]
        batch = run.objective.collate([self.held[k] for k in chosen], [xp.key(run.key, k) for k in chosen])
        run.model.eval()
        with run.autocast():
            loss = run.objective.loss(run.model, {name: value.to(run.device) for name, value in batch.items()})
        slopes = torch.autograd.grad(loss, list(run.tensors.values()), allow_unused=True)
        run.model.train()
        with torch.no_grad():
            whole = torch.zeros(_KNOBS, device=run.device)
            for name, slope in zip(run.tensors, slopes, strict=True):
                if slope is not None:
                    whole += _by_row(slope.float() * self._kept[f"U/{name}"]) @ self._kept[f"V/{name}"]
            before = self._kept["log"].clone()
            group = run.optimizer.param_groups[0]
            self._adam("log", whole, self.cfg.lr * group["lr"] / group["initial_lr"])
            self._move(run, self._kept["log"] - before)

    def state(self) -> dict[str, torch.Tensor]:
        return self._kept

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self._kept = state

    def notes(self) -> dict[str, Any]:
        if not self._kept:
            return {}
        strength, added = self._kept["log"].exp().tolist()
        return {"strength": strength, "added": added}

    def _keep(self, name: str, value: torch.Tensor) -> None:
        """A tensor that is trained here, with Adam's moments and its number of steps."""
        self._kept |= {name: value, f"{name}.m": torch.zeros_like(value), f"{name}.v": torch.zeros_like(value), f"{name}.n": torch.zeros(())}

    def _adam(self, name: str, slope: torch.Tensor, rate: float) -> None:
        value, m, v, n = (self._kept[f"{name}{part}"] for part in ("", ".m", ".v", ".n"))
        n += 1
        m.lerp_(slope, 0.1)
        v.lerp_(slope.square(), 0.001)
        value -= rate * (m / (1 - 0.9 ** float(n))) / ((v / (1 - 0.999 ** float(n))).sqrt() + 1e-8)

    @torch.no_grad()
    def _move(self, run: Run, by: torch.Tensor) -> None:
        """Every trained tensor along its response."""
        for name, value in run.tensors.items():
            u = self._kept[f"U/{name}"]
            if u.shape != value.shape:
                raise UsageError(f"{name} changes its shape while it is trained, so it has no response to strengths", hint="another space, or the guard l2")
            value.add_((u * _along(self._kept[f"V/{name}"] @ by, u)).to(value.dtype))


def _by_row(value: torch.Tensor) -> torch.Tensor:
    """Sums over all axes but the first."""
    return value.reshape(*(value.shape[:1] or (1,)), -1).sum(1)


def _along(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number a row, shaped to go with a tensor of these rows."""
    return rows.reshape(*like.shape[:1], *(1,) * (like.dim() - 1))
