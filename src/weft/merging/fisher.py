"""fisher: the average of the models, each parameter of each weighted by how much that model's predictions depend on it.

Matena and Raffel 2021, arXiv 2111.09832. With models i, their data x and weights w_i,

    F_i = mean over x of E_{y ~ p_i(y | x)} (d log p_i(y | x) / d theta)^2       (the diagonal of the Fisher information)
    theta = sum_i w_i F_i theta_i / sum_i w_i F_i

which is the most probable point of a product of Gaussians, one about each model. On increments it is the same average, as the
base's share cancels. Every F_i is at least `floor`: what no model's predictions depend on is averaged plainly.

`labels` says where y is from. "model": for a classifier the expectation is exact, a sum over all classes, and the data need no
labels; for a language model each token that the data ask for is drawn from the model's own distribution, once, given what
stands before it in the data. "data": y is what the data say (the "empirical" Fisher).

Gradients are of single rows, so this is a loop with a backward pass for each row (and each class): hundreds of rows are enough in
the paper. While it runs, each model's sums are on the device in float32; afterwards they wait on disk.

With `normalize`, F_i is divided by its norm over all tensors, as in the authors' scripts, so that a model that is less sure of itself,
whose gradients are larger, does not win everywhere. The floor comes first, as there. Not followed: their `favor_target_model`, which
gives the first model what no F reaches the floor of. A tensor that only some models have (a head) is averaged over those.

Models that are very sure of themselves have small gradients and need large weights: the paper searches for weights on held-out data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from ..methods import method
from ._method import DataMethod

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..engine.increments import Block
    from ._data import Spool, Study
    from ._depth import Settings

    Array = np.ndarray[Any, Any]


class FisherConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `fisher`."""

    labels: Annotated[
        Literal["model", "data"],
        msgspec.Meta(description="Whose predictions gradients are taken of: the model's own (an expectation, or a draw for each token) or the data's."),
    ] = "model"
    floor: Annotated[float, msgspec.Meta(gt=0, description="Smallest Fisher information of a parameter.")] = 1e-6
    normalize: Annotated[bool, msgspec.Meta(description="Divide each model's Fisher information by its norm.")] = True
    seed: Annotated[int, msgspec.Meta(ge=0, description="Seed of the tokens that are drawn from language models.")] = 0


@dataclass(frozen=True)
class FisherState:
    """F of each model on disk, what to divide it by, and for each tensor the models that have it."""

    spool: Spool
    norms: list[float]
    owners: dict[str, list[int]]


@method(
    "merge",
    config=FisherConfig,
    paper="Matena and Raffel, 2021, arXiv:2111.09832",
    formula="theta = sum_i w_i F_i theta_i / sum_i w_i F_i, F_i = E (d log p_i(y | x))^2",
    varies=("floor",),
)
class Fisher(DataMethod[FisherConfig]):
    """The average of the models, weighted by each parameter's Fisher information."""

    def problems(self, weights: Sequence[float], cfg: FisherConfig) -> list[str]:
        return ["fisher averages: no weight may be negative, and one must be positive"] * (min(weights) < 0 or max(weights) == 0)

    def measure(self, study: Study, settings: Settings[FisherConfig]) -> FisherState:
        """F of every model for all tensors that any of them changes."""
        from ._data import Spool

        cfg = settings.whole.cfg
        if cfg.labels == "data":
            study.require_labels("labels=data")
        spool, norms = Spool(), []
        for number in range(len(study.models.updates)):
            found = diagonal(study, number, cfg)
            spool.add(found)
            norms.append(sum(float(values.double().square().sum()) for values in found.values()) ** 0.5 if cfg.normalize else 1.0)
        models = study.models
        owners = {name: [k for k in range(len(models.updates)) if target.change is None or models.touches(k, name)] for name, target in models.targets.items()}
        return FisherState(spool, [norm or 1.0 for norm in norms], owners)

    def merge(self, taus: list[Array], weights: Sequence[float], cfg: FisherConfig, state: FisherState, block: Block) -> Array:
        import numpy as np

        name = block.target.name
        total, mass = np.zeros(block.shape), np.zeros(block.shape)
        for number in state.owners[name]:
            share = np.maximum(state.spool.rows(number, name, block.lo, block.hi).astype(np.float64), cfg.floor)
            share *= weights[number] / state.norms[number]
            total += share * taus[number].astype(np.float64)
            mass += share
        return np.divide(total, mass, out=np.zeros(block.shape), where=mass > 0)


def diagonal(study: Study, number: int, cfg: FisherConfig) -> dict[str, torch.Tensor]:
    """F_i of one model for each tensor of the checkpoint that any model changes, float32, on the CPU."""
    import torch

    from .. import xp
    from ._data import predicted

    generator = torch.Generator().manual_seed(xp.key(study.seed, number) >> 1)
    parameters = study.parameters()
    held = list(parameters.values())
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in held]
    with study.live(number), torch.enable_grad():
        for parameter in held:
            parameter.requires_grad_(True)
        try:
            for example in study.examples[number]:
                batch = study.batch([example])
                log_p, labels, _ = predicted(study.logits(batch), batch["labels"])
                for share, value in _scores(log_p, labels, study.classifies, cfg, generator):
                    for total, grad in zip(sums, torch.autograd.grad(value, held, retain_graph=True, allow_unused=True), strict=True):
                        if grad is not None:
                            total.addcmul_(grad.float(), grad.float(), value=share)
        finally:
            for parameter in held:
                parameter.requires_grad_(False)
    means = {name: total / len(study.examples[number]) for name, total in zip(parameters, sums, strict=True)}
    return {name: study.stored(target, means) for name, target in study.models.targets.items()}


def _scores(log_p: torch.Tensor, labels: torch.Tensor, classifies: bool, cfg: FisherConfig, generator: torch.Generator) -> Iterator[tuple[float, torch.Tensor]]:
    """log p(y | x) of one row for each y that counts, and how much it does."""
    if cfg.labels == "model" and classifies:
        for label in range(log_p.shape[1]):
            yield float(log_p[0, label].detach().exp()), log_p[0, label]
        return
    if cfg.labels == "model":
        labels = log_p.detach().exp().cpu().multinomial(1, generator=generator)[:, 0].to(log_p.device)
    yield 1.0, log_p.gather(1, labels[:, None]).sum()
