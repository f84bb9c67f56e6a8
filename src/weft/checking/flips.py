"""Flips: rows that an update turns from right to wrong, or from wrong to right, and what can be said of their number.

    found = count([outcome(*row) for row in rows], samples=1000, seed=0)
    found["negative"], found["mcnemar_p"], found["interval"]

Two models with the same accuracy may be right about different rows. Negative flips (right before, wrong now) are what
people notice of an update (Echterhoff et al. 2024, MUSCLE, arXiv:2407.09435).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OUTCOMES = ("negative", "positive", "changed", "both_wrong", "both_right")
"""What can become of a row that has an answer, those to look at first at the front. Each row is exactly one of them."""

LEVEL = 0.95
"""The probability that an interval is meant to have."""


def outcome(base: bool, delta: bool, same: bool) -> str:
    """One of `OUTCOMES`, from who is right and whether both gave the same answer: "changed" is both wrong, with different answers."""
    if base != delta:
        return "negative" if base else "positive"
    return "both_right" if base else "both_wrong" if same else "changed"


def count(outcomes: Sequence[str], *, samples: int, seed: int) -> dict[str, Any]:
    """The report on flips: how many rows of each outcome, and

    nfr, pfr:  the shares of negative and of positive flips in all rows
    mcnemar_p: see `mcnemar`
    interval:  see `interval`
    """
    found: dict[str, Any] = {name: outcomes.count(name) for name in OUTCOMES}
    negative, positive, rows = found["negative"], found["positive"], len(outcomes)
    rates = {"nfr": negative / rows, "pfr": positive / rows, "mcnemar_p": mcnemar(negative, positive)}
    return {**found, **rates, "interval": interval(negative, positive, rows, samples=samples, seed=seed)}


def mcnemar(negative: int, positive: int) -> float:
    """McNemar's exact test, two-sided: were losses and gains equally likely, how often would flips be at least as lopsided as these?

    The binomial distribution with probability 1/2 on the rows that flipped, summed exactly; 1.0 if there are none.
    """
    flips, term, tail = negative + positive, 1, 0
    for k in range(min(negative, positive) + 1):
        tail += term  # of binomials(flips, 0 .. k)
        term = term * (flips - k) // (k + 1)
    doubled: float = 2 * tail / 2**flips
    return min(1.0, doubled)


def interval(negative: int, positive: int, rows: int, *, samples: int, seed: int) -> list[float]:
    """The change of accuracy, as the 2.5 % and 97.5 % percentiles of its bootstrap distribution: [low, high].

    Rows are drawn with replacement, each with both its answers. Of a row only its flip matters, so drawing rows is
    drawing three counts. Depends on the seed alone. Rows count as independent: several prompts of one edit are not, and
    the interval of these is too narrow.
    """
    import numpy as np

    drawn = np.random.default_rng(seed).multinomial(rows, [negative / rows, positive / rows, (rows - negative - positive) / rows], size=samples)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / rows, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def bound(rows: int) -> float:
    """The rule of three: where none of `rows` rows flipped, the rate of flips is below this with a confidence of 95 %."""
    return min(1.0, 3 / rows)
