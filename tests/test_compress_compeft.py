"""ComPEFT against a slow reference over whole vectors, its options, its size, and what it is for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weft
from tests.conftest import MemoryBase, bits
from tests.test_merge import SHAPES, base_values, tuned_values, wide, write_checkpoint
from weft.base import Base
from weft.codes import Coded
from weft.delta import Builder, Delta
from weft.errors import MismatchError
from weft.folding import fold


def slow_compeft(
    taus: dict[str, np.ndarray], density: float = 0.2, alpha: float = 1.0, scale: str = "std", trim: str = "global", **_: Any
) -> dict[str, np.ndarray]:
    """Number by number, in Python's own floats (sums without rounding)."""
    out = {}
    groups = [[name] for name in taus] if trim == "tensor" else [list(taus)]
    for names in groups:
        flat = [float(v) for name in names for v in taus[name].reshape(-1)]
        rounded = sorted((abs(float(np.float32(v))) for v in flat), reverse=True)
        h = rounded[max(1, int(density * len(flat))) - 1]
        if scale == "std":
            mean = math.fsum(flat) / len(flat)
            sigma = math.sqrt(math.fsum((v - mean) ** 2 for v in flat) / len(flat))
        else:
            kept = [abs(v) for v in flat if abs(float(np.float32(v))) >= h and v != 0]
            sigma = math.fsum(kept) / len(kept)
        s = np.float32(alpha * sigma)
        for name in names:
            keep = [abs(float(np.float32(v))) >= h and v != 0 for v in taus[name].reshape(-1)]
            signs = [(1 if v > 0 else -1) if k else 0 for v, k in zip(taus[name].reshape(-1), keep, strict=True)]
            out[name] = np.array([s * sign for sign in signs], np.float32).reshape(taus[name].shape)
    return out


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Base, Base, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A base, a checkpoint tuned from it, both in shards; and the tensors of both."""
    start = base_values()
    tuned = tuned_values(start, 1)
    return write_checkpoint(tmp_path / "base", start, shards=3), write_checkpoint(tmp_path / "tuned", tuned, shards=2), start, tuned


def taus_of(start: dict[str, np.ndarray], tuned: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(wide(tuned[name]) - wide(start[name])) for name in sorted(SHAPES) if name != "unchanged.weight"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"density": 0.05, "alpha": 4.0},
        {"density": 0.5, "scale": "mean"},
        {"density": 0.3, "form": "bitmask"},
        {"density": 1.0, "form": "bitmask"},
        {"density": 1e-9},
        {"density": 0.4, "trim": "tensor", "scale": "mean", "alpha": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("given", ["checkpoint", "dense", "exact"])
def test_compeft_is_the_slow_reference(pair: Any, options: dict[str, Any], given: str, tmp_path: Path) -> None:
    """On bf16, f16, f32 and f64; 0-d, 1-d and 4-d; from a checkpoint in shards, from its increments and from its new values. Bit for bit."""
    base, ckpt, start, tuned = pair
    taus = taus_of(start, tuned)
    update: Any = ckpt
    if given != "checkpoint":
        weft.diff(base, ckpt, given).save(update := tmp_path / "delta.safetensors")
    made = weft.compress(update, "compeft", base, out=tmp_path / "small.safetensors", **options)
    want = slow_compeft(taus, **options)
    for name, values in want.items():
        assert isinstance(made.tensors[f"{name}//0.values"], Coded)
        assert bits(made.get(f"{name}//0.values")) == bits(values), name
    fold(base, [made], tmp_path / "folded")
    for name, tensor in Base.open(tmp_path / "folded").tensors.items():
        new = wide(start[name]) + want[name].astype(wide(start[name]).dtype) if name in want else start[name]
        assert bits(tensor.read()) == bits(np.asarray(new).astype(start[name].dtype)), name


def test_a_tensor_of_equal_entries_is_left_alone_when_tensors_stand_alone(pair: Any) -> None:
    """Its standard deviation is 0: so it is with `scale`, which has one entry."""
    base, ckpt, start, tuned = pair
    made = weft.compress(ckpt, "compeft", base, trim="tensor")
    coded = {name for name in made.entries if isinstance(made.tensors[f"{name}//0.values"], Coded)}
    assert set(made.entries) - coded == {"scale"}
    assert bits(made.get("scale//0.values")) == bits(taus_of(start, tuned)["scale"])


def test_new_values_at_some_entries_are_increments_too(tmp_path: Path) -> None:
    """An exact diff stores positions and values where few entries differ; compressed it is the same as the diff of increments."""
    start = base_values()
    tuned = {name: x.copy() for name, x in start.items()}
    for name, (shape, _) in SHAPES.items():
        if shape:
            tuned[name].reshape(-1)[::9] += np.asarray(1.5, tuned[name].dtype)
    base, ckpt = write_checkpoint(tmp_path / "base", start), write_checkpoint(tmp_path / "tuned", tuned)
    weft.diff(base, ckpt).save(tmp_path / "exact.safetensors")
    assert any("index" in op.t for entry in Delta.load(tmp_path / "exact.safetensors").entries.values() for op in entry.ops)
    one, two = weft.compress(tmp_path / "exact.safetensors", base=base, density=0.1), weft.compress(ckpt, base=base, density=0.1)
    assert {key: bits(one.get(key)) for key in one.tensors} == {key: bits(two.get(key)) for key in two.tensors} and len(one.tensors) == len(one.entries) > 3
    with pytest.raises(MismatchError, match="only in relation to the base"):
        weft.compress(tmp_path / "exact.safetensors", density=0.1)


def test_zeros_stay_zeros() -> None:
    from tests.conftest import MemoryBase

    build = Builder(MemoryBase({name: np.zeros((5, 7), np.float32) for name in "ab"}))
    values = np.random.default_rng(1).standard_normal((5, 7), np.float32)
    build.put("a", "dense", {"values": np.zeros((5, 7), np.float32)})
    build.put("b", "dense", {"values": np.where(np.arange(35).reshape(5, 7) % 5, 0, values)})
    delta = build.done()
    for trim in ("global", "tensor"):
        made = weft.compress(delta, "compeft", density=0.9, trim=trim)
        assert not made.get("a//0.values").any() and np.array_equal(np.sign(made.get("b//0.values")), np.sign(delta.get("b//0.values")))


def test_ties_at_the_threshold_are_all_kept() -> None:
    from tests.conftest import MemoryBase

    values = np.array([3, -2, 2, 2, 1, -1, 0, 0, 0, 0], np.float32)
    build = Builder(MemoryBase({"w": np.zeros(10, np.float32)}))
    build.put("w", "dense", {"values": values})
    got = weft.compress(build.done(), "compeft", density=0.2, scale="mean").get("w//0.values")
    assert bits(got) == bits(np.float32(2.25) * np.array([1, -1, 1, 1, 0, 0, 0, 0, 0, 0], np.float32))


def test_only_what_is_an_update_is_rounded(tmp_path: Path) -> None:
    """Not positions, frozen pairs, ops relative to the weight or added tensors; nor new values, as long as the base is not there."""
    rng = np.random.default_rng(2)
    shapes = dict.fromkeys(("dense", "sparse", "lora", "pissa", "dora", "raw", "view"), (12, 8))
    base = write_checkpoint(tmp_path / "base", {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    build = Builder(base)
    build.put("dense", "dense", {"values": draw(12, 8)})
    build.put("sparse", "sparse", {"index": np.arange(0, 96, 7), "values": draw(14)})
    build.put("lora", "lowrank", {"A": draw(2, 8), "B": draw(12, 2)}, scale=0.5)
    build.put("pissa", "lowrank", {"A": draw(2, 8), "B": draw(12, 2), "A0": draw(2, 8), "B0": draw(12, 2)})
    build.put("dora", "lowrank", {"A": draw(2, 8), "B": draw(12, 2)})
    build.put("dora", "magnitude", {"m": draw(12)})
    build.put("raw", "assign", {"values": draw(12, 8)})
    build.put("view", "svd", {"P": draw(12, 3), "lam": draw(3), "Q": draw(3, 8)})
    build.add("head", draw(3, 8))
    delta = build.done()
    made = weft.compress(delta, "compeft", density=0.5)
    coded = {key for key, tensor in made.tensors.items() if isinstance(tensor, Coded)}
    fields = [
        ("dense", "values"),
        ("sparse", "values"),
        ("lora", "A"),
        ("lora", "B"),
        ("dora", "A"),
        ("dora", "B"),
        ("view", "P"),
        ("view", "lam"),
        ("view", "Q"),
    ]
    assert coded == {f"{target}//0.{field}" for target, field in fields}
    assert made.entries == delta.entries and all(made.tensors[key] is delta.tensors[key] for key in set(made.tensors) - coded)
    parts = {key: delta.get(key) for key in sorted(coded)}
    want = slow_compeft(parts, density=0.5)
    assert all(bits(made.get(key)) == bits(want[key]) for key in coded)


def test_a_pool_that_several_targets_share_is_counted_once() -> None:
    from tests.conftest import MemoryBase

    rng = np.random.default_rng(3)
    build = Builder(MemoryBase({name: np.zeros((6, 8), np.float32) for name in "ab"}))
    a = build.share("A", rng.standard_normal((2, 8), np.float32))
    for name in "ab":
        build.put(name, "lowrank", {"A": a, "B": rng.standard_normal((6, 2), np.float32)})
    delta = build.done()
    made = weft.compress(delta, "compeft", density=0.3)
    want = slow_compeft({key: delta.get(key) for key in sorted(delta.tensors)}, density=0.3)
    assert all(bits(made.get(key)) == bits(want[key]) for key in delta.tensors)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_five_per_cent_of_four_million_entries_take_next_to_the_entropy(dtype: Any, tmp_path: Path) -> None:
    """Done when: at most 1.03 times the bound H(p) + p, in bytes of the file's tensors."""
    from tests.conftest import MemoryBase

    size = 1 << 22
    rng = np.random.default_rng(8)
    values = (rng.standard_normal(size, np.float32) * rng.standard_normal(size, np.float32)).astype(dtype).reshape(4096, -1)
    build = Builder(MemoryBase({"w": np.zeros(values.shape, dtype)}))
    build.put("w", "dense", {"values": values})
    made = weft.compress(build.done(), "compeft", density=0.05, out=tmp_path / "small.safetensors")
    summary: Any = made.notes["summary"]
    p = summary["kept"] / size
    assert 0.0499 < p < 0.051
    bound = (-p * math.log2(p) - (1 - p) * math.log2(1 - p) + p) * size / 8
    assert bound < made.nbytes <= 1.03 * bound
    assert (tmp_path / "small.safetensors").stat().st_size < made.nbytes + 3000


@pytest.mark.slow
def test_what_it_is_for(tmp_path: Path) -> None:
    """A model that knows other things learns to judge reviews, by tuning all of it. The signs of a tenth of the increments are enough: more than
    20 times smaller than in bf16, and within a point of the accuracy. alpha is chosen on rows of the training set; without it (1, as for
    large models) nearly all is lost, and so it is with signs at random."""
    from weft.demo import edition, microcosm

    files, base = microcosm.files(), weft.Base.open(edition("first"))
    train, test = files["judge.train"], files["judge.test"][:200]
    delta = weft.tune(
        base, train[200:], method="full", lr=1e-3, steps=40, batch_size=16, threads=1, progress=lambda event: None, out=tmp_path / "tuned.safetensors"
    )

    def score(deltas: list[Delta], rows: list[dict[str, Any]]) -> float:
        return float(weft.evaluate(base, deltas, rows, batch_size=100)["metrics"]["teacher_forced_exact"])

    tried = {alpha: weft.compress(delta, "compeft", base, density=0.1, alpha=alpha) for alpha in (1.0, 3.0, 4.0, 5.0)}
    best = max(tried, key=lambda alpha: score([tried[alpha]], train[:100]))
    small = tried[best]
    whole = score([delta], test)
    assert whole > 0.95 and score([], test) < 0.1
    assert score([small], test) >= whole - 0.01
    assert 20 < delta.nbytes / 2 / small.nbytes < 50 and best > 1
    assert score([tried[1.0]], test) < 0.5
    rng = np.random.default_rng(0)
    build = Builder(base)
    for name in small.entries:
        build.put(name, "dense", {"values": rng.permutation(small.get(f"{name}//0.values").reshape(-1)).reshape(small.entries[name].shape)})
    assert score([build.done()], test) < 0.1


def only(values: np.ndarray) -> Delta:
    build = Builder(MemoryBase({"w": np.zeros(values.shape, values.dtype)}))
    build.put("w", "dense", {"values": values})
    return build.done()


@pytest.mark.parametrize("scale", ["std", "mean"])
def test_zeros_are_never_kept_and_count_in_no_mean(rng: np.random.Generator, scale: str) -> None:
    """Increments of bf16 checkpoints are mostly zeros; a density above theirs asks for no more than there is."""
    values = np.zeros((100, 100), np.float32)
    values[::20] = rng.standard_normal((5, 100))
    made = [weft.compress(only(values), density=density, scale=scale).get("w//0.values") for density in (0.05, 0.2, 1.0)]
    sigma = np.abs(values[::20]).mean(dtype=np.float64) if scale == "mean" else values.std(dtype=np.float64)
    assert bits(made[0]) == bits(made[1]) == bits(made[2]) == bits(np.sign(values) * np.float32(sigma) + np.float32(0))


@pytest.mark.parametrize("scale", ["std", "mean"])
def test_float64_entries_that_are_nothing_in_float32_become_nothing(rng: np.random.Generator, scale: str) -> None:
    tiny = rng.standard_normal((20, 30)) * 1e-200
    assert not weft.compress(only(tiny), scale=scale).get("w//0.values").any()
    tiny[3] = 2.0
    got = weft.compress(only(tiny), scale=scale).get("w//0.values")
    assert got[3].all() and not np.delete(got, 3, 0).any()
