"""lossless: the same bytes after folding, from fewer; and the op `xor` that it uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import weft
from tests.conftest import MemoryBase, bits
from tests.test_merge import base_values, tuned_values, write_checkpoint
from weft.base import Base
from weft.codes import Coded
from weft.delta import Builder, Delta
from weft.errors import FormatError, MismatchError
from weft.folding import fold
from weft.ops import chain

ODD = np.array([0x7FA5, 0xFFC1, 0x7F80, 0x8000, 0x0000, 0x0001], np.uint16).view(ml_dtypes.bfloat16)
"""NaNs with payloads, an infinity, zeros of both signs, the smallest number."""


def fine_tune(dtype: Any, seed: int = 1, size: float = 3e-4) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights as of a trained model (0.02 wide), and the same after a little training: an Adam-like step on most entries."""
    rng = np.random.default_rng(seed)
    start = {f"layer.{k}.weight": (0.02 * rng.standard_normal((300, 400))).astype(dtype) for k in range(2)}
    return start, {name: (w.astype(np.float32) + size * rng.standard_normal(w.shape).astype(np.float32)).astype(dtype) for name, w in start.items()}


@pytest.mark.parametrize(("given", "with_base"), [("checkpoint", True), ("exact", True), ("exact", False), ("dense", True), ("dense", False)])
def test_folding_gives_the_same_bytes(given: str, with_base: bool, tmp_path: Path) -> None:
    """Of every dtype, with odd numbers, an integer tensor that changes, an added one and a removed one."""
    start = base_values() | {"odd": ODD, "gone": np.ones(4, np.float32)}
    tuned = tuned_values(start, 1) | {"odd": ODD[::-1].copy(), "ids": np.array([3, 9, -1, 2]), "new": np.arange(6, dtype=np.float32)}
    if given == "dense":
        tuned["odd"] = start["odd"]
    del tuned["gone"]
    base, ckpt = write_checkpoint(tmp_path / "base", start, shards=3), write_checkpoint(tmp_path / "tuned", tuned, shards=2)
    update: Any = ckpt
    if given != "checkpoint":
        weft.diff(base, ckpt, given).save(update := tmp_path / "update.safetensors")
    made = weft.compress(update, "lossless", base if with_base else None, out=tmp_path / "small.safetensors")
    fold(base, [made], tmp_path / "folded")
    if given == "dense":
        fold(base, [Delta.load(update)], tmp_path / "want")
    want = Base.open(tmp_path / "want" if given == "dense" else tmp_path / "tuned")
    got = Base.open(tmp_path / "folded")
    assert got.tensors.keys() == want.tensors.keys()
    for name, tensor in want.tensors.items():
        assert tensor.dtype == got.tensors[name].dtype and bits(tensor.read()) == bits(got.tensors[name].read()), name


@pytest.mark.parametrize(("dtype", "least"), [(ml_dtypes.bfloat16, 2.0), (np.float32, 1.3)], ids=["bf16", "f32"])
def test_a_fine_tune_gets_smaller(dtype: Any, least: float, tmp_path: Path) -> None:
    """With the base much more than without, and more than zstd alone: the ratio is printed."""
    start, tuned = fine_tune(dtype)
    base, ckpt = write_checkpoint(tmp_path / "base", start), write_checkpoint(tmp_path / "tuned", tuned)
    exact = weft.diff(base, ckpt)
    exact.save(tmp_path / "exact.safetensors")
    made = weft.compress(tmp_path / "exact.safetensors", "lossless", base, out=tmp_path / "small.safetensors")
    alone = weft.compress(tmp_path / "exact.safetensors", "lossless")
    ratio, without = exact.nbytes / made.nbytes, exact.nbytes / alone.nbytes
    print(f"{np.dtype(dtype).name}: {ratio:.2f} times smaller with the base, {without:.2f} without")
    assert ratio > least and ratio > 1.15 * without > 1.15
    assert [op.op for entry in made.entries.values() for op in entry.ops] == ["xor", "xor"]
    assert all(isinstance(tensor, Coded) and tensor.code == "planes" for tensor in made.tensors.values())
    fold(base, [made], tmp_path / "folded")
    for name, values in tuned.items():
        assert bits(Base.open(tmp_path / "folded").tensor(name).read()) == bits(values)
    model = {name: xp_rewrite(made, name, start[name]) for name in start}
    assert all(bits(model[name]) == bits(tuned[name]) for name in tuned)
    summary: Any = made.notes["summary"]
    assert summary["error"] == 0 and summary["ratio"] == pytest.approx(ratio, rel=1e-3)


def xp_rewrite(delta: Delta, name: str, w: np.ndarray) -> np.ndarray:
    return np.asarray(chain.rewrite(w, delta.entries[name].ops, delta.get))


def test_sparse_changes_keep_their_positions(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    start = {"w": rng.standard_normal((200, 300)).astype(np.float32)}
    tuned = {"w": start["w"].copy()}
    tuned["w"].reshape(-1)[rng.permutation(60000)[:3000]] += 1
    base, ckpt = write_checkpoint(tmp_path / "base", start), write_checkpoint(tmp_path / "tuned", tuned)
    made = weft.compress(ckpt, "lossless", base, out=tmp_path / "small.safetensors")
    index = made.tensors["w//0.index"]
    assert isinstance(index, Coded) and index.cfg["steps"] and index.payload.nbytes < 3000 * 1.3
    fold(base, [made], tmp_path / "folded")
    assert bits(Base.open(tmp_path / "folded").tensor("w").read()) == bits(tuned["w"])


def test_what_stands_over_others_stays_an_assign_and_noise_stays_as_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    start, tuned = fine_tune(np.float32)
    base, ckpt = write_checkpoint(tmp_path / "base", start), write_checkpoint(tmp_path / "tuned", tuned)
    exact = weft.diff(base, ckpt)
    over = replace(exact, over=("ab" * 32,))
    made = weft.compress(over, "lossless", base)
    assert {op.op for entry in made.entries.values() for op in entry.ops} == {"assign"} and made.nbytes < exact.nbytes
    build = Builder(MemoryBase({"w": np.zeros(64, np.uint8)}))
    build.put("w", "assign", {"values": rng.integers(0, 256, 64).astype(np.uint8)})
    with pytest.raises(MismatchError, match="nothing to compress"):
        weft.compress(build.done(), "lossless")
    with pytest.raises(MismatchError, match="nothing to compress"):
        weft.compress(weft.compress(exact, "lossless", base, out=tmp_path / "small.safetensors"), "lossless", base)


# --- xor


def flipped(start: np.ndarray, new: np.ndarray, dtype: str) -> Delta:
    build = Builder(MemoryBase({"w": start}))
    kind = f"u{start.itemsize}"
    build.put("w", "xor", {"bits": start.view(kind) ^ new.view(kind)}, dtype=dtype)
    return build.done()


@pytest.mark.parametrize(
    ("start", "new", "dtype"),
    [
        (ODD, ODD[::-1].copy(), "BF16"),
        (np.array([1.5, np.nan, -0.0]), np.array([np.inf, 0.0, 0.0]), "F64"),
        (np.array([1, -5, 2**62]), np.array([-1, 0, 7]), "I64"),
        (np.array([True, False]), np.array([True, True]), "BOOL"),
        (np.array(3.0, np.float16), np.array(-7.0, np.float16), "F16"),
    ],
    ids=["bf16", "f64", "i64", "bool", "0-d"],
)
def test_xor_replays_any_bits(start: np.ndarray, new: np.ndarray, dtype: str) -> None:
    delta = flipped(start, new, dtype)
    got = xp_rewrite(delta, "w", start)
    assert got.dtype == new.dtype and got.shape == new.shape and bits(got) == bits(new)


def test_xor_must_come_first() -> None:
    """On a tensor that something else has changed, the flips would mean nothing."""
    rng = np.random.default_rng(5)
    start, new = rng.standard_normal((2, 6, 4)).astype(np.float32)
    xor = flipped(start, new, "F32")
    build = Builder(MemoryBase({"w": start}))
    build.put("w", "lowrank", {"A": rng.standard_normal((2, 4)).astype(np.float32), "B": rng.standard_normal((6, 2)).astype(np.float32)})
    lora = build.done()
    after = xor.then(lora)
    np.testing.assert_array_equal(after.apply("w", start), lora.apply("w", new))
    both = xor + lora
    np.testing.assert_allclose(both.apply("w", start) - new, lora.apply("w", start) - start, atol=1e-5)
    wrong = lora.then(xor)
    for attempt in (wrong.validate, lambda: wrong.apply("w", start), lambda: xp_rewrite(wrong, "w", start), lambda: lora.then(both).validate()):
        with pytest.raises((MismatchError, FormatError), match="must be the first op"):
            attempt()


def test_xor_and_the_dtype_of_its_target() -> None:
    start, new = np.random.default_rng(6).standard_normal((2, 5)).astype(ml_dtypes.bfloat16)
    with pytest.raises(FormatError, match="the target is BF16, got F16"):
        flipped(start, new, "F16")
    with pytest.raises(FormatError, match="expected U32"):
        flipped(start, new, "F32")
    delta = flipped(start, new, "BF16")
    assert bits(delta.apply("w", start.astype(np.float32))) == bits(new.astype(np.float32)), "a model that was loaded wider"
    with pytest.raises(MismatchError, match="load the model in the dtype of its files"):
        xp_rewrite(delta, "w", start.astype(np.float32).astype(np.float16))


def test_xor_on_a_live_model(tmp_path: Path) -> None:
    from tests import tiny

    folder = tiny.bert(tmp_path / "base")
    base = Base.open(folder)
    tuned = {name: tensor.read() for name, tensor in base.tensors.items()}
    rng = np.random.default_rng(7)
    name = next(name for name in base.names if name.endswith("query.weight"))
    tuned[name] = tuned[name] + 0.01 * rng.standard_normal(tuned[name].shape).astype(np.float32)
    build = Builder(base)
    build.put(name, "assign", {"values": tuned[name]})
    made = weft.compress(build.done(), "lossless", base)
    assert made.entries[name].ops[0].op == "xor"
    model = base.model()
    live = next(key for key in model.state_dict() if key.endswith(name))
    before = model.state_dict()[live].clone()
    weft.attach(model, made, base=base)
    assert bits(model.state_dict()[live]) == bits(tuned[name])
    weft.detach(model)
    assert torch.equal(model.state_dict()[live], before) and not np.array_equal(before, tuned[name])
