"""atlas: a learned coefficient for each increment on each tensor.

Zhang et al. 2024, arXiv 2407.02880 (aTLAS). With tensors b and models t,

    theta_b = theta_0,b + sum_t c_{t,b} tau_{t,b}

and only the c are trained, by AdamW: as many numbers as there are tensors times models. The data of all models count the same,
whatever their size. `objective` = "labels" takes the cross-entropy of labels (or of the tokens that language models are to
predict); "entropy" makes a classifier sure of its predictions, and needs no labels.

A tensor's c are those of one block of the paper. With equal c the result is `task-arithmetic` of that scale. Deltas keep their ops.

Not followed: the authors' test-time objective is another one (UFM: pseudo-labels of weakly augmented images, for strongly augmented ones,
with the surest of each class trusted; texts have no such augmentations), which entropy stands in for, as in AdaMerging (Yang et al.
2023, arXiv 2310.02575). They keep the best epoch on held-out data; here the last step counts, so give it data that the models were not
tuned on. Their learning rate is 1e-3 for 20 epochs, and 1e-1 for few examples; the default here lies between, for some hundred
steps. Random parts of tensors ("aTLAS x K") are not here. Weights are learned, so none are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from ..errors import UsageError
from ..methods import method
from ._method import DataMethod

if TYPE_CHECKING:
    from ..engine.increments import Target
    from ._data import Study
    from ._depth import Settings


class AtlasConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `atlas`."""

    objective: Annotated[Literal["labels", "entropy"], msgspec.Meta(description="Be right, or be sure without knowing what is right.")] = "labels"
    steps: Annotated[int, msgspec.Meta(ge=0, description="Steps of training, of `batch_size` rows each.")] = 200
    lr: Annotated[float, msgspec.Meta(gt=0, description="Learning rate.")] = 0.01
    weight_decay: Annotated[float, msgspec.Meta(ge=0, description="Decay of the coefficients towards 0.")] = 0.1
    start: Annotated[float, msgspec.Meta(description="Where all coefficients start.")] = 0.0
    seed: Annotated[int, msgspec.Meta(ge=0, description="Seed of the order of the data.")] = 0


@method(
    "merge",
    config=AtlasConfig,
    paper="Zhang et al., 2024, arXiv:2407.02880",
    formula="theta_b = theta_0,b + sum_t c_{t,b} tau_{t,b}, c = argmin of the loss on the data",
    varies=("start",),
)
class Atlas(DataMethod[AtlasConfig]):
    """A coefficient for each increment and tensor, learned on data."""

    def problems(self, weights: Sequence[float], cfg: AtlasConfig) -> list[str]:
        return ["atlas learns how much each model counts; leave the weights out"] * any(w != 1 for w in weights)

    def weighted(self, cfg: AtlasConfig) -> bool:
        return True

    def measure(self, study: Study, settings: Settings[AtlasConfig]) -> dict[str, list[float]]:
        """The coefficients of each model on every tensor."""
        from ._learned import Spread, learn

        cfg = settings.whole.cfg
        if cfg.objective == "labels":
            study.require_labels("atlas with objective=labels")
        elif not study.classifies:
            raise UsageError("objective=entropy is for classifiers: a language model that is only to be sure repeats itself", hint="-p objective=labels")
        spreads = {name: Spread(name, settings.at(target).cfg.start) for name, target in study.models.targets.items()}
        how: dict[str, Any] = {"steps": cfg.steps, "lr": cfg.lr, "weight_decay": cfg.weight_decay, "entropy": cfg.objective == "entropy"}
        return {name: [float(c) for c in scales[:, 0]] for name, scales in learn(study, spreads, **how).items()}

    def coefficients(self, weights: Sequence[float], cfg: AtlasConfig, state: dict[str, list[float]], target: Target) -> list[float]:
        return state[target.name]
