"""bitdelta: a fine-tune's increment of each matrix as one bit an entry, its sign, and one number.

BitDelta, Liu et al. 2024, arXiv 2402.10193. For each matrix D of an update (the values of `dense` ops with two axes or more):

    D' = alpha sign(D),  alpha = mean |D|        the alpha that is nearest in squared distance

where the sign of 0 is + as in the authors' code, which so adds alpha to entries that did not change. That is 16 times less than
bf16. A matrix that is zero stays zero, and costs nothing. What has one axis (norms, biases) is kept as it is, or in bfloat16
(rest = "bf16"). Kept, too, are ops that are small already (`lowrank`, `sparse`, ...), which the paper does not treat. The paper compresses the
linear layers of the blocks alone; here embeddings and heads are matrices too.

Left out: the paper then tunes the alphas to the fine-tune's outputs on a little text (200 steps of Adam). This method looks at no data;
`weft merge` with one input and a learned coefficient comes to the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from ..methods import method
from ..stored import Tensor, hold
from ._method import CompressMethod, Job

if TYPE_CHECKING:
    from typing import Any

    import numpy as np

    Array = np.ndarray[Any, Any]


class BitdeltaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `bitdelta`."""

    rest: Annotated[Literal["keep", "bf16"], msgspec.Meta(description="Increments with one axis: as they are, or rounded to bfloat16.")] = "keep"


@method("compress", config=BitdeltaConfig, paper="Liu et al., 2024, arXiv:2402.10193", formula="D' = mean|D| sign(D) for each matrix D")
class Bitdelta(CompressMethod[BitdeltaConfig]):
    """The signs of each matrix's increment and its mean magnitude: one bit an entry."""

    def prepare(self, job: Job, cfg: BitdeltaConfig) -> set[str]:
        """The keys of full increments."""
        walked = (op for entry in job.delta.entries.values() for outer in entry.ops for op in outer.walk())
        return {op.t["values"].key for op in walked if op.op == "dense"}

    def field(self, key: str, tensor: Tensor, job: Job, cfg: BitdeltaConfig, state: set[str]) -> Tensor:
        import numpy as np

        from .. import xp

        if key not in state:
            return tensor
        if len(tensor.shape) < 2:
            return tensor if cfg.rest == "keep" else hold(xp.cast(xp.cast(tensor.read(), "float32"), "bfloat16"))
        sums = [(float(np.abs(x).sum(dtype=np.float64)), x.size) for x in job.map(key, lambda x: x)]
        alpha = float(np.float32(sum(total for total, _ in sums) / sum(size for _, size in sums))) if sums else 0.0
        table = [-alpha, alpha] if alpha else [0.0]
        return job.encode(key, "codebook", {"table": table, "form": "packed"}, dtype="F32", each=Signs(alpha))


@dataclass(frozen=True)
class Signs:
    """alpha with the sign of each entry."""

    alpha: float

    def __call__(self, block: Array) -> Array:
        import numpy as np

        return np.where(block < 0, -self.alpha, self.alpha)
