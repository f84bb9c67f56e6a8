"""Which entries are trained, where only some are: selection by score within a budget, and the scores.

A space scores the entries of its parts (see `weft.tuning.space.Part`) and takes the largest or the smallest: by how far a trial
moves them (`movements`), by the sum of their squared gradients (`sensitivities`), by their own size, or at random (`chances`). The
budget is a count over the whole model, or shared out over the tensors by their sizes; it is met exactly, and of entries with
the same score the first are taken.

`carry` moves an optimizer's moments along when entries change places, and zeroes those of entries that are new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from torch import nn

from .. import xp
from ..attaching.quantized import require_numbers
from ..engine.data import batches
from ..engine.select import kth_largest_magnitude
from ..errors import UsageError

if TYPE_CHECKING:
    from ..ops import Generator
    from .space import Job, Part

Positions = np.ndarray[Any, np.dtype[np.int64]]
"""Flat positions in a part, sorted."""


class Budget(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of spaces that train single entries: of which tensors, and how many."""

    targets: Annotated[tuple[str, ...], msgspec.Meta(description="what to change: roles, module names, globs, all-linear")] = ("all-linear",)
    exclude: Annotated[tuple[str, ...], msgspec.Meta(description="what to leave out of the targets")] = ()
    density: Annotated[float, msgspec.Meta(description="share of the targets' entries that are trained", gt=0, le=1)] = 0.01
    count: Annotated[int, msgspec.Meta(description="how many entries are trained, instead of density; 0: as density says", ge=0)] = 0
    across: Annotated[Literal["model", "tensor"], msgspec.Meta(description="one budget for all targets, or the same share of each")] = "model"


def counts(sizes: Sequence[int], cfg: Budget) -> list[int]:
    """How many entries of tensors of these sizes the budget allows: for each, or in all (one number) where it is the model's."""
    total = sum(sizes)
    whole = cfg.count or max(1, round(cfg.density * total))
    if whole > total:
        raise UsageError(f"count = {whole:,}, but the targets have {total:,} entries", hint="a smaller count, or more targets")
    if cfg.across == "model":
        return [whole]
    ends = [whole * end // total for end in np.cumsum(sizes).tolist()]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def largest(scores: Sequence[torch.Tensor], cfg: Budget) -> list[Positions]:
    """The positions with the largest magnitudes, within the budget."""
    return _within(top, scores, cfg)


def smallest(scores: Sequence[torch.Tensor], cfg: Budget) -> list[Positions]:
    """The positions with the smallest magnitudes, within the budget."""

    def bottom(scores: Sequence[torch.Tensor], k: int) -> list[Positions]:
        rest = top(scores, sum(score.numel() for score in scores) - k)
        return [np.setdiff1d(np.arange(score.numel()), out, assume_unique=True) for score, out in zip(scores, rest, strict=True)]

    return _within(bottom, scores, cfg)


def _within(pick: Callable[[Sequence[torch.Tensor], int], list[Positions]], scores: Sequence[torch.Tensor], cfg: Budget) -> list[Positions]:
    allowed = counts([score.numel() for score in scores], cfg)
    if cfg.across == "model":
        return pick(scores, allowed[0])
    return [pick([score], k)[0] for score, k in zip(scores, allowed, strict=True)]


def top(scores: Sequence[torch.Tensor], k: int) -> list[Positions]:
    """The k entries of the largest magnitude among all of `scores`: the positions in each, sorted. The first of equals are taken."""
    flat = [score.detach().reshape(-1).float().cpu().numpy() for score in scores]
    if not k:
        return [np.zeros(0, np.int64) for _ in flat]
    least = kth_largest_magnitude(lambda: flat, k)
    left, found = k - least.above, []
    for score in flat:
        size = np.abs(score)
        equal = np.flatnonzero(size == least.value)[:left]
        left -= equal.size
        found.append(np.union1d(np.flatnonzero(size > least.value), equal).astype(np.int64))
    return found


# --- scores


def chances(parts: Sequence[Part], gen: Generator) -> list[torch.Tensor]:
    """Random scores: the largest are a draw without replacement."""
    return [torch.from_numpy(gen.uniform(part.shape, 1.0)) + 1 for part in parts]


def movements(job: Job, parts: Sequence[Part], steps: int) -> list[torch.Tensor]:
    """w1 - w0 of each part after a trial of `steps` steps (0: as many as the run has) in which all of its entries are trained."""
    if job.trial is None:
        raise UsageError("nothing can be tried out without an objective")
    with opened(job, parts) as values:
        before = [stored(job, part, values).detach().cpu().clone() for part in parts]
        job.trial(values, steps)
        return [stored(job, part, values).detach().cpu() - start for part, start in zip(parts, before, strict=True)]


def sensitivities(job: Job, parts: Sequence[Part], number: int) -> list[torch.Tensor]:
    """The sum over `number` batches of the squared gradient of each part's entries: how much the loss falls by training it, to first order."""
    sums = [torch.zeros(part.shape) for part in parts]
    for grads in gradients(job, parts, number):
        for total, grad in zip(sums, grads, strict=True):
            total.addcmul_(grad, grad)
    return sums


def gradients(job: Job, parts: Sequence[Part], number: int) -> Iterator[list[torch.Tensor]]:
    """The gradient of the mean loss with respect to each part, float32 on the CPU, for each of the first `number` batches (fewer if the data has fewer)."""
    if job.goal is None:
        raise UsageError("there are no gradients without an objective")
    with opened(job, parts) as values:
        for batch in drawn(job, number):
            job.goal.loss(job.model, batch).backward()  # type: ignore[no-untyped-call]
            yield [stored(job, part, {name: _grad(value) for name, value in values.items()}).cpu() for part in parts]
            for value in values.values():
                value.grad = None


def drawn(job: Job, number: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first `number` batches that a run with the space's seed would see, cut into what passes through the model at once."""
    assert job.goal is not None
    examples, seed = job.goal.examples, job.gen.seed
    plan = batches([len(example["input_ids"]) for example in examples], job.loop.batch_size, seed, 0, bucket=job.loop.bucket)
    device = next(job.model.parameters()).device
    for chosen in plan[:number]:
        size = job.loop.micro_batch_size or len(chosen)
        for start in range(0, len(chosen), size):
            mine = chosen[start : start + size]
            batch = job.goal.collate([examples[k] for k in mine], [xp.key(seed, k) for k in mine])
            yield {name: value.to(device) for name, value in batch.items()}


def _grad(value: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad


@contextmanager
def opened(job: Job, parts: Sequence[Part]) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the model is float32, has the head's starting values, and what lies behind the parts and the head takes gradients.

    Gives those parameters by name. Afterwards all weights are what they were, bit for bit.
    """
    require_numbers(job.model)
    live = job.model.state_dict(keep_vars=True)
    names = dict.fromkeys(place.name for target in [*(part.target for part in parts), *job.head] for place in job.names.live(target))
    chosen = {name: live[name] for name in names}
    weights = [(parameter, parameter.data) for parameter in job.model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in job.model.buffers()]
    try:
        for parameter, data in weights:
            parameter.data = data.to(torch.float32, copy=True) if data.is_floating_point() else data
        job.fill()
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        yield chosen
    finally:
        for parameter in chosen.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter, data in weights:
            parameter.data = data
        for buffer, values in buffers:
            buffer.copy_(values)


def stored(job: Job, part: Part, live: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A part of the checkpoint, put together from values by their live names."""
    places = job.names.live(part.target)
    if len(places) == 1 and places[0].at is None and places[0].part is None:
        whole = live[places[0].name]
    else:
        whole = live[places[0].name].new_empty(tuple(job.base.tensor(part.target).shape))
        for place in places:
            value = live[place.name].detach()
            (place.part.get(whole) if place.part else whole).copy_(place.at.get(value) if place.at else value)
    view: torch.Tensor = part.at.get(whole) if part.at else whole
    return view


# --- what an optimizer knows of entries


def carry(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, source: torch.Tensor) -> None:
    """Entry k of the parameter's moments becomes what entry source[k] was, or zero where source[k] is -1.

    Moments are all tensors of the parameter's shape in its state. Optimizers whose state has other shapes keep that as it is.
    """
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            state[name] = moved(value, source)


def moved(value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Entry k is entry source[k] of `value`, or zero where source[k] is -1. `source` has the shape of the result."""
    return torch.where(source >= 0, value.detach().reshape(-1)[source.clamp(min=0)], 0)
