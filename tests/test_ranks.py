"""The rank allocator: budgets, importance, pruning, growing, and components that wait."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests import tiny
from weft.base import Base
from weft.delta import Builder
from weft.tuning._ranks import (
    ALWAYS,
    NEVER,
    Group,
    Importance,
    Pace,
    budget,
    compacted,
    components,
    grown,
    kept,
    speeds,
    spread,
    triplet_scores,
)


def test_a_budget_falls_along_a_cubic_curve_and_rises_along_a_line() -> None:
    falling = [budget(step, 48, 32, 10, 90, 3) for step in range(0, 101, 10)]
    assert falling == [48, 48, *(int(32 + 16 * (1 - (step - 10) / 80) ** 3) for step in range(20, 90, 10)), 32, 32]
    rising = [budget(step, 4, 20, 0, 8) for step in range(12)]
    assert rising == [4, 6, 8, 10, 12, 14, 16, 18, 20, 20, 20, 20]
    assert budget(5, 4, 20, 5, 5) == 20


def test_importance_is_the_smoothed_sensitivity_times_its_smoothed_uncertainty() -> None:
    rng = np.random.default_rng(0)
    seen = np.abs(rng.normal(size=(6, 5)))
    importance = Importance(0.8, 0.6)
    assert not importance
    mean, spread_ = np.zeros(5), np.zeros(5)
    for number, now in enumerate(seen):
        importance.add("a/b", torch.from_numpy(now))
        mean = 0.8 * mean + 0.2 * now
        spread_ = 0.6 * spread_ + 0.4 * np.abs(now - mean)
        if number == 2:
            again = Importance(0.8, 0.6)
            again.load(importance.state())
            importance = again
    np.testing.assert_allclose(importance("a/b"), mean * spread_, rtol=1e-12)
    importance.clear()
    assert not importance and not importance.state()


def test_a_triplets_score_is_its_coefficients_and_its_vectors_means() -> None:
    group = Group("w//0", "svd", {"P": "w//0.P", "lam": "w//0.lam", "Q": "w//0.Q"}, 2, 12)
    left, right = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]]), torch.tensor([[1.0, 3.0], [0.0, 8.0]])
    of = {"w//0.P": left, "w//0.lam": torch.tensor([10.0, 20.0]), "w//0.Q": right}
    torch.testing.assert_close(triplet_scores(group, of.__getitem__), torch.tensor([10.0 + 3 + 2, 20 + 5 + 4]))


def test_the_highest_scores_are_kept_over_all_groups_and_exactly_as_many_as_there_may_be() -> None:
    scores = {"a": torch.tensor([0.1, 5.0, 0.1]), "b": torch.tensor([4.0, 0.1])}
    assert {name: mask.tolist() for name, mask in kept(scores, 2).items()} == {"a": [False, True, False], "b": [True, False]}
    assert {name: mask.tolist() for name, mask in kept(scores, 3).items()} == {"a": [True, True, False], "b": [True, False]}, "the first of equal ones"
    for count in range(6):
        assert sum(int(mask.sum()) for mask in kept(scores, count).values()) == count


def test_growth_goes_round_in_the_order_of_scores_and_stops_at_capacity() -> None:
    ranks, most = {"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 9, "c": 9}
    scores = {"a": 3.0, "b": 1.0, "c": 2.0}
    assert grown(scores, ranks, most, 1) == {"a": 2, "b": 1, "c": 1}
    assert grown(scores, ranks, most, 2) == {"a": 2, "b": 1, "c": 2}
    assert grown(scores, ranks, most, 5) == {"a": 2, "b": 3, "c": 3}
    assert grown({"c": 1.0}, ranks, {"c": 4}, 9) == {"a": 1, "b": 1, "c": 4}
    assert grown(scores, ranks, most, 0) == grown({}, ranks, most, 3) == ranks == {"a": 1, "b": 1, "c": 1}


def test_speeds_rise_from_the_step_at_which_a_component_joined() -> None:
    since = torch.tensor([ALWAYS, 4.0, 6.0, NEVER])
    assert speeds(since, 6, 4).tolist() == [1.0, 0.75, 0.25, 0.0]
    assert speeds(since, 6, 0).tolist() == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_components_that_wait_stand_still_and_slow_ones_go_part_of_the_way(optimizer: str) -> None:
    torch.manual_seed(0)
    start, target = torch.randn(4, 3), torch.randn(4, 3)

    def run(factor: list[float] | None) -> torch.Tensor:
        value = nn.Parameter(start.clone())
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        step = kind([value], lr=0.1, weight_decay=0.5)
        pace, tensors = Pace(), {"v": value}
        (value - target).square().sum().backward()
        pace.before(tensors, {"v": spread(torch.tensor(factor), 2, 1)} if factor else {})
        assert value.grad is not None
        if factor:
            assert not value.grad[:, 2].any() and value.grad[:, 0].all()
        step.step()
        pace.after(tensors)
        return value.detach()

    free, held = run(None), run([1.0, 0.25, 0.0])
    assert torch.equal(held[:, 0], free[:, 0]) and torch.equal(held[:, 2], start[:, 2])
    torch.testing.assert_close(held[:, 1], start[:, 1] + 0.25 * (free - start)[:, 1])
    assert not torch.equal(free[:, 2], start[:, 2])


def test_only_what_lives_is_written(tmp_path: Path) -> None:
    base = Base.open(tiny.llama(tmp_path / "llama"))
    names = [name for name in base.names if name.endswith(("q_proj.weight", "up_proj.weight"))]
    rng = np.random.default_rng(0)
    build = Builder(base)
    for name in names:
        rows, columns = base.tensor(name).shape
        parts = {"P": rng.normal(size=(rows, 3)), "lam": rng.normal(size=3), "Q": rng.normal(size=(3, columns))}
        build.put(name, "svd", {field: value.astype(np.float32) for field, value in parts.items()}, scale=0.5)
        build.put(name, "dense", {"values": rng.normal(size=(rows, columns)).astype(np.float32)})
    delta = build.done()
    groups = components(delta)
    assert [group.name for group in groups] == [f"{name}//0" for name in names] and {group.rank for group in groups} == {3}
    masks = {group.name: torch.tensor([True, False, True]) for group in groups}
    masks[groups[1].name][:] = False
    small = compacted(delta, masks)
    small.validate()
    for target in names:
        w = rng.normal(size=base.tensor(target).shape).astype(np.float32)
        lam = delta.get(f"{target}//0.lam") * masks[f"{target}//0"].numpy()
        expected = w + 0.5 * (delta.get(f"{target}//0.P") * lam) @ delta.get(f"{target}//0.Q") + delta.get(f"{target}//1.values")
        np.testing.assert_allclose(small.apply(target, w), expected, atol=1e-5)
    assert small.tensors[f"{names[0]}//0.P"].shape[1] == 2 and len(small.entries[names[1]].ops) == 1
    assert small.nbytes < delta.nbytes
