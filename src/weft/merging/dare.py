"""dare: drop entries of every increment at random, make the others larger, and add up.

Yu et al. 2023, arXiv 2311.03099. For models i = 1..n with increments tau_i and weights w_i, entry by entry:

    m_ij ~ Bernoulli(1 - drop),  t_ij = m_ij tau_ij / (1 - drop)       so that the mean of t_i over all seeds is tau_i
    theta = theta_0 + scale * sum_i w_i t_i                            (signs = "all")

`signs` = "mass" or "count" puts the t_i through steps 2 and 3 of `ties` in place of the sum: an elected sign for each entry
(by the sum of the t_i, or by the number of models), then scale * the mean of the w_i t_i that agree with it. Nothing is
trimmed, and the weights take no part in the election. With drop = 0 this is `task-arithmetic`, or `ties` at density 1.

Whether an entry is kept depends on the seed, the tensor's name, the model's place among the inputs and the entry's place
in the tensor, and on nothing else: u = uniform number `place` of the sequence key(key(seed, name), model), m = [u >= drop].
So masks are the same for any block, thread and shard, and a model more does not change those of the models before it.
Tensors with the same bytes in the base have one mask, the one of the first name, because stored copies of a tied tensor
must stay equal.

Not followed: the authors draw from one global generator, so that masks depend on the order of tensors and on the device,
and can leave tensors out by name. mergekit's rescaling to the L1 norm of the tensor is not the paper's; dropping without
rescaling is what the paper argues against. The default rate is the one of the authors' merges of language models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from .. import xp
from ..methods import method
from ._method import MergeMethod, weighted_sum
from .ties import TiesConfig, elected_mean, majority_is_plus

if TYPE_CHECKING:
    import numpy as np

    from ..delta import BaseTensor
    from ..engine.increments import Block, Increments, Target

    Array = np.ndarray[Any, Any]


class DareConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `dare`."""

    drop: Annotated[float, msgspec.Meta(ge=0, lt=1, description="Probability that an entry of an increment is dropped.")] = 0.2
    scale: Annotated[float, msgspec.Meta(description="Factor on the merged increment.")] = 1.0
    signs: Annotated[
        Literal["all", "mass", "count"],
        msgspec.Meta(description="Add up all that is left, or average what agrees with a sign elected by the sum of the entries or by the number of models."),
    ] = "all"
    seed: Annotated[int, msgspec.Meta(ge=0, description="Seed of the masks.")] = 0


@dataclass(frozen=True)
class DareState:
    """`keys` maps a tensor's name to the sequence of each model; `zero_is_plus` is the majority's sign."""

    keys: dict[str, list[int]]
    zero_is_plus: bool = False


@method(
    "merge",
    config=DareConfig,
    paper="Yu et al., 2023, arXiv:2311.03099",
    formula="theta = theta_0 + scale sum_i w_i m_i tau_i / (1 - p), m_i ~ Bernoulli(1 - p)",
)
class Dare(MergeMethod[DareConfig]):
    """Drop entries of each increment at random, rescale the others, add up."""

    def weighted(self, cfg: DareConfig) -> bool:
        return cfg.drop == 0 and cfg.signs == "all"

    def coefficients(self, weights: Sequence[float], cfg: DareConfig, state: DareState, target: Target) -> list[float]:
        return [cfg.scale * w for w in weights]

    def prepare(self, models: Increments, weights: Sequence[float], cfg: DareConfig) -> DareState:
        keys = _keys(models, cfg.seed)
        if cfg.signs == "all":
            return DareState(keys)
        return DareState(keys, majority_is_plus(models, weights, _election(cfg), lambda block, taus: _dropped(taus, keys[block.target.name], cfg, block)))

    def merge(self, taus: list[Array], weights: Sequence[float], cfg: DareConfig, state: DareState, block: Block) -> Array:
        kept = _dropped(taus, state.keys[block.target.name], cfg, block)
        election = _election(cfg)
        if cfg.signs == "all":
            return weighted_sum(kept, [election.scale * w for w in weights])
        return elected_mean(kept, weights, election, state.zero_is_plus)


def _election(cfg: DareConfig) -> TiesConfig:
    """The election and the factor on its result. The factor 1/(1 - drop) is the same for every entry, so it can wait until here."""
    return TiesConfig(scale=cfg.scale / (1 - cfg.drop), elect="count" if cfg.signs == "count" else "mass")


def _keys(models: Increments, seed: int) -> dict[str, list[int]]:
    """The sequence of random numbers of each tensor and model."""
    import hashlib

    first: dict[BaseTensor, str] = {}
    keys = {}
    for name, target in models.targets.items():
        shared = name if target.base is None else first.setdefault(target.base, name)
        word = int.from_bytes(hashlib.sha256(shared.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        keys[name] = [xp.key(xp.key(seed, word), number) for number in range(len(models.updates))]
    return keys


def _dropped(taus: Sequence[Array], keys: Sequence[int], cfg: DareConfig, block: Block) -> list[Array]:
    """m_i tau_i in float64."""
    import numpy as np

    like = np.zeros(0)
    return [
        tau.astype(np.float64) * (xp.uniforms(like, key, block.start, tau.size) >= cfg.drop).reshape(tau.shape) for tau, key in zip(taus, keys, strict=True)
    ]
