"""atlas: the gradients of its coefficients, its identities, and what the paper claims. The mixture that it shares with scalearn is tested here too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from tests import merging_tasks, tiny
from tests.test_merge import same, values_of
from weft.base import Base
from weft.engine.increments import Increments
from weft.errors import InputError, UsageError
from weft.merging._data import Study
from weft.merging._depth import Settings
from weft.merging._learned import Goal, Mixture, Spread
from weft.merging.atlas import Atlas, AtlasConfig


def study_of(family: merging_tasks.Family, data: Any = None, **options: Any) -> Study:
    return Study(Increments(family.updates, family.base, on=family.on), data or family.data, **options)


def mixture_of(study: Study, seed: int = 0) -> Mixture:
    """A mixture with a coefficient for each tensor and model, at random."""
    mixture = Mixture(study, {name: Spread(name, 0.0) for name in study.models.targets})
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for scales in mixture.scales.values():
            scales.copy_(torch.from_numpy(rng.uniform(0.2, 0.8, scales.shape)))
    return mixture


def loss_of(study: Study, goal: Goal, model: Any, count: int = 5) -> torch.Tensor:
    return goal.loss(model, goal.collate(goal.examples[:count], range(count)))


@pytest.mark.parametrize("make", [merging_tasks.classifiers, merging_tasks.languages])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients_are_inner_products_of_gradients_and_increments(tmp_path: Path, make: Any, entropy: bool) -> None:
    family = make(tmp_path)
    study = study_of(family)
    mixture, goal = mixture_of(study), Goal(study, entropy)
    loss_of(study, goal, mixture).backward()
    blended, taus = {}, {}
    for name, target in study.models.targets.items():
        taus[name] = [study.models.read(k, target.whole).astype(np.float64) for k in range(2)]
        blended[name] = sum(c * tau for c, tau in zip(mixture.scales[name][:, 0].tolist(), taus[name], strict=True))
    live = study.parameters()
    with torch.no_grad():
        for name in blended:
            (place,) = study.places(study.models.targets[name])
            live[study.live_name(place)].add_(torch.from_numpy(blended[name]).float())
    for value in live.values():
        value.requires_grad_(True)
    loss_of(study, goal, study.logits).backward()
    checked = 0
    for name, scales in mixture.scales.items():
        (place,) = study.places(study.models.targets[name])
        grad = live[study.live_name(place)].grad.double().numpy()
        for k in range(2):
            want = float((grad * taus[name][k]).sum())
            assert abs(float(scales.grad[k, 0]) - want) <= 1e-4 * np.linalg.norm(grad) * np.linalg.norm(taus[name][k]) + 1e-12, name
            checked += abs(want) > 1e-4 and study.models.touches(k, name)
        if not study.models.touches(0, name):
            assert float(scales.grad[0, 0]) == 0
    assert checked > 8


def test_nothing_but_the_coefficients_is_trained_or_changed(tmp_path: Path) -> None:
    study = study_of(merging_tasks.languages(tmp_path))
    before = {name: value.clone() for name, value in study.model.state_dict().items()}
    assert list(Mixture(study, {name: Spread(name, 0.5) for name in study.models.targets}).parameters()) == []
    state = Atlas().measure(study, Settings([1, 1], AtlasConfig(steps=3)))
    assert {name: len(c) for name, c in state.items()} == dict.fromkeys(study.models.targets, 2)
    assert all(torch.equal(before[name], value) for name, value in study.model.state_dict().items())
    assert not study.model.training and all(p.grad is None and not p.requires_grad for p in study.model.parameters())


def test_equal_coefficients_are_task_arithmetic(tmp_path: Path) -> None:
    family = merging_tasks.classifiers(tmp_path)
    how: dict[str, Any] = {"base": family.base, "on": family.on}
    atlas = weft.merge(family.updates, method="atlas", data=family.data, steps=0, start=0.4, **how)
    plain = weft.merge(family.updates, method="task-arithmetic", scale=0.4, **how)
    assert atlas.entries == plain.entries and {k: t.sha256 for k, t in atlas.tensors.items()} == {k: t.sha256 for k, t in plain.tensors.items()}
    mixed = merging_tasks.languages(tmp_path)  # a checkpoint makes increments dense
    dense = [
        weft.merge(mixed.updates, mixed.base, m, **o)
        for m, o in (("atlas", {"data": mixed.data, "steps": 0, "start": 0.3}), ("task-arithmetic", {"scale": 0.3}))
    ]
    assert dense[0].entries == dense[1].entries and {k: t.sha256 for k, t in dense[0].tensors.items()} == {k: t.sha256 for k, t in dense[1].tensors.items()}


def test_learned_coefficients_are_those_of_the_ops(tmp_path: Path) -> None:
    family = merging_tasks.classifiers(tmp_path)
    study = study_of(family)
    state = Atlas().measure(study, Settings([1, 1], AtlasConfig(steps=4, lr=0.1)))
    merged = weft.merge(family.updates, family.base, "atlas", data=family.data, on=family.on, steps=4, lr=0.1)
    for name, entry in merged.entries.items():
        scales = [op.cfg.get("scale", 1.0) for op in entry.ops]
        touching = [c for k, c in enumerate(state[name]) if study.models.touches(k, name)]
        start = [0.1, 1.0] if len(touching) == 2 else [1.0]
        np.testing.assert_allclose(scales, [a * c for a, c in zip(start, touching, strict=True)], rtol=1e-6)
    assert len({c for cs in state.values() for c in cs}) > 8


def test_the_mixture_says_what_the_folded_merge_says(tmp_path: Path) -> None:
    family = merging_tasks.languages(tmp_path)
    study = study_of(family)
    mixture = mixture_of(study)
    build = weft.Builder(family.base)
    for name, target in study.models.targets.items():
        change = sum(c * study.models.read(k, target.whole).astype(np.float64) for k, c in enumerate(mixture.scales[name][:, 0].tolist()))
        build.put(name, "dense", {"values": change.astype(np.float32)})
    weft.fold(family.base, [build.done()], tmp_path / "folded")
    batch = next(study.batches(0))
    with torch.no_grad():
        got, plain = mixture(batch), study.logits(batch)
        want = Base.open(tmp_path / "folded").model()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max()) < float((plain - want).abs().max())


def test_tied_copies_share_a_coefficient(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tiny.gpt2(tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}, folder / "model.safetensors", {"format": "pt"})
    base = Base.open(folder)
    deltas = [merging_tasks.updated(base, k, ("wte.weight",), tied=(("lm_head.weight", "transformer.wte.weight"),)) for k in (1, 2)]
    weft.fold(base, [deltas[0]], tmp_path / "tuned")
    rows = [{"text": f"the {text}"} for text in tiny.texts(6)]
    weft.merge([Base.open(tmp_path / "tuned"), deltas[1]], base, "atlas", data=rows, steps=3, lr=0.1, into=tmp_path / "into")
    got = Base.open(tmp_path / "into")
    assert got.tensor("lm_head.weight").sha256 == got.tensor("transformer.wte.weight").sha256 != base.tensor("lm_head.weight").sha256
    study = Study(Increments([Base.open(tmp_path / "tuned")], base), [rows])
    mixture = Mixture(study, {name: Spread("one", 1.0) for name in study.models.targets})  # added once, not once for each copy
    (w,) = mixture.weights().values()
    np.testing.assert_allclose(w.detach().numpy(), Base.open(tmp_path / "tuned").tensor("lm_head.weight").read(), atol=1e-6)


def test_sets_of_data_count_the_same_whatever_their_size(tmp_path: Path) -> None:
    family = merging_tasks.classifiers(tmp_path)
    few, many = family.data[0][:2], family.data[1] * 3
    goal = Goal(study_of(family, [few, many]), entropy=False)
    count = len(goal.examples)
    assert count == len(few) + len(many)
    study = study_of(family)
    got = float(goal.loss(study.logits, goal.collate(goal.examples, range(count))))
    each = [weft.evaluate(family.base, family.on, rows)["metrics"]["nll"] for rows in (few, many)]
    assert got == pytest.approx(sum(each) / 2, rel=1e-5)
    shared = Goal(study_of(family, [many, many]), entropy=False)
    assert len(shared.examples) == len(many) and {example["share"] for example in shared.examples} == {1.0}


def test_training_lowers_what_it_is_to_lower(tmp_path: Path) -> None:
    family = merging_tasks.classifiers(tmp_path)
    bare = [[{"text": row["text"]} for row in rows] for rows in family.data]
    study = study_of(family, bare)
    found = {}
    for entropy in (False, True):
        goal = Goal(study_of(family), entropy)
        how = {"objective": "entropy"} if entropy else {}
        for steps in (0, 30):
            state = Atlas().measure(study if entropy else study_of(family), Settings([1, 1], AtlasConfig(steps=steps, lr=0.05, **how)))
            mixture = Mixture(study, {name: Spread(name, 0.0) for name in state})
            with torch.no_grad():
                for name, scales in mixture.scales.items():
                    scales[:, 0] = torch.tensor(state[name])
                found[entropy, steps] = float(loss_of(study, goal, mixture, len(goal.examples)))
    assert found[False, 30] < 0.9 * found[False, 0] and found[True, 30] < 0.7 * found[True, 0], found


def test_the_same_seed_is_the_same_merge(tmp_path: Path) -> None:
    family = merging_tasks.languages(tmp_path)
    how: dict[str, Any] = {"base": family.base, "method": "atlas", "data": family.data, "steps": 4, "lr": 0.05, "batch_size": 4}
    first, again, other = (weft.merge(family.updates, seed=seed, **how) for seed in (1, 1, 2))
    assert first.id == again.id != other.id
    same(values_of(first), values_of(again))
    assert any(not np.array_equal(a, b) for a, b in zip(values_of(first).values(), values_of(other).values(), strict=True))
    same(values_of(first), values_of(weft.merge(family.updates, seed=1, threads=3, block=40, **how)))


def test_what_is_refused(tmp_path: Path) -> None:
    family, languages = merging_tasks.classifiers(tmp_path), merging_tasks.languages(tmp_path)
    with pytest.raises(UsageError, match="leave the weights out"):
        weft.merge(family.updates, family.base, "atlas", [0.5, 0.5], data=family.data, on=family.on)
    with pytest.raises(InputError, match="objective=labels needs labels"):
        weft.merge(family.updates, family.base, "atlas", data=[{"text": "the river"}], on=family.on)
    with pytest.raises(UsageError, match="objective=entropy is for classifiers"):
        weft.merge(languages.updates, languages.base, "atlas", data=languages.data, objective="entropy")


# --- what the paper claims: better than one coefficient for all


@pytest.mark.slow
def test_two_skills_are_kept_better_than_by_averaging() -> None:
    base, tuned, data, _ = merging_tasks.skills()
    atlas = merging_tasks.nll(weft.merge(tuned, base, "atlas", data=data, steps=15, lr=0.1, batch_size=16))
    average = merging_tasks.nll(weft.merge(tuned, base, "linear"))
    assert atlas[0] < average[0] and atlas[1] < 0.85 * average[1], (atlas, average)
