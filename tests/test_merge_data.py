"""What merges that look at data are given: live models that are the folded ones bit for bit, and their rows as tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weft
from tests import merging_tasks, tiny
from tests.conftest import bits
from weft.base import Base
from weft.engine.increments import Increments
from weft.errors import InputError, UsageError
from weft.merging._data import Spool, Study, predicted


def study_of(family: merging_tasks.Family, data: Any = None, **options: Any) -> Study:
    return Study(Increments(family.updates, family.base, on=family.on), data or family.data, **options)


def state(model: Any) -> dict[str, bytes]:
    return {name: bits(value) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("make", [merging_tasks.classifiers, merging_tasks.languages])
def test_live_models_are_what_folding_gives(tmp_path: Path, make: Any) -> None:
    family = make(tmp_path)
    study = study_of(family)
    weft.fold(family.base, family.on, tmp_path / "start", allow_noop=True) if family.on else None
    before = state(study.model)
    assert before == state((Base.open(tmp_path / "start") if family.on else family.base).model())
    for number, model in enumerate(family.models(tmp_path)):
        with study.live(number) as live:
            assert live is study.model and not live.training
            assert state(live) == state(model) != before
            assert not any(parameter.requires_grad for parameter in live.parameters())
        assert state(study.model) == before


def test_a_delta_over_another_input_comes_after_it(tmp_path: Path) -> None:
    base = Base.open(tiny.gpt2(tmp_path / "gpt2"))
    first = merging_tasks.updated(base, 1, ("ln_f.weight", "c_fc.bias"))
    second = merging_tasks.updated(base, 2, ("ln_f.weight",), over=(first.id,))
    other = merging_tasks.updated(base, 3, ("c_fc.bias",))
    study = Study(Increments([first, second, other], base), [[{"text": "the river is"}]] * 3)
    for number, deltas in enumerate(([first], [first, second], [other])):
        weft.fold(base, deltas, tmp_path / str(number))
        with study.live(number) as model:
            assert state(model) == state(Base.open(tmp_path / str(number)).model())


def test_a_delta_that_is_not_over_the_others_start(tmp_path: Path) -> None:
    base = Base.open(tiny.gpt2(tmp_path / "gpt2"))
    start = merging_tasks.updated(base, 1, ("ln_f.weight",))
    over, alone = merging_tasks.updated(base, 2, ("c_fc.bias",), over=(start.id,)), merging_tasks.updated(base, 3, ("c_fc.bias",))
    study = Study(Increments([over, alone], base, on=[start]), [[{"text": "the river is"}]] * 2)
    for number, deltas in enumerate(([start, over], [alone])):
        weft.fold(base, deltas, tmp_path / str(number))
        with study.live(number) as model:
            assert state(model) == state(Base.open(tmp_path / str(number)).model())
    weft.fold(base, [start], tmp_path / "start")
    assert state(study.model) == state(Base.open(tmp_path / "start").model())


def test_a_checkpoint_of_another_dtype_lives_in_the_bases(tmp_path: Path) -> None:
    base = Base.open(tiny.llama(tmp_path / "llama"))
    weft.fold(base, [merging_tasks.updated(base, 1, ("norm.weight", "q_proj.weight"))], tmp_path / "tuned")
    tuned = Base.open(tmp_path / "tuned")
    shutil.copytree(tmp_path / "llama", tmp_path / "low")
    base.model().bfloat16().save_pretrained(tmp_path / "low")
    study = Study(Increments([tuned], Base.open(tmp_path / "low")), [[{"text": "the river is"}]])
    with study.live(0) as model:
        assert state(model) == state(tuned.model().bfloat16())


def test_an_error_inside_leaves_the_base(tmp_path: Path) -> None:
    study = study_of(merging_tasks.languages(tmp_path))
    before = state(study.model)
    with pytest.raises(ZeroDivisionError), study.live(1):
        1 / 0  # noqa: B018
    assert state(study.model) == before


def test_batches_have_every_row_once_and_ask_for_what_eval_asks_for(tmp_path: Path) -> None:
    family = merging_tasks.languages(tmp_path)
    study = study_of(family, batch_size=3)
    for number, model in enumerate(family.models(tmp_path)):
        total = tokens = 0.0
        sizes = []
        with study.live(number):
            for batch in study.batches(number):
                log_p, labels, rows = predicted(study.logits(batch), batch["labels"])
                total -= float(log_p.gather(1, labels[:, None]).double().sum())
                tokens += len(labels)
                sizes.append(len(batch["labels"]))
                assert rows.bincount(minlength=len(batch["labels"])).min() > 0
        assert sizes == [3, 3, 2]
        del model
        deltas, base = ([family.updates[0]], family.base) if number == 0 else ([], family.updates[1])
        found = weft.evaluate(base, deltas, family.data[number], batch_size=3)
        assert found["tokens"] == tokens and found["metrics"]["nll"] == pytest.approx(total / tokens, rel=1e-6)


def test_rows_without_labels_are_for_methods_that_need_none(tmp_path: Path) -> None:
    family = merging_tasks.classifiers(tmp_path)
    plain = [{"text": row["text"]} for row in family.data[0]]
    study = study_of(family, [plain, family.data[1]])
    assert [example["input_ids"] for example in study.examples[0]] == [example["input_ids"] for example in study_of(family).examples[0]]
    with pytest.raises(InputError, match="fisher needs labels"):
        study.require_labels("fisher")
    study_of(family).require_labels("fisher")


def test_data_that_is_shared_is_read_once(tmp_path: Path) -> None:
    family = merging_tasks.classifiers(tmp_path)
    rows = family.data[0]
    shared = study_of(family, [rows, rows])
    assert shared.examples[0] is shared.examples[1]
    assert len(set(shared.recipe()["data"])) == 1 and len(set(study_of(family).recipe()["data"])) == 2


def test_what_is_refused(tmp_path: Path) -> None:
    family = merging_tasks.classifiers(tmp_path)
    text, completion = [{"text": "the river is"}], [{"prompt": "the river", "completion": " is"}]
    with pytest.raises(UsageError, match="BertForSequenceClassification cannot be shown completion rows"):
        study_of(family, [completion] * 2)
    with pytest.raises(UsageError, match="BertModel cannot be shown text rows"):
        Study(Increments([merging_tasks.updated(family.base, 1, ("query.weight",))], family.base), [text])
    with pytest.raises(UsageError, match="the base's checkpoint"):
        Study(Increments([merging_tasks.headed(family.base)]), [text])
    with pytest.raises(UsageError, match="batch_size must be at least 1"):
        study_of(family, batch_size=0)
    with pytest.raises(InputError, match="label 'XYZ', which the model does not know"):
        study_of(family, [[{"text": "the river", "label": "XYZ"}]] * 2)


def test_tensors_that_are_parts_or_other_names_of_live_ones(tmp_path: Path) -> None:
    """gpt2 with both copies of its tied matrix in the file: one live tensor, two of the checkpoint's."""
    from safetensors.numpy import load_file, save_file

    folder = tiny.gpt2(tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}, folder / "model.safetensors", {"format": "pt"})
    base = Base.open(folder)
    weft.fold(base, [merging_tasks.updated(base, 1, ("wte.weight",), tied=(("lm_head.weight", "transformer.wte.weight"),))], tmp_path / "tuned")
    tuned = Base.open(tmp_path / "tuned")
    assert tuned.tensor("lm_head.weight").sha256 != base.tensor("lm_head.weight").sha256
    study = Study(Increments([tuned], base), [[{"text": "the river is"}]])
    assert study.firsts() == {"lm_head.weight": "lm_head.weight", "transformer.wte.weight": "lm_head.weight"}
    (name,) = study.parameters()
    values = np.random.default_rng(0).standard_normal(study.parameters()[name].shape).astype(np.float32)
    import torch

    for target in study.models.targets.values():
        assert bits(study.stored(target, {name: torch.from_numpy(values)})) == bits(values)


def test_experts_that_are_stored_apart_and_live_as_one(tmp_path: Path) -> None:
    """From live numbers to the checkpoint's, and from increments of the checkpoint's to live tensors."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from weft.merging._learned import Mixture, Spread

    tiny.llama(tmp_path / "mixtral")  # for its tokenizer
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    MixtralForCausalLM(MixtralConfig(vocab_size=25, num_local_experts=3, **shape)).save_pretrained(tmp_path / "mixtral")
    base = Base.open(tmp_path / "mixtral")
    delta = merging_tasks.updated(base, 1, ("experts.1.w1.weight", "experts.0.w2.weight", "experts.2.w3.weight", "q_proj.weight"))
    study = Study(Increments([delta], base), [[{"text": "the river is"}]])
    live = study.parameters()
    assert len(live) == 3 < len(study.models.targets) == 4
    mixture = Mixture(study, {name: Spread(name, 1.0) for name in study.models.targets})
    weft.fold(base, [delta], tmp_path / "folded")
    want = Base.open(tmp_path / "folded").model().state_dict()
    for name, value in mixture.weights().items():
        np.testing.assert_allclose(value.detach().numpy(), want[name].numpy(), atol=1e-7)
        assert not torch.equal(value, live[name])
    with torch.no_grad():
        for value in live.values():
            value.copy_(torch.randn(value.shape))
    for name, target in study.models.targets.items():
        assert bits(study.stored(target, live)) == bits(Base.of(study.model).tensor(name).read()), name
        assert (study.site(target) is None) == ("experts" in name)


def test_the_spool_gives_rows_of_what_it_was_given_and_goes_with_its_folder(rng: np.random.Generator) -> None:
    import torch

    spool = Spool()
    values = [{"w": torch.from_numpy(rng.standard_normal((5, 3))), "s": torch.tensor(float(k))} for k in range(2)]
    for each in values:
        spool.add(each)
    folder = Path(spool._folder.name)
    for number, each in enumerate(values):
        assert bits(spool.read(number, "w")) == bits(each["w"]) and bits(spool.rows(number, "w", 1, 4)) == bits(each["w"][1:4])
        assert bits(spool.rows(number, "s", 0, 1)) == bits(each["s"])
    assert folder.exists()
    del spool
    assert not folder.exists()
