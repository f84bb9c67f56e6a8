"""Gradient checkpointing: layers forget their activations in the forward pass and compute them again in the backward pass.

About a third more computation, and memory for one layer's activations instead of all layers'. Gradients are the same: what is
random is drawn again from the same state. The recomputation needs no input that takes a gradient (torch's non-reentrant form), so
frozen embeddings under trained layers are no special case, and nothing is computed for them. transformers' own switch would make
the embeddings' output take a gradient, and with it every layer below the lowest one that is trained: it is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..attaching.swap import hub_of
from ..errors import UsageError

_SWITCH = {"gradient_checkpointing": True, "_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False)}
"""What a layer of transformers looks at, and what it then calls itself through."""


@contextmanager
def checkpointed(model: nn.Module, on: bool) -> Iterator[None]:
    """Inside, the layers of a transformers model in train mode are recomputed; afterwards each is as it was. `on` False: nothing happens.

    UsageError for a model that has no such layers, or where a delta's op reaches over one: it would be recomputed without the op.
    """
    if not on:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(f"{type(model).__name__} has no layers that can be recomputed", hint="-p checkpointing=false")
    _require_whole(model, layers)
    before = [{name: layer.__dict__[name] for name in _SWITCH if name in layer.__dict__} for layer in layers]
    try:
        for layer in layers:
            layer.__dict__.update(_SWITCH)
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name in _SWITCH:
                layer.__dict__.pop(name, None)
            layer.__dict__.update(values)


def _require_whole(model: nn.Module, layers: list[nn.Module]) -> None:
    """Layers are computed again by themselves: a weight that stands in for another while a module around the layer runs is then gone."""
    layer_of = {child: layer for layer in layers for child in layer.modules()}
    for path, module in model.named_modules():
        found = hub_of(module)
        for shadow in found[1].plan.shadows if found else ():
            layer = layer_of.get(shadow.owner)
            if layer is not None and layer_of.get(module) is not layer:
                raise UsageError(
                    f"an op changes {shadow.param!r} in a layer from outside of it (while {path or 'the whole model'} runs), so the layer cannot be recomputed",
                    hint="-p checkpointing=false",
                )
