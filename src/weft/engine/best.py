"""The best of a run: the delta is kept as it was at the best evaluation, and a run that gets no better ends early."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .. import xp
from ..delta import Delta
from ..errors import UsageError, WeftError, near
from ..stored import hold
from .loop import Hooks, Run

_LESS = ("loss", "nll", "perplexity", "error")
_MORE = ("accuracy", "exact", "f1", "match")
"""How the names of figures end of which less, or more, is better."""


def direction(figure: str) -> tuple[str, int]:
    """A figure's name without a sign in front, and 1 if more of it is better, -1 if less is. UsageError if nobody knows."""
    name = figure.lstrip("+-")
    if figure != name:
        return name, 1 if figure[0] == "+" else -1
    for endings, sign in ((_LESS, -1), (_MORE, 1)):
        if name.endswith(endings):
            return name, sign
    raise UsageError(f"best={figure}: is more of it better, or less?", hint=f"-p best=+{figure} (more) or -p best=-{figure} (less)")


class Best(Hooks):
    """Keeps what `take` gives at the best evaluation so far; the first of equal ones.

    figure:   what decides, see `direction`
    patience: evaluations in a row without a better one after which the run ends; 0: it never does
    take:     makes the delta of this moment; where it cannot (WeftError: nothing has changed yet), the evaluation does not count as best

    Of several processes the first one's figures decide. All of it is in the state of a run, so that a resumed one ends the same.
    """

    def __init__(self, figure: str, patience: int, take: Callable[[], Delta]) -> None:
        self.name, self._sign = direction(figure)
        self.patience, self._take = patience, take
        self.delta: Delta | None = None
        self.value, self.step, self.waited = math.nan, 0, 0

    def start(self, run: Run) -> None:
        self._rest(run)

    def evaluated(self, run: Run, figures: Mapping[str, float]) -> None:
        if self.name not in figures:
            raise UsageError(f"best={self.name}: the evaluation gives no such figure{near(self.name, figures, 'it gives')}")
        value = run.said(float(figures[self.name]))
        self.waited += 1
        if value == value and (self.delta is None or self._sign * value > self._sign * self.value):
            try:
                taken = self._take()
            except WeftError:
                return
            self.delta = replace(taken, tensors={key: hold(np.array(tensor.read())) for key, tensor in taken.tensors.items()})
            self.value, self.step, self.waited = value, run.step, 0
        self._rest(run)

    def _rest(self, run: Run) -> None:
        if self.patience and self.waited >= self.patience:
            run.stopped = f"{self.name} has not been better for {self.waited} evaluations"

    def state(self) -> dict[str, torch.Tensor]:
        found = {"about": torch.tensor([self.value, self.step, self.waited], dtype=torch.float64)}
        if self.delta is not None:
            with tempfile.TemporaryDirectory() as folder:
                self.delta.save(path := Path(folder) / "best.safetensors")
                found["delta"] = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        return found

    def load(self, state: dict[str, torch.Tensor]) -> None:
        value, step, waited = state["about"].tolist()
        self.value, self.step, self.waited = value, int(step), int(waited)
        if "delta" in state:
            with tempfile.TemporaryDirectory() as folder:
                (path := Path(folder) / "best.safetensors").write_bytes(xp.to_numpy(state["delta"]).tobytes())
                read = Delta.load(path)
                self.delta = replace(read, tensors={key: hold(tensor.read()) for key, tensor in read.tensors.items()}, path=None)
