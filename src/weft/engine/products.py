"""How products of matrices are computed while a model runs: the precision of float32 ones, and 16-bit ones where the processor has none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


@contextmanager
def products(precision: str, device: torch.device) -> Iterator[dict[str, float]]:
    """Inside, products are computed with `torch.set_float32_matmul_precision(precision)`; afterwards as before. "" changes nothing.

    Gives {"matmul_error": e}, the relative error (Frobenius) of one product of random matrices against float64; {} where nothing is changed.
    What "high" and "medium" mean differs: on CPUs without 16-bit units they choose another library and cost no digits, elsewhere
    they compute in TF32 or bfloat16.
    """
    if not precision:
        yield {}
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield {"matmul_error": relative_error(device)}
    finally:
        torch.set_float32_matmul_precision(before)


def relative_error(device: torch.device, rows: int = 256, inner: int = 768) -> float:
    """||a b - exact|| / ||exact|| for normal random a (rows x inner) and b (inner x rows), float32."""
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, inner, generator=gen), torch.randn(inner, rows, generator=gen)
    exact = a.double() @ b.double()
    found = (a.to(device) @ b.to(device)).cpu().double()
    return float((found - exact).norm() / exact.norm())


# --- 16-bit products


def widened(model: nn.Module, autocast: bool = False) -> AbstractContextManager[Any]:
    """Inside, products of 16-bit matrices on a CPU that has no instructions for them are computed in float32 and rounded once.

    Such a CPU makes them of float32 ones anyway, but slowly (bench/results/half_products.md). Operands are exact in float32 and sums are
    rounded as they were, so nothing is lost. In memory it costs 12 MiB, and where products come in batches (attention, convolutions) float32
    copies of such a batch. Gradients are computed so too: the backward pass must run inside.

    Does nothing where `model` has no such parameters (and does not run under `autocast` to bfloat16), where they are on another device, where
    the processor has the instructions, and for flex attention, which torch compiles under no such mode. No effect outside this thread.
    """
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "flex_attention":
        return nullcontext()
    used = {parameter.dtype for parameter in model.parameters() if parameter.device.type == "cpu"}
    used |= {torch.bfloat16} if autocast and used else set()
    slow = frozenset(dtype for dtype in used & {torch.bfloat16, torch.float16} if not has_instructions(dtype))
    return Widened(slow) if slow else nullcontext()


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies matrices of this 16-bit dtype itself. Only x86 is asked; others are taken to, as all are where torch cannot tell (2.10)."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    names = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}[dtype]
    return found.get("architecture") != "x86_64" or any(found.get(name, False) for name in names)


_MATRICES = {_aten.mm.default: (0, 1), _aten.addmm.default: (1, 2)}
_BATCHES = {_aten.bmm.default: (0, 1), _aten.baddbmm.default: (1, 2)}
"""Operators, and which of their arguments are multiplied: rows x inner and inner x columns."""

_COMPOSED = {
    _aten.convolution.default: 3,
    _aten.convolution_backward.default: 3,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 5,
}
"""Operators with slow products inside, and how many of their arguments are of one dtype. (The forward pass of attention has fast ones.)"""

_TAKEN_APART = {
    *(_aten.linear.default, _aten.matmul.default, _aten.einsum.default, _aten.scaled_dot_product_attention.default),
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
}
"""Operators that arrive as they are called in inference mode, and otherwise as those above."""

_FEW = {torch.bfloat16: 12, torch.float16: 4}
"""One product is computed as it comes where rows x columns / (rows + columns) is less: copies would cost as much as they save."""

_SIDE = 1024
"""Matrices are multiplied in squares of this side: three of 4 MiB at a time, however large the matrices are."""


class Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The products of `dtypes` in float32. Sees every operator that runs, in backward passes too: some ten microseconds for each."""

    def __init__(self, dtypes: Iterable[torch.dtype]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes = frozenset(dtypes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        multiplied = _MATRICES.get(func) or _BATCHES.get(func)
        if multiplied:
            left, right = (args[k] for k in multiplied)
            if self._are_slow(args) and left.dim() == right.dim() and left.shape[-1] == right.shape[-2] and _pays(left, right):
                if func in _BATCHES:
                    return func(*map(_wide, args), **kwargs).to(left.dtype)
                return self._product(left, right, *args[: multiplied[0]], **kwargs)
        elif func in _COMPOSED:
            if self._are_slow(args[: _COMPOSED[func]]):
                out = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
                dtype = args[0].dtype
                return out.to(dtype) if isinstance(out, torch.Tensor) else tuple(None if x is None else x.to(dtype) for x in out)
        elif func in _TAKEN_APART and not types and torch.is_inference_mode_enabled():
            with self:
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)

    def _are_slow(self, args: Any) -> bool:
        """Whether all tensors are ordinary ones of one such dtype. (What torch would refuse must reach it as it is.)"""
        found = [x for x in args if isinstance(x, torch.Tensor)]
        plain = all(type(x) in (torch.Tensor, nn.Parameter) and x.layout == torch.strided and x.device.type == "cpu" for x in found)
        return plain and found[0].dtype in self.dtypes and all(x.dtype == found[0].dtype for x in found)

    def _product(self, left: torch.Tensor, right: torch.Tensor, more: torch.Tensor | None = None, beta: float = 1, alpha: float = 1) -> torch.Tensor:
        """alpha left right + beta more, square by square."""
        out = left.new_empty(left.shape[0], right.shape[1])
        more = None if more is None or not beta else more.expand(out.shape)
        for r in _parts(out.shape[0]):
            for c in _parts(out.shape[1]):
                square = left.new_zeros(out[r, c].shape, dtype=torch.float32)
                for k in _parts(left.shape[1]):
                    square.addmm_(left[r, k].float(), right[k, c].float(), alpha=alpha)
                out[r, c] = square if more is None else square.add_(more[r, c], alpha=beta)
        return out


def _parts(size: int) -> list[slice]:
    return [slice(start, start + _SIDE) for start in range(0, size, _SIDE)]


def _pays(left: torch.Tensor, right: torch.Tensor) -> bool:
    rows, columns = left.shape[-2], right.shape[-1]
    return rows * columns >= _FEW[left.dtype] * (rows + columns)


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x
