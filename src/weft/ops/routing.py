"""Routers: from logits over experts to the weights with which each is used. What ops that choose among experts share; torch only."""

from __future__ import annotations

from typing import Any


def top(logits: Any, k: int) -> Any:
    """Weights (..., experts) for logits of that shape: the softmax of the `k` largest, which sums to one; the others are zero.

    In float32, whatever the logits' dtype. Among equal logits, torch's `topk` chooses.
    """
    import torch

    logits = logits.float()
    if k >= logits.shape[-1]:
        return logits.softmax(-1)
    chosen = logits.topk(k, -1).indices
    kept = torch.full_like(logits, float("-inf")).scatter(-1, chosen, logits.gather(-1, chosen))
    return kept.softmax(-1)


def balance(logits: Any, weights: Any, counted: Any = None) -> Any:
    """How unevenly experts are used, a scalar: E sum_e f_e p_e over E experts, as in the Switch Transformer.

    f_e is the share of choices that fall on expert e (no gradient), p_e the mean of its softmax over all experts. It is 1 where all
    are used alike, E where one is all there is. counted: which positions count (0 or 1, of the shape without experts); default: all.
    """
    import torch

    count = logits.shape[-1]
    probabilities, chosen = logits.float().softmax(-1).reshape(-1, count), (weights > 0).float().reshape(-1, count)
    seen = torch.ones_like(chosen[:, :1]) if counted is None else counted.to(chosen).reshape(-1, 1)
    f, p = (chosen * seen).sum(0), (probabilities * seen).sum(0)
    return count * (f * p).sum() / (f.sum() * seen.sum()).clamp(min=1.0)
