"""slerp: from one model to another along the great circle instead of the chord.

Shoemake 1985 ("Animating rotation with quaternion curves", SIGGRAPH), as mergekit made it known for models. On each tensor,
with the two vectors v_1, v_2 and the angle phi between them,

    v = sin((1 - t) phi) / sin(phi) v_1 + sin(t phi) / sin(phi) v_2

t = 0 is the first model (the `base_model` of a mergekit recipe), t = 1 the second. The vectors themselves are not normalised, only the angle is taken between
their directions. Where |cos phi| > 0.9995, or one vector is zero, the circle is a line or not defined: v = (1 - t) v_1 + t v_2.

The vectors are whole weights (space = "weights", theta_i = theta_0 + tau_i): that is what slerp means to those who bring
a recipe, and it needs the base. Two models tuned from one base are so close to parallel, though, that almost every tensor
takes the straight line, and the result is that of `linear`. space = "increments" turns tau_1 into tau_2 and adds the result
to theta_0: angles are large there, and the merged increment is as long as the two, where their average would be shorter.

Not as in mergekit: a zero vector takes the line (there it is at a right angle to everything, and half way the other is
multiplied by 0.71); end points are the models' own increments, bit for bit, and deltas keep their ops there; arithmetic is
float64, rounded once. Entries that are infinite or NaN in the base (a mask) do not count; nobody may change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import acos, sin, sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from .. import xp
from ..delta import Delta
from ..errors import UsageError
from ..methods import method
from ._angles import inner_products
from ._method import MergeMethod

if TYPE_CHECKING:
    import numpy as np

    from ..engine.increments import Block, Increments, Target
    from ._depth import Settings

    Array = np.ndarray[Any, Any]

COLINEAR = 0.9995
"""|cos| above which two vectors count as parallel."""


class SlerpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `slerp`."""

    t: Annotated[float, msgspec.Meta(ge=0, le=1, description="How far to go from the first model (0) to the second (1).")] = 0.5
    space: Annotated[
        Literal["weights", "increments"], msgspec.Meta(description="Turn the whole weights into each other, or only what was added to the base.")
    ] = "weights"


@method(
    "merge",
    config=SlerpConfig,
    paper="Shoemake, 1985, SIGGRAPH",
    formula="v = sin((1 - t) phi)/sin(phi) v_1 + sin(t phi)/sin(phi) v_2, phi the angle between v_1 and v_2",
    varies=("t",),
)
class Slerp(MergeMethod[SlerpConfig]):
    """Two models, interpolated along the great circle between their tensors."""

    def problems(self, weights: Sequence[float], cfg: SlerpConfig) -> list[str]:
        found = [f"slerp goes from one model to another: expected 2 inputs, got {len(weights)}"] if len(weights) != 2 else []
        return found + ["slerp is steered by its option t; leave the weights out"] * any(w != 1 for w in weights)

    def weighted(self, cfg: SlerpConfig) -> bool:
        return cfg.t in (0, 1)

    def coefficients(self, weights: Sequence[float], cfg: SlerpConfig, state: State | None, target: Target) -> list[float]:
        return [1 - cfg.t, cfg.t]

    def prepare(self, models: Increments, settings: Settings[SlerpConfig]) -> State | None:
        cfg, t = settings.whole.cfg, {name: settings.at(target).cfg.t for name, target in models.targets.items()}
        if all(each in (0, 1) for each in t.values()):
            return None
        if cfg.space == "weights":
            _check_weights_known(models)
        products = inner_products(models, partial(_vectors, models, cfg))
        return models, {name: _shares(gram, t[name]) for name, gram in products.items()}

    def merge(self, taus: list[Array], weights: Sequence[float], cfg: SlerpConfig, state: State, block: Block) -> Array:
        import numpy as np

        models, shares = state
        first, second, rest = shares[block.target.name]
        out = first * taus[0].astype(np.float64) + second * taus[1].astype(np.float64)
        return np.asarray(out + rest * _start(models, block) if rest and cfg.space == "weights" else out)


State = tuple["Increments", dict[str, tuple[float, float, float]]]
"""The inputs, and for every tensor the factors of the two vectors and what they add up to beyond 1: the base's factor."""


def _check_weights_known(models: Increments) -> None:
    """UsageError where a model's weights are not the base's plus its increment."""
    hint = "or take only what was added to it: space=increments (-p space=increments)"
    if models.base is None and any(target.base is not None for target in models.targets.values()):
        raise UsageError("slerp of whole weights depends on the base's values; give the base", hint=f"base=PATH (--base PATH); {hint}")
    over = [label for label, update in zip(models.labels, models.updates, strict=True) if isinstance(update, Delta) and update.over]
    if over:
        raise UsageError(f"slerp of whole weights: {over[0]} was made over other deltas, not the base alone", hint=f"fold them first; {hint}")


def _start(models: Increments, block: Block) -> Array:
    """theta_0 on a block in float64: zeros for a tensor that the models add, and where the base is not finite."""
    import numpy as np

    target = block.target
    if models.base is None or target.base is None:
        return np.zeros(block.shape)
    tensor = models.base.tensors[target.name]
    values = xp.cast(tensor.rows(block.lo, block.hi) if target.shape else tensor.read(), "float64")
    return np.where(np.isfinite(values), values, 0.0)


def _vectors(models: Increments, cfg: SlerpConfig, block: Block) -> list[Array]:
    """v_1 and v_2 on a block."""
    start = _start(models, block) if cfg.space == "weights" else 0.0
    return [start + tau.astype("float64") for tau in models.read_all(block)]


def _shares(gram: Array, t: float) -> tuple[float, float, float]:
    """The factors in `State`, from the inner products."""
    length = sqrt(gram[0, 0]) * sqrt(gram[1, 1])
    if not length or abs(gram[0, 1]) > COLINEAR * length:
        return 1 - t, t, 0.0
    angle = acos(gram[0, 1] / length)
    first, second = sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)
    return first, second, first + second - 1
