"""What porting is for, on bases that know their world (see bench/claims/porting.py, whose measurements these are).

Directions are the papers' claims. The limits were set after these runs had been seen, on one seed each: they guard what was measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.claims import cpt_sft_merge, porting

import weft
from weft.demo import edition, microcosm

pytestmark = pytest.mark.slow

FILES = microcosm.files()
FIRST, SECOND = (weft.Base.open(edition(name)) for name in ("first", "second"))


@pytest.fixture(scope="module")
def skill() -> weft.Delta:
    return porting.skill(FIRST, FILES["judge.train"])


def test_the_gain_falls_with_the_distance_and_is_predicted(skill: weft.Delta) -> None:
    """Lin et al. 2025: the tuned model on the same base, nearly as much on a newer one, little far away."""
    own, points = porting.measure(skill, line=(0.0, 1.0, 3.0), noise=(), data=False)
    gains = [porting.gain(own, point) for point in points]
    same, newer, far, apart, matched = gains
    assert same == pytest.approx(1, abs=1e-6) and 0.9 < newer < 1.1 and far < 0.75 and abs(apart) < 0.1 and matched > 0.9
    assert [point.predicted.verdict for point in points] == ["likely", "likely", "unlikely", "unlikely", "unlikely"]
    assert points[0].right > points[1].right > points[3].right == 0 and points[1].right > 0.6  # some of the skill stays behind


def test_patched_new_base_beats_the_bare_one(skill: weft.Delta) -> None:
    """Khan et al. 2024. For a LoRA the patch is the difference vector, op for op."""
    ask = FILES["judge.test"][: porting.TEST]
    patched, moved = weft.port(skill, FIRST, SECOND, "portllm"), weft.port(skill, FIRST, SECOND)
    assert patched.entries == moved.entries and porting.nll(SECOND, [patched], ask) < 0.1 * porting.nll(SECOND, [], ask)


def test_tuning_on_from_a_port_needs_fewer_steps(skill: weft.Delta) -> None:
    found = porting.recycled(skill, (10,))
    (_, bare, ported), (_, bare_later, ported_later) = found
    assert ported < bare_later < bare and ported_later < bare_later  # the port alone is where ten steps lead, or further


def test_trans_lora_teaches_from_seeds_alone_and_needs_its_filter() -> None:
    """Wang et al. 2024: from the inputs of 16 reviews, none of them labelled."""

    def accuracy(base: weft.Base, delta: weft.Delta) -> float:
        return float(weft.evaluate(base, [delta], FILES["mood.test"][:200], batch_size=128)["metrics"]["accuracy"])

    how: dict[str, Any] = {"rank": 8, "lr": 3e-3}
    start = {"method": "lora", "objective": "classification", "progress": lambda event: None}
    teacher = weft.tune(FIRST, FILES["mood.train"][:320], epochs=2, **start, **how)
    seeds = [{**row, "label": "good"} for row in FILES["mood.train"] if row["text"].startswith("The ")][:16]
    some: dict[str, Any] = {"data": seeds, "inputs": 60, "shots": 0, "lead": 0.05, "epochs": 5, "batch_size": 16, **how}
    filtered, plain = (weft.port(teacher, FIRST, SECOND, "trans-lora", keep=keep, **some) for keep in (0.1, 1.0))
    assert filtered.notes["inputs"] == plain.notes["inputs"] == 60
    assert accuracy(FIRST, teacher) > 0.95
    assert accuracy(SECOND, filtered) > max(0.85, accuracy(SECOND, plain) + 0.1)


def test_slerp_of_a_domain_and_an_instruct_model_goes_from_one_to_the_other(tmp_path: Path) -> None:
    """Lu et al. 2024: end points are the parents, lengths lie between, scores are held against the straight line."""
    pair = cpt_sft_merge.parents(tmp_path, FILES)
    line = {t: cpt_sft_merge.scores(FIRST, [weft.merge(pair, FIRST, "slerp", t=t)], FILES, 100) for t in (0.0, 0.25, 1.0)}
    for base, t in zip(pair, (0.0, 1.0), strict=True):
        own = cpt_sft_merge.scores(base, [], FILES, 100)
        assert (own.domain, own.instruct) == (line[t].domain, line[t].instruct) and own.norm == pytest.approx(line[t].norm, rel=1e-7)
    assert line[0.0].domain > 0.9 > 0.1 > line[1.0].domain and line[1.0].instruct > 0.8 > line[0.0].instruct
    straight = weft.merge(pair, FIRST, "linear", weights=[0.75, 0.25])
    lengths = [line[t].norm for t in (0.0, 0.25, 1.0)]
    between = 0.75 * lengths[0] + 0.25 * lengths[2]
    assert abs(lengths[1] - between) < abs(cpt_sft_merge.scores(FIRST, [straight], FILES, 8).norm - between)
    assert np.isfinite(cpt_sft_merge.above(line, 0.25))
