"""seeded: coefficients over random bases that a seed makes again, so the file does not grow with the bases.

rank = 0:  w' = w + scale / sqrt(k) * sum_i coef_i G_i         random subspace (Li et al. 2018, arXiv 1804.08838)
rank > 0:  w' = w + scale * B A, B = sum_j b_j B_j / sqrt(k), A = sum_i a_i A_i / sqrt(k)
                                                               NOLA (Koohpayegani et al. 2023, arXiv 2310.02556)

All bases are standard normal numbers keyed by (seed, stream) and their position (see `weft.xp.normals`), w flattened to
a matrix. `stream` must differ between targets that should have different bases.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

from .. import xp
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, expect, flat_shape


class Seeded(Op):
    """`coef` (k) with rank 0, or `a` (k) and `b` (k) with a rank."""

    kind = "seeded"
    optional = ("coef", "a", "b")
    defaults = {"scale": 1.0, "seed": 0, "stream": 0, "rank": 0, "first_row": 0, "all_rows": 0}
    additive = True
    by_rows = True

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        want = {"a", "b"} if cfg["rank"] else {"coef"}
        if set(t) != want:
            raise ValueError(f"rank {cfg['rank']} needs the fields {sorted(want)}, got {sorted(t)}")
        for field in t:
            if expect(t, field, [None])[0] == 0:
                raise ValueError(f"field {field}: expected at least one coefficient, shape [any], got [0]")
        rows, columns = flat_shape(shape)
        if min(cfg["rank"], cfg["seed"], cfg["stream"], cfg["first_row"], cfg["all_rows"]) < 0:
            raise ValueError("rank, seed, stream, first_row and all_rows must not be negative")
        if cfg["rank"] > min(rows, columns):  # bases are made in memory, so a number in a small file must not ask for any amount of it
            raise ValueError(f"rank {cfg['rank']} is larger than a side of the target, {rows} x {columns}")
        if cfg["first_row"] + rows > (cfg["all_rows"] or rows):
            raise ValueError(f"rows {cfg['first_row']} to {cfg['first_row'] + rows} are outside bases of {cfg['all_rows'] or rows} rows")

    def init(self, shape: Shape, gen: Generator, *, count: int = 16) -> dict[str, Any]:
        import numpy as np

        return {"coef": np.zeros(count, np.float32)}

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        rows, columns = flat_shape(tuple(w.shape))
        first, total, rank = cfg["first_row"], cfg["all_rows"] or rows, cfg["rank"]
        if rank:
            # stream numbers 2s and 2s+1 keep the bases of A and B apart
            a = _mix(w, t["a"], xp.key(cfg["seed"], 2 * cfg["stream"]), 0, rank * columns, rank * columns)
            b = _mix(w, t["b"], xp.key(cfg["seed"], 2 * cfg["stream"] + 1), first * rank, rows * rank, total * rank)
            change = xp.mm(b.reshape(rows, rank), a.reshape(rank, columns))
        else:
            change = xp.wide(_mix(w, t["coef"], xp.key(cfg["seed"], 2 * cfg["stream"]), first * columns, rows * columns, total * columns))
        return xp.narrow(xp.wide(w) + cfg["scale"] * change.reshape(w.shape), w)

    def rows(self, t: Mapping[str, Any], cfg: Config, shape: Shape, lo: int, hi: int) -> tuple[dict[str, Array], Config]:
        return {f: v.read() for f, v in t.items()}, {**cfg, "first_row": cfg["first_row"] + lo, "all_rows": cfg["all_rows"] or shape[0]}


def _mix(like: Array, coefficients: Array, key: int, start: int, count: int, size: int) -> Array:
    """sum_i coefficients_i * basis_i / sqrt(k), entries start..start+count of bases that are `size` long each.

    A chain of sums in fixed order: the same bits in blocks and in both engines.
    """
    k = coefficients.shape[0]
    total = xp.wide(xp.zeros((count,), coefficients))
    for i in range(k):
        total = total + xp.wide(coefficients[i : i + 1]) * xp.wide(xp.normals(like, key, i * size + start, count))
    return xp.narrow(total / sqrt(k), like)


OP = Seeded()
