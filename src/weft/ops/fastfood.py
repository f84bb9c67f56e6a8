"""fastfood: w' = w + scale * gain * F(coef), with F a random projection that a seed makes again, at n log d operations for n entries.

F does what a matrix of normal numbers (n x d) would, which is never formed (Le, Sarlos and Smola 2013, arXiv 1408.3060): with L the smallest power of
two that is at least d and 64, and z the coefficients followed by zeros up to L, each run of L entries of w, row-major, is

    H(g * permuted(H(s * z))) / sqrt(L)

so that each entry has the variance |z|^2. H is the Walsh-Hadamard transform, s random signs and g normal
numbers of each run, and one permutation serves all runs. Where targets share `coef`, they need different streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod, sqrt
from typing import Any

from .. import xp
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, expect

_LEAST = 64
"""The shortest transform: shorter ones have too few signs to be random."""


class Fastfood(Op):
    """`coef` (d), which targets may share, and optionally the target's own factor `gain` (1)."""

    kind = "fastfood"
    fields = ("coef",)
    optional = ("gain",)
    defaults = {"scale": 1.0, "seed": 0, "stream": 0, "first": 0}
    additive = True
    by_rows = True

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        if expect(t, "coef", [None])[0] == 0:
            raise ValueError("field coef: expected at least one coefficient, shape [any], got [0]")
        if "gain" in t:
            expect(t, "gain", [1])
        if min(cfg["seed"], cfg["stream"], cfg["first"]) < 0:
            raise ValueError("seed, stream and first must not be negative")

    def init(self, shape: Shape, gen: Generator, *, count: int = 16) -> dict[str, Any]:
        import numpy as np

        return {"coef": np.zeros(count, np.float32)}

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        count = prod(w.shape)
        change = xp.wide(xp.narrow(_projected(t["coef"], cfg["first"], count, cfg["seed"], cfg["stream"]), w))
        if "gain" in t:
            change = change * xp.wide(t["gain"])
        return xp.narrow(xp.wide(w) + cfg["scale"] * change.reshape(w.shape), w)

    def rows(self, t: Mapping[str, Any], cfg: Config, shape: Shape, lo: int, hi: int) -> tuple[dict[str, Array], Config]:
        return {f: v.read() for f, v in t.items()}, {**cfg, "first": cfg["first"] + lo * prod(shape[1:])}


def _projected(coef: Array, first: int, count: int, seed: int, stream: int) -> Array:
    """Entries first..first+count of F(coef), wide."""
    length = _LEAST
    while length < coef.shape[0]:
        length *= 2
    start = first // length  # the first run
    runs = -(-(first + count) // length) - start
    one, two = xp.key(seed, 2 * stream), xp.key(seed, 2 * stream + 1)
    z = xp.wide(xp.concat([coef, xp.zeros((length - coef.shape[0],), coef)], 0))
    signs = xp.wide(xp.signs(coef, one, start * length, runs * length)).reshape(runs, length)
    inner = xp.take(_hadamard(signs * z), xp.scrambled(coef, one, length), 1)
    normal = xp.wide(xp.normals(coef, two, start * length, runs * length)).reshape(runs, length)
    return (_hadamard(normal * inner) / sqrt(length)).reshape(-1)[first - start * length :][:count]


def _hadamard(x: Array) -> Array:
    """The Walsh-Hadamard transform of each row, not normalised: sums and differences in fixed order, the same bits in both engines."""
    runs, length = x.shape
    half = 1
    while half < length:
        pairs = x.reshape(runs, length // (2 * half), 2, half)
        low, high = pairs[:, :, 0:1], pairs[:, :, 1:2]
        x = xp.concat([low + high, low - high], 2).reshape(runs, length)
        half *= 2
    return x


OP = Fastfood()
