"""Statistics of activations over streams: mean and variance, second moments. In float64, and mergeable.

Two collectors that saw different rows merge into one that saw all of them, so the same sums serve turns that follow each other,
runs that are continued and clients that send theirs. How rows are cut into pieces does not matter, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InputError, UsageError
from .capture import capture
from .data import opened, pad_id, padded
from .solve import double

if TYPE_CHECKING:
    import numpy as np

    State = Mapping[str, np.ndarray[Any, Any]]
    Rows = torch.Tensor | np.ndarray


class Moments:
    """Running mean and variance of each of `size` columns, kept on the CPU.

    Pieces are merged by the formula of Chan, Golub and LeVeque (1979): with d the difference of means, the squares about the mean are
    M2 = M2_a + M2_b + d^2 n_a n_b / (n_a + n_b). UltraEdit's code adds m * var of m rows for M2_b, with an unbiased var; right is (m - 1) * var,
    which is what this has.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self._squares = torch.zeros(size, dtype=torch.float64)

    def add(self, rows: Rows) -> None:
        """Take in rows (m x size), torch or numpy; none is allowed. InputError for another width or entries that are not finite."""
        wide = _checked(rows, self.size)
        if len(wide):
            mean = wide.mean(0)
            self._take(len(wide), mean.cpu(), (wide - mean).square().sum(0).cpu())

    def merge(self, other: Moments) -> None:
        """Take in all that another has seen. InputError for another size."""
        _same_size(self.size, other.size)
        if other.count:
            self._take(other.count, other.mean, other._squares)

    def _take(self, count: int, mean: torch.Tensor, squares: torch.Tensor) -> None:
        total = self.count + count
        gap = mean - self.mean
        self.mean = self.mean + gap * (count / total)
        self._squares = self._squares + squares + gap.square() * (self.count * count / total)
        self.count = total

    @property
    def variance(self) -> torch.Tensor:
        """The unbiased variance of each column; InputError before there are two rows."""
        if self.count < 2:
            raise InputError(f"the variance of {self.count} row{'' if self.count == 1 else 's'} is not defined; it takes two", hint="give more rows at a time")
        return self._squares / (self.count - 1)

    @property
    def std(self) -> torch.Tensor:
        """The square root of `variance`."""
        return self.variance.sqrt()

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """All of it as arrays: `count` (a scalar), `mean` and `squares`."""
        return _arrays(count=torch.tensor(self.count), mean=self.mean, squares=self._squares)

    @classmethod
    def from_state(cls, state: State) -> Moments:
        """What `state` was taken from. InputError if it is no such state."""
        parts = _parts(state, ("count", "mean", "squares"))
        size = parts["mean"].numel()
        if parts["mean"].shape != (size,) or parts["squares"].shape != (size,):
            raise InputError(f"not the state of moments: the mean is {list(parts['mean'].shape)}, the squares {list(parts['squares'].shape)}")
        made = cls(size)
        made.count, made.mean, made._squares = int(parts["count"]), parts["mean"], parts["squares"]
        return made


class SecondMoment:
    """Running E[k k^T] of rows k, not centred (size x size), kept where its first rows are."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._sum = torch.zeros(size, size, dtype=torch.float64)

    def add(self, rows: Rows) -> None:
        """Take in rows (m x size), torch or numpy; none is allowed. InputError for another width or entries that are not finite."""
        wide = _checked(rows, self.size)
        self._take(len(wide), wide.T @ wide)

    def merge(self, other: SecondMoment) -> None:
        """Take in all that another has seen. InputError for another size."""
        _same_size(self.size, other.size)
        self._take(other.count, other._sum)

    def _take(self, count: int, total: torch.Tensor) -> None:
        if self.count:
            self._sum += total.to(self._sum.device)  # in place: of a wide matrix's inputs it is gigabytes
        else:
            self._sum = total.clone()
        self.count += count

    @property
    def matrix(self) -> torch.Tensor:
        """E[k k^T], float64; InputError before there is a row."""
        if not self.count:
            raise InputError("the second moment of no rows is not defined")
        return self._sum / self.count

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """All of it as arrays: `count` (a scalar) and `sum`."""
        return _arrays(count=torch.tensor(self.count), sum=self._sum)

    @classmethod
    def from_state(cls, state: State) -> SecondMoment:
        """What `state` was taken from. InputError if it is no such state."""
        parts = _parts(state, ("count", "sum"))
        total = parts["sum"]
        if total.ndim != 2 or total.shape[0] != total.shape[1]:
            raise InputError(f"not the state of a second moment: the sum is {list(total.shape)}, expected a square matrix")
        made = cls(total.shape[0])
        made.count, made._sum = int(parts["count"]), total
        return made


def second_moments(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    modules: Mapping[str, nn.Module],
    *,
    max_length: int = 512,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    limit_tokens: int | None = None,
) -> dict[str, SecondMoment]:
    """E[k k^T] of what each of `modules` is given, over all tokens of the texts; one forward a batch, no further up than the last of them.

    texts:        read as they come and cut to max_length tokens, with what the tokenizer puts in front; padding does not count
    limit_tokens: stop after exactly so many tokens; default: all
    device:       where the model is; default: where its first parameter is

    Put the model into eval mode first: dropout would count. InputError if there is no token, and the errors of `capture`.
    """
    if min(max_length, batch_size) < 1 or (limit_tokens is not None and limit_tokens < 1):
        raise UsageError(f"max_length, batch_size and limit_tokens must be 1 at least, got {max_length}, {batch_size} and {limit_tokens}")
    where = next(model.parameters()).device if device is None else torch.device(device)
    pad = pad_id(tokenizer)

    def batches() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        seen = 0
        for examples in _in_batches(({"input_ids": ids[:max_length], "labels": 0} for ids in (opened(tokenizer, text) for text in texts) if ids), batch_size):
            made = padded(examples, pad)
            rows = made["attention_mask"].bool()
            if limit_tokens is not None:
                rows &= rows.flatten().cumsum(0).reshape(rows.shape) <= limit_tokens - seen
            yield {name: made[name].to(where) for name in ("input_ids", "attention_mask")}, rows
            seen += int(rows.sum())
            if seen == limit_tokens:
                break

    return gathered(model, batches(), modules)


def gathered(model: nn.Module, batches: Iterable[tuple[Mapping[str, torch.Tensor], torch.Tensor]], modules: Mapping[str, nn.Module]) -> dict[str, SecondMoment]:
    """`second_moments` of batches: the model's inputs, and which of their tokens count (B x L booleans). Errors as there."""
    out: dict[str, SecondMoment] = {}
    for inputs, rows in batches:
        for name, captured in capture(model, inputs, modules, rows, whole=not out).items():
            out.setdefault(name, SecondMoment(captured.inputs.shape[1])).add(captured.inputs)
    if not out:
        raise InputError("no token in the texts to take statistics from")
    return out


def _in_batches(examples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    several = iter(examples)
    while some := list(islice(several, size)):
        yield some


def _checked(rows: Rows, size: int) -> torch.Tensor:
    wide = double(rows)
    if wide.ndim != 2 or wide.shape[1] != size:
        raise InputError(f"expected rows of {size} entries, got the shape {list(wide.shape)}")
    if not bool(wide.isfinite().all()):
        raise InputError("entries that are not finite among the rows of a statistic", hint="run the model in float32 or bfloat16 instead of float16")
    return wide


def _same_size(one: int, other: int) -> None:
    if one != other:
        raise InputError(f"statistics of {one} and of {other} columns do not merge")


def _arrays(**parts: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
    return {name: part.cpu().numpy().copy() for name, part in parts.items()}


def _parts(state: State, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    if set(state) != set(names):
        raise InputError(f"not a state of these statistics: expected {', '.join(names)}, got {', '.join(sorted(state)) or 'nothing'}")
    return {name: double(state[name]).clone() for name in names}
