"""A base with deltas on it, ready to run: the part that evaluating, predicting and generating share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..attaching import Mode, attach, check_ran
from ..base import Base
from ..delta import loaded
from ..engine.data import Example, pad_id, padded, tasks_of
from ..engine.products import widened
from ..engine.routed import differs
from ..engine.rows import has_head
from ..errors import UsageError

HEADS = {
    "classification": ("SEQUENCE_CLASSIFICATION", "does not classify texts: it has no head", "classification"),
    "text": ("CAUSAL_LM", "does not predict next tokens", "causal-lm"),
}
"""What is asked of a model: transformers' name for the classes that do it, what is wrong with others, the objective that helps."""


@dataclass
class Running:
    """`model` in eval mode on `device`, its `tokenizer`, the `base`, and the `ids` of the deltas on it.

    by_task: whether what the model computes differs by the task of a row
    """

    base: Base
    ids: list[str]
    model: Any
    tokenizer: Any
    device: torch.device
    pad: int
    by_task: bool = False

    def batches(
        self, examples: Sequence[Example], size: int, progress: Callable[[int, int], None] | None
    ) -> Iterator[tuple[list[int], dict[str, torch.Tensor], torch.Tensor]]:
        """Positions, batch and logits, longest examples first (so that what does not fit into memory fails at once)."""
        order = sorted(range(len(examples)), key=lambda k: (-len(examples[k]["input_ids"]), k))
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            batch = {name: value.to(self.device) for name, value in padded([examples[k] for k in numbers], self.pad).items()}
            task = tasks_of([examples[k] for k in numbers]) if self.by_task and any("task" in example for example in examples) else {}
            with torch.inference_mode():
                logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **task).logits
            if not start:
                self.check()
            yield numbers, batch, logits
            if progress is not None:
                progress(start + len(numbers), len(order))

    def check(self) -> None:
        """After the first forward pass: an attached op that did not run would make every result a lie."""
        check_ran(self.model)


@contextmanager
def running(base: Base | str | Path, deltas: Any, device: Any, dtype: Any, mode: Mode, task: str, why: str = "", hint: str = "") -> Iterator[Running]:
    """The model, with deltas attached; nothing outlives the block. `task` is one of `HEADS`; `why` says what asks for it, `hint` what
    to try if the model cannot do it."""
    opened = base if isinstance(base, Base) else Base.open(base)
    chosen = loaded(deltas)
    ids: list[str] = []
    for delta in chosen:  # before gigabytes are read
        delta.require_base(opened, on=ids)
        ids.append(delta.id)
    model: Any = opened.model(chosen, dtype=dtype, device=None if device is None else str(device))
    _require_head(model, task, why, hint)
    where = torch.device(device) if device is not None else _best_device()
    model.to(where)
    tokenizer = opened.tokenizer()
    pad = pad_id(tokenizer)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad  # decoders that classify find the last token of each text by it
    if chosen:
        attach(model, chosen, base=opened, mode=mode)
    with widened(model):
        yield Running(opened, ids, model, tokenizer, where, pad, any(map(differs, chosen)))


def _best_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def _require_head(model: Any, task: str, why: str, hint: str) -> None:
    listed, wrong, objective = HEADS[task]
    if not has_head(model, listed):
        raise UsageError(
            f"{type(model).__name__} {wrong}{why}",
            hint=hint or f"a delta can bring one: weft tune BASE --data F --method lora --objective {objective} -o OUT.safetensors",
        )
