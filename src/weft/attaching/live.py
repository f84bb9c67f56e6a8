"""How a module runs while deltas are attached: the hidden tensors, and the three ways through `forward`.

`weft.attaching.plan` decides what runs where and writes it down as a `Plan` for each module; this file carries plans out, and
`weft.attaching.swap` makes modules run them.

* fast:       y = the module's own forward; then each op changes y.
* functional: w' = the ops on w in float32, given to the functional of a Linear, Conv1D, Embedding or convolution.
* shadow:     for every other module w' stands in its `__dict__`, before the parameter, while its own forward runs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import WeftError
from ..ops import chain, layout
from ..ops.op import Op
from ..ops.spec import At, OpEntry
from .quantized import QuantizedLinear, values

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that take every child for one of theirs: nothing can be registered on them."""

FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules whose forward reads the weights of their children without calling them."""

MODULE_OP, INPUT_OP = "", "@"
"""What stands for an op on the module itself, or on the model's input, where others have a parameter's name."""


TASK = "task"
"""The input that names the tasks of the rows. It never reaches the model's own forward."""


def task_names(task: str | Sequence[str] | torch.Tensor) -> tuple[str, ...]:
    """Names of tasks from one name, several, or a tensor of `weft.engine.data.tasks_of`."""
    if isinstance(task, torch.Tensor):
        return tuple(bytes(row).rstrip(b"\0").decode() for row in task.tolist())
    return (task,) if isinstance(task, str) else tuple(task)


# --- what is registered on the model, and hides


class Hidden(nn.Module):
    """A module whose tensors move and train with the model but are not in its state dict."""

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class Tensors(Hidden):
    """The tensors of one delta that one module uses, under short local names; `links` leads to those kept elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.links: dict[str, tuple[Tensors, str]] = {}

    def get(self, name: str) -> torch.Tensor:
        link = self.links.get(name)
        if link is not None:
            return link[0].get(link[1])
        value: torch.Tensor = getattr(self, name)
        return value


class _Lock:
    """A lock that deepcopy and pickle replace by a new one."""

    def __init__(self) -> None:
        self.inner = threading.RLock()

    def __reduce__(self) -> Any:
        return _Lock, ()


class Deltas(Hidden, nn.ModuleDict):
    """The child `delta` of a module: a `Tensors` for each delta, by the first 12 hex digits of its id, and the plan."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = Plan()
        self.ran: set[str] = set()
        self.lock = _Lock()


@dataclass(eq=False)
class Run:
    """Facts about the current call of the whole model, kept until the next one (recomputation reads them again)."""

    phase: str | None = None
    mask: Any = None
    losses: list[Any] = field(default_factory=list)
    tasks: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    """The tasks of the rows where a call names none (`weft.attaching.set_tasks`)."""


@dataclass(eq=False)
class Context:
    """What an op's `forward` may know beyond its input and output.

    param:  the parameter it changes ("weight", ...); "" for ops on modules, "@" for ops on the input
    phase:  "prefill" or "decode"; None where the model has no such thing. Known when an op on a module or the input is attached
    mask:   the model's attention mask (batch, tokens), or None. Known in the same cases
    losses: terms that ops add to the loss; a new list at every call of the model
    tasks:  names of the rows' tasks, one for each row or one for all; empty where none were named
    """

    param: str = ""
    dropout: float = 0.0
    module: nn.Module | None = None
    run: Run = field(default_factory=Run)

    @property
    def phase(self) -> str | None:
        return self.run.phase

    @property
    def mask(self) -> Any:
        return self.run.mask

    @property
    def losses(self) -> list[Any]:
        return self.run.losses

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.run.tasks

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """x with dropout while training, as the delta's handle asks; x itself otherwise and for token ids."""
        if not self.dropout or self.module is None or not self.module.training or not x.is_floating_point():
            return x
        return F.dropout(x, self.dropout, True)


# --- plans


@dataclass(eq=False)
class Step:
    """One op that works on activations."""

    op: Op
    entry: OpEntry
    cfg: Mapping[str, Any]
    tensors: Tensors
    context: Context

    def fields(self, like: torch.Tensor) -> dict[str, Any]:
        """The op's tensors in the dtype of `like`, references followed."""
        return chain.resolve(self.entry, self.tensors.get, like)


@dataclass(eq=False)
class Piece:
    """The ops on one checkpoint tensor, as far as they change one live parameter.

    at:     the view of the parameter that the checkpoint tensor is
    stages: (ops, tensors) of each delta, in order
    blank:  the ops start from zeros (added and replaced tensors)
    part:   the view of the checkpoint tensor that lies here, when transformers splits it
    peers:  then, all its places: (module, parameter, at, part)
    """

    at: At | None
    stages: Sequence[tuple[Sequence[OpEntry], Tensors]]
    blank: bool = False
    part: At | None = None
    peers: Sequence[tuple[nn.Module, str, At | None, At | None]] = ()
    shape: tuple[int, ...] = ()

    def new(self, w: torch.Tensor) -> torch.Tensor:
        """The parameter after the ops; w is float32 or float64."""
        part = self._whole(w) if self.peers else self.at.get(w) if self.at else w
        if self.blank:
            part = torch.zeros_like(part)
        for ops, tensors in self.stages:
            part = chain.apply_chain(part, ops, tensors.get)
        if self.part is not None:
            part = self.part.get(part)
        new: torch.Tensor = self.at.set(w, part) if self.at else part
        return new

    def _whole(self, w: torch.Tensor) -> torch.Tensor:
        whole = w.new_zeros(self.shape)
        for module, param, at, part in self.peers:
            value = values(tensor_of(module, param)).to(w.dtype)
            value = at.get(value) if at else value
            whole = part.set(whole, value) if part else value
        return whole


@dataclass(eq=False)
class Shadow:
    """A parameter that is replaced while the forward of the plan's module runs."""

    owner: nn.Module
    hub: Deltas
    param: str
    pieces: Sequence[Piece]


@dataclass(eq=False)
class Plan:
    """What one module's forward does. `marks` are the parameters that are known to be used when it runs."""

    weights: Mapping[str, Sequence[Piece]] = field(default_factory=dict)
    shadows: Sequence[Shadow] = ()
    steps: Sequence[Step] = ()
    inputs: Sequence[Step] = ()
    run: Run | None = None
    marks: frozenset[str] = frozenset()


def tensor_of(module: nn.Module, name: str) -> torch.Tensor:
    """A module's own parameter or buffer, whatever stands before it."""
    value = module._parameters.get(name)
    if value is None:
        value = module._buffers.get(name)  # type: ignore[assignment]
    if value is None:
        raise WeftError(f"the module {type(module).__name__} lost its tensor {name!r} while a delta was attached to it")
    return value


def rewritten(module: nn.Module, param: str, pieces: Sequence[Piece]) -> torch.Tensor:
    """w' of a parameter: computed in float32 (float64 stays), whatever autocast says, and rounded once to its dtype."""
    w = tensor_of(module, param)
    if torch.is_autocast_enabled(w.device.type):
        with torch.autocast(w.device.type, enabled=False):
            return _rewritten(w, pieces)
    return _rewritten(w, pieces)


def _rewritten(w: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
    new = values(w)
    new = new if new.dtype == torch.float64 else new.float()
    for piece in pieces:
        new = piece.new(new)
    return new.to(w.dtype)


# --- running


def run(m: Any, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of every swapped class; `inner` is the original one."""
    hub: Deltas = m._modules[m._weft_child]
    plan = hub.plan
    if not torch.compiler.is_compiling():
        hub.ran.update(plan.marks)
    if plan.run is None:
        return _core(m, inner, hub, args, kwargs)
    names = m._weft_inputs
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    task = None if TASK in names else kwargs.pop(TASK, None)  # a model may have an input of that name
    plan.run.tasks = plan.run.told if task is None else task_names(task)
    _begin(plan.run, kwargs)

    def call(**inputs: Any) -> Any:
        return _core(m, inner, hub, args[len(names) :], inputs)

    for step in plan.inputs:
        call = functools.partial(_enter, step, m, call)
    return call(**kwargs)


def _enter(step: Step, m: nn.Module, call: Callable[..., Any], **inputs: Any) -> Any:
    # an input op wraps the call: its x is the model's keyword inputs, its y the function that runs the model on such
    return step.op.forward(m, inputs, call, step.fields(torch.empty(0)), step.cfg, step.context)


def _begin(now: Run, inputs: Mapping[str, Any]) -> None:
    cache = inputs.get("past_key_values")
    now.phase = "decode" if cache is not None and cache.get_seq_length() > 0 else "prefill"
    now.mask = inputs.get("attention_mask")
    now.losses = []


def _core(m: Any, inner: Callable[..., Any], hub: Deltas, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plan = hub.plan
    if plan.shadows:
        if torch.compiler.is_compiling():
            y = _shadowed(plan.shadows, m, inner, args, kwargs)
        else:
            with hub.lock.inner:
                y = _shadowed(plan.shadows, m, inner, args, kwargs)
    elif plan.weights:
        y = _functional(m, _first(args, kwargs), {param: rewritten(m, param, pieces) for param, pieces in plan.weights.items()})
    else:
        y = inner(m, *args, **kwargs)
    if not plan.steps:
        return y
    x = _first(args, kwargs)
    out = y if isinstance(y, torch.Tensor) else next(iter(y.values())) if isinstance(y, dict) else y[0]
    for step in plan.steps:
        out = step.op.forward(m, x, out, step.fields(out), step.cfg, step.context)
    if isinstance(y, torch.Tensor):
        return out
    if isinstance(y, dict):  # transformers' outputs are ordered dictionaries
        return type(y)(**{**y, next(iter(y)): out})
    return (out, *y[1:])


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def exact_layout(original: type[nn.Module], m: nn.Module) -> str | None:
    """The layout of a module whose forward is known to the letter: a subclass may scale what it looks up, for one."""
    forward = original.forward
    known = forward in (nn.Linear.forward, QuantizedLinear.forward, nn.Embedding.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    if known or (forward.__module__, forward.__qualname__) == ("transformers.pytorch_utils", "Conv1D.forward"):
        return layout.of(m) or ("conv" if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None)
    return None


def _functional(m: Any, x: torch.Tensor, new: Mapping[str, torch.Tensor]) -> Any:
    weight = new.get("weight", m.weight)
    if isinstance(m, nn.Embedding):
        return F.embedding(x, weight, m.padding_idx, None, m.norm_type, m.scale_grad_by_freq, m.sparse)
    weight, bias = values(weight), new.get("bias", m.bias)
    if isinstance(m, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return m._conv_forward(x, weight, bias)
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], m.nf)


def _shadowed(shadows: Sequence[Shadow], m: nn.Module, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    before = []
    try:
        for shadow in shadows:
            new = rewritten(shadow.owner, shadow.param, shadow.pieces)
            if not torch.compiler.is_compiling():
                if _watching:
                    new = _Watched.over(new, shadow)
                else:
                    shadow.hub.ran.add(shadow.param)
            around = shadow.owner.__dict__
            before.append((around, shadow.param, around.get(shadow.param)))
            around[shadow.param] = new
        return inner(m, *args, **kwargs)
    finally:
        for around, param, old in reversed(before):
            if old is None:
                del around[param]
            else:
                around[param] = old


_watching = False


class watching:
    """Inside, a shadow counts as used when something computes with it, not already when its module runs."""

    def __enter__(self) -> None:
        global _watching
        _watching = True

    def __exit__(self, *_: object) -> None:
        global _watching
        _watching = False


class _Watched(torch.Tensor):
    """A tensor that notes its first use, and whose results are plain."""

    shadow: Shadow

    @classmethod
    def over(cls, new: torch.Tensor, shadow: Shadow) -> _Watched:
        watched = new.as_subclass(cls)
        watched.shadow = shadow
        return watched

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        queue = [args, kwargs or {}]
        while queue:
            value = queue.pop()
            if isinstance(value, cls):
                value.shadow.hub.ran.add(value.shadow.param)
            elif isinstance(value, list | tuple):
                queue.extend(value)
            elif isinstance(value, dict):
                queue.extend(value.values())
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
