"""tucker: w' = w + scale * core x_0 U0 x_1 U1 ... (one factor per axis of w).

Keeps the 4-d structure of convolutions (FLoRA, Si et al. 2024, arXiv 2405.14739); on a matrix it is U0 core U1^T.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from .. import xp
from . import layout
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, expect

MAX_AXES = 6


class Tucker(Op):
    """core (r0, r1, ...) and U0 (n0 x r0), U1 (n1 x r1), ... for a target of shape (n0, n1, ...).

    Axes are expanded from the last to the first, each product exact and rounded to w's dtype.
    """

    kind = "tucker"
    fields = ("core",)
    optional = tuple(f"U{k}" for k in range(MAX_AXES))
    defaults = {"scale": 1.0}
    additive = True
    by_rows = True
    row_fields = frozenset({"U0"})

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        if not 1 <= len(shape) <= MAX_AXES:
            raise ValueError(f"a target of 1 to {MAX_AXES} axes is needed, got {list(shape)}")
        ranks = expect(t, "core", [None] * len(shape))
        factors = {f"U{k}" for k in range(len(shape))}
        if set(t) != factors | {"core"}:
            raise ValueError(f"expected the factors {sorted(factors)}, got {sorted(set(t) - {'core'})}")
        for axis, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
            expect(t, f"U{axis}", [size, rank])

    def init(self, shape: Shape, gen: Generator, *, rank: int = 8) -> dict[str, Any]:
        """Factors normal with standard deviation 1/sqrt(size), core zero; ranks are min(rank, size)."""
        import numpy as np

        ranks = tuple(min(rank, size) for size in shape)
        factors = {f"U{k}": gen.normal((n, r), n**-0.5) for k, (n, r) in enumerate(zip(shape, ranks, strict=True))}
        return {"core": np.zeros(ranks, np.float32), **factors}

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        x = t["core"]
        last = len(w.shape) - 1
        for axis in range(last, -1, -1):
            # the axis to expand stands first; after each product it goes to the end, so all axes come round once
            order = (last, *range(last))
            x = xp.permute_axes(x, order)
            shape = x.shape
            x = xp.mm(t[f"U{axis}"], x.reshape(shape[0], prod(shape[1:])))
            x = x.reshape(w.shape[axis], *shape[1:])
            if axis:
                x = xp.narrow(x, w)
        return xp.narrow(xp.wide(w) + cfg["scale"] * x, w)

    def fast(self, m: Any, param: str, cfg: Config) -> bool:
        return param == "weight" and layout.of(m) in ("linear", "conv1d", "embedding")

    def forward(self, m: Any, x: Any, y: Any, t: Tensors, cfg: Config, ctx: Any) -> Any:
        return layout.added(m, x, y, t["U1"].T, t["U0"] @ t["core"], cfg["scale"])


OP = Tucker()
