"""mhr: a pool of low-rank skills beside each matrix, from which each task mixes its own change, head by head.

    y' = W x + (alpha / rank) B_t A_t x        for x in a row of task t, which the data names in the field "task"
    A_t = sum_s p_ts A_s,  B_t = sum_s p_ts B_s,  p_t = softmax(Z_t) over the skills

With H `heads` the input is cut into H blocks and the output too, and block h of A_t (columns) and of B_t (rows) has weights of its own,
softmax(Z_th). One head is Poly (Ponti et al. 2022, arXiv 2202.13914). Each matrix has its own Z. A_s uniform, B_s zero: the base at the start.

`tune` says what is trained. With a delta that this space made of other tasks (`origin=`), which the new one begins from:

all   skills and routing; without `origin` from scratch
z     the routing only, tasks x heads x skills numbers a matrix (MHR-z)
mu    one low-rank change of each matrix, which begins as the mean of its skills (MHR-mu): no tasks and no router any more, so it folds

Tasks that the earlier delta knew keep their routing, new ones begin at the mean of the skills.

As in the paper's code, A and B have the same heads, Z is uniform up to 0.001, and it learns `z_rate` times as fast as the rest (0.1 beside
0.001; here the optimizer's whole step on Z, decay included, is that many times as long). Not as there: routing is a softmax without noise,
where the code can also learn with Gumbel-sigmoids that are made to sum to one; and where the heads do not divide both sides of a matrix, it
has as many as do.

For one task the change is low-rank: `weft.of_task` makes a delta of it that folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Annotated, Any, Literal

import msgspec
import torch

from ... import xp
from ...delta import MODULE, Builder
from ...engine.loop import Run
from ...engine.routed import beside
from ...errors import MismatchError, UsageError
from ...methods import method
from ...ops import OpEntry, by_task
from .._ranks import Pace
from . import Job, Space
from ._beside import linears, named_tasks
from ._matrices import MatricesConfig


class MHRConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of multi-head routing."""

    skills: Annotated[int, msgspec.Meta(description="low-rank changes in the pool of each matrix", ge=1)] = 8
    heads: Annotated[int, msgspec.Meta(description="blocks of each side with weights of their own; 1: Poly", ge=1)] = 8
    rank: Annotated[int, msgspec.Meta(description="columns of each B, rows of each A", ge=1)] = 1
    alpha: Annotated[float, msgspec.Meta(description="the product is scaled by alpha / rank", gt=0)] = 16.0
    z_rate: Annotated[float, msgspec.Meta(description="learning rate of the routing over that of the skills", gt=0)] = 100.0
    tune: Annotated[Literal["all", "z", "mu"], msgspec.Meta(description="skills and routing, the routing only, or the mean of the skills")] = "all"


@method("space", config=MHRConfig, paper="Caccia et al., 2022, arXiv:2211.03831", formula="y' = W x + s (sum_s p_ts B_s)(sum_s p_ts A_s) x, p_t = softmax(Z_t)")
class MHR(Space):
    """Multi-head adapter routing: tasks mix low-rank skills that they share. With one head Poly, with fewer trained numbers MHR-z and MHR-mu."""

    takes_origin = True

    def __init__(self, cfg: MHRConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        self.frozen = frozenset({"A", "B"}) if cfg.tune == "z" else frozenset()
        self._pace = Pace()
        self._routing: list[str] = []
        if cfg.tune != "all" and job.origin is None:
            raise UsageError(f"tune={cfg.tune} begins from a delta that mhr made of other tasks", hint="origin=DELTA (--origin FILE)")

    def build(self, build: Builder) -> None:
        tasks = [] if self.cfg.tune == "mu" else named_tasks(self.job)
        if self.job.origin is None:
            for module in linears(self.job, self.cfg.targets, self.cfg.exclude):
                heads = gcd(self.cfg.heads, *module.shape)
                fields = by_task.OP.init(module.shape, self.job.gen, rank=self.cfg.rank, tasks=len(tasks), skills=self.cfg.skills, heads=heads)
                build.put(module.target, "by_task", fields, scale=self.cfg.alpha / self.cfg.rank, tasks=tasks)
            return
        for target, op, fields in self._earlier():
            if self.cfg.tune == "mu":
                beside(build, self.job.model, self.job.names, target, fields["A"].mean(0), fields["B"].mean(0), float(op.cfg.get("scale", 1.0)))
            else:
                build.put(target, "by_task", self._for_tasks(tasks, op, fields), **{**op.cfg, "tasks": tasks})

    def _earlier(self) -> list[tuple[str, OpEntry, dict[str, Any]]]:
        """The pools of the delta to begin from: target, op, and its fields as float32 arrays."""
        origin = self.job.origin
        assert origin is not None
        found = []
        for target, entry in sorted(origin.entries.items()):
            for op in entry.ops if target.startswith(MODULE) else ():
                if op.op == "by_task" and "Z" in op.t:
                    found.append((target, op, {name: xp.cast(origin.get(ref.key), "float32") for name, ref in op.t.items()}))
        if not found:
            raise MismatchError(f"the delta to begin from, {origin.id[:12]}, has no skills", hint="one that `--method mhr` made")
        return found

    def _for_tasks(self, tasks: Sequence[str], op: OpEntry, fields: dict[str, Any]) -> dict[str, Any]:
        """A pool with the routing of `tasks`: the earlier one, or nearly even."""
        known = list(by_task.names_of(fields, by_task.OP.config(op.cfg)))
        z = self.job.gen.uniform((len(tasks), *fields["Z"].shape[1:]), 1e-3)
        for number, task in enumerate(tasks):
            if task in known:
                z[number] = fields["Z"][known.index(task)]
        return {**fields, "Z": z}

    def start(self, run: Run) -> None:
        delta, _ = self.job.attached
        self._routing = [op.t["Z"].key for entry in delta.entries.values() for op in entry.ops if op.op == "by_task"]

    def gradients(self, run: Run) -> None:
        self._pace.before(run.tensors, {key: torch.full((1,), self.cfg.z_rate) for key in self._routing})

    def after_step(self, run: Run) -> None:
        self._pace.after(run.tensors)
