"""A handle: one delta on one model, its three facts and its tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import xp
from ..delta import INPUT, MODULE, SHARED, Delta, Entry
from ..errors import UsageError
from ..ops import chain
from ..ops import get as op_named
from ..ops.spec import OpEntry
from ..stored import FLOATS, Tensor, hold
from .live import CONTAINERS, MODULE_OP, Tensors
from .swap import hub_of
from .targets import Spot, Target

if TYPE_CHECKING:
    from .plan import State


@dataclass(eq=False)
class Weight:
    """The ops of one delta on one target."""

    target: Target
    ops: tuple[OpEntry, ...]


class Handle:
    """One delta on one model. `id` is the delta's id when it was attached."""

    def __init__(self, state: State, delta: Delta, mode: str, trainable: bool) -> None:
        self.id = delta.id
        self.mode = mode
        self._state, self._delta, self._trainable = state, delta, trainable
        self._active, self._dropout, self._live = True, 0.0, False
        self._weights: list[Weight] = []
        self._hosts: list[tuple[str, str, OpEntry]] = []  # (module path, MODULE_OP or INPUT_OP, op)
        self._home: dict[str, tuple[Tensors, str]] = {}
        self._local: dict[str, dict[str, str]] = {}
        self._spread: dict[str, Tensors] = {}
        self._trained: set[str] = set()

    def __repr__(self) -> str:
        how = "live" if self._live else "materialised"
        return f"<Handle {self.id[:12]}: {how}{'' if self._active else ', not active'}{', trainable' if self._trainable else ''}>"

    # --- three facts

    @property
    def active(self) -> bool:
        """Whether the delta has an effect. Setting it keeps its place in the order and its tensors."""
        return self._active

    @active.setter
    def active(self, on: bool) -> None:
        began, self._active = bool(on) and not self._active, bool(on)
        self._state.plan()
        if began:
            self.forget_ran()

    @property
    def trainable(self) -> bool:
        """Whether the tensors take gradients. Setting it True takes a materialised delta into the live form."""
        return self._trainable

    @trainable.setter
    def trainable(self, on: bool) -> None:
        if on and self.mode == "materialised":
            raise UsageError("a materialised delta cannot be trained", hint='attach it with mode="auto"')
        self._trainable = bool(on)
        self._state.plan()

    @property
    def dropout(self) -> float:
        """Probability with which ops that work on activations (`lowrank`) drop entries of their input while the module trains; default 0.

        There is nothing to drop where an op works on the weight instead (DoRA, experts, mode "functional"): setting it warns of that.
        """
        return self._dropout

    @dropout.setter
    def dropout(self, p: float) -> None:
        if not 0 <= p < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, got {p}")
        self._dropout = float(p)
        self._state.plan()
        if p and self._active and (dry := self._undropped()):
            named = f"{', '.join(dry[:8])}{', ...' if len(dry) > 8 else ''}"
            warnings.warn(f"dropout does nothing for {len(dry)} targets, whose ops work on weights and not on activations: {named}", stacklevel=2)

    @property
    def losses(self) -> list[torch.Tensor]:
        """Loss terms that ops of all deltas emitted in the last forward of the model."""
        return self._state.run.losses

    # --- tensors

    def tensors(self) -> dict[str, torch.Tensor]:
        """The delta's tensors on the model by key: parameters, and buffers for integers; none for those materialised.

        A shared tensor is one parameter, whatever the number of ops that use it.
        """
        return {key: getattr(home, name) for key, (home, name) in self._home.items()}

    def parameters(self) -> list[nn.Parameter]:
        """The tensors that take gradients."""
        return [t for t in self.tensors().values() if isinstance(t, nn.Parameter) and t.requires_grad]

    def delta(self) -> Delta:
        """The delta with the current values of what was trained, in float32 (`assign`: the target's dtype)."""
        if not self._trained:
            return self._delta
        raw = {ref.key for entry in self._entries() for op in entry.ops for o in op.walk() if o.op != chain.SUM and op_named(o.op).raw for ref in o.t.values()}
        values: dict[str, Tensor] = dict(self._delta.tensors)
        now = self.tensors()
        for key in (key for key in now if key in self._trained):  # in an order that all processes of a sharded model share
            value: Any = now[key].detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            like = xp.to_torch(self._delta.get(key)).dtype if key in raw else value.dtype
            values[key] = hold(value.to(like).cpu().clone())
        return replace(self._delta, tensors=values, path=None)

    def unused(self) -> list[str]:
        """Targets of which an active op has not run in any forward (outside torch.compile) since it was attached or made active."""
        return list(dict.fromkeys(target for target, _ in self._missed()))

    def ran(self) -> list[str]:
        """Targets whose ops have run, or are materialised."""
        missed = set(self.unused())
        return [target for target in self._delta.entries if target not in missed] if self._active else []

    def forget_ran(self) -> None:
        """Count from here on what runs."""
        for path, marks in self._marks():
            _ran(self._state.module(path)).difference_update(marks)

    def _missed(self) -> Iterator[tuple[str, Spot | None]]:
        """What has not run: the target, and the place for weights."""
        if not self._active:
            return
        for weight in self._weights if self._live else ():
            for spot in weight.target.spots:
                if not any(param in _ran(module) for _, module, param in spot.owners):
                    yield weight.target.name, spot
        for path, mark, _ in self._hosts:
            if mark not in _ran(self._state.module(path)):
                yield _target_of(path, mark, self._delta), None

    def _undropped(self) -> list[str]:
        """Targets with an op that knows dropout, but does not work on activations."""
        found = []
        for weight in self._weights:
            if any(op_named(op.op).drops for outer in weight.ops for op in outer.walk() if op.op != chain.SUM):
                places = [(path, param) for spot in weight.target.spots for path, _, param in spot.owners]
                if not all(self._on_activations(path, param) for path, param in places):
                    found.append(weight.target.name)
        return found

    def _on_activations(self, path: str, param: str) -> bool:
        hub = hub_of(self._state.module(path))
        own = self._spread.get(path)
        return hub is not None and any(step.tensors is own and step.context.param == param for step in hub[1].plan.steps)

    def _marks(self) -> Iterator[tuple[str, set[str]]]:
        for path, _, param in self._owners():
            yield path, {param}
        for path, mark, _ in self._hosts:
            yield path, {mark}

    def paths(self) -> set[str]:
        """The modules that ops run in."""
        return {path for path, _, _ in self._owners() if self._live} | {path for path, _, _ in self._hosts}

    def _owners(self) -> Iterator[tuple[str, nn.Module, str]]:
        for weight in self._weights:
            for spot in weight.target.spots:
                yield from spot.owners

    def _entries(self) -> Iterable[Entry]:
        return self._delta.entries.values()

    # --- the tensors' places

    def _users(self) -> dict[str, list[str]]:
        """Keys that run live, with the paths of the modules that use each."""
        users: dict[str, list[str]] = {}
        for weight in self._weights if self._live else ():
            for spot in weight.target.spots:
                for path, _, _ in spot.owners:
                    for op in weight.ops:
                        for key in op.tensor_keys():
                            users.setdefault(key, []).append(path)
        for path, _, op in self._hosts:
            for key in op.tensor_keys():
                users.setdefault(key, []).append(path)
        return {key: list(dict.fromkeys(paths)) for key, paths in users.items()}

    def settle(self) -> dict[str, Tensors]:
        """Make the modules that hold this delta's tensors, by path; values that are on the model already are kept."""
        users = self._users()
        if set(users) != set(self._home) or not self._home:
            old = self.tensors()
            self._spread, self._home, self._local = {}, {}, {}
            for key, paths in users.items():
                at_root = len(paths) > 1 and not isinstance(self._state.model, CONTAINERS)
                home = "" if at_root else paths[0]
                name = self._register(home, key)
                holder = self._holder(home)
                value = old[key] if key in old else self._load(key, self._state.module(paths[0]))
                if isinstance(value, nn.Parameter):
                    holder.register_parameter(name, value)
                else:
                    holder.register_buffer(name, value)
                self._home[key] = holder, name
                for path in paths:
                    if path != home:
                        self._holder(path).links[self._register(path, key)] = holder, name
        self._trainables()
        return self._spread

    def _holder(self, path: str) -> Tensors:
        if path not in self._spread:  # (making a module that is thrown away takes longer than all else here)
            self._spread[path] = Tensors()
        return self._spread[path]

    def _register(self, path: str, key: str) -> str:
        """A name for a key within one module, free of dots; the same in every layer, so that compiled code is shared."""
        head, _, tail = key.rpartition("//")
        name = f"{head.rpartition('.')[2]}_{tail}" if head else key.removeprefix(SHARED)
        name = "".join(c if c.isalnum() else "_" for c in name)
        names = self._local.setdefault(path, {})
        while name in names.values() or hasattr(self._holder(path), name):
            name += "_"
        names[key] = name
        return name

    def _load(self, key: str, user: nn.Module) -> torch.Tensor:
        value = xp.to_torch(self._delta.get(key)).clone().to(_device_of(user))
        return nn.Parameter(value, requires_grad=False) if value.is_floating_point() else value

    def _trainables(self) -> None:
        wanted = self._trainable_keys() if self._trainable else set()
        for key, value in self.tensors().items():
            if key in wanted and value.dtype in (torch.bfloat16, torch.float16):
                value.data = value.data.float()
            if isinstance(value, nn.Parameter):
                value.requires_grad_(key in wanted)
        self._trained |= wanted & set(self._home)

    def _trainable_keys(self) -> set[str]:
        keys = set()
        for entry in self._entries():
            for outer in entry.ops:
                for op in outer.walk():
                    chosen = op_named(op.op).trainable if op.op != chain.SUM else ()
                    keys |= {ref.key for name, ref in op.t.items() if chosen is None or name in chosen}
        return {key for key in keys if self._delta.tensors[key].dtype in FLOATS}


def _target_of(path: str, mark: str, delta: Delta) -> str:
    return MODULE + path if mark == MODULE_OP else next(target for target in delta.entries if target.startswith(INPUT))


def _ran(m: nn.Module) -> set[str]:
    found = hub_of(m)
    return found[1].ran if found else set()


def _device_of(m: nn.Module) -> torch.device:
    """Where a module computes, also when its parameters are offloaded between calls."""
    first = next((p for p in m._parameters.values() if p is not None), None)
    first = next(iter(m.parameters()), None) if first is None else first
    if first is not None and first.device.type != "meta":
        return first.device
    return torch.device(getattr(getattr(m, "_hf_hook", None), "execution_device", None) or "cpu")
