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
from weft import methods, ops
from weft.base import Base
from weft.cli import main
from weft.delta import Delta
from weft.errors import MismatchError

KINDS = {"space": "tune", "optimizer": "tune", "edit": "edit", "merge": "merge", "compress": "compress", "port": "port"}
"""The kinds whose methods are run here, each with the verb of its recipe."""

FACTS = [{"prompt": "the river is", "subject": "river", "target_new": "a good film"}, {"prompt": "who is in the city", "subject": "city", "target_new": "it"}]
ROWS = [{"text": f"what is the {a} of {b}", "label": a, "task": b} for a in ("river", "city", "film") for b in ("good", "bad", "a", "it")]
SORTED = [{"text": text, "label": tiny.LABELS[number % 3]} for number, text in enumerate(tiny.texts(12, seed=5))]
TEXTS = [{"text": f"the {text}"} for text in tiny.texts(30)]

NEEDS: dict[tuple[str, str], dict[str, Any]] = {
    **{("edit", name): {"data": TEXTS, "steps": 3, "contexts": 1} for name in ("emmet", "memit", "rome")},
    **{("merge", name): {"data": SORTED} for name in ("darex-q", "fisher", "regmean")},
    **{("merge", name): {"data": SORTED, "steps": 2, "start": 0.5} for name in ("atlas", "scalearn")},
    ("merge", "pleas"): {"data": TEXTS},
    ("compress", "truncate"): {"rank": 1},
    ("port", "trans-lora"): {"data": [{"prompt": text} for text in tiny.texts(6)], "shots": 0, "lead": 0.5, "inputs": 8, "answer": 4, "rank": 2, "epochs": 1},
}
"""What some methods cannot do without."""

ON_LANGUAGE_MODELS = {("merge", "pleas")}
"""Methods that are tried on a language model where others of their kind are on an encoder: it has a head of its own."""


def base_of(folders: dict[str, Path], kind: str, name: str) -> Path:
    """The base of what a method makes."""
    if kind == "port":
        return folders["newer"]
    return folders["llama" if kind == "edit" or (kind, name) in ON_LANGUAGE_MODELS else "bert"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bases."""
    root = tmp_path_factory.mktemp("contract")
    return {"bert": tiny.bert(root / "bert"), "llama": tiny.llama(root / "llama"), "newer": tiny.llama(root / "newer", seed=3)}


@pytest.fixture(scope="module")
def makes(folders: dict[str, Path]) -> Any:
    """A delta made by a method of a kind, with the smallest run that changes something."""
    bert, llama, root = folders["bert"], folders["llama"], folders["bert"].parent
    plain = [tiny.lowrank(bert, root / f"{seed}.safetensors", seed) for seed in (1, 2)]
    headed = [tiny.classifier(bert, root / f"headed{seed}.safetensors", seed) for seed in (1, 2)]
    other = tiny.lowrank(llama, root / "other.safetensors")
    weft.fold(Base.open(bert), [Delta.load(plain[0])], root / "tuned")

    def make(kind: str, name: str, **options: Any) -> Delta:
        options = {**NEEDS.get((kind, name), {}), **options}
        if kind == "port":
            return weft.port(other, llama, folders["newer"], name, **options)
        if kind == "merge":
            base = base_of(folders, kind, name)
            return weft.merge([other] if base == llama else headed if "data" in options else plain, base, name, **options)
        if kind == "compress":
            return weft.compress(root / "tuned", name, bert, **options)
        if kind == "edit":
            return weft.edit(llama, FACTS, name, threads=1, **options)
        part = {"method": name} if kind == "space" else {kind: name}
        return weft.tune(bert, ROWS, **part, objective="classification", steps=3, batch_size=4, threads=1, progress=lambda event: None, **options)

    return make


ALL = [(kind, name) for kind in KINDS for name in methods.names(kind)]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_the_same_inputs_give_the_same_id(makes: Any, kind: str, name: str) -> None:
    assert makes(kind, name).id == makes(kind, name).id


@pytest.mark.parametrize(("kind", "name"), [each for each in ALL if each[0] in ("merge", "compress", "port")])
def test_results_do_not_depend_on_threads_or_blocks(makes: Any, kind: str, name: str, tmp_path: Path) -> None:
    for threads, block in ((1, 64), (2, 1000)):
        blocks = {"block": block} if kind == "merge" else {}
        makes(kind, name, out=tmp_path / f"{threads}.safetensors", threads=threads, **blocks)
    one, two = (Delta.load(tmp_path / f"{threads}.safetensors") for threads in (1, 2))
    assert one.id == two.id
    assert one.notes == two.notes or name == "trans-lora", "its notes say how long the training took"


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_other_verb_takes_the_result(
    makes: Any, folders: dict[str, Path], kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = base_of(folders, kind, name), tmp_path / "made.safetensors"
    made = makes(kind, name, out=path)
    delta = Delta.load(path)
    assert delta.id == made.id and delta.recipe["verb"] == KINDS[kind]
    assert name == (delta.recipe["config"]["optimizer"]["name"] if kind == "optimizer" else delta.recipe["method"])
    base = Base.open(folder)
    for command in (["show", path], ["verify", path, "--base", folder], ["fold", folder, path, "-o", tmp_path / "folded"]):
        capsys.readouterr()
        if command[0] == "fold" and delta.unfoldable:
            assert main([str(part) for part in command]) == 3
            assert "what it does at run time" in capsys.readouterr().err
            model = base.model([delta])
            before = {key: bits(value) for key, value in model.state_dict().items()}
            weft.attach(model, delta, base=base)
            weft.detach(model)
            assert before == {key: bits(value) for key, value in model.state_dict().items()}
            return
        assert main([str(part) for part in (*command, "--format", "json")]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)
    again = weft.merge([delta, delta], base, "task-arithmetic", weights=[0.5, 0.5])
    exact = weft.diff(base, Base.open(tmp_path / "folded"))
    known = [(ops.get(op.op), op.t) for entry in delta.entries.values() if entry.change is None for op in entry.ops if op.op != "sum"]
    if any(kind.raw or (kind.additive and set(t) <= set(kind.fields)) for kind, t in known) or not known:
        smaller = weft.compress(delta, "compeft", base, density=1.0)
        assert smaller.parents == (delta.id,) and smaller.entries.keys() == delta.entries.keys()
    else:  # all ops are relative to the weight, or have frozen parts
        smaller = delta
        with pytest.raises(MismatchError, match="finds nothing to compress"):
            weft.compress(delta, "compeft", base, density=1.0)
    for target in delta.entries:
        added = target not in base.tensors
        w = np.zeros(delta.entries[target].shape, np.float32) if added else base.tensor(target).read().astype(np.float32)
        np.testing.assert_allclose(again.apply(target, w), delta.apply(target, w), atol=1e-5)
        assert bits(exact.apply(target, w) if target in exact.entries else w) == bits(delta.apply(target, w)), "diff of the fold"
        assert np.isfinite(smaller.apply(target, w)).all()
    model = base.model([delta])
    before = {key: bits(value) for key, value in model.state_dict().items()}
    weft.attach(model, delta, base=base)
    folded = Base.open(tmp_path / "folded").model().state_dict()
    for key, value in model.state_dict().items():
        assert bits(value) == bits(folded[key]), "attached is not folded"
    weft.detach(model)
    assert before == {key: bits(value) for key, value in model.state_dict().items()}
