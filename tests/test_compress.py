"""Compressing: what holds for every method, the account of what was lost, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weft
from tests import tiny
from tests.conftest import bits
from tests.test_merge import SHAPES, base_values, tuned_values, write_checkpoint
from weft import methods
from weft.base import Base
from weft.cli import main
from weft.codes import Coded
from weft.delta import Builder, Delta
from weft.errors import InputError, MismatchError, UsageError, WeftError
from weft.folding import fold

METHODS = methods.names("compress")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with a tokenizer, a LoRA on it, a tuned copy of it, and the difference of the two."""
    root = tmp_path_factory.mktemp("compress")
    base = tiny.bert(root / "base")
    tiny.lowrank(base, root / "lora.safetensors", seed=1)
    tuned = {name: tensor.read() for name, tensor in Base.open(base).tensors.items()}
    rng = np.random.default_rng(4)
    for name, x in tuned.items():
        if x.dtype == np.float32:
            tuned[name] = x + 0.05 * rng.standard_normal(x.shape, np.float32)
    shutil.copytree(base, root / "tuned")
    write_checkpoint(root / "values", tuned)
    shutil.copy(root / "values" / "model.safetensors", root / "tuned" / "model.safetensors")
    weft.diff(Base.open(base), Base.open(root / "tuned"), "dense").save(root / "dense.safetensors")
    weft.diff(Base.open(base), Base.open(root / "tuned")).save(root / "exact.safetensors")
    return {name: root / name for name in ("base", "tuned", "lora.safetensors", "dense.safetensors", "exact.safetensors")}


OPTIONS: dict[str, dict[str, Any]] = {"truncate": {"rank": 4}}
"""What a method needs to do anything to matrices this small."""


def fitting(places: dict[str, Path], method: str) -> Path:
    """An update that the method is for."""
    return places["exact.safetensors" if method == "lossless" else "dense.safetensors"]


# --- every method


@pytest.mark.parametrize("method", METHODS)
def test_the_same_inputs_give_the_same_bytes(places: dict[str, Path], method: str, tmp_path: Path) -> None:
    for number, threads in enumerate((1, 1, 3)):
        weft.compress(fitting(places, method), method, places["base"], out=tmp_path / f"{number}.safetensors", threads=threads, **OPTIONS.get(method, {}))
    files = [(tmp_path / f"{number}.safetensors").read_bytes() for number in range(3)]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("method", METHODS)
def test_every_other_verb_takes_the_result(places: dict[str, Path], method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, base, path = fitting(places, method), Base.open(places["base"]), tmp_path / "small.safetensors"
    small = weft.compress(given, method, base, out=path, **OPTIONS.get(method, {}))
    assert small.nbytes < Delta.load(given).nbytes and (small.recipe["verb"], small.recipe["method"]) == ("compress", method)
    for command in (["show", path], ["verify", path, "--base", places["base"]], ["fold", places["base"], path, "-o", tmp_path / "folded"]):
        capsys.readouterr()
        assert main([str(part) for part in (*command, "--format", "json")]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)
    folded = Base.open(tmp_path / "folded")
    plain = decoded(small)
    fold(base, [plain], tmp_path / "plain")
    for name, tensor in Base.open(tmp_path / "plain").tensors.items():
        assert tensor.sha256 == folded.tensors[name].sha256, "stored coded, or with the same numbers as they are"
    merged = weft.merge([small, small], base, "task-arithmetic", weights=[0.5, 0.5], into=tmp_path / "merged")
    assert merged.lost == fold(base, [small], tmp_path / "again").lost
    if method != "lossless":
        half = (0.5 * small).then(0.5 * small)
        for name in small.entries:
            w = base.tensor(name).read()
            np.testing.assert_allclose(half.apply(name, w), small.apply(name, w), atol=1e-5)
    model = base.model([small])
    before = {key: bits(value) for key, value in model.state_dict().items()}
    weft.attach(model, small, base=base)
    after = folded.model().state_dict()
    assert all(bits(value) == bits(after[key]) for key, value in model.state_dict().items()), "attached is not folded"
    weft.detach(model)
    assert before == {key: bits(value) for key, value in model.state_dict().items()}


def decoded(delta: Delta) -> Delta:
    """The same delta with its tensors stored as they are."""
    from weft.stored import hold

    return replace(delta, tensors={key: hold(tensor.read()) for key, tensor in delta.tensors.items()})


@pytest.mark.parametrize("method", METHODS)
def test_what_it_keeps_of_the_delta(places: dict[str, Path], method: str) -> None:
    given = Delta.load(fitting(places, method))
    first = replace(given, config={"id2label": {"0": "no"}}, notes={"title": "mine"}, over=("ab" * 32,))
    made = weft.compress(first, method, places["base"], **OPTIONS.get(method, {}))
    assert (made.base, made.over, made.config, made.tied, made.quantisation) == (first.base, first.over, first.config, first.tied, first.quantisation)
    assert made.parents == (first.id,) and set(made.entries) == set(first.entries) and made.path is None
    assert set(made.recipe) == {"verb", "method", "config", "inputs"} and made.recipe["inputs"] == [{"delta": first.id}] and set(made.notes) == {"summary"}


@pytest.mark.parametrize("method", METHODS)
def test_no_torch(places: dict[str, Path], method: str, tmp_path: Path) -> None:
    words = ["compress", fitting(places, method), "--method", method, "--base", places["base"], "-o", tmp_path / "out.safetensors"]
    words += [word for key, value in OPTIONS.get(method, {}).items() for word in ("-p", f"{key}={value}")]
    code = "import sys; from weft.cli import main; code = main(sys.argv[1:]); print(*sys.modules, sep='\\n', file=sys.stderr); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not {"torch", "transformers", "rich"} & set(done.stderr.split("\n"))


# --- the account


def test_the_summary_is_what_a_direct_comparison_says(tmp_path: Path) -> None:
    """dense, sparse and low rank, on its own and behind another op; from the increments as `apply` gives them."""
    rng = np.random.default_rng(6)
    start = {"d": rng.standard_normal((40, 30)), "s": rng.standard_normal((20, 10)), "l": rng.standard_normal((24, 18)), "m": rng.standard_normal((9, 8))}
    base = write_checkpoint(tmp_path / "base", {name: x.astype(np.float32) for name, x in start.items()})
    build = Builder(base)
    build.put("d", "dense", {"values": rng.standard_normal((40, 30), np.float32)}, scale=-2.5)
    build.put("s", "sparse", {"index": np.arange(0, 200, 3), "values": rng.standard_normal(67, np.float32)})
    for _ in range(2):
        build.put("l", "lowrank", {"A": rng.standard_normal((3, 18), np.float32), "B": rng.standard_normal((24, 3), np.float32)}, scale=0.7)
    build.put("m", "dense", {"values": rng.standard_normal((9, 8), np.float32)})
    build.put("m", "magnitude", {"m": rng.random(9, np.float32) + 0.5})
    delta = build.done()
    made = weft.compress(delta, "compeft", base, density=0.3)
    summary: Any = made.notes["summary"]
    moved = whole = 0.0
    for name, x in start.items():
        w = x.astype(np.float32)
        was, now = (each.apply(name, w).astype(np.float64) - w for each in (delta, made))
        moved, whole = moved + ((now - was) ** 2).sum(), whole + (was**2).sum()
        assert summary["tensors"][name]["error"] == pytest.approx(np.sqrt(((now - was) ** 2).sum() / (was**2).sum()), rel=2e-4), name
        if name != "l":
            assert (summary["tensors"][name]["entries"], summary["tensors"][name]["kept"]) == (w.size, np.count_nonzero(now)) or name == "s"
    assert summary["error"] == pytest.approx(np.sqrt(moved / whole), rel=2e-4)
    factors = [key for key in made.tensors if key.startswith("l//")]
    assert summary["tensors"]["l"]["entries"] == sum(prod(made.tensors[key].shape) for key in factors) == 2 * 3 * (18 + 24)
    assert summary["tensors"]["l"]["kept"] == sum(np.count_nonzero(made.get(key)) for key in factors)
    assert (summary["before"], summary["after"]) == (delta.nbytes, made.nbytes) and summary["ratio"] == pytest.approx(delta.nbytes / made.nbytes, rel=1e-3)


def test_without_the_base_what_depends_on_it_is_left_out_of_the_account(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    base = write_checkpoint(tmp_path / "base", {"m": rng.standard_normal((9, 8)).astype(np.float32)})
    build = Builder(base)
    build.put("m", "dense", {"values": rng.standard_normal((9, 8), np.float32)})
    build.put("m", "magnitude", {"m": rng.random(9, np.float32) + 0.5})
    summary: Any = weft.compress(build.done(), "compeft").notes["summary"]
    assert summary["error"] is None and summary["tensors"] == {} and summary["after"] < summary["before"]


def test_a_checkpoint_is_measured_against_its_own_bytes(tmp_path: Path) -> None:
    """Not against its increments as float32, which nobody ever had."""
    start = base_values()
    base, tuned = write_checkpoint(tmp_path / "base", start, shards=2), write_checkpoint(tmp_path / "tuned", tuned_values(start, 1), shards=3)
    made = weft.compress(tmp_path / "tuned", "compeft", tmp_path / "base")
    summary: Any = made.notes["summary"]
    assert summary["before"] == sum(tuned.tensors[name].nbytes for name in SHAPES if name != "unchanged.weight")
    assert made.parents == () and made.recipe["inputs"] == [{"checkpoint": tuned.fingerprint}] and made.base == base.fingerprint


def test_tensors_that_only_a_checkpoint_has_or_lacks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = base_values()
    tuned = tuned_values(start, 1)
    del tuned["norm.weight"]
    tuned["head.weight"] = np.ones((3, 6), np.float32)
    tuned["embed.weight"] = np.ones((15, 6), np.float32)
    write_checkpoint(tmp_path / "base", start)
    write_checkpoint(tmp_path / "tuned", tuned)
    path = tmp_path / "small.safetensors"
    assert main(["compress", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "-o", str(path)]) == 0
    assert "stored as they are: 1 added, 1 removed, 1 replaced" in capsys.readouterr().out
    made = Delta.load(path)
    assert not isinstance(made.tensors["head.weight//0.values"], Coded) and not isinstance(made.tensors["embed.weight//0.values"], Coded)
    fold(Base.open(tmp_path / "base"), [made], tmp_path / "folded")
    folded = Base.open(tmp_path / "folded")
    assert bits(folded.tensor("embed.weight").read()) == bits(tuned["embed.weight"]) and "norm.weight" not in folded.tensors


def test_a_larger_result_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": np.zeros((1,), np.float32)})
    build = Builder(base)
    build.put("w", "dense", {"values": np.array([3], np.float32)})
    build.put("w", "dense", {"values": np.array([1], np.float32)})
    build.done().save(tmp_path / "delta.safetensors")
    assert main(["compress", str(tmp_path / "delta.safetensors"), "--method", "compeft", "-o", str(tmp_path / "out.safetensors")]) == 0
    assert "NOT smaller than before (8 bytes)" in capsys.readouterr().out


def test_an_update_of_which_nothing_is_stored_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Factors of a zero update, and a checkpoint that only has a second copy of a tensor."""
    w = np.random.default_rng(1).standard_normal((9, 8), np.float32)
    base = write_checkpoint(tmp_path / "base", {"w": w})
    write_checkpoint(tmp_path / "tuned", {"w": w, "again": w})
    build = Builder(base)
    build.put("w", "lowrank", {"A": w[:2], "B": np.zeros((9, 2), np.float32)})
    build.done().save(tmp_path / "zero.safetensors")
    out = str(tmp_path / "out.safetensors")
    assert main(["compress", str(tmp_path / "zero.safetensors"), "--method", "truncate", "-o", out]) == 0
    assert "nothing is stored of what was there before (136 bytes); its increments are zero" in capsys.readouterr().out
    assert main(["compress", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "-o", out]) == 0
    assert "nothing is stored of what was there before (288 bytes); the error of its increments is not known\n" in capsys.readouterr().out


def test_the_increments_of_a_checkpoint_are_not_hashed(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """That would be one more walk over two checkpoints, for an id that nobody asks for."""
    from weft import diffing

    monkeypatch.setattr(diffing._Dense, "sha256", property(lambda self: pytest.fail("hashed")))
    assert weft.compress(places["tuned"], "compeft", places["base"]).nbytes


def test_the_command_line(places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.safetensors"
    words = ["compress", str(places["dense.safetensors"]), "-p", "density=0.05", "-p", "trim=tensor", "-o", str(path)]
    assert main([*words, "--format", "json"]) == 0
    record = json.loads(capsys.readouterr().out)
    small = Delta.load(path)
    assert (record["id"], record["method"], record["nbytes"]) == (small.id, "compeft", small.nbytes) and record["notes"]["summary"]["after"] == small.nbytes
    assert small.recipe["config"] == {"density": 0.05, "trim": "tensor", "alpha": 1, "scale": "std", "form": "golomb"}
    assert main(words) == 0
    said = capsys.readouterr()
    assert "times smaller than before" in said.out and "relative error" in said.out and f"weft eval BASE {path}" in said.err
    assert main(["show", str(path)]) == 0
    assert "as ternary" in capsys.readouterr().out


def test_a_coded_delta_is_shown_without_numpy(places: dict[str, Path], tmp_path: Path) -> None:
    weft.compress(places["lora.safetensors"], "compeft", out=tmp_path / "small.safetensors")
    code = "import sys; from weft.cli import main; code = main(sys.argv[1:]); print(*sys.modules, sep='\\n', file=sys.stderr); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, "show", str(tmp_path / "small.safetensors")], capture_output=True, text=True)
    assert done.returncode == 0 and not {"numpy", "torch"} & set(done.stderr.split("\n"))


# --- refused before anything is written


def test_wrong_use(places: dict[str, Path], tmp_path: Path) -> None:
    delta, out = places["dense.safetensors"], tmp_path / "out.safetensors"
    for said, error, call in [
        ("did you mean 'compeft'", UsageError, lambda: weft.compress(delta, "compef")),
        ("densty", UsageError, lambda: weft.compress(delta, densty=0.1, out=out)),
        ("density", UsageError, lambda: weft.compress(delta, density=0.0, out=out)),
        ("threads must be at least 1", UsageError, lambda: weft.compress(delta, threads=0, out=out)),
        ("is a checkpoint", UsageError, lambda: weft.compress(places["tuned"], out=out)),
        ("one .safetensors file", InputError, lambda: weft.compress(delta, out=tmp_path / "out")),
        ("does not exist", InputError, lambda: weft.compress(delta, out=tmp_path / "no" / "out.safetensors")),
        ("identical", MismatchError, lambda: weft.compress(places["base"], base=places["base"], out=out)),
    ]:
        with pytest.raises(error, match=said):
            call()
    assert not list(tmp_path.iterdir())


def test_another_base(places: dict[str, Path], tmp_path: Path) -> None:
    tiny.bert(tmp_path / "other", seed=5)
    with pytest.raises(MismatchError, match="was made for base"):
        weft.compress(places["dense.safetensors"], base=tmp_path / "other", out=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_to_compress(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": np.zeros((4, 4), np.float32), "ids": np.arange(4)})
    build = Builder(base)
    build.put("w", "magnitude", {"m": np.ones(4, np.float32)})
    build.put("ids", "assign", {"values": np.arange(4)[::-1].copy()})
    with pytest.raises(MismatchError, match="compeft finds nothing to compress"):
        weft.compress(build.done(), "compeft")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_named(places: dict[str, Path], tmp_path: Path, bad: float) -> None:
    delta = Delta.load(places["dense.safetensors"])
    key = sorted(delta.tensors)[3]
    values = delta.get(key).copy()
    values.reshape(-1)[5] = bad
    build = Builder(Base.open(places["base"]))
    build.put(key.split("//")[0], "dense", {"values": values})
    with pytest.raises(InputError, match=r"1 NaN or infinite entries") as caught:
        weft.compress(build.done(), "compeft", out=tmp_path / "out.safetensors")
    assert key in caught.value.message and not list(tmp_path.iterdir())


def test_a_nan_in_what_is_left_as_it_is_is_named_too(tmp_path: Path) -> None:
    build = Builder(write_checkpoint(tmp_path / "base", {"w": np.zeros((4, 4), np.float32), "norm": np.zeros(4, np.float32)}))
    build.put("w", "dense", {"values": np.ones((4, 4), np.float32)})
    build.put("norm", "dense", {"values": np.full(4, np.nan, np.float32)})
    with pytest.raises(InputError, match="norm: its increment is NaN, infinite or too large"):
        weft.compress(build.done(), "bitdelta", out=tmp_path / "out.safetensors")


def test_a_checkpoint_with_a_nan(tmp_path: Path) -> None:
    start = base_values()
    tuned = tuned_values(start, 1)
    tuned["embed.weight"][3, 2] = np.nan
    write_checkpoint(tmp_path / "base", start)
    write_checkpoint(tmp_path / "tuned", tuned)
    with pytest.raises(MismatchError, match=r"embed\.weight.*no finite increment"):
        weft.compress(tmp_path / "tuned", "compeft", tmp_path / "base")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, **how: Any) -> None:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115

        def seek(self, position: int) -> None:
            self.file.seek(position)

        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            self.file.close()

    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", Full)
    with pytest.raises(WeftError, match=r"cannot keep coded data in .*: No space left on device") as caught:
        weft.compress(places["dense.safetensors"], "compeft", out=tmp_path / "out.safetensors")
    assert "TMPDIR" in caught.value.hint and not list(tmp_path.iterdir())


def test_over_other_deltas(places: dict[str, Path], tmp_path: Path) -> None:
    """An update made over another is compressed as it is; the account needs `on` only where its increments depend on the other."""
    base = Base.open(places["base"])
    first = Delta.load(places["lora.safetensors"])
    name = next(iter(first.entries))
    build = Builder(base)
    build.put(name, "dense", {"values": np.full(first.entries[name].shape, 0.5, np.float32) * np.arange(first.entries[name].shape[1])})
    build.put(name, "magnitude", {"m": np.ones(first.entries[name].shape[0], np.float32)})
    second = build.done(over=(first.id,))
    alone: Any = weft.compress(second, "compeft", base)
    both: Any = weft.compress(second, "compeft", base, on=[first])
    assert alone.over == both.over == (first.id,) and alone.id == both.id
    assert alone.notes["summary"]["tensors"] == {}
    w = base.tensor(name).read()
    start = first.apply(name, w)
    was, now = (each.apply(name, start).astype(np.float64) - start for each in (second, both))
    assert both.notes["summary"]["error"] == pytest.approx(np.linalg.norm(now - was) / np.linalg.norm(was), rel=2e-4)
