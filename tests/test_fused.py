"""The compiled loops against their numpy form, to the bit, and both against plain formulas."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from weft import _fused
from weft._fused import Election

BF16 = np.dtype(ml_dtypes.bfloat16)
LENGTHS = [0, 1, 15, 16, 17, 1023, 1024, 1025, 5000]

needs_compiler = pytest.mark.skipif(_fused._compiled() is None, reason="weft was installed without a compiler")


def both(monkeypatch: pytest.MonkeyPatch, call: Any) -> tuple[Any, Any]:
    """What a call gives with the compiled loops, and without."""
    fast = call()
    with monkeypatch.context() as patch:
        patch.setattr(_fused, "_compiled", lambda: None)
        slow = call()
    return fast, slow


def numbers(rng: np.random.Generator, count: int, dtype: Any, size: float = 1.0) -> np.ndarray:
    """Of all magnitudes, with zeros of both signs and denormal numbers among them."""
    x = rng.standard_normal(count) * size * 2.0 ** rng.integers(-8, 8, count)
    x[::7], x[3::11], x[5::13] = 0.0, -0.0, 1e-40
    return x.astype(dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("count", LENGTHS)
def test_weighted(monkeypatch, dtype, count):
    rng = np.random.default_rng(count)
    old, *models = (numbers(rng, count, dtype) for _ in range(4))
    c = [0.3, -1.0, 0.0]
    fast, slow = both(monkeypatch, lambda: _fused.weighted(old, models, c))
    assert fast.dtype == np.float32 and fast.tobytes() == slow.tobytes()
    want = sum(x * (m.astype(np.float64) - old.astype(np.float64)) for x, m in zip(c, models, strict=True))
    np.testing.assert_allclose(fast, want, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1500])
def test_weighted_tells_what_is_not_finite(monkeypatch, bad, place):
    old, model = np.ones(2000, BF16), np.full(2000, 2, BF16)
    model[place] = bad
    assert both(monkeypatch, lambda: _fused.weighted(old, [old, model], [1.0, 0.5])) == (None, None)


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("count", LENGTHS)
def test_settled(monkeypatch, dtype, count):
    rng = np.random.default_rng(count)
    old, by = numbers(rng, count, dtype), numbers(rng, count, np.float32, 0.01)
    by[::5], by[2::9] = 0.0, -0.0
    old[4::50], old[6::60] = np.inf, np.nan
    old[8::70], by[8::70] = 3.3e38, 3.3e38  # the sum overflows
    fast, slow = both(monkeypatch, lambda: _fused.settled(old, by))
    assert fast.new.dtype == dtype and fast.new.tobytes() == slow.new.tobytes() and fast.changed == slow.changed
    with np.errstate(all="ignore"):
        want = (old.astype(np.float32) + by).astype(dtype)
    same = (old.astype(np.float32) == 0) & (by == 0)
    bits = f"u{dtype.itemsize}"
    assert np.array_equal(fast.new.view(bits), np.where(same, old.view(bits), want.view(bits)))
    assert fast.changed == np.count_nonzero(fast.new.view(bits) != old.view(bits))


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
def test_norms(monkeypatch, dtype):
    rng = np.random.default_rng(0)
    old = rng.standard_normal(100_003).astype(dtype)
    fast, slow = both(monkeypatch, lambda: _fused.settled(old, (0.01 * rng.standard_normal(old.size)).astype(np.float32)))
    for found in (fast, slow):
        step = found.new.astype(np.float64) - old.astype(np.float64)
        np.testing.assert_allclose([found.moved, found.norm], [step @ step, (old.astype(np.float64) ** 2).sum()], rtol=1e-6)


@needs_compiler
@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("zero_is_plus", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_elected(monkeypatch, count, zero_is_plus, separate):
    rng = np.random.default_rng(count)
    taus = [np.round(4 * rng.standard_normal(count)).astype(np.float32) / 4 for _ in range(3)]  # coarse, so that sums cancel
    election = Election(
        [0.5, 0.75, 0.0], [1.0, -2.0, 0.5], [0.3, 0.7, -1.0], [1.0, 2.0, 0.5], zero_is_plus, [np.sign(tau) for tau in taus] if separate else None
    )
    fast, slow = both(monkeypatch, lambda: (_fused.elected(taus, election), _fused.balance(taus, election)))
    assert fast[0].tobytes() == slow[0].tobytes() and fast[1] == slow[1]
    wide, balance = _fused.elected([tau.astype(np.float64) for tau in taus], election), 0
    for j in range(count):
        kept = [float(tau[j]) if abs(tau[j]) >= h else 0.0 for tau, h in zip(taus, election.least, strict=True)]
        votes = [e * (np.sign(t) if separate else t) for t, e in zip(kept, election.votes, strict=True)]
        mass = sum(votes)
        balance += int(np.sign(mass))
        sign = np.sign(mass) or (1 if zero_is_plus else -1)
        agree = [k for k in range(3) if votes[k] * sign > 0]
        want = sum(election.factors[k] * kept[k] for k in agree) / (sum(election.shares[k] for k in agree) or 1)
        assert abs(fast[0][j] - want) < 1e-5 and abs(wide[j] - want) < 1e-12
    assert fast[1] == balance


def test_other_dtypes_and_gaps_are_numpys(monkeypatch):
    rng = np.random.default_rng(1)
    old = rng.standard_normal((6, 8)).astype(np.float16)
    found = _fused.settled(old, np.full((6, 8), 0.5, np.float32))
    assert found.new.tobytes() == (old.astype(np.float32) + np.float32(0.5)).astype(np.float16).tobytes() and found.changed > 40
    grid = rng.standard_normal((6, 8)).astype(np.float32)
    part, whole = _fused.weighted(grid[:, ::2], [grid[:, 1::2]], [2.0]), 2 * (grid[:, 1::2] - grid[:, ::2])
    assert part is not None and part.tobytes() == np.ascontiguousarray(whole).tobytes()
