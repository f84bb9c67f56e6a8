"""svd: w' = w + scale * (P diag(lam) Q - P0 diag(lam0) Q0), on w flattened to a matrix.

The form of AdaLoRA (Zhang et al. 2023, arXiv 2303.10512), of shared factor pairs with own coefficients (S2-LoRA) and
of methods that retrain singular values. The frozen fields with a 0 are the part taken out of w (KaSA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import xp
from . import layout
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, expect, flat_shape


class Svd(Op):
    """P (rows x r), lam (r), Q (r x columns)."""

    kind = "svd"
    fields = ("P", "lam", "Q")
    optional = ("P0", "lam0", "Q0")
    trainable = ("P", "lam", "Q")
    defaults = {"scale": 1.0}
    additive = True
    by_rows = True
    row_fields = frozenset({"P", "P0"})

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        rows, columns = flat_shape(shape)
        for suffix in ("", "0"):
            names = [name + suffix for name in ("P", "lam", "Q")]
            if any(name in t for name in names):
                if not all(name in t for name in names):
                    raise ValueError("fields P0, lam0 and Q0 come together")
                rank = expect(t, names[1], [None])[0]
                expect(t, names[0], [rows, rank])
                expect(t, names[2], [rank, columns])

    def init(self, shape: Shape, gen: Generator, *, rank: int = 8) -> dict[str, Any]:
        """P and Q are normal with standard deviation 0.02, lam is zero (AdaLoRA's start)."""
        import numpy as np

        rows, columns = flat_shape(shape)
        return {"P": gen.normal((rows, rank), 0.02), "lam": np.zeros(rank, np.float32), "Q": gen.normal((rank, columns), 0.02)}

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        change = xp.mm(t["P"], t["Q"] * t["lam"].reshape(-1, 1))
        if "P0" in t:
            change = change - xp.mm(t["P0"], t["Q0"] * t["lam0"].reshape(-1, 1))
        return xp.narrow(xp.wide(w) + cfg["scale"] * change.reshape(w.shape), w)

    def fast(self, m: Any, param: str, cfg: Config) -> bool:
        return param == "weight" and layout.of(m) is not None

    def forward(self, m: Any, x: Any, y: Any, t: Tensors, cfg: Config, ctx: Any) -> Any:
        inner = t["Q"] * t["lam"].reshape(-1, 1)
        if "P0" not in t:
            return layout.added(m, x, y, inner, t["P"], cfg["scale"])
        # the difference first: a start from a decomposition is then the base to the bit
        change = layout.product(m, x, inner, t["P"]) - layout.product(m, x, t["Q0"] * t["lam0"].reshape(-1, 1), t["P0"])
        return y + cfg["scale"] * change


OP = Svd()
