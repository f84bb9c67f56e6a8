"""What a long run says while it runs: events, for a callback, a log file and a plain line now and then.

An event is a dict of plain JSON values with `event` and `time` (seconds since the run began). A training run sends

    start    total (steps), first (the step it starts at), parameters (entries trained), examples; matmul_error, where `matmul` is chosen
    step     step, total, loss, lr, grad_norm, tokens_per_s, memory
    eval     step, and whatever the evaluation returned
    save     step, path
    stop     step, reason (if it ends early)
    end      step, loss, seconds, tokens, tokens_per_s (the mean, with evaluations and saving), memory

tokens_per_s counts this process's tokens. memory is the peak in bytes so far: of a CUDA device since the run began, elsewhere of
the process since it was started (see `weft.engine.memory`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ..errors import InputError
from .sinks import sink

Event = dict[str, Any]

Progress = Callable[[Event], None]
"""Called with every event."""


class PlainProgress:
    """One line on stderr every `every` seconds, and nothing at all for a run that is shorter: for logs and pipes."""

    def __init__(self, every: float = 10.0, stream: TextIO | None = None) -> None:
        self._every, self._stream, self._next, self._began = every, stream, every, 0.0

    def __call__(self, event: Event) -> None:
        if event["event"] == "start":
            self._began, self._next = event["time"], event["time"] + self._every
            if "matmul_error" in event:
                print(f"float32 products have a relative error of {event['matmul_error']:.1e} on this machine", file=self._stream or sys.stderr, flush=True)
        if event["event"] != "step" or event["time"] < self._next:
            return
        self._next = event["time"] + self._every
        left = (event["time"] - self._began) / max(1, event["step"] - event["first"]) * (event["total"] - event["step"])
        line = (
            f"step {event['step']}/{event['total']}  loss {event['loss']:.4g}  lr {event['lr']:.3g}  {event['tokens_per_s']:,.0f} tokens/s  {left:,.0f} s left"
        )
        print(line, file=self._stream or sys.stderr, flush=True)


class Events:
    """Sends events on: to `progress`, to `sinks` (see `weft.engine.sinks`), and as JSON lines to the file `log`, which grows (a resumed
    run continues it).

    The log is a record of what happened, written as it happens, so it does not pass through the atomic writer. Numbers
    that JSON lacks (a loss of NaN) are written as null. Use it as a context manager.
    """

    def __init__(self, log: str | Path | None = None, progress: Progress | None = None, sinks: Sequence[str] = ()) -> None:
        self._listeners: list[Progress] = [] if progress is None else [progress]
        self._log, self._sinks, self._open = log, sinks, ExitStack()
        self._file: TextIO | None = None
        self._start = time.monotonic()

    def __enter__(self) -> Events:
        if self._log is not None:
            try:
                self._file = self._open.enter_context(open(self._log, "a", encoding="utf-8", buffering=1))
            except OSError as error:
                raise InputError(f"cannot write the log {self._log}: {error.strerror or error}") from error
        try:
            self._listeners += [self._open.enter_context(sink(where)) for where in self._sinks]
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._start

    def __call__(self, event: str, **fields: Any) -> None:
        """Send one event."""
        whole: Event = {"event": event, "time": round(self.seconds, 3), **fields}
        if self._file is not None:
            self._file.write(json.dumps({name: _plain(value) for name, value in whole.items()}) + "\n")
        for listener in self._listeners:
            listener(whole)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and value - value != 0 else value
