"""truncate: as near as Eckart and Young allow, from factors without their product and from full increments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weft
from tests.conftest import MemoryBase, bits
from tests.test_merge import write_checkpoint
from weft.base import Base
from weft.delta import Builder, Delta
from weft.errors import InputError, MismatchError
from weft.folding import fold
from weft.ops import At


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def increment(delta: Delta, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(delta.apply(name, np.zeros(shape)))


def best(full: np.ndarray, rank: int) -> float:
    return float(np.sqrt((np.linalg.svd(full.reshape(full.shape[0], -1), compute_uv=False)[rank:] ** 2).sum()))


def ranks(delta: Delta) -> dict[str, list[int]]:
    return {name: [delta.tensors[op.t["A"].key].shape[0] for op in entry.ops if op.op == "lowrank"] for name, entry in delta.entries.items()}


@pytest.fixture
def mixed(rng: np.random.Generator) -> tuple[Delta, dict[str, tuple[int, ...]]]:
    """One and many LoRAs on a matrix, a PiSSA, full increments of two and four axes, sparse on top of LoRA, and a vector."""
    shapes = {"one": (30, 20), "many": (20, 30), "pissa": (16, 18), "full": (24, 14), "conv": (8, 6, 3, 3), "both": (15, 15), "bias": (9,)}
    base = MemoryBase({name: draw(rng, *shape) for name, shape in shapes.items()})
    build = Builder(base)
    build.put("one", "lowrank", {"A": draw(rng, 8, 20), "B": draw(rng, 30, 8)}, scale=0.25)
    for k in range(3):
        build.put("many", "lowrank", {"A": draw(rng, 4, 30), "B": draw(rng, 20, 4)}, scale=1.5 - k)
    build.put("pissa", "lowrank", {"A": draw(rng, 5, 18), "B": draw(rng, 16, 5), "A0": draw(rng, 5, 18), "B0": draw(rng, 16, 5)}, scale=2.0)
    build.put("full", "dense", {"values": draw(rng, 24, 3) @ draw(rng, 3, 14) + 0.1 * draw(rng, 24, 14)}, scale=-0.5)
    build.put("conv", "dense", {"values": draw(rng, 8, 6, 3, 3)})
    build.put("both", "lowrank", {"A": draw(rng, 2, 15), "B": draw(rng, 15, 2)})
    build.put("both", "sparse", {"index": np.arange(0, 225, 11), "values": draw(rng, 21)})
    build.put("bias", "dense", {"values": draw(rng, 9)})
    return build.done(), shapes


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_is_as_near_as_any_matrix_of_that_rank(mixed: Any, rank: int, tmp_path: Path) -> None:
    delta, shapes = mixed
    made = weft.compress(delta, "truncate", rank=rank, out=tmp_path / "small.safetensors")
    assert ranks(made) == {name: [] if name == "bias" else [rank] for name in shapes}
    for name, shape in shapes.items():
        full, got = increment(delta, name, shape), increment(made, name, shape)
        if name == "bias":
            assert bits(full) == bits(got)
        else:
            np.testing.assert_allclose(np.linalg.norm(full - got), best(full, rank), rtol=1e-6)
            assert made.entries[name].ops[0].cfg == {}


@pytest.mark.parametrize("energy", [None, 0.6, 0.9])
def test_an_energy_takes_the_least_rank_that_keeps_it(mixed: Any, energy: float | None) -> None:
    delta, shapes = mixed
    made = weft.compress(delta, "truncate", energy=energy)
    smaller = 0
    for name, shape in shapes.items():
        if name == "bias":
            continue
        full, got = increment(delta, name, shape), increment(made, name, shape)
        s = np.linalg.svd(full.reshape(shape[0], -1), compute_uv=False)
        least = int((np.cumsum(s**2) >= (energy or 0.95) * (s**2).sum() * (1 - 1e-6)).argmax()) + 1
        if made.entries[name] == delta.entries[name]:
            assert bits(full) == bits(got)
            continue
        assert ranks(made)[name] == [least]
        assert np.linalg.norm(full - got) == pytest.approx(best(full, least), rel=1e-5, abs=1e-6 * np.linalg.norm(full))
        smaller += 1
    assert smaller >= 4
    both = weft.compress(delta, "truncate", energy=energy or 0.95, rank=2)
    assert ranks(both)["many"] == [2]


def test_factors_are_never_multiplied_out(rng: np.random.Generator) -> None:
    """Twenty LoRAs of rank 4 on one matrix of a size that would be seen."""
    import tracemalloc

    build = Builder(MemoryBase({"w": np.zeros((3000, 4000), np.float32)}))
    for _ in range(20):
        build.put("w", "lowrank", {"A": draw(rng, 4, 4000), "B": draw(rng, 3000, 4)}, scale=0.05)
    delta = build.done()
    tracemalloc.start()
    made = weft.compress(delta, "truncate", rank=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ranks(made) == {"w": [16]}
    assert peak < 3000 * 4000 * 4
    left, right = (
        np.linalg.qr(np.concatenate([get(k) for k in range(20)], 1), mode="r") for get in (lambda k: delta.get(f"w//{k}.B"), lambda k: delta.get(f"w//{k}.A").T)
    )
    s = np.linalg.svd(left @ right.T, compute_uv=False)
    assert made.notes["summary"]["tensors"]["w"]["error"] == pytest.approx(np.sqrt((s[16:] ** 2).sum() / (s**2).sum()), rel=1e-3)


def test_views_are_taken_apart_and_shared_factors_and_relative_ops_left(rng: np.random.Generator) -> None:
    shapes = {"qkv": (24, 10), "shared": (9, 10), "dora": (12, 10), "part": (20, 10)}
    build = Builder(MemoryBase({name: draw(rng, *shape) for name, shape in shapes.items()}))
    q, v = At(index=((0, 8),)), At(index=((16, 24),))
    for at in (q, v, q):
        build.put("qkv", "lowrank", {"A": draw(rng, 3, 10), "B": draw(rng, 8, 3)}, at=at)
    build.put("shared", "lowrank", {"A": build.share("A", draw(rng, 4, 10)), "B": draw(rng, 9, 4)})
    build.put("dora", "lowrank", {"A": draw(rng, 4, 10), "B": draw(rng, 12, 4)})
    build.put("dora", "magnitude", {"m": draw(rng, 12)})
    build.put("part", "dense", {"values": draw(rng, 5, 10)}, at=At(index=((0, 5),)))
    delta = build.done()
    made = weft.compress(delta, "truncate", rank=2)
    assert [(op.op, op.at) for op in made.entries["qkv"].ops] == [("lowrank", q), ("lowrank", v)] and ranks(made)["qkv"] == [2, 2]
    full, got = increment(delta, "qkv", (24, 10)), increment(made, "qkv", (24, 10))
    for lo in (0, 16):
        np.testing.assert_allclose(np.linalg.norm((full - got)[lo : lo + 8]), best(full[lo : lo + 8], 2), rtol=1e-6)
    assert not got[8:16].any()
    for name in ("shared", "dora", "part"):
        assert made.entries[name] == delta.entries[name]


def test_factors_keep_their_dtype_and_small_ones_are_left(rng: np.random.Generator) -> None:
    half = {"A": draw(rng, 6, 20).astype(ml_dtypes.bfloat16), "B": draw(rng, 30, 6).astype(ml_dtypes.bfloat16)}
    build = Builder(MemoryBase({"w": np.zeros((30, 20), np.float32)}))
    build.put("w", "lowrank", half)
    made = weft.compress(build.done(), "truncate", rank=3)
    assert {tensor.dtype for tensor in made.tensors.values()} == {"BF16"} and made.nbytes == 2 * 3 * 50
    with pytest.raises(MismatchError, match="nothing to compress"):
        weft.compress(build.done(), "truncate", rank=6)


def test_from_a_checkpoint_into_a_fold(rng: np.random.Generator, tmp_path: Path) -> None:
    start = {"w": draw(rng, 60, 40), "wide": rng.standard_normal((30, 20)), "norm": draw(rng, 40)}
    tuned = {"w": start["w"] + 0.1 * draw(rng, 60, 2) @ draw(rng, 2, 40), "wide": start["wide"] + rng.standard_normal((30, 1)), "norm": start["norm"] * 2}
    base, ckpt = write_checkpoint(tmp_path / "base", start), write_checkpoint(tmp_path / "tuned", tuned)
    made = weft.compress(ckpt, "truncate", base, energy=0.9999999, out=tmp_path / "small.safetensors")
    assert ranks(made) == {"w": [2], "wide": [1], "norm": []}
    assert made.tensors["wide//0.A"].dtype == "F64"
    fold(base, [made], tmp_path / "folded")
    got = Base.open(tmp_path / "folded")
    for name in start:
        np.testing.assert_allclose(got.tensor(name).read(), tuned[name], atol=1e-3 if name != "wide" else 1e-9)


def test_empty_matrices_are_left(rng: np.random.Generator) -> None:
    build = Builder(MemoryBase({"w": np.zeros((20, 30), np.float32), "rows": np.zeros((0, 4), np.float32), "columns": np.zeros((4, 0), np.float32)}))
    build.put("w", "dense", {"values": draw(rng, 20, 1) @ draw(rng, 1, 30)})
    for name, shape in (("rows", (0, 4)), ("columns", (4, 0))):
        build.put(name, "dense", {"values": draw(rng, *shape)})
    assert ranks(weft.compress(build.done(), "truncate")) == {"w": [1], "rows": [], "columns": []}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_factors_that_are_no_numbers_are_named(rng: np.random.Generator, bad: float) -> None:
    a = draw(rng, 4, 20)
    a[1, 2] = bad
    build = Builder(MemoryBase({"q.weight": np.zeros((30, 20), np.float32)}))
    build.put("q.weight", "lowrank", {"A": a, "B": draw(rng, 30, 4)})
    with pytest.raises(InputError, match=r"q\.weight: a low-rank factor has NaN"):
        weft.compress(build.done(), "truncate", rank=2)


def test_what_is_small_already_does_not_grow(rng: np.random.Generator) -> None:
    """Few entries, two bytes each, or in a code: factors that are fewer numbers than the matrix can take more bytes."""
    build = Builder(MemoryBase({name: np.zeros((40, 50), np.float32) for name in ("sparse", "half", "coded")}))
    build.put("sparse", "sparse", {"index": np.arange(0, 2000, 100), "values": draw(rng, 20)})
    build.put("half", "dense", {"values": draw(rng, 40, 50).astype(ml_dtypes.bfloat16)})
    build.put("coded", "dense", {"values": draw(rng, 40, 50)})
    given = build.done()
    given = replace(given, tensors={**given.tensors, "coded//0.values": weft.compress(given.only(["coded"]), "bitdelta").tensors["coded//0.values"]})
    with pytest.raises(MismatchError, match="nothing to compress"):
        weft.compress(given, "truncate", rank=15)
    made = weft.compress(given, "truncate", rank=10)
    assert ranks(made) == {"sparse": [], "half": [10], "coded": []} and made.nbytes < given.nbytes
