"""A frozen model in fewer bits while something on it is tuned: the weights of its linear modules, by torchao.

    int8    eight bits, one scale for each output (symmetric)
    nf4     four bits, the quantiles of a normal distribution, a scale for every 64 entries (Dettmers et al. 2023, arXiv 2305.14314)

What is tuned stays float32 and works on top of the decoded weights. The delta belongs to the base as it is stored, not to its
quantised form: how the base was computed is in the recipe. torchao's integer 4-bit tensors need kernels that CPUs lack, and on
others decode for the backward pass all at once: they are not offered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from ..attaching.quantized import QuantizedLinear, values
from ..errors import MissingExtra, UsageError, near

Encode = Callable[[torch.Tensor], torch.Tensor]
GROUP = 64
"""Entries with a scale of their own in nf4."""


def _int8(weight: torch.Tensor) -> torch.Tensor:
    from torchao.quantization import Int8Tensor, PerRow

    return Int8Tensor.from_hp(weight, PerRow())  # type: ignore[no-any-return,unused-ignore]


def _nf4(weight: torch.Tensor) -> torch.Tensor:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    groups = weight.numel() // GROUP
    return to_nf4(weight, GROUP, next(size for size in (256, 64, 16, 4, 1) if groups % size == 0))  # type: ignore[no-any-return,unused-ignore]


KINDS: dict[str, Encode] = {"int8": _int8, "nf4": _nf4}


def require_kind(kind: str) -> None:
    """UsageError for a kind that there is not; MissingExtra without torchao."""
    if kind not in KINDS:
        raise UsageError(f"unknown form of quantisation {kind!r}{near(kind, KINDS)}", hint="int8, or nf4 (four bits)")
    try:
        with _quiet():
            import torchao  # noqa: F401
    except ImportError:
        raise MissingExtra("torchao", "quant", "a quantised model") from None


@torch.no_grad()
def quantize(model: nn.Module, kind: str, without: Collection[str]) -> dict[str, Any]:
    """Quantise the weights of a model's linear modules in place; return what the recipe says of it.

    Left as they are: what stands in `without` (live names: a new head), weights with several names, the output over the vocabulary,
    and for nf4 sizes that are no multiple of 64. UsageError if nothing is left.
    """
    require_kind(kind)
    encode = KINDS[kind]
    known: Any = model
    output = known.get_output_embeddings() if hasattr(known, "get_output_embeddings") else None
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    done = 0
    with _quiet():
        for path, module in model.named_modules():
            if type(module) is not nn.Linear or module is output or f"{path}.weight" in without or uses[id(module.weight)] > 1:
                continue
            if kind == "nf4" and module.weight.numel() % GROUP:
                continue
            module._parameters["weight"] = nn.Parameter(encode(module.weight.detach()), requires_grad=False)
            module.__class__ = QuantizedLinear
            done += 1
    for parameter in model.parameters():  # a map of the checkpoint's file is given back when nobody uses a part of it
        if values(parameter) is parameter:
            parameter.data = parameter.data.clone()
    if not done:
        raise UsageError(f"{type(model).__name__} has no linear modules that can be quantised", hint="leave out quantize (--quantize)")
    return {"kind": kind, "tensors": done, "torchao": version("torchao")}


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao tells the log of kernels that it cannot load, which are for other machines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
