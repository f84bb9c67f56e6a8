"""classification: one label for each text, with a new head of the architecture's own kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from torch import nn

from ...engine.data import Example, Row, field, most_tokens, pad_id, task_of
from ...engine.loop import Batch
from ...errors import InputError, near
from ...methods import method
from . import Objective, class_for, right, tokenizer_needed

if TYPE_CHECKING:
    from ...base import Base


class ClassificationConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of classification."""

    max_length: Annotated[int, msgspec.Meta(description="longest text in tokens, the rest is cut off; 0: what the model takes, 512 at most", ge=0)] = 0


@method("objective", config=ClassificationConfig, formula="- mean log softmax(head(x))[label]")
class Classification(Objective):
    """Cross-entropy over the labels of {"text", "label"}; adds the head and names its labels.

    The model becomes the architecture's ForSequenceClassification class. The labels are those of the data, sorted; id2label,
    label2id and problem_type go into the config patch. The head starts from the seed and is trained whatever the space is.
    """

    adds_head = True
    retrains = ("head.classifier",)
    measures = ("loss", "accuracy")

    def __init__(self, cfg: ClassificationConfig, base: Base, tokenizer: Any, rows: Sequence[Row]) -> None:
        tokenizer = tokenizer_needed(tokenizer, "classification")
        given = [field(row, "label", k, (str, int)) for k, row in enumerate(rows)]
        kinds = {type(label) for label in given}
        if len(kinds) > 1:
            raise InputError(f"the labels mix {' and '.join(sorted(kind.__name__ for kind in kinds))}", hint="write all of them as text")
        labels = sorted(set(given))
        if len(labels) < 2:
            raise InputError(f"every row has the label {labels[0]!r}; classification needs two at least")
        self.architecture = class_for(base.config, "SEQUENCE_CLASSIFICATION")
        self.pad = pad_id(tokenizer)
        self.patch = _patch(base.config, self.architecture, [str(label) for label in labels], self.pad)
        self._numbers = {label: k for k, label in enumerate(labels)}
        self._tokenizer, self._most = tokenizer, most_tokens(tokenizer, base.config, cfg.max_length)
        self.examples = self.encode(rows)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        texts = [field(row, "text", k) for k, row in enumerate(rows)]
        labels = [field(row, "label", k, (str, int)) for k, row in enumerate(rows)]
        for k, label in enumerate(labels):
            if label not in self._numbers:
                known = [str(each) for each in self._numbers]
                raise InputError(f"row {k} of the data has the label {label!r}, which the training data has not{near(str(label), known, 'it has')}")
        encoded = self._tokenizer(texts, truncation=True, max_length=self._most)["input_ids"]
        return [{"input_ids": ids, "labels": self._numbers[label], **task_of(row)} for ids, label, row in zip(encoded, labels, rows, strict=True)]

    def figures(self, model: nn.Module, batch: Batch) -> Mapping[str, float]:
        out = model(**batch)
        return {"loss": float(out.loss), "accuracy": right(out.logits, batch["labels"])}


def _patch(config: dict[str, Any], architecture: str, labels: list[str], pad: int) -> dict[str, Any]:
    """The config patch. Labels that an earlier head had are taken out by name: a merge patch would keep them."""
    id2label: dict[str, str | None] = {str(k): label for k, label in enumerate(labels)}
    label2id: dict[str, int | None] = {label: k for k, label in enumerate(labels)}
    id2label |= dict.fromkeys(set(map(str, config.get("id2label") or {})) - set(id2label))
    label2id |= dict.fromkeys(set(config.get("label2id") or {}) - set(label2id))
    patch: dict[str, Any] = {"architectures": [architecture], "id2label": id2label, "label2id": label2id, "problem_type": "single_label_classification"}
    if config.get("pad_token_id") is None:  # decoders find the last token of each text by it
        patch["pad_token_id"] = pad
    if config.get("num_labels") is not None:
        patch["num_labels"] = None
    return patch
