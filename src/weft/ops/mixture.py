"""mixture: several low-rank products beside a module, of which a router picks some for each token.

    g = W x,  p = the softmax of the top_k largest of g, zero for the others
    y' = y + scale * sum_e p_e B_e A_e x

Its target is `@module/PATH` of a linear module; it cannot be folded, as p depends on the input. With one expert it is `lowrank`.
MoLA (Gao et al. 2024, arXiv 2402.08562). While gradients are computed it adds a term to the losses that ops emit: how unevenly the
experts were used (`routing.balance`), padding left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import routing
from .op import Config, Generator, Info, Op, Shape, Tensors, expect


class Mixture(Op):
    """router (E x d_in), A (E x r x d_in) and B (E x d_out x r), for E experts of rank r."""

    kind = "mixture"
    fields = ("router", "A", "B")
    defaults = {"scale": 1.0, "top_k": 2}
    on = "module"
    drops = True

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        experts, rank, width = expect(t, "A", [None, None, None])
        expect(t, "router", [experts, width])
        expect(t, "B", [experts, None, rank])
        if experts < 1 or cfg["top_k"] < 1:
            raise ValueError(f"field A: there must be experts, and top_k at least 1; got the shape {list(t['A'].shape)} and top_k {cfg['top_k']}")

    def init(self, shape: Shape, gen: Generator, *, rank: int = 8, experts: int = 2) -> dict[str, Any]:
        """`shape` is (output width, input width). Router and A are uniform (bound 1/sqrt(d_in)), B is zero: the identity."""
        import numpy as np

        out, width = shape[0], shape[-1]
        return {
            "router": gen.uniform((experts, width), width**-0.5),
            "A": gen.uniform((experts, rank, width), width**-0.5),
            "B": np.zeros((experts, out, rank), np.float32),
        }

    def forward(self, m: Any, x: Any, y: Any, t: Tensors, cfg: Config, ctx: Any) -> Any:
        import torch
        from torch.nn import functional as F

        experts, rank, width = t["A"].shape
        logits = F.linear(x, t["router"])
        weights = routing.top(logits, cfg["top_k"])
        if torch.is_grad_enabled():
            mask = ctx.mask  # positions of the input only: not a mask over a cache, nor one of attention between positions
            counted = mask if mask is not None and tuple(mask.shape) == tuple(x.shape[:-1]) else None
            ctx.losses.append(routing.balance(logits, weights, counted))
        down = F.linear(ctx.drop(x), t["A"].reshape(experts * rank, width)).reshape(*x.shape[:-1], experts, rank)
        mixed = (down * weights.to(down).unsqueeze(-1)).flatten(-2)
        return y + cfg["scale"] * F.linear(mixed, t["B"].transpose(0, 1).flatten(1))


OP = Mixture()
