"""mtlora: one low-rank change for all tasks in every layer, and one for each task in the last layers.

    w' = w + (alpha / rank) B A                                     everywhere, for all tasks
    y' = w' x + (task_alpha / task_rank) B_t A_t x                  in the last `specific` layers, x in a row of task t

Each row of the data names its task in the field "task". One forward pass serves rows of different tasks: lower layers do not tell them
apart, the last ones do, row by row. A task's loss has no gradient on the B_t and A_t of others. A uniform and B zero everywhere: the base at
the start. With one task the two parts are one low-rank change, their sum.

The paper's backbone has stages, and the specific part is in the last block of each; here there is one stack of layers. Of the forms in its
code, this is the one in which a task's features have both parts ("matrixv2"); ranks (64 and 4), scales (4, whatever the rank) and dropout
are those of its configurations. Its decoders for each task are heads, which belong to the objective.

The part for all tasks can be folded, that of a task once it is chosen (`weft.of_task`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from ...delta import Builder
from ...engine.loop import Run
from ...errors import UsageError
from ...methods import method
from ...ops import by_task, lowrank
from . import Job, Space
from ._beside import linears, named_tasks
from ._matrices import MatricesConfig


class MTLoRAConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of MTLoRA."""

    rank: Annotated[int, msgspec.Meta(description="columns of B, rows of A, for all tasks", ge=1)] = 64
    alpha: Annotated[float, msgspec.Meta(description="the product for all tasks is scaled by alpha / rank", gt=0)] = 256.0
    task_rank: Annotated[int, msgspec.Meta(description="columns of B_t, rows of A_t, for each task", ge=1)] = 4
    task_alpha: Annotated[float, msgspec.Meta(description="the product of a task is scaled by task_alpha / task_rank", gt=0)] = 16.0
    specific: Annotated[int, msgspec.Meta(description="layers, the last ones, that tell tasks apart", ge=1)] = 1
    dropout: Annotated[float, msgspec.Meta(description="share of the products' inputs that are dropped while training", ge=0, lt=1)] = 0.05


@method("space", config=MTLoRAConfig, paper="Agiza, Neseem and Reda, 2024, arXiv:2403.20320", formula="y' = (w + s B A) x + s_t B_t A_t x")
class MTLoRA(Space):
    """Low-rank adaptation for several tasks at once: a part for all of them, and a part for each in the last layers."""

    def __init__(self, cfg: MTLoRAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def build(self, build: Builder) -> None:
        cfg, tasks = self.cfg, named_tasks(self.job)
        for part in self.job.matrices(cfg.targets, cfg.exclude):
            part.put(build, "lowrank", lowrank.OP.init(part.shape, self.job.gen, rank=cfg.rank), scale=cfg.alpha / cfg.rank)
        last = [module for module in linears(self.job, cfg.targets, cfg.exclude) if module.layer is None or module.layer >= module.layers - cfg.specific]
        if not last:
            raise UsageError(f"none of the targets is in the last {cfg.specific} layers, where tasks are told apart", hint="-p specific=N")
        for module in last:
            fields = by_task.OP.init(module.shape, self.job.gen, rank=cfg.task_rank, tasks=len(tasks))
            build.put(module.target, "by_task", fields, scale=cfg.task_alpha / cfg.task_rank, tasks=tasks)

    def start(self, run: Run) -> None:
        self.job.attached[1].dropout = self.cfg.dropout
