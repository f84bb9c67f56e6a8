"""Rows of data as token ids with what is to be predicted: labels of texts, or the next tokens; and which models predict them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError, near
from .data import IGNORE, Example, Row, field, opened, task_of

FIELDS = {"classification": '{"text", "label"}', "text": '{"text"}', "completion": '{"prompt", "completion"}'}
"""The fields of rows of each kind."""


def kind_of(rows: Sequence[Row]) -> str:
    """What rows ask, a key of `FIELDS`; all of them the same."""
    found = {_kind(row, number) for number, row in enumerate(rows)}
    if len(found) > 1:
        raise InputError(f"the data mixes {' and '.join(sorted(found))} rows", hint="evaluate them one file at a time")
    return found.pop()


def _kind(row: Row, number: int) -> str:
    if "completion" in row:
        return "completion"
    if "text" in row:
        return "classification" if "label" in row else "text"
    raise InputError(
        f"row {number} of the data has {', '.join(map(repr, row)) or 'no fields'}; nothing in it can be measured",
        hint=f"rows of {', '.join(FIELDS.values())}",
    )


class Encoder:
    """Rows to examples, cut to `most` tokens; `cut` counts the rows that were longer."""

    def __init__(self, tokenizer: Any, most: int) -> None:
        self._tokenizer, self._most = tokenizer, most
        self.cut = 0

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the tokenizer's own special tokens."""
        whole: list[list[int]] = self._tokenizer(list(texts), verbose=False)["input_ids"]
        self.cut += sum(len(ids) > self._most for ids in whole)
        return self._tokenizer(list(texts), truncation=True, max_length=self._most)["input_ids"] if self.cut else whole

    def classified(self, rows: Sequence[Row], config: Mapping[str, Any], classes: int) -> list[Example]:
        """{"text", "label"}: one label of a model's own for each text."""
        labels = label_ids(rows, config, classes)
        texts = self.texts([field(row, "text", number) for number, row in enumerate(rows)])
        return [{"input_ids": ids, "labels": label, **task_of(row)} for ids, label, row in zip(texts, labels, rows, strict=True)]

    def language(self, rows: Sequence[Row]) -> list[Example]:
        """{"text"}: every token but the first is predicted. No end token is added: the text itself is measured."""
        encoded = self.texts([field(row, "text", number) for number, row in enumerate(rows)])
        return _predictable([{"input_ids": ids, "labels": ids, **task_of(row)} for ids, row in zip(encoded, rows, strict=True)])

    def completions(self, rows: Sequence[Row]) -> list[Example]:
        """{"prompt", "completion"}: the completion is predicted. Tokenised apart, as in tuning; a long prompt loses its beginning."""
        out = []
        for number, row in enumerate(rows):
            start = opened(self._tokenizer, field(row, "prompt", number))
            rest: list[int] = self._tokenizer(field(row, "completion", number), add_special_tokens=False, verbose=False)["input_ids"]
            self.cut += len(start) + len(rest) > self._most
            rest = rest[: self._most - 1]
            start = start[max(0, len(start) + len(rest) - self._most) :]
            out.append({"input_ids": start + rest, "labels": [IGNORE] * len(start) + rest, **task_of(row)})
        return _predictable(out)


def _predictable(examples: list[Example]) -> list[Example]:
    empty = [number for number, example in enumerate(examples) if all(label == IGNORE for label in example["labels"][1:])]
    if empty:
        which = f"row {empty[0]}" if len(empty) == 1 else f"{len(empty)} rows ({', '.join(map(str, empty[:8]))}{', ...' if len(empty) > 8 else ''})"
        raise InputError(f"{which} of the data: no token to predict, as a first token needs one before it", hint="leave such rows out")
    return examples


def has_head(model: Any, task: str) -> bool:
    """Whether transformers lists the model's class for a task, "SEQUENCE_CLASSIFICATION" or "CAUSAL_LM"."""
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for value in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
        names.update([value] if isinstance(value, str) else value)
    return type(model).__name__ in names


def label_ids(rows: Sequence[Row], config: Mapping[str, Any], classes: int) -> list[int]:
    """The class of each row by the names in a model's config (id2label), as text or as a number."""
    names = [str(name) for _, name in sorted((int(k), name) for k, name in dict(config.get("id2label") or {}).items())]
    known = {name: number for number, name in enumerate(names[:classes])}
    plain = names == [f"LABEL_{number}" for number in range(len(names))]  # transformers' names for classes that have none
    given = [field(row, "label", number, (str, int)) for number, row in enumerate(rows)]
    out: list[int] = []
    for number, label in enumerate(given):
        if str(label) in known:
            out.append(known[str(label)])
        elif isinstance(label, int) and plain and 0 <= label < classes:
            out.append(label)
        else:
            raise InputError(
                f"row {number} of the data has the label {label!r}, which the model does not know{near(str(label), known, 'it knows')}",
                hint="use the deltas that were tuned on these labels",
            )
    return out
