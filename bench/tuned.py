"""What the benches of tuning share: a random Llama, and what a process holds in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def random_llama(small: bool, **more: Any) -> Any:
    """12 layers of width 768, 97M parameters; `small`: 2 of width 128, to try a script. The weights are the same each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width, layers = (128, 2) if small else (768, 12)
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=width * 8 // 3,
        vocab_size=8000,
        **more,
    )
    return LlamaForCausalLM(config)


def forget() -> None:
    """Count the largest resident set (VmHWM) from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> float:
    """MiB that the kernel counts for this process under a name: VmRSS (now), VmHWM (at most so far)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024
