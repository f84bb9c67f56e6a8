"""regmean: against a reference over whole models, the minimum that it is, and what the paper claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from tests import merging_tasks
from tests.test_merge import same, values_of
from weft.base import Base
from weft.errors import UsageError
from weft.stored import hold

LINEAR = {"gpt2": ("c_attn.weight", "c_proj.weight"), "llama": ("q_proj.weight", "down_proj.weight")}


def inputs(model: Any, tokenizer: Any, rows: list[dict[str, Any]], names: list[str]) -> dict[str, np.ndarray]:
    """What the linear modules of some weights are given, row by row of the data, all tokens."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0][0].double()))
        for name in names
    ]
    for row in rows:
        ids = [k for part in ("prompt", "completion", "text") for k in tokenizer(row.get(part, ""), add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def problem(family: merging_tasks.Family, folder: Path, kind: str) -> tuple[dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]:
    """For each linear weight the inputs in each model, and the increments as d_in x d_out."""
    models, start, tokenizer = family.models(folder), family.base.model().state_dict(), family.base.tokenizer()
    names = [name for name in family.base.names if name.endswith(LINEAR[kind])]
    found = [inputs(model, tokenizer, rows, names) for model, rows in zip(models, family.data, strict=True)]
    taus = {name: [(model.state_dict()[name] - start[name]).double().numpy() for model in models] for name in names}
    return {name: [each[name] for each in found] for name in names}, {n: [t if kind == "gpt2" else t.T for t in each] for n, each in taus.items()}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("weights", "shrink"), [(None, 0.9), ([2.0, 0.5], 0.5)])
def test_regmean_is_the_reference(tmp_path: Path, kind: str, weights: Any, shrink: float) -> None:
    family = merging_tasks.languages(tmp_path, kind)
    merged = weft.merge(family.updates, family.base, "regmean", data=family.data, weights=weights, shrink=shrink, jitter=0.0)
    got = values_of(merged)
    share = np.array(weights or [1, 1]) / sum(weights or [1, 1])
    X, taus = problem(family, tmp_path, kind)
    average = weft.merge(family.updates, family.base, "linear", weights=list(share))
    for name, values in got.items():
        if name not in X:
            np.testing.assert_allclose(values, average.apply(name, np.zeros(values.shape, np.float32)), rtol=2e-7, err_msg=name)
            continue
        grams = [w * x.T @ x / len(x) for w, x in zip(share, X[name], strict=True)]
        grams = [shrink * g + (1 - shrink) * np.diag(np.diag(g)) for g in grams]
        want = np.linalg.solve(sum(grams), sum(g @ tau for g, tau in zip(grams, taus[name], strict=True)))
        want = want if kind == "gpt2" else want.T
        assert np.linalg.norm(values - want) <= 2e-6 * np.linalg.norm(want), name
        assert np.linalg.norm(want - average.apply(name, np.zeros(values.shape, np.float32))) > 0.1 * np.linalg.norm(want)
    assert set(X) < set(got)


def test_it_is_the_minimum(tmp_path: Path) -> None:
    """No step in any direction brings outputs nearer to those of the models, and jitter only leads away."""
    family = merging_tasks.languages(tmp_path, "llama")
    X, taus = problem(family, tmp_path, "llama")

    def distance(name: str, tau: np.ndarray) -> float:
        return sum(float(np.square(x @ (tau - own)).sum()) / len(x) for x, own in zip(X[name], taus[name], strict=True))

    got = values_of(weft.merge(family.updates, family.base, "regmean", data=family.data, shrink=1.0))
    pulled = values_of(weft.merge(family.updates, family.base, "regmean", data=family.data, shrink=1.0, jitter=0.1))
    rng = np.random.default_rng(0)
    for name in X:
        least = distance(name, got[name].T)
        assert least < distance(name, pulled[name].T) < distance(name, sum(taus[name]) / 2)
        for _ in range(5):
            step = rng.standard_normal(got[name].T.shape)
            assert least < distance(name, got[name].T + 1e-2 * step)


def test_where_no_input_goes_the_average_stays(tmp_path: Path) -> None:
    """One short row: far fewer tokens than inputs. Across what the tokens span, the merge is the average."""
    family = merging_tasks.languages(tmp_path, "llama")
    rows = [[{"text": "the river is"}], [{"text": "who made a good film"}]]
    few = merging_tasks.Family(family.base, family.updates, rows)
    X, taus = problem(few, tmp_path, "llama")
    got = values_of(weft.merge(few.updates, few.base, "regmean", data=rows, shrink=1.0))
    for name in X:
        seen = np.concatenate(X[name])
        rest = np.eye(seen.shape[1]) - np.linalg.pinv(seen) @ seen
        assert np.linalg.matrix_rank(rest) > 5
        away = rest @ (got[name].T - sum(taus[name]) / 2)
        assert np.abs(away).max() < 1e-5 < 0.01 < np.abs(got[name].T - sum(taus[name]) / 2).max()


def test_the_same_inputs_give_the_average(tmp_path: Path) -> None:
    """The first layer sees the same in both models if nothing before it differs: then there is nothing to weigh."""
    family = merging_tasks.languages(tmp_path, "llama")
    base = family.base
    deltas = [merging_tasks.updated(base, seed, ("layers.0.self_attn.q_proj.weight",)) for seed in (1, 2)]
    got = values_of(weft.merge(deltas, base, "regmean", data=family.data[0]))
    (name,) = got
    mean = sum(delta.get(f"{name}//0.values").astype(np.float64) for delta in deltas) / 2
    assert np.linalg.norm(got[name] - mean) < 1e-6 * np.linalg.norm(mean)
    apart = values_of(weft.merge(deltas, base, "regmean", data=family.data))
    assert np.linalg.norm(apart[name] - mean) > 0.01 * np.linalg.norm(mean)


def test_blocks_threads_shards_and_kinds_of_input_change_no_bit(tmp_path: Path) -> None:
    family = merging_tasks.languages(tmp_path)
    made = [values_of(weft.merge(family.updates, family.base, "regmean", data=family.data, threads=t, block=b)) for t, b in ((1, 1 << 18), (3, 40))]
    same(*made)
    family.updates[1].model().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = Base.open(tmp_path / "shards")
    assert len(shards.files) > 2
    same(made[0], values_of(weft.merge([family.updates[0], shards], family.base, "regmean", data=family.data)))


def test_classifiers_without_labels(tmp_path: Path) -> None:
    family = merging_tasks.classifiers(tmp_path)
    bare = [[{"text": row["text"]} for row in rows] for rows in family.data]
    how: dict[str, Any] = {"base": family.base, "method": "regmean", "on": family.on}
    merged = weft.merge(family.updates, data=bare, **how)
    same(values_of(merged), values_of(weft.merge(family.updates, data=family.data, **how)))
    average = weft.merge(family.updates, family.base, "linear", on=family.on)
    for name in merged.entries:
        one, other = (hold(d.apply(name, np.zeros(merged.entries[name].shape, np.float32))).sha256 for d in (merged, average))
        assert (one == other) == (not name.endswith(("query.weight", "dense.weight"))), name


def test_what_is_refused(tmp_path: Path) -> None:
    family = merging_tasks.languages(tmp_path)
    with pytest.raises(UsageError, match="no weight may be negative"):
        weft.merge(family.updates, family.base, "regmean", [1.5, -0.5], data=family.data)
    with pytest.raises(UsageError, match="shrink"):
        weft.merge(family.updates, family.base, "regmean", data=family.data, shrink=1.1)


# --- what the paper claims: better than the average of the models


@pytest.mark.slow
def test_two_skills_are_kept_better_than_by_averaging() -> None:
    base, tuned, data, _ = merging_tasks.skills()
    regmean = merging_tasks.nll(weft.merge(tuned, base, "regmean", data=data))
    average = merging_tasks.nll(weft.merge(tuned, base, "linear"))
    assert regmean[0] < 0.85 * average[0] and regmean[1] < 0.92 * average[1], (regmean, average)
