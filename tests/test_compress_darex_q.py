"""darex-q: what `dare` keeps, divided by q, stored without positions."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weft
from tests.conftest import MemoryBase, bits
from tests.test_compress_compeft import taus_of
from tests.test_merge import base_values, tuned_values, wide, write_checkpoint
from weft import xp
from weft.base import Base
from weft.codes import Coded
from weft.delta import Builder
from weft.folding import fold

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Base, Base, dict[str, np.ndarray], dict[str, np.ndarray]]:
    start = base_values()
    tuned = tuned_values(start, 1)
    return write_checkpoint(tmp_path / "base", start, shards=3), write_checkpoint(tmp_path / "tuned", tuned, shards=2), start, tuned


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("drop", [0.0, 0.3, 0.9])
def test_dare_is_q_at_one_minus_the_drop_rate(pair: Any, drop: float, seed: int, tmp_path: Path) -> None:
    """The same masks and the same bytes as merging one model by `dare`."""
    base, ckpt, _, _ = pair
    small = weft.compress(ckpt, "darex-q", base, drop=drop, seed=seed, dtype="F32", out=tmp_path / "small.safetensors")
    fold(base, [small], tmp_path / "small")
    weft.merge([ckpt], base, "dare", drop=drop, seed=seed, out=tmp_path / "dare.safetensors")
    fold(base, [weft.Delta.load(tmp_path / "dare.safetensors")], tmp_path / "dare")
    dare = Base.open(tmp_path / "dare").tensors
    for name, tensor in Base.open(tmp_path / "small").tensors.items():
        assert name == "wide.weight" or bits(tensor.read()) == bits(dare[name].read()), name  # float64 is stored as float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [0.45, 1.0])
def test_darex_q_is_the_slow_reference(pair: Any, q: float, dtype: str, tmp_path: Path) -> None:
    base, ckpt, start, tuned = pair
    made = weft.compress(ckpt, "darex-q", base, drop=0.6, q=q, dtype=dtype, seed=2, out=tmp_path / "small.safetensors")
    kept = 0
    for name, tau in taus_of(start, tuned).items():
        stream = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16)
        mask = (xp.sixteen_bits(xp.key(xp.key(2, stream), 0), 0, tau.size) >= round(0.6 * 65536)).reshape(tau.shape)
        rounded = (tau * tau.dtype.type(1 / q)).astype(np.float32).astype(DTYPES[dtype]).astype(np.float32)
        tensor = made.tensors[f"{name}//0.values"]
        assert isinstance(tensor, Coded) and tensor.payload.nbytes == 4 + int(mask.sum()) * np.dtype(DTYPES[dtype]).itemsize
        assert bits(tensor.read() + np.float32(0)) == bits(np.where(mask, rounded, np.float32(0)))
        kept += int(mask.sum())
    assert 20 < kept < 120
    fold(base, [made], tmp_path / "folded")
    folded = Base.open(tmp_path / "folded")
    name = "embed.weight"
    assert bits(folded.tensor(name).read()) == bits(wide(start[name]) + made.get(f"{name}//0.values"))


def test_the_mean_over_seeds_is_the_update_and_masks_differ() -> None:
    values = np.random.default_rng(3).standard_normal((20, 30)).astype(np.float32)
    build = Builder(MemoryBase({name: np.full((20, 30), k, np.float32) for k, name in enumerate("ab")}))
    for name in "ab":
        build.put(name, "dense", {"values": values})
    delta = build.done()
    made = [weft.compress(delta, "darex-q", drop=0.8, seed=seed, dtype="F32") for seed in range(60)]
    mean = np.mean([each.get("a//0.values") for each in made], 0)
    noise = np.abs(values) * np.sqrt(0.8 / 0.2 / 60)
    assert np.abs((mean - values) / noise).max() < 5 and np.abs((mean - values) / noise).mean() > 0.5
    assert not np.array_equal(made[0].get("a//0.values"), made[0].get("b//0.values"))
    assert not np.array_equal(made[0].get("a//0.values") != 0, made[1].get("a//0.values") != 0)


def test_copies_of_a_tied_tensor_have_one_mask_and_factors_one_each() -> None:
    rng = np.random.default_rng(4)
    same, values = rng.standard_normal((9, 8)).astype(np.float32), rng.standard_normal((9, 8)).astype(np.float32)
    build = Builder(MemoryBase({"embed": same, "head": same, "lora": 2 * same}))
    for name in ("embed", "head"):
        build.put(name, "dense", {"values": values})
    build.put("lora", "lowrank", {"A": rng.standard_normal((9, 8)).astype(np.float32), "B": rng.standard_normal((9, 9)).astype(np.float32)})
    made = weft.compress(build.done(), "darex-q", drop=0.5)
    assert bits(made.get("embed//0.values")) == bits(made.get("head//0.values"))
    assert not np.array_equal(made.get("lora//0.A").reshape(-1) != 0, made.get("lora//0.B").reshape(-1)[:72] != 0)


def test_ninety_percent_less() -> None:
    build = Builder(MemoryBase({"w": np.zeros((500, 400), np.float32)}))
    build.put("w", "dense", {"values": np.random.default_rng(5).standard_normal((500, 400)).astype(np.float32)})
    made = weft.compress(build.done(), "darex-q")
    assert 1.55 < 8 * made.nbytes / 200_000 < 1.65
