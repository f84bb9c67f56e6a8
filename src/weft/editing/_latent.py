"""What the editors that locate a fact share: prompts with their subjects, keys at these, and the output that makes a fact true.

`Latent.wanted` finds, for all facts at once, the delta_f to add to a module's output at the last token of the subject (Meng et al. 2022,
arXiv 2202.05262 and 2210.07229) that makes small

    mean over prompts of the mean -log p of the answer's tokens + kl KL(p0 || p) after "{subject} is a" + decay ||delta_f|| / ||v_f||^2

with v_f the module's own output, by Adam, and with ||delta_f|| kept to clamp ||v_f||. A fact is done when its loss falls below `enough`. Facts
do not meet: each has its own terms, its own clamp and its own end, so a batch gives what one after the other would.

token="prompt" does all of this at the last token of the prompt: small models may look a fact up there and not at the subject.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import nn

from .._roles import LAYER_LISTS
from ..engine.capture import capture, outputs
from ..engine.data import opened
from ..engine.solve import Prior
from ..engine.spans import Spans, rows, spans
from ..engine.statistics import second_moments
from ..errors import InputError, UsageError
from ._method import Fact, Job, Matrix

_STARTS = ("The", "Therefore", "Because", "I", "You")
_TOKENS = 10
_TOP = 5
_SAMPLES = 1
"""Stream of random numbers."""


class LatentConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of what is wanted, and of the statistics."""

    sites: Annotated[tuple[str, ...], msgspec.Meta(description="matrices to edit, one a layer; none: MLP output matrices, see the method")] = ()
    token: Annotated[Literal["subject", "prompt"], msgspec.Meta(description="where: at the last token of the subject, or of the prompt")] = "subject"
    steps: Annotated[int, msgspec.Meta(description="steps of Adam for the wanted output", ge=1)] = 25
    lr: Annotated[float, msgspec.Meta(description="learning rate of Adam", gt=0)] = 0.5
    decay: Annotated[float, msgspec.Meta(description="weight of the length of what is added to the output", ge=0)] = 0.5
    kl: Annotated[float, msgspec.Meta(description="weight of staying with what the model says of the subject", ge=0)] = 0.0625
    clamp: Annotated[float, msgspec.Meta(description="longest addition, in lengths of the output itself", gt=0)] = 0.75
    enough: Annotated[float, msgspec.Meta(description="loss at which a fact is done", ge=0)] = 0.05
    prefixes: Annotated[tuple[str, ...], msgspec.Meta(description="texts before the prompt; none: the model writes some")] = ()
    contexts: Annotated[int, msgspec.Meta(description="how many texts the model writes", ge=0)] = 5
    max_tokens: Annotated[int, msgspec.Meta(description="tokens of data for the statistics of keys; 0: all", ge=0)] = 100_000
    jitter: Annotated[float, msgspec.Meta(description="added to the diagonal of these statistics, relative to its mean", ge=0)] = 1e-4


class Latent:
    """The prompts, keys, wanted outputs and statistics of a run. `matrices` go up through the layers; `before` is what prompts stand after."""

    def __init__(self, cfg: LatentConfig, job: Job, first: int, last: int) -> None:
        self.cfg, self.job = cfg, job
        self.matrices = sorted(job.matrices(cfg.sites or [f"mlp.down@{first}-{last}"]), key=lambda matrix: (matrix.site.stack, matrix.site.layer or 0))
        layers = [matrix.site.layer for matrix in self.matrices]
        if None in layers or len(set(layers)) < len(layers) or len({matrix.site.stack for matrix in self.matrices}) > 1:
            raise UsageError(f"expected one matrix in each layer, got {', '.join(matrix.name for matrix in self.matrices)}", hint="-p sites=mlp.down@3-5")
        self.before = list(cfg.prefixes) or self._written()

    def priors(self, scale: float) -> dict[str, Prior]:
        """scale * E[k k^T] of each matrix's keys over the data, on the model as it is now."""
        modules = {matrix.name: matrix.module for matrix in self.matrices}
        size, limit = {"max_length": min(512, self.job.most), "batch_size": self.job.batch_size}, self.cfg.max_tokens or None
        found = second_moments(self.job.model, self.job.tokenizer, self.job.texts or (), modules, device=self.job.device, limit_tokens=limit, **size)
        return {name: Prior.scaled(moment.matrix, scale, jitter=self.cfg.jitter) for name, moment in found.items()}

    def prompts(self, fact: Fact) -> list[Spans]:
        """The fact's own prompt, and after each of the texts before; with the answer."""
        edit = fact.edit
        behind = [f"{text.rstrip('. ')}. {edit.prompt}" for text in self.before]
        found = [fact.spans, *(spans(self.job.tokenizer, text, edit.target_new, edit.subject) for text in behind)]
        return [item for item in found if len(item.ids) <= self.job.most]

    def keys(self, facts: Sequence[Fact], matrix: Matrix) -> torch.Tensor:
        """What a matrix is given at the end of each fact's subject, averaged over its prompts (facts x d_in, float64, on the CPU)."""
        items, owners = self._all(facts)
        total = torch.zeros(len(facts), matrix.d_in, dtype=torch.float64)
        for numbers, inputs in self.job.batches(items):
            at = rows([items[k] for k in numbers], self._place, self.job.device)
            found = capture(self.job.model, inputs, {matrix.name: matrix.module}, at)[matrix.name].inputs
            total.index_add_(0, owners[numbers], found.double().cpu())
        return total / owners.bincount()[:, None]

    def outputs(self, facts: Sequence[Fact], module: nn.Module, *, averaged: bool = False) -> torch.Tensor:
        """What a module gives there, on the fact's own prompt or averaged over all (facts x d, float32, on the CPU)."""
        items, owners = self._all(facts) if averaged else ([fact.spans for fact in facts], torch.arange(len(facts)))
        total: torch.Tensor | None = None
        for numbers, inputs in self.job.batches(items):
            at = rows([items[k] for k in numbers], self._place, self.job.device)
            found = outputs(self.job.model, inputs, module, at).double().cpu()
            total = torch.zeros(len(facts), found.shape[1], dtype=torch.float64) if total is None else total
            total.index_add_(0, owners[numbers], found)
        if total is None:
            raise InputError("no facts to look at")
        return (total / owners.bincount()[:, None]).float()

    def wanted(self, facts: Sequence[Fact], module: nn.Module, start: torch.Tensor) -> torch.Tensor:
        """delta_f of each fact (facts x d, float32, on the CPU); `start` is v_f."""
        size = max(1, self.job.batch_size // (1 + len(self.before)))
        return torch.cat([self._wanted(facts[k : k + size], module, start[k : k + size].to(self.job.device)) for k in range(0, len(facts), size)])

    def _wanted(self, facts: Sequence[Fact], module: nn.Module, start: torch.Tensor) -> torch.Tensor:
        cfg, job = self.cfg, self.job
        asked, owners = self._all(facts)
        about = [spans(job.tokenizer, f"{fact.edit.subject} is a", "", fact.edit.subject) for fact in facts] if cfg.kl else []
        items, where = [*asked, *about], torch.cat([owners, torch.arange(len(about))]).to(job.device)
        inputs = job.batch(items)
        last = rows(items, self._place, job.device)
        answers = rows(items, lambda s: s.predicts, job.device)
        goals = inputs["input_ids"][:, 1:][answers[:, :-1]]
        lengths = torch.tensor([len(item.predicts) for item in asked], device=job.device)
        share = 1.0 / (lengths * owners.bincount().to(job.device)[owners.to(job.device)])  # of each answer token in its fact's mean of means
        weights, to = share.repeat_interleave(lengths), owners.to(job.device).repeat_interleave(lengths)
        said: torch.Tensor | None = None

        def losses(delta: torch.Tensor) -> torch.Tensor:
            """The loss of each fact."""
            nonlocal said
            with _added(module, last, delta[where]):
                logits = job.model(**inputs).logits
            nll = nn.functional.cross_entropy(logits[answers].float(), goals, reduction="none")
            total = torch.zeros(len(facts), device=job.device).index_add(0, to, nll * weights)
            if about:
                now = logits[len(asked) :][last[len(asked) :]].float().log_softmax(1)
                said = now.detach() if said is None else said  # the first time nothing is added yet
                total = total + cfg.kl * (said.exp() * (said - now)).sum(1)
            return total + cfg.decay * _length(delta) / _length(start).square()

        longest = cfg.clamp * _length(start)
        delta = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=cfg.lr)
        done = torch.zeros(len(facts), dtype=torch.bool, device=job.device)
        for _ in range(cfg.steps):
            with torch.enable_grad():
                found = losses(delta)
                (delta.grad,) = torch.autograd.grad(found.sum(), [delta])
            done |= found.detach() < cfg.enough
            if bool(done.all()):
                break
            kept = delta.detach().clone()
            optimizer.step()
            with torch.no_grad():
                delta.mul_((longest / _length(delta).clamp_min(1e-30)).clamp_max(1.0)[:, None])
                delta.copy_(torch.where(done[:, None], kept, delta))
        return delta.detach().cpu()

    def _place(self, item: Spans) -> int:
        return item.prompt_last if self.cfg.token == "prompt" else item.subject_last

    def _all(self, facts: Sequence[Fact]) -> tuple[list[Spans], torch.Tensor]:
        """The prompts of all facts, and whose each is."""
        listed = [self.prompts(fact) for fact in facts]
        return [item for items in listed for item in items], torch.tensor([k for k, items in enumerate(listed) for _ in items])

    def _written(self) -> list[str]:
        """A few texts that the model writes: `_TOKENS` tokens after a common first word, each drawn from the `_TOP` likeliest."""
        gen = self.job.generator(_SAMPLES)
        texts = []
        for number in range(self.cfg.contexts):
            ids = opened(self.job.tokenizer, _STARTS[number % len(_STARTS)])
            for _ in range(min(_TOKENS, self.job.most // 4)):
                with torch.no_grad():
                    logits = self.job.model(input_ids=torch.tensor([ids], device=self.job.device)).logits[0, -1].float().cpu()
                top = logits.topk(min(_TOP, len(logits)))
                ids.append(int(top.indices[torch.multinomial(top.values.softmax(0), 1, generator=gen)]))
            texts.append(" ".join(self.job.tokenizer.decode(ids, skip_special_tokens=True).split()))
        return list(dict.fromkeys(text for text in texts if text.strip(". ")))


def _length(rows: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)  # its gradient at zero is zero, a square root's is not
    return lengths


def block(model: nn.Module, matrix: Matrix) -> nn.Module:
    """The layer of the model that a matrix is in."""
    parts = matrix.site.module.split(".")
    ends = [k for k, part in enumerate(parts) if k and part == str(matrix.site.layer) and parts[k - 1] in LAYER_LISTS]
    return model.get_submodule(".".join(parts[: ends[0] + 1]))


@contextmanager
def _added(module: nn.Module, at: torch.Tensor, delta: torch.Tensor) -> Iterator[None]:
    """Inside, `delta` (one row for each sequence) is added to a module's output at the token that `at` marks in each."""

    def hook(_: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
        first = y[0] if isinstance(y, tuple | list) else y
        there = at.reshape(first.shape[:-1])[..., None].expand_as(first)  # some models flatten batch and tokens
        moved = first + torch.zeros_like(first).masked_scatter(there, delta.to(first.dtype))
        return type(y)([moved, *y[1:]]) if isinstance(y, tuple | list) else moved

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
