"""adafactor: torch's own Adafactor. The squared gradients of a matrix are kept as a row and a column.

    R <- b R + (1 - b) mean over columns of g^2,    C likewise over rows,    b = 1 - t^beta2_decay
    u = g / sqrt(R C / mean R),    p <- p - min(lr, 1 / sqrt(t)) max(1e-3, rms(p)) u / max(1, rms(u) / clip)

Shazeer and Stern 2018, arXiv 1804.04235. Steps are in proportion to the tensor's own size, so the learning rate is a share of it,
and that of another optimizer does not fit. No momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
import torch
from torch import nn

from ...methods import method
from . import Rates, groups


class AdafactorConfig(Rates, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of Adafactor."""

    lr: Annotated[float, msgspec.Meta(description="peak learning rate, relative to the size of each tensor", gt=0)] = 0.01
    beta2_decay: Annotated[float, msgspec.Meta(description="exponent with which the averages lengthen", lt=0)] = -0.8
    clip: Annotated[float, msgspec.Meta(description="largest root mean square of a step before the learning rate", ge=1)] = 1.0
    weight_decay: Annotated[float, msgspec.Meta(description="decoupled decay a step, times the learning rate; vectors have none", ge=0)] = 0.0


@method(
    "optimizer",
    config=AdafactorConfig,
    paper="Shazeer and Stern, 2018, arXiv:1804.04235",
    formula="p <- p - lr max(1e-3, rms(p)) g / sqrt(R C / mean R), its rms at most clip",
)
def adafactor(tensors: Mapping[str, nn.Parameter], cfg: AdafactorConfig) -> torch.optim.Optimizer:
    """Adam without momentum whose second moments are factored; its state is hardly larger than a row and a column."""
    return torch.optim.Adafactor(groups(tensors, cfg, decay=cfg.weight_decay), beta2_decay=cfg.beta2_decay, d=cfg.clip)
