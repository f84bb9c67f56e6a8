"""weight-matching: the average of models whose units have first been brought into the order of the base's.

Ainsworth, Hayase and Srinivasa 2022 (Git Re-Basin), arXiv 2209.04836. Hidden units of a network can be reordered without changing
what it computes, so two networks that were trained apart may differ by little more than an order, and their plain average is neither.
With pi_i the order of model i's units in which its weights are closest to those of the base (`weft.engine.matching`),

    theta = theta_0 + sum_i w_i (pi_i(theta_i) - theta_0)

The base is the first model: the others are brought into its order, and what the weights lack to 1 is its share. With the default weights
1 / (n + 1) it is an average of all n + 1. A model that is a reordered base gives the base.

What can be reordered is known for common transformers; `layout` says it for others (see `weft.engine.symmetries`). Tensors of which no
axis is reordered are averaged as they are.

Not followed: the authors wrote layouts by hand for their MLPs, VGGs and ResNets, and had none for attention. Here heads are matched by the
sum of their inner products over queries, keys, values and outputs. The paper's merge of many models (each in turn against the mean of
the others) is left out: all are matched with the base. The averages of a batch norm's statistics are not those of the averaged network:
measure them anew on data, as after any averaging (REPAIR, Jordan et al. 2022, arXiv 2211.08403).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from ..methods import method
from ._method import MergeMethod

if TYPE_CHECKING:
    import numpy as np

    from ..engine.increments import Block, Increments, Target
    from ._aligned import Aligned
    from ._depth import Settings

    Array = np.ndarray[Any, Any]


class WeightMatchingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `weight-matching`."""

    layout: Annotated[
        dict[str, str] | Literal["chain"] | None,
        msgspec.Meta(description="Which units each tensor's axes count, for models that are not known; or that their layers follow each other (chain)."),
    ] = None
    sweeps: Annotated[int, msgspec.Meta(ge=1, description="How often each group of units is matched at most.")] = 100
    seed: Annotated[int, msgspec.Meta(ge=0, description="Of the order in which groups of units are matched.")] = 0


@method(
    "merge",
    config=WeightMatchingConfig,
    paper="Ainsworth et al., 2022, arXiv:2209.04836",
    formula="theta = theta_0 + sum_i w_i (pi_i(theta_i) - theta_0), pi_i = argmax <theta_0, pi(theta_i)>, w_i = 1 / (n + 1) by default",
)
class WeightMatching(MergeMethod[WeightMatchingConfig]):
    """The average of models whose units have been brought into the base's order."""

    whole = True
    reads = False

    def default_weight(self, count: int) -> float:
        return 1.0 / (count + 1)

    def prepare(self, models: Increments, settings: Settings[WeightMatchingConfig]) -> Aligned:
        """The models in the base's order."""
        from ._aligned import Aligned

        cfg = settings.whole.cfg
        return Aligned.of(models, cfg.layout, cfg.seed, cfg.sweeps)

    def targets(self, targets: Sequence[Target], state: Aligned) -> list[Target]:
        return [*targets, *state.targets()]

    def merge(self, taus: list[Array], weights: Sequence[float], cfg: WeightMatchingConfig, state: Aligned, block: Block) -> Array:
        import numpy as np

        start = state.start(block.target.name)
        total = np.zeros(block.shape)
        for number, w in enumerate(weights):
            total += w * (state.values(number, block.target.name) - start)
        return total
