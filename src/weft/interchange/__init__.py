"""Interchange with PEFT and vLLM: adapter folders in and out, and the checks that a served adapter does something."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .reader import import_peft

__all__ = ["Exported", "export", "import_peft", "lint_vllm", "probe"]

_WHERE = {"Exported": "writer", "export": "writer", "lint_vllm": "vllm", "probe": "vllm"}

if TYPE_CHECKING:
    from .vllm import lint_vllm, probe
    from .writer import Exported, export


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
