"""kron: w' = w + scale * sum_i kron(A_i, B_i), on w flattened to a matrix.

The Kronecker sums of Compacter / PHM layers (Mahabadi et al. 2021, arXiv 2106.04647) and of LoKr.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import xp
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, expect, flat_shape


def _halves(size: int) -> tuple[int, int]:
    """The two factors of `size` nearest to each other, the smaller first."""
    small = next(k for k in range(int(size**0.5), 0, -1) if size % k == 0)
    return small, size // small


def kron_sum(a: Array, b: Array) -> Array:
    """sum_i kron(a_i, b_i) of a (n, p, q) and b (n, s, t): (p s, q t), as one product over i."""
    n, p, q = a.shape
    _, s, t = b.shape
    out = xp.mm(xp.permute_axes(a.reshape(n, p * q), (1, 0)), b.reshape(n, s * t))
    return xp.permute_axes(out.reshape(p, q, s, t), (0, 2, 1, 3)).reshape(p * s, q * t)


class Kron(Op):
    """A (n, p, q) and B (n, s, t) with p s rows and q t columns in all."""

    kind = "kron"
    fields = ("A", "B")
    defaults = {"scale": 1.0}
    additive = True

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        rows, columns = flat_shape(shape)
        n, p, q = expect(t, "A", [None, None, None])
        _, s, u = expect(t, "B", [n, None, None])
        if p * s != rows or q * u != columns:
            raise ValueError(f"kron of {p}x{q} and {s}x{u} is {p * s}x{q * u}, the target is {rows}x{columns}")

    def init(self, shape: Shape, gen: Generator, *, terms: int = 4) -> dict[str, Any]:
        """A normal with standard deviation 1/sqrt(columns of A), B zero; sizes split as evenly as they divide."""
        import numpy as np

        rows, columns = flat_shape(shape)
        (p, s), (q, u) = _halves(rows), _halves(columns)
        return {"A": gen.normal((terms, p, q), q**-0.5), "B": np.zeros((terms, s, u), np.float32)}

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        return xp.narrow(xp.wide(w) + cfg["scale"] * kron_sum(t["A"], t["B"]).reshape(w.shape), w)


OP = Kron()
