"""NaN and infinities in updates that are combined or carried without being computed with: found before they are in the result."""

from __future__ import annotations

from collections.abc import Iterable

from ..delta import Delta
from ..errors import InputError
from ..ops import chain
from ..ops import get as op_named
from ..ops.spec import OpEntry
from ..stored import FLOATS, Tensor, numpy_dtype


def require_finite(delta: Delta, names: Iterable[str], label: str) -> None:
    """InputError, with the delta and the tensor named, if the numbers of ops on any of these targets are not all finite.

    `label` is what the delta is called. Ops that set bits (`assign`, `xor`) may set any. Reads what is stored once, block by block.
    """
    known: dict[str, int] = {}
    for name in names:
        for op in (inner for outer in delta.entries[name].ops for inner in outer.walk()):
            for key in _numbers(op):
                if key not in known:
                    known[key] = _odd(delta.tensors[key])
                if known[key]:
                    raise InputError(
                        f"{label}: tensor {name!r}: {known[key]:,} NaN or infinite entries in what its {op.op!r} op is made of",
                        hint="check the run that made it; such a model cannot be combined with others",
                    )


def _numbers(op: OpEntry) -> tuple[str, ...]:
    """The keys of the tensors that an op itself computes with."""
    if op.op == chain.SUM or op_named(op.op).raw:
        return ()
    return op.tensor_keys()


def _odd(tensor: Tensor) -> int:
    import numpy as np

    if tensor.dtype not in FLOATS:
        return 0
    dtype = numpy_dtype(tensor.dtype)
    return sum(int(np.count_nonzero(~np.isfinite(np.frombuffer(block, dtype)))) for block in tensor.blocks())
