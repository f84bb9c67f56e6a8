"""`weft check`: planted flips come out exactly, free answers are those of one prompt alone, figures are those of transformers by hand.

Most tests use a model that is a table: whatever was said before, the next word follows from the last one alone. What it
writes, and with which probability, can then be read off the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import weft
from weft import Base, Builder, Delta
from weft.checking import check, evaluate, predict
from weft.cli import main
from weft.errors import FormatError, InputError, MismatchError, UsageError
from weft.folding import fold

from . import tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny.WORDS]
END = "[SEP]"
SAYS = {"how": "many", "many": "film", "what": "is", "is": "the", "the": "river", "who": "was", "was": "good", "where": "far", "film": END, "river": END}
"""The table of the base. A word that is not here is followed by the end."""

NOW = {"many": "city", "who": "made", "made": "bad", "where": "in"}
"""What the delta makes of it: the answers to "how", "who" and "where" change, those to "what" and "was" do not."""

SURE = 3 / math.sqrt(1 / 32 + 1e-6)
"""The logit of the next word (the last norm of a one-hot vector, times 3); the others have 0."""


def table(says: Mapping[str, str]) -> np.ndarray[Any, Any]:
    head = np.zeros((len(WORDS), 32), np.float32)
    for word in WORDS:
        head[WORDS.index(says.get(word, END)), WORDS.index(word)] = 3.0
    return head


def talker(folder: Path) -> Path:
    """A LlamaForCausalLM whose next word follows from the last one by `SAYS`: attention and MLPs add nothing to one-hot embeddings."""
    model = AutoModelForCausalLM.from_pretrained(tiny.llama(folder))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                value.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(len(WORDS), 32))
        model.lm_head.weight.copy_(torch.from_numpy(table(SAYS)))
    # what a checkpoint may say of drawing: none of it may have an effect
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, num_beams=2, max_length=3, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


def taught(base: Path, says: Mapping[str, str], **manifest: Any) -> Delta:
    """The delta that makes the table `says` of the base's."""
    build = Builder(Base.open(base))
    build.put("lm_head.weight", "dense", {"values": table(says) - table(SAYS)})
    return build.done(recipe={"verb": "test", "method": "table"}, **manifest)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def delta(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    taught(base, {**SAYS, **NOW}).save(path := tmp_path_factory.mktemp("delta") / "new.safetensors")
    return path


def asked(*rows: tuple[str, str]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in rows]


FACTS = asked(
    ("it how", "many film"),  # negative: now "many city"
    ("of how", "many city"),  # positive
    ("who", "made bad"),  # positive
    ("in who", "good was"),  # changed: "was good", now "made bad"
    ("what", "is the river"),  # right on both sides
    ("a what", "is a river"),  # wrong on both sides, with the same answer
    ("and where", "in"),  # positive
    ("good", "bad"),  # wrong on both sides: nothing is said
)
BASE_SAID = ["many film", "many film", "was good", "was good", "is the river", "is the river", "far", ""]
DELTA_SAID = ["many city", "many city", "made bad", "made bad", "is the river", "is the river", "in", ""]


# --- free generation


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_planted_flips_of_free_answers_come_out(base: Path, delta: Path, batch_size: int) -> None:
    found = check(base, delta, {"facts": FACTS}, batch_size=batch_size, samples=200)
    task = found["tasks"][0]
    flips = task["flips"]
    assert (task["name"], task["kind"], task["n"], task["truncated"], task["finite"]) == ("facts", "generation", 8, 0, True)
    assert {name: flips[name] for name in ("negative", "positive", "both_right", "both_wrong", "changed")} == {
        "negative": 1,
        "positive": 3,
        "both_right": 1,
        "both_wrong": 2,
        "changed": 1,
    }
    assert (flips["nfr"], flips["pfr"], flips["mcnemar_p"]) == (1 / 8, 3 / 8, 10 / 16)
    assert task["metrics"]["exact_match"] == {"base": 2 / 8, "delta": 4 / 8, "change": 2 / 8, "better": "higher"}
    assert flips["interval"][0] <= 2 / 8 <= flips["interval"][1]
    by_row = sorted(task["examples"], key=lambda example: example["row"])
    assert [example["base"] for example in by_row] == BASE_SAID and [example["delta"] for example in by_row] == DELTA_SAID
    outcomes = ["negative", "positive", "positive", "changed", "both_right", "both_wrong", "positive", "both_wrong"]
    assert [example["outcome"] for example in by_row] == outcomes
    assert [example["row"] for example in task["examples"]] == [0, 1, 2, 6, 3, 4, 5, 7]  # flips and changed answers first
    assert by_row[0] == {
        "row": 0,
        "prompt": "it how",
        "expected": "many film",
        "base": "many film",
        "delta": "many city",
        "outcome": "negative",
    }
    shorter = check(base, delta, {"facts": FACTS}, samples=200, examples=3)["tasks"][0]
    assert [example["row"] for example in shorter["examples"]] == [0, 1, 2] and shorter["flips"] == flips


def test_teacher_forced_figures_are_named_so_and_those_of_the_table(base: Path, delta: Path) -> None:
    """A row whose first word is wrong and whose second follows from it: free generation gets neither, teacher forcing the second."""
    data = asked(("it", "who was"), ("how", "many film"), ("what", "is of"))
    task = check(base, delta, data, samples=10)["tasks"][0]
    sure, other = SURE - math.log(math.exp(SURE) + len(WORDS) - 1), -math.log(math.exp(SURE) + len(WORDS) - 1)
    metrics = task["metrics"]
    assert [metrics["teacher_forced_token_accuracy"][side] for side in ("base", "delta")] == [4 / 6, 2 / 6]
    assert [metrics["teacher_forced_exact"][side] for side in ("base", "delta")] == [1 / 3, 0]
    assert [metrics["exact_match"][side] for side in ("base", "delta")] == [1 / 3, 0]
    assert metrics["nll"]["base"] == pytest.approx(-(4 * sure + 2 * other) / 6, rel=1e-6)
    assert metrics["nll"]["delta"] == pytest.approx(-(2 * sure + 4 * other) / 6, rel=1e-6)
    assert {name: metric["better"] for name, metric in metrics.items()} == {
        "exact_match": "higher",
        "teacher_forced_token_accuracy": "higher",
        "teacher_forced_exact": "higher",
        "nll": "lower",
    }
    measured = evaluate(base, delta, data)["metrics"]
    assert (measured["nll"], measured["teacher_forced_token_accuracy"], measured["teacher_forced_exact"]) == (metrics["nll"]["delta"], 2 / 6, 0)


def gpt2(folder: Path) -> Path:
    """A GPT-2, whose positions are learned vectors: one that is off by the padding changes everything."""
    from transformers import GPT2Config, GPT2LMHeadModel

    AutoTokenizer.from_pretrained(tiny.llama(folder)).save_pretrained(folder)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "initializer_range": 0.3}
    config = GPT2Config(vocab_size=len(WORDS), bos_token_id=None, eos_token_id=None, **shape)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2", "soft prompt"])
def test_batches_say_what_each_prompt_says_alone(kind: str, tmp_path: Path) -> None:
    """On models with real attention, prompts of different lengths: padding on the left must not show."""
    folder = gpt2(tmp_path / "gpt2") if kind == "gpt2" else tiny.llama(tmp_path / "llama", seed=3)
    rng = np.random.default_rng(1)
    build = Builder(Base.open(folder))
    if kind == "soft prompt":
        build.put("@input/embeddings", "prompt", {"rows": rng.normal(size=(3, 32)).astype(np.float32)})
    for name in Base.open(folder).names:
        if name.endswith(("mlp.c_proj.weight", "q_proj.weight", "down_proj.weight")):
            shape = Base.open(folder).tensor(name).shape
            build.put(name, "dense", {"values": 0.2 * rng.normal(size=shape).astype(np.float32)})
    delta = build.done(recipe={"verb": "test"})
    prompts = tiny.texts(24, seed=5)
    said = [alone(folder, side, prompts, 9) for side in ([], [delta])]
    same = sum(a == b for a, b in zip(*said, strict=True))
    assert same < 20 and len({*said[0]}) > 5
    for batch_size in (1, 7):
        task = check(folder, delta, [{"prompt": prompt} for prompt in prompts], stop=(), max_new_tokens=9, batch_size=batch_size)["tasks"][0]
        by_row = sorted(task["examples"], key=lambda example: example["row"])
        assert [[example[side] for example in by_row] for side in ("base", "delta")] == said
        assert task["against_base"]["agreement"] == same / 24


def alone(folder: Path, deltas: list[Delta], prompts: list[str], most: int) -> list[str]:
    """The answer to each prompt by itself, token by token without a cache, up to the tokenizer's end of text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    if deltas:
        weft.attach(model, deltas)
    out = []
    for prompt in prompts:
        ids = list(tokenizer(prompt)["input_ids"])
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + most:
                token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
                if token == tokenizer.eos_token_id:
                    break
                ids.append(token)
        out.append(str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip())
    return out


def test_answers_end_at_stop_texts_and_right_ones_are_cut_alike(base: Path, delta: Path) -> None:
    data = asked(("what", "is the river"), ("how", "many film"))
    task = check(base, delta, data, stop=("the", "city"), samples=10)["tasks"][0]
    by_row = sorted(task["examples"], key=lambda example: example["row"])
    assert [(e["expected"], e["base"], e["delta"]) for e in by_row] == [("is", "is", "is"), ("many film", "many film", "many")]
    summary = check(base, delta, {"facts": data}, stop=("the",), samples=10)["verdict"]["summary"]
    assert "Right answers that go on after a stop text, and are compared only up to it: 1 of facts." in summary
    with pytest.raises(InputError, match="row 1 of facts: nothing of the answer"):
        check(base, delta, {"facts": data}, stop=("many",))


def test_generation_stops_early_where_all_rows_have_stopped(base: Path, delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    calls = []
    real = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, *args, **kwargs: calls.append(1) or real(self, *args, **kwargs))
    check(base, delta, [{"prompt": "what"}, {"prompt": "a what"}], stop=("the",), max_new_tokens=20)
    assert len(calls) == 2 * 2  # "is the", on both sides


# --- agreement


def test_agreement_and_divergence_are_those_of_the_table(base: Path, delta: Path) -> None:
    prompts = ["it how", "what", "who", "a where", "good"]
    task = check(base, delta, {"unrelated": [{"prompt": prompt} for prompt in prompts]}, batch_size=2)["tasks"][0]
    assert (task["kind"], task["metrics"], task["flips"], task["ratio"]) == ("agreement", {}, None, None)
    assert task["against_base"]["agreement"] == 2 / 5 and task["against_base"]["kl_rows"] == 5
    p = math.exp(SURE) / (math.exp(SURE) + len(WORDS) - 1)  # of the word that the table names
    moved = (p - (1 - p) / (len(WORDS) - 1)) * SURE  # KL where it names another one: "who" and "where"; after "how" the next word is as before
    assert task["against_base"]["kl_max"] == pytest.approx(moved, rel=1e-5)
    assert task["against_base"]["kl_mean"] == pytest.approx(2 * moved / 5, rel=1e-5)
    by_row = sorted(task["examples"], key=lambda example: example["row"])
    assert [example["outcome"] for example in by_row] == ["different", "same", "different", "different", "same"]
    assert by_row[0]["expected"] is None
    capped = check(base, delta, [{"prompt": prompt} for prompt in prompts], kl_rows=3)["tasks"][0]["against_base"]
    assert capped["kl_rows"] == 3 and capped["kl_mean"] == pytest.approx(moved / 3, rel=1e-5) and capped["agreement"] == 2 / 5


def test_the_direction_of_the_divergence_is_from_the_base() -> None:
    from weft.checking.measuring import divergence

    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.1, 0.8])
    wanted = 0.7 * math.log(7) + 0.2 * math.log(2) + 0.1 * math.log(1 / 8)
    assert divergence(p.log(), q.log()) == pytest.approx(wanted) != pytest.approx(divergence(q.log(), p.log()))
    assert divergence(torch.tensor([0.0, -math.inf]), torch.tensor([0.5, 0.5]).log()) == pytest.approx(math.log(2))
    assert divergence(p.log(), torch.tensor([1.0, 0.0, 0.0]).log()) == math.inf and divergence(p.log(), p.log()) == 0


def test_rows_of_edits_become_four_tasks(base: Path, delta: Path) -> None:
    rows = [
        {"prompt": "it who", "target_new": "made bad", "subject": "who", "rephrase_prompt": ["of who", "in who"], "locality_prompt": "what"},
        {"prompt": "it where", "target_new": "in", "subject": "where", "locality_prompt": "it how", "locality_ground_truth": "many film"}
        | {"portability_prompt": "a what", "portability_ground_truth": "is"},
    ]
    found = check(base, delta, {"edits": rows}, samples=10)
    tasks = {task["name"]: task for task in found["tasks"]}
    assert list(tasks) == ["edits/efficacy", "edits/rephrase", "edits/locality", "edits/portability"]
    assert found["identity"]["data"][0] | {"sha256": ""} == {"name": "edits", "kind": "edits", "n": 2, "sha256": ""}
    scores = {name: (task["n"], task["metrics"]["exact_match"]["base"], task["metrics"]["exact_match"]["delta"]) for name, task in tasks.items()}
    assert scores == {"edits/efficacy": (2, 0, 1), "edits/rephrase": (2, 0, 1), "edits/locality": (2, 1, 0), "edits/portability": (1, 0, 0)}
    local = tasks["edits/locality"]
    assert local["kind"] == "agreement" and local["against_base"]["agreement"] == 1 / 2 and local["flips"]["negative"] == 1 and local["flips"]["nfr"] == 1
    assert {example["expected"] for example in local["examples"]} == {None, "many film"}
    assert [example["row"] for example in tasks["edits/rephrase"]["examples"]] == [0, 0]
    assert tasks["edits/efficacy"]["metrics"]["teacher_forced_exact"]["delta"] == 1  # the answer follows after a space


# --- classification and text


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    bert = tiny.bert(folder / "bert")
    fold(Base.open(bert), [Delta.load(tiny.classifier(bert, folder / "head.safetensors"))], folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def other_head(classifier: Path) -> Delta:
    build = Builder(Base.open(classifier))
    values = np.random.default_rng(9).normal(size=(3, 32)).astype(np.float32)
    build.put("classifier.weight", "assign", {"values": values})
    return build.done(recipe={"verb": "test"})


def planted(classifier: Path, delta: Delta, folder: Path) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Texts with labels chosen so that as many rows have each outcome as are counted, by transformers alone."""
    fold(Base.open(classifier), [delta], folder)
    texts = list(dict.fromkeys(tiny.texts(80, seed=6)))
    sides = []
    for side in (classifier, folder):
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(side).eval(), AutoTokenizer.from_pretrained(side)
        with torch.no_grad():
            sides.append([tiny.LABELS[int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())] for text in texts])
    rows, counts = [], {"negative": 0, "positive": 0, "changed": 0, "both_right": 0, "both_wrong": 0}
    for number, (text, before, after) in enumerate(zip(texts, *sides, strict=True)):
        third = next(label for label in tiny.LABELS if label not in (before, after))
        label, outcome = (before, "both_right") if number % 3 else (third, "both_wrong")
        if before != after:
            label, outcome = [(before, "negative"), (after, "positive"), (after, "positive"), (third, "changed")][number % 4]
        rows.append({"text": text, "label": label})
        counts[outcome] += 1
    assert min(counts.values()) >= 3 and counts["negative"] != counts["positive"]
    return rows, counts


def test_planted_flips_of_a_classifier_come_out(classifier: Path, other_head: Delta, tmp_path: Path) -> None:
    rows, counts = planted(classifier, other_head, tmp_path / "after")
    task = check(classifier, other_head, rows, batch_size=7)["tasks"][0]
    assert {name: task["flips"][name] for name in counts} == counts
    n = len(rows)
    assert task["metrics"]["accuracy"]["base"] == (counts["both_right"] + counts["negative"]) / n
    assert task["metrics"]["accuracy"]["change"] == pytest.approx((counts["positive"] - counts["negative"]) / n)
    assert {name: metric["better"] for name, metric in task["metrics"].items()} == {"accuracy": "higher", "nll": "lower"}
    sides = [evaluate(side, [], rows)["metrics"]["nll"] for side in (classifier, tmp_path / "after")]
    assert [task["metrics"]["nll"][side] for side in ("base", "delta")] == pytest.approx(sides, rel=1e-6)
    shown = sorted(task["examples"], key=lambda example: example["row"])
    assert [(e["prompt"], e["expected"]) for e in shown] == [(row["text"], row["label"]) for row in rows]
    assert [e["delta"] for e in shown] == predict(classifier, other_head, [row["text"] for row in rows]).labels


def test_ratios_of_perplexity(base: Path, tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "llama", seed=2)
    style = tiny.lowrank(folder, tmp_path / "style.safetensors")
    texts = [text + " the river" for text in tiny.texts(9, seed=2)]
    task = check(folder, style, {"held-out": [{"text": text} for text in texts]}, batch_size=4)["tasks"][0]
    rows = [[evaluate(folder, side, [{"text": text}]) for side in ([], style)] for text in texts]
    ratios = [after["metrics"]["perplexity"] / before["metrics"]["perplexity"] for before, after in rows]
    whole = [evaluate(folder, side, [{"text": text} for text in texts])["metrics"] for side in ([], style)]
    assert task["ratio"]["mean"] == pytest.approx(np.mean(ratios), rel=1e-5)
    assert task["ratio"]["median"] == pytest.approx(np.median(ratios), rel=1e-5)
    assert task["ratio"]["pooled"] == pytest.approx(whole[1]["perplexity"] / whole[0]["perplexity"], rel=1e-5)
    assert len({round(value, 3) for value in task["ratio"].values()}) == 3
    assert task["metrics"]["perplexity"]["delta"] == pytest.approx(whole[1]["perplexity"], rel=1e-5)
    assert {metric["better"] for metric in task["metrics"].values()} == {"lower"} and task["examples"] == [] and task["flips"] is None


# --- the two sides


def test_deltas_below_both_sides(base: Path, delta: Path) -> None:
    lower = Delta.load(delta)
    upper = taught(base, {**SAYS, "what": "how"}, over=(lower.id,))
    data = asked(("what", "how many city"), ("who", "made bad"))
    found = check(base, upper, data, on=delta, samples=10)
    assert found["identity"]["on"] == [lower.id] and [each["id"] for each in found["identity"]["deltas"]] == [upper.id]
    assert [found["tasks"][0]["metrics"]["exact_match"][side] for side in ("base", "delta")] == [0.5, 1]
    change = table({**SAYS, "what": "how"}) - table(SAYS)
    layer = found["layers"][0]
    assert layer["norm"] == pytest.approx(np.linalg.norm(change))
    assert layer["relative"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(table({**SAYS, **NOW})))
    with pytest.raises(MismatchError, match="was made over"):
        check(base, upper, data)


def test_several_deltas_are_one_side(base: Path, delta: Path) -> None:
    upper = taught(base, {**SAYS, "what": "how"})
    found = check(base, [delta, upper], asked(("what", "how many city")), names=["facts", "what"], samples=10)
    assert [found["tasks"][0]["metrics"]["exact_match"][side] for side in ("base", "delta")] == [0, 1]
    assert [each["name"] for each in found["identity"]["deltas"]] == ["facts", "what"]
    with pytest.raises(UsageError, match="names: expected 2"):
        check(base, [delta, upper], FACTS, names=["one"])


def test_a_delta_that_changes_the_structure_gets_a_model_of_its_own(classifier: Path, base: Path, tmp_path: Path) -> None:
    bert = tiny.bert(tmp_path / "bert")
    head = tiny.classifier(bert, tmp_path / "head.safetensors")
    labelled = [{"text": text, "label": "LOC"} for text in tiny.texts(6)]
    with pytest.raises(UsageError, match=r"BertModel .* no head, which the rows of data, .* nothing to compare") as error:
        check(bert, head, labelled)
    assert "--on DELTA" in error.value.hint
    names = {"0": "LOC", "1": "HUM", "2": "NUM"}  # a head of the same shape whose classes mean something else
    build = Builder(Base.open(classifier))
    build.add("classifier.bias", np.array([50, 0, 0], np.float32), kind="replace")
    renamed = build.done(recipe={"verb": "test"}, config={"id2label": names, "label2id": {label: int(k) for k, label in names.items()}})
    found = check(classifier, renamed, labelled)
    before = sum(label == "LOC" for label in predict(classifier, [], [row["text"] for row in labelled]).labels)
    assert found["tasks"][0]["metrics"]["accuracy"] | {"change": 0} == {"base": before / 6, "delta": 1, "change": 0, "better": "higher"}
    assert found["layers"][0]["relative"] is None and found["layers"][0]["norm"] == 50


def test_there_is_one_model_at_a_time(classifier: Path, other_head: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    made: list[Any] = []
    real = Base.model

    def counted(self: Base, *args: Any, **kwargs: Any) -> Any:
        assert all(each() is None for each in made)
        model = real(self, *args, **kwargs)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Base, "model", counted)
    rows = [{"text": "how many", "label": "LOC"}]
    check(classifier, other_head, rows)
    assert len(made) == 1
    gc.collect()
    build = Builder(Base.open(classifier))
    build.add("classifier.bias", np.ones(3, np.float32), kind="replace")
    check(classifier, build.done(recipe={"verb": "test"}), rows, on=other_head)
    assert len(made) == 3


def test_a_delta_that_changes_nothing_is_said_to(base: Path) -> None:
    build = Builder(Base.open(base))
    build.put("lm_head.weight", "dense", {"values": np.zeros((len(WORDS), 32), np.float32)})
    idle = build.done(recipe={"verb": "test"})
    data = {"facts": FACTS, "text": [{"text": "how many film"}], "other": [{"prompt": "what"}]}
    assert "changes nothing" in check(base, idle, data)["verdict"]["summary"]
    found = check(base, taught(base, {**SAYS, "bad": "it"}), data)
    assert "changes nothing" in found["verdict"]["summary"] and found["layers"][0]["relative"] > 0  # nothing here asks about "bad"
    found = check(base, taught(base, {**SAYS, "film": "it"}), {"text": [{"text": "who film it"}]})
    assert "changes nothing" not in found["verdict"]["summary"] and "Perplexity on text is" in found["verdict"]["summary"]


def test_the_bound_on_losses_counts_what_could_be_lost(base: Path, delta: Path) -> None:
    gained, kept = asked(("it who", "made bad"), ("of who", "made bad")), asked(("what", "is the river"))
    summary = check(base, delta, {"gained": gained, "kept": 6 * kept}, samples=10)["verdict"]["summary"]
    assert "Of 8 answers 2 became right and 0 wrong (of answers like the 6 that were right, less than 0.5 are lost, with 95 % confidence)" in summary
    summary = check(base, delta, {"gained": gained}, samples=10)["verdict"]["summary"]
    assert "Of 2 answers 2 became right and 0 wrong." in summary


def test_a_ratio_near_one_is_told_with_all_its_digits(base: Path) -> None:
    hardly = {**SAYS, "film": "it"}
    rows = [{"text": "who film it"}, *({"text": "what is the river what is the river what is the river"} for _ in range(400))]
    found = check(base, taught(base, hardly), {"text": rows})
    pooled = found["tasks"][0]["ratio"]["pooled"]
    assert pooled != 1 and f"Perplexity on text is {pooled:#.5g} times" in found["verdict"]["summary"]


def test_logits_that_are_no_numbers_are_a_finding(base: Path) -> None:
    values = np.zeros((len(WORDS), 32), np.float32)
    values[3, WORDS.index("who")] = np.nan
    build = Builder(Base.open(base))
    build.put("lm_head.weight", "dense", {"values": values})
    broken = build.done(recipe={"verb": "test"})
    data = {"facts": FACTS, "text": [{"text": "it who was"}], "fine": asked(("what", "is the river")), "other": [{"prompt": "who"}]}
    gate = {"facts": {"exact_match": {"min": 0}}, "other": {"kl_max": {"max": 1e9}}, "layers": {"relative": {"max": 1e9}}}
    found = check(base, broken, data, samples=10, gate=gate)
    json.dumps(found, allow_nan=False)
    tasks = {task["name"]: task for task in found["tasks"]}
    # NaN times zero is NaN: one such entry is in every logit
    assert not any(task["finite"] for task in tasks.values()) and tasks["facts"]["metrics"]["exact_match"]["delta"] is None
    assert tasks["facts"]["metrics"]["exact_match"]["base"] == 2 / 8 and tasks["fine"]["flips"]["negative"] == 1
    assert tasks["text"]["ratio"] == {"mean": None, "median": None, "pooled": None} and tasks["other"]["against_base"]["kl_max"] is None
    assert tasks["other"]["against_base"]["agreement"] is None
    assert [(each["value"], each["passed"]) for each in found["verdict"]["gates"]] == [(None, False)] * 3
    assert "not finite on facts, text, fine, other" in found["verdict"]["summary"]
    assert found["layers"][0] | {"shape": 0} == {
        "target": "lm_head.weight",
        "layer": None,
        "role": "head.lm",
        "shape": 0,
        "relative": None,
        "norm": None,
        "max_abs": None,
        "finite": False,
        "nonfinite": 1,
    }


def test_a_word_that_is_said_because_its_logit_is_no_number_is_not_right(base: Path) -> None:
    values = np.zeros((len(WORDS), 32), np.float32)
    values[WORDS.index("is"), 0] = np.nan
    build = Builder(Base.open(base))
    build.put("lm_head.weight", "dense", {"values": values})
    task = check(base, build.done(recipe={"verb": "test"}), asked(("what", "is")), max_new_tokens=1, samples=10)["tasks"][0]
    assert task["examples"][0]["delta"] == "is" and task["flips"]["negative"] == 1 and not task["finite"]


# --- layers


def test_sizes_of_changes(tmp_path: Path) -> None:
    from weft.checking.layers import sizes

    folder = tiny.llama(tmp_path / "llama")
    rng = np.random.default_rng(4)
    build = Builder(Base.open(folder))
    name = "model.layers.1.mlp.down_proj.weight"
    build.put(name, "lowrank", {"A": rng.normal(size=(2, 48)).astype(np.float32), "B": rng.normal(size=(32, 2)).astype(np.float32)}, scale=0.5)
    build.put("model.norm.weight", "sparse", {"index": np.array([3]), "values": np.array([-2.5], np.float32)})
    build.put("@module/model.layers.0.mlp", "adapter", {"down": rng.normal(size=(4, 32)).astype(np.float32), "up": rng.normal(size=(32, 4)).astype(np.float32)})
    delta = build.done(recipe={"verb": "test"})
    layers = {layer["target"]: layer for layer in check(folder, delta, [{"prompt": "how"}], mode="functional")["layers"]}
    w, change = Base.open(folder).tensor(name).read(), 0.5 * delta.get(f"{name}//0.B") @ delta.get(f"{name}//0.A")
    found = layers[name]
    assert (found["layer"], found["role"], found["shape"], found["finite"], found["nonfinite"]) == (1, "mlp.down", [32, 48], True, 0)
    assert found["norm"] == pytest.approx(np.linalg.norm(change), rel=1e-6) and found["max_abs"] == pytest.approx(np.abs(change).max(), rel=1e-6)
    assert found["relative"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(w), rel=1e-6)
    norm = layers["model.norm.weight"]
    assert (norm["norm"], norm["max_abs"], norm["role"], norm["layer"]) == (2.5, 2.5, "norm.final", None)
    assert norm["relative"] == pytest.approx(2.5 / math.sqrt(32))
    side = layers["@module/model.layers.0.mlp"]
    assert (side["relative"], side["norm"], side["finite"]) == (None, None, True)
    part = replace(delta, entries={name: delta.entries[name]})
    assert sizes(Base.open(folder), [part], [part], {})[0]["norm"] == pytest.approx(found["norm"], rel=1e-5)  # twice the same, the second counted


# --- identity, data, errors


def test_the_report_says_what_was_compared(base: Path, delta: Path, tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FACTS))
    (tmp_path / "other.jsonl").write_text('{"prompt": "what"}\n')
    seen: list[tuple[int, int]] = []
    found = check(base, delta, [tmp_path / "facts.jsonl", tmp_path / "other.jsonl"], seed=5, progress=lambda done, total: seen.append((done, total)))
    json.dumps(found, allow_nan=False)
    assert list(found) == ["verdict", "identity", "tasks", "layers"]
    identity = found["identity"]
    assert list(identity) == ["base", "deltas", "on", "data", "settings", "versions", "seconds"]
    loaded = Delta.load(delta)
    assert identity["base"] == {"name": base.name, "fingerprint": Base.open(base).fingerprint}
    about = {"id": loaded.id, "name": "new", "verb": "test", "method": "table", "targets": 1, "nbytes": loaded.nbytes, "parents": []}
    assert identity["deltas"] == [about]
    assert [(each["name"], each["kind"], each["n"]) for each in identity["data"]] == [("facts", "generation", 8), ("other", "agreement", 1)]
    lengths = {"batch_size": 32, "max_length": 512, "max_new_tokens": None}
    settings = {"dtype": "float32", "device": "cpu", **lengths, "stop": ["\n", "."], "seed": 5, "samples": 1000, "kl_rows": 512, "examples": 200}
    assert identity["settings"] == settings
    assert found["tasks"][0]["against_base"] == {"agreement": 3 / 8, "kl_mean": None, "kl_max": None, "kl_rows": 0}
    assert identity["versions"]["weft"] == weft.__version__ and set(identity["versions"]) == {"weft", "python", "torch", "transformers", "numpy"}
    assert found["verdict"] == {"passed": None, "gates": [], "summary": found["verdict"]["summary"]}
    assert "No limits were set. Of 8 answers 3 became right and 1 wrong" in found["verdict"]["summary"]
    assert seen[-1] == (2 * (8 * 2 + 1),) * 2 and [done for done, _ in seen] == sorted(done for done, _ in seen)
    again = check(base, delta, [tmp_path / "facts.jsonl", tmp_path / "other.jsonl"], seed=5)
    again["identity"]["seconds"] = identity["seconds"]
    assert again == found


def test_data_that_cannot_be_checked(base: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Base, "model", lambda *args, **kwargs: pytest.fail("the model was built"))
    for error, words, data, how in (
        (InputError, "row 1 of x has 'question'", {"x": [{"prompt": "a"}, {"question": "b"}]}, {}),
        (InputError, "x mixes agreement and text", {"x": [{"prompt": "a"}, {"text": "b"}]}, {}),
        (InputError, "no rows", {"x": []}, {}),
        (InputError, "^x: row 0 of the data: 'completion' must be text", {"y": [{"text": "a"}], "x": [{"prompt": "a", "completion": 3}]}, {}),
        (InputError, "^x: 1 of the edits cannot be read", {"y": [{"text": "a"}], "x": [{"prompt": "a", "target_new": 3}]}, {}),
        (InputError, "row 0 of x: nothing of the answer", {"x": [{"prompt": "a", "completion": " \n a"}]}, {}),
        (UsageError, "y asks for a classifier and x for a language model", {"x": [{"prompt": "a"}], "y": [{"text": "a", "label": "b"}]}, {}),
        (UsageError, "no data", {}, {}),
        (UsageError, "named 'layers'", {"layers": [{"prompt": "a"}]}, {}),
        (UsageError, "several data files are named x", [tmp_path / "x.jsonl", tmp_path / "a" / "x.jsonl"], {}),
        (UsageError, "stop text must not be empty", [{"prompt": "a"}], {"stop": ["b", ""]}),
        (UsageError, "2 problems", [{"prompt": "a"}], {"samples": 0, "max_length": 1}),
        (UsageError, "did you mean 'data'", [{"prompt": "a"}], {"gate": {"dat": {"agreement": {"min": 0.9}}}}),
        (UsageError, "did you mean 'agreement'", [{"prompt": "a"}], {"gate": {"data": {"agrement": {"min": 0.9}}}}),
    ):
        with pytest.raises(error, match=words):
            check(base, delta, data, **how)
    with pytest.raises(UsageError, match="no delta"):
        check(base, [], FACTS)


def test_an_error_in_the_middle_names_the_file(classifier: Path, other_head: Delta) -> None:
    data = {"fine": [{"text": "how many", "label": "LOC"}], "odd": [{"text": "how many", "label": "LOX"}]}
    with pytest.raises(InputError, match=r"^odd: row 0 of the data has the label 'LOX'"):
        check(classifier, other_head, data, samples=10)


def test_prompts_that_leave_no_room(base: Path, delta: Path) -> None:
    with pytest.raises(UsageError, match="nothing is left for the prompt"):
        check(base, delta, FACTS, max_new_tokens=32)
    long = " ".join(["it"] * 40)
    task = check(base, delta, asked((f"{long} how", "many city"), ("what", "is")), samples=10)["tasks"][0]
    assert task["truncated"] == 1 and task["metrics"]["exact_match"]["delta"] == 1 / 2  # the end of a prompt stays


# --- the command line


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    return (main([str(word) for word in words]), *capsys.readouterr())


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FACTS))
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("what", "a what", "it how")))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "how many film"}) + "\n")
    return tmp_path / "facts.jsonl"


def test_exit_codes(base: Path, delta: Path, facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", base, delta, "--data", facts, "--data", tmp_path / "other.jsonl"]
    (tmp_path / "low.yaml").write_text("facts: {exact_match: {min: 0.5}, change.exact_match: {min: 0.2}}\nother: {agreement: {min: 0.6}}\n")
    (tmp_path / "high.yaml").write_text("facts: {nfr: {max: 0.1}, pfr: {min: 0.1}}\n")
    (tmp_path / "wrong.yaml").write_text("fact: {nfr: {max: 0.1}}\n")
    code, out, err = run(capsys, *words, "--gate", tmp_path / "low.yaml")
    assert code == 0 and out.startswith("passed: All 3 limits are kept.") and err == ""
    code, out, err = run(capsys, *words, "--gate", tmp_path / "high.yaml")
    assert code == 1 and out.startswith("failed: 1 of 2 limits not kept") and "facts, nfr: 0.125, limit <= 0.1" in err
    code, out, err = run(capsys, *words, "--gate", tmp_path / "wrong.yaml")
    assert code == 2 and out == "" and "did you mean 'facts'" in err
    assert run(capsys, "check", base, "--data", facts)[0] == 2
    assert run(capsys, "check", base, delta)[0] == 2
    assert run(capsys, "check", base, delta, "--data", tmp_path / "nowhere.jsonl")[0] == 3
    (tmp_path / "broken.safetensors").write_bytes(delta.read_bytes()[:-7])
    with pytest.raises(FormatError):
        Delta.load(tmp_path / "broken.safetensors")
    assert run(capsys, "check", base, tmp_path / "broken.safetensors", "--data", facts)[0] == 3


def test_what_is_said_to_people_and_to_programs(base: Path, delta: Path, facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [word for name in ("facts", "other", "text") for word in ("--data", tmp_path / f"{name}.jsonl")]
    code, out, _ = run(capsys, "check", base, delta, *data)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and out.startswith("no gate: No limits were set. Of 8 answers")
    assert next(line for line in lines if line[:1] == ["facts"])[:6] == ["facts", "8", "exact_match", "0.25", "0.5", "+0.25"]
    assert "-1 +3" in out and "0.62" in out
    assert "agreement with the base 0.6667" in out and "perplexity ratio pooled" in out
    assert next(line for line in lines if line[:1] == ["lm_head.weight"])
    _, out, _ = run(capsys, "check", base, delta, *data, "--format", "json", "--stop", "city", "--samples", "50", "--max-new-tokens", "4")
    found = json.loads(out)
    assert {"device": "cpu", "stop": ["city"], "max_new_tokens": 4, "seed": 0, "samples": 50}.items() <= found["identity"]["settings"].items()
    assert run(capsys, "check", base, delta, *data, "--format", "quiet")[:2] == (0, "no gate\n")


def test_a_page_is_written_also_when_a_gate_fails(base: Path, delta: Path, facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gate.yaml").write_text('"*": {nfr: {max: 0}}\n')
    page = tmp_path / "check.html"
    code, _, err = run(capsys, "check", base, delta, "--data", facts, "--gate", tmp_path / "gate.yaml", "--report", page)
    assert code == 1 and f"report: {page}" in err and "many city" in page.read_text()
    assert run(capsys, "check", base, delta, "--data", facts, "--report", tmp_path / "no" / "check.html")[0] == 3
