"""Schedules: their formulas, their shape, and that they are pure functions of the step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import config, methods
from weft.errors import UsageError
from weft.tuning.schedule import fall
from weft.tuning.schedule.power_scheduler import hold

NAMES = ("constant", "cosine", "linear", "rex")
OTHERS = ("budgeted", "cpt-rewarm", "infinite", "one-cycle", "power-scheduler", "wsd")


def factors(name: str, total: int, **options: Any) -> list[float]:
    found = methods.get("schedule", name)
    cfg = config.make(found.config, options, name)
    return [found.run(step, total, cfg) for step in range(total)]


def test_these_are_all_the_schedules_tested_here() -> None:
    assert sorted([*NAMES, *OTHERS]) == methods.names("schedule")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
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
@settings(max_examples=30)
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


# --- those that are more than a warmup and a fall


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=40)
@given(total=st.integers(1, 300))
def test_all_defaults_stay_between_nothing_and_the_peak(name: str, total: int) -> None:
    got = factors(name, total)
    assert all(0 < f <= 1 + 1e-12 and math.isfinite(f) for f in got)
    assert got == factors(name, total)
    if total >= 100:
        top = got.index(max(got))
        assert max(got) == pytest.approx(1, abs=0.02)
        assert all(a < b for a, b in pairwise(got[: top + 1])) and all(b <= a + 1e-12 for a, b in pairwise(got[top:]))


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt", "exponential"])
def test_falls_meet_both_ends(shape: Any) -> None:
    way = [fall(shape, z / 50, 0.8, 0.2) for z in range(51)]
    assert way[0] == pytest.approx(0.8) and way[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(way))
    assert fall(shape, 1.0, 0.8, 0.0) <= 0.8 / 1000 + 1e-15
    middle = {"linear": 0.5, "cosine": 0.5, "sqrt": 1 - math.sqrt(0.5), "exponential": None}[shape]
    assert way[25] == pytest.approx(math.sqrt(0.8 * 0.2) if middle is None else 0.2 + 0.6 * middle)


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt", "exponential"])
def test_wsd_is_flat_but_for_its_ends(shape: str) -> None:
    got = factors("wsd", 200, warmup=0.1, decay=0.25, shape=shape, end=0.1)
    assert got[20:151] == [1.0] * 131 and got[19] < 1 and got[151] < 1
    assert got[:20] == pytest.approx([(k + 1) / 21 for k in range(20)])
    assert got[150:] == pytest.approx([fall(shape, k / 50, 1.0, 0.1) for k in range(50)])  # type: ignore[arg-type]
    assert factors("wsd", 200, warmup=0.1, decay=0)[20:] == [1.0] * 180
    # what a longer run does before its fall is what a shorter one does
    assert factors("wsd", 400, warmup=0.05, decay=0.25)[:300] == [*got[:20], *[1.0] * 280]


@pytest.mark.parametrize("total", [10, 57, 400])
def test_one_cycle_is_torchs(total: int) -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=total, cycle_momentum=False)
    want = []
    for _ in range(total):
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step() if len(want) < total else None
    assert factors("one-cycle", total) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_the_power_law_does_not_look_at_the_end_and_its_exponent_comes_back() -> None:
    short, long = (factors("power-scheduler", total, warmup_steps=5, hold=40) for total in (120, 3000))
    assert long[:120] == short
    late = np.arange(100, 3000)
    slope, _ = np.polyfit(np.log(late + 1), np.log(np.array(long)[100:]), 1)
    assert slope == pytest.approx(-0.51, abs=1e-6)
    assert all(f == 1 for f in long[5:40]) and long[40] < 1
    # the paper's law: min(peak, batch a n^b), so the rate is in proportion to the batch at any number of tokens
    for batch in (8, 16, 64):
        at = hold(0.02, batch, batch * 4096)
        law = [min(0.02, batch * 4.6 * ((k + 1) * batch * 4096) ** -0.51) for k in range(50_000)]
        got = factors("power-scheduler", 50_000, warmup_steps=0, hold=at)
        assert [0.02 * f for f in got] == pytest.approx(law, rel=1e-9)
    assert hold(0.02, 16, 4096) / hold(0.02, 8, 4096) == pytest.approx(2 ** (1 / 0.51))
    ended = factors("power-scheduler", 1000, warmup_steps=0, hold=100, cooldown=0.2, shape="linear", end=0.0)
    assert ended[:800] == long_enough(800) and ended[800] == pytest.approx(8.01**-0.51) and ended[999] < 0.01


def long_enough(count: int) -> list[float]:
    return factors("power-scheduler", 5000, warmup_steps=0, hold=100)[:count]


def test_rewarming_begins_and_ends_where_the_last_run_ended() -> None:
    got = factors("cpt-rewarm", 1000, warmup=0.1, start=0.1, end=0.1)
    assert got[0] == pytest.approx(0.1 + 0.9 / 101) and got[100] == 1
    assert np.diff(got[:101]) == pytest.approx([0.9 / 101] * 100)
    assert got[550] == pytest.approx(0.55) and got[999] == pytest.approx(0.1, abs=1e-4)
    assert factors("cpt-rewarm", 1000, warmup=0.1, start=0.0, end=0.1) == pytest.approx(factors("cosine", 1000, warmup=0.1, end=0.1))


def test_the_infinite_schedule_has_four_phases() -> None:
    got = factors("infinite", 1000, warmup=0.1, cooldown=0.2, anneal=0.1, hold=0.4, end=0.04)
    assert got[99] < got[100] == 1 and got[200] == pytest.approx(0.7)
    assert got[300:901] == [0.4] * 601
    assert got[950] == pytest.approx(math.sqrt(0.4 * 0.04)) and got[999] == pytest.approx(0.04, rel=0.03)
    # three tasks, one after the other, are one long one but for the end
    first = factors("infinite", 500, warmup=0.2, cooldown=0.4, anneal=0, hold=0.4)
    then = factors("infinite", 500, warmup=0, cooldown=0, anneal=0.2, hold=0.4, end=0.04)
    assert [*first, *then] == pytest.approx(got)


def test_a_budget_squeezes_steps() -> None:
    for total in (100, 1000):
        got = factors("budgeted", total, milestones=(0.5, 0.8), gamma=0.1)
        assert got == pytest.approx([1.0] * (total // 2) + [0.1] * (3 * total // 10) + [0.01] * (total // 5))
