"""What a search method gets. Each method is one file beside this one: a function of a `Task` and its config that returns its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.data import Row, read_rows
from ..engine.events import Events
from ..errors import InputError, UsageError, near

if TYPE_CHECKING:
    import numpy as np

    from ..base import Base

    Array = np.ndarray[Any, Any]

Report = dict[str, Any]
"""Plain JSON values, with the method's name as `method`."""


@dataclass(frozen=True, eq=False)
class Task:
    """One search.

    source:            a base for the methods that tune, measured runs (a path or rows) for those that fit laws
    data, valid, test: what trials are tuned on, measured on, and what the final ones are measured on besides
    space:             what may be chosen, as a mapping (see each method); empty: the method's own
    study:             where trials are kept: a file, or the URL of a database; None: in memory
    out:               a folder to fill, there already; None: nothing is written
    how:               arguments of `weft.tune` that all trials share
    """

    source: Any = None
    data: Any = None
    valid: Any = None
    test: Any = None
    space: Mapping[str, Any] = field(default_factory=dict)
    study: str | None = None
    out: Path | None = None
    seed: int = 0
    how: Mapping[str, Any] = field(default_factory=dict)
    events: Events = field(default_factory=Events)

    def runs(self, method: str) -> list[Row]:
        """The measured runs. UsageError if there are none, or if anything is given that only tuning could use."""
        odd = [name for name in ("data", "valid", "test", "space", "study") if getattr(self, name)] + sorted(self.how)
        if odd:
            raise UsageError(f"{method} fits a law to measured runs and tunes nothing; it takes no {', '.join(odd)}", hint="weft methods search")
        if self.source is None:
            raise UsageError(f"{method} needs measured runs", hint=f"weft search {method} runs.jsonl")
        return read_rows(self.source)

    def tuned(self, method: str) -> tuple[Base, list[Row]]:
        """The base and the rows to tune on. UsageError if one of them is missing."""
        from ..base import Base

        if self.source is None or self.data is None:
            raise UsageError(f"{method} tunes a base on data and needs both", hint=f"weft search {method} BASE --data train.jsonl")
        return self.source if isinstance(self.source, Base) else Base.open(self.source), read_rows(self.data)


def columns(rows: Sequence[Row], names: Sequence[str]) -> Array:
    """Fields of rows as numbers (rows x names). InputError for the first that is none."""
    import numpy as np

    out = np.empty((len(rows), len(names)))
    for number, row in enumerate(rows):
        for column, name in enumerate(names):
            value = row.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                wrong = f"{name!r} is {value!r}" if name in row else f"there is no {name!r}{near(name, row, 'its fields are')}"
                raise InputError(f"row {number} of the runs: {wrong}; expected a number", hint="other names of fields are options: weft methods search")
            out[number, column] = value
    return out


def points(at: Sequence[Mapping[str, float]], names: Sequence[str]) -> Array:
    """Where a law is asked: one row for each mapping. UsageError if one lacks a variable or has another."""
    import numpy as np

    for each in at:
        if set(each) != set(names) or not all(value > 0 for value in each.values()):
            raise UsageError(f"at: expected positive numbers for {', '.join(names)}, got {dict(each)}", hint=f"-p at='[{{\"{names[0]}\": 1e9, ...}}]'")
    return np.asarray([[each[name] for name in names] for each in at], float).reshape(len(at), len(names))
