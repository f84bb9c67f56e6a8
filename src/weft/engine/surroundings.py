"""Where a live model runs, and what a result that comes from running it depends on besides its inputs and options."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .data import tokenizer_hash


def processes() -> Any:
    """Accelerate's account of the processes that run this together (`num_processes`, `is_main_process`, `device`); the first call connects them.

    Without an accelerator, or with ACCELERATE_USE_CPU=1, they talk through gloo: left alone, Accelerate would take each for the only one.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def default_device() -> torch.device:
    """The device that Accelerate finds: of several processes, each one's own."""
    found: torch.device = processes().device
    return found


def surroundings(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """The part of a recipe that says so: the tokenizer's hash (None without one), dtype and kind of device, threads of torch, versions."""
    import transformers

    from .. import __version__

    parameter = next(model.parameters())
    return {
        "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "threads": torch.get_num_threads(),
        "versions": {"weft": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
