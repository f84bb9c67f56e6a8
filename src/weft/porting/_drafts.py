"""Synthetic inputs: texts like a few seeds, written by a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import xp
from ..base import Base
from ..checking.running import Running, running
from ..engine.data import opened
from ..errors import UsageError
from ..ops import Generator

_BATCH, _TRIES = 64, 6
"""Drafts made at a time; drafts made at most for one that is wanted, before giving up."""


def drafts(base: Base, seeds: Sequence[str], count: int, *, shots: int, lead: float, temperature: float, seed: int, device: str | None) -> list[str]:
    """Up to `count` different texts like `seeds`, none of which is a seed.

    The model sees `shots` seeds, a line each, then the first words of another (a random share of them, `lead` at most), and goes on
    to the end of the line. Where every seed ends with the same few marks and has them nowhere else ("?"), a draft ends there too, and
    what does not is dropped. Fewer are returned when the model repeats itself; UsageError if it writes none.
    """
    plain = [" ".join(text.split()) for text in seeds]
    marks = end_marks(plain)
    gen = Generator(xp.key(seed, 1))
    found: dict[str, None] = {}
    with running(base, [], device, None, "auto", "text", ", which trans-lora's synthetic inputs ask for") as run:
        most = 8 + max(len(opened(run.tokenizer, text)) for text in plain) * 3 // 2
        for number in range(-(-count * _TRIES // _BATCH)):
            starts = [_start(plain, gen, shots, lead) for _ in range(_BATCH)]
            for text in _written(run, starts, most, temperature, xp.key(xp.key(seed, 2), number)):
                lines = text.strip().split("\n")
                draft = ended(" ".join(lines[shots].split()) if len(lines) > shots else "", marks)
                if draft and draft not in plain:
                    found.setdefault(draft)
            if len(found) >= count:
                break
    if not found:
        raise UsageError(f"{base.source} writes nothing like the seeds", hint="other settings: -p shots=0 -p lead=0.5, or more of them; see weft methods port")
    return list(found)[:count]


def end_marks(texts: Sequence[str]) -> str:
    """The marks that end every text and are nowhere else in it; "" if there are none."""
    marks = {text[-1:] for text in texts}
    if all(mark and not mark.isalnum() for mark in marks) and not any(mark in text[:-1] for mark in marks for text in texts):
        return "".join(sorted(marks))
    return ""


def ended(text: str, marks: str) -> str:
    """A text up to its first mark; "" if it has none. Without marks, the text."""
    if not marks:
        return text
    at = min((at for at in map(text.find, marks) if at >= 0), default=-1)
    return text[: at + 1]


def _start(texts: Sequence[str], gen: Generator, shots: int, lead: float) -> str:
    chosen = [texts[k % len(texts)] for k in gen.permutation(max(len(texts), shots + 1))[: shots + 1]]
    words = chosen[-1].split()
    share = float(gen.uniform((1,), 0.5)[0]) + 0.5
    return "\n".join([*chosen[:-1], " ".join(words[: min(len(words) - 1, int(share * lead * len(words) + 1))] if lead else "")])


def _written(run: Running, starts: Sequence[str], most_new: int, temperature: float, seed: int) -> list[str]:
    """Each start and how the model goes on."""
    ids = [opened(run.tokenizer, text) or [run.pad] for text in starts]
    longest = max(map(len, ids))
    given = torch.tensor([[run.pad] * (longest - len(each)) + each for each in ids], device=run.device)
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in ids], device=run.device)
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": None, "top_k": None, "max_new_tokens": most_new, "pad_token_id": run.pad}
    with torch.inference_mode(), torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        torch.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        out = run.model.generate(given, attention_mask=mask, **how)
    return [str(text) for text in run.tokenizer.batch_decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)]
