"""linear: sum_i w_i tau_i, the weighted average of the increments.

    theta = theta_0 + sum_i w_i (theta_i - theta_0)

With the default weights 1/n this is the average of n models ("model soup", Wortsman et al. 2022, arXiv 2203.05482). Weights
are used as given: they need not add up to 1, and what is missing to 1 is the base's share. A tensor that a model does
not change counts as an increment of zero; so does an added tensor (a classification head) that a model does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import TYPE_CHECKING, Annotated

import msgspec

from ..methods import method
from ._method import LinearMethod

if TYPE_CHECKING:
    from ..engine.increments import Target


class LinearConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `linear`."""

    normalize: Annotated[bool, msgspec.Meta(description="Divide the weights by their sum, so that they add up to 1.")] = False


@method(
    "merge",
    config=LinearConfig,
    paper="Wortsman et al., 2022, arXiv:2203.05482",
    formula="theta = theta_0 + sum_i w_i tau_i, w_i = 1/n by default",
)
class Linear(LinearMethod[LinearConfig]):
    """The weighted average of the increments."""

    def default_weight(self, count: int) -> float:
        return 1.0 / count

    def problems(self, weights: Sequence[float], cfg: LinearConfig) -> list[str]:
        return ["normalize: the weights add up to 0"] if cfg.normalize and fsum(weights) == 0 else []

    def coefficients(self, weights: Sequence[float], cfg: LinearConfig, state: None, target: Target) -> list[float]:
        total = fsum(weights) if cfg.normalize else 1.0
        return [w / total for w in weights]
