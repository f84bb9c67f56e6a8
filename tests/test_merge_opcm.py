"""opcm: against a reference over whole vectors, what a merge that goes on gives, its identities and what the paper claims."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weft
from tests.test_merge import SHAPES, base_values, exact_delta, family, lora, same, taus_of, write_checkpoint  # noqa: F401
from tests.test_merge_dare import logits, trained
from weft.base import Base
from weft.delta import Builder, Delta
from weft.errors import FormatError, InputError, UsageError
from weft.stored import hold

Values = dict[str, np.ndarray]
ALL: dict[str, Any] = {"skip": []}


def increments_of(delta: Delta) -> Values:
    """What the delta adds, in float64."""
    return {name: np.float64(entry.ops[0].cfg.get("scale", 1.0)) * delta.get(f"{name}//0.values").astype(np.float64) for name, entry in delta.entries.items()}


def sums_of(delta: Delta) -> Values:
    return {name: delta.get(f"{name}//0.values") for name in delta.entries}


def length(values: Values) -> float:
    return float(np.sqrt(sum(np.square(each.astype(np.float64)).sum() for each in values.values())))


def reference(taus: list[Values], alpha: float = 0.5, skip: tuple[str, ...] = ()) -> Values:
    """The paper's recursion as it is written there, with the full decomposition and lambda at each step."""
    delta = {name: tau.astype(np.float64) for name, tau in taus[0].items()}
    lam = 1.0
    for t, tau in enumerate(taus[1:], 2):
        for name, each in tau.items():
            part = each.astype(np.float64)
            if part.ndim == 2 and name not in skip and delta[name].any():
                u, s, vt = np.linalg.svd(delta[name], full_matrices=True)
                r = next(k for k in range(len(s) + 1) if s[:k].sum() >= alpha * s.sum() * (1 - 1e-12))
                p = u.T @ part @ vt.T
                for i in range(len(s)):
                    p[i, i] = 0
                p[:r, :r] = 0
                part = u @ p @ vt
            delta[name] = lam * delta[name] + part
        mean = np.mean([length(each) for each in taus[:t]])
        lam = length(delta) / mean
        delta = {name: each / lam for name, each in delta.items()}
    return delta


def near(got: Values, want: Values) -> None:
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert np.linalg.norm(got[name] - values) <= 1e-6 * np.linalg.norm(values), name


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_opcm_is_the_reference(family: Any, count: int, alpha: float) -> None:  # noqa: F811
    base, start, tuned, ckpts = family
    want = reference(taus_of(start, tuned[:count]), alpha)
    merged = weft.merge(ckpts[:count], base, "opcm", alpha=alpha, **ALL)
    near(increments_of(merged), want)
    again = weft.merge([ckpts[0], *(exact_delta(base, start, values) for values in tuned[1:count])], base, "opcm", alpha=alpha, threads=3, block=5, **ALL)
    same(sums_of(again), sums_of(merged))
    assert [entry.ops for entry in again.entries.values()] == [entry.ops for entry in merged.entries.values()]


def test_some_matrices_are_left_as_they_are(family: Any, tmp_path: Path) -> None:  # noqa: F811
    base, start, tuned, ckpts = family
    taus = taus_of(start, tuned)
    near(increments_of(weft.merge(ckpts, base, "opcm")), reference(taus, skip=("embed.weight",)))
    plain = increments_of(weft.merge(ckpts, base, "opcm", skip=["*"]))
    total = {name: sum(tau[name].astype(np.float64) for tau in taus) for name in taus[0]}
    scale = np.mean([length(tau) for tau in taus]) / length(total)
    near(plain, {name: scale * values for name, values in total.items()})
    w = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    tied = write_checkpoint(tmp_path / "tied", {"embed": w, "head": w})
    rng = np.random.default_rng(1)
    copies = [write_checkpoint(tmp_path / f"t{k}", dict.fromkeys(("embed", "head"), w + rng.standard_normal(w.shape).astype(np.float32))) for k in range(2)]
    got = sums_of(weft.merge(copies, tied, "opcm", skip=["emb*"]))
    assert got["embed"].tobytes() == got["head"].tobytes() == (copies[0].tensor("head").read() - w + (copies[1].tensor("head").read() - w)).tobytes()


# --- what the projection and the rescaling leave


@pytest.mark.parametrize("alpha", [0.3, 0.7])
def test_a_new_model_has_no_part_in_the_leading_block_and_on_the_diagonal(family: Any, alpha: float) -> None:  # noqa: F811
    base, _, _, ckpts = family
    sums = [sums_of(weft.merge(ckpts[:count], base, "opcm", alpha=alpha, **ALL)) for count in (1, 2, 3)]
    for before, after in pairwise(sums):
        for name in ("embed.weight", "half.weight", "wide.weight"):
            old, new = before[name].astype(np.float64), after[name].astype(np.float64)
            u, s, vt = np.linalg.svd(old, full_matrices=False)
            r = next(k for k in range(len(s) + 1) if s[:k].sum() >= alpha * s.sum())
            p = u.T @ (new - old) @ vt.T
            noise = 1e-6 * np.linalg.norm(new)
            assert 0 < r < len(s) and np.linalg.norm(p) > 0.05
            assert abs(np.diagonal(p)).max() < noise and abs(p[:r, :r]).max() < noise
            assert abs(((new - old) * old).sum()) < 1e-5 * abs((new - old) * old).sum()  # so the sum only grows sideways


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_merged_update_is_as_long_as_the_models_are_on_average(family: Any, count: int) -> None:  # noqa: F811
    base, start, tuned, ckpts = family
    mean = np.mean([length(tau) for tau in taus_of(start, tuned[:count])])
    assert length(increments_of(weft.merge(ckpts[:count], base, "opcm", **ALL))) == pytest.approx(mean, rel=1e-6)


def test_one_model_is_itself(family: Any) -> None:  # noqa: F811
    base, start, tuned, ckpts = family
    merged = weft.merge(ckpts[:1], base, "opcm")
    assert all(op.cfg == {} for entry in merged.entries.values() for op in entry.ops)
    same(sums_of(merged), taus_of(start, tuned[:1])[0])


def test_a_sum_of_low_rank_takes_nothing_along_directions_that_it_does_not_have(family: Any) -> None:  # noqa: F811
    """A thin SVD of a matrix of rank 2 has four arbitrary pairs of vectors; the part of the second model there must stay."""
    base, _, _, _ = family
    deltas = [lora(base, seed, {"embed.weight": (13, 6)}) for seed in (1, 2)]
    first, second = (delta.apply("embed.weight", np.zeros((13, 6))) for delta in deltas)
    u, s, vt = np.linalg.svd(first, full_matrices=False)
    got = sums_of(weft.merge(deltas, base, "opcm", alpha=1.0, **ALL))["embed.weight"] - first
    want = second - u[:, :2] @ (u[:, :2].T @ second @ vt[:2].T) @ vt[:2]
    assert s[2] < 1e-6 * s[0] and np.linalg.norm(got - want) < 1e-6 * np.linalg.norm(want)


# --- one model at a time


def test_going_on_from_a_merge_is_merging_all_at_once(family: Any, tmp_path: Path) -> None:  # noqa: F811
    base, _, _, ckpts = family
    whole = weft.merge(ckpts, base, "opcm", **ALL)
    two = weft.merge(ckpts[:2], base, "opcm", out=tmp_path / "two.safetensors", **ALL)
    one = weft.merge(ckpts[:1], base, "opcm", **ALL)
    for parts in ([two, ckpts[2]], [tmp_path / "two.safetensors", ckpts[2]], [one, *ckpts[1:]], [weft.merge([one, ckpts[1]], base, "opcm", **ALL), ckpts[2]]):
        merged = weft.merge(parts, base, "opcm", threads=2, block=3, **ALL)
        assert {name: t.sha256 for name, t in merged.tensors.items()} == {name: t.sha256 for name, t in whole.tensors.items()}
        assert merged.entries == whole.entries
    same(sums_of(weft.merge([two], base, "opcm")), sums_of(two))
    assert any((sums_of(two)[name] != sums_of(whole)[name]).any() for name in sums_of(two))


def test_models_that_touch_different_tensors_go_on_too(tmp_path: Path) -> None:
    start = base_values()
    base = write_checkpoint(tmp_path / "base", start)
    sizes = {"embed.weight": (13, 6), "half.weight": (5, 7), "wide.weight": (3, 4)}
    deltas = [lora(base, seed, {name: sizes[name] for name in names}) for seed, names in enumerate((["embed.weight"], ["half.weight"], [*sizes]))]
    whole = weft.merge(deltas, base, "opcm", **ALL)
    parts = weft.merge([weft.merge(deltas[:2], base, "opcm", **ALL), deltas[2]], base, "opcm", **ALL)
    assert parts.entries == whole.entries and set(whole.entries) == set(sizes)
    assert {name: t.sha256 for name, t in parts.tensors.items()} == {name: t.sha256 for name, t in whole.tensors.items()}


def test_anything_else_made_of_a_merge_is_one_model(family: Any) -> None:  # noqa: F811
    base, _, _, ckpts = family
    two = weft.merge(ckpts[:2], base, "opcm", **ALL)
    half = 0.5 * two
    assert half.tensors["@blob/opcm"].sha256 == two.tensors["@blob/opcm"].sha256
    norms = [float(np.float32(n)) for n in (length(increments_of(half)), length(increments_of(two)))]
    merged = weft.merge([half, ckpts[2]], base, "opcm", **ALL)
    found = msg(merged)
    assert len(found) == 2 and found[0] == pytest.approx(norms[0], rel=1e-6)
    assert len(msg(weft.merge([ckpts[2], two], base, "opcm", **ALL))) == 2  # not the first
    assert len(msg(weft.merge([two, ckpts[2]], base, "opcm", **ALL))) == 3
    part = weft.merge(ckpts[:2], base, "opcm", shard=(1, 2), **ALL)  # only some of the sum
    assert "@blob/opcm" in part.tensors and len(msg(weft.merge([part, ckpts[2]], base, "opcm", **ALL))) == 2


def msg(delta: Delta) -> list[float]:
    import json

    return list(json.loads(delta.tensors["@blob/opcm"].read().tobytes())["norms"])


def test_what_is_refused(family: Any, tmp_path: Path) -> None:  # noqa: F811
    base, start, tuned, ckpts = family
    with pytest.raises(UsageError, match="leave the weights out"):
        weft.merge(ckpts, base, "opcm", [1, 0.5, 1])
    with pytest.raises(UsageError, match="alpha"):
        weft.merge(ckpts, base, "opcm", alpha=1.5)
    two = weft.merge(ckpts[:2], base, "opcm")
    for data, what in ((b'{"norms": [1, "x"]}', "norms of its models"), (b"[]", "norms of its models"), (b'{"norms": [-1]}', "norms"), (b"{", "JSON")):
        damaged = replace(two, tensors={**two.tensors, "@blob/opcm": hold(np.frombuffer(data, np.uint8))})
        with pytest.raises(FormatError, match=what):
            weft.merge([damaged, ckpts[2]], base, "opcm")
    without = replace(two, tensors={key: tensor for key, tensor in two.tensors.items() if key != "@blob/opcm"})
    with pytest.raises(FormatError, match="is missing"):
        weft.merge([without, ckpts[2]], base, "opcm")
    build = Builder(base)
    build.put("wide.weight", "lowrank", {"A": np.ones((1, 4)), "B": np.ones((3, 1))})
    build.blob("opcm", b'{"norms": [1]}')
    with pytest.raises(FormatError, match="one dense op"):
        weft.merge([build.done(recipe={"verb": "merge", "method": "opcm"}), ckpts[2]], base, "opcm")
    huge = write_checkpoint(tmp_path / "huge", {**tuned[0], "wide.weight": start["wide.weight"] + 1e200})
    with pytest.raises(InputError, match="too large for a norm"):
        weft.merge([huge, ckpts[1]], base, "opcm", skip=["*"])


def test_the_result_is_a_delta_like_any_other(family: Any, tmp_path: Path) -> None:  # noqa: F811
    base, start, _, ckpts = family
    merged = weft.merge(ckpts, base, "opcm", out=tmp_path / "merged.safetensors", **ALL)
    weft.merge(ckpts, base, "opcm", into=tmp_path / "into", **ALL)
    got, added = Base.open(tmp_path / "into"), increments_of(merged)
    for name, (_, dtype) in SHAPES.items():
        want = start[name].astype(np.float64) + added.get(name, 0)
        np.testing.assert_allclose(got.tensor(name).read().astype(np.float64), want, rtol=float(2 * np.finfo(np.float32).eps) if dtype is np.float32 else 8e-3)
    assert weft.merge([merged, merged], base, "linear").entries.keys() == merged.entries.keys()


# --- what the paper claims


def test_one_after_the_other_beats_the_average_in_any_order(tmp_path: Path) -> None:
    """A net for digits, tuned on four tasks that permute the pixels. Added one by one, they keep more than in the average; without the
    projections (the sum at the same length) they keep less; and the order of the models matters little (Tang et al., tables 1 and 2)."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    flat, y = images[order] / 16, labels[order]
    tasks = [flat[:, np.random.default_rng(100 + k).permutation(64)] for k in range(4)]
    fresh = {"a": rng.standard_normal((128, 64)) / 8, "b": np.zeros(128), "c": rng.standard_normal((10, 128)) / 12, "d": np.zeros(10)}
    start = trained(fresh, flat[:1200], y[:1200], 200, seed=1)
    base = write_checkpoint(tmp_path / "base", start)
    models = [write_checkpoint(tmp_path / f"{k}", trained(start, x[:1200], y[:1200], 120, seed=2 + k)) for k, x in enumerate(tasks)]

    def accuracy(chosen: list[Any], method: str = "opcm", **options: Any) -> float:
        delta = weft.merge(chosen, base, method, **options)
        merged = {name: delta.apply(name, w) for name, w in start.items()}
        return float(np.mean([(logits(merged, x[1200:])[1].argmax(1) == y[1200:]).mean() for x in tasks]))

    found = [accuracy([models[k] for k in each]) for each in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0))]
    average = accuracy(models, "linear")
    assert min(found) > average + 0.1
    assert max(found) - min(found) < (np.mean(found) - average) / 3
    assert np.mean(found) > accuracy(models, skip=["*"]) + 0.01
