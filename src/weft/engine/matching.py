"""Weight matching: the permutation of one network's units that brings its weights closest to another's.

    order = matched(groups, a.tensors, b.tensors)
    similar = permuted(b_values, places, order)        # closest to a's in the squared distance summed over all places

Ainsworth, Hayase and Srinivasa 2022 (Git Re-Basin, arXiv 2209.04836): coordinate descent. With the order of all other groups held, the
best one of a group is a linear assignment problem: maximise sum_i <unit i of a, unit order[i] of b>, the inner products summed over the
group's places. Groups are visited in a seeded random order until none gains; one whose neighbours (groups in the same tensors) have not
moved since its last visit is not asked again, since it could not gain. Query heads inside key/value heads: the assignment inside each pair
of key/value heads is solved first and its value added to the pair's, so both levels are optimal together.

What is held is one tensor, blocks of others, and the square matrix of the group at hand (float64).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import xp
from ..ops.op import Generator
from ..stored import Tensor
from .permutations import Group, Place, axis_orders, by_tensor
from .stream import BLOCK, row_blocks

if TYPE_CHECKING:
    import numpy as np

    from .permutations import Permutation

    Array = np.ndarray[Any, Any]
    Tensors = Mapping[str, Tensor]

_GAIN = 1e-9
"""What a gain must be, relative to the value reached, to be more than rounding."""


def matched(groups: Sequence[Group], a: Tensors, b: Tensors, *, seed: int = 0, sweeps: int = 100) -> dict[str, Array]:
    """The order of b's units in which its weights are closest to a's, a local optimum that starts from b's own order.

    seed: of the order in which groups are visited. sweeps: how often each group is visited at most.
    """
    import numpy as np

    neighbours = _neighbours(groups)
    order = {group.name: np.arange(group.length) for group in groups}
    gen = Generator(seed)
    waiting = set(order)
    for _ in range(sweeps):
        for number in gen.permutation(len(groups)):
            group = groups[number]
            if group.name not in waiting:
                continue
            waiting.discard(group.name)
            units, parts = similarities(group, groups, a, b, order)
            step, gain, value = best(group, units, parts)
            if gain > _GAIN * abs(value):
                order[group.name] = order[group.name][step]
                waiting |= neighbours[group.name]
        if not waiting:
            break
    return order


def similarities(group: Group, groups: Sequence[Group], a: Tensors, b: Tensors, order: Permutation) -> tuple[Array, Array]:
    """Inner products of a's units (rows) and b's, reordered by `order`, summed over the group's places: between units, and between
    parts (0 x 0 where units have none)."""
    import numpy as np

    units = np.zeros((group.size, group.size))
    parts = np.zeros((group.length, group.length) if group.parts > 1 else (0, 0))
    here = by_tensor(groups)
    for place in group.places:
        into = parts if place.by_part else units
        for ours, theirs, lo, hi in _slabs(group, place, a[place.tensor], b[place.tensor], here[place.tensor], order):
            into[lo:hi] += ours @ theirs.T
    return units, parts


def best(group: Group, units: Array, parts: Array) -> tuple[Array, float, float]:
    """The best order of b's units for these similarities, what it gains over the order as it is, and its value."""
    import numpy as np

    n, inner = group.size, group.parts
    total = units.copy()
    inside = np.zeros((n, n, inner), np.int64)
    if inner > 1:
        for i in range(n):
            for j in range(n):
                pair = parts[i * inner : (i + 1) * inner, j * inner : (j + 1) * inner]
                inside[i, j] = _assigned(pair)
                total[i, j] += pair[np.arange(inner), inside[i, j]].sum()
    chosen = _assigned(total)
    value = float(total[np.arange(n), chosen].sum())
    as_it_is = float(np.trace(units) + np.trace(parts))
    step = chosen[:, None] * inner + inside[np.arange(n), chosen]
    return step.reshape(-1), value - as_it_is, value


def _assigned(values: Array) -> Array:
    """For each row its column, so that the sum is the largest."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(values, maximize=True)[1])


def _neighbours(groups: Sequence[Group]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {group.name: set() for group in groups}
    for places in by_tensor(groups).values():
        names = {group.name for group, _ in places}
        for name in names:
            found[name] |= names - {name}
    return found


def _slabs(
    group: Group, place: Place, a: Tensor, b: Tensor, here: Sequence[tuple[Group, Place]], order: Permutation
) -> Iterator[tuple[Array, Array, int, int]]:
    """Units lo..hi of a and all units of b, as rows; over all slabs each pair of rows meets once for each stretch of its entries."""
    shape = a.shape
    orders = axis_orders(shape, here, order)
    count = group.count(place)
    if place.axis and 0 not in orders:  # both stream: each block of rows has a stretch of every unit
        for lo, hi in row_blocks(shape, BLOCK):
            theirs = _reordered(_wide(b.rows(lo, hi)), orders)
            yield _as_rows(_wide(a.rows(lo, hi)), place, count), _as_rows(theirs, place, count), 0, count
        return
    theirs = _as_rows(_reordered(_wide(b.read()), orders), place, count)
    if place.axis:
        yield _as_rows(_wide(a.read()), place, count), theirs, 0, count
        return
    for lo, hi in row_blocks((count, theirs.shape[1]), 4 * BLOCK):
        rows = _wide(a.rows(place.start + lo * place.width, place.start + hi * place.width))
        yield rows.reshape(hi - lo, -1), theirs, lo, hi


def _wide(values: Array) -> Array:
    out: Array = xp.cast(values, "float64")
    return out


def _reordered(values: Array, orders: Mapping[int, Array]) -> Array:
    for axis, index in orders.items():
        values = values.take(index, axis)
    return values


def _as_rows(values: Array, place: Place, count: int) -> Array:
    """The units of a tensor as rows of a matrix."""
    import numpy as np

    moved = np.moveaxis(values, place.axis, 0)[place.start : place.start + count * place.width]
    return moved.reshape(count, -1)
