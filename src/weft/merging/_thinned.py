"""What a model does when most of its increment was dropped, and the q that brings it nearest to what it did before.

One model at a time: what is left of its increments is in memory, on the model's device, while its q is sought.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch

from .. import xp
from .._fused import Combination, combined
from ..engine.capture import capture
from ..errors import WeftError
from ..sites import Site, sites
from ._data import Batch, Study
from ._learned import placed
from .dare import dropped
from .darex_q import DarexQConfig, analytic_q, share_left

if TYPE_CHECKING:
    import numpy as np

    from ..engine.increments import Target
    from ._depth import Settings

    Array = np.ndarray[Any, Any]

_TOP = 5
"""Logits that are compared: those that are largest before anything is dropped."""

_GRID = 10
_ETAS = [10 ** (k / 3 - 2) for k in range(10)]


class Thinned:
    """Model `number` of a study, whole and with entries dropped, on the first `rows` of its data.

    keys: its sequence of random numbers for each tensor
    """

    def __init__(self, study: Study, number: int, settings: Settings[DarexQConfig], keys: Mapping[str, int]) -> None:
        self.study, self.number, self._keys = study, number, keys
        cfg = settings.whole.cfg
        self._cfg = {name: settings.at(target).cfg for name, target in study.models.targets.items()}
        firsts, models = study.firsts(), study.models
        touched = [target for name, target in models.targets.items() if models.touches(number, name)]
        self._live = [target for target in touched if firsts[target.name] == target.name]  # a tied tensor once
        self._left = {target.name: self.increment(target, left=True) for target in self._live}
        linear = {site.name for site in sites(study.model, "all-linear", kinds=("linear", "conv1d"))}
        found = [(target, study.site(target)) for target in touched]
        self._layers: list[tuple[Target, Site]] = [(target, site) for target, site in found if site is not None and site.name in linear]
        examples = sorted(study.examples[number][: cfg.rows], key=lambda example: -len(example["input_ids"]))
        self._batches = [study.batch(examples[start : start + study.batch_size]) for start in range(0, len(examples), study.batch_size)]
        self._base = study.parameters()
        with study.live(number), torch.no_grad():
            self._before = [(told := _told(batch, study.logits(batch))).topk(min(_TOP, told.shape[-1])) for batch in self._batches]

    def increment(self, target: Target, *, left: bool = False) -> torch.Tensor:
        """A tensor's increment, float32; `left`: what is left of it, not rescaled."""
        tau = self.study.models.read(self.number, target.whole)
        if left:
            tau = combined([tau], Combination([1.0], keys=[self._keys[target.name]], dropped=dropped(self._cfg[target.name].drop)), 0)
        tensor: torch.Tensor = xp.to_torch(tau).to(self.study.device, torch.float32)
        return tensor

    @torch.no_grad()
    def error(self, q: Mapping[str, float]) -> float:
        """The mean squared change of the largest logits when what is left of each tensor is divided by its q."""
        total, count = 0.0, 0
        with self.study.beneath(self.number) as model:
            weights = placed(self.study, self._base, ((target, self._left[target.name] / q[target.name]) for target in self._live))
            for batch, before in zip(self._batches, self._before, strict=True):
                logits = torch.func.functional_call(model, weights, (), _given(batch)).logits
                total += float((_told(batch, logits).gather(-1, before.indices) - before.values).square().sum())
                count += before.values.numel()
        return total / count

    def everywhere(self, layers: Mapping[str, float]) -> dict[str, float]:
        """q of all tensors of the merge: the mean of the layers' where a tensor has none of its own, but no less than that of `dare`."""
        mean = sum(layers.values()) / len(layers) if layers else 0.0
        return {name: layers.get(name, max(mean, share_left(cfg.drop))) for name, cfg in self._cfg.items()}

    # --- two ways to find it

    def by_output(self, drop: float) -> dict[str, float]:
        """One q for all tensors, between 1 - p and 1."""
        least = share_left(drop)
        step = least ** (1 / (_GRID - 1))
        coarse = _best([least, *(step**k for k in range(_GRID - 1))], self._error_of_one)
        around = [coarse * step ** (k / (_GRID // 2 + 1)) for k in range(-(_GRID // 2), _GRID // 2 + 1) if k]
        return self._same(_best([coarse, *(q for q in around if least < q < 1)], self._error_of_one))

    def by_bound(self) -> dict[str, float]:
        """One q for each layer, by the bound."""
        sums = dict(self._sums())

        def bounded(etas: Mapping[str, float]) -> dict[str, float]:
            return self.everywhere({name: analytic_q(*both, self._cfg[name].drop, etas[name]) for name, both in sums.items()})

        given = {name: cfg.eta for name, cfg in self._cfg.items() if cfg.eta is not None}
        return bounded(given or self._same(_best(_ETAS, lambda eta: self.error(bounded(self._same(eta))))))

    def _same(self, number: float) -> dict[str, float]:
        return dict.fromkeys(self._cfg, number)

    def _error_of_one(self, q: float) -> float:
        return self.error(self._same(q))

    def _sums(self) -> Iterator[tuple[str, tuple[Array, Array]]]:
        """S1 and S2 of every layer's outputs, see `analytic_q`."""
        total: dict[str, torch.Tensor] = {}
        count = 0
        for inputs in self._inputs():
            for name, x in inputs.items():
                total[name] = total.get(name, 0) + x.double().sum(0)
            count += len(next(iter(inputs.values())))
        biases = {site.module: target for target in self._live if (site := self.study.site(target)) is not None and site.param == "bias"}
        for target, site in self._layers:
            tau = self.increment(target).double()
            c = (tau.T if site.kind == "conv1d" else tau) * (total[target.name] / count)
            if site.module in biases:
                c = torch.cat([c, self.increment(biases[site.module]).double()[:, None]], 1)
            yield target.name, (c.sum(1).cpu().numpy(), c.square().sum(1).cpu().numpy())

    def _inputs(self) -> Iterator[dict[str, torch.Tensor]]:
        """What the whole model gives its layers, batch by batch."""
        modules = {target.name: self.study.model.get_submodule(site.module) for target, site in self._layers}
        with self.study.live(self.number) as model:
            for batch in self._batches if modules else ():
                found = capture(model, _given(batch), modules, batch["attention_mask"].bool())
                yield {name: each.inputs for name, each in found.items()}


def found_q(study: Study, number: int, settings: Settings[DarexQConfig], keys: Mapping[str, int]) -> dict[str, float]:
    """q of every tensor of a merge for one of its models."""
    thin, cfg = Thinned(study, number, settings, keys), settings.whole.cfg
    return thin.by_output(cfg.drop) if cfg.find == "output" else thin.by_bound()


def _given(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _told(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """A model's logits where it says something: for each row, or for each token that is no padding (N x classes, float32)."""
    return (logits if logits.ndim == 2 else logits[batch["attention_mask"].bool()]).float()


def _best(candidates: Sequence[float], error: Callable[[float], float]) -> float:
    """The candidate with the smallest error, the first of several. WeftError if none has a finite one."""
    errors = [error(each) for each in candidates]
    finite = [k for k, each in enumerate(errors) if isfinite(each)]
    if not finite:
        raise WeftError("the model's output is not finite for any q", hint="a smaller drop, or float32 instead of a 16-bit dtype")
    return candidates[min(finite, key=errors.__getitem__)]
