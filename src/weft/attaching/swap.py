"""The class swap: a module with a delta gets a subclass of its own class, and a hidden child.

Parameters of the model are never replaced, so detaching is: take the child away, put the class back.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import sys
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

from torch import nn

from ..errors import MismatchError, WeftError
from .live import Deltas, Plan, Tensors, run


class Attached:
    """In the bases of every swapped class. `_weft_key` is (original class, kinds of ops, name of the hidden child)."""

    _weft_key = None
    _weft_child = "delta"
    _weft_inputs = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        if type(self).__dict__.get("_weft_key") is None or not isinstance(made, tuple) or made[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return made
        return (_blank, self._weft_key, *made[2:])


def _blank(original: type[nn.Module], kinds: tuple[str, ...], child: str) -> Any:
    """An instance without state: where unpickling and deepcopy start."""
    cls = attached_class(original, kinds, child)
    return cls.__new__(cls)


_CLASSES: dict[Any, type[nn.Module]] = {}


def attached_class(original: type[nn.Module], kinds: tuple[str, ...], child: str) -> type[nn.Module]:
    """The subclass that runs plans: one for each module type, kinds of ops and child name, with the original's name."""
    key = (original, kinds, child)
    if key not in _CLASSES:
        inner = original.forward

        @functools.wraps(inner)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return run(self, inner, args, kwargs)

        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        inputs = [name for name, parameter in inspect.signature(inner).parameters.items() if parameter.kind in positional][1:]
        members: dict[str, Any] = {
            "forward": forward,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_weft_key": key,
            "_weft_child": child,
            "_weft_inputs": tuple(inputs),
        }
        metaclass: Any = type(original)
        _CLASSES[key] = metaclass(original.__name__, (Attached, original), members)
    return _CLASSES[key]


def original_class(m: nn.Module) -> type[nn.Module]:
    """The class a module has without deltas."""
    cls: Any = type(m)
    return cls._weft_key[0] if issubclass(cls, Attached) else cls  # type: ignore[no-any-return]


def require_unsharded(model: nn.Module) -> None:
    """WeftError for a model with parts that `fully_shard` has taken over: their parameters are managed elsewhere now."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded where nobody imported it
    sharded = [name for name, m in model.named_modules() if fsdp is not None and isinstance(m, fsdp.FSDPModule)]
    if sharded:
        raise WeftError(
            f"the model was sharded ({sharded[0] or 'the whole'}); deltas can no longer be attached or detached",
            hint="attach first, then call fully_shard; handle.delta() has the values; for other deltas build the model again",
        )


def hub_of(m: nn.Module) -> tuple[str, Deltas] | None:
    """The hidden child of a module and its name, if it has one."""
    return next(((name, child) for name, child in m._modules.items() if type(child) is Deltas), None)


def install(m: nn.Module, tensors: Mapping[str, Tensors], plan: Plan | None, kinds: Sequence[str]) -> None:
    """Make `tensors` the deltas on a module, and `plan` what it runs (None: it keeps its own class); nothing at all: restore it."""
    original = original_class(m)
    found = hub_of(m)
    if found is None:
        child = "delta"
        while hasattr(m, child):
            child += "_"
        found = child, Deltas()
        m._modules[child] = found[1]
    child, hub = found
    hub._modules.clear()
    hub._modules.update(tensors)
    hub.plan = plan or Plan()
    if not tensors and plan is None:
        del m._modules[child]
    key = None if plan is None else (original, tuple(kinds), child)
    if key != getattr(type(m), "_weft_key", None):  # a class that fully_shard put over ours has our key, and stays
        m.__class__ = original if key is None else attached_class(*key)
        _rebind(m)


def _rebind(m: nn.Module) -> None:
    """accelerate's dispatch hooks keep the bound `forward` of the class that a module had; give them the present one."""
    for name in ("_old_forward", "forward"):
        bound = m.__dict__.get(name)
        if isinstance(bound, MethodType) and bound.__self__ is m:
            m.__dict__[name] = MethodType(type(m).forward, m)


def require_plain(m: nn.Module, path: str) -> None:
    """MismatchError for modules whose forward or parameters are already somebody else's."""
    require_unparametrized(m, path)
    where = f"the module {path or '(the model)'} ({type(m).__name__})"
    own = m.__dict__.get("forward")
    if own is not None and "_old_forward" not in m.__dict__ and not (isinstance(own, MethodType) and own.__func__ is type(m).forward):
        raise MismatchError(f"{where} carries a `forward` of its own, which would run instead of the delta's ops", hint='attach with mode="materialised"')
    if any(hasattr(p, "device_mesh") for p in m._parameters.values()):
        raise MismatchError(f"{where} is sharded already", hint="attach first, then call fully_shard")


def require_unparametrized(m: nn.Module, path: str) -> None:
    """MismatchError for modules that torch.nn.utils.parametrize (weight norm and the like) has changed."""
    if nn.utils.parametrize.is_parametrized(m) or isinstance(m, nn.utils.parametrize.ParametrizationList):
        raise MismatchError(
            f"the module {path or '(the model)'} ({type(m).__name__}) has parametrizations from torch.nn.utils",
            hint="torch.nn.utils.parametrize.remove_parametrizations first",
        )
