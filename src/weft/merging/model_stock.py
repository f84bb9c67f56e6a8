"""model-stock: the average of the increments, pulled towards the base as far as the models disagree.

Jang et al. 2024, arXiv 2403.19522. Fine-tuned weights lie near a thin shell around a centre that is better than any of
them. On each tensor, the point of the plane of base and models that is closest to the centre follows from the angle
between increments: with k models, c the mean cosine over all pairs of increments, and

    t = k c / (1 + (k - 1) c)
    theta = theta_0 + t mean_i tau_i

it is t of the average and 1 - t of the base. Models that agree (c = 1) are averaged, unrelated ones (c = 0) give the base.

Where the paper is silent: c < 0, which would step away from the average to the other side of the base, counts as 0. A
model whose increment is zero on a tensor did not tune it and has no angle; k, the mean and c are those of the others, and
where one model is left its increment is taken as it is. (mergekit counts the cosine of a zero as 0, so that what only one
of two models changed, say its added head, would be lost; and it lets t be negative.) The paper's "layer" is one tensor here.
The paper has no weights, so none are taken. Products are summed in float64; the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ..methods import method
from ._angles import inner_products
from ._method import LinearMethod

if TYPE_CHECKING:
    import numpy as np

    from ..engine.increments import Increments, Target
    from ._depth import Settings

    Array = np.ndarray[Any, Any]


class ModelStockConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`model-stock` has no options."""


@method(
    "merge",
    config=ModelStockConfig,
    paper="Jang et al., 2024, arXiv:2403.19522",
    formula="theta = theta_0 + t mean_i tau_i, t = k c / (1 + (k - 1) c), c = mean_{i<j} cos(tau_i, tau_j)",
)
class ModelStock(LinearMethod[ModelStockConfig]):
    """The average of the increments, pulled towards the base as far as their angles say."""

    def problems(self, weights: Sequence[float], cfg: ModelStockConfig) -> list[str]:
        found = [f"an angle takes at least 2 models, got {len(weights)}"] if len(weights) < 2 else []
        return found + ["the angles decide how much each model counts; leave the weights out"] * any(w != 1 for w in weights)

    def prepare(self, models: Increments, settings: Settings[ModelStockConfig]) -> dict[str, list[float]]:
        """The coefficient of each model on every tensor."""
        import numpy as np

        products = inner_products(models, lambda block: [tau.astype(np.float64) for tau in models.read_all(block)])
        return {name: _coefficients(gram) for name, gram in products.items()}

    def coefficients(self, weights: Sequence[float], cfg: ModelStockConfig, state: dict[str, list[float]], target: Target) -> list[float]:
        return state[target.name]


def _coefficients(gram: Array) -> list[float]:
    """t / k for each of the k models that change the tensor, 0 for the others."""
    import numpy as np

    norms = np.sqrt(np.diagonal(gram))
    moving = np.flatnonzero(norms)
    k = moving.size
    t = 1.0
    if k > 1:
        pairs = [gram[i, j] / (norms[i] * norms[j]) for i in moving for j in moving if i < j]
        cosine = min(1.0, max(0.0, sum(pairs) / len(pairs)))
        t = k * cosine / (1 + (k - 1) * cosine)
    return [float(t / k) if norm else 0.0 for norm in norms]
