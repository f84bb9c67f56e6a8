"""pockengine: sparse backpropagation. A scheme says which tensors are trained, and nothing below the lowest of them is differentiated.

    w'[:, :c] = w[:, :c] + values        the targets' weights in the last layers; c: the first `channels` of the inputs
    b' = b + values                      the targets' biases in (more of) the last layers

Zhu et al. 2023, arXiv 2310.17752 (sparse updates: Lin et al. 2022, arXiv 2206.15472). The scheme for BERT there: the biases of the upper half
of the layers, the weights of attention and of the first MLP matrix in the upper third; these shares are the defaults. Only the
tensors of the scheme take gradients and have moments. Autograd builds no graph below the lowest of them, so that activations there
are freed as the forward pass goes, and the backward pass ends there.

Not followed: the compiler. Its engine prunes, fuses and orders a graph ahead of time; here PyTorch's own pruning does what concerns memory
and needless gradients. The paper finds schemes by trying each tensor alone and searching for the best set within a memory budget; here
the scheme is given. A part of the channels saves moments and bytes of the delta, not activations.

Size: 4 bytes for each entry of the scheme.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np

from ...delta import Builder
from ...errors import UsageError
from ...methods import method
from ...ops import At
from ...sites import sites
from . import Job, Part, Space


class PockEngineConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of sparse backpropagation."""

    targets: Annotated[tuple[str, ...], msgspec.Meta(description="roles or module names whose weights are trained in the upper layers")] = (
        "attention",
        "mlp.up",
    )
    exclude: Annotated[tuple[str, ...], msgspec.Meta(description="what to leave out of the targets")] = ()
    weights: Annotated[float, msgspec.Meta(description="share of the layers, from the top, whose weights are trained", ge=0, le=1)] = 0.333
    biases: Annotated[float, msgspec.Meta(description="share of the layers, from the top, whose biases are trained: all of them", ge=0, le=1)] = 0.5
    channels: Annotated[float, msgspec.Meta(description="share of each weight's inputs that is trained, the first ones", gt=0, le=1)] = 1.0


@method("space", config=PockEngineConfig, paper="Zhu et al., 2023, arXiv:2310.17752", formula="w' = w + values for the tensors of a scheme in the upper layers")
class PockEngine(Space):
    """Trains weights and biases of the upper layers, with no graph below the lowest of them."""

    lr = 1e-4

    def __init__(self, cfg: PockEngineConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def build(self, build: Builder) -> None:
        everything = sites(self.job.model, "all")
        depth = 1 + max((site.layer for site in everything if site.layer is not None), default=-1)
        if not depth:
            raise UsageError("a scheme speaks of the upper layers, but this model has no numbered layers", hint="method=full with targets")
        upper = {what: round(share * depth) or int(share > 0) for what, share in (("weights", self.cfg.weights), ("biases", self.cfg.biases))}
        if not any(upper.values()):
            raise UsageError("weights = 0 and biases = 0: nothing to train")
        if upper["weights"]:
            for part in self.job.parts([f"{token}@-{upper['weights']}-" for token in self.cfg.targets], self.cfg.exclude, kinds=("linear", "conv1d", "conv")):
                self._put(build, part)
        if upper["biases"] and any(site.kind == "bias" and site.layer is not None and site.layer >= depth - upper["biases"] for site in everything):
            for part in self.job.parts(f"@-{upper['biases']}-", self.cfg.exclude, kinds=("bias",)):
                part.put(build, "dense", {"values": np.zeros(part.shape, np.float32)})

    def _put(self, build: Builder, part: Part) -> None:
        """An increment of the first inputs of a weight."""
        axis = 0 if part.site.kind == "conv1d" else 1
        kept = max(1, round(self.cfg.channels * part.shape[axis]))
        if kept == part.shape[axis]:
            part.put(build, "dense", {"values": np.zeros(part.shape, np.float32)})
            return
        if part.at is not None:
            raise UsageError(f"{part.target} is stored together with others, so that no channels can be told apart", hint="channels=1")
        shape = (*part.shape[:axis], kept, *part.shape[axis + 1 :])
        at = At(index=(*((0, size) for size in part.shape[:axis]), (0, kept)))
        build.put(part.target, "dense", {"values": np.zeros(shape, np.float32)}, at=at)
