"""darex-q: drop most of every increment at random, and rescale what is left by a factor that suits the model.

Deng et al. 2024, arXiv 2410.09344. The masks are those of `dare`; q takes the place of 1 - p (p the option `drop`):

    theta = theta_0 + scale sum_i w_i m_i tau_i / q_i,     m_i ~ Bernoulli(1 - p)

1/(1-p) keeps the mean of every output over all masks, but there is one mask, and at p = 0.99 what is left is scaled by 100: the error
grows with p/(1-p) times the squares of the increment's entries. A larger q trades some bias for much less noise. q = 1 - p, for the rate
that is used (`share_left`), is `dare`, bit for bit. Where q is not given it is found for each model on its data (the first 100 rows;
labels are not needed), by `find`:

output    one q for the model: the smallest mean squared change, against the model as it was, of the five logits that are largest there, at
          every token (or row, of a classifier). About twenty values: a geometric grid from 1 - p to 1, then between the neighbours of
          the best. Dropping with q = 1 - p is one of them, so what is found is no worse on this data. The paper's q_e.
analytic  one q for each linear layer, from the mean of its inputs, by the smallest bound on the change of its outputs (`analytic_q`). The
          bound has a parameter `eta`; if that is none, the one of 0.01 to 10 with the smallest change of the model's output. Tensors that are
          no linear layer of the model's blocks (norms, biases, embeddings, heads) take the mean of the layers' q, as in the paper.

Over depth, q, drop and eta may vary; not drop with `output`, where one q is found for all tensors. No q that is found is below 1 - p of its tensor.

What was found is the blob `darex-q` of the result: JSON, for each tensor one q a model.

Not followed: the authors' code doesn't make the bound small but looks for the q with which eta (1-(1-p)/q) S1 + eta^2 Phi S2/(4 q^2) +
ln(2/(1-gamma)) is nearest to zero, S1 with its sign. Where sums are small beside the logarithm (increments of a short run) that is q = 0.5
and more for every eta, and nothing of the model is left. Of an encoder they compare the last hidden states. They never drop a head, which
here is dropped like the rest; and they choose q by a validation set's labels too, for which `weft eval` over some q serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from .. import canon
from .._fused import Combination
from ..methods import method
from ._method import DataMethod
from .dare import dropped, mask_keys

if TYPE_CHECKING:
    import numpy as np

    from ..engine.increments import Increments, Target
    from ._data import Study
    from ._depth import Settings

    Array = np.ndarray[Any, Any]


class DarexQConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `darex-q`."""

    drop: Annotated[float, msgspec.Meta(ge=0, lt=1, description="Probability that an entry of an increment is dropped.")] = 0.9
    q: Annotated[float, msgspec.Meta(gt=0, description="What the entries that are left are divided by; none: found on data.")] | None = None
    find: Annotated[
        Literal["output", "analytic"],
        msgspec.Meta(description="How q is found: one by the model's output, or one for each layer by a bound on the change of its outputs."),
    ] = "output"
    eta: Annotated[float, msgspec.Meta(gt=0, description="Parameter of the bound; none: found by the model's output.")] | None = None
    rows: Annotated[int, msgspec.Meta(ge=1, description="Rows of each model's data that are looked at, from the first.")] = 100
    scale: Annotated[float, msgspec.Meta(description="Factor on the merged increment.")] = 1.0
    seed: Annotated[int, msgspec.Meta(ge=0, description="Seed of the masks.")] = 0


@dataclass(frozen=True)
class DarexQState:
    """`keys`: the sequence of random numbers of each tensor and model; `q`: what each model's is divided by there; whether it was `found`."""

    keys: dict[str, list[int]]
    q: dict[str, list[float]]
    found: bool = False


@method(
    "merge",
    config=DarexQConfig,
    paper="Deng et al., 2024, arXiv:2410.09344",
    formula="theta = theta_0 + scale sum_i w_i m_i tau_i / q_i, m_i ~ Bernoulli(1 - p)",
    varies=("drop", "q", "eta", "scale"),
)
class DarexQ(DataMethod[DarexQConfig]):
    """Drop entries of each increment at random, rescale the others as little as is good."""

    def looks(self, cfg: DarexQConfig) -> bool:
        return cfg.q is None

    def fixed(self, cfg: DarexQConfig) -> dict[str, str]:
        return {"drop": "one q is sought for it; give q, or find=analytic"} if cfg.q is None and cfg.find == "output" else {}

    def weighted(self, cfg: DarexQConfig) -> bool:
        return cfg.drop == 0 and cfg.q is not None

    def coefficients(self, weights: Sequence[float], cfg: DarexQConfig, state: DarexQState, target: Target) -> list[float]:
        return [cfg.scale / q * w for w, q in zip(weights, state.q[target.name], strict=True)]

    def prepare(self, models: Increments, settings: Settings[DarexQConfig]) -> DarexQState:
        here = {name: settings.at(target).cfg for name, target in models.targets.items()}
        q = {name: [cfg.q or share_left(cfg.drop)] * len(models.updates) for name, cfg in here.items()}
        return DarexQState(mask_keys(models, settings.whole.cfg.seed), q)

    def measure(self, study: Study, settings: Settings[DarexQConfig]) -> DarexQState:
        from ._thinned import found_q

        keys = mask_keys(study.models, settings.whole.cfg.seed)
        count = len(study.models.updates)
        each = [found_q(study, number, settings, {name: several[number] for name, several in keys.items()}) for number in range(count)]
        return DarexQState(keys, {name: [q[name] for q in each] for name in keys}, True)

    def combination(self, weights: Sequence[float], cfg: DarexQConfig, state: DarexQState, target: Target) -> Combination:
        return Combination(self.coefficients(weights, cfg, state, target), keys=state.keys[target.name], dropped=dropped(cfg.drop))

    def blobs(self, state: DarexQState) -> dict[str, bytes]:
        return {"darex-q": canon.dumps({name: list(q) for name, q in state.q.items()})} if state.found else {}


def share_left(drop: float) -> float:
    """1 - p, for the rate that is used: a multiple of 1/65,536."""
    return 1 - dropped(drop) / 65536


def analytic_q(first: Array, second: Array, drop: float, eta: float) -> float:
    """The q of one linear layer by a bound on the change of its outputs.

    first, second: for each output i, S1 = sum_j c_ij and S2 = sum_j c_ij^2, where c_ij = tau_ij x_j, x is the mean of the layer's inputs, and
    the bias's increment is one more c. With Phi = (1 - 2p) / ln((1-p)/p) the change of output i is, with a probability of at
    least 1 - delta (Chernoff, and Kearns and Saul's bound for a Bernoulli variable), at most

        |1 - (1-p)/q| |S1| + eta Phi S2 / (4 q^2) + ln(2 / delta) / eta

    which is smallest at q = eta Phi S2 / (2 (1-p) |S1|), or at 1 - p if that is larger. The answer is the mean over outputs, none above 1;
    outputs that nothing changes do not count.
    """
    import numpy as np

    least = share_left(drop)
    moving = second > 0
    if drop == 0 or not moving.any():
        return least
    phi = 0.5 if drop == 0.5 else (1 - 2 * drop) / log((1 - drop) / drop)
    with np.errstate(divide="ignore"):
        best = eta * phi * second[moving].astype(np.float64) / (2 * least * abs(first[moving].astype(np.float64)))
    return max(least, float(np.clip(best, least, 1.0).mean()))
