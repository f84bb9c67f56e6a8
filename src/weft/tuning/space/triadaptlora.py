"""triadaptlora: a low-rank change of triangular factors whose rank grows where the change is large.

    w' = w + (alpha / target_rank) L U        L (rows x r) lower, U (r x columns) upper triangular: L_ij = 0 for j > i, U_ij = 0 for j < i

Any matrix of rank r with factors B A has such a pair with the same product (but for exchanges of rows), so nothing is lost, and r (r - 1)
numbers less are trained. U starts uniform and L zero, so w' = w at the start and each new pair of a column of L with a row of U adds
nothing when it joins.

A matrix's importance is its change's Frobenius norm over the root of the number of its entries. From the share `begin` of the run to
`until`, every `interval` steps, those may grow by one whose importance is at least a threshold: `theta` of the largest, with theta rising
evenly from `low` to `high` over that time (the paper's linear threshold); the most important first, as many as a budget allows that rises
evenly to `target_rank` for each matrix on average. The total stays within that budget, which need not be used up.

Our reading of the paper, which comes without code: where it leaves open what the threshold is a share of, and what the budget is over time,
that is what is said here. New pairs warm up over `restart` steps, as in increlora.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
import torch

from ...delta import Builder, Delta
from ...engine.loop import Run
from ...errors import UsageError
from ...methods import method
from ...ops import lowrank
from ...ops.op import flat_shape
from .._ranks import ALWAYS, NEVER, Group, Pace, budget, compacted, components, grown, speeds, spread
from . import Job, Space, inner
from ._matrices import MatricesConfig


class TriAdaptLoRAConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of TriAdaptLoRA."""

    rank: Annotated[int, msgspec.Meta(description="rank of each matrix at the start", ge=1)] = 1
    target_rank: Annotated[float, msgspec.Meta(description="the most at the end, on average over the matrices", gt=0)] = 8.0
    capacity: Annotated[int, msgspec.Meta(description="the most of a matrix; 0: three times the average at the end", ge=0)] = 0
    alpha: Annotated[float, msgspec.Meta(description="the change is scaled by alpha / target_rank", gt=0)] = 16.0
    begin: Annotated[float, msgspec.Meta(description="share of the run before any rank grows", ge=0, lt=1)] = 0.1
    until: Annotated[float, msgspec.Meta(description="share of the run after which none does", gt=0, le=1)] = 0.6
    interval: Annotated[int, msgspec.Meta(description="steps from one growth to the next", ge=1)] = 10
    low: Annotated[float, msgspec.Meta(description="share of the largest importance that lets a matrix grow, at first", ge=0, le=1)] = 0.0
    high: Annotated[float, msgspec.Meta(description="the same, at last", ge=0, le=1)] = 0.9
    restart: Annotated[int, msgspec.Meta(description="steps over which a new pair gets up to speed", ge=0)] = 10


@method("space", config=TriAdaptLoRAConfig, paper="Liang, Wang and Zeng, 2025, arXiv:2501.08008", formula="w' = w + (alpha / target_rank) L U")
class TriAdaptLoRA(Space):
    """Low-rank adaptation with triangular factors; matrices whose change is large get more rank."""

    def __init__(self, cfg: TriAdaptLoRAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        self.capacity = max(cfg.capacity or round(3 * cfg.target_rank), cfg.rank)
        if not cfg.rank <= cfg.target_rank <= self.capacity:
            raise UsageError(f"ranks grow from rank to target_rank and at most to capacity, got {cfg.rank}, {cfg.target_rank} and {self.capacity}")
        self.since: dict[str, torch.Tensor] = {}
        self._groups: list[Group] = []
        self._pace = Pace()

    def build(self, build: Builder) -> None:
        for part in self.job.matrices(self.cfg.targets, self.cfg.exclude):
            fields: dict[str, Any] = lowrank.OP.init(part.shape, self.job.gen, rank=min(self.capacity, *flat_shape(part.shape)))
            fields["A"] = np.triu(fields["A"])
            part.put(build, "lowrank", fields, scale=self.cfg.alpha / self.cfg.target_rank)

    def start(self, run: Run) -> None:
        self._groups = components(self.job.attached[0])
        for group in self._groups:
            if group.name not in self.since:
                self.since[group.name] = torch.full((group.rank,), NEVER)
                self.since[group.name][: self.cfg.rank] = ALWAYS

    def ranks(self) -> dict[str, int]:
        """The rank of each group."""
        return {name: int((since < NEVER).sum()) for name, since in self.since.items()}

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        speed = {}
        for group in self._groups:
            since = speeds(self.since[group.name], run.step, self.cfg.restart)
            for field, key, axis in group.axes():
                triangle = torch.ones(run.tensors[key].shape)
                speed[key] = spread(since, 2, axis) * (triangle.tril() if field == "B" else triangle.triu())
        self._pace.before(run.tensors, speed)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        self._pace.after(run.tensors)
        first, last = round(self.cfg.begin * run.total), round(self.cfg.until * run.total)
        if not first < run.place <= last or (run.step % self.cfg.interval and run.place < last):
            return
        importance = {}
        for group in self._groups:
            b, a = run.tensors[group.keys["B"]], run.tensors[group.keys["A"]]
            importance[group.name] = float((inner(b, a, b, a).clamp(min=0) / group.size).sqrt())
        threshold = (self.cfg.low + (self.cfg.high - self.cfg.low) * (run.place - first) / (last - first)) * max(importance.values())
        ranks = self.ranks()
        allowed = budget(run.place, self.cfg.rank * len(ranks), round(self.cfg.target_rank * len(ranks)), first, last)
        chosen = {name: value for name, value in importance.items() if value >= threshold}
        most = {group.name: min(group.rank, ranks[group.name] + 1) for group in self._groups}
        for name, rank in grown(chosen, ranks, most, allowed - sum(ranks.values())).items():
            self.since[name][ranks[name] : rank] = run.step

    def finish(self) -> Delta:
        return compacted(super().finish(), {name: since < NEVER for name, since in self.since.items()})

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.since)

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.since = {name: value.cpu() for name, value in state.items()}
