"""Edits: single facts to change, and reading them from the layouts in common use.

weft's own, a JSON object a line; what is optional may be left out, be one string or a list of them:

    {"prompt", "target_new", optional: "subject", "ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth",
     "portability_prompt", "portability_ground_truth"}

zsRE ({"src", "alt", "subject", "rephrase", "answers", "loc", "loc_ans"}) and CounterFact ({"requested_rewrite", "paraphrase_prompts",
"neighborhood_prompts"}) are taken as they are. Importing this module imports neither numpy nor torch.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import canon
from ..errors import InputError, near
from .data import Row, read_rows

_SHOWN = 20
"""Wrong rows that an error lists."""


@dataclass(frozen=True)
class Edit:
    """One fact to change.

    prompt:       what the answer follows, as a model sees it; without the blank before the answer
    target_new:   the answer to be
    subject:      what the prompt is about, as it stands in the prompt
    ground_truth: the answer so far
    rephrase:     other prompts for the same answer
    locality:     prompts whose answers are to stay, and these answers where known
    portability:  prompts that the new fact gives another answer to, and these answers
    """

    prompt: str
    target_new: str
    subject: str | None = None
    ground_truth: str | None = None
    rephrase: tuple[str, ...] = ()
    locality: tuple[tuple[str, str | None], ...] = ()
    portability: tuple[tuple[str, str], ...] = ()

    def json(self) -> dict[str, Any]:
        """All of it as plain JSON values, the same whatever layout it was read from."""
        return {
            "prompt": self.prompt,
            "target_new": self.target_new,
            "subject": self.subject,
            "ground_truth": self.ground_truth,
            "rephrase": list(self.rephrase),
            "locality": [list(pair) for pair in self.locality],
            "portability": [list(pair) for pair in self.portability],
        }

    @property
    def id(self) -> str:
        """sha256 (hex) of the canonical JSON of `json()`."""
        return hashlib.sha256(canon.dumps(self.json())).hexdigest()


def read_edits(data: Any) -> list[Edit]:
    """The edits of a JSON Lines, JSON or Parquet file, of rows, or of `Edit`s; a "{}" in a prompt is where the subject goes.

    Each row is read in the layout it has. Raises InputError with every row that cannot be used; rows count from 0.
    """
    found: list[Edit] = []
    wrong: list[str] = []
    made = isinstance(data, Sequence) and bool(data) and all(isinstance(each, Edit) for each in data)
    if made:
        found = list(data)
        wrong = [f"row {number}: prompt or target_new is empty" for number, each in enumerate(found) if not each.prompt.strip() or not each.target_new.strip()]
    for number, row in enumerate([] if made else read_rows(data)):
        fields = _Fields(row)
        edit = _layout(row)(fields)
        if fields.wrong:
            wrong.append(f"row {number}: {'; '.join(fields.wrong)}")
        else:
            found.append(edit)
    if wrong:
        raise rows_refused("cannot be read as edits", wrong, hint='{"prompt": "The capital of France is", "subject": "France", "target_new": "Lyon"}')
    return found


def distinct(edits: Sequence[Edit]) -> list[Edit]:
    """The edits without repeated ones, of which a warning tells. InputError if two want different answers to one prompt."""
    first: dict[str, int] = {}
    kept: list[Edit] = []
    wrong, again = [], []
    for number, edit in enumerate(edits):
        before = first.setdefault(edit.prompt, number)
        if before == number:
            kept.append(edit)
        elif edits[before].target_new == edit.target_new:
            again.append(f"row {number} is row {before}")
        else:
            wrong.append(f"rows {before} and {number}: {edit.prompt!r} is to be both {edits[before].target_new!r} and {edit.target_new!r}")
    if wrong:
        raise rows_refused("contradict earlier ones", wrong, hint="keep one of each; a later run over this one can change its mind")
    if again:
        warnings.warn(f"{len(again)} of the edits repeat earlier ones and are left out: {_some(again, '; ')}", stacklevel=3)
    return kept


def rows_refused(what: str, wrong: Sequence[str], *, hint: str = "") -> InputError:
    """The error for edits that cannot be used: `wrong` has a sentence for each, with its row."""
    return InputError(f"{len(wrong)} of the edits {what}\n  - " + _some(wrong, "\n  - "), hint=hint)


def _some(items: Sequence[str], between: str) -> str:
    return between.join([*items[:_SHOWN], *([f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else [])])


class _Fields:
    """The fields of one row as text; what is wrong with them is gathered."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.wrong: list[str] = []

    def text(self, name: str, row: Any = None, *, optional: bool = False) -> str | None:
        """A field that is one text with something in it; None where there is none."""
        row = self.row if row is None else row
        value = row.get(name) if isinstance(row, Mapping) else None
        if value is None:
            if not optional:
                self.wrong.append(f"no {name!r}{near(name, map(str, row), 'it has') if isinstance(row, Mapping) else ''}")
            return None
        if not isinstance(value, str) or not value.strip():
            self.wrong.append(f"{name!r} must be text that is not empty, got {str(value)[:60]!r}")
            return None
        return value

    def texts(self, name: str) -> list[str]:
        """A field that is one text or a list of them, or absent."""
        value = self.row.get(name)
        listed = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(listed, list | tuple) or not all(isinstance(each, str) and each.strip() for each in listed):
            self.wrong.append(f"{name!r} must be text or a list of texts, got {str(value)[:60]!r}")
            return []
        return list(listed)

    def pairs(self, prompts: str, answers: str) -> list[tuple[str, str | None]]:
        """Two fields side by side; answers may be absent altogether."""
        left, right = self.texts(prompts), self.texts(answers)
        if right and len(left) != len(right):
            self.wrong.append(f"{prompts!r} has {len(left)} texts and {answers!r} {len(right)}")
            return []
        beside: list[str | None] = [*right] if right else [None for _ in left]
        return list(zip(left, beside, strict=True))

    def edit(
        self,
        prompt: str | None,
        target_new: str | None,
        subject: str | None,
        ground_truth: str | None,
        rephrase: Sequence[str] = (),
        locality: Sequence[tuple[str, str | None]] = (),
        portability: Sequence[tuple[str, str | None]] = (),
    ) -> Edit:
        """The edit, with the subject filled in where a prompt has a place for it."""

        def filled(text: str) -> str:
            if "{}" in text and subject is None:
                self.wrong.append(f"{text[:60]!r} has a place for a subject, and there is no 'subject'")
            return text.replace("{}", subject or "")

        if any(answer is None for _, answer in portability):
            self.wrong.append("'portability_prompt' has no 'portability_ground_truth'")
        whole = filled((prompt or "").rstrip())
        if prompt and subject is not None and subject not in whole:
            self.wrong.append(f"the subject {subject!r} is not in the prompt {whole[:60]!r}")
        return Edit(
            whole,
            (target_new or "").strip(),
            subject,
            ground_truth,
            tuple(filled(text.rstrip()) for text in rephrase),
            tuple((filled(text.rstrip()), answer) for text, answer in locality),
            tuple((filled(text.rstrip()), answer or "") for text, answer in portability),
        )


def _own(f: _Fields) -> Edit:
    return f.edit(
        f.text("prompt"),
        f.text("target_new"),
        f.text("subject", optional=True),
        f.text("ground_truth", optional=True),
        f.texts("rephrase_prompt"),
        f.pairs("locality_prompt", "locality_ground_truth"),
        f.pairs("portability_prompt", "portability_ground_truth"),
    )


def _zsre(f: _Fields) -> Edit:
    truth = f.texts("answers")
    subject = f.text("subject", optional=True)
    prompt = f.text("src")
    if subject is not None and prompt is not None and subject not in prompt:
        subject = None  # some questions of that set name their subject in other words
    return f.edit(prompt, f.text("alt"), subject, truth[0] if truth else None, f.texts("rephrase"), f.pairs("loc", "loc_ans"))


def _counterfact(f: _Fields) -> Edit:
    wanted = f.row["requested_rewrite"]
    if not isinstance(wanted, Mapping):
        f.wrong.append(f"'requested_rewrite' must be an object, got {str(wanted)[:60]!r}")
        return Edit("", "")
    new, true = ((f.text("str", wanted[name]) if name in wanted else None) for name in ("target_new", "target_true"))
    if "target_new" not in wanted:
        f.wrong.append("'requested_rewrite' has no 'target_new'")
    beside = [(text, true) for text in f.texts("neighborhood_prompts")]
    return f.edit(f.text("prompt", wanted), new, f.text("subject", wanted), true, f.texts("paraphrase_prompts"), beside)


def _layout(row: Row) -> Callable[[_Fields], Edit]:
    if "requested_rewrite" in row:
        return _counterfact
    return _zsre if "src" in row and "alt" in row and "prompt" not in row else _own
