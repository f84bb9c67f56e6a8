"""Inner products of several vectors over whole tensors, gathered block by block: what angles are made of.

The blocks here are the same whatever block size a merge was asked for, so their sums, and all that is made of them, do not
depend on it, nor on threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..engine.stream import BLOCK, in_threads
from ..errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from ..engine.increments import Block, Increments

    Array = np.ndarray[Any, Any]


def inner_products(models: Increments, vectors: Callable[[Block], Sequence[Array]]) -> dict[str, Array]:
    """For every target the matrix G_ij = <v_i, v_j> in float64, where `vectors(block)` gives v_1..v_k on a block, in float64.

    Raises InputError where they are too large to be squared (only float64 can hold such numbers).
    """
    import numpy as np

    blocks = [block for target in models.targets.values() for block in target.blocks(BLOCK)]
    found: dict[str, Array] = {}
    for block, part in zip(blocks, in_threads((partial(_products, vectors, block) for block in blocks), models.threads), strict=True):
        found[block.target.name] = found.get(block.target.name, np.zeros(part.shape)) + part
    return found


def _products(vectors: Callable[[Block], Sequence[Array]], block: Block) -> Array:
    import numpy as np

    each = [np.ravel(vector) for vector in vectors(block)]
    out = np.empty((len(each), len(each)))
    with np.errstate(over="ignore", invalid="ignore"):
        for i, a in enumerate(each):
            for j, b in enumerate(each[: i + 1]):
                out[i, j] = out[j, i] = np.sum(a * b)  # numpy adds pairwise, on this thread: no BLAS, whose order of adding varies
    if not np.isfinite(out).all():
        raise InputError(
            f"tensor {block.target.name!r}: values too large for an angle in rows {block.lo} to {block.hi}", hint="check the runs that made the inputs"
        )
    return out
