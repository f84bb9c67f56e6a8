"""Free answers: greedy generation in batches, and the rule that says where an answer ends.

An answer is what a model writes by itself after a prompt, up to the first stop text or its own end of text. Nobody tells it
the right words before, or how many there are, as measures with teacher forcing do (Yang et al. 2025, "The Mirage of Model
Editing", arXiv:2502.11177, on how much that matters).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..engine.data import Row, field, opened
from ..errors import InputError
from .running import Running
from .tasks import cut

First = Callable[[list[int], torch.Tensor], None]
"""Called with the positions of prompts and the logits (prompts x vocabulary) of what comes first after them."""


def prompts(tokenizer: Any, rows: Sequence[Row], most: int) -> tuple[list[list[int]], int]:
    """The token ids of each row's "prompt", and how many were longer than `most` and lost their beginning. InputError for an empty one."""
    ids = [opened(tokenizer, field(row, "prompt", number)) for number, row in enumerate(rows)]
    empty = [number for number, each in enumerate(ids) if not each]
    if empty:
        raise InputError(f"row {empty[0]} of the data: the prompt has no tokens", hint="give it some text, or leave the row out")
    return [each[-most:] for each in ids], sum(len(each) > most for each in ids)


def greedy(
    run: Running, ids: Sequence[list[int]], most_new: int, stop: Sequence[str], batch_size: int, first: First | None, progress: Callable[[int], None]
) -> tuple[list[str], list[bool]]:
    """The answers to prompts given as token ids, and for each whether all its logits were numbers.

    Every token is the most likely one: what the checkpoint's generation settings say of drawing, beams and penalties is left
    out. A batch is padded on the left, and done when each of its rows is. Rows are the same as when they run alone.
    """
    ends = _ends(run)
    run.model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=run.pad, do_sample=False, num_beams=1)
    said, finite = [""] * len(ids), [True] * len(ids)
    order = sorted(range(len(ids)), key=lambda k: (-len(ids[k]), k))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        longest = len(ids[numbers[0]])
        given = torch.tensor([[run.pad] * (longest - len(ids[k])) + ids[k] for k in numbers], device=run.device)
        mask = torch.tensor([[0] * (longest - len(ids[k])) + [1] * len(ids[k]) for k in numbers], device=run.device)
        watch = _Watch(len(numbers))
        stopped = _Stopped(run.tokenizer, longest, stop, len(numbers))
        with torch.inference_mode():
            out = run.model.generate(
                given,
                attention_mask=mask,
                max_new_tokens=most_new,
                logits_processor=LogitsProcessorList([watch]),
                stopping_criteria=StoppingCriteriaList([stopped]),
            )
        if not start:
            run.check()
        if first is not None:
            first(numbers, watch.logits)
        for k, new, bad in zip(numbers, out[:, longest:].tolist(), watch.bad.tolist(), strict=True):
            end = next((place for place, token in enumerate(new) if token in ends), len(new))
            said[k], finite[k] = cut(_text(run.tokenizer, new[:end]), stop), not bad
        progress(len(numbers))
    return said, finite


def _ends(run: Running) -> list[int]:
    """The ids that end a text: those of the checkpoint's settings and the tokenizer's own."""
    listed = run.model.generation_config.eos_token_id
    found = [*(listed if isinstance(listed, list) else [listed]), getattr(run.tokenizer, "eos_token_id", None)]
    return sorted({token for token in found if isinstance(token, int)})


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Watch(LogitsProcessor):  # type: ignore[misc,unused-ignore]
    """Keeps the first logits of each row, and which rows ever had one that is NaN or plus infinity (minus infinity is a mask)."""

    def __init__(self, rows: int) -> None:
        self.logits = torch.empty(0)
        self.bad = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not self.logits.numel():
            self.logits = scores
        self.bad |= (scores.isnan() | scores.isposinf()).any(-1).cpu()
        return scores


class _Stopped(StoppingCriteria):  # type: ignore[misc,unused-ignore]
    """Says which rows have a stop text in what was written after the first `start` tokens."""

    def __init__(self, tokenizer: Any, start: int, stop: Sequence[str], rows: int) -> None:
        self._tokenizer, self._start, self._stop = tokenizer, start, stop
        self._done = [False] * rows

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        for k, new in enumerate(input_ids[:, self._start :].tolist()):
            if not self._done[k]:
                text = _text(self._tokenizer, new)
                self._done[k] = any(each in text for each in self._stop)
        return torch.tensor(self._done, device=input_ids.device)
