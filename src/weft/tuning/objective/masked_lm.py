"""masked-lm: guess the tokens that were hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from torch import nn

from ...engine.data import IGNORE, Example, Row, field, most_tokens, pad_id, task_of
from ...engine.loop import Batch
from ...errors import InputError
from ...methods import method
from . import Objective, class_for, right, tokenizer_needed

if TYPE_CHECKING:
    from ...base import Base


class MaskedLMConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of masked language modelling."""

    share: Annotated[float, msgspec.Meta(description="share of the tokens to guess", gt=0, lt=1)] = 0.15
    max_length: Annotated[int, msgspec.Meta(description="longest text in tokens, the rest is cut off; 0: what the model takes, 512 at most", ge=0)] = 0


@method("objective", config=MaskedLMConfig, paper="Devlin et al., 2018, arXiv:1810.04805", formula="- mean over hidden i of log p(x_i | the rest)")
class MaskedLM(Objective):
    """Of {"text"}, 15 % of the tokens are to be guessed: 80 % of them hidden, 10 % replaced by any token, 10 % left.

    Which ones is a function of the seed, the epoch and the row, whatever batch the row is in; each row has at least one. A base
    without the language modelling head gets one.
    """

    adds_head = True
    measures = ("loss", "accuracy")

    def __init__(self, cfg: MaskedLMConfig, base: Base, tokenizer: Any, rows: Sequence[Row]) -> None:
        tokenizer = tokenizer_needed(tokenizer, "masked-lm")
        if tokenizer.mask_token_id is None:
            raise InputError("the tokenizer has no mask token", hint="use causal-lm for a decoder")
        self._mask, self._size, self._share = int(tokenizer.mask_token_id), len(tokenizer), cfg.share
        self._special = set(tokenizer.all_special_ids)
        self.pad = pad_id(tokenizer)
        self.architecture = class_for(base.config, "MASKED_LM")
        if base.config.get("architectures") != [self.architecture]:
            self.patch = {"architectures": [self.architecture]}
        self._tokenizer, self._most = tokenizer, most_tokens(tokenizer, base.config, cfg.max_length)
        self.examples = self.encode(rows)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        texts = [field(row, "text", k) for k, row in enumerate(rows)]
        encoded = self._tokenizer(texts, truncation=True, max_length=self._most)["input_ids"]
        examples: list[Example] = [
            {"input_ids": ids, "labels": ids, **task_of(row)} for ids, row in zip(encoded, rows, strict=True) if not self._special.issuperset(ids)
        ]
        if not examples:
            raise InputError("no row of the data has a token to guess")
        return examples

    def collate(self, examples: Sequence[Example], keys: Sequence[int]) -> Batch:
        return super().collate([{**example, **self._hide(example["input_ids"], key)} for example, key in zip(examples, keys, strict=True)], keys)

    def weight(self, batch: Batch) -> float:
        return float((batch["labels"] != IGNORE).sum())

    def figures(self, model: nn.Module, batch: Batch) -> Mapping[str, float]:
        out = model(**batch)
        return {"loss": float(out.loss), "accuracy": right(out.logits, batch["labels"])}

    def _hide(self, ids: list[int], key: int) -> Example:
        """One row with tokens hidden: three uniform numbers a token decide whether, how, and what instead."""
        import numpy as np

        from ... import xp

        chance, how, other = xp.uniforms(np.zeros(0), key, 0, 3 * len(ids)).reshape(3, -1)
        chance = np.where([token in self._special for token in ids], 2.0, chance)
        chosen = chance < self._share
        chosen[chance.argmin()] = True
        hidden, labels = list(ids), [IGNORE] * len(ids)
        for k in np.flatnonzero(chosen):
            labels[k] = ids[k]
            if how[k] < 0.8:
                hidden[k] = self._mask
            elif how[k] < 0.9:
                hidden[k] = int(other[k] * self._size)
        return {"input_ids": hidden, "labels": labels}
