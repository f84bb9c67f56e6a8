"""Sinks: what TensorBoard and W&B get of a run, and what is said where they are missing."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.test_loop import make
from weft.cli import main
from weft.engine.events import Events
from weft.engine.loop import train
from weft.errors import MissingExtra, UsageError


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(log: Path, *sinks: str) -> list[dict[str, Any]]:
    with Events(log, sinks=sinks) as events:
        train(make(), events, evaluate=lambda run: {"accuracy": run.step / 10}, evaluate_every=4)
    return lines(log)


def test_tensorboard_files_hold_every_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = run(tmp_path / "log", f"tensorboard:{tmp_path / 'board'}")
    found = EventAccumulator(str(tmp_path / "board")).Reload()
    assert {"train/loss", "train/lr", "train/grad_norm", "train/memory", "train/tokens_per_s", "eval/accuracy"} == set(found.Tags()["scalars"])
    steps = [line for line in said if line["event"] == "step"]
    assert [(s.step, s.value) for s in found.Scalars("train/loss")] == [(line["step"], pytest.approx(line["loss"])) for line in steps]
    assert [(s.step, s.value) for s in found.Scalars("eval/accuracy")] == [(4, pytest.approx(0.4)), (8, pytest.approx(0.8))]


class Board:
    """Stands for torch's writer."""

    made: list[Board] = []

    def __init__(self, folder: str) -> None:
        self.folder, self.scalars, self.closed = folder, [], 0  # type: ignore[var-annotated]
        self.made.append(self)

    def add_scalar(self, *scalar: Any) -> None:
        self.scalars.append(scalar)

    def close(self) -> None:
        self.closed += 1


def test_what_the_writer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    monkeypatch.setattr(Board, "made", [])
    said = run(tmp_path / "log", "tensorboard:a", "tensorboard:b")
    assert [board.folder for board in Board.made] == ["a", "b"] and Board.made[0].scalars == Board.made[1].scalars
    assert ("train/loss", said[1]["loss"], 1) in Board.made[0].scalars and ("eval/accuracy", 0.4, 4) in Board.made[0].scalars
    assert not {name for name, *_ in Board.made[0].scalars} & {"train/time", "train/step", "train/total"}
    assert [board.closed for board in Board.made] == [1, 1]


def test_what_wandb_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    config: dict[str, Any] = {}
    ended: list[bool] = []
    fake = SimpleNamespace(
        config=SimpleNamespace(update=lambda values, allow_val_change: config.update(values)),
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: ended.append(True),
    )
    projects: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda project: (projects.append(project), fake)[1]))
    said = run(tmp_path / "log", "wandb:mine")
    assert projects == ["mine"] and ended == [True] and config["examples"] == 22
    steps = [line for line in said if line["event"] == "step"]
    assert [(step, values["train/loss"]) for step, values in logged if "train/loss" in values] == [(line["step"], line["loss"]) for line in steps]
    assert (4, {"eval/accuracy": 0.4}) in logged
    with pytest.raises(KeyboardInterrupt), Events(sinks=["wandb:mine"]):  # an interrupted run is closed too
        raise KeyboardInterrupt
    assert ended == [True, True]


@pytest.mark.parametrize(("where", "module"), [("tensorboard:x", "torch.utils.tensorboard"), ("wandb:x", "wandb")])
def test_a_missing_package_is_one_sentence(where: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(Board, "made", [])
    with pytest.raises(MissingExtra, match="is not installed") as caught, Events(tmp_path / "log", sinks=[where]):
        pass
    assert caught.value.hint == f"pip install 'weft[{where.partition(':')[0]}]'"


@pytest.mark.parametrize("where", ["tensorbord:x", "tensorboard", "wandb:", ""])
def test_places_of_no_kind_are_refused(where: str) -> None:
    with pytest.raises(UsageError, match="cannot log to"), Events(sinks=[where]):
        pass


def test_the_command_line_logs_to_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tests import tiny

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    monkeypatch.setattr(Board, "made", [])
    (tmp_path / "t.jsonl").write_text('{"text": "how many is the river"}\n' * 4)
    words = ["tune", str(tiny.llama(tmp_path / "m")), "--data", str(tmp_path / "t.jsonl"), "-o", str(tmp_path / "d.safetensors"), "-p", "steps=2"]
    assert main([*words, "--log-to", "tensorboard:one", "--log-to", "tensorboard:two"]) == 0, capsys.readouterr().err
    assert [len([s for s in board.scalars if s[0] == "train/loss"]) for board in Board.made] == [2, 2]
    assert main([*words, "--log-to", "nowhere"]) == 2
