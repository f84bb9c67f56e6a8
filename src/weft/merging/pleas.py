"""pleas: the base and a model of the same kind as one, by partial matching of units and least squares for each linear layer.

Nasery et al. 2024 (PLeaS), arXiv 2407.02447. For the base A and a model B with weight w (B counts w, A the rest):

1. Match. B's units are brought into A's order, as in weight-matching. The paper matches by activations or weights; here by weights.
2. Keep apart. Of the matched pairs of hidden units of each MLP the share `ratio` that is furthest apart (in the squared distance of
   their weights) is not merged but kept twice, so the MLPs get wider by that share. A layer between merged and separate units is

       to \\ from    merged              of A          of B
       merged       (1 - w) A + w B     (1 - w) A     w B
       of A         A                   A             0
       of B         B                   0             B

3. Least squares. Each linear layer inside the layers is then fitted so that its outputs, on the merged inputs x = (1 - w) x_A + w x_B
   (separate ones as they are), are the merged outputs y = (1 - w) A x_A + w B x_B. With W_0 from step 2,

       W = W_0 + (Y X^T - W_0 X X^T) (X X^T + ridge c I)^-1,        c = mean of X X^T's diagonal

   over all tokens of the data, with both models' activations in A's order. `ridge` pulls towards W_0, so directions that no input has stay.

Biases, norms and embeddings are as in step 2. The models run one after the other on the same batches; what is kept is one matrix of
second moments for each layer, (2 d_in)^2 float64 numbers: in memory while it is measured, then on disk.

Not followed: the authors fit by 400 steps of Adam from W_0. The problem is linear least squares, so its minimum is one solve: exact, without
a learning rate, and no slower. Their gradient mask, which keeps the zeros of step 2, is left out (in their code it is transposed by
mistake). They choose a ratio for each layer by a quadratic program under a budget of operations; a transformer's config has one width for
all its MLPs, so it is one ratio here. Their code is for ResNets; the other groups (residual stream, heads) are merged whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ..methods import method
from ._method import DataMethod
from .weight_matching import WeightMatchingConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from ..engine.increments import Block, Target
    from ..engine.permutations import Group
    from ..engine.statistics import SecondMoment
    from ._aligned import Aligned
    from ._data import Spool, Study
    from ._depth import Settings

    Array = np.ndarray[Any, Any]

_HELD = 1 << 29
"""Bytes of activations of the base that wait for the other model."""


class PleasConfig(WeightMatchingConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `pleas`."""

    ratio: Annotated[float, msgspec.Meta(ge=0, le=1, description="Share of each MLP's hidden units that both models keep for themselves.")] = 0.0
    ridge: Annotated[float, msgspec.Meta(gt=0, description="Pull towards the averaged weights, relative to the mean of the second moments' diagonal.")] = 1e-4


@dataclass(frozen=True)
class _Axis:
    """What each position along an axis of the result is made of: a position in the base's order, of both models (0), A (1) or B (2)."""

    position: Array
    who: Array

    def shares(self, w: float) -> tuple[Array, Array]:
        """How much A and B count at each position."""
        import numpy as np

        return np.array([1 - w, 1.0, 0.0])[self.who], np.array([w, 0.0, 1.0])[self.who]


@dataclass(frozen=True)
class PleasState:
    """The matched models; for each tensor its axes that get wider; the second moments by tensor, on disk, with the axis of its inputs."""

    aligned: Aligned
    wider: dict[str, dict[int, _Axis]]
    config: dict[str, int]
    spool: Spool
    inputs: dict[str, int]

    def axis(self, name: str, axis: int) -> _Axis:
        import numpy as np

        size = self.aligned.base.tensors[name].shape[axis]
        return self.wider.get(name, {}).get(axis) or _Axis(np.arange(size), np.zeros(size, np.int64))


@method(
    "merge",
    config=PleasConfig,
    paper="Nasery et al., 2024, arXiv:2407.02447",
    formula="W = argmin ||W ((1 - w) x_A + w pi(x_B)) - ((1 - w) A x_A + w pi(B x_B))||^2 + ridge ||W - W_0||^2, w = 1/2 by default",
    varies=("ridge",),
)
class Pleas(DataMethod[PleasConfig]):
    """Match units, keep apart what does not match, fit each linear layer to both models' features."""

    whole = True
    reads = False

    def default_weight(self, count: int) -> float:
        return 1.0 / (count + 1)

    def problems(self, weights: Sequence[float], cfg: PleasConfig) -> list[str]:
        found = [f"pleas merges the base with one model, got {len(weights)}"] if len(weights) != 1 else []
        return found + [f"the weight is the model's share, from 0 to 1, got {w}" for w in weights if not 0 <= w <= 1]

    def measure(self, study: Study, settings: Settings[PleasConfig]) -> PleasState:
        """Match the units, choose those that stay apart, and take the second moments of both models' activations."""
        from ..sites import sites
        from ._aligned import Aligned
        from ._data import Spool

        cfg = settings.whole.cfg
        aligned = Aligned.of(study.models, cfg.layout, cfg.seed, cfg.sweeps)
        wider, patch = _wider(aligned, cfg)
        linear = {site.name for site in sites(study.model, "all-linear", kinds=("linear", "conv1d"))}
        every = {**study.models.targets, **{target.name: target for target in aligned.targets()}, **_targets(aligned, wider)}
        found = {name: study.site(target) for name, target in every.items()}
        chosen = {name: site for name, site in found.items() if site is not None and site.name in linear}
        moments = _moments(study, {name: study.model.get_submodule(site.module) for name, site in chosen.items()})
        spool = Spool()
        spool.add({name: moment.matrix for name, moment in moments.items()})
        return PleasState(aligned, wider, patch, spool, {name: 0 if site.kind == "conv1d" else 1 for name, site in chosen.items()})

    def targets(self, targets: Sequence[Target], state: PleasState) -> list[Target]:
        return list(({each.name: each for each in (*targets, *state.aligned.targets())} | _targets(state.aligned, state.wider)).values())

    def config(self, state: PleasState) -> dict[str, Any]:
        return state.config

    def merge(self, taus: list[Array], weights: Sequence[float], cfg: PleasConfig, state: PleasState, block: Block) -> Array:
        name, (w,) = block.target.name, weights
        a, b = state.aligned.start(name), state.aligned.values(0, name)
        if name in state.inputs:
            new = _fitted(a, b, w, cfg.ridge, state, name)
        elif name in state.wider:
            (axis,) = state.wider[name].values()  # a bias
            of_a, of_b = axis.shares(w)
            new = of_a * a[axis.position] + of_b * b[axis.position]
        else:
            return w * (b - a)
        return new if name in state.wider else new - a


def _fitted(a: Array, b: Array, w: float, ridge: float, state: PleasState, name: str) -> Array:
    """Steps 2 and 3 on one matrix."""
    import numpy as np
    import torch

    from ..engine.solve import Prior

    into = state.inputs[name]
    outputs, inputs = state.axis(name, 1 - into), state.axis(name, into)
    a, b = (np.moveaxis(values, into, 1)[outputs.position] for values in (a, b))
    out_a, out_b = outputs.shares(w)
    in_a, in_b = inputs.shares(w)
    targets = np.concatenate([out_a[:, None] * a, out_b[:, None] * b], 1)  # what makes y of x_A and x_B
    merged = out_a[:, None] * a[:, inputs.position] * (inputs.who != 2) + out_b[:, None] * b[:, inputs.position] * (inputs.who != 1)
    moments, d = state.spool.read(0, name), a.shape[1]
    order = state.aligned.order(0, name, into)
    if order is not None:
        both = np.concatenate([np.arange(d), d + order])
        moments = moments[both][:, both]
    cross = in_a * moments[:, inputs.position] + in_b * moments[:, d + inputs.position]  # of x_A and x_B with x
    gram = in_a[:, None] * cross[inputs.position] + in_b[:, None] * cross[d + inputs.position]
    missing = targets @ cross - merged @ gram
    new: Array = merged + Prior.scaled((gram + gram.T) / 2, 1.0, jitter=ridge).inverse(torch.from_numpy(missing)).numpy()
    return np.moveaxis(new, 1, into)


# --- units that stay apart


def _wider(aligned: Aligned, cfg: PleasConfig) -> tuple[dict[str, dict[int, _Axis]], dict[str, int]]:
    """The axes that get wider, by tensor, and the config's new width."""
    import numpy as np

    from ..engine.symmetries import hidden
    from ..errors import UsageError

    if not cfg.ratio:
        return {}, {}
    if cfg.layout is not None:
        raise UsageError("a layout does not say which widths the model's config leaves free", hint="with a layout, ratio=0")
    key, groups = hidden(aligned.base, aligned.groups)
    size = groups[0].size
    count = round(cfg.ratio * size)
    wider: dict[str, dict[int, _Axis]] = {}
    for group in groups if count else ():
        apart = np.sort(np.argsort(-_distances(aligned, group), kind="stable")[:count])
        units = np.concatenate([np.delete(np.arange(size), apart), apart, apart])
        who = np.repeat([0, 1, 2], [size - count, count, count])
        for place in group.places:
            axis = _Axis(place.start + units, who)
            mine = wider.setdefault(place.tensor, {})
            before = mine.get(place.axis)
            mine[place.axis] = axis if before is None else _Axis(*(np.concatenate(pair) for pair in ((before.position, axis.position), (before.who, who))))
    return wider, {key: size + count} if count else {}


def _distances(aligned: Aligned, group: Group) -> Array:
    """The squared distance of each of a group's matched pairs of units, over all its places."""
    import numpy as np

    total = np.zeros(group.size)
    for place in group.places:
        gap = aligned.start(place.tensor) - aligned.values(0, place.tensor)
        total += np.square(np.moveaxis(gap, place.axis, 0)[place.start : place.start + group.size]).reshape(group.size, -1).sum(1)
    return total


def _targets(aligned: Aligned, wider: Mapping[str, Mapping[int, _Axis]]) -> dict[str, Target]:
    """The tensors that get wider, as replaced ones."""
    from ..delta import BaseTensor, Change
    from ..engine.increments import Target

    out = {}
    for name, axes in wider.items():
        old = aligned.base.tensors[name]
        shape = tuple(len(axes[axis].position) if axis in axes else size for axis, size in enumerate(old.shape))
        base = BaseTensor(old.dtype, old.shape, aligned.base.sha256(name))
        out[name] = Target(name, old.dtype, shape, base, Change("replace", old.dtype, shape))
    return out


# --- activations


def _moments(study: Study, modules: Mapping[str, nn.Module]) -> dict[str, SecondMoment]:
    """E[z z^T] of what each module is given in both models on the same tokens, z = (x_A, x_B), each in its model's own order."""
    import torch

    from ..engine.capture import capture
    from ..engine.statistics import SecondMoment

    out: dict[str, SecondMoment] = {}

    def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return {name: each.inputs for name, each in capture(study.model, given, modules, batch["attention_mask"].bool()).items()}

    def flush() -> None:
        with study.live(0):
            for batch, ours in held:
                for name, theirs in inputs(batch).items():
                    z = torch.cat([ours[name], theirs], 1)
                    out.setdefault(name, SecondMoment(z.shape[1])).add(z)
        held.clear()

    held: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    for batch in study.batches(0) if modules else ():
        held.append((batch, inputs(batch)))
        if sum(x.nbytes for _, ours in held for x in ours.values()) >= _HELD:
            flush()
    if held:
        flush()
    return out
