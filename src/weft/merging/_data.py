"""What data-driven merging looks at: the live models, one at a time, and what each of them is to be shown.

    with study.live(0) as model:                # base + update 0, in eval mode; afterwards the base again
        for batch in study.batches(0):          # its data: input_ids, attention_mask, labels
            logits = study.logits(batch)

One model is in memory, with the base's bytes of what an update changes. Statistics of all models go to disk (`Spool`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..attaching import attach, detach
from ..base import LiveBase
from ..delta import Delta
from ..engine.data import IGNORE, Example, Row, data_hash, field, most_tokens, pad_id, padded, read_rows
from ..engine.increments import Increments, Target
from ..engine.replacing import replacing
from ..engine.rows import Encoder, has_head, kind_of
from ..engine.surroundings import default_device, surroundings
from ..errors import InputError, MismatchError, UsageError
from ..names import NameMap, Place, live_tensors
from ..sites import Site, all_sites
from ..stored import Tensor, read_container

if TYPE_CHECKING:
    import numpy as np

Batch = dict[str, torch.Tensor]


class Study:
    """The models of a merge, live, with their data.

    models:     what is merged; their base must be a checkpoint (a live module cannot be built anew with room for their heads)
    data:       for each model a path or rows (see `weft.engine.data.read_rows`), the same object for those that share it. A classifier
                takes {"text", "label"} and, where no method needs labels, {"text"}; a language model {"text"} or {"prompt", "completion"}
    device:     where the model runs; default: what Accelerate finds. It has the base's dtype
    batch_size: rows that pass at once; seed: of whatever is random

    `base`, `model` (the live one), `tokenizer`, `names` (between checkpoint and live names), `examples` (for each model its rows as tokens;
    one list for those that share it), `classifies` (labels of texts, not next tokens). UsageError for a model that predicts neither labels nor
    next tokens, InputError for rows that it cannot take.
    """

    def __init__(self, models: Increments, data: Sequence[Any], device: str | torch.device | None = None, batch_size: int = 32, seed: int = 0) -> None:
        if models.base is None or isinstance(models.base, LiveBase):
            raise UsageError("the models are made from the base's checkpoint, which is not given", hint="base=PATH (--base PATH)")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        self.models, self.base, self.batch_size, self.seed = models, models.base, batch_size, seed
        rows = {id(each): read_rows(each) for each in data}
        hashes = {key: data_hash(each) for key, each in rows.items()}
        self._hashes = [hashes[id(each)] for each in data]
        self.tokenizer: Any = self.base.tokenizer()
        structure = [*models.start, *(update for update in models.updates if isinstance(update, Delta))]
        model: Any = self.base.model(structure, device=default_device() if device is None else device)
        model.requires_grad_(False)
        model.config.use_cache = False
        self.pad = pad_id(self.tokenizer)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.pad  # decoders that classify find the last token of each text by it
        self.model: Any = model
        self.classifies = has_head(model, "SEQUENCE_CLASSIFICATION")
        self.device: torch.device = next(model.parameters()).device
        self.names = NameMap.of(self.base, self.model, structure)
        self._sites = {site.name: site for site in all_sites(self.model)}
        self._start = attach(self.model, models.start, base=self.base, names=self.names)
        encoded = {key: self._encoded(each) for key, each in rows.items()}
        self.examples: list[list[Example]] = [encoded[id(each)] for each in data]

    def _encoded(self, rows: Sequence[Row]) -> list[Example]:
        settings = self.model.config.to_dict()
        encode = Encoder(self.tokenizer, most_tokens(self.tokenizer, settings, 0))
        kind = kind_of(rows)
        if has_head(self.model, "CAUSAL_LM") and kind != "classification":
            return encode.language(rows) if kind == "text" else encode.completions(rows)
        if self.classifies and kind != "completion":
            if kind == "classification":
                return encode.classified(rows, settings, self.model.config.num_labels)
            return [{"input_ids": ids, "labels": IGNORE} for ids in encode.texts([field(row, "text", number) for number, row in enumerate(rows)])]
        raise UsageError(
            f"{type(self.model).__name__} cannot be shown {kind} rows",
            hint='a language model takes {"text"} or {"prompt", "completion"}, a classifier {"text", "label"}; a delta can bring its head',
        )

    def recipe(self) -> dict[str, Any]:
        """What else the result depends on."""
        return {"data": self._hashes, "batch_size": self.batch_size, **surroundings(self.model, self.tokenizer)}

    # --- the live models

    @contextmanager
    def live(self, number: int) -> Iterator[nn.Module]:
        """The live model with update `number` on it: what that update's fold would be. Afterwards it is the base (with `models.start`) again."""
        update = self.models.updates[number]
        with self.beneath(number), self._attached([update if isinstance(update, Delta) else replacing(self.models, number)]):
            yield self.model

    @contextmanager
    def beneath(self, number: int) -> Iterator[nn.Module]:
        """The live model as update `number` found it: the base, with the deltas that the update was made over and no others."""
        update = self.models.updates[number]
        known = {each.id: each for each in self.models.updates if isinstance(each, Delta)}
        over = update.over if isinstance(update, Delta) else ()
        idle = [handle for handle in self._start if handle.id not in over]
        for handle in idle:
            handle.active = False
        try:
            with self._attached([known[id] for id in over if id in known]):
                yield self.model
        finally:
            for handle in idle:
                handle.active = True

    @contextmanager
    def _attached(self, deltas: Sequence[Delta]) -> Iterator[None]:
        added = attach(self.model, deltas, base=self.base, mode="materialised", names=self.names)
        try:
            yield
        finally:
            for handle in reversed(added):
                detach(self.model, handle)

    # --- data

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Some examples as one batch on the model's device."""
        return {name: value.to(self.device) for name, value in padded(examples, self.pad).items()}

    def batches(self, number: int) -> Iterator[Batch]:
        """All data of a model, longest examples first."""
        examples = sorted(self.examples[number], key=lambda example: -len(example["input_ids"]))
        for start in range(0, len(examples), self.batch_size):
            yield self.batch(examples[start : start + self.batch_size])

    def logits(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the live model says."""
        logits: torch.Tensor = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits

    def require_labels(self, why: str) -> None:
        """InputError if rows have no label."""
        if any(example["labels"] == IGNORE for examples in self.examples for example in examples):
            raise InputError(f'{why} needs labels, and rows of the data have none: {{"text", "label"}}')

    # --- tensors of the checkpoint in the live model

    def places(self, target: Target) -> list[Place]:
        """Where a tensor lies in the live model; MismatchError if it has no place there."""
        places = self.names.live(target.name)
        if not places:
            raise MismatchError(f"{target.name!r} has no place in the live model: {self.names.why(target.name)}")
        return places

    def site(self, target: Target) -> Site | None:
        """What a tensor is for in the live model; None if it is not exactly one parameter there."""
        places = self.places(target)
        if len(places) != 1 or places[0].at is not None or places[0].part is not None:
            return None
        return self._sites.get(self.live_name(places[0]))

    def firsts(self) -> dict[str, str]:
        """For each tensor that is merged, the first name of those that are one and the same live tensor (both copies of a tied one are stored)."""
        found: dict[Any, str] = {}
        return {
            name: found.setdefault(tuple((self.live_name(p), p.at, p.part) for p in self.places(target)), name) for name, target in self.models.targets.items()
        }

    def live_name(self, place: Place) -> str:
        """The name of a place's live tensor, the first one if it is tied."""
        return self.names.tied(place.name)[0]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The live parameters that hold what the updates change, by live name; one that is tied, once."""
        live = live_tensors(self.model)
        names = {self.live_name(place): None for target in self.models.targets.values() for place in self.places(target)}
        return {name: value for name in names if isinstance(value := live[name], nn.Parameter)}

    def stored(self, target: Target, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One number for each entry of a tensor, of those that `values` has for each entry of `parameters`; zeros for what is no parameter."""
        whole = torch.zeros(target.shape, dtype=torch.float32)
        for place in self.places(target):
            value = values.get(self.live_name(place))
            if value is not None:
                part = place.part.get(whole) if place.part else whole
                part.copy_(place.at.get(value) if place.at else value)
        return whole


def predicted(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where a batch asks for something: log p (N x classes, float32), what is right (N), and the row of the batch that each belongs to (N).

    labels: one for each row (classification), or one for each token, of which the one before predicts it and IGNORE asks for nothing.
    """
    if labels.ndim == 1:
        return logits.float().log_softmax(-1), labels, torch.arange(len(labels), device=labels.device)
    labels = labels[:, 1:]
    asked = labels != IGNORE
    return logits[:, :-1][asked].float().log_softmax(-1), labels[asked], asked.nonzero()[:, 0]


class Spool:
    """Statistics of one model after the other, on disk: a temporary folder that goes when this does."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="weft-")
        self._models: list[Mapping[str, Tensor]] = []

    def add(self, statistics: Mapping[str, torch.Tensor]) -> None:
        """Those of the next model, by name."""
        from safetensors.torch import save_file

        path = Path(self._folder.name) / f"{len(self._models)}.safetensors"
        save_file({name: value.cpu().contiguous() for name, value in statistics.items()}, path)
        self._models.append(read_container(path)[0])

    def read(self, number: int, name: str) -> np.ndarray[Any, Any]:
        """A whole statistic of a model."""
        return self._models[number][name].read()

    def rows(self, number: int, name: str, lo: int, hi: int) -> np.ndarray[Any, Any]:
        """Rows lo..hi of one; all of a scalar."""
        tensor = self._models[number][name]
        return tensor.rows(lo, hi) if tensor.shape else tensor.read()
