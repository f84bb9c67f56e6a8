"""The merged increments as tensors: computed block by block whenever they are read, or from the files straight into a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from .._fused import Combination, Piece
from ..engine.increments import Block, Increments, Target
from ..engine.stream import in_threads
from ..stored import Relative
from ._depth import Settings
from ._method import MergeMethod

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class Kernel:
    """A method at work on its increments: what every merged tensor needs to compute itself. `state`: what `prepare` found."""

    def __init__(self, models: Increments, rule: MergeMethod[Any], settings: Settings[Any], state: Any) -> None:
        self.models, self._rule, self._settings, self._state = models, rule, settings, state
        self._lock = Lock()
        self._last: tuple[Target, Array] | None = None

    def _compute(self, block: Block, old: Array | None = None) -> Array:
        """The merged increment of one block, rounded to the dtype of increments. `old`: the base's stored values there, if at hand."""
        rule = self.combination(block.target)
        if rule is not None:
            return self.models.combined(rule, block, old)
        taus = self.models.read_all(block, old) if self._rule.reads else []
        merged = self._rule.merge(taus, *self._settings.at(block.target), self._state, block)
        return merged.astype(block.target.wide, copy=False)

    def combination(self, target: Target) -> Combination | None:
        """How the increments of a tensor become one, if the method can say it so."""
        return self._rule.combination(*self._settings.at(target), self._state, target)

    def rows(self, block: Block, old: Array | None = None) -> Array:
        """The merged increment on any rows."""
        return self._whole(block.target)[block.lo : block.hi] if self._rule.whole and block.target.shape else self._compute(block, old)

    def parts(self, target: Target) -> Iterator[Array]:
        """The merged increment in order, computed ahead in threads."""
        blocks = [target.whole] if self._rule.whole and target.size else target.blocks(self.models.block_size)
        return in_threads((partial(self._compute, block) for block in blocks), self.models.threads)

    def _whole(self, target: Target) -> Array:
        with self._lock:  # kept until rows of another tensor are asked for
            if self._last is None or self._last[0] is not target:
                self._last = (target, self._compute(target.whole))
            return self._last[1]


@dataclass(frozen=True, eq=False)
class MergedTensor(Relative):
    """The merged increment of one tensor, computed whenever it is read."""

    kernel: Kernel
    target: Target

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.target.stored_as

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.target.shape

    def parts(self) -> Iterator[Array]:
        return self.kernel.parts(self.target)

    def rows(self, lo: int, hi: int) -> Array:
        return self.kernel.rows(Block(self.target, lo, hi))

    def piece(self, lo: int, hi: int, position: int) -> Piece | None:
        rule = self.kernel.combination(self.target)
        return None if rule is None or self.target.added else self.kernel.models.piece(rule, self.target, lo, hi, position)

    def beside(self, lo: int, hi: int, old: Array) -> Array:
        return self.kernel.rows(Block(self.target, lo, hi), None if self.target.added else old)

    def read(self) -> Array:
        import numpy as np

        out = np.empty(self.target.size, self.target.wide)
        done = 0
        for piece in self.parts():
            out[done : done + piece.size] = piece.reshape(-1)
            done += piece.size
        return out.reshape(self.target.shape)
