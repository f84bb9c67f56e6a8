"""What editors are for, on a model that knows its world: facts change, others don't, and one change can be taken back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import weft
from weft.demo import edition, microcosm
from weft.editing import ledger
from weft.ops.spec import OpEntry

pytestmark = pytest.mark.slow

FILES = microcosm.files()
ULTRAEDIT: dict[str, Any] = {"method": "ultraedit", "sites": ("mlp.down@2-3",)}
MEMIT: dict[str, Any] = {
    "method": "memit",
    "sites": ("mlp.down@1-2",),
    "token": "prompt",
    "weight": 10.0,
    "decay": 0.0,
    "contexts": 0,
    "data": FILES["corpus"][:1500],
}


@pytest.fixture(scope="module")
def base() -> weft.Base:
    return weft.Base.open(edition("first"))


def recall(base: weft.Base, delta: weft.Delta, rows: list[dict[str, Any]], answer: str) -> float:
    """The share of edited questions that get the answer in the field `answer`."""
    asked = [{"prompt": row["prompt"], "completion": f" {row[answer]}."} for row in rows]
    return float(weft.evaluate(base, [delta], asked, batch_size=128)["metrics"]["teacher_forced_exact"])


@pytest.mark.parametrize(("count", "bars"), [(20, (0.90, 0.85, 0.95, 1.05)), (100, (0.80, 0.75, 0.88, 1.08))])
@pytest.mark.parametrize("how", [{**ULTRAEDIT, "lr": 0.03, "ridge": 100.0}, MEMIT], ids=["ultraedit", "memit"])
def test_facts_change_and_others_do_not(base: weft.Base, how: dict[str, Any], count: int, bars: tuple[float, float, float, float]) -> None:
    rows = FILES[f"edits-{count}"]
    delta = weft.edit(base, rows, **how)
    data = {"edits": rows, "unrelated": FILES["unrelated"][:300], "scenes": FILES["scenes"][::2]}
    tasks = {task["name"]: task for task in weft.check(base, delta, data, batch_size=128, samples=10)["tasks"]}
    efficacy, rephrase = (tasks[f"edits/{part}"]["metrics"]["exact_match"] for part in ("efficacy", "rephrase"))
    assert efficacy["base"] == rephrase["base"] == 0
    found = efficacy["delta"], rephrase["delta"], tasks["unrelated"]["against_base"]["agreement"], tasks["scenes"]["ratio"]["pooled"]
    assert all(value >= bar for value, bar in zip(found[:3], bars[:3], strict=True)) and found[3] <= bars[3], found


def test_without_options_edits_take_too(base: weft.Base) -> None:
    assert weft.edit(base, FILES["edits-20"]).notes["after"]["success"] >= 0.9


def test_undoing_one_edit_of_100_leaves_the_other_99(base: weft.Base) -> None:
    rows = FILES["edits-100"]
    delta = weft.edit(base, rows, **ULTRAEDIT)
    assert recall(base, delta, rows, "target_new") > 0.9
    before = recall(base, delta, rows, "ground_truth")
    for number in (0, 41, 99):
        lo, hi = ledger(delta)[number]["rows"]
        less = weft.undo(delta, number)
        for target, entry in delta.entries.items():
            (kept,), (all_of_them,) = (factors(each, target) for each in (less, delta))
            assert entry.ops[0].op == "lowrank"
            assert np.array_equal(kept[0], np.delete(all_of_them[0], np.s_[lo:hi], 0)) and np.array_equal(kept[1], np.delete(all_of_them[1], np.s_[lo:hi], 1))
        one, others = [rows[number]], rows[:number] + rows[number + 1 :]
        assert recall(base, less, one, "ground_truth") == 1 > recall(base, delta, one, "ground_truth")  # the base's own answer
        assert recall(base, less, others, "target_new") > 0.9 and recall(base, less, others, "ground_truth") <= before + 0.02


def factors(delta: weft.Delta, target: str) -> list[tuple[Any, Any]]:
    def pair(op: OpEntry) -> tuple[Any, Any]:
        return delta.get(op.t["A"].key), delta.get(op.t["B"].key)

    return [pair(op) for op in delta.entries[target].ops]


def test_statistics_over_all_turns_keep_old_edits_better_than_those_of_each_turn(base: weft.Base) -> None:
    """Gu et al. 2025: the lifelong normaliser is what lets many small turns follow each other."""
    rows = FILES["edits-1000"][:500]
    lifelong, turn = (weft.edit(base, rows, **ULTRAEDIT, lr=0.02, ridge=100.0, turn_size=20, normaliser=kind) for kind in ("lifelong", "turn"))
    old = rows[:100]
    assert recall(base, lifelong, old, "target_new") > recall(base, turn, old, "target_new") + 0.1
