"""mkor-h: MKOR until it no longer pays, then plain momentum.

Of Mozaffari et al. 2023, arXiv 2306.01685: second-order steps help most at the beginning, so a run goes on with first-order ones once the loss
falls too slowly. Every `window` steps the mean loss of these is held against that of the window before; when it has fallen by less than the share
`least`, the factors and the memory they take are given up for good. Preconditioned gradients had the length of plain ones, so the learning rate stays.

The paper says that the switch follows the rate at which the loss falls, and the authors' code has no hybrid; window and share are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
import torch
from torch import nn

from ...engine.loop import Run
from ...methods import method
from . import groups
from .mkor import MKOR, MKORConfig


class MKORHConfig(MKORConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of MKOR-H."""

    window: Annotated[int, msgspec.Meta(description="steps whose mean loss is held against that of as many before", ge=1)] = 50
    least: Annotated[float, msgspec.Meta(description="share by which it must have fallen for MKOR to go on", lt=1)] = 0.02


@method(
    "optimizer",
    config=MKORHConfig,
    paper="Mozaffari et al., 2023, arXiv:2306.01685",
    formula="mkor while mean loss of the last steps < (1 - least) that of those before, then m <- mu m + g; p <- p - lr m",
)
def mkor_h(tensors: Mapping[str, nn.Parameter], cfg: MKORHConfig) -> torch.optim.Optimizer:
    """MKOR that falls back to momentum when the loss falls too slowly."""
    return MKORH(groups(tensors, cfg, decay=cfg.weight_decay), cfg)


class MKORH(MKOR):
    """See the head of this file. The watch over the loss is kept in the first parameter group."""

    cfg: MKORHConfig

    def start(self, run: Run) -> None:
        super().start(run)
        self.param_groups[0].setdefault("watch", {"sum": 0.0, "count": 0, "before": None, "plain": False})
        if self.plain:
            self._layers = []

    @property
    def plain(self) -> bool:
        """Whether the run has fallen back."""
        return bool(self.param_groups[0]["watch"]["plain"])

    def after_step(self, run: Run) -> None:
        watch = self.param_groups[0]["watch"]
        if watch["plain"]:
            return
        watch |= {"sum": watch["sum"] + run.loss, "count": watch["count"] + 1}
        if watch["count"] < self.cfg.window:
            return
        mean = watch["sum"] / watch["count"]
        before = watch["before"]
        watch |= {"sum": 0.0, "count": 0, "before": mean}
        if before is not None and mean > before - self.cfg.least * abs(before):
            watch["plain"] = True
            for _, layers in self._layers:
                for layer in layers:
                    for side in ("left", "right"):
                        self.state[layer.weight].pop(side, None)
            self._layers = []
