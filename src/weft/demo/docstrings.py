"""A real text set that every machine has: the docstrings of the standard library, labelled by their package.

The task is "which package does this docstring come from?". Files are parsed, never imported; names of the packages are
taken out of the text, so that the answer has to be read from the meaning.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .._write import write_bytes

PACKAGES = (
    "asyncio",
    "concurrent",
    "ctypes",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "zoneinfo",
)
"""Packages that every build of Python has."""

MINIMUM, MAXIMUM = 30, 160
"""Characters of a docstring that is used; longer ones are cut."""


def _texts(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        if "test" in path.relative_to(package).parts or "tests" in path.relative_to(package).parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text


def rows(packages: int = 6, most: int = 160) -> list[dict[str, str]]:
    """`{"text", "label"}` for the `packages` packages that have the most docstrings, each text once, in a fixed order.

    Of each package at most `most` are taken, spread evenly over its files, so that a tuning run stays short on a CPU.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for name in PACKAGES:
        for text in _texts(root / name):
            text = re.sub(rf"\b{name}\b", "it", " ".join(text.split()), flags=re.IGNORECASE)[:MAXIMUM]
            if len(text) >= MINIMUM and text not in seen:
                seen.add(text)
                found.setdefault(name, []).append(text)
    chosen = sorted(sorted(found, key=lambda name: (-len(found[name]), name))[:packages])
    return [{"text": text, "label": name} for name in chosen for text in _spread(found[name], most)]


def _spread(texts: list[str], most: int) -> list[str]:
    return texts if len(texts) <= most else [texts[i * len(texts) // most] for i in range(most)]


def split(data: list[dict[str, str]], every: int = 4) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, test): every fourth row of the list is a test row, so each package keeps its share."""
    return [row for i, row in enumerate(data) if i % every], [row for i, row in enumerate(data) if not i % every]


def write(folder: Path) -> dict[str, Path]:
    """Write first.jsonl and second.jsonl (halves of the training rows) and test.jsonl into `folder`; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = split(rows())
    parts = {"first": train[::2], "second": train[1::2], "test": test}
    paths = {name: folder / f"{name}.jsonl" for name in parts}
    for name, part in parts.items():
        write_bytes(paths[name], "".join(json.dumps(row) + "\n" for row in part).encode())
    return paths
