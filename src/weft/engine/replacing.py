"""A checkpoint as a delta: its tensors in place of the base's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from .. import xp
from ..base import Base
from ..delta import Builder, Delta
from ..stored import Computed, Tensor, numpy_dtype
from .increments import Increments, Target


def replacing(models: Increments, number: int) -> Delta:
    """Update `number`, a checkpoint, as the delta that puts its tensors where they differ from the base's.

    Nothing is copied: values are read from the checkpoint's files. A tensor that it has in another dtype is rounded to the base's.
    """
    checkpoint = models.updates[number]
    assert isinstance(checkpoint, Base) and models.base is not None
    build = Builder(models.base)
    for name, target in models.targets.items():
        if models.touches(number, name):
            tensor = checkpoint.tensors[name]
            rounded = Computed(target.dtype, target.shape, partial(_rounded, tensor, target))
            build.put(name, "assign", {"values": tensor if tensor.dtype == target.dtype else rounded})
    return build.done()


def _rounded(tensor: Tensor, target: Target) -> Iterator[bytes]:
    name = numpy_dtype(target.dtype).name
    for block in target.blocks():
        yield xp.cast(tensor.rows(block.lo, block.hi) if target.shape else tensor.read(), name).tobytes()
