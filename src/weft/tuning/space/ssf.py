"""ssf: every output of every layer is scaled and shifted.

    y' = gamma y + beta        which is        W' = gamma W,  b' = gamma b + beta

with one gamma and one beta for each output channel of every linear layer and convolution, and each channel of every norm. gamma is one
and beta zero at the start. Both fold into the layer's own weight and bias (the op `scale_shift`), so that the tuned model costs
what the base costs. Lian et al. 2022, arXiv 2210.08823.

Not followed: the code draws gamma and beta with a standard deviation of 0.02 around one and zero; `std` does, and then the start is
not the base. A layer without a bias cannot take beta in, so it has gamma alone (all of Llama); where the bias has another layout in
the checkpoint than the weight (stacked experts) gamma does not reach it, and it gets a beta of its own.

Size: 8 bytes for each output channel with a bias, 4 without. gamma is stored once for a weight and its bias.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np

from ...delta import Builder
from ...methods import method
from . import Job, Part, Space


class SSFConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of SSF."""

    targets: Annotated[tuple[str, ...], msgspec.Meta(description="whose outputs: roles, module names, globs, all-linear")] = ("all-linear", "norm")
    exclude: Annotated[tuple[str, ...], msgspec.Meta(description="what to leave out of the targets")] = ()
    std: Annotated[float, msgspec.Meta(description="gamma and beta start so far from one and zero (the paper's code: 0.02)", ge=0)] = 0.0


@method("space", config=SSFConfig, paper="Lian et al., 2022, arXiv:2210.08823", formula="W' = gamma W, b' = gamma b + beta")
class SSF(Space):
    """Scales and shifts the outputs of layers, folded into their own weights and biases."""

    lr = 1e-2

    def __init__(self, cfg: SSFConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def build(self, build: Builder) -> None:
        weights = self.job.parts(self.cfg.targets, self.cfg.exclude, kinds=("linear", "conv1d", "conv", "norm", "parameter"))
        for part in weights:
            axis = 1 if part.site.kind == "conv1d" else 0
            scale = build.share(f"{part.target}.{len(part.at.index) and part.at.index[0]}" if part.at else part.target, self._near(1.0, part.shape[axis]))
            part.put(build, "scale_shift", {"scale": scale}, axis=axis)
            bias = self._bias(part, axis)
            if bias is not None:
                bias.put(build, "scale_shift", {"scale": scale, "shift": self._near(0.0, part.shape[axis])})

    def _bias(self, part: Part, axis: int) -> Part | None:
        """The bias that lies beside a weight in the checkpoint."""
        name = part.target.removesuffix("weight") + "bias"
        known = part.target.endswith("weight") and part.at is None and name in self.job.base.tensors
        shape = tuple(self.job.base.tensor(name).shape) if known else ()
        return Part(name, shape, None, part.site) if shape == (part.shape[axis],) else None

    def _near(self, value: float, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        start = np.full(size, value, np.float32)
        return start + self.job.gen.normal((size,), self.cfg.std) if self.cfg.std else start
