"""Evaluation while tuning: figures of the objective, the delta of the best one, an early end, and exact resume of all that."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from weft import checking
from weft.base import Base
from weft.cli import main
from weft.delta import Delta
from weft.engine.best import direction
from weft.errors import InputError, UsageError
from weft.tuning import tune

ROWS = [{"text": f"{tiny.WORDS[k % 20]} is the {('film', 'river', 'city')[k % 3]} {tiny.WORDS[(k * 7) % 19]}", "label": tiny.LABELS[k % 3]} for k in range(24)]
TEST = [{"text": f"{tiny.WORDS[(k * 3) % 20]} in {('film', 'river', 'city')[k % 3]} it", "label": tiny.LABELS[k % 3]} for k in range(7)]
QUICK: dict[str, Any] = {"batch_size": 8, "steps": 8, "lr": 0.02, "rank": 2, "progress": lambda event: None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"llama": tiny.llama(root / "llama"), "bert": tiny.bert(root / "bert")}


def sums(delta: Delta) -> dict[str, str]:
    return {key: tensor.sha256 for key, tensor in delta.tensors.items()}


class Script:
    """An evaluation whose figures are written beforehand."""

    def __init__(self, name: str, values: list[float]) -> None:
        self.name, self.values = name, dict(enumerate(values, 1))
        self.asked: list[int] = []

    def __call__(self, run: Any) -> dict[str, float]:
        self.asked.append(run.step)
        return {self.name: self.values[run.step]}


def test_more_or_less_is_better_by_name() -> None:
    assert direction("loss") == ("loss", -1) and direction("nll") == ("nll", -1) and direction("teacher_forced_token_accuracy")[1] == 1
    assert direction("+bumps") == ("bumps", 1) and direction("-accuracy") == ("accuracy", -1)
    with pytest.raises(UsageError, match="more of it better"):
        direction("bumps")


@pytest.mark.parametrize("name", ["accuracy", "loss", "-bumps"])
@pytest.mark.parametrize(("patience", "last"), [(0, 8), (2, 5), (3, 6)])
def test_the_delta_is_that_of_the_best_evaluation(folders: dict[str, Path], name: str, patience: int, last: int) -> None:
    """The first of equal ones; NaN is never best."""
    values = [0.1, 0.2, 0.7, math.nan, 0.6, 0.7, 0.5, 0.7]
    sign = 1 if name == "accuracy" else -1
    script = Script(name.lstrip("-"), [sign * value for value in values])
    events: list[dict[str, Any]] = []
    options = {**QUICK, "progress": events.append}
    delta = tune(folders["llama"], ROWS, evaluate=script, evaluate_every=1, best=name, patience=patience, **options)
    at_three: list[Delta] = []

    def look(run: Any) -> dict[str, float]:
        if run.step == 3:
            at_three.append(run.hooks[0].finish())
        return {}

    plain = tune(folders["llama"], ROWS, evaluate=look, evaluate_every=1, **QUICK)
    assert sums(delta) == sums(at_three[0]) != sums(plain)
    assert script.asked == list(range(1, last + 1))
    assert delta.notes["best"] == {"step": 3, name.lstrip("-"): sign * 0.7} and delta.notes["steps"] == last
    stops = [event for event in events if event["event"] == "stop"]
    assert [(stop["step"], "has not been better" in stop["reason"]) for stop in stops] == ([(last, True)] if patience else [])


def test_what_was_kept_is_not_what_training_goes_on_with(folders: dict[str, Path]) -> None:
    for method, options in (("full", {"lr": 1e-3}), ("spiel", {}), ("bitfit", {"norms": True})):
        chosen = {**QUICK, **options}
        chosen.pop("rank")
        first, three = (
            tune(folders["llama"], ROWS, method=method, evaluate=Script("accuracy", values), evaluate_every=1, best="accuracy", **chosen)
            for values in ([1.0] + [0.0] * 7, [0.0, 0.0, 1.0] + [0.0] * 5)
        )
        assert first.notes["best"]["step"] == 1 and sums(first) != sums(three), method


@pytest.mark.parametrize(("method", "cut"), [("lora", 2), ("lora", 4), ("adalora", 6)])
def test_a_resumed_run_keeps_the_best_and_its_patience(folders: dict[str, Path], tmp_path: Path, method: str, cut: int) -> None:
    """The best comes at step 3: before the cut, or after it. Patience ends the run at step 7."""
    options = {**QUICK, "best": "accuracy", "patience": 4, "evaluate_every": 1, "method": method}
    options.pop("rank")
    values = [0.1, 0.2, 0.7, 0.3, 0.6, 0.2, 0.5, 0.9]
    whole = tune(folders["llama"], ROWS, evaluate=Script("accuracy", values), **options)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "save" and event["step"] == cut:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(folders["llama"], ROWS, evaluate=Script("accuracy", values), out=tmp_path / "d.safetensors", save_every=2, **{**options, "progress": stop})
    script = Script("accuracy", values)
    resumed = tune(folders["llama"], ROWS, evaluate=script, out=tmp_path / "d.safetensors", resume=tmp_path / "d.safetensors.state", **options)
    assert resumed.id == whole.id and resumed.notes["best"] == whole.notes["best"] == {"step": 3, "accuracy": 0.7}
    assert script.asked == list(range(cut + 1, 8)) and resumed.notes["steps"] == 7


@pytest.mark.parametrize(("kind", "objective"), [("bert", "classification"), ("llama", "causal-lm"), ("bert", "masked-lm")])
def test_data_is_measured_as_weft_eval_measures_it(folders: dict[str, Path], tmp_path: Path, kind: str, objective: str) -> None:
    seen: list[dict[str, Any]] = []
    options = {**QUICK, "steps": 0, "epochs": 2.0, "progress": lambda e: seen.append(e) if e["event"] == "eval" else None}
    rows = ROWS if objective == "classification" else [{"text": row["text"]} for row in ROWS]
    test = TEST if objective == "classification" else [{"text": row["text"]} for row in TEST]
    delta = tune(folders[kind], rows, objective=objective, evaluate=test, **options)
    assert [event["step"] for event in seen] == [3, 6]  # after each epoch
    if kind == "llama":  # no dropout: how batches are cut changes nothing but rounding, here as in training
        tune(folders[kind], rows, objective=objective, evaluate=test, micro_batch_size=3, **options)
        assert seen[3]["loss"] == pytest.approx(seen[1]["loss"], rel=1e-3)
    assert seen[0]["loss"] != seen[1]["loss"]
    base = Base.open(folders[kind])
    if objective == "classification":
        found = checking.evaluate(base, [delta], test)["metrics"]
        assert (seen[1]["accuracy"], seen[1]["loss"]) == pytest.approx((found["accuracy"], found["nll"]), rel=1e-4)
    elif objective == "causal-lm":  # tuning adds the end token, which is measured too
        found = checking.evaluate(base, [delta], [{"text": row["text"] + " [SEP]"} for row in test])["metrics"]
        assert (seen[1]["teacher_forced_token_accuracy"], seen[1]["loss"]) == pytest.approx((found["teacher_forced_token_accuracy"], found["nll"]), rel=1e-4)


def test_evaluating_on_data_leaves_no_trace(folders: dict[str, Path]) -> None:
    plain, watched = (tune(folders["llama"], ROWS, evaluate=data, evaluate_every=2, dropout=0.3, **QUICK) for data in (None, TEST))
    assert plain.id == watched.id
    chosen = [tune(folders["llama"], ROWS, evaluate=data, best="loss", **QUICK) for data in (TEST, TEST[1:])]
    assert chosen[0].id != chosen[1].id and chosen[0].recipe["evaluation"]["data"] != chosen[1].recipe["evaluation"]["data"]


def test_it_stops_before_it_overfits(folders: dict[str, Path]) -> None:
    """Eight texts without sense, learnt by heart: on others the loss rises, and the best delta is better there than the last."""
    draw = random.Random(3)
    noise = [{"text": " ".join(draw.choices(tiny.WORDS, k=8))} for _ in range(24)]
    options = {**QUICK, "rank": 4, "steps": 30, "evaluate": noise[8:], "evaluate_every": 4}
    last, best = tune(folders["llama"], noise[:8], **options), tune(folders["llama"], noise[:8], best="loss", patience=2, **options)
    assert best.notes["steps"] == 12 and best.notes["best"]["step"] == 4
    loss = [checking.evaluate(folders["llama"], [delta], noise[8:])["metrics"]["nll"] for delta in (last, best)]
    assert loss[1] < 0.9 * loss[0]


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"best": "loss"}, UsageError, "best needs an evaluation"),
        ({"patience": 2}, UsageError, "patience needs an evaluation"),
        ({"patience": 2, "evaluate": ROWS}, UsageError, "what must get better"),
        ({"best": "f1", "evaluate": ROWS}, UsageError, "does not measure"),
        ({"best": "weird", "evaluate": ROWS}, UsageError, "more of it better"),
        ({"best": "loss", "evaluate": lambda run: {"nll": 1.0}, "evaluate_every": 1}, UsageError, "no such figure"),
        ({"objective": "classification", "evaluate": [{"text": "a", "label": "hum"}]}, InputError, "training data has not"),
        ({"evaluate": [{"texts": "a"}]}, InputError, "has no 'text'"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(folders: dict[str, Path], options: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        tune(folders["bert" if "objective" in options else "llama"], ROWS, **{**QUICK, **options})


def test_the_command_line_evaluates_and_chooses(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("train", ROWS), ("dev", TEST)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, log = tmp_path / "d.safetensors", tmp_path / "log.jsonl"
    words = ["tune", str(folders["bert"]), "--data", str(tmp_path / "train.jsonl"), "--objective", "classification", "-o", str(out), "--log", str(log)]
    words += ["--evaluate", str(tmp_path / "dev.jsonl"), "--evaluate-every", "2", "-p", "best=accuracy", "-p", "steps=6", "-p", "lr=0.01", "-p", "patience=9"]
    assert main(words) == 0, capsys.readouterr().err
    evals = [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "eval"]
    assert [line["step"] for line in evals] == [2, 4, 6] and set(evals[0]) == {"event", "time", "step", "loss", "accuracy"}
    best = max(evals, key=lambda line: line["accuracy"])
    assert Delta.load(out).notes["best"] == {"step": best["step"], "accuracy": pytest.approx(best["accuracy"])}
    assert torch.is_grad_enabled()
