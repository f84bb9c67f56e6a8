"""mobiletl: the upper layers, and below them only what needs no activations.

    w' = w + values        all tensors of the last `layers` layers
    b' = b + values        the shifts (biases) of the norms in the layers below, from `lowest` on

A shift's gradient is the gradient of the output, so that a norm's input need not be kept for it. What has to be kept is what an activation
function's derivative depends on; that is replaced, while training, by a sign: dx = dy where x > 0, else 0 (where 0 < x < 6 for ReLU6, which
is exact), one bit an entry. `signed` says which: "hard" Hard-Swish and ReLU6, as in the paper; "all" SiLU and GELU as well; "none".
The forward pass is exact. Chiang et al. 2022, arXiv 2212.02246.

Not followed: the paper's blocks are MobileNet's inverted residual blocks, whose batch norms stand in for what LayerNorm is here. Models
without shifts (RMSNorm) train their upper layers only.

Size: 4 bytes for each entry of the upper layers and each shift.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ...delta import Builder
from ...engine.loop import Run
from ...errors import UsageError
from ...methods import method
from ...sites import sites
from . import Job, Space

SMOOTH = ("GELU", "GELUActivation", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "GELUTanh", "SiLU", "SiLUActivation")


class MobileTLConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of MobileTL."""

    layers: Annotated[int, msgspec.Meta(description="how many of the last layers are trained whole", ge=0)] = 1
    lowest: Annotated[int, msgspec.Meta(description="the lowest layer whose shifts are trained, from 0", ge=0)] = 0
    signed: Annotated[Literal["hard", "all", "none"], msgspec.Meta(description="activations whose derivative is a sign while training")] = "hard"


@method(
    "space", config=MobileTLConfig, paper="Chiang et al., 2022, arXiv:2212.02246", formula="w' = w + values in the last layers, b' = b + values for norms below"
)
class MobileTL(Space):
    """Trains the last layers and the shifts of norms below them, with one bit kept for each activation."""

    lr = 1e-3

    def __init__(self, cfg: MobileTLConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg
        self._changed: list[nn.Module] = []

    def build(self, build: Builder) -> None:
        everything = sites(self.job.model, "all")
        depth = 1 + max((site.layer for site in everything if site.layer is not None), default=-1)
        if self.cfg.layers > depth:
            raise UsageError(f"layers = {self.cfg.layers}, but the model has {depth} numbered layers")
        lower = depth - self.cfg.layers
        shifts = [s for s in everything if s.kind == "bias" and s.role.startswith("norm") and s.layer is not None and self.cfg.lowest <= s.layer < lower]
        if not shifts and not self.cfg.layers:
            raise UsageError("there is no norm with a shift in the chosen layers, and layers = 0", hint="layers=1")
        parts = self.job.parts(f"@-{self.cfg.layers}-") if self.cfg.layers else []
        for part in [*parts, *(self.job.parts([site.name for site in shifts]) if shifts else [])]:
            part.put(build, "dense", {"values": np.zeros(part.shape, np.float32)})

    def start(self, run: Run) -> None:
        for module in self.job.model.modules():
            hard = isinstance(module, nn.Hardswish | nn.ReLU6)
            if (hard and self.cfg.signed != "none") or (type(module).__name__ in SMOOTH and self.cfg.signed == "all"):
                module.forward = _Signs(module)
                self._changed.append(module)

    def close(self, run: Run) -> None:
        for module in self._changed:
            del module.__dict__["forward"]
        self._changed = []


class _Signs:
    """The forward of an activation module whose derivative is a sign while it trains."""

    def __init__(self, module: nn.Module) -> None:
        self.exact: Callable[[torch.Tensor], torch.Tensor] = module.forward
        self.module, self.top = module, 6.0 if type(module) is nn.ReLU6 else float("inf")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.module.training and torch.is_grad_enabled() and x.requires_grad):
            return self.exact(x)
        out: torch.Tensor = signed(x, self.exact, self.top)
        return out


def signed(x: torch.Tensor, exact: Callable[[torch.Tensor], torch.Tensor], top: float = float("inf")) -> Any:
    """exact(x), with the derivative 1 where 0 < x < top and 0 elsewhere. One bit an entry is kept."""
    return _Signed.apply(x, exact, top)  # type: ignore[no-untyped-call]


class _Signed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, exact: Callable[[torch.Tensor], torch.Tensor], top: float) -> torch.Tensor:
        ctx.save_for_backward(packed((x > 0) & (x < top)))
        ctx.shape = x.shape
        return exact(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (bits,) = ctx.saved_tensors
        return grads[0] * unpacked(bits, ctx.shape), None, None


def packed(mask: torch.Tensor) -> torch.Tensor:
    """A mask as bytes, eight entries each."""
    flat = F.pad(mask.reshape(-1), (0, -mask.numel() % 8)).reshape(-1, 8)
    return (flat.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpacked(bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The mask that `packed` made bytes of."""
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flat.reshape(-1)[: shape.numel()].reshape(shape).bool()
