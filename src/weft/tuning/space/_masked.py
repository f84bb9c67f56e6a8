"""What spaces have in common that train some entries of each tensor: a `sparse` op whose values are trained, at positions found first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from ...delta import Builder, Delta
from ...engine.loop import Run
from ...ops import OpEntry
from ...stored import hold
from .._positions import Budget, Positions
from . import Job, Part, Space


class Fixed(Space):
    """A space in which `assign` ops on the base's own tensors are not trained: they say what a weight is, not how it may change."""

    def tensors(self) -> dict[str, nn.Parameter]:
        fixed = {key for key, _ in self._fixed()}
        return {key: value for key, value in super().tensors().items() if key not in fixed}

    def start(self, run: Run) -> None:
        for _, value in self._fixed():
            value.requires_grad_(False)

    def _fixed(self) -> Iterator[tuple[str, torch.Tensor]]:
        delta, handle = self.job.attached
        tensors = handle.tensors()
        for entry in delta.entries.values():
            for op in entry.ops if entry.change is None else ():
                if op.op == "assign":
                    yield op.t["values"].key, tensors[op.t["values"].key]


class Masked(Fixed):
    """w'.flat[index] = w.flat[index] + values. Gradients and moments exist for `values` only.

    The positions are part of the state, so that a run that goes on does not look for them again.
    """

    lr = 1e-3
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "conv", "embedding", "norm", "bias", "parameter")

    def __init__(self, cfg: Budget, job: Job) -> None:
        super().__init__(cfg, job)
        self.budget = cfg
        self.parts: list[Part] = []
        self.positions: list[Positions] = []

    def choose(self, parts: Sequence[Part]) -> list[Positions]:
        """The positions that are trained, for each part."""
        raise NotImplementedError

    def build(self, build: Builder) -> None:
        self.parts = self.job.parts(self.budget.targets, self.budget.exclude, kinds=self.kinds)
        known = [self.job.earlier.get(f"index/{number}") for number in range(len(self.parts))]
        found = [index.numpy() for index in known if index is not None]
        self.positions = found if len(found) == len(self.parts) else self.choose(self.parts)
        for part, index in zip(self.parts, self.positions, strict=True):
            self.put(build, part, index)

    def put(self, build: Builder, part: Part, index: Positions) -> None:
        """Write the ops of one part."""
        if index.size:
            part.put(build, "sparse", {"index": index, "values": np.zeros(index.size, np.float32)})

    def state(self) -> dict[str, torch.Tensor]:
        return {f"index/{number}": torch.from_numpy(index) for number, index in enumerate(self.positions)}

    def trained(self) -> Iterator[tuple[int, OpEntry, nn.Parameter]]:
        """The number of each part with a sparse op, that op, and its values."""
        delta, handle = self.job.attached
        tensors = handle.tensors()
        for number, part in enumerate(self.parts):
            for op in delta.entries[part.target].ops if part.target in delta.entries else ():
                if op.op == "sparse" and op.at == part.at:
                    value = tensors[op.t["values"].key]
                    assert isinstance(value, nn.Parameter)
                    yield number, op, value

    def finish(self) -> Delta:
        delta = super().finish()
        now = {op.t["index"].key: hold(self.positions[number]) for number, op, _ in self.trained()}
        return replace(delta, tensors={**delta.tensors, **now})
