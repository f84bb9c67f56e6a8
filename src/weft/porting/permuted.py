"""permuted: diff-vector-transfer between bases whose units are not in the same order.

Two bases that were trained apart may do the same with their hidden units, heads and channels in different orders; then no straight line
connects them, and a difference added entry by entry lands on the wrong units. As in Git Re-Basin (Ainsworth et al. 2022, arXiv
2209.04836), the old base's units are matched to the new one's by their weights, and the difference takes the order P found:

    theta_new' = theta_new + alpha P(theta_tuned - theta_old)

Low-rank updates stay low rank: the columns of A and the rows of B are reordered. A new tensor (a head) or an op on activations does not
say which of its axes count units of the residual stream; it is refused when that stream is reordered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from ..delta import Delta
from ..errors import MismatchError
from ..methods import method
from ._carry import CarryConfig, Place, Places, carry, place, renamer
from .diff_vector_transfer import as_increment

if TYPE_CHECKING:
    from ..engine.permutations import Group
    from ._method import Job


class PermutedConfig(CarryConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `permuted`."""

    alpha: Annotated[float, msgspec.Meta(description="How much of the difference is added.")] = 1.0
    layout: Annotated[
        Literal["known", "chain"], msgspec.Meta(description="Where units lie: as the architecture is known to have them, or layers that follow each other.")
    ] = "known"
    sweeps: Annotated[int, msgspec.Meta(ge=1, description="How often each group of units is matched at most.")] = 100


@method(
    "port",
    config=PermutedConfig,
    paper="Ainsworth et al., 2022, arXiv:2209.04836; Lin et al., 2025, arXiv:2503.20110",
    formula="theta_new' = theta_new + alpha P(theta_tuned - theta_old), P = argmin ||theta_new - P(theta_old)||",
)
def permuted(job: Job, cfg: PermutedConfig) -> Delta:
    """What the update added to the old base, in the order of the new base's units, added to that."""
    from ..engine.matching import matched
    from ..engine.permutations import axis_orders, by_tensor
    from ..engine.symmetries import RESIDUAL, symmetries

    groups = symmetries(job.source, None if cfg.layout == "known" else cfg.layout)
    both, _ = place(job.source.tensors, job.source, job.target, renamer(cfg.rename, list(job.source.tensors)))
    theirs = {name: job.target.tensors[each.new] for name, each in both.items() if not each.takes}
    groups = _within(groups, theirs.keys())
    order = matched(groups, theirs, job.source.tensors, seed=job.seed, sweeps=cfg.sweeps)
    places = by_tensor(groups)

    def move(found: Places) -> Places:
        out = {}
        for name, each in found.items():
            axes = axis_orders(job.source.tensors[name].shape, places.get(name, ()), order)
            out[name] = Place(each.old, each.new, {**{axis: index for axis, index in axes.items() if _moves(index)}, **each.takes})
        return out

    moved = [group.name for group in groups if _moves(order[group.name])]
    outside = [name for name, e in job.update.entries.items() if e.base is None] if isinstance(job.update, Delta) else []
    if RESIDUAL in moved and outside:
        raise MismatchError(
            f"{outside[0]}: the bases have their residual streams in different orders, and it is not known which axes of it count those units",
            hint="leave it out: delta.only([...]), or --method trans-lora",
        )
    made = carry(job, cfg, as_increment, cfg.alpha, move)
    return replace(made, notes={**made.notes, "reordered": len(moved), "groups": len(groups)})


def _within(groups: list[Group], names: object) -> list[Group]:
    """The groups, of the tensors that both bases have alike."""
    known = set(names)  # type: ignore[call-overload]
    kept = [replace(group, places=tuple(each for each in group.places if each.tensor in known)) for group in groups]
    return [group for group in kept if group.places]


def _moves(index: object) -> bool:
    import numpy as np

    return not np.array_equal(np.asarray(index), np.arange(len(np.asarray(index))))
