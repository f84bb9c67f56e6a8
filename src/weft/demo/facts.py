"""The second half of the demo's story: a language model that knows facts learns a skill, changes its mind, and is checked.

The model is the microcosm's first edition. It learns to judge reviews, and is told that 20 people like, do or come from
something else; both updates are merged and checked for what they broke; then one fact is taken back, and in the end all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engine.data import read_rows
from . import edition, microcosm
from .bits import back_and_forth

Say = Callable[[str], None]

EDITOR: dict[str, Any] = {"method": "ultraedit", "sites": ("mlp.down@2-3",)}
"""What suits this model (see bench/results/editing.md): its facts can be changed in the last two of four layers."""


def run(out: Path, say: Say, *, progress: Callable[[dict[str, Any]], None] | None = None, seed: int = 0) -> dict[str, Any]:
    """Tell the second half, with all files in the folder `out`. Returns the figures."""
    import weft

    base = weft.Base.open(edition("first"))
    files = microcosm.write(out / "microcosm")
    say(f"base      the microcosm, a Llama of {sum(t.nbytes for t in base.tensors.values()) / 1e6:.1f} MB that knows 3,120 invented facts")

    start = time.perf_counter()
    skill = weft.tune(base, files["judge.train"], method="lora", lr=3e-3, epochs=1, seed=seed, out=out / "skill.safetensors", progress=progress)
    say(f"tune      skill.safetensors  judging reviews, {skill.nbytes / 1e6:.2f} MB, {time.perf_counter() - start:.0f} s")

    start = time.perf_counter()
    edited = weft.edit(base, files["edits-20"], **EDITOR, seed=seed, out=out / "edited.safetensors")
    say(f"edit      edited.safetensors  20 facts changed, {edited.nbytes / 1e6:.2f} MB, {time.perf_counter() - start:.1f} s")

    both = weft.merge([skill, edited], base, method="task-arithmetic", out=out / "both.safetensors")
    say(f"merge     both.safetensors  the skill and the facts, parents {skill.id[:6]} and {edited.id[:6]}")

    data = {name: files[name] for name in ("edits-20", "judge.test", "unrelated", "scenes")}
    report = weft.check(base, both, data, report=out / "report.html", seed=seed)
    for task in report["tasks"]:
        say(f"check     {_told(task)}")

    change = read_rows(files["edits-20"])[0]
    question = str(change["prompt"])
    fewer = weft.undo(edited, 0)
    fewer.save(out / "edited-19.safetensors")
    answers = {name: _answer(base, deltas, question) for name, deltas in {"before": [], "edited": [edited], "undone": [fewer]}.items()}
    say(f"undo      {question} {answers['before']}; edited: {answers['edited']}; that one edit undone, 19 kept: {answers['undone']}")
    differing = back_and_forth(base, skill, edited)
    say(f"detach    the skill and the facts put on a live model, run, and taken off in the other order: {differing} differing bits")
    return {"differing_bits": differing, "tasks": {task["name"]: task["metrics"] for task in report["tasks"]}, "answers": answers}


def _answer(base: Any, deltas: list[Any], question: str) -> str:
    import weft

    return weft.generate(base, deltas, question, max_new_tokens=8).partition(".")[0].strip()


def _told(task: dict[str, Any]) -> str:
    """One line about a task of a report: its perplexity, or its first metric, before and after."""
    if task["ratio"] is not None:
        return f"{task['name']}: perplexity times {task['ratio']['pooled']:.3f}"
    metric, sides = next(iter(task["metrics"].items()))
    return f"{task['name']}: {metric.replace('_', ' ')} {sides['base']:.1%} before, {sides['delta']:.1%} now"
