"""sparse: w'.flat[index] = w.flat[index] + scale * values."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from .. import xp
from .assign import entries_in_rows
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, check_positions, expect, expect_positions


class Sparse(Op):
    """Values added at flat positions `index` (sorted, unique)."""

    kind = "sparse"
    fields = ("index", "values")
    defaults = {"scale": 1.0}
    additive = True
    by_rows = True

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        expect(t, "values", expect_positions(t, prod(shape)))

    def init(self, shape: Shape, gen: Generator, *, density: float = 0.1) -> dict[str, Any]:
        import numpy as np

        size = int(np.prod(shape, dtype=np.int64))
        count = min(size, max(1, round(density * size)))
        return {"index": np.sort(gen.permutation(size)[:count]), "values": np.zeros(count, np.float32)}

    def check_values(self, shape: Shape, cfg: Config, t: Tensors) -> None:
        check_positions(t["index"], prod(shape))

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        old = xp.take(w.reshape(-1), t["index"])
        return xp.put(w, t["index"], xp.narrow(xp.wide(old) + cfg["scale"] * xp.wide(t["values"]), w))

    def rows(self, t: Mapping[str, Any], cfg: Config, shape: Shape, lo: int, hi: int) -> tuple[dict[str, Array], Config]:
        return entries_in_rows(t, shape, lo, hi), cfg


OP = Sparse()
