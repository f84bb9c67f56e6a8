"""Where a delta changed the model: the layout of a heat map, one row a role and one column a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from typing import Any

from .._roles import COMMON

STEPS = 8
"""Colours of the scale. Steps and not a continuum, so that a colour can be looked up in the legend."""

DECADES = 4
"""The scale reaches at most this far below the largest change; what is smaller has the first colour."""

ROW = 20
"""Height of a row in pixels."""

WIDTH = 900
"""Width in pixels that the columns share, as long as each has at least 3 of them."""

Layer = Mapping[str, Any]
"""One record of a report's `layers`."""


@dataclass(frozen=True)
class Scale:
    """Equal steps of the logarithm from `low` to `high`."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale | None:
        """The scale of the positive ones of some values, at least a factor of two wide. None if there are none."""
        positive = [value for value in values if value > 0]
        if not positive:
            return None
        high = max(positive)
        low = max(min(positive), high / 10**DECADES)
        return cls(min(low, high / 2), high)

    def step(self, value: float) -> int:
        """The colour of a positive value, 0 to STEPS - 1."""
        return max(0, min(STEPS - 1, floor(STEPS * log10(value / self.low) / log10(self.high / self.low))))

    @property
    def bounds(self) -> list[float]:
        """The STEPS + 1 values at which the steps begin and end."""
        return [self.low * (self.high / self.low) ** (k / STEPS) for k in range(STEPS + 1)]


@dataclass(frozen=True)
class Cell:
    """One place of the map: corner in pixels, style (`style_of`), and the tensors there, largest change first."""

    x: int
    y: int
    style: str
    layers: list[Layer]


@dataclass(frozen=True)
class Heatmap:
    """The map, ready to be drawn. `rest` are the tensors without a layer, each with its style; `ordered` are all, by layer and role."""

    scale: Scale | None
    labels: list[str]
    ticks: list[tuple[int, int]]
    cells: list[Cell]
    column: int
    width: int
    height: int
    rest: list[tuple[str, Layer]]
    ordered: list[Layer]

    @property
    def styles(self) -> set[str]:
        """The styles in use, so that the legend explains no others."""
        return {cell.style for cell in self.cells} | {style for style, _ in self.rest}


def heatmap(layers: Sequence[Layer]) -> Heatmap:
    """Lay out the records of `layers`, the rows in the order of the table of roles.

    Several tensors of one role and layer (experts, weight and bias) share a cell, which shows the largest change.
    """
    scale = Scale.of([layer["relative"] for layer in layers if layer["relative"] is not None])
    roles = list(COMMON)
    by_role = sorted(layers, key=lambda layer: roles.index(layer["role"]) if layer["role"] in COMMON else len(roles))
    placed: dict[tuple[str, str], dict[int, list[Layer]]] = {}
    for layer in by_role:
        if layer["layer"] is not None:
            placed.setdefault(_row(layer), {}).setdefault(layer["layer"], []).append(layer)
    found = sorted({number for row in placed.values() for number in row})
    # layers that nothing touches are told apart by their empty columns, unless the numbers are no count of layers
    columns = list(range(found[-1] + 1)) if found and found[-1] < 1000 else found
    column = max(3, min(28, WIDTH // max(1, len(columns))))
    at = {number: k * column for k, number in enumerate(columns)}
    cells = []
    for y, row in enumerate(placed.values()):
        for number, here in row.items():
            ordered = sorted(here, key=lambda layer: -1.0 if layer["relative"] is None else -layer["relative"])
            worst = next((layer for layer in ordered if not layer["finite"]), ordered[0])
            cells.append(Cell(at[number], y * ROW, style_of(worst, scale), ordered))
    every = next(step for step in (1, 2, 5, 10) if step * column >= 24)
    stacks = {stack for stack, _ in placed}
    return Heatmap(
        scale,
        [f"{stack}: {role}" if len(stacks) > 1 else role for stack, role in placed],
        [(at[number] + column // 2, number) for k, number in enumerate(columns) if k % every == 0],
        cells,
        column,
        column * len(columns),
        ROW * len(placed),
        [(style_of(layer, scale), layer) for layer in by_role if layer["layer"] is None],
        sorted(by_role, key=lambda layer: float("inf") if layer["layer"] is None else layer["layer"]),
    )


def style_of(layer: Layer, scale: Scale | None) -> str:
    """How a tensor is drawn: `bad` (entries that are not finite), `unsized` (no relative size), `zero`, or `s0` to `s7`."""
    if not layer["finite"]:
        return "bad"
    if layer["relative"] is None:
        return "unsized"
    return f"s{scale.step(layer['relative'])}" if scale is not None and layer["relative"] > 0 else "zero"


def _row(layer: Layer) -> tuple[str, str]:
    """The row of a tensor: the path of its list of layers (encoders and decoders count apart), and its role, or else the path below the layer."""
    module, target = str(layer["target"]).startswith("@module/"), str(layer["target"]).removeprefix("@module/")
    parts, number = target.split("."), str(layer["layer"])
    cut = parts.index(number) if number in parts else len(parts)
    stack, below = (".".join(parts[:cut]), ".".join(parts[cut + 1 :])) if cut < len(parts) else ("", target)
    return stack, (layer["role"] or below or target) + (" (activations)" if module else "")
