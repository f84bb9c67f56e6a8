"""Before porting: how far apart two bases are, and whether an update of one is likely to do on the other what it did.

What the numbers mean, where the limits come from and what they cannot say stands in docs/porting.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import fsum, sqrt
from typing import TYPE_CHECKING, Any

from .. import xp
from ..base import Base
from ..delta import BaseTensor, Delta, Entry
from ..engine.increments import Block, Increments, Target
from ..engine.stream import one_blas_thread
from ..errors import MismatchError, UsageError
from ..ops.spec import OpEntry, Ref
from ..stored import FLOATS, Tensor
from ._carry import Carried, Place, place, renamer

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

NEAR, FAR = 0.4, 0.8
"""||new - old|| / ||old||: up to the first bases count as near, above the second as far (unrelated ones are at 1.41)."""

SAME_LINE = 0.35
"""Overlap of the bases' own leading subspaces below which they do not seem to come from one another."""

FLAT, HIGH = 0.05, 0.5
"""Barrier on the line between the bases, as a share of the larger loss at its ends."""

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the loss on the line between the bases is measured."""

_EXTRA, _ROUNDS = 4, 4
"""Oversampling and rounds of the subspace iteration."""


@dataclass(frozen=True)
class Overlap:
    """How the leading subspaces of one matrix lie to each other: mean squared cosine of the principal angles, 1 the same, 0 at right
    angles. (left, right) each. `chance` is what random subspaces would have.

    bases:  of the old base's matrix and the new one's
    update: of the update and of the difference between the bases
    """

    name: str
    bases: tuple[float, float]
    update: tuple[float, float]
    chance: tuple[float, float]


@dataclass(frozen=True)
class Prediction:
    """What can be known before an update is ported.

    verdict:  "likely", "doubtful" or "unlikely"; `reason` is why. A guess from other models, never a promise
    distance: ||new - old|| / ||old|| over the tensors that both bases have
    size:     ||update|| / ||old|| over the tensors that the update changes
    cosine:   of the update and the difference of the bases, over the tensors that the update changes; None if one of them is zero
    bases:    mean overlap of the leading subspaces of old and new matrices; None without matrices
    update:   mean overlap of those of the update and of the difference; None if the bases do not differ there
    matrices: each matrix that was looked at
    losses:   with data, the loss at 0, 1/4, 1/2, 3/4 and 1 of the line from the old base to the new one
    barrier:  how far the loss rises above the straight line between its ends, at most; None without data
    shared:   tensors that both bases have, of the source's
    """

    verdict: str
    reason: str
    distance: float
    size: float
    cosine: float | None
    bases: float | None
    update: float | None
    matrices: tuple[Overlap, ...]
    losses: tuple[float, ...] | None
    barrier: float | None
    shared: tuple[int, int]

    @property
    def sentence(self) -> str:
        """The verdict and its reason."""
        return f"porting is {self.verdict} to work: {self.reason}" if self.verdict != "doubtful" else f"it is doubtful that porting works: {self.reason}"

    def text(self) -> str:
        """For people: the sentence, and the numbers it comes from."""
        shown = {"distance of the bases": self.distance, "size of the update": self.size, "cosine of both": self.cosine}
        shown |= {"overlap of the bases": self.bases, "of update and difference": self.update, "barrier": self.barrier}
        return f"{self.sentence}\n  ({', '.join(f'{name} {value:.3g}' for name, value in shown.items() if value is not None)})"

    def json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)


def predict(
    source: Base,
    target: Base,
    update: Delta | Base,
    data: Any = None,
    *,
    rank: int = 8,
    matrices: int = 24,
    rename: Sequence[str] = (),
    device: str | None = None,
) -> Prediction:
    """How near `target` is to `source`, and what that says about an update of `source`. Reads both bases once, and some matrices more often.

    update:   a delta for `source`, or a checkpoint that was tuned from it
    data:     rows, to measure the loss on the line between the bases (see `weft.evaluate` for what rows may be): five runs of the model
    rank:     of the leading subspaces that are compared
    matrices: how many of the matrices that the update changes are looked at, evenly spread
    rename:   as for port methods: OLD=NEW

    Raises MismatchError if no tensor of the source is in the target.
    """
    if rank < 1 or matrices < 0:
        raise UsageError(f"rank must be at least 1 and matrices at least 0, got {rank} and {matrices}")
    found, _ = place(source.tensors, source, target, renamer(rename, list(source.tensors)))
    pairs = {name: each.new for name, each in found.items() if not each.takes and source.tensors[name].dtype in FLOATS}
    if not pairs:
        raise MismatchError(f"no floating-point tensor of {source.source} is in {target.source} in the same shape", hint="-p rename=OLD=NEW")
    models = Increments([_in_place(update) if isinstance(update, Delta) else update], source)
    touched = {name: each for name, each in models.targets.items() if name in pairs}
    with one_blas_thread():
        sums = {name: _sums(models, source.tensors[name], target.tensors[new], touched.get(name)) for name, new in pairs.items()}
        looked = [name for name, each in touched.items() if len(each.shape) == 2 and min(each.shape) > 1]
        looked = [looked[round(k)] for k in _spread(len(looked), matrices)]
        overlaps = tuple(_overlap(models, touched[name], source.tensors[name], target.tensors[pairs[name]], rank) for name in looked)
    losses = None if data is None else _losses(source, target, pairs, update, data, device)
    return _judged(sums, touched, overlaps, losses, (len(pairs), len(source.tensors)))


def _in_place(update: Delta) -> Delta:
    """The part of a delta that changes tensors of its base."""
    return replace(update, entries={name: e for name, e in update.entries.items() if e.base is not None and e.change is None and e.dtype in FLOATS}, over=())


def _spread(count: int, most: int) -> list[float]:
    """At most `most` positions of 0..count-1, evenly spread, ends included."""
    if count <= most:
        return list(range(count))
    return [k * (count - 1) / max(1, most - 1) for k in range(most)]


# --- distances


def _sums(models: Increments, old: Tensor, new: Tensor, target: Target | None) -> tuple[float, float, float, float]:
    """||old||^2, ||new - old||^2, ||update||^2 and <update, new - old> of one tensor."""
    import numpy as np

    shape = Target("", old.dtype, old.shape, None) if target is None else target
    parts = []
    for block in shape.blocks(models.block_size):
        a, b = _rows(old, block), _rows(new, block)
        d = b - a
        tau = models.read(0, block).astype(np.float64) if target is not None else np.zeros(())
        parts.append([np.sum(a * a), np.sum(d * d), np.sum(tau * tau), np.sum(tau * d)])
    return tuple(fsum(column) for column in zip(*parts, strict=True)) if parts else (0.0, 0.0, 0.0, 0.0)  # type: ignore[return-value]


def _rows(tensor: Tensor, block: Block) -> Array:
    """A block of a base in float64; zeros where it is not finite (masks)."""
    import numpy as np

    values = xp.cast(tensor.rows(block.lo, block.hi) if tensor.shape else tensor.read(), "float64")
    return np.where(np.isfinite(values), values, 0.0)


# --- subspaces


Blocks = Callable[[], Iterator[Mapping[str, "Array"]]]
"""One walk over the rows of several matrices of one shape, block by block."""


def _overlap(models: Increments, target: Target, old: Tensor, new: Tensor, rank: int) -> Overlap:

    def walk() -> Iterator[Mapping[str, Array]]:
        for block in target.blocks(models.block_size):
            a, b = _rows(old, block), _rows(new, block)
            yield {"old": a, "new": b, "difference": b - a, "update": models.read(0, block).astype("float64")}

    bases = leading(walk, target.shape[1], min(rank, *target.shape))
    k = min(rank, *target.shape)
    return Overlap(
        target.name,
        tuple(aligned(bases["old"][side], bases["new"][side]) for side in (0, 1)),  # type: ignore[arg-type]
        tuple(aligned(bases["update"][side], bases["difference"][side]) for side in (0, 1)),  # type: ignore[arg-type]
        (k / target.shape[0], k / target.shape[1]),
    )


def leading(walk: Blocks, columns: int, rank: int) -> dict[str, tuple[Array, Array]]:
    """Of each matrix in a walk, orthonormal bases (m x k, n x k) of its leading left and right singular subspaces, k at most `rank`.

    By subspace iteration, so the matrices are read in blocks, a few times. k is less where a matrix has a smaller rank, 0 for zeros.
    """
    import numpy as np

    start = np.linalg.qr(np.random.default_rng(0).standard_normal((columns, min(columns, rank + _EXTRA))))[0]
    right: dict[str, Array] = {}
    for _ in range(_ROUNDS):
        sums: dict[str, Array] = {}
        for parts in walk():
            for name, rows in parts.items():
                sums[name] = sums.get(name, 0) + rows.T @ (rows @ right.get(name, start))
        right = {name: np.linalg.qr(total)[0] for name, total in sums.items()}
    images: dict[str, list[Array]] = {name: [] for name in right}
    for parts in walk():
        for name, rows in parts.items():
            images[name].append(rows @ right[name])
    found = {}
    for name, pieces in images.items():
        u, s, vt = np.linalg.svd(np.concatenate(pieces), full_matrices=False)
        k = min(rank, int((s > 1e-6 * s[0]).sum())) if s[0] > 0 else 0
        found[name] = (u[:, :k], (right[name] @ vt.T)[:, :k])
    return found


def aligned(a: Array, b: Array) -> float:
    """Mean squared cosine of the principal angles between the spans of two orthonormal bases (of the smaller one's); 0 if one is empty."""
    import numpy as np

    smaller = min(a.shape[1], b.shape[1])
    return float(np.sum((a.T @ b) ** 2) / smaller) if smaller else 0.0


# --- losses


def _losses(source: Base, target: Base, pairs: Mapping[str, str], update: Delta | Base, data: Any, device: str | None) -> tuple[float, ...]:
    """The loss on the line from the source to the target. A head that the data need and only the update has goes along."""
    from ..checking import evaluate
    from ..engine.data import read_rows

    rows = read_rows(data)
    between = _difference(source, target, pairs)
    head = [update.only(added)] if isinstance(update, Delta) and (added := [name for name, e in update.entries.items() if e.change]) else []
    points = POINTS if between.entries else (0.0,)
    found = [float(evaluate(source, [*([t * between] if t else []), *head], rows, device=device)["metrics"]["nll"]) for t in points]
    return tuple(found) if between.entries else tuple(found * len(POINTS))


def _difference(source: Base, target: Base, pairs: Mapping[str, str]) -> Delta:
    """target - source as a delta of the source, of the tensors that both have, computed when it is read."""
    # without files: the hashes of a part must not be kept as those of the whole
    parts = [
        Base(base.source, base.path, (), {old: base.tensors[new] for old, new in names.items()}, {}, {})
        for base, names in ((target, pairs), (source, {name: name for name in pairs}))
    ]
    models = Increments([parts[0]], parts[1])
    entries, tensors = {}, {}
    for name, each in models.targets.items():
        key = f"{name}//0.values"
        entries[name] = Entry((OpEntry("dense", {}, {"values": Ref(key)}),), BaseTensor(each.dtype, each.shape, source.sha256(name)))
        tensors[key] = Carried(models, each, Place(name, name))
    return Delta(source.fingerprint, entries, tensors)


# --- the verdict


def _judged(
    sums: Mapping[str, tuple[float, float, float, float]],
    touched: Mapping[str, Target],
    overlaps: tuple[Overlap, ...],
    losses: tuple[float, ...] | None,
    shared: tuple[int, int],
) -> Prediction:
    old, moved = (fsum(each[k] for each in sums.values()) for k in (0, 1))
    here, there, size, product = (fsum(sums[name][k] for name in touched) for k in range(4))
    distance = sqrt(moved / old) if old else 0.0
    barrier = None
    if losses is not None:
        barrier = max(loss - ((1 - t) * losses[0] + t * losses[-1]) for t, loss in zip(POINTS, losses, strict=True))
    bases = _mean([value for each in overlaps for value in each.bases])
    verdict, reason = _verdict(distance, bases, barrier, losses)
    return Prediction(
        verdict,
        reason,
        distance,
        sqrt(size / here) if here else 0.0,
        product / sqrt(size * there) if size and there else None,
        bases,
        _mean([value for each in overlaps for value in each.update]) if there else None,
        overlaps,
        losses,
        barrier,
        shared,
    )


def _mean(values: Sequence[float]) -> float | None:
    return fsum(values) / len(values) if values else None


def _verdict(distance: float, bases: float | None, barrier: float | None, losses: tuple[float, ...] | None) -> tuple[str, str]:
    """The worst that any number says, and its reason."""
    if distance == 0:
        return "likely", "the bases are the same"
    apart = f"the bases are {distance:.2f} of their size apart"
    height = 0.0
    if barrier is not None and losses is not None and max(losses[0], losses[-1]) > 0:
        height = barrier / max(losses[0], losses[-1])
    risen = f"the loss on the line between the bases rises to {height:.0%} above its ends"
    other = "(permuted and trans-lora do not need that)"
    if height > HIGH:
        return "unlikely", f"{risen}, so they are not linearly connected {other}"
    if bases is not None and bases < SAME_LINE:
        return "unlikely", f"the leading directions of the bases' own matrices overlap by {bases:.0%} only, as if neither came from the other {other}"
    if distance > FAR:
        return "unlikely", f"{apart}; unrelated ones are at 1.41"
    if height > FLAT:
        return "doubtful", risen
    if distance > NEAR:
        return "doubtful", f"{apart}, so part of what the update does may be lost"
    same_way = " and point the same way" if bases is not None else ""
    flat = ", and the loss does not rise on the line between them" if barrier is not None else ""
    return "likely", f"{apart}{same_way}{flat}"
