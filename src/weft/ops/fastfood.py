"""fastfood: w' = w + scale * gain * F(coef), with F a random projection that a seed makes again, at n log d operations for n entries.

F does what a matrix of normal numbers (n x d) would, which is never formed (Le, Sarlos and Smola 2013, arXiv 1408.3060): with L the smallest power of
two that is at least d and 64, and z the coefficients followed by zeros up to L, each run of L entries of w, row-major, is

    H(g * permuted(H(s * z))) / sqrt(L)

so that each entry has the variance |z|^2. H is the Walsh-Hadamard transform, s random signs and g normal
numbers of each run, and one permutation serves all runs. Where targets share `coef`, they need different streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod, sqrt
from typing import Any

from .. import xp
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, expect

_LEAST = 64
"""The shortest transform: shorter ones have too few signs to be random."""

_PIECE = 1 << 15
"""Entries that are worked on at a time, so that they stay in cache."""

Transform = Callable[[Array], Array]


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
    runs = _Runs(coef.shape[0], first, count, seed, stream)
    return _projection().apply(coef, runs) if xp.plain(coef) else runs.of(coef, _hadamard)


@dataclass(frozen=True)
class _Runs:
    """The runs that have entries first..first+count, some at a time: what is random of them is made again whenever it is needed."""

    size: int
    first: int
    count: int
    seed: int
    stream: int

    @property
    def length(self) -> int:
        return max(_LEAST, 1 << (self.size - 1).bit_length())

    def of(self, coef: Array, transform: Transform) -> Array:
        """F(coef)."""
        length = self.length
        z = xp.wide(xp.concat([coef, xp.zeros((length - self.size,), coef)], 0))
        places = xp.scrambled(coef, self._keys[0], length)
        out = [transform(normal * xp.take(transform(signs * z), places, 1)) / sqrt(length) for _, signs, normal in self._pieces(coef)]
        skipped = self.first % length
        return xp.concat(out, 0).reshape(-1)[skipped : skipped + self.count]

    def back(self, grad: Array, transform: Transform) -> Array:
        """The transpose of F on a gradient."""
        length, skipped = self.length, self.first % self.length
        behind = -(skipped + self.count) % length
        grad = xp.concat([xp.zeros((skipped,), grad), grad, xp.zeros((behind,), grad)], 0).reshape(-1, length)
        back = xp.scrambled(grad, self._keys[0], length).argsort()
        total = xp.zeros((length,), grad)
        for rows, signs, normal in self._pieces(grad):
            total = total + (signs * transform(xp.take(normal * transform(grad[rows]), back, 1))).sum(0)
        return total[: self.size] / sqrt(length)

    @property
    def _keys(self) -> tuple[int, int]:
        return xp.key(self.seed, 2 * self.stream), xp.key(self.seed, 2 * self.stream + 1)

    def _pieces(self, like: Array) -> Iterator[tuple[slice, Array, Array]]:
        """Which runs, their signs and their normal numbers."""
        length, start = self.length, self.first // self.length
        stop, step = -(-(self.first + self.count) // length), max(1, _PIECE // length)
        for run in range(start, stop, step):
            many = min(step, stop - run)
            made = (make(like, key, run * length, many * length) for make, key in zip((xp.signs, xp.normals), self._keys, strict=True))
            signs, normal = (xp.wide(values).reshape(many, length) for values in made)
            yield slice(run - start, run - start + many), signs, normal


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


def _by_products(length: int, like: Any) -> Transform:
    """The same for rows of `length` as products with matrices, which torch does faster than many short sums.

    H of 256 a is that of 256 within, then that of a across.
    """
    width = min(length, 256)
    matrix = xp.to_torch(_matrix(width)).to(like)  # once for all pieces: on a device it is a copy
    if width == length:
        return lambda x: x @ matrix
    rest = _by_products(length // width, like)

    def transform(x: Any) -> Any:
        across = (x.reshape(x.shape[0], -1, width) @ matrix).transpose(1, 2)
        return rest(across.reshape(-1, across.shape[-1])).reshape(across.shape).transpose(1, 2).reshape(x.shape)

    return transform


@cache
def _matrix(size: int) -> Any:
    import numpy as np

    return _hadamard(np.eye(size, dtype=np.float32))


@cache
def _projection() -> Any:
    import torch

    class Projection(torch.autograd.Function):
        """F(coef), of which nothing is kept for the gradient."""

        @staticmethod
        def forward(ctx: Any, coef: torch.Tensor, runs: _Runs) -> torch.Tensor:
            ctx.runs = runs
            out: torch.Tensor = runs.of(coef, _by_products(runs.length, coef))
            return out

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
            return ctx.runs.back(grads[0], _by_products(ctx.runs.length, grads[0])), None

    return Projection


OP = Fastfood()
