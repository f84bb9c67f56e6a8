"""Low-rank forms of a matrix: the best one of a sum of products, at the cost of its factors, and of a matrix read in blocks.

    b, a = recompress([(b1, a1, 0.5), (b2, a2, 0.5)], rank=16)      # 0.5 b1 a1 + 0.5 b2 a2, the nearest of rank 16
    found = leading(Matrix(shape, read_rows), norm2, energy=0.9)

All is float64 numpy. By the theorem of Eckart and Young no matrices of the same rank come nearer (for `leading` of large matrices: to
about 1e-6). Both factors of a result carry the root of the singular values, with signs chosen so that the largest entry of each row of A is positive.
LAPACK's last bits depend on the machine and the numpy version, and on its threads: `stream.one_blas_thread` fixes those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import xp
from ..errors import InputError
from ..ops.chain import Get, gathered
from ..ops.spec import OpEntry
from .stream import row_blocks

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_DIRECT = 1 << 33
"""Matrices are decomposed as a whole up to this rows x columns x smaller side: about a second each."""

_EXTRA, _ROUNDS = 16, 6
"""Oversampling and power iterations of the randomised decomposition."""


class Factors(NamedTuple):
    """B (rows x r) and A (r x columns), float64, and the squared norm of B A."""

    b: Array
    a: Array
    captured: float


def pairs_of(ops: Iterable[OpEntry], get: Get) -> list[tuple[Array, Array, float]]:
    """The pairs (B, A, scale) of `lowrank` ops, float64, whose sum is what the ops add: a frozen pair (B0, A0) has the opposite scale."""
    found = []
    for op in ops:
        scale = float(op.cfg.get("scale", 1.0))
        for names, sign in ((("B", "A"), 1.0), (("B0", "A0"), -1.0)):
            if names[0] in op.t:
                b, a = (xp.cast(gathered(op.t[name], get), "float64") for name in names)
                found.append((b, a, sign * scale))
    return found


def recompress(pairs: Sequence[tuple[Array, Array, float]], rank: int | None = None, energy: float | None = None) -> Factors:
    """The matrix of low rank nearest to sum_i scale_i B_i A_i, which is never formed.

    pairs:  (B_i, A_i, scale_i), at least one: rows x r_i and r_i x columns
    rank:   the largest rank of the result
    energy: the share of the squared norm to keep, in (0, 1]: the least rank that does

    With both, both limits hold; with neither, the result is the sum itself in as few factors as it takes. With R = sum r_i the cost is
    about 4 (rows + columns) R^2 operations (two QR decompositions) and an SVD of R x R; memory a few times that of the factors.

    InputError for factors that are not finite.
    """
    import numpy as np

    left = np.concatenate([scale * xp.cast(b, "float64") for b, _, scale in pairs], 1)
    right = np.concatenate([xp.cast(a, "float64") for _, a, _ in pairs]).T
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise InputError("a low-rank factor has NaN or infinite entries", hint="check the run that made it")
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    s = _sizable(s, max(len(left), len(right)), np.linalg.norm(r_left) * np.linalg.norm(r_right))  # terms may cancel
    count = _count(s, float(s @ s), rank, energy) or s.size
    return _balanced(q_left @ u[:, :count], s[:count], vt[:count] @ q_right.T)


@dataclass(frozen=True)
class Matrix:
    """A matrix that is read in parts: `rows(lo, hi)` gives those rows, of any float dtype, the same ones each time."""

    shape: tuple[int, int]
    rows: Callable[[int, int], Array]

    def blocks(self) -> Iterator[tuple[int, int, Array]]:
        """All rows in blocks of a fixed size (sums over blocks are part of the result), as float64."""
        for lo, hi in row_blocks(self.shape, 1 << 20):
            yield lo, hi, self.rows(lo, hi).reshape(hi - lo, self.shape[1]).astype("float64")

    def times(self, x: Array) -> Array:
        """M x."""
        import numpy as np

        out = np.empty((self.shape[0], x.shape[1]))
        for lo, hi, part in self.blocks():
            out[lo:hi] = part @ x
        return out

    def transposed_times(self, x: Array) -> Array:
        """M^T x."""
        import numpy as np

        out = np.zeros((self.shape[1], x.shape[1]))
        for lo, hi, part in self.blocks():
            out += part.T @ x[lo:hi]
        return out


def leading(matrix: Matrix, norm: float, rank: int | None = None, energy: float | None = None) -> Factors | None:
    """The nearest matrix of low rank (limits as in `recompress`); None where its factors take as much room as the matrix, or it is zero.

    `norm` is the squared norm of `matrix`. Decomposed as a whole where rows x columns x smaller side is at most 2^33, at 4 to 20 times that
    many operations; larger ones by a randomised decomposition of a little more than the rank that is asked for (with an energy:
    of 32, 64, ..., until it is reached), each of which reads the matrix 14 times.
    """
    rows, columns = matrix.shape
    small = min(rows, columns)
    if not norm:
        return None
    limit = small if rank is None else min(rank, small)
    width = small if rows * columns * small <= _DIRECT else min(small, (rank or 16) + _EXTRA)
    while True:
        u, s, vt = _triplets(matrix, width)
        s = _sizable(s, max(rows, columns), s[:1])
        count = _count(s, norm, rank, energy)
        if count is not None or width == small:
            break
        if width * (rows + columns) >= rows * columns:
            return None
        width = min(small, 2 * width)
    count = min(limit, s.size) if count is None else count
    if not count or count * (rows + columns) >= rows * columns:
        return None
    return _balanced(u[:, :count], s[:count], vt[:count])


def _sizable(s: Array, side: int, largest: Any) -> Array:
    """The singular values that are not rounding, of a matrix with sides up to `side` made of parts up to `largest`."""
    import numpy as np

    out: Array = s[s > largest * np.finfo(np.float64).eps * side]
    return out


def _count(s: Array, norm: float, rank: int | None, energy: float | None) -> int | None:
    """How many of the leading singular values to keep; None if they do not reach the energy (and the rank does not limit them)."""
    limit = s.size if rank is None else min(rank, s.size)
    if energy is None:
        return limit
    enough = (s * s).cumsum()[:limit] >= energy * norm * (1 - 1e-12)
    if enough.any():
        return int(enough.argmax()) + 1
    return limit if rank is not None and limit == rank else None


def _balanced(u: Array, s: Array, vt: Array) -> Factors:
    import numpy as np

    root = np.sqrt(s)
    signs = np.sign(vt[np.arange(len(vt)), abs(vt).argmax(1)]) if len(vt) else root
    return Factors(u * (signs * root), vt * (signs * root)[:, None], float(sum(s * s)))


def _triplets(matrix: Matrix, width: int) -> tuple[Array, Array, Array]:
    """The `width` leading singular triplets: LAPACK's where that is all of them, else by randomised subspace iteration
    (Halko, Martinsson and Tropp 2011, arXiv 0909.4061) from a fixed start."""
    import numpy as np

    rows, columns = matrix.shape
    if width == min(rows, columns):
        u, s, vt = np.linalg.svd(np.concatenate([part for _, _, part in matrix.blocks()]), full_matrices=False)
        return u, s, vt
    start = xp.normals(np.zeros(0), xp.key(0), 0, columns * width).reshape(columns, width).astype(np.float64)
    basis = np.linalg.qr(matrix.times(start))[0]
    for _ in range(_ROUNDS):
        basis = np.linalg.qr(matrix.times(np.linalg.qr(matrix.transposed_times(basis))[0]))[0]
    u, s, vt = np.linalg.svd(matrix.transposed_times(basis).T, full_matrices=False)
    return basis @ u, s, vt
