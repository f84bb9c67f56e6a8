"""portllm: an update's own ops, on another base, unchanged.

Khan et al. 2024, "PortLLM: Personalizing Evolving Large Language Models with Training-Free and Portable Model Patches"
(arXiv 2410.10870): the LoRA product of an old base is a patch of the newer one,

    theta_new' = theta_new + s B A

For LoRA alone this is `diff-vector-transfer` with alpha = 1. It differs where an op looks at the weights: here it is the op that is
carried, not what it did to the old base. A DoRA's magnitude becomes the norm of the new base's rows, a scale scales them, and no op
becomes dense. New values (an exact diff, a checkpoint) are no patch: they would put the old base's weights back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..base import Base
from ..delta import Delta, Entry
from ..errors import MismatchError
from ..methods import method
from ..ops import get as op_named
from ..ops.chain import SUM
from ._carry import CarryConfig, Place, carry, movable

if TYPE_CHECKING:
    from ._method import Job


class PortLLMConfig(CarryConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `portllm`."""


@method("port", config=PortLLMConfig, paper="Khan et al., 2024, arXiv:2410.10870", formula="theta_new' = op(theta_new), with the ops of the update as they are")
def portllm(job: Job, cfg: PortLLMConfig) -> Delta:
    """The update's own ops, unchanged, on the new base."""
    if isinstance(job.update, Base):
        raise MismatchError(
            f"{job.update.source} is a checkpoint, not a patch: it has no ops to carry",
            hint="--method diff-vector-transfer, or make a patch of it: weft diff BASE CHECKPOINT --as lowrank",
        )
    return carry(job, cfg, as_patch)


def as_patch(entry: Entry, place: Place, same: bool) -> str:
    """Always with its own ops, if they can be."""
    raw = [op.op for outer in entry.ops for op in outer.walk() if op.op != SUM and op_named(op.op).raw]
    if raw and not same:
        return f"its {raw[0]} op would put the old base's values back (diff-vector-transfer carries the difference)"
    if place.takes and not movable(entry, place):
        return "the vocabularies differ, and only low-rank ops can be carried row by row (diff-vector-transfer makes the others dense)"
    return "ops"
