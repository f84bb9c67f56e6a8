"""lossless: the same update to the bit, in fewer bytes.

Every tensor of the delta is stored in the code `planes` (bytes of equal weight together, and zstd; see its file), positions as differences. A
whole new tensor (`assign`, as `weft diff` writes where much has changed) says nothing about how near it is to the old one; with the base
at hand it becomes `xor`, the bits that differ, of which the upper ones are nearly all 0:

    bits = old ^ new        so that old ^ bits = new, whatever the dtype, NaNs included

Folding gives the same bytes as before. What `xor` cannot do is stand behind other changes of the same tensor, so a delta made over others keeps its
`assign`; use none where the result is to replace what other deltas did. A checkpoint is compared with its base exactly.

A tensor that would not get smaller, and one that is coded already, stays as it is. The bytes depend on zstd's version, what they decode to does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar

import msgspec

from ..base import Base
from ..codes import Coded, entries
from ..delta import Delta, Entry, renumbered
from ..methods import method
from ..ops.spec import OpEntry, Ref
from ..stored import ITEMSIZE, Computed, Tensor
from ._method import CompressMethod, Job


class LosslessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `lossless`."""

    level: Annotated[int, msgspec.Meta(ge=1, le=22, description="Level of zstd; from 16 on slow and a little smaller, between no better than 1.")] = 1


@method("compress", config=LosslessConfig, formula="values -> old ^ values; then byte planes and zstd")
class Lossless(CompressMethod[LosslessConfig]):
    """The same update to the bit: differences from the base's bits, byte planes, zstd."""

    exact: ClassVar[bool] = True

    def compress(self, job: Job, cfg: LosslessConfig) -> Delta:
        changes, tensors = dict(job.delta.entries), dict(job.delta.tensors)
        if job.base is not None and not job.delta.over:
            for target, entry in job.delta.entries.items():
                if _replaced(entry):
                    bits = _flips(job.base, target, job.delta.tensors[entry.ops[0].t["values"].key])
                    coded = _smaller(job, f"{target}//bits", bits, cfg.level, steps=False)
                    if coded is not None:
                        tensors[f"{target}//bits"] = coded
                        flip = OpEntry("xor", {"dtype": entry.dtype} if entry.dtype != "F32" else {}, {"bits": Ref(f"{target}//bits")})
                        changes[target] = replace(entry, ops=(flip, *entry.ops[1:]))
        changes, tensors = renumbered(changes, tensors)
        positions = {op.t["index"].key for entry in changes.values() for outer in entry.ops for op in outer.walk() if "index" in op.t}
        for key, tensor in tensors.items():
            if tensor.coding is None:
                tensors[key] = _smaller(job, key, tensor, cfg.level, steps=key in positions) or tensor
        return replace(job.delta, entries=changes, tensors=tensors)


def _replaced(entry: Entry) -> bool:
    """Whether a target takes new values as a whole, in place of those of the base."""
    first = entry.ops[0] if entry.ops else None
    return (
        entry.change is None
        and first is not None
        and (first.op, first.at, first.group, set(first.t)) == ("assign", None, None, {"values"})
        and first.t["values"].take is None
    )


def _flips(base: Base, target: str, new: Tensor) -> Tensor:
    """Which bits of a base tensor differ from `new`, computed when they are read."""
    old, code = base.tensor(target), f"U{8 * ITEMSIZE[new.dtype]}"

    def make() -> Iterator[bytes]:
        kind = f"<u{ITEMSIZE[new.dtype]}"
        for a, b in zip(entries(old), entries(new), strict=True):
            yield (a.view(kind) ^ b.view(kind)).tobytes()

    return Computed(code, new.shape, make)


def _smaller(job: Job, key: str, tensor: Tensor, level: int, *, steps: bool) -> Coded | None:
    """A tensor in planes, if that is smaller."""
    coded = replace(job, delta=replace(job.delta, tensors={key: tensor})).encode(key, "planes", {"level": level, "steps": steps})
    return coded if coded.payload.nbytes < tensor.nbytes else None
