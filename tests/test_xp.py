"""The exact product, exact sums, casts and reproducible numbers: the same bits everywhere."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.conftest import bits
from weft import xp

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def fractions_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    from fractions import Fraction

    rows = [[Fraction(float(v)) for v in row] for row in a]
    columns = [[Fraction(float(v)) for v in column] for column in b.T]
    return np.array([[float(sum((x * y for x, y in zip(r, c, strict=True)), Fraction(0))) for c in columns] for r in rows])


def product_and_bound(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The exact product's distance from the true one, and the most that it may be.

    Let 2^e bound a row of a and 2^f a column of b, and n be the `bits` that each of hi and lo holds, so that x = hi + lo + r with
    |lo| <= 2^(e-n-1) and |r| <= 2^(e-2n-1). What is left out of one product is lo lo' + r y + r' x - r r', which comes to less
    than (1/4 + 1/2 + 1/2) 2^(e+f-2n), K times that in all. 2^e is the next power of two above the largest entry, so at most twice
    it: 5 K 2^(-2n) max|a| max|b|. On top come two roundings to float64, here of the last sum and of the true value. None of this
    depends on how small the entries are: products of float32 subnormals (2^-298) are far from float64's own. All of it is computed in
    float64, because in float32 the bound itself would vanish for entries near 1e-20.
    """
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    true = fractions_product(a, b)
    got = xp.mm(a, b)
    inner = a.shape[1]
    grid = 5 * inner * 2.0 ** (-2 * xp._bits(inner)) * np.abs(wide_a).max(1, keepdims=True) * np.abs(wide_b).max(0, keepdims=True)
    return np.abs(got - true), grid + (np.abs(got) + np.abs(true)) * 2.0**-53


@settings(max_examples=60, derandomize=True)
@given(arrays.arrays(np.float32, (3, 5), elements=st.floats(-1e3, 1e3, width=32)), arrays.arrays(np.float32, (5, 4), elements=st.floats(-1e3, 1e3, width=32)))
def test_the_exact_product_is_within_its_grid_of_the_true_one(a: np.ndarray, b: np.ndarray) -> None:
    distance, bound = product_and_bound(a, b)
    assert (distance <= bound).all()


def test_the_bound_holds_at_any_scale_of_rows_and_columns(rng: np.random.Generator) -> None:
    """Rows and columns from the smallest subnormals to the largest numbers, and entries of one row 2^60 apart."""
    for low, high in ((-149, -120), (-60, 0), (0, 60), (60, 127)):
        a = np.ldexp(rng.uniform(-1, 1, (6, 40)), rng.integers(low, high, (6, 40))).astype(np.float32)
        b = np.ldexp(rng.uniform(-1, 1, (40, 7)), rng.integers(low, high, (40, 7))).astype(np.float32)
        distance, bound = product_and_bound(a, b)
        assert (distance <= bound).all() and (bound > 0).all()


def test_any_order_of_summation_gives_the_same_bits(rng: np.random.Generator) -> None:
    for inner in (1, 7, 64, 4097):
        a = (rng.standard_normal((9, inner)) * 10.0 ** rng.integers(-6, 6, (9, inner))).astype(np.float32)
        b = (rng.standard_normal((inner, 11)) * 10.0 ** rng.integers(-6, 6, (inner, 11))).astype(np.float32)
        whole = xp.mm(a, b)
        order = rng.permutation(inner)
        assert bits(xp.mm(a[:, order], b[order])) == bits(whole)
        assert bits(np.concatenate([xp.mm(a[:4], b), xp.mm(a[4:], b)])) == bits(whole)
        assert bits(np.concatenate([xp.mm(a, b[:, :3]), xp.mm(a, b[:, 3:])], 1)) == bits(whole)
        with xp.exact():
            assert bits(xp.mm(torch.from_numpy(a), torch.from_numpy(b))) == bits(whole)
            assert bits(xp.sumsq(torch.from_numpy(a), 1)) == bits(xp.sumsq(a, 1)) == bits(xp.sumsq(a[:, order], 1))
        assert whole.dtype == np.float64
        np.testing.assert_allclose(whole, a.astype(np.float64) @ b.astype(np.float64), rtol=1e-6, atol=1e-6 * np.abs(whole).max())


def test_plain_products_are_torchs_own_and_only_outside_exact() -> None:
    a, b = torch.randn(4, 6), torch.randn(6, 3)
    assert torch.equal(xp.mm(a, b), a @ b) and xp.mm(a, b).dtype == torch.float32
    with xp.exact():
        assert xp.mm(a, b).dtype == torch.float64
    assert xp.mm(a, b).dtype == torch.float32


def test_edges_of_the_product() -> None:
    zero = xp.mm(np.zeros((2, 0), np.float32), np.zeros((0, 3), np.float32))
    assert zero.shape == (2, 3) and not zero.any()
    a = np.array([[0.0, 0.0], [np.inf, 1.0], [np.nan, 1.0], [1.0, -0.0]], np.float32)
    with np.errstate(invalid="ignore"):
        out = xp.mm(a, np.ones((2, 1), np.float32))
    assert out[0, 0] == 0 and not np.isfinite(out[1, 0]) and np.isnan(out[2, 0]) and out[3, 0] == 1
    tiny = np.full((2, 3), 1e-45, np.float32)
    assert (xp.mm(tiny, np.ones((3, 1), np.float32)) == 3 * float(tiny[0, 0])).all()


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(rng: np.random.Generator) -> None:
    raw = rng.integers(0, 2**32, 400_000, dtype=np.uint64).astype(np.uint32)
    x = raw.view(np.float32)
    ours = xp.cast(x, "bfloat16")
    with np.errstate(all="ignore"):
        theirs = x.astype(ml_dtypes.bfloat16)
    number = ~np.isnan(x)
    assert bits(ours[number]) == bits(theirs[number])
    assert np.isnan(ours[~number].astype(np.float32)).all() and (~number).any()
    assert bits(ours[number]) == bits(xp.cast(torch.from_numpy(x[number].copy()), "bfloat16"))
    back = xp.cast(ours[number], "float32")
    assert bits(back) == bits(ours[number].astype(np.float32)) and bits(xp.cast(ours[number], "float64")) == bits(back.astype(np.float64))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_arrays_go_to_torch_and_back(dtype: torch.dtype) -> None:
    x = torch.arange(12).reshape(3, 4).to(dtype)
    there = xp.to_numpy(x)
    back = xp.to_torch(there)
    assert back.dtype == dtype and back.shape == x.shape and bits(back) == bits(x) == there.tobytes()
    scalar = torch.tensor(1).to(dtype)
    assert xp.to_torch(xp.to_numpy(scalar)).shape == ()
    assert xp.to_torch(x) is x and xp.to_numpy(there) is there


def test_random_numbers_are_the_reference_splitmix64() -> None:
    """The published vector: splitmix64 seeded with 1234567 yields these first numbers (its state advances by the golden ratio)."""
    words = xp._words(np.zeros(0), 1234567, 0, 5).astype(np.uint64)
    assert words.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


def test_random_numbers_can_be_made_again_in_any_block_and_engine() -> None:
    key = xp.key(5, 2)
    whole = xp.normals(np.zeros(0), key, 0, 1000)
    assert bits(np.concatenate([xp.normals(np.zeros(0), key, 0, 333), xp.normals(np.zeros(0), key, 333, 667)])) == bits(whole)
    assert bits(xp.normals(torch.zeros(0), key, 0, 1000)) == bits(whole)
    assert bits(xp.uniforms(torch.zeros(0), key, 0, 100)) == bits(xp.uniforms(np.zeros(0), key, 0, 100))
    many = xp.normals(np.zeros(0), key, 0, 400_000).astype(np.float64)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01 and abs((many**4).mean() - 3) < 0.1
    flat = xp.uniforms(np.zeros(0), key, 0, 100_000)
    assert flat.min() >= 0 and flat.max() < 1 and abs(flat.mean() - 0.5) < 0.01
    keys = {xp.key(seed, stream) for seed in range(40) for stream in range(40)}
    assert len(keys) == 1600


def test_put_and_set_part_make_copies() -> None:
    for x in (np.zeros((2, 3), np.float32), torch.zeros(2, 3)):
        index = np.array([1, 4]) if isinstance(x, np.ndarray) else torch.tensor([1, 4])
        values = np.ones(2, np.float32) if isinstance(x, np.ndarray) else torch.ones(2)
        assert float(xp.put(x, index, values).sum()) == 2 and float(xp.put(x, index, values, add=True).sum()) == 2
        part = xp.set_part(x, (0,), values[:1] + 1)
        assert float(part.sum()) == 6 and float(x.sum()) == 0
        assert xp.dtype(xp.zeros((2,), x)) == "float32"
