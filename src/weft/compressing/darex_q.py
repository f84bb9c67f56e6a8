"""darex-q: drop entries of an update at random and make the others larger, and store nothing but those.

DAREx-q, Deng et al. 2024, arXiv 2410.09344. For each parameter tensor tau of an update, entry by entry:

    m_j ~ Bernoulli(1 - drop),  tau'_j = m_j tau_j (1 / q)

q = 1 - drop is DARE (Yu et al. 2023, arXiv 2311.03099). At high drop rates its rescaling is what breaks a model; a q between 1 - drop
and 1 loses a little of the update and much of the noise. How to find q from data is the merge method `darex-q`; here it is given.

The mask is made again from the seed when the delta is read, so positions cost nothing: at drop = 0.9 an update takes 1.6 bits an entry in bf16. It is
the mask of `weft merge DELTA --method dare` with the same seed and one input: folding that and this with dtype = F32 gives the
same bytes (but for float64 tensors). Each tensor has a sequence of its own, by its name (the fields of other ops than `dense` by their key).

The rate is rounded to a multiple of 1/65,536, as in `dare`. It is meant for full increments. For factors of low rank the mean over masks
is still the update, but the noise of two products adds up.
Not compressed are added tensors, ops relative to the weight, ops at run time and positions.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

import msgspec

from .. import xp
from ..delta import BaseTensor
from ..methods import method
from ..stored import Tensor
from ._method import CompressMethod, Job


class DarexQConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `darex-q`."""

    drop: Annotated[float, msgspec.Meta(ge=0, lt=1, description="Probability that an entry is dropped.")] = 0.9
    q: Annotated[float, msgspec.Meta(gt=0, description="What the others are divided by; none: 1 - drop, which is DARE.")] | None = None
    dtype: Annotated[Literal["F32", "BF16", "F16"], msgspec.Meta(description="How they are stored.")] = "BF16"
    seed: Annotated[int, msgspec.Meta(ge=0, description="Seed of the masks.")] = 0


@method("compress", config=DarexQConfig, paper="Deng et al., 2024, arXiv:2410.09344", formula="tau' = m tau / q, m ~ Bernoulli(1 - drop)")
class DarexQ(CompressMethod[DarexQConfig]):
    """Drop entries at random, divide the others by q; the seed stands for their positions."""

    def prepare(self, job: Job, cfg: DarexQConfig) -> dict[str, str]:
        """The name of each full increment's sequence: its tensor's, or the first one's of those with the same bytes in the base, as in `dare`."""
        first: dict[BaseTensor, str] = {}
        names = {}
        for target, entry in sorted(job.delta.entries.items()):
            name = target if entry.base is None else first.setdefault(entry.base, target)
            if len(entry.ops) == 1 and entry.ops[0].op == "dense":
                names[entry.ops[0].t["values"].key] = name
        return names

    def field(self, key: str, tensor: Tensor, job: Job, cfg: DarexQConfig, state: dict[str, str]) -> Tensor:
        if not prod(tensor.shape):
            return tensor
        sequence = xp.key(xp.named_key(cfg.seed, state.get(key, key)), 0)
        drop = min(round(cfg.drop * 65536), 65535)
        factor = 1 / (1 - drop / 65536 if cfg.q is None else cfg.q)
        return job.encode(key, "dropped", {"key": f"{sequence:016x}", "drop": drop, "factor": factor, "dtype": cfg.dtype}, dtype="F32")
