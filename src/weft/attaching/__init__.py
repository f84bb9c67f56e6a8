"""Put deltas on a live model and take them off again, bit for bit.

    handle = attach(model, delta)                     # inference: written in place, the bytes that folding would give
    handle = attach(model, delta, trainable=True)     # training: gradients reach the delta's tensors only
    handle.active = False                             # as if it were not there
    detach(model, delta)                              # any order; the model is as it was

Three separate facts about a delta: it is attached (its place in the order is fixed), it is active (it has an effect), it
is trainable (its tensors take gradients). Parameters of the model are not replaced and their `requires_grad` is left as it is.

While attached, the names in `state_dict()`, strict loading and `save_pretrained` are the base's. `isinstance(m, nn.Linear)` holds;
`type(m) is nn.Linear` does not. Attach after accelerate's dispatch and before `fully_shard`. One thread at a time may run a model
that has ops on modules or on the input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

from ..base import Base
from ..delta import Delta
from ..errors import UsageError, WeftError, near
from .handle import Handle
from .live import Context, task_names, watching
from .plan import State

if TYPE_CHECKING:
    from ..names import NameMap

__all__ = ["Context", "Handle", "attach", "attached", "check_ran", "detach", "handles", "probe", "set_tasks"]

Mode = Literal["auto", "fast", "functional", "materialised"]
MODES = ("auto", "fast", "functional", "materialised")
_STATE = "_weft"


@overload
def attach(
    model: nn.Module, deltas: Delta, *, base: Base | None = None, mode: Mode = "auto", trainable: bool = False, names: NameMap | None = None
) -> Handle: ...
@overload
def attach(
    model: nn.Module, deltas: Sequence[Delta], *, base: Base | None = None, mode: Mode = "auto", trainable: bool = False, names: NameMap | None = None
) -> list[Handle]: ...
def attach(
    model: nn.Module,
    deltas: Delta | Sequence[Delta],
    *,
    base: Base | None = None,
    mode: Mode = "auto",
    trainable: bool = False,
    names: NameMap | None = None,
) -> Handle | list[Handle]:
    """Put deltas on a model, in order, after those already there. Returns a handle for each.

    base:      the checkpoint the model was built from; default: the model itself (the touched tensors are then hashed)
    mode:      "materialised": w' is written in place, with the bits of `fold`, and the original bytes are kept on the CPU;
               "functional": w' is computed in each forward; "fast": ops work on activations, UsageError where one cannot;
               "auto": materialised unless trainable, then fast where every op of a module can, functional elsewhere
    trainable: tensors take gradients (float32 masters, whatever the model's dtype); only what each op declares trainable
    names:     the map from checkpoint names to live ones, if it is at hand

    MismatchError if the base is another one, a delta it was made over is missing, a target has no place in the model or
    another shape, or a module cannot be changed (parametrized, sharded); then nothing has changed.
    """
    if mode not in MODES:
        raise UsageError(f"unknown mode {mode!r}{near(mode, MODES)}")
    if trainable and mode == "materialised":
        raise UsageError("a materialised delta cannot be trained", hint='mode="auto"')
    several: list[Any] = [deltas] if isinstance(deltas, Delta | str | PathLike) else list(deltas)
    wrong = [given for given in (*several, base) if isinstance(given, str | PathLike)]
    if wrong:
        raise UsageError(f"attach takes deltas and a base, not paths, got {str(wrong[0])!r}", hint="weft.Delta.load(PATH), weft.Base.open(PATH)")
    state = _state_of(model) or State(model)
    new = state.add(several, base, names, mode, trainable)
    model.__dict__[_STATE] = state
    return new[0] if isinstance(deltas, Delta) else new


def detach(model: nn.Module, which: Delta | Handle | str | None = None) -> None:
    """Take one delta (by itself, its handle, or its id or the start of it) or all off a model, in any order.

    Classes, children, forward methods and bytes are as before. UsageError if it is not attached; WeftError if the model was sharded since.
    """
    state = _state_of(model)
    if state is None:
        if which is not None:
            raise UsageError(f"{_name_of(which)[:12]} is not attached; nothing is")
        return
    gone = list(state.handles) if which is None else [state.find(_name_of(which))]
    state.remove(gone)
    if not state.handles:
        del state.model.__dict__[_STATE]


def attached(model: nn.Module) -> list[str]:
    """Ids of the deltas on a model, in the order of application."""
    return [handle.id for handle in handles(model)]


def handles(model: nn.Module) -> list[Handle]:
    """The handles of the deltas on a model, in the order of application (those of its own for a deep copy)."""
    state = _state_of(model)
    return list(state.handles) if state else []


def set_tasks(model: nn.Module, tasks: str | Sequence[str] = ()) -> None:
    """Say which tasks the rows belong to where a call does not: one name for each row, or one for all; nothing: none.

    A model with ops on modules also takes them with each call: `model(ids, task="qa")`, or a list. Only ops that differ by task
    ask for them (`by_task`); a model without deltas has no use for them.
    """
    state = _state_of(model)
    if state is not None:
        state.run.told = state.run.tasks = task_names(tasks)


def check_ran(model: nn.Module, *, error: bool = True) -> None:
    """Raise WeftError (or warn) if an active op has not run in any forward so far: it has no effect on the model.

    Forwards inside `torch.compile` do not count: run once without. `probe` can also mend it.
    """
    missed = [f"{target} ({handle.id[:12]})" for handle in handles(model) for target in handle.unused()]
    if not missed:
        return
    message = f"{len(missed)} attached ops did not run: {', '.join(missed[:8])}{', ...' if len(missed) > 8 else ''}"
    if error:
        raise WeftError(message, hint='weft.attaching.probe(model, run) finds who reads the weight; or attach with mode="materialised"')
    warnings.warn(message, stacklevel=2)


def probe(model: nn.Module, call: Callable[[], Any]) -> None:
    """Run `call` (one forward of the model) until every active op is seen to run; WeftError if one never does.

    The weight of an op that did not run is read by other code than its module's forward (fused attention, for one): it is
    then put in place around the parent's forward, next around the parent's parent, and so on.
    """
    state = _state_of(model)
    if state is None:
        return
    while True:
        for handle in state.handles:
            handle.forget_ran()
        with watching():
            call()
        missed = [item for handle in state.handles for item in handle._missed()]
        if not missed:
            return
        state.widen(missed)


def _state_of(model: nn.Module) -> State | None:
    return getattr(model, _STATE, None)


def _name_of(which: Delta | Handle | str) -> str:
    return which if isinstance(which, str) else which.id
