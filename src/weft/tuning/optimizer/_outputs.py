"""The logits of a model whose loss an objective computes: for optimizers that work with the outputs and not only with the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...errors import UsageError


def watch(model: nn.Module, found: Callable[[torch.Tensor], None], whose: str) -> RemovableHandle:
    """Call `found` with the logits of every forward of `model`, with their graph, until the handle is removed.

    UsageError from the forward if the model gives none; `whose` is what needs them.
    """

    def hook(_: nn.Module, args: Any, y: Any) -> None:
        logits = y if isinstance(y, torch.Tensor) else getattr(y, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.ndim < 2 or logits.shape[-1] < 2:
            raise UsageError(f"{whose} needs logits of two classes at least, which {type(model).__name__} does not give", hint="--optimizer adamw")
        found(logits)

    return model.register_forward_hook(hook)


def scored(gradient: torch.Tensor) -> torch.Tensor:
    """Which rows of the logits a loss depends on, from its gradient: not padding, not prompts."""
    return gradient.ne(0).any(-1)
