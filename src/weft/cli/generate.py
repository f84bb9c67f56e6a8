"""`weft generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .app import base, declare, deltas, device, dtype, mode, option, seed, threads
from .output import Output


@declare("generate")
@base
@deltas
@option("--prompt", metavar="TEXT", required=True, help="What to continue; - reads it from stdin.")
@option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="The longest continuation.")
@option("--num-beams", type=click.IntRange(1), default=1, show_default=True, help="Beams to search with.")
@option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: the most likely tokens; above: tokens are drawn.")
@option("--task", default="", metavar="NAME", help="The task that is meant, for deltas that differ by task.")
@seed
@mode
@device
@dtype
@threads
def command(out: Output, base: str, deltas: tuple[Path, ...], prompt: str, **how: Any) -> None:
    """Continue a prompt with a causal language model, with deltas in the order given.

    \b
    Example:
      weft generate path/to/model style.safetensors --prompt "Once upon a time" --max-new-tokens 40
    """
    from ..checking import generate

    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    text = generate(base, deltas, prompt, **how)
    out.result({"prompt": prompt, "text": text, "base": base, "deltas": [str(path) for path in deltas]}, text, text)
    if deltas:
        out.next("weft generate {} --prompt {}   (the base alone, to compare)", base, prompt)
