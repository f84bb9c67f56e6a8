"""weft: one artifact and one meaning for every update to a pretrained model.

    import weft
    base = weft.Base.open("path/to/model")
    delta = weft.tune(base, "train.jsonl", method="lora", objective="classification")
    delta.save("task.safetensors")
    weft.fold(base, [delta], "merged/")

Names are loaded at first use, so `import weft` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Base": "base",
    "Delta": "delta",
    "Builder": "delta",
    "attach": "attaching",
    "detach": "attaching",
    "fold": "folding",
    "diff": "diffing",
    "tune": "tuning",
    "merge": "merging",
    "of_task": "engine.routed",
    "compress": "compressing",
    "port": "porting",
    "search": "searching",
    "edit": "editing",
    "undo": "editing",
    "check": "checking",
    "evaluate": "checking",
    "generate": "checking",
    "import_peft": "interchange",
    "export": "interchange",
}

__all__ = [
    "Base",
    "Builder",
    "Delta",
    "attach",
    "check",
    "compress",
    "detach",
    "diff",
    "edit",
    "evaluate",
    "export",
    "fold",
    "generate",
    "import_peft",
    "merge",
    "of_task",
    "port",
    "search",
    "tune",
    "undo",
]

if TYPE_CHECKING:
    from .attaching import attach, detach
    from .base import Base
    from .checking import check, evaluate, generate
    from .compressing import compress
    from .delta import Builder, Delta
    from .diffing import diff
    from .editing import edit, undo
    from .engine.routed import of_task
    from .folding import fold
    from .interchange import export, import_peft
    from .merging import merge
    from .porting import port
    from .searching import search
    from .tuning import tune


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module 'weft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
