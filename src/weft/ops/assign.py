"""assign: entries (or the whole tensor) take new values, with the bytes that are stored.

The one op that works on every dtype and without arithmetic: a replay is exact to the bit. With `index` (sorted, unique
flat positions) only those entries change; without, `values` is the whole tensor.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from math import prod
from typing import Any

from .. import xp
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, check_positions, expect_positions


class Assign(Op):
    """New values, at flat positions `index` if it is there, else everywhere."""

    kind = "assign"
    fields = ("values",)
    optional = ("index",)
    by_rows = True
    row_fields = frozenset({"values"})
    raw = True

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        want = tuple(shape) if "index" not in t else expect_positions(t, prod(shape))
        if t["values"].shape != want:
            raise ValueError(f"field values: expected shape {list(want)}, got {list(t['values'].shape)}")

    def check_stored(self, dtype: str, cfg: Config, t: Mapping[str, Info]) -> None:
        if t["values"].dtype != dtype:
            raise ValueError(f"field values: the target is {dtype}, got {t['values'].dtype}")

    def init(self, shape: Shape, gen: Generator) -> dict[str, Any]:
        import numpy as np

        return {"index": np.zeros(0, np.int64), "values": np.zeros(0, np.float32)}

    def example(self, shape: Shape, gen: Generator) -> dict[str, Any]:
        import numpy as np

        size = int(np.prod(shape, dtype=np.int64))
        count = max(1, size // 3)
        return {"index": np.sort(gen.permutation(size)[:count]), "values": gen.normal((count,))}

    def check_values(self, shape: Shape, cfg: Config, t: Tensors) -> None:
        if "index" in t:
            check_positions(t["index"], prod(shape))

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        values = xp.narrow(t["values"], w)
        return xp.put(w, t["index"], values) if "index" in t else values.reshape(w.shape)

    def rows(self, t: Mapping[str, Any], cfg: Config, shape: Shape, lo: int, hi: int) -> tuple[dict[str, Array], Config]:
        return (entries_in_rows(t, shape, lo, hi), cfg) if "index" in t else super().rows(t, cfg, shape, lo, hi)


def entries_in_rows(t: Mapping[str, Any], shape: Shape, lo: int, hi: int) -> dict[str, Array]:
    """The `index` and `values` that fall into rows lo..hi, positions counted from row lo."""
    import numpy as np

    step, index = prod(shape[1:]), t["index"]
    count = index.shape[0]
    # searched where it lies: the positions of a large tensor are themselves too large to read at every block
    first, last = (bisect_left(range(count), row * step, key=lambda k: int(index.rows(k, k + 1)[0])) for row in (lo, hi))
    return {"index": index.rows(first, last).astype(np.int64) - lo * step, "values": t["values"].rows(first, last)}


OP = Assign()
