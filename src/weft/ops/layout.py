"""What fast paths need to know about modules: which side of a stored weight is the input.

linear      weight (out, in)            y = x W^T
conv1d      weight (in, out)            y = x W      (transformers' Conv1D, GPT-2)
embedding   weight (count, width)       y = W[x]
conv        weight (out, in, *kernel)   groups = 1
"""

from __future__ import annotations

from typing import Any


def of(m: Any) -> str | None:
    """The layout of a module's `weight`, or None where no fast path is known."""
    from torch import nn

    if isinstance(m, nn.Linear):
        return "linear"
    if type(m).__name__.endswith("Conv1D") and hasattr(m, "nf"):
        return "conv1d"
    if isinstance(m, nn.Embedding):
        return None if m.max_norm is not None else "embedding"
    if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) and m.groups == 1 and m.padding_mode == "zeros":
        return "conv"
    return None


def product(m: Any, x: Any, a: Any, b: Any) -> Any:
    """What the weight increment b @ a (as stored, flattened to a matrix; a (r, cols), b (rows, r)) adds to the output."""
    from torch.nn import functional as F

    layout = of(m)
    if layout == "linear":
        return F.linear(F.linear(x, a), b)
    if layout == "conv1d":
        return (x @ b) @ a
    if layout == "embedding":
        return F.embedding(x, b, m.padding_idx) @ a
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(m.kernel_size) - 1]
    inner = conv(x, a.reshape(a.shape[0], m.in_channels, *m.kernel_size), None, m.stride, m.padding, m.dilation)
    return conv(inner, b.reshape(*b.shape, *(1,) * len(m.kernel_size)))


def added(m: Any, x: Any, y: Any, a: Any, b: Any, scale: float) -> Any:
    """y + scale * product(m, x, a, b); for a linear layer in one pass over y, which is most of what a thin product costs."""
    import torch
    from torch.nn import functional as F

    layout = of(m)
    if layout not in ("linear", "conv1d"):
        return y + scale * product(m, x, a, b)
    inner, outer = (F.linear(x, a), b.T) if layout == "linear" else (x @ b, a)
    flat = torch.addmm(y.reshape(-1, y.shape[-1]), inner.reshape(-1, inner.shape[-1]), outer, alpha=scale)
    return flat.reshape(y.shape)


def channels(m: Any, y: Any) -> tuple[int, ...]:
    """The shape that broadcasts a vector over output channels of y."""
    return (-1, *(1,) * len(m.kernel_size)) if of(m) == "conv" else (-1,)
