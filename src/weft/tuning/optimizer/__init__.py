"""Optimizers: how to get there.

An optimizer is a function `(tensors, cfg) -> torch.optim.Optimizer` over the named parameters to train, registered as a
method of kind "optimizer". Its state may hold tensors, numbers, text, lists and maps of these: all that can be saved
without a pickle. The learning rates it sets are peaks; the schedule multiplies them. A config whose `lr` is none gets the
space's (`Space.lr`) before the optimizer is made, and the recipe has the number.

What needs more than gradients (a step's batches, more backward passes, larger batches) is a `weft.engine.loop.Stages` too.

`groups` gives every optimizer the same options for rates that differ from tensor to tensor:

b_ratio      the factor B of a low-rank product learns so many times as fast as the rest. With A uniform and B zero at the start, B has
             to be faster the wider the model is (LoRA+: Hayou, Ghosh and Yu 2024, arXiv 2402.12354, who take 16)
layer_decay  each layer learns so many times as fast as the one above it: with L layers, a tensor of layer l has the rate lr d^(L - l), what
             lies above the layers (heads) lr, and what lies below them (embeddings) lr d^(L + 1), l from 0 (Howard and Ruder 2018, arXiv
             1801.06146; in this form Clark et al. 2020, arXiv 2003.10555). L is the number of layers up to the highest one that is trained
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from torch import nn

from ..._roles import LAYER_LISTS


class Rates(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of every optimizer: how fast each tensor learns."""

    lr: Annotated[float, msgspec.Meta(description="peak learning rate; none: what suits the space", gt=0)] | None = None
    b_ratio: Annotated[float, msgspec.Meta(description="rate of low-rank factors B over that of the rest (LoRA+: 16)", gt=0)] = 1.0
    layer_decay: Annotated[float, msgspec.Meta(description="rate of each layer over that of the next one up", gt=0)] = 1.0


def groups(tensors: Mapping[str, nn.Parameter], cfg: Rates, *, decay: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups with the rates that `cfg` asks for; with `decay`, matrices apart from vectors, which have no weight decay.

    Matrices come first, and otherwise groups and what is in them come in the order of `tensors`.
    """
    depths = {name: depth(name) for name in tensors}
    tops: dict[str, int] = {}
    for stack, layer in filter(None, depths.values()):
        tops[stack] = max(tops.get(stack, 0), layer + 1)
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name in sorted(tensors, key=lambda name: decay is not None and tensors[name].ndim <= 1):
        place = depths[name]
        down = tops[place[0]] - place[1] if place else max(tops.values(), default=0) + 1 if _embeds(name) else 0
        rate = cfg.layer_decay**down * (cfg.b_ratio if name.partition("//")[2].endswith(".B") else 1.0)
        found.setdefault((decay is not None and tensors[name].ndim <= 1, rate), []).append(tensors[name])
    lr = cfg.lr or 1e-3
    return [
        {"params": params, "lr": lr * rate, **({} if decay is None else {"weight_decay": 0.0 if vector else decay})} for (vector, rate), params in found.items()
    ]


def depth(name: str) -> tuple[str, int] | None:
    """The stack and the layer of a tensor, from its name: `model.layers.3.mlp.up_proj.weight//0.B` is ("model.layers", 3). None outside layers."""
    parts = name.partition("//")[0].split(".")
    for k in range(1, len(parts) - 1):
        if parts[k].isdecimal() and parts[k - 1] in LAYER_LISTS:
            return ".".join(parts[:k]), int(parts[k])
    return None


def _embeds(name: str) -> bool:
    return any("embed" in part or part in ("wte", "wpe", "shared") for part in name.partition("//")[0].split("."))
