"""Ops: the kinds of change a delta is made of. One file an op; `get("lowrank")` returns the op of that kind."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import cast

from ..errors import FormatError, near
from .op import Generator, Op
from .spec import At, OpEntry, Ref, Term

__all__ = ["At", "Generator", "Op", "OpEntry", "Ref", "Term", "get", "kinds"]

_NOT_OPS = {"op", "spec", "chain", "layout", "routing"}
_PLUGINS = "weft.ops"


@cache
def _plugins() -> dict[str, str]:
    """Ops of other installed packages, by entry point: kind -> "module:attribute"."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=_PLUGINS)}


@cache
def _own() -> frozenset[str]:
    return frozenset(m.name for m in iter_modules(__path__) if m.name not in _NOT_OPS)


def kinds() -> list[str]:
    """The kinds of op that this installation knows, without importing them."""
    return sorted(_own() | set(_plugins()))


_LOADED: dict[str, Op] = {}
# a plain dict, because torch.compile traces through functools.cache and would trace the import as well


def get(kind: str) -> Op:
    """The op of a kind; FormatError if there is none. A name from a file never imports anything but known ops."""
    op = _LOADED.get(kind)
    if op is None:
        op = _LOADED[kind] = _load(kind)
    return op


def _load(kind: str) -> Op:
    if kind in _own():
        return cast(Op, import_module(f".{kind}", __name__).OP)
    if kind in _plugins():
        module, _, attribute = _plugins()[kind].partition(":")
        return cast(Op, getattr(import_module(module), attribute or "OP"))
    raise FormatError(f"unknown op {kind!r}{near(kind, kinds(), 'this version has')}", hint="it may need a newer weft, or a package that adds the op")
