"""What runs where: all deltas on one model, their order, and the plan of each module that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..base import Base
from ..delta import INPUT, MODULE, Delta
from ..errors import MismatchError, UsageError, WeftError, near
from ..ops import chain
from ..ops import get as op_named
from ..ops.spec import OpEntry
from .handle import Handle, Weight
from .live import CONTAINERS, FUSED, INPUT_OP, MODULE_OP, Context, Piece, Plan, Run, Shadow, Step, Tensors, exact_layout
from .swap import hub_of, install, original_class, require_plain, require_unparametrized, require_unsharded
from .targets import Beneath, Spot, Target, Targets

if TYPE_CHECKING:
    from ..names import NameMap


@dataclass(eq=False)
class _Draft:
    """What is known of one module while the plans are made."""

    weights: dict[str, dict[tuple[int, int], Piece]] = field(default_factory=dict)
    fast: list[Step] = field(default_factory=list)
    after: list[Step] = field(default_factory=list)
    inputs: list[Step] = field(default_factory=list)
    shadows: list[Shadow] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    marks: set[str] = field(default_factory=set)
    all_fast: bool = True


class State:
    """All deltas on one model: the order, the targets and the plans. Lives in the model's `__dict__`."""

    def __init__(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            if hub_of(module) is not None:
                raise UsageError(f"a part of this model ({path or 'the whole'}) has deltas that were attached to another", hint="detach them there first")
        self.model = model
        self.handles: list[Handle] = []
        self.targets = Targets()
        self.run = Run()
        self.scopes: dict[tuple[str, str], str] = {}
        self.paths: set[str] = set()
        self._found: dict[str, nn.Module] | None = None

    def module(self, path: str) -> nn.Module:
        """The module at a path, kept while a plan is made: walking there takes torch longer than much else that is done for a module."""
        if self._found is None:
            return self.model.get_submodule(path)
        if path not in self._found:
            self._found[path] = self.model.get_submodule(path)
        return self._found[path]

    def find(self, id: str) -> Handle:
        found = [handle for handle in self.handles if id and handle.id.startswith(id)]
        if len(found) != 1:
            known = ", ".join(handle.id[:12] for handle in self.handles)
            raise UsageError(f"{id[:12]!r} is {'not attached' if not found else 'the start of several ids'}; attached: {known}")
        return found[0]

    # --- adding and removing

    def add(self, deltas: Sequence[Delta], base: Base | None, names: NameMap | None, mode: str, trainable: bool) -> list[Handle]:
        from ..names import NameMap

        require_unsharded(self.model)
        live_base = base if base is not None else Base.of(self.model)
        under: Any = base if base is not None else Beneath(live_base, self.targets)
        ids = [handle.id for handle in self.handles]
        for delta in deltas:
            if delta.id in ids:
                raise UsageError(f"the delta {delta.id[:12]} is attached already")
            self._require_plain_names(delta)
            delta.require_base(under, on=ids)
            ids.append(delta.id)
        names = names or NameMap.of(live_base, self.model, [*(handle._delta for handle in self.handles), *deltas])
        before = list(self.handles)
        try:
            for delta in deltas:
                self.handles.append(self._resolved(delta, names, mode, trainable))
            self.plan()
        except BaseException:
            self.handles = before
            self.plan()
            raise
        new = self.handles[len(before) :]
        for handle in new:  # what ran on the same parameter before was another delta
            handle.forget_ran()
        return new

    def _resolved(self, delta: Delta, names: NameMap, mode: str, trainable: bool) -> Handle:
        """A handle whose targets are found in the model."""
        handle = Handle(self, delta, mode, trainable)
        seen: dict[Target, str] = {}
        for name, entry in delta.entries.items():
            if name.startswith(MODULE):
                handle._hosts += [(self._host(name), MODULE_OP, op) for op in entry.ops]
            elif name.startswith(INPUT):
                self._require_input(name)
                handle._hosts += [("", INPUT_OP, op) for op in entry.ops]
            else:
                target = self.targets.find(delta, name, self.model, names)
                if target is None:
                    continue
                if target in seen:
                    _require_same(delta, seen[target], name)
                elif entry.ops:
                    handle._weights.append(Weight(target, entry.ops))
                seen[target] = name
        if mode == "fast":
            slow = [w.target.name for w in handle._weights if not all(_is_fast(w, module, param) for s in w.target.spots for _, module, param in s.owners)]
            if slow:
                raise UsageError(f"no fast way for {len(slow)} targets of {delta.id[:12]}: {', '.join(slow[:8])}", hint='mode="auto" or "functional"')
        return handle

    def _require_plain_names(self, delta: Delta) -> None:
        """Parametrized modules keep their weights under other names, so say it before a name is missed."""
        modules = dict(self.model.named_modules())
        for name in delta.entries:
            path = name.rpartition(".")[0]
            if not name.startswith("@") and path in modules:
                require_unparametrized(modules[path], path)

    def _host(self, target: str) -> str:
        path = target.removeprefix(MODULE)
        try:
            module = self.module(path)
        except AttributeError:
            raise MismatchError(f"{target}: the model has no module {path!r}{near(path, [name for name, _ in self.model.named_modules()])}") from None
        if isinstance(module, CONTAINERS):
            raise MismatchError(f"{target}: an op cannot sit on a container ({type(module).__name__})", hint="name the module inside it whose output is meant")
        return path

    def _require_input(self, target: str) -> None:
        model: Any = self.model
        if isinstance(model, CONTAINERS) or not hasattr(model, "get_input_embeddings"):
            raise MismatchError(f"{target}: {type(model).__name__} has no get_input_embeddings()", hint="attach it to a transformers model")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise MismatchError(f"{target}: {type(model).__name__} has an encoder and a decoder; input ops take models with one sequence")

    def remove(self, gone: Sequence[Handle]) -> None:
        require_unsharded(self.model)
        self.handles = [handle for handle in self.handles if handle not in gone]
        self.plan()

    # --- planning: everything about the model's present form follows from `handles`

    def plan(self) -> None:
        """Write what is materialised, and give each module its plan, hidden tensors and class."""
        self._found = {}
        try:
            self._make_plan()
        finally:
            self._found = None

    def _make_plan(self) -> None:
        self._choose()
        self._write()
        drafts = self._drafts()
        tensors: dict[str, dict[str, Tensors]] = {}
        for handle in self.handles:
            for path, holder in handle._spread.items():
                tensors.setdefault(path, {})[handle.id[:12]] = holder
        paths = set(drafts) | set(tensors)
        for path in self.paths - paths:
            install(self.module(path), {}, None, ())
        for path in paths:  # first the children, so that plans find them
            install(self.module(path), tensors.get(path, {}), Plan() if path in drafts else None, sorted(drafts[path].kinds) if path in drafts else ())
        self.paths = paths
        for path, draft in drafts.items():
            self._finish(path, draft, drafts)
        for path, draft in drafts.items():
            self._hub(path).plan = self._final(path, draft)

    def _hub(self, path: str) -> Any:
        found = hub_of(self.module(path))
        return found[1] if found else None

    def _choose(self) -> None:
        """Which deltas run live: those that ask for it, and those that come after a live one on the same tensor."""
        busy: set[Target] = set()
        for handle in self.handles:
            mine = {weight.target for weight in handle._weights}
            written = handle.mode == "materialised" or (handle.mode == "auto" and not handle._trainable)
            possible = not mine & busy and all(target.writable for target in mine)
            if handle.mode == "materialised" and not possible:
                raise UsageError(
                    f"{handle.id[:12]} cannot be materialised: a tensor of it is not in memory here, or a delta before it runs live", hint='mode="auto"'
                )
            handle._live = not (written and possible)
            if handle._live:
                busy |= mine
            for path in handle.paths():
                if path not in self.paths:  # sharding comes later, and is fine for what is on the model already
                    require_plain(self.module(path), path)
            handle.settle()

    def _write(self) -> None:
        stages: dict[Target, list[tuple[Handle, Weight]]] = {}
        for handle in self.handles:
            if handle._active and not handle._live:
                for weight in handle._weights:
                    stages.setdefault(weight.target, []).append((handle, weight))
        deltas = {handle.id: handle._delta for handle in self.handles}

        def get(key: str) -> Any:
            return deltas[key[:64]].get(key[64:])

        for target in self.targets:
            if target in stages:
                ops = [_prefixed(op, handle.id) for handle, weight in stages[target] for op in weight.ops]
                target.rewrite(tuple(handle.id for handle, _ in stages[target]), ops, get)
            else:
                target.restore()
        used = {weight.target for handle in self.handles for weight in handle._weights}
        self.targets.forget([target for target in self.targets if target not in used])

    def _drafts(self) -> dict[str, _Draft]:
        """What each module has to do, before it is known how."""
        drafts: dict[str, _Draft] = {}
        for handle in self.handles:
            for weight in handle._weights if handle._live else ():
                for number, spot in enumerate(weight.target.spots):
                    for path, module, param in spot.owners:
                        draft = drafts.setdefault(path, _Draft())
                        draft.kinds |= {op.op for op in weight.ops}
                        if handle._active:
                            self._draft_weight(draft, handle, weight, number, path, module, param)
            for path, mark, op in handle._hosts:
                draft = drafts.setdefault(path, _Draft())
                draft.kinds.add(op.op)
                if not isinstance(self.model, CONTAINERS):
                    drafts.setdefault("", _Draft()).kinds.add("@")
                if handle._active:
                    (draft.after if mark == MODULE_OP else draft.inputs).append(self._step(handle, op, path, mark))
                    draft.marks.add(mark)
        for path, draft in list(drafts.items()):
            for param in draft.weights:
                drafts.setdefault(self._scope(path, param), _Draft()).kinds |= draft.kinds
        return drafts

    def _draft_weight(self, draft: _Draft, handle: Handle, weight: Weight, number: int, path: str, module: nn.Module, param: str) -> None:
        target = weight.target
        spot = target.spots[number]
        stage = tuple(op.renamed(handle._local[path]) for op in weight.ops), handle._spread[path]
        pieces = draft.weights.setdefault(param, {})
        piece = pieces.get((id(target), number))
        if piece is None:
            split = len(target.spots) > 1 or spot.part is not None
            peers = [(s.owners[0][1], s.owners[0][2], s.at, s.part) for s in target.spots] if split else ()
            piece = pieces[id(target), number] = Piece(spot.at, (), target.blank, spot.part, peers, target.shape)
        piece.stages = (*piece.stages, stage)
        if handle.mode != "functional" and _is_fast(weight, module, param):
            draft.fast += [self._step(handle, op, path, param) for op in weight.ops]
        else:
            draft.all_fast = False

    def _step(self, handle: Handle, op: OpEntry, path: str, param: str) -> Step:
        kind = op_named(op.op)
        context = Context(param, handle._dropout, self.module(path), self.run)
        return Step(kind, op.renamed(handle._local[path]), kind.config(op.cfg), handle._spread[path], context)

    def _scope(self, path: str, param: str) -> str:
        """Around whose forward a changed parameter is put in place."""
        if (path, param) in self.scopes:
            return self.scopes[path, param]
        lineage = _lineage(path)
        fused = [p for p in lineage if isinstance(self.module(p), FUSED)]
        if fused:
            return fused[-1]
        for p in lineage:
            if not isinstance(self.module(p), (*CONTAINERS, nn.ParameterList, nn.ParameterDict)):
                return p
        raise MismatchError(f"{path}.{param}: no module runs that could use it", hint='mode="materialised"')

    def _finish(self, path: str, draft: _Draft, drafts: Mapping[str, _Draft]) -> None:
        """Choose the way for a module's own parameters; those that others read become shadows there."""
        module = self.module(path)
        scopes = {param: self._scope(path, param) for param in draft.weights}
        own = all(scope == path for scope in scopes.values())
        if own and draft.all_fast:
            draft.marks |= set(draft.weights)
            draft.weights = {}
            return
        draft.fast = []
        if own and exact_layout(original_class(module), module) is not None:
            draft.marks |= set(draft.weights)
            return
        for param, pieces in draft.weights.items():
            drafts[scopes[param]].shadows.append(Shadow(module, self._hub(path), param, tuple(pieces.values())))
        draft.weights = {}

    def _final(self, path: str, draft: _Draft) -> Plan:
        weights = {param: tuple(pieces.values()) for param, pieces in draft.weights.items()}
        shadows = list(draft.shadows)
        if shadows and weights:  # a module that shadows its children's parameters does the same with its own
            shadows += [Shadow(self.module(path), self._hub(path), param, pieces) for param, pieces in weights.items()]
            weights = {}
        run = self.run if path == "" and any(handle._hosts for handle in self.handles) else None
        return Plan(weights, tuple(shadows), (*draft.fast, *draft.after), tuple(draft.inputs), run, frozenset(draft.marks))

    def widen(self, missed: Sequence[tuple[str, Spot | None]]) -> None:
        """Move the scope of what did not run one module up."""
        wider = {}
        for target, spot in missed:
            if spot is None:
                raise WeftError(f"{target}: the module did not run, so neither did the ops on it", hint="leave it out, or probe with other data")
            for path, _, param in spot.owners:
                above = [p for p in _lineage(self._scope(path, param))[1:] if not isinstance(self.module(p), CONTAINERS)]
                if not above:
                    raise WeftError(f"{target}: no forward in the model uses {spot.name}", hint='attach with mode="materialised", or leave it out')
                wider[path, param] = above[0]
        self.scopes |= wider
        self.plan()


def _lineage(path: str) -> list[str]:
    """A module's path, its parent's, ... and the root's, which is empty."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _is_fast(weight: Weight, module: nn.Module, param: str) -> bool:
    """Whether every op here may work on the module's activations instead of this parameter."""
    if not weight.target.whole or weight.target.blank or exact_layout(original_class(module), module) is None:
        return False
    for op in weight.ops:
        if op.op == chain.SUM or op.at is not None:
            return False
        kind = op_named(op.op)
        if not kind.fast(module, param, kind.config(op.cfg)):
            return False
    return True


def _prefixed(op: OpEntry, id: str) -> OpEntry:
    return op.renamed({key: id + key for key in op.tensor_keys()})


def _require_same(delta: Delta, first: str, second: str) -> None:
    """Two entries for one tensor (tied names) must say the same."""
    said = []
    for name in (first, second):
        ops = delta.entries[name].ops
        said.append([op.renamed({key: delta.tensors[key].sha256 for key in op.tensor_keys()}).json() for op in ops])
    if said[0] != said[1]:
        raise MismatchError(
            f"{first} and {second} are one tensor in this model, but the delta changes them differently", hint="untie them in the model's config"
        )
