"""Codes: compact ways to store a tensor's entries. One file a code; `get("ternary")` returns the code of that name.

    small = encode(tensor, "ternary", {"scale": 0.01, "form": "golomb"})
    small.read(), small.rows(10, 20), small.payload.nbytes

How a tensor is stored has nothing to do with what it means: any tensor of a delta may be stored coded, whatever op uses it, and
whoever reads it sees only its entries. Importing this package imports no numpy.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import cast

from ..errors import FormatError, near
from ._code import Code
from ._coded import BLOCK, Coded, encode, entries
from ._spool import Spool

__all__ = ["BLOCK", "Code", "Coded", "Spool", "encode", "entries", "get", "names"]


@cache
def _own() -> frozenset[str]:
    return frozenset(m.name for m in iter_modules(__path__) if not m.name.startswith("_"))


def names() -> list[str]:
    """The names of the codes that this version knows, without importing them."""
    return sorted(_own())


@cache
def get(name: str) -> Code:
    """The code of a name; FormatError if there is none. A name from a file never imports anything but known codes."""
    if name not in _own():
        raise FormatError(f"unknown code {name[:40]!r}{near(name, names(), 'this version has')}", hint="it may need a newer weft")
    return cast(Code, import_module(f".{name}", __name__).CODE)
