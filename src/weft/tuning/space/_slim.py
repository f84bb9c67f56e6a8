"""What spaces have in common that train low-rank factors on a model with fewer units: heads and hidden units of MLPs are really cut out.

The model of the run is made smaller before its first step: rows and columns of its parameters go, so weights, activations and what is
trained take less room. The base on disk stays as it is, and so does the delta's meaning: in what is written the factors have
their full size, with zeros where units were cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
import numpy as np
import torch
from torch import nn

from ... import xp
from ...attaching import Handle, attach, handles
from ...attaching.quantized import require_numbers
from ...base import Base, LiveBase
from ...delta import Builder, Delta
from ...engine.permutations import Group, Place, by_tensor
from ...engine.symmetries import symmetries
from ...errors import UsageError, WeftError
from ...names import NameMap
from ...ops import lowrank
from ...ops.op import flat_shape
from .._positions import Positions, drawn
from . import Job, Part, Space, square_of_change
from ._matrices import MatricesConfig

Keep = Mapping[str, Positions]
"""For each group of units those that stay, sorted."""

Cuts = Mapping[str, Mapping[int, Positions]]
"""For each tensor of the checkpoint and each of its axes, the entries that stay."""


class SlimConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of low-rank adaptation on a smaller model."""

    rank: Annotated[int, msgspec.Meta(description="columns of B, rows of A", ge=1)] = 8
    alpha: Annotated[float, msgspec.Meta(description="the product is scaled by alpha / rank", gt=0)] = 16.0


@dataclass
class Pair:
    """A part with low-rank factors: as it is stored, the op's place in the small model, and what it starts from."""

    part: Part
    small: Part
    b: torch.Tensor
    a: torch.Tensor


class Slim(Space):
    """Chooses units (`chosen`), cuts the others out, lets the smaller model settle, and trains factors on it.

    Which units stayed is part of the state, so that a run that goes on does not choose again.
    """

    def __init__(self, cfg: SlimConfig, job: Job) -> None:
        super().__init__(cfg, job)
        if isinstance(job.base, LiveBase):
            raise UsageError("units are cut out of the model itself, so its base must be a checkpoint", hint="Base.open(PATH)")
        if handles(job.model):
            raise UsageError("units are cut out of the base's own weights, so no delta may be under this one", hint="weft fold, and tune the result")
        require_numbers(job.model)
        self.slim = cfg
        self.pairs: list[Pair] = []
        self.cuts: Cuts = {}
        self._small: tuple[Delta, Handle] | None = None
        self.keep: Keep = {name.removeprefix("keep/"): index.numpy() for name, index in job.earlier.items() if name.startswith("keep/")}

    def chosen(self, parts: Sequence[Part]) -> Keep:
        """The units that stay, by group; called on the whole model."""
        raise NotImplementedError

    def settle(self) -> None:
        """What is done with the smaller model before factors are put on it."""

    def factors(self, part: Part, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """B and A of a part whose matrix has `shape` in the small model; None for no factors at all."""
        start = lowrank.OP.init(shape, self.job.gen, rank=self.slim.rank)
        return torch.from_numpy(start["B"]), torch.from_numpy(start["A"])

    @property
    def scale(self) -> float:
        """Of B A."""
        return self.slim.alpha / self.slim.rank

    def build(self, build: Builder) -> None:
        parts = self.job.matrices(self.slim.targets, self.slim.exclude)
        self.keep = self.keep or self.chosen(parts)
        self.cuts = cut(self.job, self.keep)
        self.settle()
        base = Base.of(self.job.model)
        inner = Job(base, self.job.model, NameMap.of(base, self.job.model), self.job.gen)
        found = {(part.site.name, part.at): part for part in inner.matrices(self.slim.targets, self.slim.exclude)}
        small = Builder(base)
        for part in parts:
            own = found.get((part.site.name, part.at))
            if own is None:
                raise UsageError(f"{part.target} has another form in the file than in the model, and cannot be tuned here", hint=f"-p exclude={part.site.role}")
            made = self.factors(part, flat_shape(own.shape))
            if made is not None:
                self.pairs.append(Pair(part, own, *made))
                own.put(small, "lowrank", {"B": made[0], "A": made[1]}, scale=self.scale)
        delta = small.done()
        self._small = delta, attach(self.job.model, delta, base=base, trainable=True, names=inner.names)

    def _trained(self) -> Iterator[tuple[Pair, nn.Parameter, nn.Parameter]]:
        """Each part with its B and A as they are now."""
        assert self._small is not None
        delta, handle = self._small
        tensors = handle.tensors()
        for pair in self.pairs:
            (op,) = (op for op in delta.entries[pair.small.target].ops if op.at == pair.small.at)
            b, a = tensors[op.t["B"].key], tensors[op.t["A"].key]
            assert isinstance(b, nn.Parameter) and isinstance(a, nn.Parameter)
            yield pair, b, a

    def tensors(self) -> dict[str, nn.Parameter]:
        factors = {f"{p.part.target}{p.part.at or ''}//{name}": value for p, b, a in self._trained() for name, value in (("A", a), ("B", b))}
        return {**super().tensors(), **factors}

    def squares(self) -> Iterator[tuple[str, torch.Tensor, bool]]:
        yield from super().squares()
        assert self._small is not None
        delta, handle = self._small
        tensors = {key: value.float() for key, value in handle.tensors().items()}
        for pair in self.pairs:
            ops = [replace(op, at=None) for op in delta.entries[pair.small.target].ops if op.at == pair.small.at]
            yield pair.part.target, square_of_change(ops, tensors, lambda: torch.zeros(())), False

    def state(self) -> dict[str, torch.Tensor]:
        return {f"keep/{name}": torch.from_numpy(index) for name, index in self.keep.items()}

    def finish(self) -> Delta:
        head, build = super().finish(), Builder(self.job.base)
        for name, entry in head.entries.items():
            build.add(name, head.tensors[entry.ops[0].t["values"].key], kind=entry.change.kind if entry.change else "add")
        for pair, b, a in self._trained():
            rows, columns = flat_shape(pair.part.shape)
            axes = self.cuts.get(pair.part.target, {})
            whole = {"B": spread(b, axes.get(0), rows, 0), "A": spread(a, axes.get(1), columns, 1)}
            pair.part.put(build, "lowrank", whole, scale=self.scale)
        self.last(build)
        return build.done()

    def last(self, build: Builder) -> None:
        """What comes behind the factors in the delta."""


def spread(value: torch.Tensor, index: Positions | None, size: int, axis: int) -> torch.Tensor:
    """A factor with zeros at the entries of `axis` that are not in `index`; None: none was cut."""
    value = value.detach().float().cpu()
    if index is None:
        return value.clone()
    shape = list(value.shape)
    shape[axis] = size
    return torch.zeros(shape).index_copy_(axis, torch.from_numpy(index), value)


# --- units and where they lie


def units(job: Job) -> list[Group]:
    """The heads (key/value heads with their queries) and the hidden units of MLPs; UsageError for an architecture that is not known."""
    return [group for group in symmetries(job.base) if re.search(r"(^|\.)(heads|mlp)$", group.name)]


def span(group: Group, place: Place) -> int:
    """Entries of one unit at a place."""
    return place.width * (group.parts if place.by_part else 1)


def entries(group: Group, place: Place, index: Positions) -> Positions:
    """The positions along the place's axis of some units."""
    wide = span(group, place)
    found: Positions = (place.start + index[:, None] * wide + np.arange(wide)).reshape(-1)
    return found


def parameter(job: Job, tensor: str) -> tuple[nn.Module, str, nn.Parameter]:
    """The module, name and parameter that a checkpoint tensor is; UsageError where it is no parameter by itself."""
    places = job.names.live(tensor)
    if len(places) != 1 or places[0].at is not None or places[0].part is not None:
        raise UsageError(f"{tensor} is stored in another form than the model has it, and no units can be cut out of it")
    path, _, name = places[0].name.rpartition(".")
    module = job.model.get_submodule(path)
    return module, name, getattr(module, name)


def leaving(job: Job, group: Group) -> Place:
    """Where the units of a group leave: the axis of the matrix that takes them in."""
    for place in group.places:
        if len(job.base.tensor(place.tensor).shape) == 2 and place.axis == _inputs(parameter(job, place.tensor)[0]):
            return place
    raise UsageError(f"no matrix takes in the units of {group.name}, as far as can be seen")


def _inputs(module: nn.Module) -> int:
    return 0 if type(module).__name__ == "Conv1D" else 1


def cut(job: Job, keep: Keep) -> Cuts:
    """Cut all units but `keep` out of the job's model, in place. What is left computes what it would if the others gave zeros: this is checked."""
    groups = [group for group in units(job) if group.name in keep] if keep else []
    if not groups:
        return {}
    job.fill()
    with torch.no_grad():
        for group in groups:
            place = leaving(job, group)
            gone = np.setdiff1d(np.arange(group.size), keep[group.name])
            parameter(job, place.tensor)[2].data.index_fill_(place.axis, torch.from_numpy(entries(group, place, gone)).to(_device(job)), 0)
    expected, cuts = _seen(job), {}
    for tensor, places in by_tensor(groups).items():
        module, name, value = parameter(job, tensor)
        axes: dict[int, Positions] = {}
        for group, place in places:
            whole = np.arange(value.shape[place.axis])
            mine = entries(group, place, np.arange(group.size))
            stays = np.union1d(np.setdiff1d(whole, mine), entries(group, place, keep[group.name]))
            axes[place.axis] = np.intersect1d(axes.get(place.axis, whole), stays)
        for axis, index in axes.items():
            value.data = value.data.index_select(axis, torch.from_numpy(index).to(value.device))
        cuts[tensor] = axes
        if name == "weight":
            _resized(job, module)
    got = _seen(job)
    if got is None or (expected is not None and not torch.allclose(got, expected, rtol=1e-2, atol=1e-3)):
        raise UsageError(f"units cannot be cut out of a live {type(job.model).__name__}: its code counts on their number", hint="prune=unstructured, or lora")
    return cuts


def _resized(job: Job, module: nn.Module) -> None:
    """Tell a module, and the attention around it, the size that its weight has now."""
    weight, into = module.weight, _inputs(module)
    assert isinstance(weight, torch.Tensor)
    if weight.ndim == 2:
        for attribute, size in (("in_features", weight.shape[into]), ("out_features", weight.shape[1 - into]), ("nf", weight.shape[1])):
            if hasattr(module, attribute):
                setattr(module, attribute, int(size))
    for parent in job.model.modules():  # GPT-2 splits what one matrix gives into queries, keys and values
        if getattr(parent, "c_attn", None) is module and hasattr(parent, "split_size"):
            vars(parent)["split_size"] = int(weight.shape[1]) // 3


def _seen(job: Job) -> torch.Tensor | None:
    """The loss of the first batch, for want of a better measure of what the model computes; None if it cannot run."""
    if job.goal is None:
        return None
    mode = job.model.training
    job.model.eval()
    try:
        with torch.no_grad():
            return job.goal.loss(job.model, next(drawn(job, 1))).float()
    except (RuntimeError, WeftError):
        return None
    finally:
        job.model.train(mode)


def _device(job: Job) -> torch.device:
    return next(job.model.parameters()).device


def sizes(job: Job, group: Group) -> Positions:
    """The sum of squares of each unit's entries, as float64."""
    total = np.zeros(group.size)
    for place in group.places:
        value = xp.to_numpy(parameter(job, place.tensor)[2].detach().float().cpu())
        rows = np.moveaxis(value, place.axis, 0)[entries(group, place, np.arange(group.size))]
        total += np.square(rows.reshape(group.size, -1), dtype=np.float64).sum(1)
    return total  # type: ignore[return-value]


def share_kept(size: int, ratio: float) -> int:
    """How many of `size` units stay where `ratio` of them goes: at least one."""
    return max(1, size - round(ratio * size))
