"""What an editing method is, and what it is given. Each method is one file beside this one, with a class that derives from `EditMethod`.

Nearly every closed-form editor is one solve, dW = R K^T (K K^T + L)^-1 (`weft.engine.solve`); a method says what the keys, residuals
and the prior are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from .. import xp
from ..engine.data import pad_id
from ..engine.edits import Edit
from ..engine.spans import Spans, batch
from ..errors import UsageError
from ..ops.spec import At
from ..sites import Site, all_sites, sites

if TYPE_CHECKING:
    import msgspec
    import numpy as np

    from ..base import Base
    from ..engine.solve import Factors
    from ..names import NameMap

    C = TypeVar("C", bound=msgspec.Struct)
else:
    C = TypeVar("C")

Pair = tuple[torch.Tensor, torch.Tensor]
"""A (rank x columns) and B (rows x rank) of a tensor as stored, float32, on the CPU."""

MATRICES = ("linear", "conv1d")


@dataclass(frozen=True)
class Fact:
    """An edit with the tokens of its prompt and answer."""

    edit: Edit
    spans: Spans


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix to edit: the weight of a linear module of the live model, and the checkpoint tensor, or view `at` of one, that holds it.

    d_in and d_out are those of the module; `transposed` says that it is stored in x out (Conv1D).
    """

    site: Site
    module: nn.Module
    target: str
    at: At | None

    @property
    def name(self) -> str:
        """The live name, unique in the model."""
        return self.site.name

    @property
    def transposed(self) -> bool:
        return self.site.kind == "conv1d"

    @property
    def d_in(self) -> int:
        return self.site.shape[0 if self.transposed else 1]

    @property
    def d_out(self) -> int:
        return self.site.shape[1 if self.transposed else 0]

    @property
    def weight(self) -> torch.Tensor:
        """The live parameter, as stored."""
        value: torch.Tensor = getattr(self.module, self.site.param)
        return value


def stored(matrix: Matrix, factors: Factors) -> Pair:
    """The factors of a module's d_out x d_in map as those of the tensor: dW^T = A^T B^T where it is stored in x out."""
    a, b = (factors.B.T, factors.A.T) if matrix.transposed else (factors.A, factors.B)
    return a.float().cpu().contiguous(), b.float().cpu().contiguous()


class Weights:
    """The live weights of a run: each is its first bytes plus, in float32, all changes so far, rounded once to its dtype."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Matrix, torch.Tensor, torch.Tensor]] = {}

    def add(self, matrix: Matrix, pair: Pair) -> None:
        """Add B A to a matrix."""
        with torch.no_grad():
            if matrix.name not in self._kept:
                wide = torch.promote_types(matrix.weight.dtype, torch.float32)
                self._kept[matrix.name] = (matrix, matrix.weight.detach().clone(), torch.zeros_like(matrix.weight, dtype=wide))
            _, first, change = self._kept[matrix.name]
            a, b = (value.to(change) for value in pair)
            change.addmm_(b, a)
            matrix.weight.copy_((first.to(change.dtype) + change).to(first.dtype))

    @contextmanager
    def tried(self, changes: Sequence[tuple[Matrix, Factors]], scale: float) -> Iterator[None]:
        """Inside, `scale` times some changes are added to the live weights; afterwards these are what they were."""
        kept = [(matrix, matrix.weight.detach().clone()) for matrix, _ in changes]
        with torch.no_grad():
            try:
                for matrix, factors in changes:
                    a, b = (value.to(matrix.weight.device) for value in stored(matrix, factors))
                    matrix.weight.add_((scale * (b @ a)).to(matrix.weight.dtype))
                yield
            finally:
                for matrix, before in kept:
                    matrix.weight.copy_(before)

    def changed(self) -> bool:
        """Whether any weight is another one, in its dtype, than it was."""
        return any(not torch.equal(matrix.weight, first) for matrix, first, _ in self._kept.values())

    def restore(self) -> None:
        """Put all first bytes back."""
        with torch.no_grad():
            for matrix, first, _ in self._kept.values():
                matrix.weight.copy_(first)
        self._kept = {}


@dataclass
class Job:
    """One editing run as its method sees it.

    base, model, tokenizer: the base and the live model, in eval mode, no parameter of which wants a gradient; its weights hold all
                            edits of this run so far
    names:                  the map between their names
    texts:                  ordinary text for methods that need statistics of the model; None without any
    seed:                   everything random follows from it
    batch_size:             sequences that pass through the model at once; results do not depend on it
    most:                   the most tokens of a sequence
    weights:                the live weights of the matrices that are edited
    """

    base: Base
    model: nn.Module
    tokenizer: Any
    names: NameMap
    texts: Sequence[str] | None = None
    seed: int = 0
    batch_size: int = 32
    most: int = 512
    device: torch.device = field(init=False)
    weights: Weights = field(init=False)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.weights = Weights()

    def layers(self) -> int:
        """How many layers the model has; UsageError if they are not numbered."""
        depth = max((site.layer + 1 for site in all_sites(self.model) if site.layer is not None), default=0)
        if not depth:
            raise UsageError(f"{type(self.model).__name__} has no numbered layers to choose from", hint="say which matrices to edit: -p sites=NAME")
        return depth

    def roles(self, wanted: Iterable[str]) -> list[str]:
        """Those of some roles that matrices inside the model's layers have."""
        known = {site.role for site in all_sites(self.model) if site.layer is not None and site.kind in MATRICES}
        return [role for role in wanted if role in known]

    def matrices(self, select: Sequence[str]) -> list[Matrix]:
        """The matrices that `select` points at (see `weft.sites.sites`), in model order.

        UsageError, with every reason, for those that cannot be edited: tied ones, those that are stored as parts of several tensors
        or turned round, and those that hold no floating-point numbers.
        """
        found: list[Matrix] = []
        wrong: list[str] = []
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for site in sites(self.model, select, kinds=MATRICES):
            places = self.names.stored(site.name)
            matrix = Matrix(site, modules[site.module], places[0].name if places else "", places[0].part if places else None)
            if site.tied:
                wrong.append(f"{site.name} is the same tensor as {', '.join(site.tied)}: an edit would change both")
            elif len(places) != 1 or places[0].at is not None:
                wrong.append(f"{site.name} is not stored as it lives (its parts: {', '.join(place.name for place in places) or 'none'})")
            elif not matrix.weight.is_floating_point():
                wrong.append(f"{site.name} holds {matrix.weight.dtype}, not floating-point numbers")
            else:
                found.append(matrix)
        if wrong:
            raise UsageError(f"{len(wrong)} of the chosen matrices cannot be edited", problems=wrong, hint="choose others: -p sites=mlp.down@3-5")
        return found

    def batches(self, items: Sequence[Spans]) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Positions of some items and their batch on the model's device, `batch_size` at a time, longest first."""
        order = sorted(range(len(items)), key=lambda k: (-len(items[k].ids), k))
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            yield numbers, self.batch([items[k] for k in numbers])

    def batch(self, items: Sequence[Spans]) -> dict[str, torch.Tensor]:
        """Some items as one batch on the model's device."""
        return batch(items, pad_id(self.tokenizer), self.device)

    def generator(self, stream: int) -> torch.Generator:
        """Random numbers of this run on the CPU, another sequence for each stream."""
        return torch.Generator().manual_seed(xp.key(self.seed, stream) >> 1)


class EditMethod(Generic[C]):
    """Edits in, factors out.

    `turn` is a generator: each pair that it yields, a matrix and the factors of its change, is added to the live weights before it goes on,
    so it can look at what is left to do. For each matrix the rows of all factors yielded in a turn, joined in order, are those of the
    turn's facts in their order, `rows(fact)` for each.
    """

    subjects: ClassVar[bool] = False
    """The method needs to know the subject of each edit."""

    texts: ClassVar[bool] = False
    """The method needs ordinary text (`Job.texts`)."""

    def __init__(self, cfg: C, job: Job) -> None:
        self.cfg, self.job = cfg, job

    @property
    def matrices(self) -> Sequence[Matrix]:
        """All that may be changed."""
        raise NotImplementedError

    def rows(self, fact: Fact) -> int:
        """How many rows of each matrix's factors belong to a fact."""
        return 1

    def turn(self, facts: Sequence[Fact]) -> Iterator[tuple[Matrix, Factors]]:
        """The changes that make some facts true, all at once."""
        raise NotImplementedError

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """What a later run needs to go on as if it were one with this."""
        return {}

    def notes(self) -> dict[str, Any]:
        """What people may want to know of the run."""
        return {}

    def load(self, state: Mapping[str, np.ndarray[Any, Any]]) -> bool:
        """Take over what `state` gave; whether it matters. InputError if it does not fit."""
        return False
