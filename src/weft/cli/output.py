"""What a command says, and where: data on stdout, everything else on stderr.

`Output` is the object that every command gets. A command reports its result once, through `result`; in between it may
say what it is doing (`note`, `progress`), and at its end what to do next (`next`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, WeftError

if TYPE_CHECKING:
    from ..delta import Delta

EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all, in any unit."""


class Output:
    """How one command line speaks. `mode` is human, json or quiet (`methods` also has markdown); `debug` shows tracebacks."""

    def __init__(self, mode: str = "human", debug: bool = False) -> None:
        self.mode, self.debug = mode, debug
        self.resume: Path | None = None  # where an interrupted run may have left its state

    def result(self, record: dict[str, Any], human: str, quiet: str = "") -> None:
        """The command's result: `record` as one JSON object, `human` as text, or the bare essential `quiet` ("": nothing)."""
        text = quiet if self.mode == "quiet" else human
        if self.mode == "json":
            import json

            text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        if text:
            print(printable(text.removesuffix("\n")), flush=True)

    def note(self, text: str) -> None:
        """One line about the run, for people."""
        if self.mode == "human":
            print(printable(text), file=sys.stderr, flush=True)

    def warned(self, message: Warning | str, *about: Any, **more: Any) -> None:
        """A Python warning, without the place in the source that it comes from; the rest is what `warnings.showwarning` gets besides."""
        print(printable(f"weft: warning: {message}"), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """One line of a result that comes bit by bit."""
        if self.mode == "human":
            print(printable(text), flush=True)

    def next(self, command: str, *names: object) -> None:
        """The command that one would type next. `names` (files, bases) stand where it has `{}`, quoted as a shell wants them."""
        from shlex import quote

        self.note(f"next: {command.format(*(quote(str(name)) for name in names)) if names else command}")

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """A function to call as work gets done: a bar on a terminal, a line every ten seconds elsewhere, nothing when quiet."""
        if self.mode == "quiet":
            yield lambda done, total: None
        elif sys.stderr.isatty() and self.mode == "human":
            with _bar(what) as report:
                yield report
        else:
            yield _lines(what)

    @contextmanager
    def training(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """The same for a training run, whose progress comes as events (see `weft.engine.events`)."""
        from ..engine.events import PlainProgress

        if self.mode == "quiet":
            yield lambda event: None
        elif sys.stderr.isatty() and self.mode == "human":
            with _training_bar() as report:
                yield report
        else:
            yield PlainProgress(EVERY)

    def failed(self, error: Exception) -> int:
        """Report an error on stderr; return the exit code that it means."""
        if self.debug:
            import traceback

            traceback.print_exception(error, file=sys.stderr)
        if not isinstance(error, WeftError):
            said = " ".join(str(error).split())
            error = WeftError(f"{type(error).__name__}, which weft did not expect: {said[:400]}", hint="the same command with --debug, for the traceback")
        if self.mode == "json":
            import json

            about = {"type": type(error).__name__, "exit_code": error.exit_code, "message": error.message, "hint": error.hint}
            if isinstance(error, UsageError):
                about["problems"] = error.problems
            text = json.dumps({"error": about}, ensure_ascii=False)
        else:
            text = f"weft: {error}"
        print(printable(text), file=sys.stderr, flush=True)
        return error.exit_code

    def interrupted(self) -> int:
        """Report Ctrl-C; return 130."""
        message = "stopped before the end; no result was written"
        if self.resume is not None and self.resume.exists():
            message += f"; the same command with --resume {self.resume} goes on"
        if self.mode == "json":
            import json

            message = json.dumps({"error": {"type": "Interrupted", "exit_code": 130, "message": message, "hint": ""}})
        else:
            message = f"\nweft: {message}"
        print(message, file=sys.stderr, flush=True)
        return 130


def format_in(words: Sequence[str]) -> str:
    """The format that a command line asks for, found without understanding the rest of it: errors may come before it is parsed."""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        value = word.removeprefix("--format=") if word.startswith("--format=") else after if word == "--format" else ""
        if value in ("human", "json", "quiet"):
            return value
    return "human"


def _lines(what: str) -> Progress:
    start = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY:
            last = now
            print(f"{what}: {done:,} of {total:,} ({done / max(total, 1):.0%}) after {now - start:.0f} s", file=sys.stderr, flush=True)

    return report


@contextmanager
def _bar(what: str, extra: str = "", **fields: Any) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(extra), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, **fields)
        yield lambda done, total, **now: bar.update(task, completed=done, total=total, **now)


@contextmanager
def _training_bar() -> Iterator[Callable[[dict[str, Any]], None]]:
    with _bar("tuning", "loss {task.fields[loss]:.4g}", loss=float("nan")) as bar:
        yield lambda event: bar(event["step"], event["total"], loss=event["loss"]) if event["event"] == "step" else None


def made(delta: Delta) -> dict[str, Any]:
    """A delta that was just written, as a record."""
    return {
        "path": str(delta.path),
        "id": delta.id,
        "base": delta.base,
        "parents": list(delta.parents),
        "over": list(delta.over),
        "targets": len(delta.entries),
        "nbytes": delta.nbytes,
        "notes": dict(delta.notes),
    }


def made_text(delta: Delta) -> str:
    """The same for people."""
    return f"{delta.path}  {amount(delta.nbytes)}, {len(delta.entries)} targets\nid {delta.id}"


_LAYOUT = "\n\t"
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str, layout: str = _LAYOUT) -> str:
    """The text with control characters as `\\u001b`, which JSON reads too: names and notes of a file must not steer a terminal.

    Those of `layout` stay. Marks that reorder what is shown, and halves of surrogate pairs, are escaped as well.
    """
    if text.isprintable():
        return text
    return "".join(c if c in layout or not _steers(c) else f"\\u{ord(c):04x}" for c in text)


def _steers(c: str) -> bool:
    return c < " " or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff" or c in _REORDERING or c in "\u2028\u2029"


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows of text as aligned columns. A line break or tab inside a cell is escaped: one row is one line."""
    rows = [[printable(cell, layout="") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join((indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip() for row in rows)


def amount(nbytes: int) -> str:
    """A size for people: "12.3 MB"."""
    size = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{nbytes:,} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
