"""Sets of points of which none is better than another in everything, and how much they dominate. Smaller is better here."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, ...]


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is nowhere worse than `other`, and somewhere better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other


def front(points: Sequence[Point]) -> list[int]:
    """Positions of the points that none dominates, in their order; of equal points the first."""
    return [k for k, point in enumerate(points) if not any(dominates(other, point) for other in points) and point not in points[:k]]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume of what the points dominate, up to `reference`; those that are not better than it in everything count nothing.

    By slices along the last axis, exact; for fronts of some hundred points.
    """
    inside = [point for point in points if all(a < b for a, b in zip(point, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(point[0] for point in inside)
    inside = sorted({inside[k] for k in front(inside)}, key=lambda point: point[-1])
    volume = 0.0
    for number, point in enumerate(inside):
        end = inside[number + 1][-1] if number + 1 < len(inside) else reference[-1]
        volume += (end - point[-1]) * hypervolume([each[:-1] for each in inside[: number + 1]], reference[:-1])
    return volume
