"""sgd: torch's own stochastic gradient descent, with momentum.

    m <- mu m + g,    p <- p - lr m        nesterov: p <- p - lr (g + mu m)

The steps are as long as the gradients, so no learning rate of another optimizer fits; 0.1 is only a place to start from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
import torch
from torch import nn

from ...errors import UsageError
from ...methods import method
from . import Rates, groups


class SGDConfig(Rates, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of SGD."""

    lr: Annotated[float, msgspec.Meta(description="peak learning rate", gt=0)] = 0.1
    momentum: Annotated[float, msgspec.Meta(description="how much of the last step is kept", ge=0, lt=1)] = 0.9
    nesterov: Annotated[bool, msgspec.Meta(description="look ahead: step along the gradient and the new momentum; needs momentum")] = False
    weight_decay: Annotated[float, msgspec.Meta(description="decay added to the gradient; vectors have none", ge=0)] = 0.0


@method("optimizer", config=SGDConfig, paper="Sutskever et al., 2013", formula="m <- mu m + g; p <- p - lr m")
def sgd(tensors: Mapping[str, nn.Parameter], cfg: SGDConfig) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum, Nesterov's on request."""
    if cfg.nesterov and not cfg.momentum:
        raise UsageError("optimizer.nesterov needs momentum", hint="-p momentum=0.9")
    return torch.optim.SGD(groups(tensors, cfg, decay=cfg.weight_decay), momentum=cfg.momentum, nesterov=cfg.nesterov)
