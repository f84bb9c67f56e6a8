"""task-arithmetic: scale * sum_i w_i tau_i, the sum of the task vectors.

    theta = theta_0 + scale * sum_i w_i (theta_i - theta_0)

Ilharco et al. 2022, arXiv 2212.04089. Weights are 1 by default; a negative weight makes the model forget that task. The
paper finds `scale` on validation data, between 0.3 and 0.5 for eight tasks as a rule; 1 adds the increments as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec

from ..methods import method
from ._method import LinearMethod

if TYPE_CHECKING:
    from ..engine.increments import Target


class TaskArithmeticConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `task-arithmetic`."""

    scale: Annotated[float, msgspec.Meta(description="Factor on the sum of the increments.")] = 1.0


@method(
    "merge",
    config=TaskArithmeticConfig,
    paper="Ilharco et al., 2022, arXiv:2212.04089",
    formula="theta = theta_0 + scale sum_i w_i tau_i",
    varies=("scale",),
)
class TaskArithmetic(LinearMethod[TaskArithmeticConfig]):
    """The sum of the increments, each with a weight."""

    def coefficients(self, weights: Sequence[float], cfg: TaskArithmeticConfig, state: None, target: Target) -> list[float]:
        return [cfg.scale * w for w in weights]
