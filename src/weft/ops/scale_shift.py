"""scale_shift: w' = scale * w + shift, one number per position along an axis.

SSF (Lian et al. 2022, arXiv 2210.08823) folds its y = gamma * x + beta as W' = gamma W, b' = gamma b + beta; IA3 scales
rows or columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import xp
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, expect, spread


class ScaleShift(Op):
    """Vectors `scale` and/or `shift` along `axis` (negative counts from the end)."""

    kind = "scale_shift"
    optional = ("scale", "shift")
    defaults = {"axis": 0}
    by_rows = True

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        if not t:
            raise ValueError("a field scale or shift is needed")
        if not -len(shape) <= cfg["axis"] < len(shape):
            raise ValueError(f"axis {cfg['axis']} is outside a target of shape {list(shape)}")
        for field in t:
            expect(t, field, [shape[cfg["axis"]]])

    def init(self, shape: Shape, gen: Generator, *, axis: int = 0) -> dict[str, Any]:
        import numpy as np

        return {"scale": np.ones(shape[axis], np.float32), "shift": np.zeros(shape[axis], np.float32)}

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        shape = spread(tuple(w.shape), cfg["axis"])
        out = xp.wide(w)
        if "scale" in t:
            out = out * xp.wide(t["scale"]).reshape(shape)
        if "shift" in t:
            out = out + xp.wide(t["shift"]).reshape(shape)
        return xp.narrow(out, w)

    def rows(self, t: Mapping[str, Any], cfg: Config, shape: Shape, lo: int, hi: int) -> tuple[dict[str, Array], Config]:
        along_rows = cfg["axis"] % len(shape) == 0
        return {f: v.rows(lo, hi) if along_rows else v.read() for f, v in t.items()}, cfg


OP = ScaleShift()
