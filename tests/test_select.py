"""Exact streaming selection against numpy's partition of the whole vector."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weft.engine import select
from weft.engine.select import kth_largest_magnitude, kth_largest_of_streams, largest_magnitudes
from weft.errors import InputError, UsageError

FLOATS = st.floats(width=32, allow_nan=False)
AWKWARD = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, 1.0, -1.0, float(np.float32(1.0000001)), float("inf"), -float("inf")])


def reference(x: np.ndarray, k: int) -> tuple[np.float32, int, int]:
    magnitudes = np.abs(x)
    value = np.partition(magnitudes, magnitudes.size - k)[magnitudes.size - k]
    return value, int((magnitudes > value).sum()), int((magnitudes == value).sum())


def check(x: np.ndarray, k: int, blocks: list[np.ndarray]) -> None:
    calls = []

    def make():
        calls.append(1)
        return iter(blocks)

    got = kth_largest_magnitude(make, k)
    value, above, ties = reference(x, k)
    assert got.value.dtype == np.float32
    assert got.value.tobytes() == value.tobytes()
    assert (got.above, got.ties) == (above, ties)
    assert got.above < k <= got.above + got.ties
    assert len(calls) == 2


@given(hnp.arrays(np.float32, st.integers(1, 300), elements=FLOATS | AWKWARD), st.data())
def test_it_is_what_sorting_gives(x, data):
    k = data.draw(st.integers(1, x.size))
    cuts = sorted(data.draw(st.lists(st.integers(0, x.size), max_size=4)))
    check(x, k, np.split(x, cuts))


@pytest.mark.parametrize("k", [1, 2, 77_777, 199_999, 200_000])
def test_long_streams_of_odd_blocks(k):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(200_000) * 10.0 ** rng.integers(-42, 30, 200_000)).astype(np.float32)
    x[::17] = x[5]
    x[::1000] = 0
    blocks = [part.reshape(2, -1) if part.size % 2 == 0 else part for part in np.split(x, [1, 2, 3, 70_003, 150_000])]
    check(x, k, blocks)


def test_a_view_with_gaps_and_a_scalar_and_nothing():
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    x = np.concatenate([grid[:, ::2].reshape(-1), [np.float32(-7.5)]])
    check(x, 4, [np.zeros((0, 3), np.float32), grid[:, ::2], np.array(-7.5, np.float32)])


def test_float64_is_rounded_first():
    x = np.array([1.0, 1.0 + 1e-12, 2.0, 1e-60])
    got = kth_largest_magnitude(lambda: [x], 2)
    assert (got.value, got.above, got.ties) == (np.float32(1), 1, 2)


@pytest.mark.parametrize("bits", [0x7F800001, 0xFFC00000, 0x7FFFFFFF])
def test_a_nan_is_an_error(bits):
    x = np.array([1.0, 2.0], np.float32)
    nan = np.array([bits], np.uint32).view(np.float32)
    with pytest.raises(InputError, match="NaN"):
        kth_largest_magnitude(lambda: [x, nan], 1)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_out_of_range(k):
    with pytest.raises(UsageError, match="of 3 entries"):
        kth_largest_magnitude(lambda: [np.ones(3, np.float32)], k)


def test_a_stream_that_changes_is_noticed():
    streams = iter([[np.ones(4, np.float32)], [np.zeros(4, np.float32)]])
    with pytest.raises(InputError, match="changed between two passes"):
        kth_largest_magnitude(lambda: next(streams), 2)


# --- several streams side by side, signs included


@given(st.lists(hnp.arrays(np.float32, st.integers(1, 100), elements=FLOATS | AWKWARD), min_size=1, max_size=3), st.data())
def test_streams_are_what_sorting_gives(xs, data):
    ranks = [data.draw(st.lists(st.integers(1, x.size), max_size=3)) for x in xs]
    pairs = [(number, part) for number, x in enumerate(xs) for part in np.split(x, [x.size // 3])]
    pairs = data.draw(st.permutations(pairs))
    got = kth_largest_of_streams(lambda: iter(pairs), ranks)
    assert got == [[float(np.sort(x)[x.size - k]) for k in wanted] for x, wanted in zip(xs, ranks, strict=True)]


def test_long_streams_side_by_side():
    rng = np.random.default_rng(4)
    xs = [(rng.standard_normal(150_000) * 10.0 ** rng.integers(-42, 30, 150_000)).astype(np.float32) for _ in range(2)]
    xs[1][::3] = xs[1][7]
    pairs = [(number, part) for lo in range(0, 150_000, 40_001) for number, x in enumerate(xs) for part in (x[lo : lo + 40_001], x[:0])]
    ranks = [[1, 150_000, 70_000, 70_001], [60_000]]
    assert kth_largest_of_streams(lambda: iter(pairs), ranks) == [[float(np.sort(x)[-k]) for k in wanted] for x, wanted in zip(xs, ranks, strict=True)]


def test_streams_refuse_what_has_no_order():
    x = np.array([1, -2, 3], np.float32)
    for k in (0, 4):
        with pytest.raises(UsageError, match="of 3 entries"):
            kth_largest_of_streams(lambda: [(0, x)], [[k]])
    with pytest.raises(InputError, match="NaN"):
        kth_largest_of_streams(lambda: [(0, np.array([0, -np.nan], np.float32))], [[1]])
    passes = iter([x, x + 1])
    with pytest.raises(InputError, match="changed between two passes"):
        kth_largest_of_streams(lambda: [(0, next(passes))], [[1]])


# --- the one with a sample


def over(blocks: list[np.ndarray], calls: list[int] | None = None):
    def each(function, every):
        if calls is not None:
            calls.append(every)
        return (function(block) for block in blocks[::every])

    return each


@given(hnp.arrays(np.float32, st.integers(1, 300), elements=FLOATS | AWKWARD), st.data())
def test_with_a_sample_it_is_what_sorting_gives(x, data):
    """A tiny limit makes three hundred entries long; the sample is the first, sixteenth, ... of tiny blocks, and often misleads."""
    ranks = data.draw(st.lists(st.integers(1, x.size), min_size=1, max_size=3))
    blocks = np.split(x, range(0, x.size, data.draw(st.integers(1, 40))))
    before, select._SAMPLE = select._SAMPLE, data.draw(st.sampled_from([16, 1 << 20]))
    try:
        got = largest_magnitudes(over(blocks), ranks, x.size)
    finally:
        select._SAMPLE = before
    for k, found in zip(ranks, got, strict=True):
        value, above, ties = reference(x, k)
        assert (found.value.tobytes(), found.above, found.ties) == (value.tobytes(), above, ties)


@pytest.mark.parametrize("kind", ["smooth", "coarse", "misleading"])
def test_how_often_the_stream_is_read(kind):
    rng = np.random.default_rng(4)
    x = rng.standard_normal(3 << 20).astype(np.float32)
    if kind == "coarse":
        x = np.round(x)  # a few values, each many times
    blocks = np.split(x, range(1 << 12, x.size, 1 << 12))
    if kind == "misleading":
        for block in blocks[::16]:
            block *= 1e-3
    x, calls = np.concatenate(blocks), []
    ranks = [x.size // 100, x.size // 5, x.size]
    for k, found in zip(ranks, largest_magnitudes(over(blocks, calls), ranks, x.size), strict=True):
        assert found == tuple(reference(x, k))
    assert calls[:2] == [16, 1] and (len(calls) == 2) == (kind != "misleading")


def test_what_has_no_place_among_magnitudes_is_refused():
    with pytest.raises(UsageError, match="no 4-th largest of 3"):
        largest_magnitudes(over([np.ones(3, np.float32)]), [1, 4], 3)
    for size in (4, 3 << 20):
        x = np.ones(size, np.float32)
        x[-1] = np.nan
        with pytest.raises(InputError, match="NaN"):
            largest_magnitudes(over(np.split(x, 4)), [2], size)
