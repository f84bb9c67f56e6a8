"""Objectives: what to want.

An objective is a subclass of `Objective` registered as a method of kind "objective". Made from its config, a base, a
tokenizer and the rows, it says which model class it needs, which tensors that class has and the base lacks (a head), turns rows
into examples, examples into batches and batches into a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.data import Example, Row, padded
from ...engine.loop import Batch
from ...errors import InputError, UsageError, near

if TYPE_CHECKING:
    import msgspec

    from ...base import Base
    from ...ops import Generator


class Objective:
    """Base of all objectives. Attributes that a subclass may set:

    architecture: the transformers class the model must be, as `config.architectures` names it; None: whatever the base says
    patch:        what the objective changes in the model's config (a JSON merge patch)
    adds_head:    whether tensors that the class has and the base lacks are added and trained
    retrains:     roles of a head that is trained even if the base has it
    examples:     the rows, encoded
    """

    architecture: str | None = None
    patch: Mapping[str, Any] = {}
    adds_head: bool = False
    retrains: tuple[str, ...] = ()
    examples: Sequence[Example]

    def __init__(self, cfg: msgspec.Struct, base: Base, tokenizer: Any, rows: Sequence[Row]) -> None:
        raise NotImplementedError

    def collate(self, examples: Sequence[Example], keys: Sequence[int]) -> Batch:
        """A batch of examples. `keys` are 64-bit keys, one an example and epoch: the seeds of whatever is random in it."""
        return padded(examples, self.pad)

    def weight(self, batch: Batch) -> float:
        """How many things the loss of a batch is the mean of."""
        return float(len(batch["input_ids"]))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch."""
        loss: torch.Tensor = model(**batch).loss
        return loss

    def check(self, model: nn.Module) -> None:
        """Asked once before training: refuse a model that cannot be trained this way."""

    pad: int = 0


def tokenizer_needed(tokenizer: Any, objective: str) -> Any:
    """The tokenizer; UsageError if there is none."""
    if tokenizer is None:
        raise UsageError(f"the objective {objective} needs a tokenizer, and this base has none", hint="pass tokenizer=...")
    return tokenizer


def class_for(config: Mapping[str, Any], task: str) -> str:
    """The transformers class of a task ("SEQUENCE_CLASSIFICATION", "CAUSAL_LM", "MASKED_LM") for a model type; InputError if it has none."""
    from transformers.models.auto import modeling_auto

    table: Mapping[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    kind = str(config.get("model_type"))
    found = table.get(kind)
    if found is None:
        raise InputError(f"transformers has no {task.replace('_', ' ').lower()} model of type {kind!r}{near(kind, table)}")
    return str(found[0] if isinstance(found, tuple | list) else found)


def head_tensors(base: Base, architecture: str, patch: Mapping[str, Any], gen: Generator, *, retrain: Sequence[str] = ()) -> dict[str, Any]:
    """What `architecture` needs and the base does not have in this shape, by checkpoint name, with values to start from (float32).

    Matrices are normal with the config's initializer_range (0.02 if it has none), biases zero and norms one, as transformers
    starts new heads; drawn from `gen`, so they depend on the seed alone. What the base does have comes too, as it is, if its
    role (see `weft.sites`) is among `retrain`.
    """
    import numpy as np
    import transformers

    from ... import xp
    from ...base import merge_patch
    from ...names import NameMap, saved_layout
    from ...sites import all_sites

    config = merge_patch(base.config, patch)
    with torch.device("meta"):
        model: Any = getattr(transformers, architecture)(transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config))
    layout = base.layout()
    names = NameMap(layout, model)
    roles = {site.name: site.role for site in all_sites(model)}
    std = float(config.get("initializer_range") or 0.02)
    found: dict[str, Any] = {}
    for name, (_, shape) in sorted(saved_layout(model).items()):
        if name in layout and tuple(layout[name][1]) == tuple(shape):
            if any(roles.get(place.name) in retrain for place in names.live(name)):
                found[name] = xp.cast(base.tensor(name).read(), "float32")
            continue
        if name not in layout:
            places = names.live(name)
            if not places or places[0].name not in roles or names.stored(places[0].name):
                continue  # a buffer, another name of a tied tensor, or the base has it under another name
        if len(shape) > 1:
            found[name] = gen.normal(shape, std)
        else:
            found[name] = np.full(shape, float(name.endswith("weight")), np.float32)
    return found
