"""Metrics: what a model's logits say about the right answers.

Sums are exact (`math.fsum` over one number a row), so a metric does not depend on the order or size of batches beyond
what the model itself does with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, fsum
from typing import Any

import torch

from ..engine.data import IGNORE


class Accuracy:
    """Classification: the share of rows whose largest logit is the right label's, and the mean cross-entropy in nats."""

    def __init__(self) -> None:
        self._right: list[bool] = []
        self._nll: list[float] = []
        self._said: list[int] = []

    @property
    def rows(self) -> list[tuple[float, int]]:
        """Of each row seen so far: its cross-entropy, and the class with the largest logit."""
        return list(zip(self._nll, self._said, strict=True))

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """`logits` (rows x classes), `labels` (rows)."""
        said = logits.float().log_softmax(-1)
        first = logits.argmax(-1)
        self._said += first.tolist()
        self._right += (first == labels).tolist()
        self._nll += (-said.gather(-1, labels[:, None])[:, 0]).tolist()

    def result(self) -> dict[str, float]:
        return {"accuracy": sum(self._right) / len(self._right), "nll": fsum(self._nll) / len(self._nll)}


class Likelihood:
    """Language modelling: nll (mean over target tokens, in nats), its exponential perplexity, and two scores with teacher forcing.

    teacher_forced_token_accuracy is the share of target tokens that are the model's first choice when everything before is given;
    teacher_forced_exact the share of rows in which all of them are: those that greedy generation would write whole.
    """

    def __init__(self) -> None:
        self._nll: list[float] = []
        self._right: list[int] = []
        self._tokens: list[int] = []

    @property
    def tokens(self) -> int:
        """Target tokens seen so far."""
        return sum(self._tokens)

    @property
    def rows(self) -> list[tuple[float, int, int]]:
        """Of each row seen so far, over its target tokens: the sum of -log p, how many are the first choice, how many there are."""
        return list(zip(self._nll, self._right, self._tokens, strict=True))

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """`logits` (rows x length x vocabulary), `labels` (rows x length, -100 where nothing is predicted)."""
        for row, target in zip(logits[:, :-1], labels[:, 1:], strict=True):  # row by row: a softmax over a whole batch would double the memory
            wanted = target != IGNORE
            said, truth = row[wanted].float(), target[wanted]
            self._nll.append(float(-said.log_softmax(-1).gather(-1, truth[:, None]).double().sum()))
            self._right.append(int((said.argmax(-1) == truth).sum()))
            self._tokens.append(len(truth))

    def result(self) -> dict[str, float]:
        nll = fsum(self._nll) / self.tokens
        whole = sum(right == tokens for right, tokens in zip(self._right, self._tokens, strict=True))
        return {
            "nll": nll,
            "perplexity": exp(nll) if nll < 700 else float("inf"),
            "teacher_forced_token_accuracy": sum(self._right) / self.tokens,
            "teacher_forced_exact": whole / len(self._tokens),
        }


def shown(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON values: an infinite perplexity is null."""
    return {name: None if isinstance(value, float) and value - value != 0 else value for name, value in metrics.items()}
