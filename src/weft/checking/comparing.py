"""check: a base against the same base with deltas, on data. What got better, what broke, and how much was changed for it.

    report = check("path/to/model", "edits.safetensors", ["edits.jsonl", "unrelated.jsonl"], gate="gate.yaml")
    report["verdict"]["passed"], report["tasks"][0]["flips"]["negative"]

There is one model in memory: everything runs on the base, then the deltas are attached and everything runs again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UsageError
from .tasks import KINDS, Task, cut, goes_on, read_tasks

if TYPE_CHECKING:
    import torch

    from ..attaching import Mode
    from ..base import Base
    from ..delta import Delta
    from . import Deltas, Progress
    from .layers import Places
    from .measuring import Measured
    from .running import Running

STOP = ("\n", ".")
KL_ROWS = 512
EXAMPLES = 200
"""Where answers end, unless told otherwise; prompts of a task whose next-token distributions are compared; rows of a task that a
report shows."""


def check(
    base: Base | str | Path,
    deltas: Deltas,
    data: Any,
    *,
    on: Deltas = (),
    gate: Mapping[str, Any] | str | Path | None = None,
    report: str | Path | None = None,
    names: Sequence[str] = (),
    batch_size: int = 32,
    max_length: int = 512,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = STOP,
    samples: int = 1000,
    kl_rows: int = KL_ROWS,
    examples: int = EXAMPLES,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    mode: Mode = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a base with and without deltas; return the report: verdict, identity, tasks and layers, JSON values only.

    data: a file or rows, a list of files, or a mapping from names to any of these; each is a task. Its rows are all
      {"text", "label"}:      classification: accuracy, nll (mean cross-entropy in nats)
      {"text"}:               text: nll a token, perplexity; `ratio` of delta to base: of all tokens together, and mean and median over rows
      {"prompt", "completion"}: generation: exact_match of the free greedy answer; the same with teacher forcing, named so; nll a token;
                              the share of greedy answers that are the base's
      {"prompt"}:             agreement: the share of greedy answers that are the base's, KL(base || delta) in nats of the next token
      {"prompt", "target_new", ...}: edits: NAME/efficacy, NAME/rephrase and NAME/portability as generation, NAME/locality as agreement
    Answers end at the first `stop` text or the model's own end; what is right is cut and stripped in the same way.

    on:             deltas below both sides
    gate:           limits, as a YAML file or a mapping (see `weft.checking.gates`); verdict.passed is None without
    report:         where an HTML page of the report is to be written
    names:          what the report calls the deltas; default: the names of their files
    max_length:     in tokens, of prompt and answer together; longer rows are cut, each task's `truncated` counts them
    max_new_tokens: the longest answer; default: 8 more than the longest right one of the task, 24 where none is known
    samples, seed:  of the bootstrap intervals
    kl_rows:        prompts of a task whose next-token distributions are compared: the first ones
    examples:       rows of a task that the report shows: flips and changed answers first
    batch_size, device, dtype, mode: as for `evaluate`
    progress:       called with the rows done and the rows in all, of both sides

    Where rows have a right answer, `flips` counts those that went from right to wrong and back, with McNemar's exact p and a bootstrap
    interval for the change (see `weft.checking.flips`). Logits that are no numbers make their task's metrics None and its `finite` False.

    UsageError for a gate that does not fit the data (before the model is loaded) or a base that cannot do what the rows ask for,
    InputError for rows that do not fit, MismatchError for deltas that do not.
    """
    from ..base import Base
    from ..delta import loaded
    from .gates import judge, read_limits
    from .layers import sizes
    from .measuring import How, measure, steps
    from .report import about, summary, told, versions

    start = time.monotonic()
    _require_counts(
        {"batch_size": batch_size, "samples": samples, "kl_rows": kl_rows, "examples": examples, "max_new_tokens": max_new_tokens, "max_length": max_length}
    )
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:  # it is found at the start of every answer
        raise UsageError("a stop text must not be empty", hint="leave it out, and answers end at a line break or a full stop")
    sources, tasks = read_tasks(data)
    limits = read_limits(gate, tasks)
    head, why = _head(tasks)
    cuts = _cut_answers(tasks, stop)
    opened = base if isinstance(base, Base) else Base.open(base)
    below, above = loaded(on), loaded(deltas)
    if not above:
        raise UsageError("there is no delta to check", hint="weft eval measures a base alone")
    called = _names(above, names)
    how = How(batch_size, max_length, max_new_tokens, stop, kl_rows)
    done, total = 0, 2 * sum(map(steps, tasks))

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    sides: list[list[Measured]] = []
    for run in _sides(opened, below, above, device, dtype, mode, head, why):
        known: list[Measured | None] = [*sides[0]] if sides else [None] * len(tasks)
        sides.append([measure(run, task, how, before, advance) for task, before in zip(tasks, known, strict=True)])
        where = {"dtype": str(run.model.dtype).removeprefix("torch."), "device": str(run.device)}
        places = _places(run, [*below, *above]) if len(sides) == 2 else {}
        del run  # the other side may be a model of its own, and there is never more than one
    compared = [told(task, one, other, samples, seed, examples) for task, one, other in zip(tasks, *sides, strict=True)]
    layers = sizes(opened, below, above, places)
    gates = judge(limits, compared, layers)
    passed = all(each["passed"] for each in gates) if gates else None
    out = {
        "verdict": {"passed": passed, "gates": gates, "summary": summary(gates, compared, layers, cuts)},
        "identity": {
            "base": {"name": Path(opened.source).name if opened.path else opened.source, "fingerprint": opened.fingerprint},
            "deltas": [about(delta, name) for delta, name in zip(above, called, strict=True)],
            "on": [delta.id for delta in below],
            "data": [{"name": s.name, "kind": s.kind, "n": s.n, "sha256": s.sha256} for s in sources],
            "settings": {
                **where,
                "batch_size": batch_size,
                "max_length": max_length,
                "max_new_tokens": max_new_tokens,
                "stop": list(stop),
                "seed": seed,
                "samples": samples,
                "kl_rows": kl_rows,
                "examples": examples,
            },
            "versions": versions(),
            "seconds": round(time.monotonic() - start, 3),
        },
        "tasks": compared,
        "layers": layers,
    }
    if report is not None:
        from .._write import write_bytes
        from .page import page

        write_bytes(report, page(out).encode())
    return out


# --- before the model is loaded


def _require_counts(counts: Mapping[str, int | None]) -> None:
    least = {"max_length": 2}
    wrong = [f"{name} must be {least.get(name, 1)} at least, got {value}" for name, value in counts.items() if value is not None and value < least.get(name, 1)]
    if wrong:
        raise UsageError(f"check: {len(wrong)} problem{'s' * (len(wrong) != 1)}", problems=wrong)


def _head(tasks: Sequence[Task]) -> tuple[str, str]:
    """What the tasks need of the model, a key of `running.HEADS`, and a clause that says which rows do."""
    labelled = [task.name for task in tasks if task.kind == "classification"]
    others = [task for task in tasks if task.kind != "classification"]
    if labelled and others:
        raise UsageError(
            f"{labelled[0]} asks for a classifier and {others[0].name} for a language model, and a model is one of them", hint="check them one at a time"
        )
    asks = f", which the rows of {tasks[0].name}, {KINDS[tasks[0].kind]}, ask for"
    return ("classification" if labelled else "text"), f"{asks}; so there is nothing to compare with"


def _cut_answers(tasks: Sequence[Task], stop: Sequence[str]) -> dict[str, int]:
    """How many right answers of each task go on after a stop text, and so are compared only up to it. InputError if nothing is left of one."""
    found: dict[str, int] = {}
    for task in tasks:
        for number, row in zip(task.numbers, task.rows, strict=True):
            answer = row.get("completion")
            if answer is not None and not cut(answer, stop):
                raise InputError(
                    f"row {number} of {task.name}: nothing of the answer {answer[:40]!r} is left before the first stop text",
                    hint="other stop texts (--stop TEXT), or an answer that does not begin with one",
                )
            if answer is not None and goes_on(answer, stop):
                found[task.name] = found.get(task.name, 0) + 1
    return found


def _names(deltas: Sequence[Delta], names: Sequence[str]) -> list[str]:
    if names and len(names) != len(deltas):
        raise UsageError(f"names: expected {len(deltas)}, one for each delta, got {len(names)}")
    return list(names) or [delta.path.stem if delta.path else delta.id[:12] for delta in deltas]


# --- the two sides


def _sides(base: Base, on: Sequence[Delta], deltas: Sequence[Delta], device: Any, dtype: Any, mode: Mode, head: str, why: str) -> Iterator[Running]:
    """The base with `on`, ready to run, and after that the same with `deltas`: the same model, unless they change its structure.
    Then the first model is let go before the second is made, if the caller does not hold it."""
    from ..attaching import attach
    from .running import running

    ids = [delta.id for delta in on]
    for delta in deltas:  # before gigabytes are read
        delta.require_base(base, on=ids)
        ids.append(delta.id)
    hint = "weft eval measures a base with deltas alone; a delta that brings the head can stand below both sides (--on DELTA)"
    structural = any(delta.config or any(entry.change for entry in delta.entries.values()) for delta in deltas)
    with running(base, on, device, dtype, mode, head, why, hint) as run:
        yield run
        if not structural:
            attach(run.model, deltas, base=base, mode=mode)
            yield run
        del run
    if structural:
        gc.collect()  # modules refer to each other in circles
        with running(base, [*on, *deltas], device, dtype, mode, head, why) as run:
            yield run


def _places(run: Running, deltas: Sequence[Delta]) -> Places:
    """The layer and role of every target of `deltas`, as far as the model knows them."""
    from ..delta import MODULE
    from ..errors import MismatchError
    from ..names import NameMap
    from ..sites import all_sites

    found: dict[str, tuple[int | None, str | None]] = {}
    sites = all_sites(run.model)
    by_name = {name: site for site in sites for name in (site.name, *site.tied)}
    names = NameMap.of(run.base, run.model, deltas)
    for target in {target for delta in deltas for target in delta.entries}:
        if target.startswith(MODULE):
            path = target.removeprefix(MODULE)
            site = next((site for site in sites if site.module == path), None)
        elif target.startswith("@"):
            site = None
        else:
            try:
                site = next((by_name[place.name] for place in names.live(target) if place.name in by_name), None)
            except MismatchError:  # removed: the model has no such tensor
                site = None
        if site is not None:
            found[target] = (site.layer, site.role)
    return found
