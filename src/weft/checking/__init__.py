"""What a model does, with and without deltas: metrics on data, predictions, generated text, and a base held against its update.

    evaluate("path/to/model", ["trec.safetensors"], "trec.test.jsonl")["metrics"]["accuracy"]
    generate("path/to/model", [], "Once upon a time")
    check("path/to/model", "trec.safetensors", ["trec.test.jsonl"], on=["head.safetensors"])["verdict"]

Importing this package does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .comparing import check

__all__ = ["Predictions", "check", "evaluate", "generate", "predict"]

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..attaching import Mode
    from ..base import Base
    from ..delta import Delta

    Deltas = Sequence[Delta | str | Path] | Delta | str | Path

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


@dataclass(frozen=True)
class Predictions:
    """What a classifier says: the label of each text, and its logits (texts x classes, float32)."""

    labels: list[str]
    logits: np.ndarray[Any, Any]


def evaluate(
    base: Base | str | Path,
    deltas: Deltas,
    data: Any,
    *,
    batch_size: int = 32,
    max_length: int = 512,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    mode: Mode = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Metrics of a base with deltas on data, as `{"metrics": {...}, "kind", "n", "truncated", "base", "deltas"}`.

    kind is "classification", "text" or "completion"; n counts rows; base is the fingerprint and deltas are ids. For the latter
    two kinds `tokens` counts what was predicted. An infinite perplexity is None.

    deltas:     deltas or their files, in order; one may stand alone
    data:       a path or rows, see `weft.engine.data.read_rows`. {"text", "label"}: accuracy and nll of a classifier;
                {"text"}: nll a token, perplexity, teacher_forced_token_accuracy and teacher_forced_exact of a causal language model;
                {"prompt", "completion"}: the same of the completion, given the prompt (teacher-forced)
    max_length: in tokens; longer rows are cut, `truncated` counts them
    device:     default: an accelerator if there is one
    dtype:      what the model runs in; default: the checkpoint's
    mode:       how deltas are attached, see `weft.attach`

    Rows go through the model sorted by length. UsageError if the model has no head for the data, InputError for rows
    that do not fit, MismatchError for deltas that do not.
    """
    from ..engine.data import most_tokens, read_rows
    from ..engine.rows import FIELDS, Encoder, kind_of
    from . import metrics
    from .running import running

    if max_length < 2:
        raise UsageError(f"max_length must be 2 at least, got {max_length}")
    rows = read_rows(data)
    kind = kind_of(rows)
    task, why = ("classification" if kind == "classification" else "text"), f", which rows of {FIELDS[kind]} ask for"
    with running(base, deltas, device, dtype, mode, task, why) as run:
        encode = Encoder(run.tokenizer, most_tokens(run.tokenizer, run.model.config.to_dict(), max_length))
        metric: metrics.Accuracy | metrics.Likelihood
        if kind == "classification":
            metric = metrics.Accuracy()
            examples = encode.classified(rows, run.model.config.to_dict(), run.model.config.num_labels)
        else:
            metric = metrics.Likelihood()
            examples = encode.language(rows) if kind == "text" else encode.completions(rows)
        for _, batch, logits in run.batches(examples, batch_size, progress):
            metric.add(logits, batch["labels"])
        counted = {"tokens": metric.tokens} if isinstance(metric, metrics.Likelihood) else {}
        found = metrics.shown(metric.result())
        return {"metrics": found, "kind": kind, "n": len(rows), **counted, "truncated": encode.cut, "base": run.base.fingerprint, "deltas": run.ids}


def predict(
    base: Base | str | Path,
    deltas: Deltas,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int = 512,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    mode: Mode = "auto",
) -> Predictions:
    """What a classifier says about each text, in their order. Arguments and errors as for `evaluate`."""
    import numpy as np

    from ..engine.data import most_tokens
    from ..engine.rows import Encoder
    from .running import running

    with running(base, deltas, device, dtype, mode, "classification") as run:
        encode = Encoder(run.tokenizer, most_tokens(run.tokenizer, run.model.config.to_dict(), max_length))
        examples = [{"input_ids": ids, "labels": 0} for ids in encode.texts(texts)]
        out = np.zeros((len(texts), run.model.config.num_labels), np.float32)
        for numbers, _, logits in run.batches(examples, batch_size, None):
            out[numbers] = logits.float().cpu().numpy()
        names = run.model.config.id2label
        return Predictions([str(names[int(k)]) for k in out.argmax(1)], out)


def generate(
    base: Base | str | Path,
    deltas: Deltas,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    mode: Mode = "auto",
    task: str = "",
) -> str:
    """How a causal language model with deltas continues `prompt`: the new text alone.

    temperature 0 takes the most likely token each time (or the best of `num_beams` beams); above it, tokens are drawn,
    and the same seed draws the same ones on the same machine. `task` is what a delta that differs by task is asked for.
    """
    import torch

    from ..attaching import set_tasks
    from ..engine.data import opened
    from .running import running

    if temperature > 0 and num_beams > 1:
        raise UsageError(f"num_beams={num_beams} searches and temperature={temperature:g} draws; choose one")
    with running(base, deltas, device, dtype, mode, "text") as run:
        encoded = torch.tensor([opened(run.tokenizer, prompt)], dtype=torch.long, device=run.device)
        if not encoded.shape[1]:
            raise UsageError("the prompt has no tokens", hint="give it some text")
        how: dict[str, Any] = {"do_sample": True, "temperature": temperature}
        if temperature <= 0:  # the checkpoint's own settings for drawing are taken out, or transformers complains of them
            how = {"do_sample": False, "num_beams": num_beams, "temperature": None, "top_p": None, "top_k": None}
        set_tasks(run.model, task or ())
        with torch.inference_mode(), torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = run.model.generate(encoded, attention_mask=torch.ones_like(encoded), max_new_tokens=max_new_tokens, pad_token_id=run.pad, **how)
        run.check()
        return str(run.tokenizer.decode(out[0, encoded.shape[1] :], skip_special_tokens=True))
