"""quantize, bitdelta and fedzip against slow references over whole vectors, bit for bit; and k-means in one dimension."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weft
from tests.conftest import MemoryBase, bits
from tests.test_compress_compeft import taus_of
from tests.test_merge import base_values, tuned_values, wide, write_checkpoint
from weft.base import Base
from weft.codes import Coded
from weft.compressing._kmeans import added, counted, levels
from weft.delta import Builder, Delta
from weft.errors import InputError, MismatchError, UsageError
from weft.folding import fold

Pair = tuple[Base, Base, dict[str, np.ndarray], dict[str, np.ndarray]]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A base and a checkpoint tuned from it: bf16, f16, f32 and f64; 0-d, 1-d, 2-d and 4-d."""
    start = base_values()
    tuned = tuned_values(start, 1)
    return write_checkpoint(tmp_path / "base", start, shards=3), write_checkpoint(tmp_path / "tuned", tuned, shards=2), start, tuned


def table_of(delta: Delta, name: str) -> list[float]:
    tensor = delta.tensors[f"{name}//0.values"]
    assert isinstance(tensor, Coded)
    return list(tensor.cfg["table"])


def nearest(x: float, table: list[float]) -> float:
    return min(table, key=lambda v: (abs(Fraction(x) - Fraction(v)), v))


def like(function: Callable[[float], float], x: np.ndarray) -> np.ndarray:
    return np.array([function(float(v)) for v in x.reshape(-1)], np.float32).reshape(x.shape)


def check(pair: Pair, made: Delta, want: dict[str, np.ndarray], folder: Path) -> None:
    """The values are `want` to the bit, and folding adds them to the base."""
    base, _, start, _ = pair
    for name, values in want.items():
        assert bits(made.get(f"{name}//0.values")) == bits(values), name
    fold(base, [made], folder)
    for name, tensor in Base.open(folder).tensors.items():
        new = wide(start[name]) + want[name].astype(wide(start[name]).dtype) if name in want else start[name]
        assert bits(tensor.read()) == bits(np.asarray(new).astype(start[name].dtype)), name


def delta_of(values: np.ndarray) -> Delta:
    build = Builder(MemoryBase({"w": np.zeros(values.shape, np.float32)}))
    build.put("w", "dense", {"values": values})
    return build.done()


# --- quantize


@pytest.mark.parametrize(("width", "group"), [(8, 64), (4, 5), (2, 1), (3, 1000)])
def test_integers_are_the_slow_reference(pair: Pair, width: int, group: int, tmp_path: Path) -> None:
    made = weft.compress(pair[1], "quantize", pair[0], bits=width, group=group, out=tmp_path / "small.safetensors")
    top, want = 2 ** (width - 1) - 1, {}
    for name, tau in taus_of(pair[2], pair[3]).items():
        flat, out = [float(v) for v in tau.reshape(-1)], []
        for lo in range(0, len(flat), group):
            part = flat[lo : lo + group]
            exact = max(map(abs, part)) / top
            scale = float(np.float32(exact).astype(ml_dtypes.bfloat16))
            if scale < exact:
                scale = float((np.array(scale, np.float32).view(np.uint32) + np.uint32(0x10000)).view(np.float32))
            assert exact <= scale <= exact * (1 + 2**-7)
            out += [round(Fraction(v) / Fraction(scale)) * Fraction(scale) if scale else Fraction(0) for v in part]
        want[name] = np.array([float(v) for v in out], np.float32).reshape(tau.shape)
    check(pair, made, want, tmp_path / "folded")


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_codebook_is_the_nearest_of_its_values(pair: Pair, width: int, tmp_path: Path) -> None:
    made = weft.compress(pair[1], "quantize", pair[0], bits=width, form="codebook", out=tmp_path / "small.safetensors")
    want = {}
    for name, tau in taus_of(pair[2], pair[3]).items():
        if tau.size <= 2**width:
            want[name] = tau
            continue
        table = table_of(made, name)
        assert len(table) == 2**width
        want[name] = like(lambda x, table=table: nearest(x, table), tau)
        for value in table:  # each is the mean of what it stands for
            assert value == pytest.approx(tau[want[name] == np.float32(value)].astype(np.float64).mean(), rel=1e-6)
    check(pair, made, want, tmp_path / "folded")


def test_bits_buy_precision_and_cost_room() -> None:
    values = np.random.default_rng(3).standard_normal((300, 700)).astype(np.float32)
    delta = delta_of(values)
    errors: dict[str, list[float]] = {}
    for form in ("integers", "codebook"):
        for width in (2, 4, 6, 8):
            made = weft.compress(delta, "quantize", bits=width, form=form)
            size = 8 * made.nbytes / values.size
            assert width < size < width + (0.26 if form == "integers" else 0.01)
            errors.setdefault(form, []).append(float(np.linalg.norm(made.get("w//0.values") - values) / np.linalg.norm(values)))
    for each in errors.values():
        assert all(b < a / 3 for a, b in pairwise(each))
    assert errors["codebook"][1] == pytest.approx(0.0974, rel=0.01), "the best 16 values for a normal distribution (Max 1960)"


def test_integers_of_one_bit_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 2 bits"):
        weft.compress(delta_of(np.ones((2, 3), np.float32)), "quantize", bits=1)


# --- bitdelta


@pytest.mark.parametrize("rest", ["keep", "bf16"])
def test_bitdelta_is_the_slow_reference(pair: Pair, rest: str, tmp_path: Path) -> None:
    made = weft.compress(pair[1], "bitdelta", pair[0], rest=rest, out=tmp_path / "small.safetensors")
    want = {}
    for name, tau in taus_of(pair[2], pair[3]).items():
        if tau.ndim < 2:
            want[name] = tau if rest == "keep" else tau.astype(ml_dtypes.bfloat16)
            continue
        alpha = float(np.float32(sum(abs(float(v)) for v in tau.reshape(-1)) / tau.size))
        want[name] = like(lambda x, alpha=alpha: -alpha if x < 0 else alpha, tau)
        assert len(table_of(made, name)) == 2
    check(pair, made, want, tmp_path / "folded")


def test_bitdelta_of_zeros_and_of_nothing_to_do() -> None:
    values = np.random.default_rng(2).standard_normal((40, 50)).astype(np.float32)
    values[:, ::2] = 0
    build = Builder(MemoryBase({name: np.zeros((40, 50), np.float32) for name in ("half", "none")}))
    build.put("half", "dense", {"values": values})
    build.put("none", "dense", {"values": 0 * values})
    made = weft.compress(build.done(), "bitdelta")
    got = made.get("half//0.values")
    assert (got[:, ::2] == np.float32(abs(values).astype(np.float64).mean())).all() and np.array_equal(np.sign(got[:, 1::2]), np.sign(values[:, 1::2]))
    assert not made.get("none//0.values").any()
    none = made.tensors["none//0.values"]
    assert isinstance(none, Coded) and none.payload.nbytes == 4
    lora = Builder(MemoryBase({"w": np.zeros((6, 5), np.float32)}))
    lora.put("w", "lowrank", {"A": values[:2, :5], "B": values[:6, :2]})
    with pytest.raises(MismatchError, match="nothing to compress"):
        weft.compress(lora.done(), "bitdelta")


# --- fedzip


@pytest.mark.parametrize("form", ["gaps", "huffman"])
@pytest.mark.parametrize(("density", "clusters"), [(0.1, 3), (0.5, 2), (1.0, 5), (1e-6, 3)])
def test_fedzip_is_the_slow_reference(pair: Pair, density: float, clusters: int, form: str, tmp_path: Path) -> None:
    made = weft.compress(pair[1], "fedzip", pair[0], density=density, clusters=clusters, form=form, out=tmp_path / "small.safetensors")
    want = {}
    for name, tau in taus_of(pair[2], pair[3]).items():
        sizes = sorted((abs(float(np.float32(v))) for v in tau.reshape(-1)), reverse=True)
        h = sizes[max(1, int(density * tau.size)) - 1]
        table = [v for v in table_of(made, name) if v]
        assert 1 <= len(table) <= clusters - 1
        want[name] = like(lambda x, h=h, table=table: nearest(x, table) if abs(np.float32(x)) >= h and x else 0.0, tau)
        for value in table:
            assert value == pytest.approx(tau[want[name] == np.float32(value)].astype(np.float64).mean(), rel=1e-6)
    check(pair, made, want, tmp_path / "folded")


def test_fedzip_is_small() -> None:
    """At 5 % with two values: the entropy of which entries are there, and one bit each."""
    values = np.random.default_rng(3).standard_normal((1000, 1000)).astype(np.float32)
    delta = delta_of(values)
    made = weft.compress(delta, "fedzip", density=0.05)
    bound = -(0.05 * np.log2(0.05) + 0.95 * np.log2(0.95)) + 0.05
    assert bound < 8 * made.nbytes / values.size < 1.04 * bound
    zeros = weft.compress(delta_of(np.zeros((5, 6), np.float32)), "fedzip")
    assert not zeros.get("w//0.values").any()


@pytest.mark.parametrize(
    ("method", "options"), [("fedzip", {}), ("quantize", {"form": "codebook", "bits": 1}), ("quantize", {}), ("bitdelta", {}), ("darex-q", {})]
)
def test_a_nan_is_refused_with_its_tensor(method: str, options: dict[str, Any]) -> None:
    values = np.ones((4, 5), np.float32)
    values[2, 3] = np.nan
    with pytest.raises(InputError, match="NaN"):
        weft.compress(delta_of(values), method, **options)


# --- k-means


def best_partition(x: np.ndarray, k: int) -> float:
    """The least sum of squared distances of k-means, by trying every place to cut (x sorted)."""
    n = len(x)
    first, second = np.concatenate(([0], np.cumsum(x))), np.concatenate(([0], np.cumsum(x * x)))

    def cost(i: int, j: int) -> float:
        return float(second[j] - second[i] - (first[j] - first[i]) ** 2 / (j - i))

    best = [0.0] + [np.inf] * n
    for _ in range(k):
        best = [min([best[j]] + [best[i] + cost(i, j) for i in range(j)]) for j in range(n + 1)]
    return best[n]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["normal", "laplace", "two heaps", "one sided"])
def test_kmeans_is_as_good_as_trying_every_cut(kind: str, k: int) -> None:
    rng = np.random.default_rng(4)
    draw = {
        "normal": rng.standard_normal(120),
        "laplace": rng.laplace(size=120) * 1e-5,
        "two heaps": np.concatenate((rng.standard_normal(60) - 3, rng.standard_normal(60) * 5 + 100)),
        "one sided": rng.random(120) ** 3,
    }[kind]
    x = np.sort(draw.astype(np.float32).astype(np.float64))
    table = np.array(levels(counted(x.astype(np.float32)), k))
    assert len(table) <= k
    got = float((np.abs(x[:, None] - table).min(1) ** 2).sum())
    assert got <= best_partition(x, k) * 1.02 + 1e-12 * float(x @ x)


def test_kmeans_of_few_values_is_those_values_and_blocks_add_up() -> None:
    x = np.random.default_rng(5).choice(np.array([-2.5, -0.0, 0.0, 1.0, 3.25], np.float32), 1000)
    assert levels(counted(x), 4) == [-2.5, 0.0, 1.0, 3.25]
    assert levels(counted(x[:0]), 3) == []
    assert [str(v) for v in levels(counted(np.array([-1e-300, 2.0])), 4)] == ["0.0", "2.0"], "there is no -0 in JSON"
    noise = np.random.default_rng(6).standard_normal(5000).astype(np.float32)
    parts = added(counted(noise[lo : lo + 700]) for lo in range(0, 5000, 700))
    whole = counted(noise)
    assert np.array_equal(parts.size, whole.size)
    np.testing.assert_allclose(parts.total, whole.total, rtol=1e-12)
    assert len(levels(whole, 256)) == 256
