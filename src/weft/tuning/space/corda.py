"""corda: low-rank adaptation of the part of each matrix that some context uses least, or most.

    W C = U diag(s) V^T with C = E[x x^T] of the module's inputs x;  w' = w + (alpha / rank) (B A - B0 A0),  B0 A0 = U_r diag(s_r) V_r^T C^-1 / (alpha / rank)

knowledge    U_r diag(s_r) V_r^T are the `rank` smallest components: what is trained is what matters least to the context, so that what the model
             knows of it is kept (knowledge-preserved mode; in HF PEFT "kpm")
instruction  the largest ones: what is trained is what the context uses most (instruction-previewed; "ipm")

A = A0 and B = B0 at the start: w' = w, bit for bit, and the base stays what it is. A and B have the same norm. The context is `samples`
rows of the training data, or of a file of texts: for `knowledge` texts that ask for what is to be kept. C gets `damp` times the mean of its
diagonal on its diagonal, so that it has an inverse; HF PEFT doubles that until the inverse is good, here it is solved in float64. Of all
rank-r parts of W, the smallest components are those with the least ||dW C||. Targets are the weights of linear modules (Conv1D included).
Trained are rank (rows + columns) numbers for each matrix, the file has twice that.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import torch
from torch import nn

from ...delta import Builder
from ...engine.statistics import gathered, second_moments
from ...errors import InputError, UsageError
from ...methods import method
from . import Job, Part, Space
from ._matrices import MatricesConfig


class CorDAConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of CorDA."""

    rank: Annotated[int, msgspec.Meta(description="components that are trained", ge=1)] = 8
    alpha: Annotated[float, msgspec.Meta(description="the product is scaled by alpha / rank", gt=0)] = 8.0
    mode: Annotated[Literal["knowledge", "instruction"], msgspec.Meta(description="train what the context uses least, or most")] = "knowledge"
    context: Annotated[str, msgspec.Meta(description="a file whose rows have a `text`; empty: the training data")] = ""
    samples: Annotated[int, msgspec.Meta(description="rows of the context", ge=1)] = 256
    damp: Annotated[float, msgspec.Meta(description="added to the diagonal of C, over its mean", gt=0)] = 0.01


@method("space", config=CorDAConfig, paper="Yang et al., 2024, arXiv:2406.05223", formula="w' = w + (alpha / rank) (B A - B0 A0), B0 A0 of W C C^-1")
class CorDA(Space):
    """Low-rank adaptation that starts from components of each matrix as a context sees it."""

    def __init__(self, cfg: CorDAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self.cfg = cfg

    def build(self, build: Builder) -> None:
        parts = self.job.parts(self.cfg.targets, self.cfg.exclude, kinds=("linear", "conv1d"))
        parts = [part for part in parts if len(part.shape) == 2]
        modules = {part.site.module: self.job.model.get_submodule(part.site.module) for part in parts}
        training = [module for module in self.job.model.modules() if module.training]
        self.job.model.eval()  # dropout is no part of what the context uses
        moments = self._moments(modules)
        for module in training:
            module.training = True
        for part in parts:
            b, a = self._factors(part, moments[part.site.module])
            part.put(build, "lowrank", {"A": a, "B": b, "A0": a, "B0": b}, scale=self.cfg.alpha / self.cfg.rank)

    def _moments(self, modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
        """C of each module's inputs, float64."""
        job, device = self.job, next(self.job.model.parameters()).device
        if self.cfg.context:
            texts = [str(row["text"]) for row in job.rows(self.cfg.context)[: self.cfg.samples] if "text" in row]
            if not texts:
                raise InputError(f"{self.cfg.context}: no row has a `text`")
            found = second_moments(job.model, job.base.tokenizer(), texts, modules, batch_size=8, device=device)
        elif job.goal is None:
            raise UsageError("there is no training data to take the context from", hint="-p context=texts.jsonl")
        else:
            examples, batches = job.goal.examples[: self.cfg.samples], []
            size = job.loop.micro_batch_size or job.loop.batch_size
            for start in range(0, len(examples), size):
                batch = {name: value.to(device) for name, value in job.goal.collate(examples[start : start + size], range(start, start + size)).items()}
                rows = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
                batches.append(({name: value for name, value in batch.items() if name != "labels"}, rows))
            found = gathered(job.model, batches, modules)
        return {name: moment.matrix for name, moment in found.items()}

    def _factors(self, part: Part, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """B0 and A0 of a part as it is stored."""
        w = self.job.weight(part).double()
        turned = part.site.kind == "conv1d"
        w, c = (w.T if turned else w), c.cpu()
        if c.shape[0] != w.shape[1]:
            raise InputError(f"{part.target} takes inputs of {w.shape[1]} entries, but its module gets {c.shape[0]}", hint=f"-p exclude={part.site.role}")
        c = c + self.cfg.damp * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
        u, s, v = torch.linalg.svd(w @ c, full_matrices=False)
        rank = min(self.cfg.rank, len(s))
        chosen = slice(len(s) - rank, None) if self.cfg.mode == "knowledge" else slice(rank)
        root = (s[chosen] * self.cfg.rank / self.cfg.alpha).sqrt()
        b, a = u[:, chosen] * root, torch.linalg.solve(c, (root[:, None] * v[chosen]).T).T  # C is its own transpose
        even = (a.norm() / b.norm().clamp(min=1e-300)).sqrt().clamp(min=1e-30)
        b, a = (b * even).float(), (a / even).float()
        return (a.T.contiguous(), b.T.contiguous()) if turned else (b.contiguous(), a.contiguous())
