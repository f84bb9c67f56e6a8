"""adapter: a bottleneck after a module, y' = y + scale * (up act(down h + down_bias) + up_bias), h = y (or x if parallel).

Houlsby et al. 2019, arXiv 1902.00751 (serial: the bottleneck reads the module's output); with `parallel` it reads the
module's input beside it (He et al. 2022, arXiv 2110.04366). Its target is `@module/PATH`; it cannot be folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .op import Config, Generator, Info, Op, Shape, Tensors, expect

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")


class Adapter(Op):
    """down (r x d_in) and up (d_out x r), as the weights of two Linears; down_bias (r) and up_bias (d_out) if they are there.

    d_out is the width of the module's output; d_in is the same, or the width of its input with `parallel`.
    """

    kind = "adapter"
    fields = ("down", "up")
    optional = ("down_bias", "up_bias")
    defaults = {"scale": 1.0, "act": "relu", "parallel": False}
    on = "module"

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        if cfg["act"] not in ACTIVATIONS:
            raise ValueError(f"config 'act' must be one of {', '.join(ACTIVATIONS)}, got {cfg['act']!r}")
        rank, width = expect(t, "down", [None, None])
        out = expect(t, "up", [None if cfg["parallel"] else width, rank])[0]
        if "down_bias" in t:
            expect(t, "down_bias", [rank])
        if "up_bias" in t:
            expect(t, "up_bias", [out])

    def init(self, shape: Shape, gen: Generator, *, rank: int = 8) -> dict[str, Any]:
        """`shape` is (width,), or (output width, input width) with `parallel`. down is normal with standard deviation
        1/sqrt(d_in), the rest zero: the identity."""
        import numpy as np

        out, width = shape[0], shape[-1]
        return {
            "down": gen.normal((rank, width), width**-0.5),
            "up": np.zeros((out, rank), np.float32),
            "down_bias": np.zeros(rank, np.float32),
            "up_bias": np.zeros(out, np.float32),
        }

    def forward(self, m: Any, x: Any, y: Any, t: Tensors, cfg: Config, ctx: Any) -> Any:
        from torch.nn import functional as F

        h = F.linear(x if cfg["parallel"] else y, t["down"], t.get("down_bias"))
        return y + cfg["scale"] * F.linear(getattr(F, cfg["act"])(h), t["up"], t.get("up_bias"))


OP = Adapter()
