"""diff-vector-transfer: what tuning added to one base, added to another.

Lin et al. 2025, "Efficient Model Development through Fine-tuning Transfer" (arXiv 2503.20110):

    theta_new' = theta_new + alpha (theta_tuned - theta_old)

It works as far as the two bases are linearly connected, a newer version and the older one that it was trained on from, say. See what
`weft.porting.predict` says, and tune on from the result ("recycling then fine-tuning"): that takes fewer steps than from the bare base.

Ops whose increment does not depend on the weights (low-rank, dense, sparse, ...) are the difference vector as they are, and stay small.
The others (a DoRA's magnitude, a permutation, new values from an exact diff, a whole checkpoint) are read as increments on the old
base and become dense, where the base's tensor has changed; where it has not, they too are carried as they are, and the result is
the tuned tensor bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from ..delta import Delta, Entry
from ..engine.increments import independent
from ..methods import method
from ._carry import CarryConfig, Place, carry, movable

if TYPE_CHECKING:
    from ._method import Job


class DiffVectorTransferConfig(CarryConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `diff-vector-transfer`."""

    alpha: Annotated[float, msgspec.Meta(description="How much of the difference is added. New tensors (a head) are never scaled.")] = 1.0


@method(
    "port",
    config=DiffVectorTransferConfig,
    paper="Lin et al., 2025, arXiv:2503.20110",
    formula="theta_new' = theta_new + alpha (theta_tuned - theta_old)",
)
def diff_vector_transfer(job: Job, cfg: DiffVectorTransferConfig) -> Delta:
    """What the update added to the old base, added to the new one."""
    return carry(job, cfg, as_increment, cfg.alpha)


def as_increment(entry: Entry, place: Place, same: bool) -> str:
    """How an entry is carried as a difference: with its own ops where they mean the same there, else dense."""
    if place.takes:
        return "ops" if movable(entry, place) else "dense"
    return "ops" if same or independent(entry.ops) else "dense"
