"""lq-lora: each matrix is taken apart into a quantised one and a low-rank one, of which the second is trained.

    w' = Q + B A        Q in 2 to 8 bits, B A of rank `rank`: near w at the start, nearer than what `Q` alone could be

Q and B A come from turns: B A is the best low-rank form of w - Q (randomised singular value decomposition, oversampling 10, the root of the
values on both sides), Q the quantised w - B A; the turns end where the error no longer falls, and the best one is kept. Q has a scale for
each `block` entries in a row, its largest magnitude, and each entry over its scale is the nearest of 2^bits quantiles of the normal
distribution (NormalFloat, with a zero). The scales have 8 bits and one bfloat16 for each 256. Guo et al. 2023, arXiv 2311.12023.

Bits and block of each matrix are the solution of an integer program: the smallest sum of squared errors with at most `budget` bits for each
entry of the targets on average, counted as they lie in the file, scales included. `fisher` weights errors by the squared gradients F of
so many examples: the low-rank form is that of D w E, D and E the roots of F's means over rows and columns, and the program counts F error^2.

The file has Q as codes (`codebook` and `integers`); while training, Q's entries lie decoded beside the base. Not followed: the
program does not choose the form of the scales, and they have no offset. Its errors are those after `search` turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import ceil, prod
from statistics import NormalDist
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import torch

from ... import xp
from ...codes import BLOCK, Coded, encode
from ...delta import Builder, Delta
from ...errors import UsageError
from ...methods import method
from ...ops import At
from ...ops.op import flat_shape
from ...stored import hold
from .._positions import sensitivities
from . import Job, Part
from ._masked import Fixed
from ._matrices import MatricesConfig

_OUTERMOST = 0.9677083
"""The quantile of the largest value: that of NF4 in common use, halfway between 1 - 1/32 and 1 - 1/30."""

_SCALES = {"bits": 8, "group": 256}


class LQLoRAConfig(MatricesConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of LQ-LoRA."""

    rank: Annotated[int, msgspec.Meta(description="columns of B, rows of A", ge=1)] = 64
    budget: Annotated[float, msgspec.Meta(description="bits of each entry of the quantised matrices, on average", gt=0)] = 2.75
    widths: Annotated[tuple[int, ...], msgspec.Meta(description="bits that a matrix may have, 2 to 8", min_length=1)] = (2, 3, 4, 8)
    blocks: Annotated[tuple[int, ...], msgspec.Meta(description="entries that may share a scale", min_length=1)] = (16, 32, 64)
    turns: Annotated[int, msgspec.Meta(description="turns at most", ge=1)] = 100
    search: Annotated[int, msgspec.Meta(description="turns for each choice while bits and blocks are chosen", ge=1)] = 1
    fisher: Annotated[int, msgspec.Meta(description="examples whose gradients weight the errors; 0: all entries count alike", ge=0)] = 0


class Form(NamedTuple):
    """How a matrix is quantised."""

    bits: int
    block: int


class Split(NamedTuple):
    """A matrix as `values` in [-1, 1] times `scales`, plus B A; and the squared error that is left."""

    values: Coded
    scales: Coded
    b: torch.Tensor
    a: torch.Tensor
    error: float


@method("space", config=LQLoRAConfig, paper="Guo et al., 2023, arXiv:2311.12023", formula="w' = Q + B A, ||w - Q - B A|| small at the start")
class LQLoRA(Fixed):
    """Low-rank adaptation of a quantised base, with bits shared out over the matrices and factors that start from what quantising lost."""

    frozen = frozenset({"scale"})

    def __init__(self, cfg: LQLoRAConfig, job: Job) -> None:
        super().__init__(cfg, job)
        if wrong := [bits for bits in cfg.widths if not 2 <= bits <= 8] + [block for block in cfg.blocks if block < 1]:
            raise UsageError(f"widths are from 2 to 8 bits and blocks have at least one entry, got {wrong[0]}")
        self.cfg = cfg
        self.forms: list[Form] = []

    def build(self, build: Builder) -> None:
        parts = self.job.matrices(self.cfg.targets, self.cfg.exclude)
        fishers: Sequence[torch.Tensor | None] = [None] * len(parts)
        if self.cfg.fisher:
            singly = replace(self.job, loop=msgspec.structs.replace(self.job.loop, batch_size=1, micro_batch_size=0))
            fishers = [value.reshape(flat_shape(value.shape)) for value in sensitivities(singly, parts, self.cfg.fisher)]
        known = self.job.earlier.get("forms")
        self.forms = self._chosen(parts, fishers) if known is None else [Form(*row) for row in known.tolist()]
        for part, fisher, form in zip(parts, fishers, self.forms, strict=True):
            split = self._split(part, fisher, form, self.cfg.turns)
            build.put(part.target, "assign", {"values": split.values}, at=part.at)
            build.put(part.target, "scale_shift", {"scale": split.scales}, at=self._blocks(part, form.block))
            part.put(build, "lowrank", {"A": split.a, "B": split.b})

    def state(self) -> dict[str, torch.Tensor]:
        return {"forms": torch.tensor(self.forms)}

    def finish(self) -> Delta:
        """What is not trained is stored as it was: coded."""
        first, trained, delta = self.job.attached[0], self.tensors(), super().finish()
        return replace(delta, tensors={key: value if key in trained else first.tensors[key] for key, value in delta.tensors.items()})

    def _split(self, part: Part, fisher: torch.Tensor | None, form: Form, turns: int) -> Split:
        w = self.job.weight(part).reshape(flat_shape(part.shape))
        return split(w, part.shape, self.job.base.tensor(part.target).dtype, form, min(self.cfg.rank, *w.shape), turns, fisher)

    def _blocks(self, part: Part, block: int) -> At:
        """The view of a part in which each row is a block."""
        shape = (prod(part.shape) // block, block)
        if part.at is None:
            return At(reshape=shape)
        if part.at == At(index=part.at.index) and len(part.at.index) == 1 and isinstance(part.at.index[0], int):  # one of a stack of matrices
            return At(reshape=(self.job.base.tensor(part.target).shape[0], *shape), index=part.at.index)
        raise UsageError(f"{part.target} is stored in another form than the model has it, and cannot be cut into blocks", hint=f"-p exclude={part.site.role}")

    def _chosen(self, parts: Sequence[Part], fishers: Sequence[torch.Tensor | None]) -> list[Form]:
        errors, sizes, choices = [], [], []
        for part, fisher in zip(parts, fishers, strict=True):
            size = prod(part.shape)
            fitting = [Form(*pair) for pair in product(self.cfg.widths, self.cfg.blocks) if size % pair[1] == 0]
            if not fitting:
                raise UsageError(f"{part.target} has {size:,} entries, which none of the blocks {self.cfg.blocks} divides", hint=f"-p exclude={part.site.role}")
            choices.append(fitting)
            errors.append([self._split(part, fisher, form, self.cfg.search).error if len(fitting) > 1 else 0.0 for form in fitting])
            sizes.append([stored_bits(size, form) for form in fitting])
        allowed = self.cfg.budget * sum(prod(part.shape) for part in parts)
        least = sum(min(row) for row in sizes)
        if least > allowed:
            raise UsageError(
                f"a budget of {self.cfg.budget} bits for each entry cannot be met: the least is {least / allowed * self.cfg.budget:.3f}",
                hint="a larger budget, fewer bits in widths, or larger blocks",
            )
        return [row[k] for row, k in zip(choices, cheapest(errors, sizes, allowed), strict=True)]


def split(w: torch.Tensor, shape: Sequence[int], dtype: str, form: Form, rank: int, turns: int, fisher: torch.Tensor | None = None) -> Split:
    """The best Q + B A of at most so many turns, for a matrix that is stored in `shape` and `dtype`."""
    one = torch.ones(())
    rows, columns = (one, one) if fisher is None else (_root(fisher.mean(1, keepdim=True)), _root(fisher.mean(0, keepdim=True)))
    q, best = torch.zeros_like(w), None
    for _ in range(turns):
        b, a = _leading(rows * (w - q) * columns, rank)
        b, a = b / rows, a / columns
        values, scales = quantised(w - b @ a, shape, dtype, form)
        q = decoded(values, scales).reshape(w.shape)
        away = (w - q - b @ a).double().square()
        error = float((away if fisher is None else away * fisher).sum())
        if best is not None and error >= best.error:
            break
        best = Split(values, scales, b, a, error)
    assert best is not None
    return best


def _root(mean: torch.Tensor) -> torch.Tensor:
    """The root of weights; those that are zero, or nearly, count as a millionth of the largest."""
    root = mean.sqrt()
    return root.clamp_min(max(1e-6 * float(root.max()), 1e-30))


def _leading(w: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the best matrix of a rank, the same ones each time."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(w, min(rank + 10, *w.shape))
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v.T[:rank]


def quantised(w: torch.Tensor, shape: Sequence[int], dtype: str, form: Form) -> tuple[Coded, Coded]:
    """A matrix as values of the NormalFloat table, stored in `shape` and `dtype`, and a scale for each block."""
    blocks = w.reshape(-1, form.block).numpy()
    scales = encode(hold(np.abs(blocks).max(1)), "integers", _SCALES)
    wide = scales.read()[:, None]
    relative = np.divide(blocks, wide, out=np.zeros_like(blocks), where=wide > 0)
    return encode(hold(relative.reshape(tuple(shape))), "codebook", {"table": normal_float(form.bits), "form": "packed"}, dtype=dtype), scales


def decoded(values: Coded, scales: Coded) -> torch.Tensor:
    """What `quantised` stands for: blocks by entries, float32."""
    scale: torch.Tensor = xp.to_torch(scales.read())
    wide: torch.Tensor = xp.cast(xp.to_torch(values.read()), "float32")
    return wide.reshape(len(scale), -1) * scale[:, None]


def normal_float(bits: int) -> list[float]:
    """2^bits ascending values from -1 to 1: quantiles of the normal distribution, evenly apart on either side of the zero among them (one more above it)."""
    half, quantile = 1 << (bits - 1), NormalDist().inv_cdf
    below = [quantile(1 - _OUTERMOST + (_OUTERMOST - 0.5) * k / (half - 1)) for k in range(half - 1)]
    above = [quantile(0.5 + (_OUTERMOST - 0.5) * k / half) for k in range(1, half + 1)]
    return [float(np.float32(value / quantile(_OUTERMOST))) for value in (*below, 0.0, *above)]


def stored_bits(size: int, form: Form) -> int:
    """Bits in the file for so many entries: the payloads of values and scales (see `weft.codes`), to the byte."""
    scales = size // form.block
    values = sum(4 + ceil(min(BLOCK, size - start) * form.bits / 8) for start in range(0, size, BLOCK))
    groups = sum(4 + part + 2 * ceil(part / _SCALES["group"]) for part in (min(BLOCK, scales - start) for start in range(0, scales, BLOCK)))
    return 8 * (values + groups)


def cheapest(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], allowed: float) -> list[int]:
    """One choice of each row, with the least sum of errors among those whose sizes sum to at most `allowed`: an integer program, solved by HiGHS."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag

    cost = np.concatenate([np.asarray(row, np.float64) for row in errors])
    weight = np.concatenate([np.asarray(row, np.float64) for row in sizes]) / allowed
    once = LinearConstraint(block_diag([np.ones((1, len(row))) for row in errors]), 1, 1)
    ends = np.cumsum([len(row) for row in errors])[:-1]
    within = 1.0
    while True:
        found = milp(cost / max(cost.max(), 1e-300), constraints=[once, LinearConstraint(weight[None], -np.inf, within)], integrality=1, bounds=Bounds(0, 1))
        chosen = [int(np.argmin(row)) for row in sizes] if found.x is None else [int(np.argmax(part)) for part in np.split(found.x, ends)]
        if found.x is None or sum(row[k] for row, k in zip(sizes, chosen, strict=True)) <= allowed:
            return chosen
        within -= 1e-6  # the solver takes for equal what is a millionth more
