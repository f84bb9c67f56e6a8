"""What goes wrong in merging, compressing and porting: one clear message and exit code for each, nothing written, nothing left behind.

What is not refused is reported, or works as it is documented (other float dtypes, a layer that only one checkpoint has).
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weft
from tests.test_merge import write_checkpoint
from weft.base import Base
from weft.cli import main
from weft.delta import Builder, Delta

ROWS = 32000
VERBS = ("merge -o", "merge --into", "compress", "port")
MERGES = VERBS[:2]
LAYER = "layers.1.up.weight"

Tensors = dict[str, np.ndarray]


def values(seed: int, like: Tensors | None = None, rows: int = ROWS, dtype: Any = np.float32) -> Tensors:
    """A model of two layers, near `like` if that is given; its token embedding is by far the largest tensor (of 256 kB in bf16)."""
    rng = np.random.default_rng(seed)
    shapes = {"embed_tokens.weight": (rows, 4), "norm.weight": (4,)} | {
        f"layers.{k}.{w}.weight": s for k in (0, 1) for w, s in (("up", (6, 4)), ("down", (4, 6)))
    }
    made = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    near = {name: value if like is None else like[name].astype(np.float64) + 0.1 * value for name, value in made.items()}
    return {name: value.astype(dtype) for name, value in near.items()}


@pytest.fixture
def start() -> Tensors:
    return values(0)


@pytest.fixture
def place(tmp_path: Path, start: Tensors) -> Path:
    """A folder with a base, a newer base, and a checkpoint `good` tuned from the first."""
    for name, seed in (("new", 1), ("good", 2)):
        write_checkpoint(tmp_path / name, values(seed, start))
    write_checkpoint(tmp_path / "base", start)
    return tmp_path


def command(verb: str, given: str = "bad", *more: str, to: str = "new", out: str = "") -> list[str]:
    """The command line, in `place`, that gives `verb` an update."""
    made = out or ("made" if verb == "merge --into" else "made.safetensors")
    return {
        "merge -o": ["merge", "good", given, "--base", "base", *more, "-o", made],
        "merge --into": ["merge", "good", given, "--base", "base", *more, "--into", made],
        "compress": ["compress", given, "--base", "base", *more, "-o", made],
        "port": ["port", given, "--from", "base", "--to", to, "--no-predict", *more, "-o", made],
    }[verb]


@pytest.fixture
def refused(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command that must fail: returns its one message. Every file must be as before."""
    monkeypatch.chdir(place)

    def run(argv: list[str], code: int) -> str:
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
        capfd.readouterr()
        assert main([*argv, "--format", "json"]) == code, capfd.readouterr().err
        said = capfd.readouterr()
        (line,) = said.err.splitlines()
        error = json.loads(line)["error"]
        assert said.out == "" and error["exit_code"] == code
        assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
        return str(error["message"])

    return run


# --- parts that do not belong together


@pytest.mark.parametrize("verb", MERGES)
def test_another_vocabulary_cannot_be_merged(place: Path, refused: Any, verb: str) -> None:
    write_checkpoint(place / "bad", values(3, rows=ROWS + 1))
    said = refused(command(verb), 3)
    assert said.endswith("\n  - bad: tensor 'embed_tokens.weight': expected F32 [32000, 4], got F32 [32001, 4]")


def test_another_vocabulary_in_a_compressed_update_is_reported(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    write_checkpoint(place / "bad", values(3, rows=ROWS + 1))
    assert main(command("compress")) == 0
    assert "1 replaced" in capsys.readouterr().out
    assert weft.Delta.load(place / "made.safetensors").entries["embed_tokens.weight"].shape == (ROWS + 1, 4)


def test_another_vocabulary_without_its_tokens_cannot_be_ported(place: Path, refused: Any) -> None:
    write_checkpoint(place / "wider", values(3, rows=ROWS + 1))
    said = refused(command("port", "good", to="wider"), 3)
    assert said.startswith("1 of the 6 tensors that the update changes cannot be carried to wider")
    assert "embed_tokens.weight: it has 32000 rows, the target's 32001, and without both tokenizers" in said


@pytest.mark.parametrize("verb", MERGES)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_missing_layer_cannot_be_merged(place: Path, refused: Any, start: Tensors, verb: str, method: str) -> None:
    tuned = values(3, start)
    del tuned[LAYER]
    write_checkpoint(place / "bad", tuned)
    assert refused(command(verb, "bad", "--method", method), 3).endswith(f"\n  - bad: tensor {LAYER!r} of the base is missing")


def test_a_missing_layer_in_a_compressed_update_is_removed_and_reported(place: Path, start: Tensors) -> None:
    tuned = values(3, start)
    del tuned[LAYER]
    write_checkpoint(place / "bad", tuned)
    made = weft.compress(place / "bad", "compeft", place / "base")
    assert made.notes["summary"]["changes"] == {"remove": 1}
    weft.fold(Base.open(place / "base"), [made], place / "folded")
    assert set(Base.open(place / "folded").tensors) == set(tuned)


def test_a_missing_layer_of_the_target_cannot_be_ported_to(place: Path, refused: Any) -> None:
    tuned = values(3)
    del tuned[LAYER]
    write_checkpoint(place / "shorter", tuned)
    assert f"- {LAYER}: the target has no tensor {LAYER!r}" in refused(command("port", "good", to="shorter"), 3)


def test_other_float_dtypes_are_merged_in_float32_and_the_result_has_the_dtypes_of_the_base(place: Path, start: Tensors) -> None:
    tuned = [values(seed, start, dtype=dtype) for seed, dtype in ((3, np.float16), (4, ml_dtypes.bfloat16), (5, np.float32))]
    folders = [write_checkpoint(place / f"tuned{number}", each) for number, each in enumerate(tuned)]
    weft.merge(folders, place / "base", "linear", into=place / "made")
    for name, tensor in Base.open(place / "made").tensors.items():
        total = np.zeros_like(start[name])
        for each in tuned:
            total += (each[name].astype(np.float32) - start[name]) * np.float32(1 / 3)
        assert tensor.dtype == "F32" and tensor.read().tobytes() == (start[name] + total).tobytes()


@pytest.mark.parametrize("verb", MERGES)
def test_a_tensor_of_integers_where_the_base_has_floats_cannot_be_merged(place: Path, refused: Any, start: Tensors, verb: str) -> None:
    write_checkpoint(place / "bad", {**values(3, start), LAYER: np.ones((6, 4), np.int32)})
    assert refused(command(verb), 3).endswith(f"\n  - bad: tensor {LAYER!r}: expected F32 [6, 4], got I32 [6, 4]")


@pytest.mark.parametrize("verb", VERBS)
def test_a_delta_of_another_base(place: Path, refused: Any, verb: str) -> None:
    weft.diff(Base.open(place / "new"), Base.open(place / "good"), "dense").save(place / "bad.safetensors")
    assert "was made for base " in refused(command(verb, "bad.safetensors"), 3)


def test_deltas_of_two_bases(place: Path, refused: Any) -> None:
    for name in ("base", "new"):
        weft.diff(Base.open(place / name), Base.open(place / "good"), "dense").save(place / f"of-{name}.safetensors")
    said = refused(["merge", "of-base.safetensors", "of-new.safetensors", "-o", "made.safetensors"], 3)
    assert "the deltas were made for different bases: of-base.safetensors for " in said


# --- numbers that are none


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("verb", VERBS)
def test_a_checkpoint_with_a_number_that_is_none(place: Path, refused: Any, start: Tensors, verb: str, bad: float) -> None:
    tuned = values(3, start)
    tuned[LAYER][2, 1] = bad
    write_checkpoint(place / "bad", tuned)
    said = refused(command(verb), 3)
    assert said.startswith(f"bad: tensor {LAYER!r}: ") and ("NaN or infinite at 1 entries" in said or "no finite increment" in said)


@pytest.mark.parametrize("method", ["linear", "ties", "dare", "model-stock", "opcm"])
def test_a_nan_is_found_by_methods_of_every_kind(place: Path, refused: Any, start: Tensors, method: str) -> None:
    tuned = values(3, start)
    tuned[LAYER][2, 1] = np.nan
    write_checkpoint(place / "bad", tuned)
    assert refused(command("merge -o", "bad", "--method", method), 3).startswith(f"bad: tensor {LAYER!r}: the increment is NaN or infinite")


@pytest.mark.parametrize("op", ["lowrank", "sparse"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_nan_in_a_delta_whose_ops_would_be_kept(place: Path, refused: Any, verb: str, op: str) -> None:
    """Nothing is computed when low rank stays low rank, and yet the NaN is seen."""
    for name, value in (("good", 1.0), ("bad", np.nan)):
        numbers = np.array([[1, value, 2, 3]], np.float32)
        fields = {"A": numbers, "B": np.ones((6, 1), np.float32)} if op == "lowrank" else {"index": np.array([1, 5, 6, 9]), "values": numbers[0]}
        build = Builder(Base.open(place / "base"))
        build.put(LAYER, op, fields)
        build.done().save(place / f"{name}.safetensors")
    argv = ["good.safetensors" if word == "good" else word for word in command(verb, "bad.safetensors")]
    said = refused(argv, 3)
    assert f"tensor '{LAYER}" in said and "1 NaN or infinite entries" in said
    assert verb == "compress" or said.startswith("bad.safetensors: ")


# --- a full disk


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_is_too_small_is_known_before_the_first_byte(place: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    free = 8_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - free, free))

    def never(*_: Any) -> None:
        raise AssertionError("something was written")

    monkeypatch.setattr(os, "pwrite", never)
    said = refused(command(verb, "good"), 4)
    assert said.startswith("cannot write made") and "8,000 are free; nothing was changed" in said


@contextmanager
def short_files(most: int) -> Iterator[None]:
    """The system refuses to write beyond byte `most` of any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("verb", VERBS)
def test_the_system_refuses_a_write_half_way(place: Path, refused: Any, verb: str) -> None:
    before = (place / "base" / "model.safetensors").stat().st_size
    with short_files(8_000):
        said = refused(command(verb, "good"), 4)
    assert said.startswith("cannot write made") and "File too large" in said and "nothing was changed" in said
    assert (place / "base" / "model.safetensors").stat().st_size == before


_ON_A_SMALL_DISK = """
import os, shutil, sys
shutil.disk_usage = lambda _: shutil._ntuple_diskusage(2**40, 0, 2**40)  # others fill the disk after weft has asked
from weft.cli import main
code = main(sys.argv[1:])
print(code, os.listdir("disk"))
"""


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_fills_up_on_the_way(place: Path, verb: str) -> None:
    """A real disk of 8 kB, in a name space of the process's own."""
    (place / "disk").mkdir()
    mount = 'mount -t tmpfs -o size=8k none disk && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount, "sh", "true"], cwd=place, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a disk")
    out = "disk/made" if verb == "merge --into" else "disk/made.safetensors"
    argv = [*command(verb, "good", out=out), "--format", "json"]
    done = subprocess.run([*inside, mount, "sh", sys.executable, "-c", _ON_A_SMALL_DISK, *argv], cwd=place, capture_output=True, text=True, timeout=60)
    assert done.stdout == "4 []\n", done.stderr
    (line,) = done.stderr.splitlines()
    said = json.loads(line)["error"]["message"]
    assert said.startswith("cannot write disk/made") and "No space left on device" in said and "nothing was changed" in said


def test_a_result_that_stands_is_kept_when_the_disk_is_full(place: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert main(command("merge -o", "good")) == 0
    first = Delta.load(place / "made.safetensors").id
    with short_files(8_000):
        refused(command("merge -o", "good", "--weights", "2,3"), 4)
    assert Delta.load(place / "made.safetensors").id == first
