"""muon: torch's own Muon for the matrices of the layers, AdamW for all else.

    m <- mu m + (1 - mu) g,    p <- p - lr (0.2 sqrt(max(rows, columns)) O(g + mu (m - g)) + decay p)

O sets the singular values of its argument to about 1 (five Newton-Schulz iterations, in bfloat16), and the factor before it makes a step's root
mean square about that of AdamW's, so that learning rates and decays of AdamW fit (Liu et al. 2025, arXiv 2502.16982). Embeddings, heads,
vectors and tensors of more than two axes are AdamW's, as Muon's author has it; a model without layers has no embeddings or heads that can be told.
Not followed: the original's convolutions as flattened matrices (torch takes two axes only).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
import torch
from torch import nn

from ...errors import UsageError
from ...methods import method
from . import Rates, depth, groups


class MuonConfig(Rates, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of Muon."""

    momentum: Annotated[float, msgspec.Meta(description="decay of the gradient's mean, of matrices", ge=0, lt=1)] = 0.95
    nesterov: Annotated[bool, msgspec.Meta(description="step along the gradient and the new momentum")] = True
    beta1: Annotated[float, msgspec.Meta(description="decay of the gradient's mean, of all else", ge=0, lt=1)] = 0.9
    beta2: Annotated[float, msgspec.Meta(description="decay of the squared gradient's mean, of all else", ge=0, lt=1)] = 0.999
    weight_decay: Annotated[float, msgspec.Meta(description="decoupled decay a step, times the learning rate; vectors have none", ge=0)] = 0.01


@method(
    "optimizer",
    config=MuonConfig,
    paper="Jordan et al., 2024; Liu et al., 2025, arXiv:2502.16982",
    formula="p <- p - lr (0.2 sqrt(max(n, m)) U V^T + decay p), U S V^T the momentum",
)
def muon(tensors: Mapping[str, nn.Parameter], cfg: MuonConfig) -> torch.optim.Optimizer:
    """Momentum with all singular values set to one, for the matrices of the layers; AdamW for the rest."""
    kind: Any = getattr(torch.optim, "Muon", None)
    if kind is None:
        raise UsageError(f"torch {torch.__version__} has no Muon", hint="pip install 'torch>=2.9', or --optimizer adamw")
    numbered = any(depth(name) for name in tensors)
    matrix = {id(value): value.ndim == 2 and (depth(name) is not None or not numbered) for name, value in tensors.items()}
    made: list[torch.optim.Optimizer] = []
    for wanted in (True, False):
        parts = [{**group, "params": [p for p in group["params"] if matrix[id(p)] is wanted]} for group in groups(tensors, cfg, decay=cfg.weight_decay)]
        parts = [part for part in parts if part["params"]]
        if parts and wanted:
            made.append(kind(parts, momentum=cfg.momentum, nesterov=cfg.nesterov, adjust_lr_fn="match_rms_adamw"))
        elif parts:
            made.append(torch.optim.AdamW(parts, betas=(cfg.beta1, cfg.beta2)))
    return made[0] if len(made) == 1 else Joined(made)


class Joined(torch.optim.Optimizer):
    """Several optimizers over different tensors as one; its groups are theirs."""

    def __init__(self, made: list[torch.optim.Optimizer]) -> None:
        super().__init__([{**group} for each in made for group in each.param_groups], {})
        self._made = made
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for each in self._made for group in each.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self._made:
            each.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of all, in order."""
        return {"joined": [each.state_dict() for each in self._made]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for each, state in zip(self._made, state_dict["joined"], strict=True):
            each.load_state_dict(state)
        self._share()
