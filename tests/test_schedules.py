"""Schedules: their formulas, their shape, and that they are pure functions of the step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import config, methods
from weft.errors import UsageError

NAMES = ("constant", "cosine", "linear", "rex")


def factors(name: str, total: int, **options: float) -> list[float]:
    found = methods.get("schedule", name)
    cfg = config.make(found.config, options, name)
    return [found.run(step, total, cfg) for step in range(total)]


def test_these_are_all_the_schedules_tested_here() -> None:
    assert set(NAMES) <= set(methods.names("schedule"))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(total=st.integers(1, 400), warmup=st.floats(0, 0.9), end=st.floats(0, 1))
def test_a_schedule_rises_to_one_and_then_never_rises_again(name: str, total: int, warmup: float, end: float) -> None:
    options = {"warmup": warmup} if name == "constant" else {"warmup": warmup, "end": end}
    got = factors(name, total, **options)
    warm = round(warmup * total)
    assert all(0 <= f <= 1 + 1e-12 for f in got)
    assert all(a < b for a, b in pairwise(got[: warm + 1]) if warm < total)
    assert warm >= total or got[warm] == pytest.approx(1)
    assert all(b <= a + 1e-12 for a, b in pairwise(got[warm:]))
    assert min(got[warm:], default=1) >= (1 if name == "constant" else end) - 1e-12
    assert got[0] > 0


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("linear", lambda z: 1 - z),
        ("cosine", lambda z: 0.5 + 0.5 * math.cos(math.pi * z)),
        ("rex", lambda z: 2 * (1 - z) / (2 - z)),
    ],
)
@settings(max_examples=30, deadline=None)
@given(total=st.integers(2, 300), end=st.floats(0, 0.5), data=st.data())
def test_the_formula_without_warmup(name: str, shape, total: int, end: float, data) -> None:  # type: ignore[no-untyped-def]
    step = data.draw(st.integers(0, total - 1))
    assert factors(name, total, warmup=0, end=end)[step] == pytest.approx(end + (1 - end) * shape(step / total), abs=1e-12)


def test_rex_lies_above_the_line_and_the_line_is_met_at_both_ends() -> None:
    rex, line = factors("rex", 1000, warmup=0), factors("linear", 1000, warmup=0)
    assert rex[0] == line[0] == 1
    assert all(r > x for r, x in zip(rex[1:], line[1:], strict=True))
    assert rex[500] == pytest.approx(2 / 3)  # the paper's: p(1/2) = (1/2) / (1/2 + 1/4)


def test_warmup_counts_steps() -> None:
    assert factors("linear", 10, warmup=0.3)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors("constant", 10, warmup=0.3) == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


@pytest.mark.parametrize("options", [{"warmup": 1.0}, {"warmup": -0.1}, {"end": 1.5}, {"end": "nan"}])
def test_bounds_are_kept(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        config.make(methods.get("schedule", "linear").config, options, "linear")
