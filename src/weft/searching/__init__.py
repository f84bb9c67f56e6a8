"""search: what to tune, how, and how large: found from trials, or read off laws that trials follow.

    weft.search("law", "runs.jsonl", x=("N", "D"))["families"][0]["terms"]
    weft.search("autopeft", "path/to/model", data="train.jsonl", objective="classification", steps=50, trials=40, out="pareto")

Methods are the other files of this package. Importing it imports neither numpy nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .. import config, methods
from .._write import atomic_folder, write_bytes
from ..engine.events import Events, Progress
from ._method import Report, Task
from ._study import StudyConfig

__all__ = ["search"]

REPORT = "report.json"
"""The name of the report in the folder of results."""


def search(
    method: str,
    source: Any = None,
    *,
    data: Any = None,
    valid: Any = None,
    test: Any = None,
    space: Mapping[str, Any] | str | Path | None = None,
    study: str | Path | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    log: str | Path | None = None,
    progress: Progress | None = None,
    **params: Any,
) -> Report:
    """Search; returns the report, plain JSON values.

    method:   law, step-law, autopeft, memcontrol, how-to-autorl (`weft methods search`)
    source:   for laws: measured runs, a path or rows (see `weft.engine.data.read_rows`); else the base to tune
    data:     rows to tune on
    valid:    rows that trials are measured on; default: a share of `data` that is kept out of the tuning
    test:     rows that the chosen ones are measured on besides, and nothing is chosen by
    space:    what may be chosen, a mapping or a YAML file; default: made from the catalogue
    study:    the file, or the URL of a database, in which trials are kept: a search that was stopped goes on from there, and
              several processes with the same one share the work
    out:      a folder for report.json, the chosen ones as deltas, and a plot if matplotlib is there; it must not exist, or be empty
    seed:     of what is tried; the seeds of the tuning runs are options
    log:      a file that events are added to, a JSON object a line: start, trial, final, end (see `weft.engine.events`)
    progress: called with every event; they say how much is `done` of `total`
    params:   options of the method by name; what it does not know goes to `weft.tune`: objective="classification", steps=50, lr=1e-3

    Raises UsageError, InputError, MismatchError for a study that belongs to another search, and MissingExtra where trials are
    searched without Optuna.
    """
    record = methods.get("search", method)
    known = {option.name for option in config.options(record.config)}
    own = {name: value for name, value in params.items() if name.replace("-", "_") in known}
    how = {name: value for name, value in params.items() if name not in own}
    trains = issubclass(record.config, StudyConfig)
    cfg = config.make(record.config, own if trains else params, f"search method {method!r}")
    chosen = config.read_yaml(space) if isinstance(space, str | Path) else dict(space or {})
    with ExitStack() as stack:
        folder = None if out is None else stack.enter_context(atomic_folder(out))
        events = stack.enter_context(Events(log, progress))
        task = Task(source, data, valid, test, chosen, None if study is None else str(study), folder, seed, how if trains else {}, events)
        report: Report = {"method": method, "config": config.as_dict(cfg), **record.run(task, cfg)}
        if folder is not None:
            write_bytes(folder / REPORT, (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return report
