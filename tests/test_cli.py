"""The command line: exit codes, formats, messages, what is imported; every command once, on models made on the spot."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from weft import Base, Builder, Delta
from weft.cli import main
from weft.cli.app import COMMANDS
from weft.cli.output import Output
from weft.cli.show import collapsed

from . import tiny


class Said(NamedTuple):
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def weft(capsys: pytest.CaptureFixture[str]) -> Run:
    """`weft("show", path)`: the command, in this process."""

    def run(*words: object) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def head(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.classifier(bert, tmp_path_factory.mktemp("head") / "head.safetensors")


@pytest.fixture(scope="module")
def style(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.lowrank(llama, tmp_path_factory.mktemp("style") / "style.safetensors")


def rows(path: Path, *values: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def flipped(path: Path, out: Path) -> Path:
    """A copy with one bit of the last tensor's data turned."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    out.write_bytes(data)
    return out


# --- the frame


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_the_shared_options(name: str, weft: Run) -> None:
    said = weft(name, "--help")
    assert said.code == 0 and f"weft {name}" in said.out.split("Example:")[1]
    command = import_module(f"weft.cli.{name}_" if name == "import" else f"weft.cli.{name}").command
    assert {"--format", "--debug"} <= {flag for param in command.params for flag in param.opts}
    assert command.short_help == COMMANDS[name]


def test_help_lists_every_command_and_is_what_no_command_gives(weft: Run) -> None:
    said = weft("--help")
    assert said.code == 0 and not said.err
    assert all(f"  {name} " in said.out and summary in said.out for name, summary in COMMANDS.items())
    assert weft() == said


def test_version(weft: Run) -> None:
    import weft as package

    assert weft("--version").out.strip().endswith(package.__version__)


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["--help"], {"numpy", "torch", "transformers", "msgspec", "rich"}),
        (["methods"], {"numpy", "torch", "transformers", "msgspec", "rich"}),
        (["show", "DELTA"], {"numpy", "torch", "transformers", "msgspec", "rich"}),
        (["verify", "DELTA"], {"torch", "transformers", "rich"}),
        (["fold", "BASE", "DELTA", "-o", "OUT"], {"torch", "transformers", "rich"}),
        (["merge", "DELTA", "DELTA", "--method", "linear", "-o", "OUT.safetensors"], {"torch", "transformers", "rich"}),
        (["diff", "BASE", "OTHER", "-o", "OUT.safetensors"], {"torch", "transformers", "rich"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_light_commands_stay_light(words: list[str], heavy: set[str], llama: Path, style: Path, tmp_path: Path) -> None:
    other = tiny.llama(tmp_path / "other", seed=2)
    places = {"OTHER": str(other), "DELTA": str(style), "BASE": str(llama), "OUT": str(tmp_path / "out"), "OUT.safetensors": str(tmp_path / "out.safetensors")}
    code = "import sys; from weft.cli import main; code = main(sys.argv[1:]); print(*sys.modules, sep='\\n', file=sys.stderr); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, *(places.get(word, word) for word in words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not heavy & set(done.stderr.split("\n"))


def test_python_m_weft_is_the_same_command(style: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "weft", "show", str(style), "--format", "quiet"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, Delta.load(style).id + "\n", "")


def test_completion_of_the_shell_is_offered() -> None:
    done = subprocess.run([sys.executable, "-m", "weft"], capture_output=True, text=True, env=os.environ | {"_WEFT_COMPLETE": "bash_source"})
    assert done.returncode == 0 and "_weft_completion" in done.stdout


# --- errors: exit codes and words


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["shw"], 2, ["no command 'shw'", "did you mean 'show'", "weft --help"]),
        (["show"], 2, ["weft show", "DELTA", "weft show --help"]),
        (["show", "x", "--formt", "json"], 2, ["--formt", "--format"]),
        (["show", "x", "--format", "yaml"], 2, ["yaml", "human"]),
        (["show", "nowhere.safetensors"], 3, ["nowhere.safetensors"]),
        (["tune", "base", "-p", "x"], 2, ["2 problems", "--data", "--out"]),
        (["tune", "base", "--data", "d", "-o", "x.bin"], 2, ["x.bin", "x.safetensors"]),
        (["tune", "base", "--data", "d", "-o", "nowhere/x.safetensors"], 3, ["nowhere", "mkdir -p"]),
        (["tune", "base", "--data", "d", "-o", "x.safetensors", "-p", "rank", "-p", "seed=1"], 2, ["2 problems", "'rank'", "seed"]),
        (["merge", "a", "b"], 2, ["-o", "--into"]),
        (["merge", "a", "b", "-o", "x.safetensors", "--weights", "1,x"], 2, ["--weights", "'1,x'"]),
        (["fold", "base", "-o", "x"], 2, ["DELTA"]),
        (["methods", "lroa"], 2, ["'lroa'", "weft methods"]),
        (["methods", "--format", "markdown", "merge"], 2, ["whole catalogue"]),
        (["eval", "nowhere/at/all", "--data", "x.jsonl"], 3, ["x.jsonl"]),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_errors(words: list[str], code: int, expected: list[str], weft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = weft(*words)
    assert said.code == code and not said.out
    assert all(word in said.err for word in expected), said.err
    assert "Traceback" not in said.err and said.err.startswith("weft: ")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_delta_and_the_hint_says_what_to_do(weft: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for folder, hint in ((llama, f"weft diff BASE {llama}"), (tmp_path / "adapter", "weft import"), (tmp_path, "")):
        said = weft("show", folder)
        assert said.code == 3 and f"{folder} is a folder" in said.err and hint in said.err and ("try:" in said.err) is bool(hint)


@pytest.mark.parametrize("device", ["gpu", "cuda:4096"])
def test_a_device_that_is_not_there_is_wrong_usage(device: str, weft: Run, llama: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "t.jsonl", {"text": "how many is it"})
    for words in (["eval", llama, "--data", data], ["generate", llama, "--prompt", "how"]):
        said = weft(*words, "--device", device)
        assert said.code == 2 and repr(device) in said.err and "this machine has cpu" in said.err, said.err


def test_the_next_command_can_be_pasted(weft: Run, llama: Path, tmp_path: Path) -> None:
    from shlex import split

    (tmp_path / "my files").mkdir()
    delta = tiny.lowrank(llama, tmp_path / "my files" / "it's.safetensors")
    said = weft("verify", delta, "--base", llama)
    assert split(said.err.removeprefix("next: ")) == ["weft", "fold", str(llama), str(delta), "-o", "DIR"]


def test_errors_as_json_are_one_line_on_stderr(weft: Run, tmp_path: Path) -> None:
    for words, code, kind in ((["show", tmp_path / "nowhere"], 3, "InputError"), (["show"], 2, "UsageError"), (["shw"], 2, "UsageError")):
        said = weft(*words, "--format", "json")
        error = json.loads(said.err)["error"]
        assert (said.code, said.out, error["exit_code"], error["type"]) == (code, "", code, kind)
        assert error["message"]
    assert "problems" in error and error["hint"] == "weft --help"


def test_what_nobody_expected_is_exit_4_and_the_traceback_is_for_debug(weft: Run, style: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: object) -> None:
        raise ZeroDivisionError("one\nover nothing")

    monkeypatch.setattr(Delta, "load", broken)
    said = weft("show", style)
    assert said.code == 4 and not said.out
    assert "ZeroDivisionError" in said.err and "one over nothing" in said.err and "--debug" in said.err and "Traceback" not in said.err
    said = weft("show", style, "--debug")
    assert said.code == 4 and "Traceback" in said.err and "in broken" in said.err


def test_ctrl_c_leaves_nothing(weft: Run, llama: Path, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.folding._report", interrupt)  # the last step inside the folder that is being made
    for extra in ([], ["--format", "json"]):
        said = weft("fold", llama, style, "-o", tmp_path / "out", *extra)
        assert said.code == 130 and not said.out and "no result was written" in said.err and "Traceback" not in said.err
        assert not list(tmp_path.iterdir())
    assert json.loads(said.err)["error"]["exit_code"] == 130


def test_an_interrupted_tuning_names_its_state(weft: Run, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        (tmp_path / "x.safetensors.state").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.tuning.tune", interrupt)
    said = weft("tune", bert, "--data", "d.jsonl", "-o", tmp_path / "x.safetensors", "--save-every", 1)
    assert said.code == 130 and f"--resume {tmp_path / 'x.safetensors.state'}" in said.err


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen([sys.executable, "-m", "weft", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, "")


def test_progress_is_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("weft.cli.output.time.monotonic", lambda: now[0])
    with Output("json").progress("folding") as report:
        for done in range(1, 5):
            now[0] += 6
            report(done * 1000, 4000)
    said = capsys.readouterr()
    assert said.out == "" and said.err == "folding: 2,000 of 4,000 (50%) after 12 s\nfolding: 4,000 of 4,000 (100%) after 24 s\n"
    with Output("quiet").progress("folding") as report:
        now[0] += 60
        report(1, 2)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_are_bars(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Output("human").progress("folding") as report:
        report(3, 4)
    with Output("human").training() as events:
        events({"event": "start", "total": 9})
        events({"event": "step", "step": 5, "total": 9, "loss": 0.125})
    said = capsys.readouterr()
    assert not said.out and all(word in said.err for word in ("folding", "3/4", "tuning", "5/9", "loss 0.125"))


# --- show, verify, methods


def test_show_says_what_a_delta_is(weft: Run, head: Path, bert: Path) -> None:
    delta = Delta.load(head)
    said = weft("show", head)
    assert said.code == 0 and said.err == f"next: weft verify {head} --base BASE\n"
    for word in (delta.id, delta.base, "test", "seed", '"0": "HUM"', "BertForSequenceClassification"):
        assert str(word) in said.out
    lines = [line.split() for line in said.out.splitlines()]
    assert ["encoder.layer.{0,1}.attention.self.query.weight", "[32,", "32]", "F32", "lowrank", "r=2", "scale=0.25", "x2", "256"] in lines
    assert ["classifier.weight", "[3,", "32]", "F32", "add;", "assign", "96"] in lines
    record = weft("show", head, "--format", "json").data
    assert record["id"] == delta.id and record["bytes"] == head.stat().st_size and set(record["entries"]) == set(delta.entries)
    assert record["base"]["fingerprint"] == Base.open(bert).fingerprint and record["notes"] == {}
    assert weft("show", head, "--format", "quiet") == (0, delta.id + "\n", "")


def test_what_a_file_says_cannot_steer_a_terminal(weft: Run, small_delta: Path) -> None:
    """A note of escape codes, a line break that would fake a row, C1 controls and reversed text: shown as text, in every format."""
    hostile = "\x1b[2J\x1b]0;title\x07 \x9b31m \u202egnp.exe\nid fake"
    dataclasses.replace(Delta.load(small_delta), notes={"by": hostile}).save(small_delta)
    for words in ((), ("--format", "json"), ("--format", "quiet")):
        said = weft("show", small_delta, *words)
        assert said.code == 0 and not any(c in said.out + said.err for c in "\x1b\x07\x9b\u202e")
    assert weft("show", small_delta, "--format", "json").data["notes"] == {"by": hostile}
    shown = weft("show", small_delta).out
    assert "\\u001b[2J" in shown and "\\u202egnp.exe" in shown and "id fake" not in [line.strip() for line in shown.splitlines()]


def test_show_reads_every_kind_of_entry(weft: Run, small_delta: Path) -> None:
    said = weft("show", small_delta)
    assert said.code == 0
    for word in ('lowrank r=2 scale=1 at {"index": [[2, 6]]}', "sum(2 lowrank r=2, magnitude)", "add; sum(2 assign)", "sparse scale=2", '{"factor": 2}'):
        assert word in said.out, said.out


def test_names_are_collapsed_without_claiming_more_than_there_is() -> None:
    assert collapsed([f"h.{k}.w" for k in (0, 1, 2, 5)]) == [("h.{0..2,5}.w", ["h.0.w", "h.1.w", "h.2.w", "h.5.w"])]
    grid = [f"h.{k}.e.{e}.w" for k in range(2) for e in range(3)]
    assert collapsed(grid) == [("h.{0,1}.e.{0..2}.w", grid)]
    assert [name for name, _ in collapsed(grid[:-1])] == ["h.{0,1}.e.0.w", "h.{0,1}.e.1.w", "h.0.e.2.w"]
    assert collapsed(["norm.weight"]) == [("norm.weight", ["norm.weight"])]
    assert collapsed(["h.01.{x}"]) == [("h.01.{x}", ["h.01.{x}"])]  # a name that only looks like a number stays as it is


def test_verify_says_what_it_looked_at(weft: Run, head: Path, bert: Path) -> None:
    said = weft("verify", head)
    assert said.code == 0 and "whole" in said.out and "not checked: the base" in said.out
    said = weft("verify", head, "--base", bert)
    assert said.code == 0 and str(Base.open(bert).fingerprint) in said.out and "not checked" not in said.out
    record = weft("verify", head, "--base", bert, "--format", "json").data
    assert record["ok"] is True and record["base_checked"] is True and len(record["checked"]) == 7
    assert weft("verify", head, "--format", "quiet") == (0, "", "")


@pytest.mark.parametrize("verb", ["verify", "show"])
def test_a_flipped_bit_is_found(verb: str, weft: Run, head: Path, tmp_path: Path) -> None:
    said = weft(verb, flipped(head, tmp_path / "bad.safetensors"))
    last = sorted(Delta.load(head).tensors)[-1]
    assert said.code == 3 and not said.out and "bad.safetensors" in said.err and last in said.err and "damaged" in said.err


def test_verify_refuses_another_base_and_names_both(weft: Run, head: Path, llama: Path, bert: Path) -> None:
    said = weft("verify", head, "--base", llama)
    assert said.code == 3 and str(Base.open(llama).fingerprint)[:12] in said.err and str(Base.open(bert).fingerprint)[:12] in said.err


def test_verify_holds_each_touched_tensor_against_the_base(weft: Run, head: Path, bert: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    delta = Delta.load(head)
    name = "encoder.layer.1.attention.self.query.weight"
    entry = delta.entries[name]
    assert entry.base is not None
    forged = replace(delta, entries={**delta.entries, name: replace(entry, base=replace(entry.base, sha256="0" * 64))})
    forged.save(tmp_path / "forged.safetensors")
    assert weft("verify", tmp_path / "forged.safetensors").code == 0
    said = weft("verify", tmp_path / "forged.safetensors", "--base", bert)
    assert said.code == 3 and name in said.err and "000000000000" in said.err


@pytest.mark.parametrize(
    ("op", "fields"),
    [
        ("sparse", {"index": np.array([3, 1]), "values": np.ones(2, np.float32)}),
        ("sparse", {"index": np.array([1, 1]), "values": np.ones(2, np.float32)}),
        ("assign", {"index": np.array([0, 1024]), "values": np.ones(2, np.float32)}),
        ("permute", {"perm": np.array([0, *range(31)])}),
    ],
    ids=["unsorted", "twice", "outside", "no-permutation"],
)
def test_verify_looks_at_positions(op: str, fields: dict[str, Any], weft: Run, bert: Path, tmp_path: Path) -> None:
    build = Builder(Base.open(bert))
    build.put("encoder.layer.1.attention.self.query.weight", op, fields)
    build.done(recipe={"verb": "test"}).save(tmp_path / "odd.safetensors")
    said = weft("verify", tmp_path / "odd.safetensors")
    assert said.code == 3 and "query.weight" in said.err and op in said.err and "odd.safetensors" in said.err


def test_methods_by_verb_kind_and_name(weft: Run) -> None:
    everything = weft("methods", "--format", "json").data["methods"]
    assert {"name", "verb", "kind", "options", "paper", "formula", "summary"} <= set(everything[0])
    names = [record["name"] for record in everything]
    assert {"lora", "ties", "adamw", "linear"} <= set(names)
    assert weft("methods", "--format", "quiet").out.split() == names
    listed = weft("methods")
    assert listed.code == 0 and "weft merge --method" in listed.out and "next: weft methods" in listed.err
    of_merge = weft("methods", "merge", "--format", "json").data["methods"]
    assert {record["verb"] for record in of_merge} == {"merge"}
    ties = weft("methods", "ties").out
    assert "-p density=" in ties and "arXiv" in ties and "lora" not in ties
    both = weft("methods", "linear", "--format", "json").data["methods"]  # a schedule, and a way to merge
    assert {record["kind"] for record in both} == {"schedule", "merge"}


def test_methods_shows_defaults_as_they_are_typed_and_near_misses(weft: Run) -> None:
    lora = weft("methods", "lora").out
    assert '["all-linear"]' in lora and "false" in lora and "False" not in lora
    said = weft("methods", "quantise")
    assert said.code == 2 and "did you mean 'quantize'?" in said.err
    said = weft("methods", "federat")
    assert said.code == 2 and "federate" not in said.err  # kinds without a method are not offered


def test_methods_as_markdown_is_the_generated_page(weft: Run) -> None:
    from weft.methods import render_catalogue

    assert weft("methods", "--format", "markdown") == (0, render_catalogue(), "")


# --- fold, diff, merge


def test_fold_writes_a_checkpoint_and_says_what_changed(weft: Run, llama: Path, style: Path, tmp_path: Path) -> None:
    said = weft("fold", llama, style, "-o", tmp_path / "a")
    assert said.code == 0 and "relative" in said.out and "v_proj" in said.out and said.err == f"next: weft eval {tmp_path / 'a'} --data FILE.jsonl\n"
    record = weft("fold", llama, style, "-o", tmp_path / "b", "--threads", 1, "--format", "json").data
    assert record["changed"] > 0 and record["deltas"] == [Delta.load(style).id] and len(record["tensors"]) == 4
    assert Base.open(tmp_path / "a").fingerprint == Base.open(tmp_path / "b").fingerprint != Base.open(llama).fingerprint
    assert weft("fold", llama, style, "-o", tmp_path / "c", "--format", "quiet") == (0, f"{tmp_path / 'c'}\n", "")


def test_fold_refuses(weft: Run, llama: Path, bert: Path, style: Path, head: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    said = weft("fold", llama, style, "-o", tmp_path / "full")
    assert said.code == 3 and "exists already" in said.err
    said = weft("fold", llama, head, "-o", tmp_path / "out")
    assert said.code == 3 and str(head) in said.err and Delta.load(head).id[:12] in said.err and str(Base.open(llama).fingerprint)[:12] in said.err
    (0.0 * Delta.load(style)).save(tmp_path / "nothing.safetensors")
    said = weft("fold", llama, tmp_path / "nothing.safetensors", "-o", tmp_path / "out")
    assert said.code == 3 and not (tmp_path / "out").exists()
    assert weft("fold", llama, tmp_path / "nothing.safetensors", "-o", tmp_path / "out", "--allow-noop").code == 0


def test_a_delta_made_over_another_needs_it(weft: Run, llama: Path, style: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    first = Delta.load(style)
    second = replace(Delta.load(tiny.lowrank(llama, tmp_path / "own.safetensors", seed=7)), over=(first.id,))
    second.save(tmp_path / "second.safetensors")
    said = weft("fold", llama, tmp_path / "second.safetensors", "-o", tmp_path / "out")
    assert said.code == 3 and first.id[:12] in said.err and second.id[:12] in said.err
    assert weft("fold", llama, style, tmp_path / "second.safetensors", "-o", tmp_path / "out").code == 0


def test_diff_then_fold_gives_the_checkpoint_back(weft: Run, llama: Path, tmp_path: Path) -> None:
    other = tiny.llama(tmp_path / "other", seed=5)
    said = weft("diff", llama, other, "-o", tmp_path / "d.safetensors")
    assert said.code == 0 and Delta.load(tmp_path / "d.safetensors").id in said.out
    assert weft("fold", llama, tmp_path / "d.safetensors", "-o", tmp_path / "back").code == 0
    assert Base.open(tmp_path / "back").fingerprint == Base.open(other).fingerprint


def test_diff_in_other_forms(weft: Run, llama: Path, style: Path, tmp_path: Path) -> None:
    assert weft("fold", llama, style, "-o", tmp_path / "tuned").code == 0
    record = weft("diff", llama, tmp_path / "tuned", "--as", "lowrank", "--rank", 2, "-o", tmp_path / "d.safetensors", "--format", "json").data
    found, made = Delta.load(tmp_path / "d.safetensors"), Delta.load(style)
    assert record["id"] == found.id and set(found.entries) == set(made.entries)
    for name in made.entries:
        w = Base.open(llama).tensor(name).read()
        np.testing.assert_allclose(found.apply(name, w), made.apply(name, w), atol=1e-5)
    said = weft("diff", llama, tmp_path / "tuned", "--as", "exact", "--rank", 2, "-o", tmp_path / "e.safetensors")
    assert said.code == 2 and "rank" in said.err
    assert weft("diff", llama, llama / "nowhere", "-o", tmp_path / "e.safetensors").code == 3


def test_merge_deltas_and_checkpoints(weft: Run, llama: Path, style: Path, tmp_path: Path) -> None:
    second = tiny.lowrank(llama, tmp_path / "second.safetensors", seed=9)
    said = weft("merge", style, second, "--method", "linear", "--weights", "0.25,0.75", "-o", tmp_path / "m.safetensors", "--format", "json")
    assert said.code == 0, said.err
    merged = Delta.load(tmp_path / "m.safetensors")
    assert said.data["id"] == merged.id and said.data["parents"] == [Delta.load(style).id, Delta.load(second).id]
    name = "model.layers.0.self_attn.q_proj.weight"
    w = Base.open(llama).tensor(name).read()
    wanted = w + 0.25 * (Delta.load(style).apply(name, w) - w) + 0.75 * (Delta.load(second).apply(name, w) - w)
    np.testing.assert_allclose(merged.apply(name, w), wanted, rtol=1e-4, atol=1e-5)
    said = weft("merge", style, second, "--method", "ties", "-p", "density=0.5", "--base", llama, "--into", tmp_path / "merged")
    assert said.code == 0 and "relative" in said.out
    tied = weft("merge", style, tmp_path / "merged", "--method", "linear", "--base", llama, "-o", tmp_path / "n.safetensors", "--format", "quiet")
    assert tied == (0, Delta.load(tmp_path / "n.safetensors").id + "\n", "")


def test_merge_names_wrong_options(weft: Run, llama: Path, style: Path, tmp_path: Path) -> None:
    said = weft("merge", style, style, "--method", "ties", "-p", "densty=0.5", "--base", llama, "-o", tmp_path / "m.safetensors")
    assert said.code == 2 and "densty" in said.err and "did you mean 'density'" in said.err
    said = weft("merge", style, style, "--method", "tis", "-o", tmp_path / "m.safetensors")
    assert said.code == 2 and "did you mean 'ties'" in said.err
    said = weft("merge", style, style, "-p", "base=x", "-o", tmp_path / "m.safetensors")
    assert said.code == 2 and "base" in said.err
    assert not list(tmp_path.iterdir())


# --- tune, eval, generate


def test_tune_then_eval(weft: Run, bert: Path, tmp_path: Path) -> None:
    words = {"one": tiny.WORDS[:10], "two": tiny.WORDS[10:]}
    texts = [(label, " ".join(words[label][(k + 3 * n) % 10] for n in range(1 + k % 5))) for k in range(40) for label in words]
    train = rows(tmp_path / "train.jsonl", *({"text": text, "label": label} for label, text in texts))
    where = tmp_path / "t.safetensors"
    command = ["tune", bert, "--data", train, "--objective", "classification", "-p", "rank=4", "-p", "epochs=10", "-p", "lr=0.01", "-p", "batch-size=16"]
    said = weft(*command, "-o", where, "--log", tmp_path / "log.jsonl", "--threads", 1)
    assert said.code == 0, said.err
    assert Delta.load(where).id in said.out and f"next: weft eval {bert} {where} --data" in said.err
    assert (tmp_path / "log.jsonl").read_text().count('"event": "step"') == 50
    again = weft(*command, "-o", tmp_path / "again.safetensors", "--threads", 1, "--format", "json").data
    assert again["id"] == Delta.load(where).id and again["notes"]["steps"] == 50
    record = weft("eval", bert, where, "--data", train, "--format", "json").data
    assert record["n"] == 80 and record["base"] == Base.open(bert).fingerprint and record["deltas"] == [Delta.load(where).id]
    assert record["metrics"]["accuracy"] > 0.95
    human = weft("eval", bert, where, "--data", train)
    assert "accuracy" in human.out and "80" in human.out and f"next: weft fold {bert} {where} -o DIR" in human.err
    assert weft("eval", bert, where, "--data", train, "--format", "quiet").out.startswith(f"accuracy {record['metrics']['accuracy']:.6g}\n")


def test_tune_names_every_wrong_option_at_once(weft: Run, bert: Path, tmp_path: Path) -> None:
    train = rows(tmp_path / "train.jsonl", {"text": "how", "label": "a"}, {"text": "who", "label": "b"})
    said = weft("tune", bert, "--data", train, "--objective", "classification", "-p", "rnk=4", "-p", "epochs=-1", "-o", tmp_path / "t.safetensors")
    assert said.code == 2 and "rnk" in said.err and "did you mean 'rank'" in said.err
    said = weft("tune", bert, "--data", train, "--method", "lroa", "-o", tmp_path / "t.safetensors")
    assert said.code == 2 and "did you mean 'lora'" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_eval_refuses_what_it_cannot_measure(weft: Run, bert: Path, llama: Path, head: Path, tmp_path: Path) -> None:
    labelled = rows(tmp_path / "l.jsonl", {"text": "how", "label": "HUM"}, {"text": "who", "label": "LOK"})
    said = weft("eval", bert, "--data", labelled)
    assert said.code == 2 and "no head" in said.err and "--objective classification" in said.err
    said = weft("eval", bert, head, "--data", labelled)
    assert said.code == 3 and "row 1" in said.err and "'LOK'" in said.err and "did you mean 'LOC'" in said.err
    said = weft("eval", llama, head, "--data", labelled)
    assert said.code == 3 and str(head) in said.err
    said = weft("eval", bert, "--data", rows(tmp_path / "p.jsonl", {"text": "how many"}))
    assert said.code == 2 and "next tokens" in said.err and "causal-lm" in said.err
    said = weft("eval", bert, "--data", rows(tmp_path / "q.jsonl", {"question": "how"}))
    assert said.code == 3 and "'question'" in said.err


def test_generate(weft: Run, llama: Path, style: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    plain = weft("generate", llama, "--prompt", "how many", "--max-new-tokens", 6, "--format", "json").data
    changed = weft("generate", llama, style, "--prompt", "how many", "--max-new-tokens", 6)
    assert plain["prompt"] == "how many" and plain["text"] and changed.out.strip() != plain["text"]
    assert "next: weft generate" in changed.err and "'how many'" in changed.err
    monkeypatch.setattr("sys.stdin", io.StringIO("how many\n"))
    assert weft("generate", llama, "--prompt", "-", "--max-new-tokens", 6, "--format", "quiet").out.strip() == plain["text"]
    drawn = [weft("generate", llama, "--prompt", "how", "--temperature", 2, "--seed", seed, "--format", "quiet").out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert weft("generate", llama, "--prompt", "how", "--temperature", 1, "--num-beams", 2).code == 2
    assert weft("generate", llama, "--prompt", "").code == 2


# --- import and export


def test_a_peft_adapter_comes_in_and_goes_out(weft: Run, llama: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(3)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    said = weft("import", tmp_path / "adapter", "--base", llama, "-o", tmp_path / "a.safetensors")
    assert said.code == 0 and Delta.load(tmp_path / "a.safetensors").id in said.out, said.err
    said = weft("export", tmp_path / "a.safetensors", "--base", llama, "--to", "peft", "-o", tmp_path / "out", "--format", "json")
    assert said.code == 0, said.err
    ids = torch.tensor([[5, 6, 7, 9, 11]])
    back = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, adapted.eval()(ids).logits, atol=1e-5, rtol=0)


def test_export_for_vllm_is_probed_and_says_what_was_left_out(weft: Run, llama: Path, style: Path, tmp_path: Path) -> None:
    said = weft("export", style, "--base", llama, "--to", "vllm", "--rank", 1, "--probe", "-o", tmp_path / "served")
    assert said.code == 0, said.err
    assert "4 of rank 1" in said.out and "residual" in said.out and "logits move" in said.out
    assert f"next: vllm serve {llama} --enable-lora" in said.err
    record = weft("export", style, "--base", llama, "--to", "vllm", "-o", tmp_path / "whole", "--format", "json").data
    assert record["rank"] == 2 and record["residual"] == {} and record["probe"] is None and record["id"] == Delta.load(style).id


def test_what_vllm_would_not_serve_is_exit_3_with_every_problem(weft: Run, llama: Path, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.interchange import vllm

    monkeypatch.setattr(vllm, "_lint_files", lambda folder: ["nobody may read it", "nor enter it"])
    command = ["export", style, "--base", llama, "--to", "vllm"]
    said = weft(*command, "-o", tmp_path / "served")
    assert said.code == 3 and "nobody may read it" in said.err and "nor enter it" in said.err and "next:" not in said.err
    assert "wrote" in said.out and (tmp_path / "served" / "adapter_config.json").is_file()
    said = weft(*command, "-o", tmp_path / "again", "--format", "json")
    assert said.code == 3 and json.loads(said.out)["problems"] == ["nobody may read it", "nor enter it"]
    assert json.loads(said.err)["error"]["exit_code"] == 3


def test_import_and_export_refuse(weft: Run, llama: Path, bert: Path, head: Path, style: Path, tmp_path: Path) -> None:
    said = weft("import", tmp_path, "--base", llama, "-o", tmp_path / "a.safetensors")
    assert said.code == 3 and "adapter_config.json" in said.err
    said = weft("export", style, "--base", bert, "--to", "peft", "-o", tmp_path / "out")
    assert said.code == 3 and str(style) in said.err
    said = weft("export", style, "--base", llama, "--to", "gguf", "-o", tmp_path / "out")
    assert said.code == 2 and "vllm" in said.err
    assert not list(tmp_path.iterdir())


def test_demo_tells_its_story(weft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    story = ModuleType("weft.demo.story")

    def run(out: Path, say: Callable[[str], None], *, progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        say(f"once in {out}")
        return {"accuracy": 0.9}

    story.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "weft.demo.story", story)
    assert weft("demo", "--out", tmp_path).out == f"once in {tmp_path}\n"
    assert weft("demo", "--out", tmp_path, "--format", "json").data == {"accuracy": 0.9}
    assert weft("demo", "--out", tmp_path, "--format", "quiet").out == f"{tmp_path}\n"
