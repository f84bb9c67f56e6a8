"""Deltas that differ by task, for one of their tasks: what ops beside modules do there is a low-rank change of the modules' weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..delta import MODULE, Builder, Delta
from ..errors import MismatchError
from ..ops import by_task

if TYPE_CHECKING:
    from torch import nn

    from ..base import Base
    from ..names import NameMap


def differs(delta: Delta) -> bool:
    """Whether what a delta does depends on the task of a row."""
    return any(op.op == "by_task" for target, entry in delta.entries.items() if target.startswith(MODULE) for op in entry.ops)


def of_task(delta: Delta, base: Base, task: str) -> Delta:
    """The delta as it is for one task: every `by_task` op becomes a `lowrank` of its module's weight, the rest stays.

    MismatchError if the delta has no such op, does not belong to the base, or the weight is stored in parts; InputError for a task
    that the delta does not know. `parents` is the delta.
    """
    from ..names import NameMap

    if not differs(delta):
        raise MismatchError(f"the delta {delta.id[:12]} does not differ by task", hint="it is what it is for every task")
    delta.require_base(base, on=delta.over)
    model = base.model([delta])
    names = NameMap.of(base, model, [delta])
    build, rest = Builder(base), dict(delta.entries)
    for target, entry in delta.entries.items():
        for op in entry.ops if target.startswith(MODULE) else ():
            if op.op == "by_task":
                t, cfg = {name: delta.get(ref.key) for name, ref in op.t.items()}, by_task.OP.config(op.cfg)
                beside(build, model, names, target, *by_task.factors(t, cfg, task), cfg["scale"])
        kept = tuple(op for op in entry.ops if op.op != "by_task")
        if len(kept) < len(entry.ops):
            rest[target] = replace(entry, ops=kept)
            if not kept:
                del rest[target]
    used = {key for entry in rest.values() for op in entry.ops for key in op.tensor_keys()}
    common = replace(delta, entries=rest, tensors={key: value for key, value in delta.tensors.items() if key in used}, path=None)
    made = common.then(build.done())
    return replace(made, config=delta.config, over=delta.over, parents=(delta.id,), recipe={"verb": "of-task", "task": task}, notes={}, path=None)


def beside(build: Builder, model: nn.Module, names: NameMap, target: str, a: Any, b: Any, scale: float) -> None:
    """Put scale * b a, beside the linear module that `target` names, as a `lowrank` of its stored weight. a (r x input), b (output x r)."""
    from ..ops import layout

    path = target.removeprefix(MODULE)
    module = model.get_submodule(path)
    places = names.stored(f"{path}.weight")
    if len(places) != 1 or places[0].at is not None or places[0].part is not None:
        stored = ", ".join(place.name for place in places) or "nowhere"
        raise MismatchError(f"{path}.weight is not one tensor of the checkpoint, but {stored}: a low-rank change of it has no place")
    fields = {"A": b.T.copy(), "B": a.T.copy()} if layout.of(module) == "conv1d" else {"A": a, "B": b}
    build.put(places[0].name, "lowrank", fields, scale=scale)
