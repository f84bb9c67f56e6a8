"""Plots of reports, where matplotlib is at hand."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from .._write import write_bytes

FILE = "plot.svg"


def save(folder: Path | None, draw: Callable[[Any], None]) -> str | None:
    """Give `draw` the axes of a figure and write it to `folder`; its name, or None without a folder or without matplotlib.

    The same figure gives the same bytes.
    """
    if folder is None:
        return None
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return None
    with mpl.rc_context({"svg.hashsalt": "weft", "font.size": 9}):
        figure = Figure(figsize=(5.5, 4), layout="constrained")
        draw(figure.subplots())
        made = BytesIO()
        figure.savefig(made, format="svg", metadata={"Date": None})
    write_bytes(folder / FILE, made.getvalue())
    return FILE
