"""increlora: a low-rank change that begins small and gets more components where they matter.

    w' = w + (alpha / target_rank) P diag(lam) Q        P, Q normal (0.02), lam zero

Every matrix starts with `rank` components. From the share `begin` of the run on, every `interval` steps, the matrices with the highest
scores get one more, as many as a budget allows that rises evenly until, at the share `until` of the run, there are `target_rank` for each
matrix on average (at most `capacity` for any). A matrix's score is the sum over its components of |w dL/dw| of lam, of its mean over the
column of P and of that over the row of Q, smoothed and times its uncertainty. A new component moves at full speed only after `restart`
steps of its own.

With `ahead` the next component of each matrix is already there with lam = 1e-5, and its P and Q learn (advance learning), so that what it
joins with points somewhere; adding it then changes nothing. This makes the start differ from w, by less than 1e-5 of a component. What
never joined is not written.

Not as in the paper's code: the score there is of the product P diag(lam) Q and its gradient, which has the size of w; the budget decides
how many matrices grow at a time (there: a fixed number of them); the scale is fixed (there: alpha over the rank at the time), so that
growing leaves outputs as they are; clipping sees the gradients of what lives only.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch

from ...delta import Builder, Delta
from ...engine.loop import Batch, Run
from ...errors import UsageError
from ...methods import method
from ...ops import svd
from ...ops.op import flat_shape
from .._ranks import ALWAYS, NEVER, Group, Importance, Pace, budget, compacted, components, grown, speeds, spread, triplet_scores
from . import Job, Space
from ._matrices import MatricesConfig
from .adalora import departure

_RESERVED = 1e-5
"""lam of the component that is next: enough for its P and Q to have a gradient."""


class IncreLoRAConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of IncreLoRA."""

    rank: Annotated[int, msgspec.Meta(description="components of each matrix at the start", ge=1)] = 1
    target_rank: Annotated[float, msgspec.Meta(description="components of each matrix at the end, on average", gt=0)] = 8.0
    capacity: Annotated[int, msgspec.Meta(description="the most components of a matrix; 0: three times the average at the end", ge=0)] = 0
    alpha: Annotated[float, msgspec.Meta(description="the change is scaled by alpha / target_rank", gt=0)] = 16.0
    begin: Annotated[float, msgspec.Meta(description="share of the run before any is added", ge=0, lt=1)] = 0.1
    until: Annotated[float, msgspec.Meta(description="share of the run by which all are there", gt=0, le=1)] = 0.6
    interval: Annotated[int, msgspec.Meta(description="steps from one addition to the next", ge=1)] = 10
    restart: Annotated[int, msgspec.Meta(description="steps over which a new component gets up to speed", ge=0)] = 10
    ahead: Annotated[bool, msgspec.Meta(description="let the next component of each matrix learn before it joins")] = True
    smoothing: Annotated[float, msgspec.Meta(description="smoothing of the importance", ge=0, lt=1)] = 0.85
    doubt: Annotated[float, msgspec.Meta(description="smoothing of its uncertainty", ge=0, lt=1)] = 0.85
    orthogonal: Annotated[float, msgspec.Meta(description="weight of the penalty that keeps P and Q near orthogonal", ge=0)] = 0.1


@method("space", config=IncreLoRAConfig, paper="Zhang et al., 2023, arXiv:2308.12043", formula="w' = w + (alpha / target_rank) P diag(lam) Q")
class IncreLoRA(Space):
    """Low-rank adaptation that adds components where they matter until a budget is used."""

    def __init__(self, cfg: IncreLoRAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        self.capacity = max(cfg.capacity or round(3 * cfg.target_rank), cfg.rank)
        if not cfg.rank <= cfg.target_rank <= self.capacity:
            raise UsageError(f"ranks grow from rank to target_rank and at most to capacity, got {cfg.rank}, {cfg.target_rank} and {self.capacity}")
        self.importance = Importance(cfg.smoothing, cfg.doubt)
        self.since: dict[str, torch.Tensor] = {}
        """Of each group, the steps since which its components live, and (`/next`) since which their P and Q learn."""
        self._groups: list[Group] = []
        self._pace = Pace()

    def build(self, build: Builder) -> None:
        for part in self.job.matrices(self.cfg.targets, self.cfg.exclude):
            rank = min(self.capacity, *flat_shape(part.shape))
            fields = svd.OP.init(part.shape, self.job.gen, rank=rank)
            if self.cfg.ahead and self.cfg.rank < rank:
                fields["lam"][self.cfg.rank] = _RESERVED
            part.put(build, "svd", fields, scale=self.cfg.alpha / self.cfg.target_rank)

    def start(self, run: Run) -> None:
        self._groups = components(self.job.attached[0])
        for group in self._groups:
            if group.name not in self.since:
                self.since[group.name] = since = torch.full((group.rank,), NEVER)
                since[: self.cfg.rank] = ALWAYS
                self.since[f"{group.name}/next"] = since.clone()
                if self.cfg.ahead:
                    self.since[f"{group.name}/next"][self.cfg.rank : self.cfg.rank + 1] = ALWAYS

    def ranks(self) -> dict[str, int]:
        """How many components of each group live."""
        return {group.name: int((self.since[group.name] < NEVER).sum()) for group in self._groups}

    def loss(self, run: Run, batch: Batch) -> torch.Tensor | None:
        if not self.cfg.orthogonal:
            return None
        terms = []
        for group in self._groups:
            learns = self.since[f"{group.name}/next"] < NEVER
            for field, axis in (("P", 1), ("Q", 0)):
                terms.append(departure(run.tensors[group.keys[field]].index_select(axis, learns.nonzero().flatten().to(run.device)), axis))
        return self.cfg.orthogonal * torch.stack(terms).mean()

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        speed = {}
        for group in self._groups:
            for field, key, axis in group.axes():
                since = self.since[group.name if field == "lam" else f"{group.name}/next"]
                speed[key] = spread(speeds(since, run.step, self.cfg.restart), run.tensors[key].ndim, axis)
        self._pace.before(run.tensors, speed)
        total = sum(self.ranks().values())
        if total < self._goal():
            for group in self._groups:
                self.importance.add(group.name, triplet_scores(group, lambda key: _sensitivity(run.tensors[key]))[self.since[group.name] < NEVER].sum())

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        self._pace.after(run.tensors)
        first, last = round(self.cfg.begin * run.total), round(self.cfg.until * run.total)
        ranks, goal = self.ranks(), self._goal()
        total = sum(ranks.values())
        if total < goal and run.place > first and (run.step % self.cfg.interval == 0 or run.place >= last):
            room = budget(run.place, self.cfg.rank * len(self._groups), goal, first, last) - total
            scores = {group.name: float(self.importance(group.name)) for group in self._groups}
            new = grown(scores, ranks, {group.name: group.rank for group in self._groups}, room)
            for group in self._groups:
                self._join(run, group, ranks[group.name], new[group.name], full=sum(new.values()) == goal)

    def _goal(self) -> int:
        return round(self.cfg.target_rank * len(self._groups))

    def _join(self, run: Run, group: Group, old: int, new: int, *, full: bool) -> None:
        """Let components up to the number `new` live, and the one after them learn ahead; `full`: no other will ever join."""
        lives, learns, lam = self.since[group.name], self.since[f"{group.name}/next"], run.tensors[group.keys["lam"]]
        lives[old:new] = run.step
        learns[old:new] = torch.minimum(learns[old:new], lives[old:new])
        if full:
            learns[new:] = NEVER
            lam[new:] = 0.0
        elif self.cfg.ahead and new > old and new < group.rank:
            learns[new], lam[new] = run.step, _RESERVED

    def finish(self) -> Delta:
        return compacted(super().finish(), {group.name: self.since[group.name] < NEVER for group in self._groups})

    def state(self) -> dict[str, torch.Tensor]:
        return {**self.importance.state(), **{f"since/{name}": value for name, value in self.since.items()}}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.importance.load(state)
        self.since = {name.removeprefix("since/"): value.cpu() for name, value in state.items() if name.startswith("since/")}


def _sensitivity(value: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(value) if value.grad is None else (value * value.grad).abs()
