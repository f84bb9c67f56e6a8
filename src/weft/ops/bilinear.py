"""bilinear: w' = w + scale * B M A, on w flattened to a matrix; B (rows x r), M (r x s), A (s x columns).

The form of methods that fix the outer factors and train the small middle one (LaMDA, LoRA-XS).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import xp
from . import layout
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, expect, flat_shape


class Bilinear(Op):
    """A product of three matrices; M B's columns by A's rows. The exact product rounds M A to w's dtype once in between."""

    kind = "bilinear"
    fields = ("A", "M", "B")
    defaults = {"scale": 1.0}
    additive = True
    by_rows = True
    row_fields = frozenset({"B"})

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        rows, columns = flat_shape(shape)
        r, s = expect(t, "M", [None, None])
        expect(t, "B", [rows, r])
        expect(t, "A", [s, columns])

    def init(self, shape: Shape, gen: Generator, *, rank: int = 8) -> dict[str, Any]:
        """A and B normal with standard deviation 1/sqrt of their long side, M zero."""
        import numpy as np

        rows, columns = flat_shape(shape)
        return {"A": gen.normal((rank, columns), columns**-0.5), "M": np.zeros((rank, rank), np.float32), "B": gen.normal((rows, rank), rows**-0.5)}

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        inner = xp.narrow(xp.mm(t["M"], t["A"]), w)
        return xp.narrow(xp.wide(w) + cfg["scale"] * xp.mm(t["B"], inner).reshape(w.shape), w)

    def fast(self, m: Any, param: str, cfg: Config) -> bool:
        return param == "weight" and layout.of(m) is not None

    def forward(self, m: Any, x: Any, y: Any, t: Tensors, cfg: Config, ctx: Any) -> Any:
        return layout.added(m, x, y, t["A"], t["B"] @ t["M"], cfg["scale"])


OP = Bilinear()
