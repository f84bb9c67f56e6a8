"""What a merge method is. Each method is one file beside this one, with a class that derives from `MergeMethod`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from .._fused import Combination

if TYPE_CHECKING:
    import msgspec
    import numpy as np

    from ..engine.increments import Block, Increments, Target
    from ._data import Study
    from ._depth import Settings

    Array = np.ndarray[Any, Any]

    C = TypeVar("C", bound=msgspec.Struct)
else:
    C = TypeVar("C")


class MergeMethod(Generic[C]):
    """Several increments in, one increment out.

    `prepare` is called once and may read everything as often as it likes; what it returns is given to each call of
    `merge`, which sees one block of rows at a time. An object has no state of its own, and `merge` may be called from
    several threads. A method that draws random numbers has a field `seed` in its config and makes them from the seed,
    the tensor's name, the model and `block.start`, so that they do not depend on blocks or threads.

    Weights may vary over depth, and so may the options that `@method` names as `varies`: `weights` and `cfg` are those of the
    tensor at hand. Only `prepare` and `measure` see more than one tensor, and ask `settings.at` for those of each.
    """

    reads: ClassVar[bool] = True
    """`merge` is given the increments. A method that reads the models in another way has an empty list instead."""
    whole: ClassVar[bool] = False
    """`merge` needs whole tensors (a decomposition): each block is then a whole tensor."""

    def default_weight(self, count: int) -> float:
        """The weight of each of `count` models when none are given."""
        return 1.0

    def problems(self, weights: Sequence[float], cfg: C) -> list[str]:
        """What is wrong with these weights for this config, as sentences."""
        return []

    def fixed(self, cfg: C) -> Mapping[str, str]:
        """Options that vary over depth as a rule, but not with the others as they are in `cfg`, and why."""
        return {}

    def weighted(self, cfg: C) -> bool:
        """Whether the result is exactly sum_i c_i tau_i with the c of `coefficients`, so that deltas are combined with their own ops."""
        return False

    def coefficients(self, weights: Sequence[float], cfg: C, state: Any, target: Target) -> Sequence[float]:
        """c of each model on one tensor. Asked for only where `weighted`, after `prepare`."""
        raise NotImplementedError

    def combination(self, weights: Sequence[float], cfg: C, state: Any, target: Target) -> Combination | None:
        """How the increments of one tensor become one, where that can be said as a `Combination`, after `prepare`. `merge` is then not asked for."""
        return Combination(self.coefficients(weights, cfg, state, target)) if self.weighted(cfg) else None

    def prepare(self, models: Increments, settings: Settings[C]) -> Any:
        """Statistics over whole tensors or models, the `state` of `merge`: thresholds, norms, angles.

        `settings.at(target)` has the weights and options of a tensor, `settings.whole` those that are the same everywhere.
        """
        return None

    def merge(self, taus: list[Array], weights: Sequence[float], cfg: C, state: Any, block: Block) -> Array:
        """The merged increment of one block.

        `taus`: one array of `block.shape` for each model in the order of the inputs, float32 (float64 for F64 tensors),
        zeros where a model changes nothing; never written to. The result is rounded to their dtype by the caller, so let
        every entry depend on nothing but its own tensor and `state`. Not asked for where there is a `combination`.
        """
        raise NotImplementedError

    def scale(self, state: Any) -> float:
        """A factor on everything that `merge` gives, stored beside the values so that these stay as they are."""
        return 1.0

    def targets(self, targets: Sequence[Target], state: Any) -> Sequence[Target]:
        """The tensors that the merged delta changes, given those that the inputs change: more of them, or of a declared new shape."""
        return targets

    def config(self, state: Any) -> dict[str, Any]:
        """A patch of the model's config that goes with the result."""
        return {}

    def blobs(self, state: Any) -> dict[str, bytes]:
        """Bookkeeping that goes with the merged delta, by name: what a later merge goes on from."""
        return {}


class LinearMethod(MergeMethod[C]):
    """A method whose result is always sum_i c_i tau_i: it gives `coefficients`, and that is all."""

    def weighted(self, cfg: C) -> bool:
        return True


class DataMethod(MergeMethod[C]):
    """A method that looks at data and at the live models: `measure` is called in place of `prepare`."""

    def looks(self, cfg: C) -> bool:
        """Whether it needs data with this config; without, it is a method like any other."""
        return True

    def measure(self, study: Study, settings: Settings[C]) -> Any:
        """What the models do with their data, as the `state` of `merge`."""
        raise NotImplementedError
