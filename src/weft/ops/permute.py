"""permute: w' = w with its entries along an axis reordered, w'[i] = w[perm[i]].

Weight matching writes one permutation of a residual stream as many of these with one shared `perm` and one `group`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import xp
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, expect


class Permute(Op):
    """perm: where each position along `axis` comes from."""

    kind = "permute"
    fields = ("perm",)
    defaults = {"axis": 0}

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        if not -len(shape) <= cfg["axis"] < len(shape):
            raise ValueError(f"axis {cfg['axis']} is outside a target of shape {list(shape)}")
        expect(t, "perm", [shape[cfg["axis"]]], "index")

    def init(self, shape: Shape, gen: Generator, *, axis: int = 0) -> dict[str, Any]:
        import numpy as np

        return {"perm": np.arange(shape[axis], dtype=np.int64)}

    def example(self, shape: Shape, gen: Generator) -> dict[str, Any]:
        return {"perm": gen.permutation(shape[0])}

    def streams(self, shape: Shape, cfg: Config) -> bool:
        return bool(cfg["axis"] % len(shape) != 0)

    def check_values(self, shape: Shape, cfg: Config, t: Tensors) -> None:
        import numpy as np

        size = shape[cfg["axis"]]
        if not np.array_equal(np.sort(t["perm"]), np.arange(size)):
            raise ValueError(f"field perm: not a permutation of 0..{size - 1}")

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        return xp.take(w, t["perm"], cfg["axis"] % len(w.shape))


OP = Permute()
