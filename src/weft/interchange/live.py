"""What interchange must know of a live model: which modules take LoRA, how they store their weights, and where those lie
in the checkpoint. The model is built on the meta device, so it costs no memory and reads no data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..base import Base, LiveBase, _config_object, _model_class, _quiet
from ..errors import InputError, MismatchError, near
from ..names import NameMap, Place, live_tensors
from ..ops import layout
from .blocks import Matrix

AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The transformers class that PEFT's task types speak of."""

_AXES = {"linear": (0, 1), "conv1d": (1, 0), "embedding": (1, 0), "conv": (0, 1)}
"""The axes of a stored weight, by layout, that PEFT's B (outputs) and A (inputs) run along; convolutions are flattened."""


def skeleton(base: Base, config: Mapping[str, Any] | None = None, kind: str | type[Any] | None = None) -> nn.Module:
    """The model of `base` without data (or the module itself, for `Base.of`), with another config or class if given."""
    if isinstance(base, LiveBase):
        return base.module
    config = base.config if config is None else config
    with _quiet():
        settings = _config_object(config, base.source)
        made = _model_class(kind, config, settings)
        try:
            with torch.device("meta"):
                model: nn.Module = made._from_config(settings)
        except Exception as error:  # a model class may refuse a config in any way
            raise InputError(f"transformers cannot build {getattr(made, '__name__', made)} from {base.source}: {error}") from error
    return model


class Live:
    """A live model and its place in the checkpoint."""

    def __init__(self, base: Base, model: nn.Module, deltas: Iterable[Any] = ()) -> None:
        self.model = model
        self.names = NameMap.of(base, model, list(deltas))
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.shapes = {name: tuple(value.shape) for name, value in live_tensors(model).items()}

    def stored(self, name: str) -> list[Place]:
        """Where a live tensor lies in the checkpoint."""
        return self.names.stored(name)

    def tied(self, name: str) -> tuple[str, ...]:
        """All live names of the tensor, itself among them."""
        return self.names.tied(name)

    def owns(self, name: str) -> bool:
        """Whether the checkpoint has a tensor for this very name, and not only for one that it is tied to."""
        return any(name in {live.name for live in self.names.live(place.name)} for place in self.names.stored(name))

    def matrix(self, module: str, parameter: str = "weight") -> Matrix | str:
        """The parameter as LoRA sees it, or the reason why LoRA cannot change it."""
        name, owner = f"{module}.{parameter}" if module else parameter, self.modules.get(module)
        if owner is None:
            return f"the model has no module {module!r}{near(module, self.modules)}"
        if name not in self.shapes:
            return f"module {module!r} ({type(owner).__name__}) has no parameter {parameter!r}"
        shape, how = self.shapes[name], layout.of(owner) if parameter == "weight" else None
        if how is not None:
            return Matrix(name, shape, how, *_AXES[how])
        if len(shape) == 3 and not hasattr(owner, "groups"):
            return Matrix(name, shape, "parameter", *((2, 1) if getattr(owner, "is_transposed", False) else (1, 2)))
        if len(shape) == 2:
            return Matrix(name, shape, "parameter")
        return f"{name} of shape {list(shape)} ({type(owner).__name__}) is not a matrix, or a convolution in groups"

    def wrapped(self, module: str, targets: Iterable[str]) -> list[str]:
        """The parameters of a module that PEFT's `target_parameters` choose, innermost wrapper first."""
        owner, ends = self.modules.get(module), list(targets)
        if owner is None:
            return []
        names = [name for name, _ in owner.named_parameters(recurse=False)]
        return [name for name in names if any(f"{module}.{name}" == end or f"{module}.{name}".endswith(f".{end}") for end in ends)]

    def is_whole(self, name: str) -> bool:
        """Whether the live tensor `name` is one tensor of the checkpoint."""
        places = self.stored(name)
        return len(places) == 1 and places[0].at is None and places[0].part is None

    def whole(self, name: str) -> str:
        """The checkpoint tensor that is all of the live tensor `name`; MismatchError if it is made of parts."""
        if not self.is_whole(name):
            raise MismatchError(f"the live tensor {name!r} is not one tensor of the checkpoint ({len(self.stored(name))} places)")
        return self.stored(name)[0].name
