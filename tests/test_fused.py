"""The compiled loops against their numpy form, to the bit, and both against plain formulas."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from weft import _fused, stored
from weft._fused import Combination, Piece
from weft.engine import select
from weft.errors import InputError
from weft.file import container_header

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


N = 3
RULES = {
    "sum": Combination([0.3, -1.0, 0.0]),
    "between": Combination([0.5, 2.0, 1.0], least=[0.1, 0.0, 0.5], most=[2.0, 1.0, float("inf")]),
    "masked": Combination([1.25, 1.0, -0.5], keys=[7, 2**64 - 1, 12345678901234567890], dropped=30_000),
    "mass": Combination([0.3, 0.7, -1.0], least=[0.5, 0.75, 0.0], votes=[1.0, 1.0, 1.0], zero_is_plus=True),
    "weighted mass": Combination([0.3, 0.7, 1.0], votes=[1.0, -2.0, 0.5], shares=[1.0, 2.0, 0.5]),
    "count": Combination([1.0, 1.0, 1.0], least=[0.25, 0.25, 0.25], votes=[1.0, -1.0, 1.0], by_count=True),
    "masked count": Combination([1.0, 1.0, 1.0], keys=[1, 2, 3], dropped=13_107, votes=[1.0, 1.0, 1.0], by_count=True, zero_is_plus=True),
}


def slow(taus: list[Any], rule: Combination, start: int, j: int) -> tuple[float, int]:
    """One entry of a combination in Python's floats, and the sign of the election's sum."""
    kept = []
    for k, tau in enumerate(taus):
        t = float(tau[j])
        size = abs(np.float32(t))
        if (rule.least and size < np.float32(rule.least[k])) or (rule.most and size > np.float32(rule.most[k])):
            t = 0.0
        if rule.keys:
            z = (rule.keys[k] + ((start + j) // 4 + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
            z ^= z >> 31
            if z >> 16 * ((start + j) % 4) & 0xFFFF < rule.dropped:
                t = 0.0
        kept.append(t)
    if rule.votes is None:
        return sum(f * t for f, t in zip(rule.factors, kept, strict=True)), 0
    votes = [vote * (np.sign(t) if rule.by_count else t) for vote, t in zip(rule.votes, kept, strict=True)]
    mass = sum(votes)
    sign = np.sign(mass) or (1 if rule.zero_is_plus else -1)
    agree = [k for k in range(len(kept)) if votes[k] * sign > 0]
    return sum(rule.factors[k] * kept[k] for k in agree) / (sum((rule.shares or [1] * N)[k] for k in agree) or 1), int(np.sign(mass))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("start", [0, 5])
def test_what_a_combination_means(rule, start):
    rng = np.random.default_rng(1)
    taus = [np.round(4 * rng.standard_normal(500)) / 4 for _ in range(N)]  # coarse, so that sums cancel
    wanted = [slow(taus, rule, start, j) for j in range(500)]
    np.testing.assert_allclose(_fused.combined(taus, rule, start), [w for w, _ in wanted], rtol=1e-12, atol=1e-12)
    if rule.votes is not None:
        assert _fused.balance(taus, rule, start) == sum(sign for _, sign in wanted) != 0
        assert any(sign == 0 and any(tau[j] for tau in taus) for j, (_, sign) in enumerate(wanted))


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("count", LENGTHS)
def test_combined(monkeypatch, dtype, rule, count):
    rng = np.random.default_rng(count)
    old, *models = (numbers(rng, count, dtype) for _ in range(N + 1))
    models[1][: count // 2] = old[: count // 2]
    for start in (0, 3):
        fast, plain = both(monkeypatch, lambda start=start: _fused.combined_stored(old, models, rule, start))
        assert fast.dtype == np.float32 and fast.tobytes() == plain.tobytes()


@needs_compiler
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1500])
def test_combined_tells_what_is_not_finite(monkeypatch, bad, place):
    old, model = np.ones(2000, BF16), np.full(2000, 2, BF16)
    model[place] = bad
    for rule in (Combination([1.0, 0.5]), Combination([1.0, 1.0], votes=[1.0, 1.0])):
        assert both(monkeypatch, lambda rule=rule: _fused.combined_stored(old, [old, model], rule)) == (None, None)


def on_disk(path, values):
    tensor = stored.Held(values)
    path.write_bytes(container_header({"w": tensor}, ["w"], {}) + values.tobytes())
    return stored.read_container(path)[0]["w"]


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_files_into_a_file(tmp_path, dtype, rule):
    """From the middle of a tensor on, more than is written at a time, and some small pieces more in the same call."""
    rng = np.random.default_rng(2)
    arrays = [numbers(rng, 300_001, dtype) for _ in range(N + 1)]
    base, *models = (on_disk(tmp_path / f"{k}.safetensors", array) for k, array in enumerate(arrays))
    spans = [(1_003, 290_001), (5, 1), (291_100, 33), (0, 1_000)]
    starts = [11, *np.cumsum([11 + 290_001 * dtype.itemsize, 1 * dtype.itemsize, 33 * dtype.itemsize])]
    pieces = [Piece(base, models, rule, *span, int(at)) for span, at in zip(spans, starts, strict=True)]
    wanted, balances = [], []
    for start, count in spans:
        old, *new = (array[start : start + count] for array in arrays)
        wanted.append(_fused.settled(old, _fused.combined_stored(old, new, rule, start)))
        if rule.votes is not None:
            balances.append(_fused.balance([each.astype(np.float32) - old.astype(np.float32) for each in new], rule, start))
    with open(tmp_path / "out", "w+b") as out:
        found = _fused.merged_files(pieces, out.fileno())
        assert out.read() == bytes(11) + b"".join(want.new.tobytes() for want in wanted)
    assert [each.changed for each in found] == [want.changed for want in wanted]
    assert found[0].changed > 1000
    for each, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose([each.moved, each.norm], [want.moved, want.norm], rtol=1e-6)
    if rule.votes is not None:
        assert [each.balance for each in found] == [each.balance for each in _fused.merged_files(pieces, None)] == balances
        assert abs(balances[0]) > 10
    together = [_fused.combined_stored(*(lambda old, *new: (old, new))(*(array[s : s + n] for array in arrays)), rule, s) for s, n in spans]
    assert np.array_equal(_fused.combined_files(pieces), np.concatenate(together))


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
def test_near_from_files(tmp_path, dtype):
    rng = np.random.default_rng(5)
    old, new = numbers(rng, 80_001, dtype), numbers(rng, 80_001, dtype)
    base, model = on_disk(tmp_path / "base", old), on_disk(tmp_path / "model", new)
    tau = (new.astype(np.float32) - old.astype(np.float32))[77:70_077]
    some = np.sort(abs(tau))
    brackets = [(some[60_000], some[63_000]), (some[0], some[9]), (0.0, np.float32("inf")), (some[50_000], some[50_000])]
    one, two = (Piece(base, [model], Combination([1.0]), *span) for span in ((77, 50_001), (50_078, 19_999)))
    for got, want in zip(_fused.near_files([one, two], brackets), select.near(brackets, tau), strict=True):
        assert got[:3] == want[:3] and (got.inner is None) == (want.inner is None)
        if want.inner is not None:
            assert np.array_equal(got.inner, want.inner)
    assert _fused.near_files([one, two], brackets)[2].inner is None


@needs_compiler
def test_what_files_cannot_give(tmp_path):
    rng = np.random.default_rng(3)
    base, model = (on_disk(tmp_path / name, numbers(rng, 5000, np.float32)) for name in ("base", "model"))
    half = on_disk(tmp_path / "half", numbers(rng, 5000, np.float16))

    def piece(base, model, first=0):
        return Piece(base, [model], Combination([1.0]), first, 5000)

    odd = numbers(rng, 5000, np.float32)
    odd[4000] = np.nan
    with_nan = on_disk(tmp_path / "odd", odd)
    good = _fused.merged_files([piece(base, model)], None)
    assert good[0] is not None
    assert _fused.merged_files([piece(base, half), piece(base, model), piece(half, half)], None) == [None, *good, None]
    assert _fused.merged_files([piece(base, with_nan)], None) == [None]
    assert _fused.near_files([piece(base, with_nan)], [(0.0, 1.0)]) is None and _fused.combined_files([piece(base, with_nan)]) is None
    assert _fused.combined_files([piece(base, model), piece(half, half)]) is None
    with open(tmp_path / "out", "wb") as out, pytest.raises(InputError, match="shorter than its header says"):
        _fused.merged_files([piece(base, model), piece(base, model, 4000)], out.fileno())
    with open(tmp_path / "model", "rb") as shut, pytest.raises(OSError, match="Bad file descriptor"):
        _fused.merged_files([piece(base, model)], shut.fileno())


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


def test_other_dtypes_and_gaps_are_numpys(monkeypatch):
    rng = np.random.default_rng(1)
    old = rng.standard_normal((6, 8)).astype(np.float16)
    found = _fused.settled(old, np.full((6, 8), 0.5, np.float32))
    assert found.new.tobytes() == (old.astype(np.float32) + np.float32(0.5)).astype(np.float16).tobytes() and found.changed > 40
    grid = rng.standard_normal((6, 8)).astype(np.float32)
    part, whole = _fused.combined_stored(grid[:, ::2], [grid[:, 1::2]], Combination([2.0])), 2 * (grid[:, 1::2] - grid[:, ::2])
    assert part is not None and part.tobytes() == np.ascontiguousarray(whole).tobytes()
