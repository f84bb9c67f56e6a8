"""lowrank: w' = w + scale * (B A - B0 A0), on w flattened to a matrix (first axis by the others).

LoRA (Hu et al. 2021, arXiv 2106.09685) has scale = alpha / rank. The optional frozen pair A0, B0 is the part that a
start from a decomposition of w takes out (PiSSA, CorDA): with A = A0 and B = B0 the result is w, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import xp
from . import layout
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, expect, flat_shape


class LowRank(Op):
    """A product of two thin matrices, B (rows x r) and A (r x columns), added to the tensor as stored."""

    kind = "lowrank"
    fields = ("A", "B")
    optional = ("A0", "B0")
    trainable = ("A", "B")
    defaults = {"scale": 1.0}
    additive = True
    drops = True
    by_rows = True
    row_fields = frozenset({"B", "B0"})

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        rows, columns = flat_shape(shape)
        for a, b in (("A", "B"), ("A0", "B0")):
            if a in t or b in t:
                if a not in t or b not in t:
                    raise ValueError("fields A0 and B0 come together")
                rank = expect(t, a, [None, columns])[0]
                expect(t, b, [rows, rank])

    def init(self, shape: Shape, gen: Generator, *, rank: int = 8) -> dict[str, Any]:
        """A is Kaiming-uniform (bound 1/sqrt(columns), as nn.Linear with a = sqrt 5), B is zero."""
        import numpy as np

        rows, columns = flat_shape(shape)
        return {"A": gen.uniform((rank, columns), columns**-0.5), "B": np.zeros((rows, rank), np.float32)}

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        change = xp.mm(t["B"], t["A"])
        if "A0" in t:
            change = change - xp.mm(t["B0"], t["A0"])
        return xp.narrow(xp.wide(w) + cfg["scale"] * change.reshape(w.shape), w)

    def fast(self, m: Any, param: str, cfg: Config) -> bool:
        return param == "weight" and layout.of(m) is not None

    def forward(self, m: Any, x: Any, y: Any, t: Tensors, cfg: Config, ctx: Any) -> Any:
        if "A0" not in t:
            return layout.added(m, ctx.drop(x), y, t["A"], t["B"], cfg["scale"])
        # the difference first: a start from a decomposition is then the base to the bit
        change = layout.product(m, ctx.drop(x), t["A"], t["B"]) - layout.product(m, x, t["A0"], t["B0"])
        return y + cfg["scale"] * change


OP = LowRank()
