"""intrinsic-dimension: all weights move within one random subspace of few dimensions.

    theta' = theta + (scale / sqrt(m)) gain_l P z        z (m numbers, shared by all targets) zero: theta' = theta at the start

P is a random projection of normal numbers that a seed makes again (Fastfood: see the op `fastfood`), another for each tensor. With
`structured` each layer l has a trained factor gain_l, which starts at one and is shared by its tensors (what is in no layer has one
together): SAID, whose d counts z and the gains. Trained and stored are `d` numbers in all, whatever the model's size.

How small d can be while the result is as good as 90 % of full tuning's is the intrinsic dimension d90: tune with several d.

Not as in the paper's code: P has normal entries of variance one and not columns of length one, so that the same `scale` suits every model's
size: an entry changes by about `scale` where the coefficients are about one. Its transforms are as long as d needs and not as the model's
size does.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np

from ... import xp
from ...delta import Builder
from ...errors import UsageError
from ...methods import method
from ...ops import Ref
from ...stored import FLOATS
from . import Job, Space


class IntrinsicDimensionConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of tuning in a random subspace."""

    targets: Annotated[tuple[str, ...], msgspec.Meta(description="what to change: roles, module names, globs, all")] = ("all",)
    exclude: Annotated[tuple[str, ...], msgspec.Meta(description="what to leave out of the targets")] = ()
    d: Annotated[int, msgspec.Meta(description="trained numbers in all", ge=1)] = 200
    structured: Annotated[bool, msgspec.Meta(description="spend one of them on a factor for each layer (SAID)")] = True
    scale: Annotated[float, msgspec.Meta(description="change of an entry when the coefficients are one", gt=0)] = 0.01


@method(
    "space",
    config=IntrinsicDimensionConfig,
    paper="Aghajanyan, Zettlemoyer and Gupta, 2020, arXiv:2012.13255; Li et al., 2018, arXiv:1804.08838",
    formula="theta' = theta + s gain_l P z",
)
class IntrinsicDimension(Space):
    """Trains d coefficients of a seeded random projection onto all weights."""

    lr = 1e-2

    def __init__(self, cfg: IntrinsicDimensionConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def build(self, build: Builder) -> None:
        parts = [part for part in self.job.parts(self.cfg.targets, self.cfg.exclude) if self.job.base.tensor(part.target).dtype in FLOATS]
        layers = {part.target: f"{part.site.stack or 'layer'}.{'none' if part.site.layer is None else part.site.layer}" for part in parts}
        gains: dict[str, Ref] = {}
        if self.cfg.structured:
            gains = {layer: build.share(f"gain.{layer}", np.ones(1, np.float32)) for layer in dict.fromkeys(layers.values())}
        count = self.cfg.d - len(gains)
        if count < 1:
            raise UsageError(f"{self.cfg.d} numbers are not more than the {len(gains)} factors of layers", hint="a larger d, or structured=false")
        coef = build.share("coef", np.zeros(count, np.float32))
        seed = xp.named_key(self.job.gen.seed, "intrinsic") >> 12  # 52 bits: every reader of JSON has them
        for stream, part in enumerate(parts):
            gain = {"gain": gains[layers[part.target]]} if gains else {}
            part.put(build, "fastfood", {"coef": coef, **gain}, scale=self.cfg.scale / count**0.5, seed=seed, stream=stream)
