"""Models whose units have been brought into the order of the base's: what weight-matching and pleas start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .. import xp
from ..base import Base
from ..delta import BaseTensor, Delta
from ..engine.increments import Block, Increments, Target
from ..engine.matching import matched
from ..engine.permutations import Group, Place, axis_orders, by_tensor, permuted
from ..engine.symmetries import symmetries
from ..errors import UsageError
from ..stored import Tensor

if TYPE_CHECKING:
    import numpy as np

    from ..engine.permutations import Permutation
    from ..engine.symmetries import Layout

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Aligned:
    """The models, the groups of units that may be reordered, and for each model the order of its units that fits the base's."""

    models: Increments
    base: Base
    groups: Sequence[Group]
    orders: Sequence[Permutation]

    @classmethod
    def of(cls, models: Increments, layout: Layout | str | None, seed: int, sweeps: int) -> Aligned:
        """Match each model's units to the base's.

        UsageError without a base, for updates over other deltas or with tensors of their own, and what `symmetries` raises.
        """
        if models.base is None:
            raise UsageError("units are matched with those of the base; give the base", hint="base=PATH (--base PATH)")
        if any(isinstance(update, Delta) and update.over for update in models.updates):
            raise UsageError("updates that were made over other deltas cannot be matched with the base", hint="fold those deltas first, and match checkpoints")
        added = [target.name for target in models.targets.values() if target.change is not None]
        if added:
            raise UsageError(f"the inputs add {added[0]!r} ({len(added)} such tensors); only models of the base's own structure can be matched with it")
        groups = symmetries(models.base, layout)
        orders = [matched(groups, models.base.tensors, _Tensors(models, number), seed=seed, sweeps=sweeps) for number in range(len(models.updates))]
        return cls(models, models.base, groups, orders)

    def start(self, name: str) -> Array:
        """A tensor of the base, in float64."""
        return _float64(self.base.tensors[name].read())

    def values(self, number: int, name: str) -> Array:
        """A tensor of a model, its units in the base's order, in float64."""
        return permuted(_float64(_Tensors(self.models, number)[name].read()), self._places.get(name, []), self.orders[number])

    def order(self, number: int, name: str, axis: int) -> Array | None:
        """Where each position along an axis of `values` comes from in the model's own order; None where that is the same."""
        return axis_orders(self.base.tensors[name].shape, self._places.get(name, []), self.orders[number]).get(axis)

    def targets(self) -> Iterator[Target]:
        """The tensors that no model changes and that a new order moves."""
        for name, places in self._places.items():
            if name not in self.models.targets:
                values = self.base.tensors[name].read()
                if any((permuted(values, places, order) != values).any() for order in self.orders):
                    tensor = self.base.tensors[name]
                    yield Target(name, tensor.dtype, tensor.shape, BaseTensor(tensor.dtype, tensor.shape, self.base.sha256(name)))

    @cached_property
    def _places(self) -> dict[str, list[tuple[Group, Place]]]:
        return by_tensor(self.groups)


@dataclass(frozen=True)
class _Tensors(Mapping[str, Tensor]):
    """The tensors of one model, a checkpoint or the base with a delta on it."""

    models: Increments
    number: int

    def __getitem__(self, name: str) -> Tensor:
        update = self.models.updates[self.number]
        if isinstance(update, Base):
            return update.tensors[name]
        tensor = self._start[name]
        return _Updated(tensor, self.models, self.number, self.models.targets[name]) if self.models.touches(self.number, name) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)

    @property
    def _start(self) -> Mapping[str, Tensor]:
        return self.models.base.tensors if self.models.base is not None else {}


@dataclass(frozen=True, eq=False)
class _Updated(Tensor):
    """A tensor of the base and a delta's increment on it, without rounding to the base's dtype."""

    base: Tensor
    models: Increments
    number: int
    target: Target

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return "F64"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.target.shape

    def rows(self, lo: int, hi: int) -> Array:
        return _float64(self.base.rows(lo, hi)) + self.models.read(self.number, Block(self.target, lo, hi))

    def read(self) -> Array:
        return _float64(self.base.read()) + self.models.read(self.number, self.target.whole)


def _float64(values: Array) -> Array:
    out: Array = xp.cast(values, "float64")
    return out
