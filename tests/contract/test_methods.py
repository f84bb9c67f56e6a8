"""The contract of every method: what it makes has a stable id and is taken by the other verbs. New ones come free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weft
from tests import tiny
from tests.conftest import bits
from weft import methods
from weft.base import Base
from weft.cli import main
from weft.delta import Delta

SPACES = methods.names("space")
MERGES = methods.names("merge")
EDITS = methods.names("edit")
PORTS = methods.names("port")
FACTS = [{"prompt": "the river is", "subject": "river", "target_new": "a good film"}, {"prompt": "who is in the city", "subject": "city", "target_new": "it"}]
NEEDS: dict[str, dict[str, Any]] = {
    name: {"data": [{"text": text} for text in tiny.texts(30)], "steps": 3, "contexts": 1} for name in ("emmet", "memit", "rome")
}
"""What some methods cannot do without."""
NEEDS["trans-lora"] = {"data": [{"prompt": text} for text in tiny.texts(6)], "shots": 0, "lead": 0.5, "inputs": 8, "answer": 4, "rank": 2, "epochs": 1}
ROWS = [{"text": f"what is the {a} of {b}", "label": a} for a in ("river", "city", "film") for b in ("good", "bad", "a", "it")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base for each kind of method."""
    root = tmp_path_factory.mktemp("contract")
    bert = tiny.bert(root / "bert")
    return {"space": bert, "merge": bert, "edit": tiny.llama(root / "llama"), "port": tiny.llama(root / "newer", seed=3)}


@pytest.fixture(scope="module")
def makes(folders: dict[str, Path]) -> Any:
    """A delta made by a method of a kind, with the smallest run that changes something."""
    folder = folders["space"]
    others = [tiny.lowrank(folder, folder.parent / f"{seed}.safetensors", seed) or folder.parent / f"{seed}.safetensors" for seed in (1, 2)]

    ported = tiny.lowrank(folders["edit"], folder.parent / "ported.safetensors")

    def make(kind: str, name: str, **options: Any) -> Delta:
        if kind == "port":
            return weft.port(ported, folders["edit"], folders["port"], name, **NEEDS.get(name, {}), **options)
        if kind == "merge":
            return weft.merge(others, folder, name, **options)
        if kind == "edit":
            return weft.edit(folders["edit"], FACTS, name, threads=1, **NEEDS.get(name, {}), **options)
        return weft.tune(folder, ROWS, method=name, objective="classification", steps=3, batch_size=4, threads=1, progress=lambda event: None, **options)

    return make


ALL = [*(("space", name) for name in SPACES), *(("merge", name) for name in MERGES), *(("edit", name) for name in EDITS), *(("port", name) for name in PORTS)]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_the_same_inputs_give_the_same_id(makes: Any, kind: str, name: str) -> None:
    assert makes(kind, name).id == makes(kind, name).id


@pytest.mark.parametrize("name", MERGES)
def test_merges_do_not_depend_on_threads_or_blocks(makes: Any, name: str, tmp_path: Path) -> None:
    makes("merge", name, out=tmp_path / "1.safetensors", threads=1, block=64)
    makes("merge", name, out=tmp_path / "2.safetensors", threads=2, block=1000)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_other_verb_takes_the_result(
    makes: Any, folders: dict[str, Path], kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = folders[kind], tmp_path / "made.safetensors"
    made = makes(kind, name, out=path)
    delta = Delta.load(path)
    assert delta.id == made.id and (delta.recipe["verb"], delta.recipe["method"]) == ("tune" if kind == "space" else kind, name)
    base = Base.open(folder)
    for command in (["show", path], ["verify", path, "--base", folder], ["fold", folder, path, "-o", tmp_path / "folded"]):
        capsys.readouterr()
        assert main([str(part) for part in (*command, "--format", "json")]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)
    again = weft.merge([delta, delta], base, "task-arithmetic", weights=[0.5, 0.5])
    exact = weft.diff(base, Base.open(tmp_path / "folded"))
    for target in delta.entries:
        added = target not in base.tensors
        w = np.zeros(delta.entries[target].shape, np.float32) if added else base.tensor(target).read().astype(np.float32)
        np.testing.assert_allclose(again.apply(target, w), delta.apply(target, w), atol=1e-5)
        assert bits(exact.apply(target, w) if target in exact.entries else w) == bits(delta.apply(target, w)), "diff of the fold"
    model = base.model([delta])
    before = {key: bits(value) for key, value in model.state_dict().items()}
    weft.attach(model, delta, base=base)
    folded = Base.open(tmp_path / "folded").model().state_dict()
    for key, value in model.state_dict().items():
        assert bits(value) == bits(folded[key]), "attached is not folded"
    weft.detach(model)
    assert before == {key: bits(value) for key, value in model.state_dict().items()}
