"""slerp: against a reference over whole vectors, its end points, what it keeps, and what it refuses."""

from __future__ import annotations

from math import acos, sin
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weft
from tests.test_merge import SHAPES, TARGETS, base_values, close, exact_delta, lora, product, same, taus_of, tuned_values, values_of, write_checkpoint
from weft.base import Base
from weft.delta import Builder
from weft.errors import UsageError
from weft.folding import fold


def reference(start: dict[str, np.ndarray], taus: list[dict[str, np.ndarray]], t: float, space: str) -> dict[str, np.ndarray]:
    out = {}
    for name, like in taus[0].items():
        w = start[name].astype(np.float64) if space == "weights" else np.zeros(like.shape)
        one, two = (w + tau[name].astype(np.float64) for tau in taus)
        lengths = np.linalg.norm(one) * np.linalg.norm(two)
        cosine = float(np.sum(one * two) / lengths) if lengths else 1.0
        if abs(cosine) > 0.9995:
            mixed = (1 - t) * one + t * two
        else:
            angle = acos(cosine)
            mixed = sin((1 - t) * angle) / sin(angle) * one + sin(t * angle) / sin(angle) * two
        out[name] = (mixed - w).astype(like.dtype)
    return out


@pytest.fixture
def pair(tmp_path: Path) -> Any:
    """A base and two checkpoints, far enough apart for some tensors to take the circle and some the line."""
    start = base_values()
    tuned = [tuned_values(start, 1, size=0.5), tuned_values(start, 2, size=0.5)]
    for values in tuned:  # close to the base: whole weights are parallel
        values["embed.weight"] = (start["embed.weight"] + 0.02 * (values["embed.weight"] - start["embed.weight"])).astype(np.float32)
    tuned[1]["half.weight"] = start["half.weight"]  # one model leaves it alone
    base = write_checkpoint(tmp_path / "base", start, shards=3)
    return base, start, tuned, [write_checkpoint(tmp_path / f"tuned{k}", values, shards=k + 1) for k, values in enumerate(tuned)]


@pytest.mark.parametrize("space", ["weights", "increments"])
@pytest.mark.parametrize("t", [0.5, 0.2])
def test_slerp_is_the_reference(pair: Any, space: str, t: float) -> None:
    base, start, tuned, ckpts = pair
    taus = taus_of(start, tuned)
    got = values_of(weft.merge(ckpts, base, "slerp", t=t, space=space))
    close(got, reference(start, taus, t, space))
    line = {name: ((1 - t) * taus[0][name].astype(np.float64) + t * taus[1][name].astype(np.float64)).astype(tau.dtype) for name, tau in taus[0].items()}
    straight = {name for name in line if got[name].tobytes() == line[name].tobytes()}
    lines = {"embed.weight", "scale"} if space == "weights" else {"half.weight", "scale"}  # a scalar has no angle but 0 and 180 degrees
    assert lines == straight


def test_weights_are_the_default(pair: Any) -> None:
    base, _, _, ckpts = pair
    same(values_of(weft.merge(ckpts, base, "slerp")), values_of(weft.merge(ckpts, base, "slerp", t=0.5, space="weights")))


@pytest.mark.parametrize("space", ["weights", "increments"])
def test_blocks_and_threads_change_no_bit(tmp_path: Path, space: str) -> None:
    rng = np.random.default_rng(3)
    start = {f"wide{k}": rng.standard_normal((3, 100_000)) for k in range(4)}  # float64 shows every bit of the angle
    start["long"] = rng.standard_normal(300_001).astype(np.float32)
    base = write_checkpoint(tmp_path / "base", start)
    ckpts = [
        write_checkpoint(tmp_path / f"t{k}", {name: w + rng.standard_normal(w.shape).astype(w.dtype) for name, w in start.items()}, shards=2) for k in range(2)
    ]
    first = values_of(weft.merge(ckpts, base, "slerp", t=0.3, space=space, threads=1, block=1 << 20))
    close(first, reference(start, [{name: c.tensor(name).read() - w for name, w in start.items()} for c in ckpts], 0.3, space))
    for threads, block in ((2, 1 << 18), (3, 30_001)):
        same(first, values_of(weft.merge(ckpts, base, "slerp", t=0.3, space=space, threads=threads, block=block)))


@pytest.mark.parametrize("space", ["weights", "increments"])
@pytest.mark.parametrize("t", [0, 1])
def test_end_points_are_the_models_to_the_bit(pair: Any, tmp_path: Path, space: str, t: int) -> None:
    base, start, tuned, ckpts = pair
    same(values_of(weft.merge(ckpts, base, "slerp", t=t, space=space)), taus_of(start, tuned)[t])
    diffs = [exact_delta(base, start, values) for values in tuned]
    fold(base, [weft.merge(diffs, base, "slerp", t=t, space=space)], tmp_path / "folded")
    got = Base.open(tmp_path / "folded")
    same({name: got.tensor(name).read() for name in start}, tuned[t])
    loras = [lora(base, seed, TARGETS) for seed in (1, 2)]
    kept = weft.merge(loras, method="slerp", t=t, space=space)
    assert kept.entries.keys() == set(TARGETS) and all(op.op == "lowrank" for entry in kept.entries.values() for op in entry.ops)
    same({name: kept.apply(name, start[name]) for name in TARGETS}, {name: loras[t].apply(name, start[name]) for name in TARGETS})


@pytest.mark.parametrize("space", ["weights", "increments"])
def test_turned_around(pair: Any, space: str) -> None:
    base, _, _, ckpts = pair
    there = values_of(weft.merge(ckpts, base, "slerp", t=0.25, space=space))
    same(there, values_of(weft.merge(ckpts[::-1], base, "slerp", t=0.75, space=space)))


def test_lengths_and_angles_on_the_circle(tmp_path: Path) -> None:
    """Between vectors of one length the result keeps that length, where the average is shorter, and t divides the angle."""
    rng = np.random.default_rng(6)
    base = write_checkpoint(tmp_path / "base", {"w": np.zeros((40, 50), np.float32)})
    vectors = [v / np.linalg.norm(v) for v in rng.standard_normal((2, 40, 50))]
    ckpts = [write_checkpoint(tmp_path / f"t{k}", {"w": v.astype(np.float32)}) for k, v in enumerate(vectors)]
    angle = acos(np.sum(vectors[0] * vectors[1]))
    got = values_of(weft.merge(ckpts, base, "slerp", t=0.3, space="increments"))["w"].astype(np.float64)
    assert abs(np.linalg.norm(got) - 1) < 1e-6
    assert abs(acos(np.sum(got * vectors[0])) - 0.3 * angle) < 1e-5
    assert np.linalg.norm(values_of(weft.merge(ckpts, base, "linear"))["w"]) < 0.75


def test_parallel_opposite_and_zero_vectors_take_the_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    v = rng.integers(1, 9, (6, 6)).astype(np.float32)
    base = write_checkpoint(tmp_path / "base", {"same": v * 0, "opposite": v * 0, "zero": v * 0})
    one = write_checkpoint(tmp_path / "one", {"same": v, "opposite": v, "zero": v * 0})
    two = write_checkpoint(tmp_path / "two", {"same": 2 * v, "opposite": -2 * v, "zero": v})
    got = values_of(weft.merge([one, two], base, "slerp", t=0.25, space="increments"))
    same(got, {"same": 1.25 * v, "opposite": 0.25 * v, "zero": 0.25 * v})


def test_low_rank_increments_need_no_base(pair: Any) -> None:
    base, start, _, _ = pair
    a, b = lora(base, 1, TARGETS), lora(base, 2, TARGETS)
    taus = [{name: product(d, name).astype(np.float32) for name in TARGETS} for d in (a, b)]
    close(values_of(weft.merge([a, b], method="slerp", t=0.3, space="increments")), reference(start, taus, 0.3, "increments"))
    close(values_of(weft.merge([a, b], base, "slerp", t=0.3)), reference(start, taus, 0.3, "weights"))
    with pytest.raises(UsageError, match=r"(?s)depends on the base's values; give the base.*space=increments"):
        weft.merge([a, b], method="slerp")
    over = lora(base, 3, TARGETS, over=(a.id,))
    with pytest.raises(UsageError, match="input 2 was made over other deltas"):
        weft.merge([a, over], base, "slerp")
    assert weft.merge([a, over], base, "slerp", space="increments").entries.keys() == set(TARGETS)


def test_added_heads_start_from_zeros(pair: Any) -> None:
    base, _, _, _ = pair
    heads = np.random.default_rng(9).standard_normal((2, 3, 6)).astype(np.float32)
    deltas = []
    for head in heads:
        build = Builder(base)
        build.add("classifier.weight", head)
        deltas.append(build.done())
    want = reference({}, [{"classifier.weight": head} for head in heads], 0.4, "increments")
    for given in (base, None):
        close(values_of(weft.merge(deltas, given, "slerp", t=0.4)), want)


def test_tied_copies_and_entries_that_are_not_finite(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((7, 5)).astype(np.float32)
    mask = np.array([0, -np.inf, 1, np.nan], np.float32)
    base = write_checkpoint(tmp_path / "base", {"embed": w, "head": w, "mask": mask})
    ckpts = []
    for k in range(2):
        tuned, changed = w + rng.standard_normal(w.shape).astype(np.float32), mask.copy()
        changed[2 * k] = 4
        ckpts.append(write_checkpoint(tmp_path / f"t{k}", {"embed": tuned, "head": tuned, "mask": changed}))
    weft.merge(ckpts, base, "slerp", into=tmp_path / "into")
    got = Base.open(tmp_path / "into")
    assert got.tensor("embed").read().tobytes() == got.tensor("head").read().tobytes() != w.tobytes()
    finite = np.array([True, False, True, False])
    merged = got.tensor("mask").read()
    assert merged[~finite].tobytes() == mask[~finite].tobytes()
    one, two = np.array([4.0, 1]), np.array([0.0, 4])
    angle = acos(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    np.testing.assert_allclose(merged[finite], sin(angle / 2) / sin(angle) * (one + two), rtol=1e-6)


def test_what_is_refused(pair: Any) -> None:
    base, _, _, ckpts = pair
    with pytest.raises(UsageError, match="expected 2 inputs, got 3"):
        weft.merge([*ckpts, ckpts[0]], base, "slerp")
    with pytest.raises(UsageError, match="steered by its option t"):
        weft.merge(ckpts, base, "slerp", [0.3, 0.7])
    for t in (-0.1, 1.1):
        with pytest.raises(UsageError, match="t: expected"):
            weft.merge(ckpts, base, "slerp", t=t)
    assert "unchanged.weight" in SHAPES and "unchanged.weight" not in weft.merge(ckpts, base, "slerp").entries
