"""A discriminator: how much a synthetic text looks like real ones, to a model that has read both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..base import Base
from ..checking.running import running
from ..engine.data import most_tokens, padded
from ..engine.rows import Encoder

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_ROUNDS = 30


def features(base: Base, texts: Sequence[str], *, device: str | None, batch_size: int = 64) -> Array:
    """The mean of the last hidden states over each text's tokens: (texts x width), float64."""
    import numpy as np

    with running(base, [], device, None, "auto", "text") as run:
        ids = Encoder(run.tokenizer, most_tokens(run.tokenizer, run.model.config.to_dict(), 0)).texts(list(texts))
        found = []
        for start in range(0, len(ids), batch_size):
            batch = padded([{"input_ids": each, "labels": 0} for each in ids[start : start + batch_size]], run.pad)
            mask = batch["attention_mask"].to(run.device)
            with torch.inference_mode():
                hidden = run.model(input_ids=batch["input_ids"].to(run.device), attention_mask=mask, output_hidden_states=True).hidden_states[-1]
            share = mask.double() / mask.sum(1, keepdim=True)
            found.append((hidden.double() * share[:, :, None]).sum(1).cpu().numpy())
    return np.concatenate(found)


def realness(real: Array, synthetic: Array, ridge: float = 10.0) -> Array:
    """For each synthetic text the log odds that it is real, from a classifier that was not trained on it.

    Logistic regression on standardised features, both classes with the same weight, with `ridge` times half the squared norm of the
    coefficients added to the loss of as many texts as there are; trained on every other synthetic text, for those between.
    """
    import numpy as np

    out = np.empty(len(synthetic))
    for fold in (0, 1):
        rest = synthetic[1 - fold :: 2] if len(synthetic) > 1 else synthetic
        out[fold::2] = _fitted(real, rest, ridge)(synthetic[fold::2])
    return out


def _fitted(real: Array, synthetic: Array, ridge: float) -> Callable[[Array], Array]:
    """The log odds as a function of features, by Newton's method."""
    import numpy as np

    both = np.concatenate([real, synthetic])
    mean, spread = both.mean(0), both.std(0) + 1e-12

    def scaled(rows: Array) -> Array:
        return np.concatenate([(rows - mean) / spread, np.ones((len(rows), 1))], 1)

    x, y = scaled(both), np.repeat([1.0, 0.0], [len(real), len(synthetic)])
    weight = np.where(y == 1, len(both) / (2 * len(real)), len(both) / (2 * len(synthetic)))
    penalty = np.append(np.full(x.shape[1] - 1, ridge), 1e-6)
    w = np.zeros(x.shape[1])
    for _ in range(_ROUNDS):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        gradient = x.T @ (weight * (p - y)) + penalty * w
        curvature = (x * (weight * np.maximum(p * (1 - p), 1e-6))[:, None]).T @ x + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        w = w - step
        if float(np.abs(step).max()) < 1e-8:
            break
    return lambda rows: np.asarray(scaled(rows) @ w)
