"""weft search with real tuning runs on tiny models, and the command."""

from __future__ import annotations

import json
import random
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from scipy.stats import spearmanr

import weft
from tests import tiny
from weft.cli.app import app
from weft.cli.output import Output
from weft.demo import edition, microcosm
from weft.errors import MismatchError, UsageError

FAST: dict[str, Any] = {"steps": 4, "batch_size": 8, "lr": 1e-2}


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    return [{"text": text} for text in tiny.texts(2 * count, seed) if len(text.split()) > 2][:count]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama") / "base")


def better_in_all(one: dict[str, float], other: dict[str, float], names: list[str]) -> bool:
    return all(one[name] <= other[name] for name in names) and any(one[name] < other[name] for name in names)


def test_autopeft_gives_a_front_of_deltas_and_goes_on_from_its_study(llama: Path, tmp_path: Path) -> None:
    rows, test = sentences(60), sentences(20, seed=9)
    how: dict[str, Any] = {"data": rows, "study": tmp_path / "study.log", "test_seeds": (5, 6), "startup": 4, "final_steps": 6, **FAST}
    weft.search("autopeft", llama, trials=3, **how)
    events: list[dict[str, Any]] = []
    found = weft.search("autopeft", llama, trials=8, test=test, out=tmp_path / "out", log=tmp_path / "log.jsonl", progress=events.append, **how)
    names = [each["name"] for each in found["objectives"]]
    assert names == ["nll", "parameters"] and found["counts"] == {"done": 8, "failed": 0}
    values = [each["values"] for each in found["trials"]]
    on_front = [each["values"] for each in found["front"]]
    assert all(not better_in_all(one, other, names) for one in values for other in on_front)
    assert all(v in on_front or any(better_in_all(f, v, names) or f == v for f in on_front) for v in values)
    for record in found["front"]:
        delta = weft.Delta.load(tmp_path / "out" / record["delta"]["file"])
        assert delta.id == record["delta"]["id"] and delta.recipe["seed"] == 5 and delta.notes["steps"] == 6
        assert delta.notes["parameters"] == record["values"]["parameters"] == record["tested"]["seeds"][0]["parameters"]
        measured = weft.evaluate(llama, delta, test)["metrics"]
        assert measured["nll"] == pytest.approx(record["tested"]["seeds"][0]["test.nll"], rel=1e-6)
        layers = {int(token.partition("@")[2]) for token in record["shown"]["space.targets"]}
        assert {int(name.split(".")[2]) for name in delta.entries} == layers
        assert len(record["tested"]["seeds"]) == 2 and record["gap"] is not None
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    assert [event["event"] for event in events][:2] == ["start", "trial"] and events[0]["done"] == 3
    assert sum(event["event"] == "trial" for event in events) == 5 and events[-1]["event"] == "end"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == len(events)
    with pytest.raises(MismatchError, match="study of another search"):
        weft.search("autopeft", llama, trials=9, **how | {"lr": 2e-2})


def test_autopeft_on_labelled_rows_with_a_space_of_its_own(tmp_path: Path) -> None:
    base = tiny.bert(tmp_path / "base")
    rows = [{"text": text, "label": "many" if len(text.split()) > 6 else "few"} for text in tiny.texts(60)]
    space = {"layers": [1], "roles": ["attention.query", "mlp"], "spaces": {"lora": {"rank": [1, 4]}, "nola": {"k": [4]}}, "options": {"lr": [1e-3, 1e-2]}}
    found = weft.search("autopeft", base, data=rows, space=space, trials=6, test_seeds=(), cost="bytes", steps=3, batch_size=16)
    assert [each["name"] for each in found["objectives"]] == ["accuracy", "bytes"] and found["gap"] is None
    for trial in found["trials"]:
        assert set(trial["params"]) == {"layer.1", "role.attention.query", "role.mlp", "space", "lora.rank", "nola.k", "lr"}
    assert all(0 <= each["values"]["accuracy"] <= 1 for each in found["front"])


@pytest.mark.slow
def test_what_is_better_on_one_task_is_better_on_another() -> None:
    """Spearman's rank correlation of twelve configurations: the mood of reviews, and a style of answering."""
    base, rows = weft.Base.open(edition("first")), {name: microcosm.files()[f"{name}.train"] for name in ("mood", "style")}
    for each in rows.values():
        random.Random(0).shuffle(each)
    how: dict[str, Any] = {"steps": 30, "batch_size": 16, "seed": 0}
    space = {"spaces": {"lora": {"rank": [1, 4, 16]}}, "options": {"lr": [3e-3]}}
    found = weft.search("autopeft", base, data=rows["mood"][:240], space=space, trials=12, startup=12, test_seeds=(), **how)
    first, second = [], []
    for trial in found["trials"]:
        chosen = trial["params"]
        roles = [role for role in ("attention", "mlp") if chosen[f"role.{role}"]]
        targets = [f"{role}@{layer}" for role in roles for layer in range(4) if chosen[f"layer.{layer}"]]
        if targets:
            delta = weft.tune(base, rows["style"][:240], method="lora", lr=3e-3, **{"space.targets": targets, "space.rank": chosen["lora.rank"]}, **how)
            first.append(trial["values"]["accuracy"])
            second.append(-weft.evaluate(base, delta, rows["style"][240:340])["metrics"]["nll"])
    assert len(first) > 8 and spearmanr(first, second).statistic > 0.4


@pytest.mark.slow
def test_masks_lie_on_the_exhaustive_front(llama: Path) -> None:
    """Three modules, seven masks: the study's front is that of all of them, tuned one by one without it."""
    rows, valid = sentences(24), sentences(24, seed=7)
    modules = ["attention", "mlp.up", "mlp.down"]
    found = weft.search("memcontrol", llama, data=rows, valid=valid, space={"modules": modules}, trials=40, test_seeds=(), **FAST | {"steps": 8})
    assert found["counts"]["done"] == 7  # an empty mask tunes nothing, and none is tried twice
    figures = {}
    for mask in product([True, False], repeat=3):
        if any(mask):
            targets = [module for module, on in zip(modules, mask, strict=True) if on]
            delta = weft.tune(llama, rows, **{"space.targets": targets}, **FAST | {"steps": 8}, progress=lambda event: None)
            held, seen = (weft.evaluate(llama, delta, each)["metrics"]["nll"] for each in (valid, rows))
            figures[mask] = {"nll": held, "gap": held - seen}
    exhaustive = {mask for mask, one in figures.items() if not any(better_in_all(other, one, ["nll", "gap"]) for other in figures.values())}
    returned = {tuple(each["params"][module] for module in modules) for each in found["front"]}
    assert returned == exhaustive and 1 < len(exhaustive) < 7
    assert all(each["values"]["gap"] == pytest.approx(figures[tuple(each["params"][m] for m in modules)]["gap"], abs=1e-6) for each in found["trials"])


def test_memcontrol_takes_extraction_for_memorisation_and_the_bases_own_modules(llama: Path) -> None:
    rows = [{"prompt": f"how many {word}", "completion": " is the"} for word in tiny.WORDS]
    found = weft.search("memcontrol", llama, data=rows, memorisation="extraction", trials=2, test_seeds=(), **FAST)
    assert [each["name"] for each in found["objectives"]] == ["nll", "extraction"]
    assert set(found["trials"][0]["params"]) == {"attention.query", "attention.key", "attention.value", "attention.output", "mlp.gate", "mlp.up", "mlp.down"}
    assert all(0 <= each["values"]["extraction"] <= 1 for each in found["trials"])


def test_how_to_autorl_chooses_by_some_seeds_and_reports_others(llama: Path) -> None:
    space = {"lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    found = weft.search("how-to-autorl", llama, data=sentences(40), space=space, trials=3, tuning_seeds=(0, 1), test_seeds=(8, 9), steps=3, batch_size=8)
    (best,) = found["front"]
    assert best["values"]["nll"] == min(each["values"]["nll"] for each in found["trials"])
    assert all(len(each["seeds"]) == 2 for each in found["trials"]) and len(best["tested"]["seeds"]) == 2
    assert best["seeds"][0]["nll"] != best["seeds"][1]["nll"] != best["tested"]["seeds"][0]["nll"]
    assert found["gap"] == pytest.approx(best["tested"]["values"]["nll"] - best["values"]["nll"])


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("autopeft", {"stps": 3}, "stps: no such option"),
        ("autopeft", {"metric": "acuracy"}, "did you mean 'accuracy'"),
        ("autopeft", {"space": {"laiers": [1]}}, "laiers: no such part"),
        ("autopeft", {"space": {"spaces": {"lora": {"rnk": [1]}}}}, "lora.rnk: no such option"),
        ("autopeft", {"spaces": ("mobiletl",)}, "this space has no targets"),
        ("autopeft", {"spaces": ("lorra",)}, "no space method 'lorra'"),
        ("how-to-autorl", {"space": {"lr": [1e-3]}, "lr": 1e-2}, "lr: chosen by the search, and fixed as well"),
        ("memcontrol", {"space": {"modules": ["atention"]}}, "cannot select sites"),
    ],
)
def test_wrong_searches_are_refused(llama: Path, method: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        weft.search(method, llama, data=sentences(20), trials=2, **{"steps": 2, **more})


def test_a_base_and_data_are_needed(llama: Path) -> None:
    for given in ({}, {"source": llama}, {"data": sentences(9)}):
        with pytest.raises(UsageError, match="needs both"):
            weft.search("memcontrol", **given)
    with pytest.raises(UsageError, match="1 row of data cannot be split"):
        weft.search("memcontrol", llama, data=sentences(1))


def test_an_error_leaves_no_folder(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        weft.search("memcontrol", llama, data=sentences(20), out=tmp_path / "out", trials=1, stps=1)
    assert list(tmp_path.iterdir()) == []


# --- the command


def said(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words], obj=Output(), catch_exceptions=False)
    return done.exit_code, done.stdout


def test_the_command_prints_laws(tmp_path: Path) -> None:
    rows = [{"N": n, "D": d, "loss": 1.7 + 400 * n**-0.34 + 410 * d**-0.28} for n in (1e7, 1e8, 1e9) for d in (1e9, 1e10, 1e11)]
    (file := tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text = said("search", "law", file, "-p", "samples=10", "-p", 'at=[{"N": 1e10, "D": 1e12}]', "-p", "holdout=0.2")
    assert code == 0 and re.search(r"a of N +0\.34 +0\.34 \.\. 0\.34", text) and "at N=1e+10 D=1e+12" in text and "measured" in text
    code, text = said("search", "law", file, "-p", "samples=10", "--format", "quiet")
    assert [round(float(line), 3) for line in text.split()] == [0.34, 0.28]
    code, text = said("search", "law", file, "-p", "samples=10", "--format", "json", "-o", tmp_path / "out")
    assert json.loads(text) == json.loads((tmp_path / "out" / "report.json").read_text())
    code, text = said("search", "step-law", "-p", 'at=[{"N": 1e9, "D": 1e11}]')
    assert code == 0 and "0.001632" in text and "1,107,715 tokens" in text


def test_the_command_prints_a_front(llama: Path, tmp_path: Path) -> None:
    (data := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sentences(30)))
    (space := tmp_path / "space.yaml").write_text("modules: [attention, mlp]\n")
    words = ["search", "memcontrol", llama, "--data", data, "--space", space, "-p", "trials=2", "-p", "steps=2", "-p", "test_seeds=1", "-o", tmp_path / "out"]
    code, text = said(*words)
    assert code == 0 and text.startswith("2 trials, 0 of them failed") and "space.targets=" in text
    assert (tmp_path / "out" / "report.json").is_file() and list((tmp_path / "out").glob("*.safetensors"))
