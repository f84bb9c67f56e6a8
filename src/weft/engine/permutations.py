"""Permutations of a network's units that leave its function as it is: where the units lie, and how they are reordered.

    groups = symmetries(base)                          # weft.engine.symmetries finds them for known architectures
    order = drawn(groups, seed=1)                      # or what `weft.engine.matching` finds
    delta = permuting(base, groups, order)             # the same function under other names: attach, fold, revert it
    back = inverse(order)

A *group* is a set of units that can change places with each other: the hidden units of an MLP, the heads of an attention layer,
the channels of a residual stream. Its *places* are the parts of tensors that must follow. A *permutation* maps names of groups to
index arrays: unit i of the result is unit order[i] of what was there; a group that is not named keeps its order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..delta import BaseLike, Builder, Delta
from ..errors import UsageError, near
from ..ops.op import Generator
from ..ops.spec import At, Ref

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    Permutation = Mapping[str, Array]


@dataclass(frozen=True)
class Place:
    """Where a group's units lie: along `axis` of `tensor` from `start`, one after the other, each `width` entries wide.

    by_part: the units counted here are the parts of the group's units (query heads), not the units (key/value heads).
    """

    tensor: str
    axis: int
    start: int = 0
    width: int = 1
    by_part: bool = False


@dataclass(frozen=True)
class Group:
    """Units that can change places: how many there are, and all places that must follow.

    parts: each unit consists of so many parts, which can also change places with each other inside it (the query heads of a
    key/value head). An index array of the group always speaks of parts, size * parts of them; those of a unit stay together.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    parts: int = 1

    @property
    def length(self) -> int:
        """Entries of an index array: units times parts."""
        return self.size * self.parts

    def count(self, place: Place) -> int:
        """How many units are counted at a place."""
        return self.length if place.by_part else self.size

    def order(self, place: Place, index: Array) -> Array:
        """The order of what is counted at a place."""
        return index if place.by_part or self.parts == 1 else index[:: self.parts] // self.parts


def by_tensor(groups: Iterable[Group]) -> dict[str, list[tuple[Group, Place]]]:
    """For each tensor the places in it, with their groups."""
    found: dict[str, list[tuple[Group, Place]]] = {}
    for group in groups:
        for place in group.places:
            found.setdefault(place.tensor, []).append((group, place))
    return found


def require(groups: Sequence[Group], order: Permutation) -> None:
    """UsageError unless every index array is a permutation of its group that keeps the parts of a unit together."""
    import numpy as np

    known = {group.name: group for group in groups}
    for name, index in order.items():
        if name not in known:
            raise UsageError(f"there is no group {name!r}{near(name, known, 'the groups are')}")
        group = known[name]
        if not np.array_equal(np.sort(index), np.arange(group.length)):
            raise UsageError(f"group {name}: expected a permutation of 0..{group.length - 1}, got {len(index)} positions")
        units = np.asarray(index).reshape(group.size, group.parts) // group.parts
        if not (units == units[:, :1]).all():
            raise UsageError(f"group {name}: the {group.parts} parts of a unit must stay together")


def drawn(groups: Sequence[Group], seed: int) -> dict[str, Array]:
    """A permutation at random, the same on every machine."""
    import numpy as np

    gen = Generator(seed)
    out = {}
    for group in groups:
        inside = np.stack([gen.permutation(group.parts) for _ in range(group.size)])
        out[group.name] = (gen.permutation(group.size)[:, None] * group.parts + inside).reshape(-1)
    return out


def inverse(order: Permutation) -> dict[str, Array]:
    """What undoes a permutation."""
    import numpy as np

    return {name: np.argsort(index, kind="stable") for name, index in order.items()}


def composed(first: Permutation, then: Permutation) -> dict[str, Array]:
    """One permutation that means: the first, then the second."""
    both = {**then, **first}
    return {name: first[name][then[name]] if name in first and name in then else both[name] for name in both}


def axis_orders(shape: Sequence[int], places: Iterable[tuple[Group, Place]], order: Permutation) -> dict[int, Array]:
    """For each axis of a tensor that is reordered, where each position comes from. `places` are those in this tensor."""
    import numpy as np

    out: dict[int, Array] = {}
    for group, place in places:
        if group.name in order:
            units = group.order(place, order[group.name])
            index = (units[:, None] * place.width + np.arange(place.width)).reshape(-1)
            out.setdefault(place.axis, np.arange(shape[place.axis]))[place.start : place.start + index.size] = place.start + index
    return out


def permuted(values: Array, places: Iterable[tuple[Group, Place]], order: Permutation) -> Array:
    """A tensor with its units reordered; `places` are those in this tensor."""
    for axis, index in axis_orders(values.shape, places, order).items():
        values = values.take(index, axis)
    return values


def permuting(base: BaseLike, groups: Sequence[Group], order: Permutation) -> Delta:
    """The delta that reorders the units of a base: `permute` ops, whose index arrays are stored once for each group.

    The entries of a group are taken whole or not at all. Groups whose order stays as it is are left out; UsageError if that is all of them.
    """
    import numpy as np

    require(groups, order)
    build = Builder(base)
    shared: dict[tuple[str, bool], Ref] = {}
    moved = [group for group in groups if group.name in order and not np.array_equal(order[group.name], np.arange(group.length))]
    if not moved:
        raise UsageError("the permutation moves nothing")
    for group in moved:
        for place in group.places:
            by_unit = group.parts > 1 and not place.by_part
            units = group.order(place, order[group.name])
            if np.array_equal(units, np.arange(len(units))):
                continue
            if (group.name, by_unit) not in shared:
                shared[group.name, by_unit] = build.share(f"{group.name}.units" if by_unit else group.name, np.asarray(units, np.int64))
            at = _view(tuple(base.tensor(place.tensor).shape), group.count(place), place)
            build.put(place.tensor, "permute", {"perm": shared[group.name, by_unit]}, at=at, group=group.name, axis=place.axis)
    return build.done(recipe={"verb": "permute"})


def _view(shape: tuple[int, ...], count: int, place: Place) -> At | None:
    """The view of a tensor whose axis `place.axis` counts units; None where that is the tensor itself."""
    axis, width = place.axis, place.width
    first, many = place.start // width, shape[axis] // width
    reshape = (*shape[:axis], many, width, *shape[axis + 1 :]) if width > 1 else None
    index = () if count == many else (*((0, size) for size in shape[:axis]), (first, first + count))
    return At(reshape, None, index) if reshape or index else None
