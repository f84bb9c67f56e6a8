"""dense: w' = w + scale * values."""

from __future__ import annotations

from typing import Any

from .. import xp
from . import layout
from .op import Array, Config, Generator, Op, Shape, Tensors, expect


class Dense(Op):
    """A full increment: `values` has the target's shape."""

    kind = "dense"
    fields = ("values",)
    defaults = {"scale": 1.0}
    additive = True
    by_rows = True
    row_fields = frozenset({"values"})

    def check(self, shape: Shape, cfg: Config, t: Any) -> None:
        expect(t, "values", shape)

    def init(self, shape: Shape, gen: Generator) -> dict[str, Any]:
        import numpy as np

        return {"values": np.zeros(shape, np.float32)}

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        return xp.narrow(xp.wide(w) + cfg["scale"] * xp.wide(t["values"]), w)

    def fast(self, m: Any, param: str, cfg: Config) -> bool:
        return param == "bias" and layout.of(m) is not None

    def forward(self, m: Any, x: Any, y: Any, t: Tensors, cfg: Config, ctx: Any) -> Any:
        return y + cfg["scale"] * t["values"].reshape(layout.channels(m, y))


OP = Dense()
