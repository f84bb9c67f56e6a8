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

from ... import xp
from ...engine.data import IGNORE, Example, Row, padded, task_name, tasks_of
from ...engine.loop import Batch, Evaluate, Run
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
    measures:     the names of the `figures`
    by_task:      whether batches say which task each row belongs to; set by `tasks`
    """

    architecture: str | None = None
    patch: Mapping[str, Any] = {}
    adds_head: bool = False
    retrains: tuple[str, ...] = ()
    examples: Sequence[Example]
    measures: Sequence[str] = ("loss",)
    by_task: bool = False

    def __init__(self, cfg: msgspec.Struct, base: Base, tokenizer: Any, rows: Sequence[Row]) -> None:
        raise NotImplementedError

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Rows as examples: those of training, and later others to evaluate on."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Example], keys: Sequence[int]) -> Batch:
        """A batch of examples. `keys` are 64-bit keys, one an example and epoch: the seeds of whatever is random in it."""
        return self.routed(padded(examples, self.pad), examples)

    def routed(self, batch: Batch, examples: Sequence[Example]) -> Batch:
        """The batch with the input `task`, if the model asks for it."""
        return {**batch, **tasks_of(examples)} if self.by_task else batch

    def tasks(self) -> list[str]:
        """The tasks of the rows, sorted. From now on batches name them, for ops that differ by task. InputError if a row has none."""
        self.by_task = True
        return sorted({task_name(example) for example in self.examples})

    def weight(self, batch: Batch) -> float:
        """How many things the loss of a batch is the mean of."""
        return float(len(batch["input_ids"]))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch."""
        loss: torch.Tensor = model(**batch).loss
        return loss

    def figures(self, model: nn.Module, batch: Batch) -> Mapping[str, float]:
        """What an evaluation says of a batch: means over `weight` things."""
        return {"loss": float(self.loss(model, batch))}

    def check(self, model: nn.Module) -> None:
        """Asked once before training: refuse a model that cannot be trained this way."""

    pad: int = 0


def evaluation(goal: Objective, rows: Sequence[Row]) -> Evaluate:
    """Measures an objective on rows: its `figures`, averaged over all of them. Every process goes through all rows.

    What is random in a batch (which tokens are hidden) is the same each time.
    """
    examples = goal.encode(rows)
    order = sorted(range(len(examples)), key=lambda k: (-len(examples[k]["input_ids"]), k))

    def evaluate(run: Run) -> Mapping[str, float]:
        size = run.config.micro_batch_size or run.config.batch_size
        sums, whole = dict.fromkeys(goal.measures, 0.0), 0.0
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = goal.collate([examples[k] for k in chosen], [xp.key(0, k) for k in chosen])
            weight = goal.weight(batch)
            with run.autocast():
                found = goal.figures(run.model, {name: value.to(run.device) for name, value in batch.items()})
            sums = {name: sums[name] + weight * found[name] for name in sums}
            whole += weight
        return {name: value / whole for name, value in sums.items()}

    return evaluate


def right(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of labels that are the largest logit's; where the label is -100 nothing is asked."""
    asked = labels != IGNORE
    return float((logits.argmax(-1) == labels)[asked].float().mean())


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
