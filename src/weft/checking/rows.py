"""Rows of data as token ids with what is to be predicted: labels of texts, or the next tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.data import IGNORE, Example, Row, field
from ..errors import InputError, UsageError, near


def kind_of(rows: Sequence[Row]) -> str:
    """What rows ask: "classification" {"text", "label"}, "completion" {"prompt", "completion"} or "text" {"text"}; all of them the same."""
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
        hint='{"text", "label"}, {"text"} or {"prompt", "completion"}',
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

    def language(self, rows: Sequence[Row]) -> list[Example]:
        """{"text"}: every token but the first is predicted. No end token is added: the text itself is measured."""
        encoded = self.texts([field(row, "text", number) for number, row in enumerate(rows)])
        return [_predictable({"input_ids": ids, "labels": ids}, number) for number, ids in enumerate(encoded)]

    def completions(self, rows: Sequence[Row]) -> list[Example]:
        """{"prompt", "completion"}: the completion is predicted. Tokenised apart, as in tuning; a long prompt loses its beginning."""
        out = []
        end = getattr(self._tokenizer, "eos_token_id", None)
        for number, row in enumerate(rows):
            start: list[int] = self._tokenizer(field(row, "prompt", number), verbose=False)["input_ids"]
            start = start[:-1] if start and start[-1] == end else start
            rest: list[int] = self._tokenizer(field(row, "completion", number), add_special_tokens=False, verbose=False)["input_ids"]
            self.cut += len(start) + len(rest) > self._most
            rest = rest[: self._most - 1]
            start = start[max(0, len(start) + len(rest) - self._most) :]
            out.append(_predictable({"input_ids": start + rest, "labels": [IGNORE] * len(start) + rest}, number))
        return out


def _predictable(example: Example, number: int) -> Example:
    if all(label == IGNORE for label in example["labels"][1:]):
        raise InputError(f"row {number} of the data has no token to predict: a first token needs one before it", hint="leave such rows out")
    return example


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


def most_tokens(tokenizer: Any, config: Mapping[str, Any], asked: int) -> int:
    """The longest example: what was asked for, or less if the tokenizer or the model take fewer."""
    known = [asked, int(min(getattr(tokenizer, "model_max_length", 1 << 40), 1 << 40))]
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int):
        known.append(positions - (2 if config.get("model_type") in ("roberta", "xlm-roberta", "camembert") else 0))
    if min(known) < 2:
        raise UsageError(f"max_length must be 2 at least, got {asked}")
    return min(known)
