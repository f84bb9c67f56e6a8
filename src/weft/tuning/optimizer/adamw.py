"""adamw: torch's own AdamW, decay on matrices only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
import torch
from torch import nn

from ...methods import method
from . import Rates, groups


class AdamWConfig(Rates, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of AdamW."""

    beta1: Annotated[float, msgspec.Meta(description="decay of the gradient's mean", ge=0, lt=1)] = 0.9
    beta2: Annotated[float, msgspec.Meta(description="decay of the squared gradient's mean", ge=0, lt=1)] = 0.999
    eps: Annotated[float, msgspec.Meta(description="added to the denominator", gt=0)] = 1e-8
    weight_decay: Annotated[float, msgspec.Meta(description="decoupled decay a step, times the learning rate; vectors have none", ge=0)] = 0.01


@method(
    "optimizer",
    config=AdamWConfig,
    paper="Loshchilov and Hutter, 2017, arXiv:1711.05101",
    formula="p <- p - lr (m^ / (sqrt(v^) + eps) + decay p)",
)
def adamw(tensors: Mapping[str, nn.Parameter], cfg: AdamWConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay; none on biases and other vectors."""
    return torch.optim.AdamW(groups(tensors, cfg, decay=cfg.weight_decay), betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)
