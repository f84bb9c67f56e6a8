"""`weft port`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .app import argument, declare, device, option, out_file, pairs, params, seed, workers
from .output import Output, made, made_text

if TYPE_CHECKING:
    from ..base import Base
    from ..delta import Delta
    from ..porting import Prediction


@declare("port")
@argument("update", metavar="DELTA")
@option("--from", "source", metavar="BASE", required=True, help="The base that it was made for.")
@option("--to", "destination", metavar="BASE", required=True, help="The base that gets it.")
@option("--method", default="diff-vector-transfer", show_default=True, help="A name from `weft methods port`.")
@params
@option("--data", metavar="FILE", multiple=True, type=click.Path(path_type=Path), help="Seeds for trans-lora; for others, rows to predict better with.")
@option("--predict/--no-predict", default=True, show_default=True, help="Say first whether it is likely to work.")
@out_file
@seed
@device
@workers
def command(
    out: Output, update: str, source: str, destination: str, params: tuple[str, ...], data: tuple[Path, ...], predict: bool, target: Path, **how: Any
) -> None:
    """Carry an update (a delta, or a checkpoint tuned from --from) over to another base; the result is a delta of that.

    Before that, weft says how far the bases are apart and whether porting is likely to work; with --data and a method that needs none,
    also how the loss goes on the line between them.

    \b
    Example:
      weft port style.safetensors --from model-v1 --to model-v2 -o style-v2.safetensors
    """
    from ..base import Base
    from ..config import make
    from ..engine.increments import open_update
    from ..methods import get
    from ..porting import port

    given = pairs(params, port)
    cfg = make(get("port", how["method"]).config, given, f"port method {how['method']!r}")
    old, new, opened = Base.open(source), Base.open(destination), open_update(update)
    learns = how["method"] == "trans-lora"
    said = None
    if predict and not learns and out.mode != "quiet":
        said = _predicted(out, old, new, opened, [*data], getattr(cfg, "rename", ()), how["device"])
    delta = port(opened, old, new, out=target, data=[*data] or None if learns else None, **how, **given)
    record = made(delta) | {"method": how["method"]} | ({"prediction": said.json()} if said else {})
    out.result(record, f"{made_text(delta)}\n{told(delta)}", delta.id)
    out.next("weft eval {} {} --data FILE.jsonl", destination, target)


def _predicted(out: Output, old: Base, new: Base, update: Any, data: list[Path], rename: tuple[str, ...], device: str | None) -> Prediction:
    from ..porting import predict

    found = predict(old, new, update, data or None, rename=rename, device=device)
    out.note(found.text())
    return found


def told(delta: Delta) -> str:
    """What was carried, and how."""
    notes = delta.notes
    if "carried" not in notes:
        return f"tuned on {notes['inputs']} synthetic inputs, from {notes['seeds']} seeds"
    parts = [f"{notes['carried']} carried as they are, {notes['dense']} as dense increments"]
    parts += [f"{name}: rows of {each['moved']:,} tokens moved, {each['new']:,} new" for name, each in notes.get("vocabulary", {}).items()]
    parts += [f"left out: {name}: {why}" for name, why in notes["left"].items()]
    return "\n".join(parts)
