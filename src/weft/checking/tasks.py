"""What a check measures: data files as tasks, each with rows of one kind.

A file is one task of its name, but for edits: they become NAME/efficacy, NAME/rephrase, NAME/locality and NAME/portability,
as far as there are rows for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.data import Row, data_hash, field, read_rows
from ..errors import InputError, UsageError

METRICS: Mapping[str, Mapping[str, str]] = {
    "classification": {"accuracy": "higher", "nll": "lower"},
    "generation": {"exact_match": "higher", "teacher_forced_token_accuracy": "higher", "teacher_forced_exact": "higher", "nll": "lower"},
    "text": {"nll": "lower", "perplexity": "lower"},
    "agreement": {"exact_match": "higher"},
}
"""The metrics of each kind of task, and which direction is better. Those of agreement are of rows that have an answer."""

KINDS = {
    "classification": '{"text", "label"}',
    "text": '{"text"}',
    "generation": '{"prompt", "completion"}',
    "agreement": '{"prompt"}',
    "edits": '{"prompt", "target_new", ...}',
}
"""The kinds of files, and what their rows look like."""

LAYERS = "layers"
"""No task: where gates keep the limits on the sizes of changes."""


@dataclass(frozen=True)
class Source:
    """Data as it was given. `kind` is one of `KINDS`, n the number of rows, sha256 that of `data_hash`."""

    name: str
    kind: str
    n: int
    sha256: str


@dataclass(frozen=True)
class Task:
    """Rows of one kind, a key of `METRICS`, as {"text"}, {"text", "label"}, {"prompt", "completion"} or {"prompt"}.

    `numbers` are the positions of the rows in the data that they came from. `answers`: whether any row says what is right.
    """

    name: str
    kind: str
    rows: tuple[Row, ...]
    numbers: tuple[int, ...]

    @property
    def answers(self) -> bool:
        return self.kind in ("classification", "generation") or (self.kind == "agreement" and any("completion" in row for row in self.rows))

    @property
    def metrics(self) -> Mapping[str, str]:
        """The metrics of this task, and which direction is better."""
        return METRICS[self.kind] if self.kind != "agreement" or self.answers else {}


def cut(text: str, stop: Sequence[str]) -> str:
    """An answer: the part of a text before the first of the `stop` texts, without the white space around it."""
    return text[: _end(text, stop)].strip()


def goes_on(text: str, stop: Sequence[str]) -> bool:
    """Whether there is more in a text than `cut` leaves, other than stop texts and white space."""
    rest = text[_end(text, stop) :]
    for each in stop:
        rest = rest.replace(each, "")
    return bool(rest.strip())


def _end(text: str, stop: Sequence[str]) -> int:
    return min((at for at in map(text.find, stop) if at >= 0), default=len(text))


def read_tasks(data: Any) -> tuple[list[Source], list[Task]]:
    """The tasks in data: a file or rows, a list of files, or a mapping from names to any of them.

    InputError for rows that cannot be read, mix kinds or are none of `KINDS`; UsageError for names that are taken.
    """
    sources: list[Source] = []
    tasks: list[Task] = []
    for name, given in _named(data):
        rows = read_rows(given)
        kind = _kind_of(rows, name)
        sources.append(Source(name, kind, len(rows), data_hash(rows)))
        with blamed(name):
            tasks += _edits(name, rows) if kind == "edits" else [_task(name, kind, rows)]
    return sources, tasks


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """Puts `name` before the message of an InputError about rows, which knows them as "the data": a check has several."""
    try:
        yield
    except InputError as error:
        if type(error) is not InputError:  # about a delta or a model
            raise
        raise InputError(f"{name}: {error.message}", hint=error.hint) from error


def _named(data: Any) -> list[tuple[str, Any]]:
    named: list[tuple[str, Any]]
    if isinstance(data, str | Path):
        named = [(Path(data).stem, data)]
    elif isinstance(data, Mapping):
        named = [(str(name), given) for name, given in data.items()]
    else:
        listed = list(data) if isinstance(data, Iterable) else []
        files = bool(listed) and all(isinstance(given, str | Path) for given in listed)
        named = [(Path(given).stem, given) for given in listed] if files else [("data", listed or data)]
    names = [name for name, _ in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"several data files are named {', '.join(twice)}; a task is called by its file's name", hint="rename all but one")
    if LAYERS in names:
        raise UsageError(f"data cannot be named {LAYERS!r}: gates call the sizes of changes so", hint="rename it")
    if not named:
        raise UsageError("there is no data to check on", hint="data=[PATH, ...] (--data FILE)")
    return named


def _kind_of(rows: Sequence[Row], name: str) -> str:
    """The kind of a file; all its rows the same."""
    found = {_kind(row, number, name) for number, row in enumerate(rows)}
    if len(found) > 1:
        raise InputError(f"{name} mixes {' and '.join(sorted(found))} rows", hint="put them into files of their own; a check takes several")
    return found.pop()


def _kind(row: Row, number: int, name: str) -> str:
    if not {"target_new", "requested_rewrite"}.isdisjoint(row) or {"src", "alt"} <= set(row):  # our layout, CounterFact's, zsRE's
        return "edits"
    if "completion" in row:
        return "generation"
    if "text" in row:
        return "classification" if "label" in row else "text"
    if "prompt" in row:
        return "agreement"
    raise InputError(f"row {number} of {name} has {', '.join(map(repr, row)) or 'no fields'}; nothing in it can be checked", hint=f"rows of {_kinds()}")


def _kinds() -> str:
    return ", ".join(KINDS.values())


def _task(name: str, kind: str, rows: Sequence[Row]) -> Task:
    fields = {"classification": ("text",), "text": ("text",), "generation": ("prompt", "completion"), "agreement": ("prompt",)}[kind]
    for number, row in enumerate(rows):
        for each in fields:
            field(row, each, number)
    return Task(name, kind, tuple(rows), tuple(range(len(rows))))


def _edits(name: str, rows: Sequence[Row]) -> list[Task]:
    """The tasks in rows of edits. The answer follows the prompt after a space, as an editor sees it."""
    from ..engine.edits import read_edits
    from ..engine.spans import joined

    parts: dict[str, list[tuple[int, str, str | None]]] = {"efficacy": [], "rephrase": [], "locality": [], "portability": []}
    for number, edit in enumerate(read_edits(rows)):
        parts["efficacy"].append((number, edit.prompt, edit.target_new))
        parts["rephrase"] += [(number, prompt, edit.target_new) for prompt in edit.rephrase]
        parts["locality"] += [(number, prompt, answer) for prompt, answer in edit.locality]
        parts["portability"] += [(number, prompt, answer) for prompt, answer in edit.portability]
    tasks = []
    for part, asked in parts.items():
        if asked:
            told = tuple({"prompt": p} | ({} if a is None else {"completion": joined(p, a)[len(p) :]}) for _, p, a in asked)
            kind = "agreement" if part == "locality" else "generation"
            tasks.append(Task(f"{name}/{part}", kind, told, tuple(number for number, _, _ in asked)))
    return tasks
