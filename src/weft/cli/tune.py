"""`weft tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .app import base, declare, device, dtype, option, out_file, pairs, params, seed, threads
from .output import Output, made, made_text

if TYPE_CHECKING:
    from ..delta import Delta


@declare("tune")
@base
@option("--data", metavar="FILE", required=True, multiple=True, type=click.Path(path_type=Path), help="JSON Lines or Parquet; again for more files.")
@option("--method", default="lora", show_default=True, help="What may change: a space from `weft methods space`.")
@option("--objective", default="causal-lm", show_default=True, help="What to want: causal-lm, classification, masked-lm, ...")
@option("--optimizer", default="adamw", show_default=True, help="How to get there.")
@option("--schedule", default="linear", show_default=True, help="How the learning rate goes.")
@option("--guard", "guards", multiple=True, metavar="NAME", help="What must not be lost; again for more.")
@params
@option("--on", multiple=True, metavar="DELTA", type=click.Path(path_type=Path), help="A delta that is active meanwhile; again for more, in order.")
@option("--origin", metavar="DELTA", type=click.Path(path_type=Path), help="A delta that the new one begins from, for methods that can (mhr).")
@option("--evaluate", metavar="FILE", multiple=True, type=click.Path(path_type=Path), help="Measure on these rows meanwhile; -p best= lets them choose.")
@option("--evaluate-every", type=click.IntRange(0), default=0, metavar="STEPS", help="How often; default: after each epoch and at the end.")
@option("--save-every", type=click.IntRange(0), default=0, metavar="STEPS", help="Write the state to OUT.state from time to time.")
@option("--resume", metavar="STATE", type=click.Path(path_type=Path), help="Go on from a state; the result is that of an uninterrupted run.")
@option("--log", metavar="FILE", type=click.Path(path_type=Path), help="Add every event to this file, one JSON object a line.")
@option("--log-to", multiple=True, metavar="SINK", help="More places for events: tensorboard:FOLDER, wandb:PROJECT.")
@out_file
@seed
@device
@dtype
@option("--quantize", metavar="FORM", help="The frozen model's linear modules in fewer bits: int8 or nf4.")
@threads
def command(out: Output, base: str, data: tuple[Path, ...], params: tuple[str, ...], target: Path, **how: Any) -> None:
    """Tune a base on data; the result is a delta.

    Options of the method, of the other choices and of the training loop are given with -p: -p rank=16 -p epochs=1. Where
    two choices have an option of the same name: -p optimizer.lr=1e-3. With --evaluate, -p best=accuracy (or loss) takes the delta
    of the best evaluation, and -p patience=3 ends the run after three without a better one.

    \b
    Example:
      weft tune path/to/model --data trec.train.jsonl --method lora --objective classification -o trec.safetensors
    """
    from ..tuning import tune

    given = pairs(params, tune)
    how["evaluate"] = [*how["evaluate"]] or None
    out.resume = how["resume"] or Path(f"{target}.state")
    with out.training() as progress:
        delta = tune(base, [*data], out=target, progress=progress, **how, **given)
    if delta.path is None:  # one of several processes, of which the first one writes and tells
        return
    out.result(made(delta), f"{made_text(delta)}\n{', '.join(_told(delta))}", delta.id)
    out.next(f"weft eval {{}} {'{} ' * (len(how['on']) + 1)}--data TEST.jsonl", base, *how["on"], target)


def _told(delta: Delta) -> list[str]:
    notes = delta.notes
    units = (("loss", "loss {:.4g}"), ("steps", "{:,} steps"), ("parameters", "{:,} parameters trained"), ("seconds", "{:.1f} s"))
    return [text.format(notes[key]) for key, text in units if isinstance(notes.get(key), int | float)]
