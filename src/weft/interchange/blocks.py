"""Low-rank increments on rectangles of tensors, and how they look from the other side of a name map.

A model may keep in one live tensor what a checkpoint keeps in several, or transposed, or the other way round. A
product B A can follow such a rearrangement exactly: cutting rows cuts B, cutting columns cuts A, and a transpose
swaps the two. Nothing here is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..ops.op import flat_shape
from ..ops.spec import At, Index

Array = Any
Span = tuple[int, int]


class Unfit(Exception):
    """An increment that cannot be said as a low-rank product on the other side; the message says why."""


@dataclass(frozen=True)
class Matrix:
    """A live parameter that LoRA can change: its name and shape, and the axes that B (`out`) and A (`inp`) run along.

    `layout` is "linear", "conv1d", "embedding", "conv", or "parameter" for one that is wrapped by itself (stacked
    experts: the first axis counts them).
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    out: int = 0
    inp: int = 1

    @property
    def experts(self) -> int:
        """How many matrices are stacked; 0 for a plain one."""
        return self.shape[0] if self.layout == "parameter" and len(self.shape) == 3 else 0

    @property
    def flat(self) -> tuple[int, ...]:
        """The shape in which `out` and `inp` count: convolutions as a matrix, the others as they are."""
        return flat_shape(self.shape) if self.layout == "conv" else self.shape


@dataclass(frozen=True)
class Block:
    """`scale * (b @ a - b0 @ a0)` on a rectangle of a tensor.

    `box` is the range along each axis of the tensor; b (rows, r) runs along the axis `row`, a (r, columns) along the
    axis `col`, and every other axis has size 1 in the box. The frozen pair b0, a0 may be absent.
    """

    b: Array
    a: Array
    box: tuple[Span, ...]
    row: int = 0
    col: int = 1
    scale: float = 1.0
    b0: Array | None = None
    a0: Array | None = None

    @classmethod
    def whole(cls, b: Array, a: Array, shape: Sequence[int], row: int = 0, col: int = 1, scale: float = 1.0, **frozen: Array) -> Block:
        """A block that covers a matrix of `shape`."""
        return cls(b, a, tuple((0, size) for size in shape), row, col, scale, **frozen)

    def upright(self) -> Block:
        """The same increment with its row axis before its column axis."""
        if self.row < self.col:
            return self
        frozen = {} if self.b0 is None or self.a0 is None else {"b0": self.a0.T, "a0": self.b0.T}
        return replace(self, b=self.a.T, a=self.b.T, row=self.col, col=self.row, **frozen)

    def at(self, shape: Sequence[int]) -> At | None:
        """The view of a tensor of `shape` that is this block's matrix; None if that is the tensor itself."""
        if len(shape) != len(self.box):
            shape = flat_shape(tuple(shape))
        index: list[Index] = [span if axis in (self.row, self.col) else span[0] for axis, span in enumerate(self.box)]
        while index and index[-1] == (0, shape[len(index) - 1]):
            index.pop()
        return At(index=tuple(index)) if index else None

    def _cut(self, axis: int, start: int, stop: int) -> Block | None:
        """What lies in start..stop of an axis, counted from start."""
        lo, hi = self.box[axis]
        first, last = max(lo, start), min(hi, stop)
        if first >= last:
            return None
        part = slice(first - lo, last - lo)
        box = (*self.box[:axis], (first - start, last - start), *self.box[axis + 1 :])
        if axis == self.row:
            return replace(self, box=box, b=self.b[part], b0=None if self.b0 is None else self.b0[part])
        if axis == self.col:
            return replace(self, box=box, a=self.a[:, part], a0=None if self.a0 is None else self.a0[:, part])
        return replace(self, box=box)

    def seen(self, at: At | None, shape: Sequence[int]) -> Block | None:
        """This block of a tensor of `shape` as a block of the view `at` of it; None if the view shows nothing of it."""
        at = _plain(at, shape, len(self.box), False)
        if at is None:
            return self
        order = at.transpose or tuple(range(len(shape)))
        block = replace(self, box=tuple(self.box[axis] for axis in order), row=order.index(self.row), col=order.index(self.col))
        for axis, part in enumerate(at.index):
            cut = block._cut(axis, *(part if isinstance(part, tuple) else (part, part + 1)))
            if cut is None:
                return None
            block = cut
        dropped = [axis for axis, part in enumerate(at.index) if not isinstance(part, tuple)]
        if block.row in dropped or block.col in dropped:
            raise Unfit("a view that keeps one row or one column")
        kept = [axis for axis in range(len(order)) if axis not in dropped]
        return replace(block, box=tuple(block.box[axis] for axis in kept), row=kept.index(block.row), col=kept.index(block.col))

    def placed(self, at: At | None, shape: Sequence[int]) -> Block:
        """This block of the view `at` as a block of the tensor of `shape` that the view looks at."""
        at = _plain(at, shape, len(self.box), True)
        if at is None:
            return self
        order = at.transpose or tuple(range(len(shape)))
        box: list[Span] = []
        axes = iter(range(len(self.box)))
        where: dict[int, int] = {}
        for axis in range(len(order)):
            part = at.index[axis] if axis < len(at.index) else (0, shape[order[axis]])
            if isinstance(part, tuple):
                old = next(axes)
                where[old] = axis
                box.append((self.box[old][0] + part[0], self.box[old][1] + part[0]))
            else:
                box.append((part, part + 1))
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return replace(self, box=tuple(box[axis] for axis in inverse), row=order[where[self.row]], col=order[where[self.col]])


def _plain(at: At | None, shape: Sequence[int], axes: int, dropped: bool) -> At | None:
    """The view, unless it only reshapes in a way that keeps the rows and columns of the flattened matrix. `axes` is how
    many a block has: those of the tensor, or (`dropped`) those that the view keeps."""
    if at is None:
        return None
    if at.reshape is not None and not at.transpose and not at.index and flat_shape(tuple(at.reshape)) == flat_shape(tuple(shape)):
        return None
    if at.reshape is not None or axes != (len(at.shape(shape)) if dropped else len(shape)):
        raise Unfit(f"a part of a tensor of shape {list(shape)} whose rows or columns are not its own")
    return at


def joined(blocks: Sequence[Block], shape: Sequence[int]) -> tuple[Array, Array, float]:
    """The sum of blocks of one matrix of `shape` as one b (rows, r), a (r, columns) and scale, zero outside the boxes.

    Blocks that share a factor share its rank, so a product that was cut into parts is put together again at its old
    rank. One common scale is kept; different ones go into b, and so does the sign of frozen pairs, in float32.
    """
    import numpy as np

    flat: list[tuple[Array, Array, Span, Span, float]] = []
    if len(blocks) > 1:
        blocks = [_single(block) for block in blocks]
    for block in (block.upright() for block in blocks):
        rows, columns = block.box[block.row], block.box[block.col]
        flat.append((block.b, block.a, rows, columns, block.scale))
        if block.b0 is not None and block.a0 is not None:
            flat.append((-block.b0, block.a0, rows, columns, block.scale))
    scales = {scale for *_, scale in flat}
    scale = scales.pop() if len(scales) == 1 else 1.0
    if scales:
        flat = [(np.asarray(b, np.float32) * np.float32(s), a, rows, columns, 1.0) for b, a, rows, columns, s in flat]
    left: dict[tuple[bytes, Span], tuple[Array, Array]] = {}
    for b, a, (lo, hi), columns, _ in flat:  # one a for all blocks that have it: their rows add up in b
        key = (np.ascontiguousarray(a).tobytes(), columns)
        whole = left[key][0] if key in left else np.zeros((shape[0], b.shape[1]), b.dtype)
        whole[lo:hi] += b
        left[key] = (whole, a)
    right: dict[bytes, tuple[Array, Array]] = {}
    for (_, (lo, hi)), (b, a) in left.items():  # and one b for all that have it
        key_b = b.tobytes()
        whole = right[key_b][1] if key_b in right else np.zeros((a.shape[0], shape[1]), a.dtype)
        whole[:, lo:hi] += a
        right[key_b] = (b, whole)
    parts = list(right.values())
    if len(parts) == 1:
        return (*parts[0], scale)
    return np.concatenate([np.asarray(b) for b, _ in parts], 1), np.concatenate([np.asarray(a) for _, a in parts], 0), scale


def _single(block: Block) -> Block:
    """The block in float32, so that sums of parts are not rounded to a narrow dtype."""
    import numpy as np

    def wide(x: Array | None) -> Array | None:
        return None if x is None else np.asarray(x, np.float32)

    return replace(block, b=wide(block.b), a=wide(block.a), b0=wide(block.b0), a0=wide(block.a0))


def padded(b: Array, a: Array, rank: int) -> tuple[Array, Array]:
    """The same product at a larger rank, filled with zeros."""
    import numpy as np

    more = rank - a.shape[0]
    return np.pad(b, ((0, 0), (0, more))), np.pad(a, ((0, more), (0, 0)))


def truncated(matrix: Array, rank: int | None, energy: float | None) -> tuple[Array, Array, float]:
    """The best b, a of at most `rank`, or of the smallest rank that keeps the share `energy` of the squared norm, and
    the relative residual ||matrix - b a|| / ||matrix||. Both limits may be given; the smaller rank holds."""
    import numpy as np

    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    total = float((s * s).sum())
    keep = len(s) if rank is None else min(rank, len(s))
    if energy is not None and total > 0:
        keep = min(keep, int(np.searchsorted(np.cumsum(s * s), energy * total * (1 - 1e-12))) + 1)
    keep = max(keep, 1)
    rest = float((s[keep:] ** 2).sum())
    root = np.sqrt(s[:keep])
    b, a = (u[:, :keep] * root).astype(np.float32), (root[:, None] * vt[:keep]).astype(np.float32)
    return b, a, (rest / total) ** 0.5 if total > 0 else 0.0
