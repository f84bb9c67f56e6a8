"""The command line: parse, call, print. `main` is the command `weft`.

Commands are imported when they are used, so that `weft --help` and `weft show` start in a blink.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process) and return its exit code.

    0 done, 1 a gate failed, 2 wrong usage or config, 3 input that does not fit or is damaged, 4 the run itself failed;
    130 after Ctrl-C and 141 when the reader of stdout went away, as shells count them. Nothing is raised, errors are
    written to stderr: as text, or as one line of JSON, `{"error": {...}}`, with `--format json`.
    """
    gc.set_threshold(50_000)  # imports make many objects and no garbage: looking for it took about a tenth of the start
    from .output import Output, format_in

    words = list(sys.argv[1:] if argv is None else argv)
    out = Output(format_in(words))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = out.warned
            return _run(words, out)
    except KeyboardInterrupt:
        return out.interrupted()
    except BrokenPipeError:
        return _deaf()
    except Exception as error:
        return out.failed(error)


def _run(words: list[str], out: object) -> int:
    import click

    from ..errors import UsageError
    from .app import app

    if "_WEFT_COMPLETE" in os.environ:
        app.main(words, prog_name="weft")
    try:
        with app.make_context("weft", words, obj=out) as context:
            app.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "weft"
        raise UsageError(f"{path}: {error.format_message()}", hint=f"{path} --help") from None
    return 0


def _deaf() -> int:
    """Whoever read stdout is gone: keep Python's own flush at exit from complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
