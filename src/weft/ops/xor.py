"""xor: the stored bits of w with some of them flipped: w' = w ^ bits.

What a whole-tensor `assign` says, said relative to the base: the same bytes, NaNs included, for every dtype. An update changes few of the
upper bits of a tensor, so `bits` is mostly zeros and compresses well where the new values do not. What it means depends on every bit of w: it is
the first op on its tensor, and a model that is loaded in a narrower dtype than its files have cannot take it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import xp
from ..errors import MismatchError
from .op import Array, Config, Generator, Info, Op, Shape, Tensors


class Xor(Op):
    """Flips the bits that are set in `bits`, unsigned integers of the item size of `dtype`, the dtype in which the target is stored."""

    kind = "xor"
    fields = ("bits",)
    defaults = {"dtype": "F32"}
    by_rows = True
    row_fields = frozenset({"bits"})
    raw = True
    first = True

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        from ..stored import ITEMSIZE

        if cfg["dtype"] not in ITEMSIZE:
            raise ValueError(f"config 'dtype': unknown dtype {cfg['dtype'][:40]!r}")
        want = f"U{8 * ITEMSIZE[cfg['dtype']]}"
        if t["bits"].dtype != want or t["bits"].shape != tuple(shape):
            raise ValueError(f"field bits: expected {want} {list(shape)}, got {t['bits'].dtype} {list(t['bits'].shape)}")

    def check_stored(self, dtype: str, cfg: Config, t: Mapping[str, Info]) -> None:
        if cfg["dtype"] != dtype:
            raise ValueError(f"config 'dtype': the target is {dtype}, got {cfg['dtype']}")

    def init(self, shape: Shape, gen: Generator) -> dict[str, Any]:
        import numpy as np

        return {"bits": np.zeros(shape, np.uint32)}

    def example(self, shape: Shape, gen: Generator) -> dict[str, Any]:
        import numpy as np

        return {"bits": (gen.uniform(shape, 1.0).view(np.uint32) & np.uint32(0x7FFFFF))}  # the mantissas alone

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        from ..stored import ITEMSIZE, numpy_dtype

        name = str(numpy_dtype(cfg["dtype"]))
        if xp.dtype(w) != name and w.dtype.itemsize <= ITEMSIZE[cfg["dtype"]]:
            raise MismatchError(f"'xor' flips bits of {name} values, got {xp.dtype(w)}", hint="load the model in the dtype of its files, or fold")
        old = xp.cast(w, name)
        new = (xp.integers(old) ^ xp.integers(t["bits"])).reshape(w.shape).view(old.dtype)
        return xp.narrow(new, w)


OP = Xor()
