"""compeft: the largest entries of an update become one number with a sign, all others zero.

ComPEFT, Yadav et al. 2023, arXiv 2311.13171. For the parameters tau of an update (the values of `dense` and `sparse` ops, the factors of `lowrank`
ones, ...), d numbers in all:

    tau'_j = alpha * sigma * sign(tau_j) where |tau_j| >= h, else 0

h is the k-th largest magnitude, k = max(1, floor(density * d)): of the whole update (trim = "global", as in the paper) or of each tensor (trim = "tensor",
then sigma and d are each tensor's own too; a tensor whose entries are all equal is left as it is, for its sigma is 0). Entries exactly as large as h are
all kept, so ties can make it a few more than k; the authors' code keeps the (k + 1)-th as well. Zeros are never kept: where fewer than k entries are not
zero, h is the smallest of those. Magnitudes of F64 tensors are compared as float32.

sigma, by `scale`:

    std    standard deviation of all d entries before trimming, population, in float64: the paper's
    mean   mean magnitude of the kept entries: sparse ternary compression (Sattler et al. 2019, arXiv 1903.02891). (The ComPEFT
           authors' version of it averages the signed values, which is next to nothing.)

The paper gives nothing but these to store: positions as Golomb-coded gaps, one bit for each sign, one number (form = "golomb"; 0.34 bits an entry at
a density of 5 %, 47 times less than bf16), or two bit masks (form = "bitmask"; 2 bits an entry whatever the density, fast to compute with).
See `codes/ternary.py` for the bytes.

alpha is the paper's one tuned number: on a small validation set it tries 0.5, 1, 2, 3, 4, 5, 6, 8, 10 with densities of 0.05 to 0.5 (from memory) and finds
that alpha matters little on large models. This method never looks at data; to choose, compress with each and compare with
`weft eval BASE SMALL --data VALIDATION`. Small models want more than large ones: bench/results/compeft.md
has 3 to 6 at densities of 0.2 to 0.05. The factors of a LoRA differ in size by orders of magnitude (A starts at random, B at zero): trim = "tensor"
suits them, "global" keeps A alone. The increments of a bf16 checkpoint are coarse, and many are tied at h: a tenth more may be kept than asked for.

Not compressed, and stored as they were: added tensors (a classification head), ops relative to the weight, ops at run time, positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from math import prod, sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

from ..engine.select import kth_largest_magnitude
from ..methods import method
from ..stored import Tensor
from ._method import CompressMethod, Job, widened

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

R = TypeVar("R")

_SMALLEST = 2.0**-149
"""The smallest float32 above 0."""


class CompeftConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `compeft`."""

    density: Annotated[float, msgspec.Meta(gt=0, le=1, description="Share of the entries that is kept, the largest ones.")] = 0.2
    alpha: Annotated[float, msgspec.Meta(gt=0, description="Factor on sigma; the one number to tune.")] = 1.0
    scale: Annotated[Literal["std", "mean"], msgspec.Meta(description="sigma: standard deviation of the whole update, or mean magnitude of what is kept.")] = (
        "std"
    )
    trim: Annotated[
        Literal["global", "tensor"], msgspec.Meta(description="Keep the largest entries of the whole update (as in the paper) or of each tensor.")
    ] = "global"
    form: Annotated[Literal["golomb", "bitmask"], msgspec.Meta(description="Positions as Golomb-coded gaps (smallest) or as a bit mask.")] = "golomb"


@method(
    "compress",
    config=CompeftConfig,
    paper="Yadav et al., 2023, arXiv:2311.13171",
    formula="tau' = alpha sigma sign(tau) where |tau| is among the density d largest, else 0",
)
class Compeft(CompressMethod[CompeftConfig]):
    """Keep the signs of the largest entries, with one magnitude for all; positions are Golomb-coded."""

    def prepare(self, job: Job, cfg: CompeftConfig) -> dict[str, Ternary]:
        """What to make of each field that is not empty."""
        keys = [key for key, tensor in job.fields.items() if prod(tensor.shape)]
        groups = [[key] for key in keys] if cfg.trim == "tensor" else [keys] if keys else []
        found = [(group, _ternary(job, group, cfg)) for group in groups]
        return {key: ternary for group, ternary in found if ternary is not None for key in group}

    def field(self, key: str, tensor: Tensor, job: Job, cfg: CompeftConfig, state: dict[str, Ternary]) -> Tensor:
        if key not in state:
            return tensor
        return job.encode(key, "ternary", {"scale": state[key].magnitude, "form": cfg.form}, dtype="F32", each=state[key].trimmed)


@dataclass(frozen=True)
class Ternary:
    """h and alpha * sigma, as float32 numbers."""

    threshold: float
    magnitude: float

    def trimmed(self, values: Array) -> Array:
        """A block of a field, 0 below the threshold."""
        import numpy as np

        wide = widened(values)
        return wide * (abs(wide).astype(np.float32, copy=False) >= np.float32(self.threshold))  # times 0 or 1: many times faster than choosing


def _ternary(job: Job, keys: list[str], cfg: CompeftConfig) -> Ternary | None:
    """h and alpha * sigma of some fields taken together; None if sigma is 0, because all entries are equal and not 0."""
    import numpy as np

    def blocks(function: Callable[[Array], R]) -> Iterator[R]:
        return chain.from_iterable(job.map(key, function) for key in keys)

    size = sum(prod(job.fields[key].shape) for key in keys)
    least = kth_largest_magnitude(lambda: blocks(lambda x: x), max(1, int(cfg.density * size))).value
    threshold = max(least, np.float32(_SMALLEST))

    def kept(x: Array) -> tuple[float, int]:
        large = abs(x)[abs(x).astype(np.float32, copy=False) >= threshold]
        return float(large.sum(dtype=np.float64)), large.size

    if cfg.scale == "std":
        sigma = reduce(_joined, blocks(_moments)).std
    else:
        total, count = map(sum, zip(*blocks(kept), strict=True))
        sigma = total / max(count, 1)
    if not sigma:
        return None if least else Ternary(_SMALLEST, 1.0)  # nothing but zeros, which stay zeros
    return Ternary(float(threshold), float(np.float32(cfg.alpha * sigma)))


class _Moments(NamedTuple):
    """Number, mean and sum of squared deviations of some entries."""

    size: int
    mean: float
    spread: float

    @property
    def std(self) -> float:
        return sqrt(self.spread / self.size)


def _moments(x: Array) -> _Moments:
    import numpy as np

    mean = float(x.mean(dtype=np.float64))
    off = x.astype(np.float64)
    off -= mean
    off *= off
    return _Moments(x.size, mean, float(off.sum()))


def _joined(a: _Moments, b: _Moments) -> _Moments:
    """The moments of both together (Chan et al. 1979), in the order of the blocks, so that threads change no bit."""
    size, off = a.size + b.size, b.mean - a.mean
    return _Moments(size, a.mean + off * b.size / size, a.spread + b.spread + off * off * a.size * b.size / size)
