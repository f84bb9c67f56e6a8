"""scalearn: its four variants, what they scale, its identities, and what the paper claims."""

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
from weft.engine.increments import Increments
from weft.errors import InputError, UsageError
from weft.merging._data import Study
from weft.merging._depth import Settings
from weft.merging._learned import Mixture, Spread
from weft.merging.scalearn import Scalearn, ScalearnConfig


def study_of(family: merging_tasks.Family) -> Study:
    return Study(Increments(family.updates, family.base, on=family.on), family.data)


def numbers(study: Study, **options: bool) -> int:
    """How many numbers one source has."""
    state = Scalearn().measure(study, Settings([1, 1], ScalearnConfig(steps=0, **options)))
    return sum(size for size in {spread.key: spread.size for spread in state.spreads.values()}.values())


def test_the_four_variants_have_as_many_numbers_as_the_paper_says(tmp_path: Path) -> None:
    """bert: queries of 32 outputs (weight and bias share them) and output matrices of attention and block, norms and words of 32, in 2 layers."""
    study = study_of(merging_tasks.classifiers(tmp_path))
    modules = {name.rpartition(".")[0] for name in study.models.targets}
    assert len(study.models.targets) == 2 + 2 + 4 + 5 + 1 and len(modules) == 12
    assert numbers(study) == 12 * 32
    assert numbers(study, shared=True) == 32
    assert numbers(study, uniform=True) == 12
    assert numbers(study, uniform=True, shared=True) == 1
    wide = study_of(merging_tasks.languages(tmp_path))  # gpt2: attention 96, projections and norm 32, biases of 48, words
    assert numbers(wide) == 2 * 96 + 2 * 2 * 32 + 2 * 48 + 32 + 32
    assert numbers(wide, shared=True) == 96 + 32 + 48


@pytest.mark.parametrize("options", [{}, {"uniform": True}, {"shared": True}, {"uniform": True, "shared": True}], ids=str)
def test_one_source_with_scale_1_is_that_source(tmp_path: Path, options: dict[str, bool]) -> None:
    family = merging_tasks.classifiers(tmp_path)
    for delta in family.updates:
        got = weft.merge([delta], family.base, "scalearn", data=family.data[0], on=family.on, steps=0, start=1.0, **options)
        if options.get("uniform"):
            assert got.entries == delta.entries
        for name, entry in delta.entries.items():
            zeros = np.zeros(entry.shape, np.float32)
            assert np.array_equal(got.apply(name, zeros), delta.apply(name, zeros)), name


def test_scales_start_at_two_over_the_number_of_sources(tmp_path: Path) -> None:
    family = merging_tasks.languages(tmp_path)
    got = values_of(weft.merge([*family.updates, family.updates[0]], family.base, "scalearn", data=family.data[0], steps=0))
    want = values_of(weft.merge([*family.updates, family.updates[0]], family.base, "task-arithmetic", scale=2 / 3))
    assert got.keys() == want.keys()
    for name in got:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_outputs_of_linear_layers_are_the_sources_scaled(tmp_path: Path, kind: str) -> None:
    """What a layer of the merge gives is the base's output and, for each source, its scales times what it adds."""
    family = merging_tasks.languages(tmp_path, kind)
    how: dict[str, Any] = {"data": family.data, "steps": 5, "lr": 0.1}
    weft.merge(family.updates, family.base, "scalearn", into=tmp_path / "into", **how)
    state = Scalearn().measure(study_of(family), Settings([1, 1], ScalearnConfig(steps=5, lr=0.1)))
    base, merged = family.base.model(), Base.open(tmp_path / "into").model()
    sources = family.models(tmp_path)
    names = {"gpt2": ("transformer.h.1.attn.c_proj", "transformer.h.0.mlp.c_fc"), "llama": ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj")}
    for path in names[kind]:
        layers = [model.get_submodule(path) for model in (base, merged, *sources)]
        scales = next(torch.from_numpy(state.scales[f"{path}.{p}"]) for p in ("weight", "bias") if f"{path}.{p}" in state.scales)
        assert float(scales.std()) > 0.01
        h = torch.randn(7, 48 if "down_proj" in path else 32)
        with torch.no_grad():
            plain, got, *outputs = [layer(h) for layer in layers]
        want = plain + sum(s * (y - plain) for s, y in zip(scales, outputs, strict=True))
        assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max()) < float((plain - want).abs().max())


def test_gradients_of_vectors(tmp_path: Path) -> None:
    """Of one output's scale: the inner product of gradient and increment over what that output has."""
    study = study_of(merging_tasks.languages(tmp_path))
    spreads = {name: Spread(name, 0.7, 1, target.shape[1]) if len(target.shape) == 2 else Spread(name, 0.7) for name, target in study.models.targets.items()}
    mixture = Mixture(study, spreads)
    batch = next(study.batches(0))
    mixture(batch).square().mean().backward()
    name = "transformer.h.0.mlp.c_proj.weight"
    live = {key: value.detach().requires_grad_(True) for key, value in mixture.weights().items()}
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    torch.func.functional_call(study.model, live, (), given).logits.square().mean().backward()
    for k in range(2):
        tau = study.models.read(k, study.models.targets[name].whole)
        want = (live[name].grad.numpy() * tau).sum(0)
        np.testing.assert_allclose(mixture.scales[name].grad[k].numpy(), want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
        assert np.abs(want).max() > 0


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"uniform": True}], ids=str)
def test_blocks_threads_and_repetition_change_no_bit(tmp_path: Path, options: dict[str, bool]) -> None:
    family = merging_tasks.languages(tmp_path)
    made = [
        weft.merge(family.updates, family.base, "scalearn", data=family.data, steps=3, lr=0.1, threads=t, block=b, **options)
        for t, b in ((1, 1 << 18), (3, 40))
    ]
    assert made[0].id == made[1].id
    same(*map(values_of, made))


def test_what_is_refused(tmp_path: Path) -> None:
    family = merging_tasks.classifiers(tmp_path)
    with pytest.raises(UsageError, match="leave the weights out"):
        weft.merge(family.updates, family.base, "scalearn", [0.5, 0.5], data=family.data, on=family.on)
    with pytest.raises(InputError, match="scalearn needs labels"):
        weft.merge(family.updates, family.base, "scalearn", data=[{"text": "the river"}], on=family.on)


# --- what the paper claims: few numbers are enough, one for each source if need be


@pytest.mark.slow
def test_scales_serve_a_target_task_better_than_the_average() -> None:
    """The target is both skills at once: each source has one of them."""
    base, tuned, data, _ = merging_tasks.skills()
    average = merging_tasks.nll(weft.merge(tuned, base, "linear"))
    vectors = merging_tasks.nll(weft.merge(tuned, base, "scalearn", data=data, steps=10, lr=0.02, batch_size=16))
    one_each = merging_tasks.nll(weft.merge(tuned, base, "scalearn", data=data, steps=10, lr=0.03, batch_size=16, uniform=True, shared=True))
    assert vectors[0] < 0.7 * average[0] and vectors[1] < 0.8 * average[1], (vectors, average)
    assert one_each[0] < 0.9 * average[0] and one_each[1] < 0.8 * average[1], (one_each, average)
