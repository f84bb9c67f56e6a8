"""engine/lowrank.py: the nearest matrix of low rank, against the singular value decomposition of the dense matrix."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tests.conftest import MemoryBase
from weft.delta import Builder
from weft.engine.lowrank import Matrix, leading, pairs_of, recompress
from weft.errors import InputError
from weft.ops.spec import Ref


def pairs(rng: np.random.Generator, rows: int, columns: int, ranks: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray, float]]:
    return [(rng.standard_normal((rows, r)).astype(np.float32), rng.standard_normal((r, columns)).astype(np.float32), 0.3 + k) for k, r in enumerate(ranks)]


def dense(terms: list[tuple[np.ndarray, np.ndarray, float]]) -> np.ndarray:
    return sum(scale * b.astype(np.float64) @ a.astype(np.float64) for b, a, scale in terms)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (9, 50), (50, 9)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_a_rank_is_as_near_as_eckart_and_young_allow(rng: np.random.Generator, shape: tuple[int, int], rank: int) -> None:
    terms = pairs(rng, *shape, (4, 3, 6))
    full = dense(terms)
    b, a, captured = recompress(terms, rank=rank)
    assert b.shape == (shape[0], rank) and a.shape == (rank, shape[1])
    s = np.linalg.svd(full, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(full - b @ a), np.sqrt((s[rank:] ** 2).sum()), rtol=1e-10)
    np.testing.assert_allclose(captured, (s[:rank] ** 2).sum(), rtol=1e-12)
    np.testing.assert_allclose(b.T @ b, a @ a.T, atol=1e-9)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_an_energy_takes_the_least_rank_that_keeps_it(rng: np.random.Generator, energy: float) -> None:
    terms = pairs(rng, 40, 30, (4, 3, 6))
    share = np.cumsum(np.linalg.svd(dense(terms), compute_uv=False) ** 2) / np.linalg.norm(dense(terms)) ** 2
    least = int((share >= energy * (1 - 1e-12)).argmax()) + 1
    assert recompress(terms, energy=energy).a.shape == (least, 30)
    assert recompress(terms, rank=2, energy=energy).a.shape == (min(least, 2), 30)


def test_without_limits_the_sum_stays_and_takes_no_more_factors_than_it_needs(rng: np.random.Generator) -> None:
    (b, a, _), other = pairs(rng, 40, 30, (4, 3))
    terms = [(b, a, 0.5), other, (b, a, 2.0)]
    made = recompress(terms)
    assert made.a.shape == (7, 30)
    np.testing.assert_allclose(made.b @ made.a, dense(terms), atol=1e-12 * np.linalg.norm(dense(terms)))
    nothing = recompress([(b, a, 1.0), (b, a, -1.0)])
    assert nothing.b.shape == (40, 0) and nothing.a.shape == (0, 30) and nothing.captured == 0


def test_memory_is_that_of_the_factors(rng: np.random.Generator) -> None:
    terms = pairs(rng, 6000, 5000, (8,) * 4)
    size = 8 * sum(b.size + a.size for b, a, _ in terms)
    tracemalloc.start()
    made = recompress(terms, rank=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.b.shape == (6000, 8)
    assert peak < 8 * size < 8 * 6000 * 5000 / 4, "the product was formed"


@pytest.mark.parametrize("settings", [{"rank": 3}, {"energy": 0.8}, {"rank": 2, "energy": 0.8}], ids=str)
@pytest.mark.parametrize("shape", [(24, 60), (60, 24)], ids=str)
def test_the_leading_part_of_a_matrix_read_in_rows(rng: np.random.Generator, shape: tuple[int, int], settings: dict[str, float]) -> None:
    values = (dense(pairs(rng, *shape, (5,))) + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    found = leading(Matrix(shape, lambda lo, hi: values[lo:hi]), float((values.astype(np.float64) ** 2).sum()), **settings)
    u, s, vt = np.linalg.svd(values.astype(np.float64))
    count = found.a.shape[0]
    share = np.cumsum(s**2) / (s**2).sum()
    assert count == min(settings.get("rank", 99), int((share >= settings.get("energy", 2)).argmax()) + 1 if "energy" in settings else 99)
    np.testing.assert_allclose(found.b @ found.a, (u[:, :count] * s[:count]) @ vt[:count], atol=1e-10)


def test_what_takes_as_much_room_as_the_matrix_and_what_is_zero_is_left(rng: np.random.Generator) -> None:
    values = rng.standard_normal((12, 10))
    assert leading(Matrix((12, 10), lambda lo, hi: values[lo:hi]), float((values**2).sum()), energy=1.0) is None
    assert leading(Matrix((12, 10), lambda lo, hi: 0 * values[lo:hi]), 0.0, rank=2) is None


def test_the_pairs_of_ops_add_up_to_what_the_ops_add(rng: np.random.Generator) -> None:
    """With scales, with a frozen pair that is taken away, and with rows taken from a pool."""
    build = Builder(MemoryBase({"w": np.zeros((9, 7), np.float32)}))
    draw = [rng.standard_normal(shape).astype(np.float32) for shape in ((2, 7), (9, 2), (2, 7), (9, 2), (5, 7), (9, 3))]
    build.put("w", "lowrank", dict(zip(("A", "B", "A0", "B0"), draw[:4], strict=True)), scale=-1.5)
    pool, index = build.share("pool", draw[4]), build.share("index", np.array([4, 0, 4]))
    build.put("w", "lowrank", {"A": Ref(pool.key, index.key, (3, 7)), "B": draw[5]})
    delta = build.done()
    found = pairs_of(delta.entries["w"].ops, delta.get)
    assert [scale for _, _, scale in found] == [-1.5, 1.5, 1.0]
    np.testing.assert_allclose(dense(found), delta.apply("w", np.zeros((9, 7))), atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_factors_that_are_not_finite_are_refused(rng: np.random.Generator, bad: float) -> None:
    (b, a, scale), other = pairs(rng, 6, 5, (2, 2))
    a[1, 3] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        recompress([other, (b, a, scale)])
