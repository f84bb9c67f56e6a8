"""causal-lm: predict the next token, of everything or of the answers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from torch import nn

from ...engine.data import IGNORE, Example, Row, field, most_tokens, opened, pack, packed, pad_id, padded, task_of
from ...engine.loop import Batch
from ...errors import InputError, UsageError
from ...methods import method
from . import Objective, class_for, right, tokenizer_needed

if TYPE_CHECKING:
    from ...base import Base


class CausalLMConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of causal language modelling."""

    max_length: Annotated[int, msgspec.Meta(description="longest example in tokens, see below for what is cut; 0: what the model takes, 512 at most", ge=0)] = 0
    packing: Annotated[bool, msgspec.Meta(description="join examples up to max_length; they do not see each other")] = False


@method("objective", config=CausalLMConfig, formula="- mean over targets i of log p(x_i | x_<i)")
class CausalLM(Objective):
    """Next-token cross-entropy on {"text"}, on the completion of {"prompt", "completion"}, or on the assistant's part of {"messages"}.

    Texts and completions get the tokenizer's end token, so that the model learns to stop. A prompt is tokenised by itself, as
    it is when the model is asked later, and the completion appended. What is too long loses its end (text, messages) or the
    beginning of its prompt. Rows of {"input_ids"} and optional "labels" need no tokenizer. The mean is over all target tokens
    of a step, however it is cut into micro-batches.
    """

    measures = ("loss", "teacher_forced_token_accuracy")

    def __init__(self, cfg: CausalLMConfig, base: Base, tokenizer: Any, rows: Sequence[Row]) -> None:
        self.pad = pad_id(tokenizer)
        known = base.config.get("architectures") or [""]
        if not str(known[0]).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            self.architecture = class_for(base.config, "CAUSAL_LM")
            self.patch = {"architectures": [self.architecture]}
        self._most = most_tokens(tokenizer, base.config, cfg.max_length)
        self._encode = _Encoder(tokenizer, self._most)
        kept = self.encode(rows)
        self._packing = cfg.packing
        if cfg.packing:
            kept = [example for mine in _by_task(kept) for example in self._joined(mine)]
        self.examples = kept

    def _joined(self, examples: Sequence[Example]) -> list[Example]:
        """Examples of one task, several in one."""
        groups = pack([len(example["input_ids"]) for example in examples], self._most)
        return [{**packed([examples[k] for k in group]), **task_of(examples[0])} for group in groups]

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        examples = [{**self._encode(row, k), **task_of(row)} for k, row in enumerate(rows)]
        kept = [example for example in examples if any(label != IGNORE for label in example["labels"][1:])]
        if not kept:
            raise InputError("no row of the data has a token to predict", hint=f"are the prompts longer than max_length ({self._most})?")
        return kept

    def weight(self, batch: Batch) -> float:
        return float((batch["labels"][:, 1:] != IGNORE).sum())

    def figures(self, model: nn.Module, batch: Batch) -> Mapping[str, float]:
        out = model(**batch)
        return {"loss": float(out.loss), "teacher_forced_token_accuracy": right(out.logits[:, :-1], batch["labels"][:, 1:])}

    def check(self, model: nn.Module) -> None:
        """With packing: refuse a model in which packed examples see each other."""
        if not self._packing:
            return
        device = next(model.parameters()).device
        first, second = [k % 7 + 1 for k in range(5)], [k % 5 + 2 for k in range(6)]
        whole = packed([{"input_ids": ids, "labels": ids} for ids in (first, second)])
        batch: dict[str, Any] = {name: value.to(device) for name, value in padded([whole], self.pad).items() if name != "labels"}
        task = {"task": self.examples[0]["task"]} if self.by_task else {}
        with torch.no_grad():
            together = model(**batch, **task).logits[0, len(first) :].float()
            alone = model(input_ids=torch.tensor([second], device=device), **task).logits[0].float()
        if float((together - alone).abs().max()) > 0.02 * float(alone.abs().max()):
            raise UsageError(f"packing: in {type(model).__name__} packed examples see each other", hint="-p packing=false")


def _by_task(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples apart by their task, in the order of their first ones."""
    found: dict[Any, list[Example]] = {}
    for example in examples:
        found.setdefault(str(example.get("task")), []).append(example)
    return list(found.values())


class _Encoder:
    """Rows to examples."""

    def __init__(self, tokenizer: Any, most: int) -> None:
        self._tokenizer, self._most = tokenizer, most
        end = getattr(tokenizer, "eos_token_id", None)
        self._end = [end] if isinstance(end, int) else []

    def __call__(self, row: Row, number: int) -> Example:
        if "input_ids" in row:
            ids = list(row["input_ids"])
            return self._cut(ids, list(row.get("labels", ids)))
        tokenizer_needed(self._tokenizer, "causal-lm")
        if "messages" in row:
            return self._messages(row, number)
        if "prompt" in row:
            start = opened(self._tokenizer, field(row, "prompt", number))
            rest = self._closed(self._tokenizer(field(row, "completion", number), add_special_tokens=False)["input_ids"])
            rest = rest[: self._most]
            start = start[len(start) + len(rest) - self._most :] if len(start) + len(rest) > self._most else start
            return {"input_ids": start + rest, "labels": [IGNORE] * len(start) + rest}
        ids = self._closed(opened(self._tokenizer, field(row, "text", number)))
        return self._cut(ids, ids)

    def _cut(self, ids: list[int], labels: list[int]) -> Example:
        return {"input_ids": ids[: self._most], "labels": labels[: self._most]}

    def _closed(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == self._end else ids + self._end

    def _messages(self, row: Row, number: int) -> Example:
        """Labels where the assistant speaks: the tokens that each of its messages adds to the conversation so far."""
        messages = field(row, "messages", number, list)
        if not getattr(self._tokenizer, "chat_template", None):
            raise InputError(f"row {number} of the data has messages, but the tokenizer has no chat template", hint="use {'prompt', 'completion'}")
        ids = self._chat(messages, False)
        labels = [IGNORE] * len(ids)
        for k, message in enumerate(messages):
            if message.get("role") == "assistant":
                before, after = self._chat(messages[:k], True), self._chat(messages[: k + 1], False)
                if after[: len(before)] != before or ids[: len(after)] != after:
                    raise InputError(
                        f"row {number} of the data: the chat template rewrites earlier messages, so message {k} cannot be told apart",
                        hint="use {'prompt', 'completion'} with the text as the model should see it",
                    )
                labels[len(before) : len(after)] = ids[len(before) : len(after)]
        return self._cut(ids, labels)

    def _chat(self, messages: list[Any], asking: bool) -> list[int]:
        out = self._tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=asking, return_dict=True)
        ids: list[int] = out["input_ids"]
        return ids
