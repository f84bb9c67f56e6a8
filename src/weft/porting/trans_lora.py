"""trans-lora: a new LoRA for the new base, taught by the old base with the old one, without the old one's training data.

Wang et al. 2024, "Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning" (arXiv 2405.17258):

1. a base writes inputs like a few seeds (data: rows whose inputs are the seeds; their answers are not used);
2. a discriminator, trained to tell the seeds from what was written, keeps what looks most like them;
3. the old base with the update answers them;
4. a LoRA of the new base is tuned on these answers.

Nothing is assumed of the two bases: shapes, names and tokenizers may differ, and an update of any kind can be the teacher.

Not as in the paper: the discriminator is a logistic regression on the old base's mean hidden states, trained on the seeds given
here and not with the old LoRA, and applied to drafts that it was not trained on; the answers are the teacher's own words for rows of
{"prompt"} (greedy, to the end of the line), its label for rows of {"text", "label"}: distillation on sequences, not on logits, which
needs no common tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from ..base import Base
from ..delta import Delta
from ..engine.data import Row, field
from ..errors import InputError, UsageError, WeftError
from ..methods import method

if TYPE_CHECKING:
    from ._method import Job


class TransLoRAConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `trans-lora`."""

    inputs: Annotated[int, msgspec.Meta(ge=1, description="Synthetic inputs to train on.")] = 500
    keep: Annotated[float, msgspec.Meta(gt=0, le=1, description="Share of what is written that the discriminator keeps; 1: everything, no discriminator.")] = (
        0.5
    )
    writer: Annotated[Literal["target", "source"], msgspec.Meta(description="The base that writes the inputs.")] = "target"
    shots: Annotated[int, msgspec.Meta(ge=0, description="Seeds that the writer sees before it writes.")] = 4
    lead: Annotated[float, msgspec.Meta(ge=0, le=1, description="Largest share of a seed's words that a new input begins with.")] = 0.0
    temperature: Annotated[float, msgspec.Meta(gt=0, description="Of the writer.")] = 1.0
    answer: Annotated[int, msgspec.Meta(ge=1, description="Longest answer of the teacher, in tokens.")] = 64
    rank: Annotated[int, msgspec.Meta(ge=1, description="Of the new LoRA.")] = 16
    epochs: Annotated[float, msgspec.Meta(gt=0, description="Passes over the inputs.")] = 3.0
    lr: Annotated[float, msgspec.Meta(gt=0, description="Learning rate; none: LoRA's own.")] | None = None
    batch_size: Annotated[int, msgspec.Meta(ge=1, description="Examples for a step.")] = 32


@method(
    "port",
    config=TransLoRAConfig,
    paper="Wang et al., 2024, arXiv:2405.17258",
    formula="argmin over a LoRA of theta_new of - sum log p(y | x), x written and filtered, y the answer of theta_old with the update",
)
def trans_lora(job: Job, cfg: TransLoRAConfig) -> Delta:
    """A new LoRA for the target, distilled from the source with the update on inputs that a base writes."""
    if isinstance(job.update, Base):
        teacher, update = job.update, []
    else:
        teacher, update = job.source, [job.update]
    seeds, kind = _seeds(job)
    written = _inputs(job, cfg, seeds)
    rows = _labelled(teacher, update, written, cfg, job.device) if kind == "classification" else _answered(teacher, update, written, cfg, job.device)
    if len({str(row["label"]) for row in rows if "label" in row}) == 1:
        raise InputError(f"the teacher gives all {len(rows)} synthetic texts one label", hint="seeds of every class, or a higher -p temperature")
    from ..tuning import tune

    goal = "classification" if kind == "classification" else "causal-lm"
    how: dict[str, Any] = {"rank": cfg.rank, "epochs": cfg.epochs, "batch_size": cfg.batch_size, **({} if cfg.lr is None else {"lr": cfg.lr})}
    made = tune(job.target, rows, method="lora", objective=goal, seed=job.seed, device=job.device, progress=lambda event: None, **how)
    return replace(made, notes={**made.notes, "inputs": len(rows), "seeds": len(seeds), "examples": [dict(row) for row in rows[:5]]})


def _seeds(job: Job) -> tuple[list[str], str]:
    """The inputs in the data, and what they ask for."""
    if job.rows is None:
        raise UsageError("trans-lora needs a few inputs as seeds", hint="data=FILE (--data FILE) with rows of {'prompt'} or {'text', 'label'}")
    kind = "classification" if all("label" in row for row in job.rows) else "completion"
    return [field(row, "text" if kind == "classification" else "prompt", number) for number, row in enumerate(job.rows)], kind


def _inputs(job: Job, cfg: TransLoRAConfig, seeds: Sequence[str]) -> list[str]:
    """Written, and filtered."""
    from ._drafts import drafts

    wanted = round(cfg.inputs / cfg.keep)
    writer = job.target if cfg.writer == "target" else job.source
    how: dict[str, Any] = {"shots": cfg.shots, "lead": cfg.lead, "temperature": cfg.temperature}
    found = drafts(writer, seeds, wanted, seed=job.seed, device=job.device, **how)
    if cfg.keep == 1 or len(found) < 2:
        return found
    from ._discriminator import features, realness

    both = features(job.source, [*seeds, *found], device=job.device)
    odds = realness(both[: len(seeds)], both[len(seeds) :])
    best = sorted(range(len(found)), key=lambda k: (-odds[k], k))[: max(1, round(cfg.keep * len(found)))]
    return [found[k] for k in sorted(best)]


def _answered(teacher: Base, update: Sequence[Delta], prompts: Sequence[str], cfg: TransLoRAConfig, device: str | None) -> list[Row]:
    """{"prompt", "completion"}: what the teacher says. Prompts to which it says nothing are left out."""
    from ..checking.answers import greedy
    from ..checking.running import running
    from ..engine.data import opened

    with running(teacher, list(update), device, None, "auto", "text") as run:
        said, finite = greedy(run, [opened(run.tokenizer, text) for text in prompts], cfg.answer, ("\n",), 64, None, lambda done: None)
    rows = [{"prompt": text, "completion": f" {answer}"} for text, answer, good in zip(prompts, said, finite, strict=True) if answer and good]
    if not rows:
        raise WeftError("the teacher answers none of the synthetic inputs", hint="other seeds, or a longer -p answer=N")
    return list(rows)


def _labelled(teacher: Base, update: Sequence[Delta], texts: Sequence[str], cfg: TransLoRAConfig, device: str | None) -> list[Row]:
    """{"text", "label"}: the teacher's label."""
    from ..checking import predict

    return [{"text": text, "label": label} for text, label in zip(texts, predict(teacher, list(update), list(texts), device=device).labels, strict=True)]
