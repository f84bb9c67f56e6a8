"""The rank allocator: which components of low-rank changes live, how many, and since when.

A component is one column of the left factor with one row of the right one (and its coefficient). All spaces whose ranks change hold a
fixed capacity of them, so that what is trained, the optimizer's state and exact resume know nothing of ranks: a component that does
not live has no gradient and does not move, and `compacted` writes only those that live.

    components(delta)         the ops of a delta that have components, with the keys of their tensors
    budget(...)               how many may live at a step
    Importance                |w dL/dw|, smoothed, times how uncertain it is
    kept(scores, count)       prune: masks of the components with the highest scores
    grown(scores, ranks, ...) grow: which groups get one more
    shared_out(weights, ...)  ranks in proportion, before anything is trained
    Pace                      holds components still, and lets new ones begin slowly
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import nn

from ..delta import SHARED, Delta, Entry, renumbered
from ..errors import UsageError
from ..ops import OpEntry
from ..stored import Tensor, hold

AXES: Mapping[str, Mapping[str, int]] = {"svd": {"P": 1, "lam": 0, "Q": 0}, "lowrank": {"B": 1, "A": 0}}
"""Ops with components: of each field, the axis along which they lie."""

NEVER = inf
"""Where a component's first step stands: it has none."""

ALWAYS = -inf
"""The same: it has been there from the start."""


@dataclass(frozen=True)
class Group:
    """The components of one op: `rank` of them (the capacity), their tensors' keys by field, the entries of what they change."""

    name: str
    op: str
    keys: Mapping[str, str]
    rank: int
    size: int

    def axes(self) -> Iterable[tuple[str, str, int]]:
        """Field, tensor key and axis of the components."""
        return ((field, self.keys[field], axis) for field, axis in AXES[self.op].items())


def components(delta: Delta) -> list[Group]:
    """The ops of a delta that have components of their own, by name `TARGET//N`, in order."""
    found = []
    for entry in delta.entries.values():
        for op in entry.ops:
            fields = AXES.get(op.op, {})
            if fields and not any(op.t[field].take or op.t[field].key.startswith(SHARED) for field in fields):
                keys = {field: op.t[field].key for field in fields}
                shapes = {field: delta.tensors[key].shape for field, key in keys.items()}
                left, right = (field for field in fields if field != "lam")
                found.append(Group(_name(op), op.op, keys, shapes[right][0], shapes[left][0] * shapes[right][1]))
    return found


def _name(op: OpEntry) -> str:
    return op.t[next(iter(AXES[op.op]))].key.rpartition(".")[0]


def budget(place: float, start: int, goal: int, first: float, last: float, power: float = 1.0) -> int:
    """How many components may live: `start` up to `first`, `goal` from `last` on, between them goal + (start - goal) left^power.

    `left` is the share of the way from first to last that is still to go; power 3 is AdaLoRA's, which falls fast at first.
    """
    if place >= last:
        return goal
    if place <= first:
        return start
    return int(goal + (start - goal) * (1 - (place - first) / (last - first)) ** power)


class Importance:
    """How much each entry of each tensor matters: s = |w dL/dw| smoothed by `beta1`, u = |s_now - s| smoothed by `beta2`; s u.

    The uncertainty u is of the smoothed s after the step (Zhang et al. 2023, arXiv 2303.10512). What is kept goes through `state` and `load`.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self._mean: dict[str, torch.Tensor] = {}
        self._spread: dict[str, torch.Tensor] = {}

    def add(self, name: str, now: torch.Tensor) -> None:
        """Take in a step's sensitivity of a tensor, or of anything that is measured anew at each step."""
        mean, spread = self._mean.get(name, torch.zeros_like(now)), self._spread.get(name, torch.zeros_like(now))
        self._mean[name] = mean = self.beta1 * mean + (1 - self.beta1) * now
        self._spread[name] = self.beta2 * spread + (1 - self.beta2) * (now - mean).abs()

    def __call__(self, name: str) -> torch.Tensor:
        """s u of what was added under a name."""
        return self._mean[name] * self._spread[name]

    def __bool__(self) -> bool:
        return bool(self._mean)

    def clear(self) -> None:
        """Forget everything."""
        self._mean.clear()
        self._spread.clear()

    def state(self) -> dict[str, torch.Tensor]:
        """What `load` needs."""
        return {f"{kind}/{name}": value for kind, table in (("mean", self._mean), ("spread", self._spread)) for name, value in table.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""
        for name, value in state.items():
            kind, _, rest = name.partition("/")
            if kind in ("mean", "spread"):
                (self._mean if kind == "mean" else self._spread)[rest] = value


def triplet_scores(group: Group, of: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A score for each component: that of its coefficient, and the means of those of its column and of its row. `of`: scores of a tensor's entries."""
    total = torch.zeros(())
    for _, key, axis in group.axes():
        value = of(key)
        total = value + total if value.ndim == 1 else value.movedim(axis, 0).flatten(1).mean(1) + total
    return total


def kept(scores: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Masks of the `count` components with the highest scores over all groups; of equal ones those that come first."""
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    alive = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    alive[flat.argsort(descending=True, stable=True)[:count]] = True
    parts = torch.split(alive, [score.numel() for score in scores.values()])
    return dict(zip(scores, parts, strict=True))


def grown(scores: Mapping[str, float], ranks: Mapping[str, int], most: Mapping[str, int], count: int) -> dict[str, int]:
    """New ranks after `count` more components: one for each group in the order of scores (equal ones: as they come), and round again.

    No group gets more than `most` of it, nor one that is missing in `scores`; what finds no place is not given out.
    """
    ranks = dict(ranks)
    order = sorted(scores, key=lambda name: -scores[name])
    while count > 0:
        room = [name for name in order if ranks[name] < most[name]][:count]
        if not room:
            break
        for name in room:
            ranks[name] += 1
        count -= len(room)
    return ranks


def shared_out(weights: Sequence[float], total: int, most: Sequence[int]) -> list[int]:
    """`total` components shared out in proportion to weights: at least one each and at most `most`, one after the other to whom the share is owed most.

    UsageError where `total` is less than one each.
    """
    if total < len(weights):
        raise UsageError(f"a budget of {total} components for {len(weights)} matrices, which get at least one each")
    ranks = [1] * len(weights)
    for _ in range(min(total, sum(most)) - len(weights)):
        k = max((k for k in range(len(ranks)) if ranks[k] < most[k]), key=lambda k: weights[k] / (ranks[k] + 0.5))
        ranks[k] += 1
    return ranks


def speeds(since: torch.Tensor, step: int, warmup: int) -> torch.Tensor:
    """How fast components move that have lived since the steps `since`: 0 (not yet) to 1, rising in equal parts over `warmup` steps."""
    return ((step + 1 - since) / max(warmup, 1)).clamp(0, 1)


class Pace:
    """Holds back what is trained: an entry with speed f moves f of the way that the optimizer takes it, and with 0 not at all.

    So new components warm up by themselves, weight decay does not touch those that wait, and this is so with every optimizer. Call
    `before` when gradients are there (those of entries that stand still are taken out, also from the norm that clipping sees),
    `after` when the step is done.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def before(self, tensors: Mapping[str, nn.Parameter], speed: Mapping[str, torch.Tensor]) -> None:
        """`speed`: of the tensors that are not free, in a shape that broadcasts to theirs."""
        self._held = {}
        for key, factor in speed.items():
            value, factor = tensors[key], factor.to(tensors[key].device, tensors[key].dtype)
            if value.grad is not None:
                value.grad.masked_fill_(factor == 0, 0.0)
            if not bool((factor == 1).all()):
                self._held[key] = value.detach().clone(), factor

    @torch.no_grad()
    def after(self, tensors: Mapping[str, nn.Parameter]) -> None:
        """Go back by what was too fast."""
        for key, (old, factor) in self._held.items():
            tensors[key].copy_(torch.lerp(old, tensors[key], factor.expand_as(old)))
        self._held = {}


def spread(factor: torch.Tensor, ndim: int, axis: int) -> torch.Tensor:
    """A number for each component in a shape that broadcasts to a tensor in which they lie along `axis`."""
    return factor.reshape([-1 if k == axis else 1 for k in range(ndim)])


def compacted(delta: Delta, alive: Mapping[str, torch.Tensor]) -> Delta:
    """The delta with only the components that live, by masks for each group's name; ops and targets with none are left out."""
    groups = {group.name: group for group in components(delta)}
    tensors: dict[str, Tensor] = dict(delta.tensors)
    entries: dict[str, Entry] = {}
    for name, mask in alive.items():
        chosen = mask.cpu().nonzero().flatten()
        for _, key, axis in groups[name].axes():
            tensors[key] = hold(torch.from_numpy(delta.get(key).copy()).index_select(axis, chosen).contiguous())
    for target, entry in delta.entries.items():
        ops = tuple(op for op in entry.ops if op.op not in AXES or bool(alive.get(_name(op), torch.ones(1)).any()))
        if ops or entry.change is not None:
            entries[target] = replace(entry, ops=ops)
    entries, tensors = renumbered(entries, tensors)
    return replace(delta, entries=entries, tensors=tensors)
