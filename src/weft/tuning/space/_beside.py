"""What spaces share whose ops run beside linear modules: the modules, where they are in depth, and the tasks of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import UsageError
from ...sites import all_sites, sites
from ..objective import Objective
from . import Job


@dataclass(frozen=True)
class Linear:
    """A linear module. path: in the live model; shape: (output width, input width); layer, layers: where it is in its stack, None outside."""

    path: str
    shape: tuple[int, int]
    layer: int | None
    layers: int

    @property
    def target(self) -> str:
        """The target of ops beside it."""
        return f"@module/{self.path}"


def linears(job: Job, select: str | Sequence[str], exclude: str | Sequence[str] = ()) -> list[Linear]:
    """The linear modules whose weights `select` points at. New heads are left out; UsageError if nothing is left."""
    deepest: dict[str, int] = {}
    for site in all_sites(job.model):
        if site.layer is not None:
            deepest[site.stack] = max(deepest.get(site.stack, 0), site.layer + 1)
    found = []
    for site in sites(job.model, select, exclude, kinds=("linear", "conv1d")):
        if any(place.name in job.head for place in job.names.stored(site.name)):
            continue
        out, into = site.shape if site.kind == "linear" else site.shape[::-1]
        found.append(Linear(site.module, (out, into), site.layer, deepest.get(site.stack, 0)))
    if not found:
        raise UsageError(f"no linear module of the base belongs to what {select!r} selects", hint="choose other targets")
    return found


def named_tasks(job: Job) -> list[str]:
    """The tasks of the data, sorted; batches name them from now on. InputError if a row has none."""
    if not isinstance(job.goal, Objective):
        raise UsageError("this space tells tasks apart, and the objective knows none", hint="rows with a field 'task'")
    return job.goal.tasks()
