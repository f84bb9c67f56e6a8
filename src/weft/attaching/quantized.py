"""Linear modules whose frozen weight is kept in fewer bits (see `weft.engine.quantizing`), and how everybody else reads such a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UsageError


def values(w: torch.Tensor) -> torch.Tensor:
    """A weight as plain numbers in its dtype: torchao's quantised tensors are decoded, any other is returned as it is."""
    if hasattr(w, "get_original_weight"):  # its NF4 tensors, whose `dequantize` is something else
        return w.get_original_weight()  # type: ignore[no-any-return]
    return w.dequantize() if hasattr(w, "qdata") else w


def require_numbers(model: nn.Module) -> None:
    """UsageError for a model with quantised weights: for what needs weights themselves, or their gradients."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UsageError("this needs the model's own weights or their gradients, which quantised ones do not give", hint="leave out quantize (--quantize)")


class QuantizedLinear(nn.Linear):
    """A linear module with a quantised weight. The graph keeps the bits and not the decoded numbers, which the backward pass makes anew."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if values(weight) is weight:  # an attached op has put a plain one in its place
            return F.linear(x, weight, self.bias)
        y: torch.Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x W^T for a W that takes no gradient and is decoded where it is needed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, values(weight).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        return grad @ values(ctx.weight).to(grad.dtype), None
