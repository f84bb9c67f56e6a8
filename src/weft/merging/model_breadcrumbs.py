"""model-breadcrumbs: leave out the largest and the smallest entries of every increment, tensor by tensor, and add up.

Davari and Belilovsky 2023, arXiv 2312.06795. For models i = 1..n with increments tau_i and weights w_i, and each tensor of
d entries: a = floor(top * d) entries are too large (outliers), b = max(1, floor(density * d)) of the others are kept, the
largest (all of them if there are no more), and the rest is too small (noise):

    m_ij = [h_i <= |tau_ij| <= H_i],  H_i = the (a + 1)-th, h_i = the min(a + b, d)-th largest magnitude
    theta = theta_0 + scale * sum_i w_i m_i tau_i

The paper's beta and gamma stand for the tail of noise and the tail of outliers. Entries exactly as large as H_i or h_i are all
kept, so that no tensor is lost for being small or uniform: not one of a single entry, not one whose entries are all alike. But
an increment that is 0 everywhere except at a entries or fewer is all outliers: merge sparse updates with top = 0. Magnitudes
of F64 tensors are compared as float32. density = 1 with top = 0 is `task-arithmetic`.

Not followed: the authors' code applies its masks to each row along the last axis, the paper to each layer. It leaves
scalars alone; here that follows. The paper finds `scale` on validation data, about 0.3 to 0.5 for several tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from .._fused import Combination
from ..engine.select import largest_magnitudes
from ..engine.stream import in_threads
from ..methods import method
from ._method import MergeMethod

if TYPE_CHECKING:
    import numpy as np

    from ..engine.increments import Increments, Target
    from ._depth import Settings

    Array = np.ndarray[Any, Any]

    Limits = tuple[float, float]


class ModelBreadcrumbsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `model-breadcrumbs`."""

    density: Annotated[float, msgspec.Meta(gt=0, le=1, description="Share of the entries of each tensor that is kept, the largest after `top`.")] = 0.15
    top: Annotated[float, msgspec.Meta(ge=0, lt=1, description="Share of the entries of each tensor that is left out as too large.")] = 0.01
    scale: Annotated[float, msgspec.Meta(description="Factor on the sum of the increments.")] = 1.0


@method(
    "merge",
    config=ModelBreadcrumbsConfig,
    paper="Davari and Belilovsky, 2023, arXiv:2312.06795",
    formula="theta = theta_0 + scale sum_i w_i m_i tau_i, m_i = [h_i <= |tau_i| <= H_i]",
    varies=("density", "top", "scale"),
)
class ModelBreadcrumbs(MergeMethod[ModelBreadcrumbsConfig]):
    """Leave out the outliers and the noise of each increment, add up."""

    def weighted(self, cfg: ModelBreadcrumbsConfig) -> bool:
        return cfg.density == 1 and cfg.top == 0

    def coefficients(self, weights: Sequence[float], cfg: ModelBreadcrumbsConfig, state: Any, target: Target) -> list[float]:
        return _coefficients(weights, cfg)

    def prepare(self, models: Increments, settings: Settings[ModelBreadcrumbsConfig]) -> dict[str, list[Limits]]:
        """(h_i, H_i) for each tensor."""
        found = in_threads((partial(_limits, models, target, settings.at(target).cfg) for target in models.targets.values()), models.threads)
        return dict(zip(models.targets, found, strict=True))

    def combination(self, weights: Sequence[float], cfg: ModelBreadcrumbsConfig, state: dict[str, list[Limits]], target: Target) -> Combination:
        least, most = zip(*state[target.name], strict=True)
        return Combination(_coefficients(weights, cfg), list(least), list(most))


def _coefficients(weights: Sequence[float], cfg: ModelBreadcrumbsConfig) -> list[float]:
    return [cfg.scale * w for w in weights]


def _limits(models: Increments, target: Target, cfg: ModelBreadcrumbsConfig) -> list[Limits]:
    """The limits of each model on one tensor; (0, 0) where it changes nothing."""

    outliers = min(int(cfg.top * target.size), max(0, target.size - 1))  # a share just below 1 can round to all
    last = min(outliers + max(1, int(cfg.density * target.size)), target.size)

    def limits(number: int) -> Limits:
        if not target.size or not models.touches(number, target.name):
            return 0.0, 0.0
        ranks = [last] * (last < target.size) + [outliers + 1] * (outliers > 0)
        found = dict(zip(ranks, largest_magnitudes(models.each(number, target), ranks, target.size, models.close(number, target)), strict=True))
        return float(found[last].value) if last in found else 0.0, float(found[outliers + 1].value) if outliers else inf

    return [limits(number) for number in range(len(models.updates))]
