"""One side of a check: what a model says to every row of a task, kept row by row so that two sides can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, fsum, isnan

import torch

from ..engine.data import most_tokens
from ..engine.rows import Encoder
from ..errors import UsageError
from .answers import greedy, prompts
from .metrics import Accuracy, Likelihood
from .running import Running
from .tasks import Task, blamed, cut

MARGIN = 8
"""Tokens that an answer may be longer than the longest right one of its task."""

UNTOLD = 24
"""Tokens of an answer where no right one is known."""


@dataclass(frozen=True)
class How:
    """How to measure: rows at once, tokens after which a row is cut, the longest answer (None: from the task), where answers end, and
    how many rows' next-token distributions are compared."""

    batch_size: int
    max_length: int
    max_new_tokens: int | None
    stop: tuple[str, ...]
    kl_rows: int


@dataclass
class Measured:
    """A task on one side, in the order of its rows.

    answers:   the label or the text that the model gives; expected: the right one, None where nobody knows it
    right:     whether they are the same; None where there is no right one
    nll, tokens, hits: of each row, over the tokens of its right answer (or its text): -log p in nats, how many there are, how many of
               them are the model's first choice when everything before is given (teacher forcing). [] where no such measure is taken
    first:     log p of what comes first after a prompt, for the first rows (rows x vocabulary), and kl: KL(base || this) of these in nats
    finite:    whether no logit was NaN or plus infinity; truncated: rows that were cut
    """

    answers: list[str] = field(default_factory=list)
    expected: list[str | None] = field(default_factory=list)
    right: list[bool | None] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    first: torch.Tensor | None = None
    kl: list[float] = field(default_factory=list)
    finite: bool = True
    truncated: int = 0

    def metrics(self, task: Task) -> dict[str, float]:
        """The values of the task's metrics. NaN if a logit was."""
        judged = [right for right in self.right if right is not None]
        share = sum(judged) / len(judged) if judged else float("nan")
        nll = fsum(self.nll) / sum(self.tokens) if self.nll else float("nan")
        found = {
            "accuracy": share,
            "exact_match": share,
            "nll": nll,
            "perplexity": exp(nll) if nll < 700 else nll if isnan(nll) else float("inf"),
            "teacher_forced_token_accuracy": sum(self.hits) / sum(self.tokens) if self.hits else float("nan"),
            "teacher_forced_exact": sum(h == t for h, t in zip(self.hits, self.tokens, strict=True)) / len(self.hits) if self.hits else float("nan"),
        }
        return {name: found[name] if self.finite else float("nan") for name in task.metrics}


def steps(task: Task) -> int:
    """How often `measure` calls its progress, in rows."""
    return len(task.rows) * (2 if task.kind == "generation" else 1)


def measure(run: Running, task: Task, how: How, before: Measured | None, progress: Callable[[int], None]) -> Measured:
    """What the model says to the task's rows. `before` is the base's side: distributions are compared with it instead of kept."""
    most = most_tokens(run.tokenizer, run.model.config.to_dict(), how.max_length)
    found = Measured()
    with blamed(task.name):
        if task.kind == "classification":
            _classify(run, task, how, most, found, progress)
        elif task.kind == "text":
            _read(run, task, how, most, found, progress)
        else:
            _ask(run, task, how, most, found, before, progress)
            if task.kind == "generation":
                _read(run, task, how, most, found, progress)
    found.finite = found.finite and not any(map(isnan, found.nll))
    return found


def _classify(run: Running, task: Task, how: How, most: int, found: Measured, progress: Callable[[int], None]) -> None:
    encode, metric, order = Encoder(run.tokenizer, most), Accuracy(), []
    examples = encode.classified(task.rows, run.model.config.to_dict(), run.model.config.num_labels)
    labels = [example["labels"] for example in examples]
    for numbers, batch, logits in run.batches(examples, how.batch_size, None):
        order += numbers
        metric.add(logits, batch["labels"])
        progress(len(numbers))
    rows = dict(zip(order, metric.rows, strict=True))
    names = run.model.config.id2label
    found.answers = [str(names[rows[k][1]]) for k in range(len(rows))]
    found.expected = [str(names[label]) for label in labels]
    found.right = [rows[k][1] == label and not isnan(rows[k][0]) for k, label in enumerate(labels)]
    found.nll, found.tokens = [rows[k][0] for k in range(len(rows))], [1] * len(rows)
    found.truncated = encode.cut


def _read(run: Running, task: Task, how: How, most: int, found: Measured, progress: Callable[[int], None]) -> None:
    encode, metric, order = Encoder(run.tokenizer, most), Likelihood(), []
    examples = encode.language(task.rows) if task.kind == "text" else encode.completions(task.rows)
    for numbers, batch, logits in run.batches(examples, how.batch_size, None):
        order += numbers
        metric.add(logits, batch["labels"])
        progress(len(numbers))
    rows = dict(zip(order, metric.rows, strict=True))
    found.nll, found.hits, found.tokens = (list(column) for column in zip(*(rows[k] for k in range(len(rows))), strict=True))
    found.truncated = max(found.truncated, encode.cut)


def _ask(run: Running, task: Task, how: How, most: int, found: Measured, before: Measured | None, progress: Callable[[int], None]) -> None:
    wanted = [row.get("completion") for row in task.rows]
    most_new = how.max_new_tokens or min(_longest(run, wanted), max(1, most // 2))
    if most_new >= most:
        raise UsageError(
            f"max_new_tokens is {most_new}, and prompt and answer together may have {most} tokens, so nothing is left for the prompt",
            hint="a larger max_length, if the model takes it, or a smaller max_new_tokens",
        )
    ids, found.truncated = prompts(run.tokenizer, task.rows, most - most_new)
    compared = min(len(ids), how.kl_rows) if task.kind == "agreement" else 0
    kl: dict[int, float] = {}

    def first(numbers: list[int], logits: torch.Tensor) -> None:
        for place, k in enumerate(numbers):
            if k < compared:
                said = logits[place].float().log_softmax(-1).cpu()
                if before is None:
                    if found.first is None:
                        found.first = torch.empty(compared, len(said))
                    found.first[k] = said
                elif before.first is not None and before.first.shape[1] == len(said):
                    kl[k] = divergence(before.first[k], said)

    found.answers, finite = greedy(run, ids, most_new, how.stop, how.batch_size, first, progress)
    found.finite = all(finite)
    found.kl = [kl[k] for k in sorted(kl)]
    found.expected = [None if answer is None else cut(answer, how.stop) for answer in wanted]
    found.right = [None if right is None else fine and right == said for right, said, fine in zip(found.expected, found.answers, finite, strict=True)]


def _longest(run: Running, wanted: Sequence[str | None]) -> int:
    """Tokens to generate: the longest right answer and a margin."""
    known = [answer for answer in wanted if answer is not None]
    if not known:
        return UNTOLD
    return MARGIN + max(map(len, run.tokenizer(known, add_special_tokens=False, verbose=False)["input_ids"]))


def divergence(base: torch.Tensor, other: torch.Tensor) -> float:
    """KL(base || other) in nats, of two vectors of log probabilities; what the base gives no probability counts nothing."""
    p, q = base.double(), other.double()
    found = float(torch.where(p == -float("inf"), torch.zeros_like(p), p.exp() * (p - q)).sum())
    return found if isnan(found) else max(found, 0.0)  # rounding may leave equal distributions a hair below zero
