"""Where the checkpoint tensors that deltas change lie in a live model, and how they are rewritten in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import xp
from ..delta import Delta, Entry
from ..errors import MismatchError
from ..ops import chain
from ..ops.spec import At, OpEntry
from ..stored import Tensor, hold
from .live import tensor_of

if TYPE_CHECKING:
    from ..base import Base
    from ..names import NameMap

BUILD = "build the model with room for it: base.model([delta])"


@dataclass(eq=False)
class Spot:
    """One place of a target. `at` is a view of the live tensor, `part` of the checkpoint tensor (None: all of it).

    owners: the modules that have the tensor, as (path, module, parameter name); several when it is tied
    """

    owners: list[tuple[str, nn.Module, str]]
    at: At | None
    part: At | None

    @property
    def live(self) -> torch.Tensor:
        _, module, param = self.owners[0]
        return tensor_of(module, param).detach()

    @property
    def name(self) -> str:
        path, _, param = self.owners[0]
        return f"{path}.{param}" if path else param

    def view(self) -> torch.Tensor:
        live = self.live
        view: torch.Tensor = self.at.get(live) if self.at else live
        return view

    def write(self, part: torch.Tensor) -> None:
        live, view = self.live, self.view()
        if self.at and view.untyped_storage().data_ptr() != live.untyped_storage().data_ptr():  # the reshape of a strided tensor is a copy
            view, part = live, self.at.set(live, part.to(live.device))
        view.copy_(part)


@dataclass(eq=False)
class Target:
    """A checkpoint tensor in a live model. `blank`: the ops start from zeros (added and replaced tensors)."""

    name: str
    spots: list[Spot]
    shape: tuple[int, ...]
    blank: bool
    originals: list[torch.Tensor] = field(default_factory=list)
    """The bytes of each spot before it was written, on the CPU; empty while nothing is written."""
    written: tuple[str, ...] = ()
    """Ids of the deltas whose result is written in place, in order."""

    @property
    def whole(self) -> bool:
        """Whether the checkpoint tensor is exactly one live tensor."""
        return len(self.spots) == 1 and self.spots[0].at is None and self.spots[0].part is None

    @property
    def writable(self) -> bool:
        """Whether every place has data of its own here (not offloaded, sharded or quantised)."""
        lives = [tensor_of(module, param) for spot in self.spots for _, module, param in spot.owners[:1]]
        return all(type(t) in (torch.Tensor, nn.Parameter) and t.device.type != "meta" for t in lives)

    def before(self) -> torch.Tensor:
        """The checkpoint tensor as it was before any delta was written, on the CPU if one is."""
        parts = self.originals or [spot.view() for spot in self.spots]
        if len(parts) == 1 and self.spots[0].part is None:
            return parts[0]
        whole = parts[0].new_empty(self.shape)
        for spot, part in zip(self.spots, parts, strict=True):
            (spot.part.get(whole) if spot.part else whole).copy_(part)
        return whole

    def rewrite(self, ids: tuple[str, ...], ops: Sequence[OpEntry], get: Callable[[str], Any]) -> None:
        """Write the result of `ops` on the original bytes in place, rounded once, with the bits that folding gives."""
        if ids == self.written:
            return
        self.originals = self.originals or [spot.view().to("cpu", copy=True) for spot in self.spots]
        start = self.before()
        # numpy, as in folding: the two engines agree but for the sign of NaNs that arithmetic makes
        new = xp.to_torch(chain.rewrite(xp.to_numpy(torch.zeros_like(start) if self.blank else start), ops, get))
        with torch.no_grad():
            for spot in self.spots:
                spot.write(spot.part.get(new) if spot.part else new)
        self.written = ids

    def restore(self) -> None:
        """Put the original bytes back."""
        with torch.no_grad():
            for spot, part in zip(self.spots, self.originals, strict=False):
                spot.write(part)
        self.originals, self.written = [], ()


class Targets:
    """The targets of all deltas on one model. Two names for one tensor (tied, both stored) are one target."""

    def __init__(self) -> None:
        self._by_place: dict[Any, Target] = {}
        self._by_name: dict[str, Target] = {}

    def __iter__(self) -> Any:
        return iter(self._by_place.values())

    def find(self, delta: Delta, name: str, model: nn.Module, names: NameMap) -> Target | None:
        """The target of one of the delta's entries; None for a removed tensor that is absent, as it must be."""
        entry = delta.entries[name]
        kind = entry.change.kind if entry.change else None
        if kind == "remove":
            _require_absent(name, names)
            return None
        try:
            places = names.live(name)
        except MismatchError as error:
            if kind is None:
                raise
            raise MismatchError(f"{name}: the delta {_DOES[kind]} this tensor, and the live model does not fit: {error.message}", hint=BUILD) from None
        if not places:
            raise MismatchError(
                f"{name!r} has no place in the live model{': ' + why if (why := names.why(name)) else ''}",
                hint=BUILD if kind else "check that this is the model that the base's config describes",
            )
        spots = []
        for place in places:
            owners = []
            for live in names.tied(place.name):
                path, _, param = live.rpartition(".")
                owners.append((path, model.get_submodule(path), param))
            spots.append(Spot(owners, place.at, place.part))
        if len(spots) == 1 and spots[0].part is None and tuple(spots[0].view().shape) != entry.shape:
            raise MismatchError(f"{name}: the delta's tensor is {list(entry.shape)}, the live {spots[0].name} is {list(spots[0].view().shape)}", hint=BUILD)
        key = tuple((spot.name, spot.at, spot.part) for spot in spots)
        target = self._by_place.setdefault(key, Target(name, spots, entry.shape, kind in ("add", "replace")))
        if kind == "copy":
            _require_copied(name, entry, target)
        self._by_name[name] = target
        return target

    def forget(self, unused: Sequence[Target]) -> None:
        """Drop targets that no delta has any more."""
        self._by_place = {key: t for key, t in self._by_place.items() if t not in unused}
        self._by_name = {name: t for name, t in self._by_name.items() if t not in unused}

    def named(self, name: str) -> Target | None:
        return self._by_name.get(name)


_DOES = {"add": "adds", "replace": "replaces", "copy": "copies"}


def _require_absent(name: str, names: NameMap) -> None:
    try:
        places = names.live(name)
    except MismatchError:
        return
    if places:
        raise MismatchError(f"{name}: the delta removes this tensor, but the live model has it", hint=BUILD)


def _require_copied(name: str, entry: Entry, target: Target) -> None:
    """A copied tensor must hold the base's bytes, where the model keeps the stored dtype."""
    now = hold(target.before())
    if entry.base is not None and now.dtype == entry.base.dtype and now.sha256 != entry.base.sha256:
        source = entry.change.source if entry.change else ""
        raise MismatchError(f"{name}: the delta copies {source} here, but the live model holds other values", hint=BUILD)


class Beneath:
    """A live model as a base, as it was before deltas were written into it: what a further delta is checked against."""

    fingerprint = None

    def __init__(self, base: Base, targets: Targets) -> None:
        self._base, self._targets = base, targets

    def tensor(self, name: str) -> Tensor:
        target = self._targets.named(name)
        return hold(target.before()) if target is not None and target.originals else self._base.tensor(name)

    def sha256(self, name: str) -> str:
        return self.tensor(name).sha256
