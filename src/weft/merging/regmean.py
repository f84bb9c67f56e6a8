"""regmean: the linear layers whose outputs are nearest to those of every model on that model's own inputs.

Jin et al. 2023, arXiv 2212.09849. With X_i the inputs of a linear layer in model i on its data, G_i = X_i^T X_i / rows, and weights
that add up to 1, the minimum of sum_i w_i ||X_i W - X_i W_i||^2 (W is in x out here) is

    W = (sum_i w_i G_i)^-1 sum_i w_i G_i W_i,        G_i with its off-diagonal entries times `shrink`

All other tensors are averaged. On increments the formula is the same, and it is computed as the average tau plus a correction,

    tau = m + (S + jitter c I)^-1 sum_i w_i G_i (tau_i - m),      m = sum_i w_i tau_i,  S = sum_i w_i G_i,  c = mean of S's diagonal

so that directions in which no input goes are averaged, where S has no inverse, instead of being an error or noise.

Linear layers are those inside the model's layers ("all-linear" of `weft.sites`): the authors too leave out embeddings and heads.
The Gram matrix of a wide layer is large, d_in^2 float64 numbers: those of one model are in memory while it is measured, then they wait on disk.

`shrink`: 0.9 is the paper's value; by default the authors' code leaves the matrices as they are, 1.0. Padding does not count
here; their code takes padded positions for inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from .._fused import Combination, combined
from ..methods import method
from ._method import DataMethod

if TYPE_CHECKING:
    import numpy as np

    from ..engine.increments import Block
    from ._data import Spool, Study
    from ._depth import Settings

    Array = np.ndarray[Any, Any]


class RegmeanConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `regmean`."""

    shrink: Annotated[float, msgspec.Meta(ge=0, le=1, description="Factor on the off-diagonal entries of each model's Gram matrix.")] = 0.9
    jitter: Annotated[float, msgspec.Meta(ge=0, description="Pull towards the average, relative to the mean of the Gram matrices' diagonal.")] = 1e-6


@dataclass(frozen=True)
class RegmeanState:
    """G of each model on disk, and the linear layers' tensors, with whether they are stored in x out."""

    spool: Spool
    transposed: dict[str, bool]


@method(
    "merge",
    config=RegmeanConfig,
    paper="Jin et al., 2023, arXiv:2212.09849",
    formula="W = (sum_i w_i G_i)^-1 sum_i w_i G_i W_i, G_i = X_i^T X_i",
    varies=("shrink", "jitter"),
)
class Regmean(DataMethod[RegmeanConfig]):
    """Linear layers by least squares on each model's inputs, all else averaged."""

    whole = True

    def default_weight(self, count: int) -> float:
        return 1.0 / count

    def problems(self, weights: Sequence[float], cfg: RegmeanConfig) -> list[str]:
        return ["regmean averages: no weight may be negative, and one must be positive"] * (min(weights) < 0 or max(weights) == 0)

    def measure(self, study: Study, settings: Settings[RegmeanConfig]) -> RegmeanState:
        """G of every model for the linear layers that any of them changes."""
        from ..engine.statistics import gathered
        from ..sites import sites
        from ._data import Spool

        linear = {site.name for site in sites(study.model, "all-linear", kinds=("linear", "conv1d"))}
        found = {name: study.site(target) for name, target in study.models.targets.items()}
        chosen = {name: site for name, site in found.items() if site is not None and site.name in linear}
        modules = {name: study.model.get_submodule(site.module) for name, site in chosen.items()}
        spool = Spool()
        for number in range(len(study.models.updates)) if modules else ():
            with study.live(number) as model:
                inputs = (({key: batch[key] for key in ("input_ids", "attention_mask")}, batch["attention_mask"].bool()) for batch in study.batches(number))
                spool.add({name: moment.matrix for name, moment in gathered(model, inputs, modules).items()})
        return RegmeanState(spool, {name: site.kind == "conv1d" for name, site in chosen.items()})

    def merge(self, taus: list[Array], weights: Sequence[float], cfg: RegmeanConfig, state: RegmeanState, block: Block) -> Array:
        import numpy as np

        name = block.target.name
        shares = [w / fsum(weights) for w in weights]
        mean = combined(taus, Combination(shares), 0)
        if name not in state.transposed:
            return mean
        from ..engine.solve import Prior, double

        turned = state.transposed[name]
        gram, pull = np.zeros(()), np.zeros(())
        for number, (tau, share) in enumerate(zip(taus, shares, strict=True)):
            each = state.spool.read(number, name)
            each = share * (cfg.shrink * each + (1 - cfg.shrink) * np.diag(np.diagonal(each)))
            apart = tau - mean
            gram = gram + each
            pull = pull + (apart.T if turned else apart) @ each
        change = Prior.scaled(gram, 1.0, jitter=cfg.jitter).inverse(double(pull)).numpy()
        merged: Array = mean + (change.T if turned else change)
        return merged
