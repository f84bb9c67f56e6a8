"""The map between a checkpoint's tensor names and the parameters and buffers of a live model.

A checkpoint and the model built from it rarely use the same names: a `bert.` prefix comes or goes, LayerNorm's `gamma`
is now `weight`, Mixtral's experts are stored one by one and live stacked in one tensor, two live names may be one
tensor. transformers holds this knowledge as a list of conversions for each model. `NameMap` replays that list on
tensors without data that remember where their parts came from, so the map follows whatever transformers does when it
loads. A conversion that is not a rearrangement of whole blocks leaves its tensors without a place, and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import MismatchError, near
from .ops.spec import At, Index

if TYPE_CHECKING:
    from .base import Base

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype code and shape of every tensor of a checkpoint, by name."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where (a part of) a tensor lies on the other side.

    `at` is a view of the live tensor and `part` a view of the checkpoint tensor, None meaning all of it; the two views
    hold the same values in the same shape. `name` is the live name in what `NameMap.live` returns, and the checkpoint's
    in what `NameMap.stored` returns.
    """

    name: str
    at: At | None = None
    part: At | None = None


class _Untraceable(Exception):
    """An operation moves data in a way that views cannot say."""


@dataclass(frozen=True)
class _Piece:
    """One block of a traced tensor and the block of the checkpoint tensor it came from.

    `box` is the range along each axis here; `axes` the source's axis that each axis follows, None for one of size 1
    that a stack put in; `part` the range along each source axis; `size` the source's shape, `stored` what that was
    before a reshape, None without one.
    """

    source: str
    box: tuple[Span, ...]
    axes: tuple[int | None, ...]
    part: tuple[Span, ...]
    size: tuple[int, ...]
    stored: tuple[int, ...] | None = None

    @classmethod
    def whole(cls, source: str, shape: Sequence[int]) -> _Piece:
        full = tuple((0, size) for size in shape)
        return cls(source, full, tuple(range(len(full))), full, tuple(shape))

    def permuted(self, order: Sequence[int]) -> _Piece:
        return replace(self, box=tuple(self.box[i] for i in order), axes=tuple(self.axes[i] for i in order))

    def shifted(self, dim: int, by: int) -> _Piece:
        lo, hi = self.box[dim]
        return replace(self, box=(*self.box[:dim], (lo + by, hi + by), *self.box[dim + 1 :]))

    def narrowed(self, dim: int, start: int, stop: int) -> _Piece | None:
        """What is left of this block in start..stop of an axis, counted from start; None if nothing is."""
        lo, hi = self.box[dim]
        first, last = max(lo, start), min(hi, stop)
        if first >= last:
            return None
        part, axis = list(self.part), self.axes[dim]
        if axis is not None:
            part[axis] = (part[axis][0] + first - lo, part[axis][0] + last - lo)
        return replace(self, box=(*self.box[:dim], (first - start, last - start), *self.box[dim + 1 :]), part=tuple(part))

    def inserted(self, dim: int) -> _Piece:
        return replace(self, box=(*self.box[:dim], (0, 1), *self.box[dim:]), axes=(*self.axes[:dim], None, *self.axes[dim:]))

    def dropped(self, dim: int) -> _Piece:
        return replace(self, box=self.box[:dim] + self.box[dim + 1 :], axes=self.axes[:dim] + self.axes[dim + 1 :])

    def views(self, live: Sequence[int]) -> tuple[At | None, At | None]:
        """The view of the live tensor and the view of the checkpoint tensor that are equal."""
        if self.stored is not None:
            if self != replace(_Piece.whole(self.source, live), stored=self.stored):
                raise _Untraceable("a reshape followed by other steps")
            return At(reshape=self.stored), None
        added = [i for i, axis in enumerate(self.axes) if axis is None]
        kept = [i for _, i in sorted((axis, i) for i, axis in enumerate(self.axes) if axis is not None)]
        order = added + kept if kept != sorted(kept) else list(range(len(live)))
        index: list[Index] = [self.box[i][0] if self.axes[i] is None else self.box[i] for i in order]
        at = _view(None if order == sorted(order) else tuple(order), index, [live[i] for i in order])
        part: list[Index] = [span if axis in self.axes else span[0] for axis, span in enumerate(self.part)]
        return at, _view(None, part, self.size)


def _view(transpose: tuple[int, ...] | None, index: list[Index], shape: Sequence[int]) -> At | None:
    """An At without the ranges at the end that keep everything; None if nothing remains."""
    while index and index[-1] == (0, shape[len(index) - 1]):
        index.pop()
    return At(None, transpose, tuple(index)) if transpose or index else None


class _Traced(torch.Tensor):
    """A tensor on the meta device that knows which checkpoint tensors its blocks came from."""

    pieces: tuple[_Piece, ...]

    @classmethod
    def leaf(cls, source: str, shape: Sequence[int]) -> _Traced:
        return cls.made(torch.empty(tuple(shape), device="meta"), [_Piece.whole(source, shape)])

    @classmethod
    def made(cls, like: torch.Tensor, pieces: Iterable[_Piece | None]) -> _Traced:
        with torch._C.DisableTorchFunctionSubclass():
            traced = like.as_subclass(cls)
        traced.pieces = tuple(piece for piece in pieces if piece is not None)
        return traced

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if not isinstance(out, torch.Tensor) and not (isinstance(out, tuple | list) and any(isinstance(o, torch.Tensor) for o in out)):
            return out  # a shape, a size, a number
        name = getattr(func, "__name__", str(func))
        if name not in _TRACERS:
            raise _Untraceable(f"the operation {name}")
        return _TRACERS[name](out, *args, **kwargs)


def _same(out: torch.Tensor, x: _Traced, *_: Any, **__: Any) -> _Traced:
    return _Traced.made(out, x.pieces)


def _cat(out: torch.Tensor, tensors: Sequence[_Traced], dim: int = 0, **_: Any) -> _Traced:
    dim, pieces, start = dim % out.ndim, [], 0
    for x in tensors:
        pieces += [piece.shifted(dim, start) for piece in x.pieces]
        start += x.shape[dim]
    return _Traced.made(out, pieces)


def _stack(out: torch.Tensor, tensors: Sequence[_Traced], dim: int = 0, **_: Any) -> _Traced:
    dim %= out.ndim
    return _Traced.made(out, [piece.inserted(dim).shifted(dim, i) for i, x in enumerate(tensors) for piece in x.pieces])


def _split(out: Sequence[torch.Tensor], x: _Traced, _sizes: Any = None, dim: int = 0, **_: Any) -> tuple[_Traced, ...]:
    dim, parts, start = dim % x.ndim, [], 0
    for o in out:
        stop = start + o.shape[dim]
        parts.append(_Traced.made(o, [piece.narrowed(dim, start, stop) for piece in x.pieces]))
        start = stop
    return tuple(parts)


def _unbind(out: Sequence[torch.Tensor], x: _Traced, dim: int = 0) -> tuple[_Traced, ...]:
    dim %= x.ndim
    rows = [[piece.narrowed(dim, i, i + 1) for piece in x.pieces] for i in range(len(out))]
    return tuple(_Traced.made(o, [piece.dropped(dim) for piece in row if piece]) for o, row in zip(out, rows, strict=True))


def _squeeze(out: torch.Tensor, x: _Traced, dim: int | None = None) -> _Traced:
    gone = [i for i, size in enumerate(x.shape) if size == 1] if dim is None else [dim % x.ndim] * (x.shape[dim] == 1)
    pieces = x.pieces
    for axis in reversed(gone):
        pieces = tuple(piece.dropped(axis) for piece in pieces)
    return _Traced.made(out, pieces)


def _transpose(out: torch.Tensor, x: _Traced, dim0: int, dim1: int) -> _Traced:
    order = list(range(x.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _Traced.made(out, [piece.permuted(order) for piece in x.pieces])


def _reshape(out: torch.Tensor, x: _Traced, *_: Any, **__: Any) -> _Traced:
    if out.shape == x.shape:
        return _Traced.made(out, x.pieces)
    whole = [_Piece.whole(piece.source, x.shape) for piece in x.pieces]
    if list(x.pieces) != whole:
        raise _Untraceable("a reshape of a tensor that is no longer as it is stored")
    return _Traced.made(out, [replace(_Piece.whole(piece.source, out.shape), stored=tuple(x.shape)) for piece in whole])


_TRACERS: dict[str, Callable[..., Any]] = {
    "contiguous": _same, "clone": _same, "detach": _same, "to": _same, "cat": _cat, "stack": _stack, "chunk": _split,
    "split": _split, "unbind": _unbind, "squeeze": _squeeze, "transpose": _transpose, "reshape": _reshape, "view": _reshape,
}  # fmt: skip


def live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer of a model by each of its names (tied tensors have several), not copied."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}


def live_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """One of `live_tensors`, without making the list of all."""
    path, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return live_tensors(model)[name]
    found = module._parameters.get(last)
    return found if found is not None else live_tensors(model)[name]  # buffers may be hidden, and modules may save themselves in their own way


def saved_layout(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes that the model's own checkpoint has: transformers' layout for its models, else the live one."""
    from transformers import PreTrainedModel

    from .stored import dtype_code

    bare = {name: torch.empty_like(value, device="meta") for name, value in live_tensors(model).items()}
    if isinstance(model, PreTrainedModel):
        from transformers.core_model_loading import revert_weight_conversion

        bare = revert_weight_conversion(model, bare)
    return {name: (dtype_code(value.dtype), tuple(value.shape)) for name, value in bare.items()}


class _Conversions:
    """transformers' own renamings and converters for a model; nothing for other modules."""

    def __init__(self, model: nn.Module, live: dict[str, tuple[int, ...]]) -> None:
        from transformers import PreTrainedModel

        self.model, self.known = model, isinstance(model, PreTrainedModel)
        self.live: Any = live  # the loader asks it only which names there are
        if not self.known:
            return
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms = get_model_conversion_mapping(model)
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        self.by_pattern = {pattern: converter for converter in self.converters for pattern in converter.source_patterns}

    def rename(self, name: str) -> tuple[str, str | None]:
        """The live name for a checkpoint name, and the pattern of the converter that it is an input of, if any."""
        if not self.known:
            return name, None
        from transformers.core_model_loading import rename_source_key

        prefix: Any = self.model.base_model_prefix
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.live)
        if renamed not in self.live and name in self.live:
            renamed, pattern = rename_source_key(name, [], [], prefix, self.live)
        return renamed, pattern

    def ordered(self, names: Iterable[str]) -> list[str]:
        """The order in which the loader takes names: experts stacked by number, 2 before 10."""
        if not self.known:
            return list(names)
        from transformers.core_model_loading import dot_natural_key

        return sorted(names, key=dot_natural_key)


class NameMap:
    """Checkpoint names to live names and back, for one model.

    Built from headers and shapes alone: no tensor is read. See `of` for the usual way in.
    """

    def __init__(self, layout: Layout, model: nn.Module) -> None:
        live = live_tensors(model)
        self._layout = layout
        self._shapes = {name: tuple(value.shape) for name, value in live.items()}
        self._conversions = _Conversions(model, self._shapes)
        self._live: dict[str, list[Place]] = {}
        self._stored: dict[str, list[Place]] = {}
        self._reasons: dict[str, str] = {}
        self._tied = _tied(live)
        self._derive()

    @classmethod
    def of(cls, base: Base, model: nn.Module, deltas: Sequence[Any] = ()) -> NameMap:
        """The map between a base's checkpoint, as `deltas` change its list of tensors, and a model built from it."""
        return cls(base.layout(deltas), model)

    def _derive(self) -> None:
        groups: dict[str, tuple[str | None, dict[str, list[str]]]] = {}
        for name in self._conversions.ordered(self._layout):
            target, pattern = self._conversions.rename(name)
            if target not in self._shapes:
                self._reasons[name] = f"the model has no tensor {target}"
            elif pattern is None:
                self._add(target, name)
            else:
                groups.setdefault(target, (pattern, {}))[1].setdefault(pattern, []).append(name)
        for target, (first, sources) in groups.items():
            self._convert(target, first or "", sources)
        for places in self._stored.values():
            places.sort(key=lambda place: [part if isinstance(part, tuple) else (part, part + 1) for part in place.at.index] if place.at else [])

    def _convert(self, target: str, pattern: str, sources: dict[str, list[str]]) -> None:
        """Run one converter of transformers on traced tensors and note where their blocks ended."""
        names = [name for group in sources.values() for name in group]
        converter = deepcopy(self._conversions.by_pattern[pattern])
        for source, group in sources.items():
            for name in group:
                converter.add_tensor(target, name, source, _Traced.leaf(name, self._layout[name][1]))
        model: Any = self._conversions.model
        try:
            made = converter.convert(target, model=model, config=model.config)
            ends = {live: value[0] if isinstance(value, list) else value for live, value in made.items()}
            found = [(live, piece) for live, value in ends.items() for piece in value.pieces]
            for live, value in ends.items():
                if tuple(value.shape) != self._shapes.get(live):
                    want = list(self._shapes[live]) if live in self._shapes else "no such tensor"
                    raise _Untraceable(f"it makes {live} of shape {list(value.shape)}, and the model has {want}")
            places = [(live, piece.source, *piece.views(self._shapes[live])) for live, piece in found]
        except Exception as error:  # whatever a conversion raises, its tensors have no place, and the rest of the map stands
            why = str(error) or type(error).__name__
            self._reasons |= dict.fromkeys(names, f"transformers converts it in a way that is not a view of the live tensor ({why})")
            return
        for place in places:
            self._add(*place)

    def _add(self, live: str, stored: str, at: At | None = None, part: At | None = None) -> None:
        self._live.setdefault(stored, []).append(Place(live, at, part))
        self._stored.setdefault(live, []).append(Place(stored, at, part))

    def live(self, name: str) -> list[Place]:
        """Where a checkpoint tensor lies in the model: usually one place, several if transformers splits it, none if the
        model does not have it (`why` says more).

        MismatchError if neither the checkpoint nor the model knows the name, or if the shapes do not fit.
        """
        if name in self._layout:
            return [self._checked(place, name, place.name) for place in self._live.get(name, [])]
        target, pattern = self._conversions.rename(name)
        if target not in self._shapes:
            raise MismatchError(f"neither the checkpoint nor the model has a tensor {name!r}{near(name, [*self._layout, *self._shapes])}")
        return [Place(target)] if pattern is None else []

    def stored(self, name: str) -> list[Place]:
        """The checkpoint tensors that make up a live tensor, in order, each with the part that it fills.

        A tied name that is not stored itself gives what is stored under its other names. Empty for buffers and
        parameters that the checkpoint does not have. MismatchError if the model has no tensor `name`.
        """
        names = self.tied(name)
        for one in (name, *names):
            if one in self._stored:
                return [self._checked(place, place.name, one) for place in self._stored[one]]
        return []

    def tied(self, name: str) -> tuple[str, ...]:
        """All live names of the tensor `name`, itself among them, in the model's order."""
        if name not in self._shapes:
            raise MismatchError(f"the model has no parameter or buffer {name!r}{near(name, self._shapes)}")
        return self._tied[name]

    def why(self, name: str) -> str:
        """Why `live(name)` is empty; "" if it is not."""
        if name in self._layout:
            return self._reasons.get(name, "")
        return "" if self.live(name) else f"{name!r} is not in the checkpoint, and the model keeps it inside a larger tensor"

    def _checked(self, place: Place, stored: str, live: str) -> Place:
        """The place, if the shapes fit. (Those of converted tensors were held against the model when they were derived.)"""
        there, here = self._shapes[live], self._layout[stored][1]
        if place.at is None and place.part is None and there != here:
            raise MismatchError(
                f"tensor {stored!r} has shape {list(here)} in the checkpoint, but the model's {live!r} has {list(there)}",
                hint="build the model from this base with Base.model()",
            )
        return place


def _tied(live: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """Groups of names that are the same entries of the same storage."""
    groups: dict[Any, list[str]] = {}
    for name, value in live.items():
        plain = type(value) in (torch.Tensor, nn.Parameter)  # wrappers (DTensor, quantised) may have no storage of their own
        key = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride()) if plain else id(value)
        groups.setdefault(key, []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}
