"""weight-matching: finds permutations back, against a slow reference, its identities, and what the papers claim."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.claims import weight_matching as claim

import weft
from tests.test_merge import close, values_of, write_checkpoint
from tests.test_permutations import CONV, Conv, Mlp, plain, saved, shuffled
from weft.base import Base
from weft.delta import Builder
from weft.demo import edition
from weft.engine.matching import best, matched, similarities
from weft.engine.permutations import Group, by_tensor, composed, permuted, permuting
from weft.engine.symmetries import symmetries
from weft.errors import UsageError
from weft.folding import fold


def reordered(base: Base, folder: Path, layout: Any = None) -> tuple[Base, dict[str, np.ndarray], list[Group]]:
    groups = symmetries(base, layout)
    order = shuffled(groups, 11)
    fold(base, [permuting(base, groups, order)], folder)
    return Base.open(folder), order, groups


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-classifier", "vit-classifier", "phi3"])
def test_a_reordered_transformer_is_found_back(name: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", name)
    other, order, groups = reordered(base, tmp_path / "other")
    for seed in (0, 1):
        back = composed(order, matched(groups, base.tensors, other.tensors, seed=seed))
        assert all((index == np.arange(len(index))).all() for index in back.values())
    merged = weft.merge([other], base, "weight-matching")
    assert set(merged.entries) == {name for name in base.names if other.sha256(name) != base.sha256(name)}
    assert all(not values.any() for values in values_of(merged).values())  # not only near: the base itself
    assert any(values.any() for values in values_of(weft.merge([other], base, "linear")).values())


@pytest.mark.parametrize(("kind", "layout"), [(Conv, "chain"), (Conv, CONV), (Mlp, "chain")])
def test_a_reordered_network_is_found_back(kind: Any, layout: Any, tmp_path: Path) -> None:
    base = plain(tmp_path / "base", kind())
    other, _, _ = reordered(base, tmp_path / "other", layout)
    far = plain(tmp_path / "far", kind(), seed=1)
    for weights in (None, [0.3]):
        merged = weft.merge([other], base, "weight-matching", weights=weights, layout=layout)
        assert all(not values.any() for values in values_of(merged).values())
    # a second model that is no copy: the copy still adds nothing, and each has its own order
    both = weft.merge([other, far], base, "weight-matching", weights=[0.5, 0.25], layout=layout)
    alone = weft.merge([far], base, "weight-matching", weights=[0.25], layout=layout)
    close({name: v for name, v in values_of(both).items() if name in alone.entries}, values_of(alone))


# --- against a slow reference


def slow(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The order of the one hidden layer of a small MLP by trying all; b in that order."""
    n = len(a["in.bias"])

    def turned(index: tuple[int, ...]) -> dict[str, np.ndarray]:
        order = list(index)
        return {"in.weight": b["in.weight"][order], "in.bias": b["in.bias"][order], "out.weight": b["out.weight"][:, order], "out.bias": b["out.bias"]}

    def apart(index: tuple[int, ...]) -> float:
        return sum(float(np.square(a[name].astype(np.float64) - values).sum()) for name, values in turned(index).items())

    return turned(min(permutations(range(n)), key=apart))


SMALL = {"in.weight": (6, 4), "in.bias": (6,), "out.weight": (3, 6), "out.bias": (3,)}
SMALL_LAYOUT = {"in.weight": "h -", "in.bias": "h", "out.weight": "- h"}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_it_is_the_average_of_the_nearest_orders(dtype: str, tmp_path: Path) -> None:
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(0)
    nets = [{name: rng.standard_normal(shape).astype(kind) for name, shape in SMALL.items()} for _ in range(3)]
    base, *ckpts = [write_checkpoint(tmp_path / str(k), net, shards=1 + k % 2) for k, net in enumerate(nets)]
    wide = [{name: w.astype(np.float64) for name, w in net.items()} for net in nets]
    near = [slow(wide[0], net) for net in wide[1:]]
    for weights in (None, [0.2, 0.5]):
        w = weights or [1 / 3, 1 / 3]
        want = {name: sum(c * (each[name] - wide[0][name]) for c, each in zip(w, near, strict=True)) for name in SMALL}
        want = {name: values.astype(np.float64 if dtype == "float64" else np.float32) for name, values in want.items()}
        given = [weft.merge(each, base, "weight-matching", weights=weights, layout=SMALL_LAYOUT) for each in (ckpts, [ckpts[0], weft.diff(base, ckpts[1])])]
        for merged in given:
            close(values_of(merged), want)
    again = weft.merge(ckpts, base, "weight-matching", layout=SMALL_LAYOUT, threads=3, block=2)
    assert again.id == weft.merge(ckpts, base, "weight-matching", layout=SMALL_LAYOUT).id


def test_query_heads_and_their_pairs_are_matched_together(tmp_path: Path) -> None:
    """Both levels at once, against all orders that keep query heads with their key/value head."""
    a, b = saved(tmp_path / "a", "llama"), saved(tmp_path / "b", "llama", seed=1)
    groups = symmetries(a)
    group = next(each for each in groups if each.name == "layers.0.heads")
    units, parts = similarities(group, groups, a.tensors, b.tensors, {})
    step, gain, value = best(group, units, parts)
    places = by_tensor([group])

    def likeness(order: np.ndarray) -> float:
        return sum(float((a.tensor(t).read().astype(float) * permuted(b.tensor(t).read(), here, {group.name: order})).sum()) for t, here in places.items())

    allowed = [np.array(p) for p in permutations(range(4)) if p[0] // 2 == p[1] // 2]
    assert len(allowed) == 8
    found = {tuple(order): likeness(order) for order in allowed}
    assert max(found, key=lambda order: found[order]) == tuple(step) != (0, 1, 2, 3)
    np.testing.assert_allclose([value, gain], [found[tuple(step)], found[tuple(step)] - found[0, 1, 2, 3]], rtol=1e-6)


def test_matching_never_goes_away(tmp_path: Path) -> None:
    """Coordinate descent: the distance to the base falls, and the result depends on the seed alone."""
    a, b = saved(tmp_path / "a", "gpt2"), saved(tmp_path / "b", "gpt2", seed=1)
    groups = symmetries(a)
    places = by_tensor(groups)

    def apart(order: Any) -> float:
        return sum(float(np.square(a.tensor(t).read() - permuted(b.tensor(t).read(), here, order)).sum()) for t, here in places.items())

    distances = [apart({})] + [apart(matched(groups, a.tensors, b.tensors, sweeps=n)) for n in (1, 2, 100)]
    assert distances[0] > 1.02 * distances[1] and distances[1] >= distances[2] >= distances[3]
    nets = [plain(tmp_path / f"net{k}", Mlp(), seed=k).tensors for k in (0, 1)]
    chain = symmetries(Base.open(tmp_path / "net0"), "chain")
    one, again, other = (matched(chain, *nets, seed=seed) for seed in (0, 0, 1))
    assert all((one[name] == again[name]).all() for name in one)
    assert any((one[name] != other[name]).any() for name in one)  # another local optimum


# --- what changes, and what is refused


def test_a_tensor_that_no_model_changes_follows_its_units(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SMALL.items()}
    turn = [3, 0, 5, 1, 4, 2]
    other = {**values, "in.weight": values["in.weight"][turn], "out.weight": values["out.weight"][:, turn]}
    base, ckpt = write_checkpoint(tmp_path / "a", values), write_checkpoint(tmp_path / "b", other)
    got = values_of(weft.merge([ckpt], base, "weight-matching", weights=[1.0], layout=SMALL_LAYOUT))
    back = np.argsort(turn)
    assert not got["in.weight"].any()
    np.testing.assert_allclose(got["in.bias"], values["in.bias"][back] - values["in.bias"], rtol=1e-6)  # the same bytes in both, moved with its units


def test_what_cannot_be_matched_is_refused(tmp_path: Path) -> None:
    base = plain(tmp_path / "a", Mlp())
    other = plain(tmp_path / "b", Mlp(), seed=1)
    with pytest.raises(UsageError, match=r"the symmetries of .* are not known"):
        weft.merge([other], base, "weight-matching")
    with pytest.raises(UsageError, match="layout"):
        weft.merge([other], base, "weight-matching", layout="chained")
    with pytest.raises(UsageError, match="give the base"):
        weft.merge([weft.diff(base, other, "dense")], method="weight-matching", layout="chain")
    build = Builder(base)
    build.add("head.weight", np.ones((2, 4), np.float32))
    with pytest.raises(UsageError, match=r"the inputs add 'head.weight' \(1 such tensors\)"):
        weft.merge([build.done()], base, "weight-matching", layout="chain")
    first = weft.diff(base, other, "dense")
    over = replace(first, over=(first.id,))
    for inputs, on in (([over], [first]), ([first, over], [])):
        with pytest.raises(UsageError, match="made over other deltas"):
            weft.merge(inputs, base, "weight-matching", layout="chain", on=on)


# --- claims


def test_the_barrier_between_networks_trained_apart_falls(tmp_path: Path) -> None:
    """Git Re-Basin's claim, and that of arXiv 2402.04051 about why: directions of singular vectors, while distances hardly fall."""
    a, b = claim.trained(0), claim.trained(1)
    near = claim.matched(a, b, tmp_path)
    for name in ("2.weight", "4.weight"):  # the same singular values: nothing but order has changed
        values = [torch.linalg.svdvals(each[name]) for each in (b, near)]
        assert torch.allclose(*values, rtol=1e-4, atol=1e-5)
    assert claim.losses(b, near)[0] == pytest.approx(claim.losses(b, near)[-1], rel=1e-4)  # and the same function
    before, after = claim.barrier(a, b), claim.barrier(a, near)
    assert before > 0.4 and after < 0.1 * before
    assert claim.distance(a, near) > 0.5 * claim.distance(a, b)
    assert claim.overlap(a, near) > claim.overlap(a, b) + 0.2


def test_a_model_trained_further_and_scrambled_is_brought_back(tmp_path: Path) -> None:
    """The two editions of the microcosm's base: all units of the second, in any order, are found by what the first knows."""
    first, second = Base.open(edition("first")), Base.open(edition("second"))
    scrambled, order, groups = reordered(second, tmp_path / "scrambled")
    back = composed(order, matched(groups, first.tensors, scrambled.tensors))
    assert len(groups) == 9 and all((index == np.arange(len(index))).all() for index in back.values())
