"""scalearn: learned scales on what each source adds to the outputs of layers.

Frohmann et al. 2023, arXiv 2310.01217 (ScaLearn). Where a frozen source s adds A_s(h) to what a layer gives for h, the target
task gets sum_s w_s * A_s(h), with w_s trained on its data: for each layer a vector of as many numbers as the layer has outputs, or one
number (`uniform`); `shared` over layers or not. The four variants of the paper are

    ScaLearn            (default)           ScaLearn++          shared
    ScaLearnUniform     uniform             ScaLearnUniform++   uniform, shared: one number for each source in all

The paper's sources are bottleneck adapters. Here they are increments of weights, and for a linear layer the same holds exactly, as
(tau_s h + b_s) scaled is a linear layer of scaled weights: a row of tau_s (a column where it is stored in x out) and the entry of b_s are
scaled by the number of that output. Of embeddings the columns are scaled, of norms the entries, what is more than one live parameter by one
number. One source with scale 1 is that source.

A layer is a module here, so a weight and its bias share a vector, and `shared` means one vector for all layers of so many outputs. Scales
start at 2 / sources, as in the paper (without its noise of 0.001, for nothing here needs to be told apart by chance), and the learning rate is
the paper's. Not followed: dropout of scales (0.3 in three of the four variants), early stopping, and a new head: add one to a source. All rows of
all data count as the target task. `uniform` keeps the ops of deltas; vectors make increments dense. The scales are learned, so no weights are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ..methods import method
from ._method import DataMethod

if TYPE_CHECKING:
    import numpy as np

    from ..engine.increments import Block, Target
    from ._data import Study
    from ._depth import Settings
    from ._learned import Spread

    Array = np.ndarray[Any, Any]


class ScalearnConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `scalearn`."""

    uniform: Annotated[bool, msgspec.Meta(description="One number for each layer and source instead of one for each output.")] = False
    shared: Annotated[bool, msgspec.Meta(description="All layers have the same scales (those with as many outputs, if these are vectors).")] = False
    steps: Annotated[int, msgspec.Meta(ge=0, description="Steps of training, of `batch_size` rows each.")] = 200
    lr: Annotated[float, msgspec.Meta(gt=0, description="Learning rate.")] = 6e-3
    start: Annotated[float | None, msgspec.Meta(description="Where all scales start; none: 2 / sources.")] = None
    seed: Annotated[int, msgspec.Meta(ge=0, description="Seed of the order of the data.")] = 0


@dataclass(frozen=True)
class ScalearnState:
    """For each tensor the scales (models x size) and what they are spread over."""

    scales: dict[str, Array]
    spreads: dict[str, Spread]


@method(
    "merge",
    config=ScalearnConfig,
    paper="Frohmann et al., 2023, arXiv:2310.01217",
    formula="W = W_0 + sum_s diag(w_s) tau_s, w = argmin of the loss on the data",
    varies=("start",),
)
class Scalearn(DataMethod[ScalearnConfig]):
    """The sources' contributions to each output, each with a scale that is learned on data."""

    def problems(self, weights: Sequence[float], cfg: ScalearnConfig) -> list[str]:
        return ["scalearn learns how much each source counts; leave the weights out"] * any(w != 1 for w in weights)

    def fixed(self, cfg: ScalearnConfig) -> dict[str, str]:
        return {"start": "with shared, layers have the same scales"} if cfg.shared else {}

    def weighted(self, cfg: ScalearnConfig) -> bool:
        return cfg.uniform

    def measure(self, study: Study, settings: Settings[ScalearnConfig]) -> ScalearnState:
        """The scales of each source on every tensor."""
        from ._learned import learn

        study.require_labels("scalearn")
        cfg = settings.whole.cfg
        spreads = {name: _spread(study, target, settings.at(target).cfg) for name, target in study.models.targets.items()}
        return ScalearnState(learn(study, spreads, steps=cfg.steps, lr=cfg.lr), spreads)

    def coefficients(self, weights: Sequence[float], cfg: ScalearnConfig, state: ScalearnState, target: Target) -> list[float]:
        return [float(c) for c in state.scales[target.name][:, 0]]

    def merge(self, taus: list[Array], weights: Sequence[float], cfg: ScalearnConfig, state: ScalearnState, block: Block) -> Array:
        import numpy as np

        spread, total = state.spreads[block.target.name], np.zeros(block.shape)
        for tau, scales in zip(taus, state.scales[block.target.name], strict=True):
            by = spread.over(scales, len(block.shape))
            total += (by[block.lo : block.hi] if spread.axis == 0 else by) * tau
        return total


_OUTPUTS = {"linear": 0, "conv1d": 1, "conv": 0, "embedding": 1, "norm": 0, "bias": 0}
"""The axis of a parameter that its module's outputs are along, by the kind of its site."""


def _spread(study: Study, target: Target, cfg: ScalearnConfig) -> Spread:
    """What scales one tensor."""
    from ._learned import Spread

    site = study.site(target)
    axis = None if cfg.uniform or site is None else _OUTPUTS.get(site.kind)
    layer = target.name if site is None else site.module
    start = 2 / len(study.models.updates) if cfg.start is None else cfg.start
    if axis is None:
        return Spread("all" if cfg.shared else layer, start)
    size = target.shape[axis]
    return Spread(f"{size} outputs" if cfg.shared else f"{layer} ({size})", start, axis, size)
