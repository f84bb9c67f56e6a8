"""Borrowing: what a run changes about a model and about torch besides weights, and puts back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter wants a gradient or has one, and no keys and values are kept. Afterwards this and each module's mode are as before."""
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    settings: Any = getattr(model, "config", None)
    cache = getattr(settings, "use_cache", None)
    model.requires_grad_(False)
    for parameter, _, _ in parameters:
        parameter.grad = None
    if cache:
        settings.use_cache = False
    try:
        yield
    finally:
        if cache:
            settings.use_cache = cache
        for parameter, wanted, grad in parameters:
            parameter.requires_grad_(wanted)
            parameter.grad = grad
        for module, training in modes:
            module.training = training


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch's threads inside; None leaves them."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
