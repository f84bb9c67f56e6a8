"""`weft demo`: the whole story on real input, offline, on a CPU, in under three minutes.

First, two colleagues each have half of a text set (docstrings of the standard library: which package does this one come
from?). Each tunes the same encoder with LoRA; their deltas are measured, merged, folded into a checkpoint, and taken off again.
Then (`facts.py`) a language model learns a skill, has facts changed, and is checked for what that broke.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from .._write import write_bytes
from ..errors import InputError
from . import docstrings, facts, minilm
from .bits import back_and_forth

Say = Callable[[str], None]

LR = 3e-3
"""Three times the default of LoRA: with so few rows there are only 36 steps."""


def run(out: str | Path = "weft-demo", say: Say = print, *, progress: Callable[[dict[str, Any]], None] | None = None, seed: int = 0) -> dict[str, Any]:
    """Tell the story, with all files in the folder `out` (made anew inside if it exists). Returns the figures.

    say:      called with each line of the story
    progress: called with the events of the tuning runs (see `weft.tune`)
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    folder = fresh(out / "folded")
    began = time.perf_counter()
    figures = {**encoder(out, folder, say, progress, seed), "facts": facts.run(out, say, progress=progress, seed=seed)}
    figures["seconds"] = round(time.perf_counter() - began, 1)
    write_bytes(out / "scores.json", json.dumps(figures, indent=2).encode())
    say(f"done      in {figures['seconds']:.0f} s")
    say("")
    say(f"open      {out / 'report.html'}")
    say(f"next      weft show {out / 'both.safetensors'}")
    say(f"          weft eval {folder} --data {out / 'test.jsonl'}")
    return figures


def encoder(out: Path, folder: Path, say: Say, progress: Callable[[dict[str, Any]], None] | None, seed: int) -> dict[str, Any]:
    """The first half, on all-MiniLM-L6-v2; `folder` is where the merged checkpoint goes."""
    import weft

    model_path = minilm()
    base = weft.Base.open(model_path)
    say(f"base      all-MiniLM-L6-v2, {sum(t.nbytes for t in base.tensors.values()) / 1e6:.0f} MB, fingerprint {str(base.fingerprint)[:12]}")

    files = docstrings.write(out)
    counts = {name: len(path.read_bytes().splitlines()) for name, path in files.items()}
    say(f"data      docstrings of the standard library: {counts['first']} + {counts['second']} to learn from, {counts['test']} to be asked about")

    deltas = {}
    for name in ("first", "second"):
        start = time.perf_counter()
        path = out / f"{name}.safetensors"
        deltas[name] = weft.tune(base, files[name], method="lora", objective="classification", lr=LR, seed=seed, out=path, progress=progress)
        say(f"tune      {name}.safetensors  {deltas[name].nbytes / 1e6:.2f} MB, id {deltas[name].id[:12]}, {time.perf_counter() - start:.0f} s")
    first, second = deltas["first"], deltas["second"]

    merged = weft.merge([first, second], base, method="linear", out=out / "merged.safetensors")
    say(f"merge     merged.safetensors  the average of both, still low-rank: {merged.nbytes / 1e6:.2f} MB, parents {first.id[:6]} and {second.id[:6]}")

    head_only = first.only(target for target, entry in first.entries.items() if entry.change)
    scores = {
        "before: the encoder as it was, with the first head": head_only,
        "first delta (half of the data)": first,
        "second delta (the other half)": second,
        "merged": merged,
    }
    accuracy = {name: float(weft.evaluate(base, [delta], files["test"])["metrics"]["accuracy"]) for name, delta in scores.items()}
    for name, value in accuracy.items():
        say(f"eval      {value:6.1%}  {name}")

    weft.fold(base, [merged], folder)
    folded = float(weft.evaluate(weft.Base.open(folder), [], files["test"])["metrics"]["accuracy"])
    say(f"fold      {folder.name}/  a full checkpoint again; it scores {folded:.1%} by itself")

    differing = back_and_forth(base, first, second)
    say(f"detach    both deltas put on a live model, run, and taken off in the other order: {differing} differing bits")

    write_bytes(out / "scores.svg", bars(accuracy).encode())
    say("")
    return {"accuracy": accuracy, "folded": folded, "differing_bits": differing}


def fresh(folder: Path) -> Path:
    """`folder`, without what an earlier demo left there. InputError if it is not a demo's: then merged.safetensors is not beside it."""
    import shutil

    if folder.exists():
        if not (folder.parent / "merged.safetensors").is_file():
            raise InputError(f"{folder} is there already, and no demo made it", hint="weft demo --out ANOTHER_FOLDER")
        shutil.rmtree(folder)
    return folder


def bars(scores: dict[str, float]) -> str:
    """A bar chart of accuracies as SVG, readable in light and dark."""
    height, rows = 44, []
    for number, (name, value) in enumerate(scores.items()):
        y = 52 + number * height
        rows.append(f'<text x="16" y="{y}" class="name">{escape(name)}</text>')
        rows.append(f'<rect x="16" y="{y + 7}" width="560" height="14" rx="3" class="track"/>')
        rows.append(f'<rect x="16" y="{y + 7}" width="{560 * value:.1f}" height="14" rx="3" class="bar"/>')
        rows.append(f'<text x="588" y="{y + 19}" class="value">{value:.1%}</text>')
    total = 60 + len(scores) * height
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 {total}" width="660" height="{total}" role="img" aria-label="Accuracy on the test rows">
<style>
  text {{ font: 14px system-ui, sans-serif; fill: #222 }}
  .title {{ font-weight: 600 }} .value {{ font-variant-numeric: tabular-nums }}
  .page {{ fill: #fff }} .track {{ fill: #e6e8eb }} .bar {{ fill: #2b6cb0 }}
  @media (prefers-color-scheme: dark) {{ text {{ fill: #e6e6e6 }} .page {{ fill: #16181c }} .track {{ fill: #33373e }} .bar {{ fill: #63a4ff }} }}
</style>
<rect class="page" width="660" height="{total}"/>
<text x="16" y="24" class="title">Which package does this docstring come from? Accuracy on the test rows</text>
{"".join(row + chr(10) for row in rows)}</svg>
"""
