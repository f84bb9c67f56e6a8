"""Editing facts of the microcosm: how many take, what else changes, and how long it takes, for 20, 100 and 1,000 edits.

    python bench/editing.py                          both methods, 20, 100 and 1,000 edits
    python bench/editing.py --edits 20 --method memit

Efficacy and rephrase are exact matches of greedy free generation (edited questions; other trained wordings of the same facts),
unrelated is the share of 600 questions about people who were never edited that get the base's own answer, perplexity that of
500 sentences about nothing, relative to the base. The settings of each method are in `SETTINGS`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import weft
from weft.demo import edition, microcosm
from weft.editing import ledger, undo

SETTINGS: dict[str, dict[str, Any]] = {
    "ultraedit": {"sites": ("mlp.down@2-3",), "lr": 0.03, "ridge": 100.0},
    "memit": {"sites": ("mlp.down@1-2",), "token": "prompt", "weight": 10.0, "decay": 0.0, "contexts": 0},
}
MANY: dict[str, dict[str, Any]] = {"ultraedit": {"lr": 0.02}, "memit": {"weight": 100.0}}
"""What differs from a method's defaults, and what differs again for more edits than one turn: found by trying on these edits, about a
dozen settings each."""

TURN = 100
HEAD = "| method | edits | a turn | efficacy | rephrase | unrelated | perplexity | s an edit |\n|---|---|---|---|---|---|---|---|"


def figures(base: weft.Base, delta: weft.Delta, rows: list[dict[str, Any]], files: dict[str, Any]) -> dict[str, float]:
    """What a delta with these edits does."""
    report = weft.check(base, delta, {"edits": rows, "unrelated": files["unrelated"], "scenes": files["scenes"]}, samples=100, batch_size=128)
    tasks = {task["name"]: task for task in report["tasks"]}
    return {
        "efficacy": tasks["edits/efficacy"]["metrics"]["exact_match"]["delta"],
        "rephrase": tasks["edits/rephrase"]["metrics"]["exact_match"]["delta"],
        "unrelated": tasks["unrelated"]["against_base"]["agreement"],
        "perplexity": tasks["scenes"]["ratio"]["pooled"],
    }


def line(method: str, edits: int, turn: int, found: dict[str, float], seconds: float) -> str:
    shown = " | ".join(f"{found[name]:.3f}" for name in ("efficacy", "rephrase", "unrelated", "perplexity"))
    return f"| {method} | {edits:,} | {turn} | {shown} | {seconds:.3f} |"


def run(method: str, count: int) -> list[str]:
    """The lines of one method: one for 20 or 100 edits, one after each turn for 1,000."""
    base, files = weft.Base.open(edition("first")), microcosm.files()
    rows = files[f"edits-{count}"]
    with TemporaryDirectory() as folder:
        data = microcosm.write(Path(folder))["corpus"]
        how = SETTINGS[method] | (MANY[method] if count > TURN else {})
        delta = weft.edit(base, rows, method=method, data=data if method == "memit" else None, turn_size=TURN, **how)
    seconds = float(delta.notes["seconds_per_edit"])  # without loading the model and looking at the edits before and after
    if count <= TURN:
        lines = [line(method, count, count, figures(base, delta, rows, files), seconds)]
        print(lines[0], flush=True)
        return lines
    lines = []
    for done in range(TURN, count + 1, TURN):  # factors belong to edits, so the delta after any turn is the whole one without the later edits
        part = delta if done == count else undo(delta, [number for number in range(len(ledger(delta))) if number >= done])
        lines.append(line(method, done, TURN, figures(base, part, rows[:done], files), seconds))
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", choices=sorted(SETTINGS), action="append", help="default: all")
    parser.add_argument("--edits", type=int, choices=(20, 100, 1000), action="append", help="default: all")
    given = parser.parse_args()
    lines = [HEAD]
    for count in given.edits or (20, 100, 1000):
        for method in given.method or sorted(SETTINGS, reverse=True):
            lines += run(method, count)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
