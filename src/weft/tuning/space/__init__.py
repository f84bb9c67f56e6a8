"""Spaces: what may change.

A space is a subclass of `Space` registered as a method of kind "space". In `build` it writes its ops into the new delta, as a
rule at the identity, and the tensors of these ops are what is trained. The rest is hooks: a penalty (`loss`), masked or
scaled gradients (`gradients`), pruning, growing or waking up after a step (`after_step`), a last word on what is written (`finish`).

    class Mine(Space):
        def build(self, job, build):
            for part in job.parts(self.cfg.targets):
                part.put(build, "lowrank", OP.init(part.shape, job.gen, rank=4))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ... import xp
from ...delta import Builder, Delta
from ...engine.data import Row, data_hash, read_rows
from ...engine.loop import Hooks, LoopConfig, Objective
from ...errors import UsageError
from ...ops import At, Generator, OpEntry, chain
from ...ops.op import flat_shape
from ...sites import Site, sites

if TYPE_CHECKING:
    import msgspec

    from ...attaching import Handle
    from ...base import Base
    from ...names import NameMap


@dataclass(frozen=True)
class Part:
    """A checkpoint tensor to change, or a view of one: `target`, `at`, the view's `shape`, and the site of the live model it belongs to."""

    target: str
    shape: tuple[int, ...]
    at: At | None
    site: Site

    def put(self, build: Builder, op: str, fields: Mapping[str, Any], **cfg: Any) -> None:
        """Append an op for this part."""
        build.put(self.target, op, fields, at=self.at, **cfg)


@dataclass
class Job:
    """One tuning run as its space and guards see it.

    base, model, names: the base, the model built from it, and the map between their names
    gen:                random numbers for what the delta starts from
    head:               the tensors that the objective adds: trained whatever the space is
    goal, loop:         the objective, and how much is trained at a time: for what a space wants to know of the data before it starts
    trial:              `trial(parameters, steps)` trains parameters of the model as the run will (0 steps: as many), and says nothing of it
    origin:             an earlier delta to begin from, for spaces that can (`Space.takes_origin`)
    earlier:            what the space's `state` gave in the run that is resumed: what it found out from the data need not be found again
    delta, handle:      the delta as it was built, and its handle on the model; None until it is attached
    files:              the hashes of what `rows` has read, by path: the recipe has them in the place of paths
    """

    base: Base
    model: nn.Module
    names: NameMap
    gen: Generator
    head: Mapping[str, Any] = field(default_factory=dict)
    goal: Objective | None = None
    loop: LoopConfig = field(default_factory=LoopConfig)
    trial: Callable[[dict[str, nn.Parameter], int], None] | None = None
    earlier: Mapping[str, torch.Tensor] = field(default_factory=dict)
    origin: Delta | None = None
    delta: Delta | None = None
    handle: Handle | None = None
    files: dict[str, str] = field(default_factory=dict)

    def rows(self, path: str) -> list[Row]:
        """The rows of a file that an option of the space names."""
        found = read_rows(path)
        self.files[path] = data_hash(found)
        return found

    @property
    def attached(self) -> tuple[Delta, Handle]:
        """The delta and its handle; only from `Hooks.start` on, and for spaces that are not `live`."""
        if self.delta is None or self.handle is None:
            raise RuntimeError("nothing is attached to the model yet")
        return self.delta, self.handle

    def parts(self, select: str | Sequence[str], exclude: str | Sequence[str] = (), *, kinds: Sequence[str] = ()) -> list[Part]:
        """The parts of the checkpoint behind the sites that `select` points at (see `weft.sites.sites`), each once.

        Experts that are stored as one tensor give one part each. New heads are left out. UsageError if nothing is left.
        """
        found: dict[tuple[str, At | None], Part] = {}
        for site in sites(self.model, select, exclude, kinds=kinds):
            for place in self.names.stored(site.name):
                if place.name in self.head:
                    continue
                shape = place.part.shape(self._shape(place.name)) if place.part else self._shape(place.name)
                if site.role.startswith("experts.") and len(shape) == 3 and place.part is None:
                    for expert in range(shape[0]):
                        at = At(index=(expert,))
                        found.setdefault((place.name, at), Part(place.name, shape[1:], at, site))
                else:
                    found.setdefault((place.name, place.part), Part(place.name, shape, place.part, site))
        if not found:
            raise UsageError(f"no tensor of {self.base.source} belongs to what {select!r} selects", hint="choose other targets")
        return list(found.values())

    def matrices(self, select: str | Sequence[str], exclude: str | Sequence[str] = ()) -> list[Part]:
        """The `parts` that a product of matrices may change: weights of linear modules, convolutions and embeddings, stacked experts.

        UsageError if a chosen part has less than two axes.
        """
        found = self.parts(select, exclude, kinds=("linear", "conv1d", "conv", "embedding", "parameter"))
        for part in found:
            if len(part.shape) < 2:
                raise UsageError(f"matrices are changed here, but {part.target} has shape {list(part.shape)}", hint=f"-p exclude={part.site.role}")
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.base.tensor(name).shape)

    def fill(self) -> None:
        """Put the head's starting values into the model."""
        live = self.model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, values in self.head.items():
                for place in self.names.live(name):
                    live[place.name].copy_(xp.to_torch(values))

    def weight(self, part: Part) -> torch.Tensor:
        """The base's values of a part, float32, on the CPU."""
        value: torch.Tensor = xp.cast(xp.to_torch(self.base.tensor(part.target).read()), "float32")
        return part.at.get(value) if part.at else value

    def singular(self, part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U (rows x k), s (k, falling) and V^T (k x columns) of a part as a matrix, first axis by the others, with k its smaller side."""
        u, s, v = torch.linalg.svd(self.weight(part).reshape(flat_shape(part.shape)), full_matrices=False)
        return u, s, v


class Space(Hooks):
    """Base of all spaces.

    live:   trains the model's own parameters, so the model is float32 and nothing is attached
    lr:     a peak learning rate that suits the space with AdamW, used where none is given
    frozen: fields of its ops that stay what they are at the start, although the ops could train them
    takes_origin: can begin from an earlier delta (`Job.origin`)
    """

    live: bool = False
    takes_origin: bool = False
    lr: float = 1e-3
    frozen: frozenset[str] = frozenset()

    def __init__(self, cfg: msgspec.Struct, job: Job) -> None:
        self.job = job
        self._starts: dict[str, torch.Tensor] = {}

    def build(self, build: Builder) -> None:
        """Write the ops to train into `build`."""
        raise NotImplementedError

    def tensors(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: the tensors of the attached delta that take gradients."""
        delta, handle = self.job.attached
        still = {ref.key for entry in delta.entries.values() for op in entry.ops for name, ref in op.t.items() if name in self.frozen}
        for key in still:
            handle.tensors()[key].requires_grad_(False)
        return {key: value for key, value in handle.tensors().items() if isinstance(value, nn.Parameter) and value.requires_grad}

    def finish(self) -> Delta:
        """The delta as it is written, without its manifest: what is attached, with the values it has now."""
        return self.job.attached[1].delta()

    def squares(self) -> Iterator[tuple[str, torch.Tensor, bool]]:
        """||w' - w||^2 of every changed tensor, differentiable: target, value, and whether the tensor is new (w is then zero)."""
        delta, handle = self.job.attached
        tensors = {key: value.float() if value.is_floating_point() else value for key, value in handle.tensors().items()}
        for target, entry in delta.entries.items():
            if target.startswith("@"):
                raise UsageError(f"{target} has no weight whose change could be measured", hint="choose a space that changes weights")
            yield target, square_of_change(entry.ops, tensors, partial(self._start, target)), entry.change is not None

    def _start(self, target: str) -> torch.Tensor:
        """w of a target, float32, where the training is; zeros for a new tensor. Kept: it is asked for at every step."""
        if target not in self._starts:
            entry = self.job.attached[0].entries[target]
            value = torch.zeros(entry.shape) if entry.change is not None else xp.to_torch(self.job.base.tensor(target).read()).float()
            self._starts[target] = value.to(next(self.job.model.parameters()).device)
        return self._starts[target]


def square_of_change(ops: Sequence[OpEntry], tensors: Mapping[str, torch.Tensor], start: Callable[[], torch.Tensor]) -> torch.Tensor:
    """||apply(w) - w||^2 of one chain of ops; `start()` gives w, and is called only where the change depends on it.

    A low-rank change is measured by its factors: ||B A||^2 = tr((B^T B)(A A^T)), two r x r products, nothing of the size of w.
    """
    if len(ops) == 1 and ops[0].op == "lowrank" and ops[0].at is None and not any(ref.take for ref in ops[0].t.values()):
        t = {name: tensors[ref.key] for name, ref in ops[0].t.items()}
        total = inner(t["B"], t["A"], t["B"], t["A"])
        if "A0" in t:
            total = total - 2 * inner(t["B"], t["A"], t["B0"], t["A0"]) + inner(t["B0"], t["A0"], t["B0"], t["A0"])
        return total * float(ops[0].cfg.get("scale", 1.0)) ** 2
    if len(ops) == 1 and ops[0].op in ("dense", "sparse"):
        return tensors[ops[0].t["values"].key].square().sum() * float(ops[0].cfg.get("scale", 1.0)) ** 2
    w = start()
    change: torch.Tensor = chain.apply_chain(w, ops, lambda key: tensors[key]) - w
    return change.square().sum()


def inner(b: torch.Tensor, a: torch.Tensor, d: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """<b a, d c> = tr((b^T d)(c a^T))."""
    return ((b.T @ d) * (a @ c.T)).sum()
