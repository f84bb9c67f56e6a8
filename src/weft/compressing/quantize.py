"""quantize: fewer bits for every entry, as scaled whole numbers (int8, int4, ...) or as the best 2^bits values of each tensor.

    integers   tau' = scale_g q,  q = round(tau / scale_g) with |q| <= 2^(bits-1) - 1,  for each group g of `group` entries in a row;
               scale_g = max_g |tau| / (2^(bits-1) - 1), rounded up to a bfloat16
    codebook   tau' = the nearest of at most 2^bits values of the tensor, the best k-means in one dimension (see `_kmeans`)

Rounding is to nearest even. With bits = 8 and group = 64 an entry takes 8.25 bits, with 4 bits 4.25; a codebook takes `bits` bits and has the smaller
error on tensors whose entries are of one kind, integers where their size varies along the tensor. The codes are `integers` and
`codebook` (see their files for the bytes); 256 values take about half a second a tensor to find. A tensor with no more entries than
values stays as it is.

This is rounding as everybody does it, with no paper of its own. Not compressed are added tensors, ops relative to the weight, ops at run time and
positions.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

import msgspec

from ..errors import UsageError
from ..methods import method
from ..stored import Tensor
from ._kmeans import added, counted, levels
from ._method import CompressMethod, Job


class QuantizeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `quantize`."""

    bits: Annotated[int, msgspec.Meta(ge=1, le=8, description="Bits of an entry; integers take at least 2.")] = 8
    form: Annotated[Literal["integers", "codebook"], msgspec.Meta(description="Whole numbers times a scale, or values found by k-means.")] = "integers"
    group: Annotated[int, msgspec.Meta(ge=1, description="Entries that share a scale (integers).")] = 64


@method("compress", config=QuantizeConfig, formula="tau' = scale round(tau / scale), scale = max|tau| / (2^(bits-1) - 1) of each group")
class Quantize(CompressMethod[QuantizeConfig]):
    """Fewer bits for each entry: scaled integers, or a codebook for each tensor."""

    def prepare(self, job: Job, cfg: QuantizeConfig) -> None:
        if cfg.form == "integers" and cfg.bits < 2:
            raise UsageError("integers have a sign and take at least 2 bits", hint="-p form=codebook -p bits=1, or method bitdelta")

    def field(self, key: str, tensor: Tensor, job: Job, cfg: QuantizeConfig, state: None) -> Tensor:
        if cfg.form == "integers":
            return job.encode(key, "integers", {"bits": cfg.bits, "group": cfg.group}, dtype="F32") if prod(tensor.shape) else tensor
        if prod(tensor.shape) <= 1 << cfg.bits:
            return tensor
        table = levels(added(job.map(key, counted)), 1 << cfg.bits)
        return job.encode(key, "codebook", {"table": table, "form": "packed"}, dtype="F32")
