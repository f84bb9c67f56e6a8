"""The run of an editing method: facts, turns, the live weights meanwhile, and the factors that come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..engine.edits import Edit, rows_refused
from ..engine.spans import rows, spans
from ..errors import InputError, UsageError, WeftError
from ._method import EditMethod, Fact, Job, Matrix, Pair, stored

if TYPE_CHECKING:
    from ._ledger import Record


@dataclass(frozen=True)
class Edited:
    """What a run came to: the factors of each matrix, and the edits in order with the rows that are theirs."""

    factors: list[tuple[Matrix, Pair]]
    records: list[Record]


def facts(job: Job, edits: Sequence[Edit], method: str, subjects: bool) -> list[Fact]:
    """The edits with their tokens. InputError with every row that the method or the model cannot take."""
    found: list[Fact] = []
    wrong: list[str] = []
    for number, edit in enumerate(edits):
        try:
            made = Fact(edit, spans(job.tokenizer, edit.prompt, edit.target_new, edit.subject if subjects else None))
        except InputError as error:
            wrong.append(f"row {number}: {error.message}")
            continue
        if subjects and edit.subject is None:
            wrong.append(f"row {number}: {method} needs to know the subject, and it has none ({edit.prompt[:60]!r})")
        elif len(made.spans.ids) > job.most:
            wrong.append(f"row {number}: {len(made.spans.ids)} tokens; the model takes {job.most}")
        else:
            found.append(made)
    if wrong:
        raise rows_refused("cannot be made", wrong)
    return found


def run(job: Job, method: EditMethod[Any], known: Sequence[Fact], turn_size: int, progress: Callable[[int, int], None]) -> Edited:
    """Make some facts true, `turn_size` at a time. The live weights hold all of it afterwards: `Weights.restore` puts them back.

    WeftError if a change is not finite, or if nothing changes at all.
    """
    parts: dict[str, list[Pair]] = {matrix.name: [] for matrix in method.matrices}
    records: list[Record] = []
    end = 0
    for number, start in enumerate(range(0, len(known), turn_size)):
        turn = known[start : start + turn_size]
        first = end
        for fact in turn:
            about = {"prompt": fact.edit.prompt, "subject": fact.edit.subject, "target_new": fact.edit.target_new, "id": fact.edit.id}
            records.append({**about, "turn": number, "rows": [end, end + method.rows(fact)]})
            end += method.rows(fact)
        for matrix, factors in method.turn(turn):
            pair = stored(matrix, factors)
            if not all(bool(value.isfinite().all()) for value in pair):
                raise WeftError(
                    f"turn {number}: the change of {matrix.target} is not finite", hint="a smaller step (-p lr=...), a larger ridge, or dtype=float32"
                )
            parts[matrix.name].append(pair)
            job.weights.add(matrix, pair)
        short = [name for name, pairs in parts.items() if sum(a.shape[0] for a, _ in pairs) != end]
        if short:
            raise WeftError(f"turn {number}: the method gave {short[0]} another number of rows than the {end - first} of its facts")
        progress(start + len(turn), len(known))
    if not job.weights.changed():
        raise WeftError(
            "the edits change nothing: every increment is zero or lost in rounding", hint="a larger step (-p lr=...), other sites, or more edits at once"
        )
    joined = {name: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)) for name, pairs in parts.items()}
    return Edited([(matrix, joined[matrix.name]) for matrix in method.matrices], records)


def measured(job: Job, known: Sequence[Fact]) -> dict[str, float]:
    """Teacher-forced figures of some facts: `loss`, the mean over facts of the mean -log p of an answer's tokens, and `success`, the share of
    facts each of whose answer tokens is the most likely one."""
    loss, success = 0.0, 0
    items = [fact.spans for fact in known]
    for numbers, inputs in job.batches(items):
        chosen = [items[k] for k in numbers]
        at = rows(chosen, lambda s: s.predicts, job.device)
        with torch.no_grad():
            logits = job.model(**inputs).logits[at].float()
        lengths = [len(item.predicts) for item in chosen]
        goals = inputs["input_ids"][:, 1:][at[:, :-1]]
        for part, goal in zip(torch.split(logits, lengths), torch.split(goals, lengths), strict=True):
            loss += float(nn.functional.cross_entropy(part, goal))
            success += bool((part.argmax(1) == goal).all())
    return {"loss": loss / len(known), "success": success / len(known)}


def require_language_model(model: nn.Module) -> None:
    """UsageError unless the model predicts next tokens."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update([value] if isinstance(value, str) else value)
    if not any(kind.__name__ in known for kind in type(model).__mro__):
        raise UsageError(f"{type(model).__name__} does not predict next tokens, so it has no answers to edit", hint="edit a causal language model")
