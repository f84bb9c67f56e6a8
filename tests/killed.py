"""Tuning in a process that ends without warning."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import transformers.models.bert.modeling_bert
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401 (once, for all the processes that are forked from the server)

import weft
from weft.engine.events import Event

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


def tune_until_killed(model: Path, rows: list[dict[str, Any]], *, step: int, **options: Any) -> None:
    """`weft.tune` in a process of its own, ended by SIGKILL when it tells that it has done `step`, before anything is saved of that step."""
    process = SERVER.Process(target=_tune, args=(model, rows, step, options))
    process.start()
    process.join(300)
    alive = process.is_alive()
    process.kill()
    assert not alive and process.exitcode == -signal.SIGKILL, f"the run was to be killed at step {step}, and ended with {process.exitcode}"


def _tune(model: Path, rows: list[dict[str, Any]], step: int, options: dict[str, Any]) -> None:
    def kill(event: Event) -> None:
        if event["event"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    weft.tune(model, rows, **{**options, "progress": kill})
