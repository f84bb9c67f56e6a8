"""Spans: which tokens of a prompt and its answer are what, by the characters they cover.

    s = spans(tokenizer, "The capital of France is", "Paris", "France")
    s.subject_last, s.prompt_last, list(s.predicts)

Prompt and answer are tokenised once, together, so nothing hangs on a prompt's tokens being the first tokens of the whole,
which a merge across the seam or a special token at an end breaks.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UsageError
from .data import padded

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Spans:
    """A tokenised prompt with its answer.

    ids:     all token ids, with what the tokenizer puts in front and without what it puts at the end
    prompt:  tokens of the prompt (those in front count), so the first answer token is at index `prompt`
    subject: tokens lo..hi of the subject (hi is one past the last); None without a subject
    """

    ids: list[int]
    prompt: int
    subject: tuple[int, int] | None = None

    @property
    def predicts(self) -> range:
        """The positions whose next token is an answer token: prompt_last to the last but one. Empty without an answer."""
        return range(self.prompt - 1, len(self.ids) - 1)

    @property
    def prompt_last(self) -> int:
        """The position of the prompt's last token."""
        return self.prompt - 1

    @property
    def subject_last(self) -> int:
        """The position of the subject's last token; UsageError without a subject."""
        if self.subject is None:
            raise UsageError("a prompt without a subject has no last subject token", hint="give each edit a 'subject' that its prompt contains")
        return self.subject[1] - 1


def joined(prompt: str, answer: str) -> str:
    """Prompt and answer with a space between them, unless there is whitespace already or one of them is empty. Begins with `prompt`."""
    if not prompt or not answer:
        return prompt + answer
    if prompt[-1].isspace():
        return prompt + answer.lstrip()
    return prompt + answer if answer[0].isspace() else f"{prompt} {answer}"


def spans(tokenizer: Any, prompt: str, answer: str = "", subject: str | None = None) -> Spans:
    """The spans of `joined(prompt, answer)`.

    A token that covers the seam is an answer token: it is what a model has to predict. The subject is its last occurrence in the
    prompt, one that stands as a word of its own if there is any ("Ann" in "Ann and Anna"); its tokens are all that
    cover a part of it. Whitespace around it does not count.

    UsageError for a tokenizer that cannot tell which characters a token covers; InputError if the subject is not in the prompt,
    or if subject, prompt or answer have no token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"{type(tokenizer).__name__} cannot tell which characters a token covers", hint="use a fast tokenizer: a checkpoint that has a tokenizer.json"
        )
    # padding and truncation by name: a call without them would take what the tokenizer was last set to
    found = tokenizer(joined(prompt, answer), return_offsets_mapping=True, return_special_tokens_mask=True, padding=False, truncation=False, verbose=False)
    ids, covers, special = list(found["input_ids"]), list(found["offset_mapping"]), list(found["special_tokens_mask"])
    front = next((k for k, is_special in enumerate(special) if not is_special), 0)
    while ids and special[len(ids) - 1] and len(ids) > front:
        ids.pop()
    own = range(front, len(ids))
    seam = next((k for k in own if covers[k][1] > len(prompt)), len(ids))
    if seam == 0:
        raise InputError(f"the prompt {_short(prompt)} has no token", hint="the first token of an answer needs one before it that predicts it")
    if answer and seam == len(ids):
        raise InputError(f"the answer {_short(answer)} to {_short(prompt)} has no token")
    if subject is None:
        return Spans(ids, seam)
    lo, hi = _place(prompt, subject)
    inside = [k for k in own if covers[k][0] < hi and covers[k][1] > lo]
    if not inside:
        raise InputError(f"the subject {_short(subject)} of {_short(prompt)} has no token")
    return Spans(ids, seam, (inside[0], inside[-1] + 1))


def _place(prompt: str, subject: str) -> tuple[int, int]:
    """The characters lo..hi of the subject's last occurrence."""
    bare = subject.strip()
    words = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(bare)}(?!\w)", prompt)] if bare else []
    lo = words[-1] if words else prompt.rfind(bare)
    if not bare or lo < 0:
        raise InputError(f"the subject {_short(subject)} is not in the prompt {_short(prompt)}", hint="the same spelling, accents and capitals in both")
    return lo, lo + len(bare)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def batch(items: Sequence[Spans], pad_id: int, device: str | torch.device | None = None) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (batch x longest), padded on the right, so that every position in `items` stays as it is."""
    made = padded([{"input_ids": item.ids, "labels": 0} for item in items], pad_id)
    return {name: made[name].to(device) for name in ("input_ids", "attention_mask")}


def rows(items: Sequence[Spans], at: Callable[[Spans], int | Iterable[int]], device: str | torch.device | None = None) -> torch.Tensor:
    """Which rows of `batch(items, ...)` are meant, as booleans (batch x longest): `rows(items, lambda s: s.predicts)`."""
    import torch

    out = torch.zeros(len(items), max(len(item.ids) for item in items), dtype=torch.bool)
    for number, item in enumerate(items):
        where = at(item)
        out[number, [where] if isinstance(where, int) else list(where)] = True
    return out.to(device)
