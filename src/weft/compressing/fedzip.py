"""fedzip: the largest entries of each tensor, rounded to a few values; positions and values in Huffman codes.

FedZip, Malekijoo et al. 2021, arXiv 2102.01593 (from memory: the three steps are the paper's, the numbers below are ours). For each parameter
tensor tau of an update with n entries:

    1. top-z: keep the max(1, floor(density n)) entries of largest magnitude; ties with the smallest of them are kept too
    2. k-means: each kept entry becomes the nearest of clusters - 1 values (the pruned ones, all 0, are the last cluster)
    3. code: the number of zeros before each kept entry, and which value it has, each in a Huffman code (form = "gaps")

The values are the best k-means in one dimension from counts of the kept entries (see `_kmeans`), so nothing is drawn at random. Of
the paper's ways to store positions, "gaps" is the one by differences of addresses; form = "huffman" puts the clusters of all entries, zeros too, into one
Huffman code (never less than one bit an entry). See `codes/codebook.py` for the bytes.

In the paper clients send what they have trained since the last round; here any delta is compressed. Not compressed are added tensors, ops relative
to the weight, ops at run time and positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from ..codes.codebook import nearest
from ..engine.select import kth_largest_magnitude
from ..methods import method
from ..stored import Tensor
from ._kmeans import added, counted, levels
from ._method import CompressMethod, Job, widened

if TYPE_CHECKING:
    from typing import Any

    import numpy as np

    Array = np.ndarray[Any, Any]


class FedzipConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `fedzip`."""

    density: Annotated[float, msgspec.Meta(gt=0, le=1, description="Share of the entries of each tensor that is kept, the largest ones.")] = 0.1
    clusters: Annotated[int, msgspec.Meta(ge=2, le=256, description="Values that an entry can have, 0 among them.")] = 3
    form: Annotated[Literal["gaps", "huffman"], msgspec.Meta(description="Positions as Huffman-coded gaps, or a Huffman code of every entry's value.")] = "gaps"


@method(
    "compress",
    config=FedzipConfig,
    paper="Malekijoo et al., 2021, arXiv:2102.01593",
    formula="tau' = nearest of k - 1 values where |tau| is among the density n largest of its tensor, else 0",
)
class Fedzip(CompressMethod[FedzipConfig]):
    """Keep the largest entries of each tensor, rounded to a few values, in Huffman codes."""

    def field(self, key: str, tensor: Tensor, job: Job, cfg: FedzipConfig, state: None) -> Tensor:
        size = prod(tensor.shape)
        if not size:
            return tensor
        threshold = float(kth_largest_magnitude(lambda: job.map(key, lambda x: x), max(1, int(cfg.density * size))).value)
        found = levels(added(job.map(key, lambda x: counted(x[_kept(x, threshold)]))), cfg.clusters - 1)
        rounded = Rounded(threshold, tuple(found))
        return job.encode(key, "codebook", {"table": sorted({0.0, *found}), "form": cfg.form}, dtype="F32", each=rounded)


@dataclass(frozen=True)
class Rounded:
    """Entries below the threshold become 0, the others the nearest of the values."""

    threshold: float
    values: tuple[float, ...]

    def __call__(self, block: Array) -> Array:
        import numpy as np

        out = np.zeros(block.size)
        kept = _kept(widened(block), self.threshold)
        if kept.any():
            values = np.array(self.values)
            out[kept] = values[nearest(block[kept], values)]
        return out


def _kept(values: Array, threshold: float) -> Array:
    """Which entries are kept: at least the threshold in magnitude (compared as float32), and not 0."""
    import numpy as np

    size = abs(values).astype(np.float32, copy=False)
    out: Array = (size >= np.float32(threshold)) & (values != 0)
    return out
