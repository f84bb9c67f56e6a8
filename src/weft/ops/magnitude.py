"""magnitude: w' = m * w / ||w||, norms over all axes but one.

The outer part of DoRA (Liu et al. 2024, arXiv 2402.09353), placed after a `lowrank` on the same target:
W' = m (W + s B A) / ||W + s B A||. Peers divide by the norm of each output's weights (a row of a Linear: axis 0; a
column of a Conv1D: axis 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from .. import xp
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, expect, spread


class Magnitude(Op):
    """m: the new norm of each slice along `axis`. Slices of norm zero stay zero.

    The norm is an exact sum of squares, so it does not depend on blocks or threads. m holds the norm rounded to
    float32, which is why even m = ||w|| gives w only to within rounding (2 units in the last place).
    """

    kind = "magnitude"
    fields = ("m",)
    defaults = {"axis": 0}
    identity_at_init = False
    row_fields = frozenset({"m"})

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        if not -len(shape) <= cfg["axis"] < len(shape):
            raise ValueError(f"axis {cfg['axis']} is outside a target of shape {list(shape)}")
        expect(t, "m", [shape[cfg["axis"]]])

    def init(self, shape: Shape, gen: Generator, *, axis: int = 0) -> dict[str, Any]:
        """Ones: unit norms. To start from w itself, use `norms(w, axis)`."""
        import numpy as np

        return {"m": np.ones(shape[axis], np.float32)}

    def streams(self, shape: Shape, cfg: Config) -> bool:
        return bool(cfg["axis"] % len(shape) == 0)

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        norm = norms(w, cfg["axis"]).reshape(spread(tuple(w.shape), cfg["axis"]))
        m = xp.wide(t["m"]).reshape(norm.shape)
        return xp.narrow(xp.wide(w) * (m / (norm + (norm == 0))), w)


def norms(w: Array, axis: int) -> Array:
    """The norm of each slice of w along `axis`, in float64 when exact."""
    axis %= len(w.shape)
    others = [k for k in range(len(w.shape)) if k != axis]
    return xp.sqrt(xp.sumsq(xp.permute_axes(w, (axis, *others)).reshape(w.shape[axis], prod([w.shape[k] for k in others])), 1)).reshape(-1)


OP = Magnitude()
