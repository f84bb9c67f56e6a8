"""Numbers that scale increments, trained on data while the base and the increments stay as they are.

    theta = theta_0 + sum_i c_i * tau_i            (live, through torch.func.functional_call: gradients reach the c and nothing else)

The gradient of one c is the inner product of the gradient of what it scales and the increment there. All increments are in memory
on the model's device, float32 and whole, as long as this runs: one copy of every tensor that is changed for each model that changes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import xp
from ..engine.data import Example, padded
from ..engine.events import Events
from ..engine.increments import Target
from ..engine.loop import LoopConfig, Run, train
from ._data import Batch, Study, predicted


@dataclass(frozen=True)
class Spread:
    """What scales the increments of a tensor: for each model one number (`axis` None), or `size` numbers along an axis, which all begin
    as `start`. Tensors with the same `key` have the same numbers."""

    key: str
    start: float
    axis: int | None = None
    size: int = 1

    def over(self, numbers: Any, ndim: int) -> Any:
        """The numbers of one model, ready to be multiplied with a tensor (numpy or torch)."""
        if self.axis is None:
            return numbers.reshape(())
        return numbers.reshape([self.size if axis == self.axis else 1 for axis in range(ndim)])


class Mixture(nn.Module):
    """The live base plus scaled increments. `scales` has for each key a parameter (models x size), float32.

    The live model stays in eval mode whatever happens to this module: dropout would only blur what few numbers can learn.
    """

    def __init__(self, study: Study, spreads: Mapping[str, Spread]) -> None:
        super().__init__()
        self._study: Any = study  # no module, so its live model is no part of this one
        models = study.models
        firsts = study.firsts()
        self._spreads = spreads
        self._targets = [target for name, target in models.targets.items() if firsts[name] == name]
        self._taus = {
            target.name: [(k, xp.to_torch(models.read(k, target.whole)).to(study.device)) for k in range(len(models.updates)) if models.touches(k, target.name)]
            for target in self._targets
        }
        self._base = study.parameters()
        every, count = {spread.key: spread for spread in spreads.values()}, len(models.updates)
        self.scales = {key: nn.Parameter(torch.full((count, each.size), float(each.start), device=study.device)) for key, each in every.items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """The live parameters that change, by name, in their dtype: theta, rounded once."""
        return placed(self._study, self._base, ((target, self._change(target)) for target in self._targets))

    def _change(self, target: Target) -> torch.Tensor:
        """sum_i c_i tau_i on one tensor."""
        spread = self._spreads[target.name]
        scales = self.scales[spread.key]
        change: torch.Tensor = sum(spread.over(scales[k], tau.ndim) * tau for k, tau in self._taus[target.name])
        return change

    def forward(self, batch: Batch) -> torch.Tensor:
        """The logits of a batch."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits: torch.Tensor = torch.func.functional_call(self._study.model, self.weights(), (), given).logits
        return logits


def placed(study: Study, base: Mapping[str, nn.Parameter], changes: Iterable[tuple[Target, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The live parameters with changes of checkpoint tensors added, by live name, in their dtype: rounded once. `base`: `study.parameters()`."""
    out: dict[str, torch.Tensor] = {}
    for target, change in changes:
        for place in study.places(target):
            name = study.live_name(place)
            if name in base:
                w = out.get(name, base[name].to(torch.promote_types(base[name].dtype, change.dtype)))
                part: Any = place.part.get(change) if place.part else change
                out[name] = place.at.set(w, place.at.get(w) + part) if place.at else w + part
    return {name: w.to(base[name].dtype) for name, w in out.items()}


class Goal:
    """What is wanted of a mixture, as the training loop asks for it: each set of data counts the same, and each row of one.

    The loss of a row is the mean over what it asks for, its label or its tokens, of -log p of what is right, or (`entropy`) of the entropy of
    the predictions, for which nobody needs to know what is right.
    """

    def __init__(self, study: Study, entropy: bool) -> None:
        sets = list({id(examples): examples for examples in study.examples}.values())
        total = sum(map(len, sets))
        self.examples: Sequence[Example] = [{**example, "share": total / len(sets) / len(examples)} for examples in sets for example in examples]
        self._pad, self._entropy = study.pad, entropy

    def collate(self, examples: Sequence[Example], keys: Sequence[int]) -> Batch:
        return padded(examples, self._pad) | {"share": torch.tensor([example["share"] for example in examples])}

    def weight(self, batch: Batch) -> float:
        return float(len(batch["input_ids"]))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        log_p, labels, rows = predicted(model(batch), batch["labels"])
        each = -(log_p.exp() * log_p).sum(1) if self._entropy else -log_p.gather(1, labels[:, None])[:, 0]
        loss: torch.Tensor = (each * (batch["share"] / rows.bincount())[rows]).sum() / len(batch["share"])
        return loss


def learn(
    study: Study, spreads: Mapping[str, Spread], *, steps: int, lr: float, weight_decay: float = 0.0, entropy: bool = False
) -> dict[str, np.ndarray[Any, Any]]:
    """The scales of every tensor after `steps` steps of AdamW (models x size, float64), by its name; `spreads` has all tensors.

    Two stored copies of one tied tensor share their numbers. The learning rate is constant and the gradient clipped to norm 1.
    WeftError if the loss is not finite.
    """
    spreads = {name: spreads[first] for name, first in study.firsts().items()}
    if not steps:
        return {name: np.full((len(study.models.updates), spread.size), spread.start) for name, spread in spreads.items()}
    mixture = Mixture(study, spreads)
    optimizer = torch.optim.AdamW(mixture.scales.values(), lr=lr, weight_decay=weight_decay)
    loop = LoopConfig(steps=steps, batch_size=study.batch_size)
    train(Run(mixture, Goal(study, entropy), mixture.scales, optimizer, lambda step, total: 1.0, loop, study.seed), Events())
    return {name: mixture.scales[spread.key].detach().cpu().double().numpy() for name, spread in spreads.items()}
