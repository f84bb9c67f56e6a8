"""Several processes, as `torchrun` starts them: each works on its share of the batch, and holds its share of the frozen weights if asked to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from weft.delta import Delta
from weft.engine.sharding import shard
from weft.errors import UsageError
from weft.tuning import tune

ROWS = [{"text": " ".join(tiny.WORDS[(k * j + k) % 20] for j in range(3 + k % 6))} for k in range(15)]
"""In batches of seven the last one has a single row, which one of two processes goes without."""

QUICK: dict[str, Any] = {"batch_size": 7, "micro_batch_size": 1, "steps": 5, "lr": 0.01, "progress": lambda event: None}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "functional": {"rank": 2, "dora": True, "checkpointing": True, "micro_batch_size": 3},
    "ranks": {"method": "adalora"},
    "outputs": {"optimizer": "mkor", "rank": 2},
    "stopped": {"rank": 2, "evaluate": ROWS, "evaluate_every": 1, "best": "+loss", "patience": 2},
}


def together(folder: Path) -> None:
    """What each process runs: every case, plain and sharded; the first process writes down what came of it."""
    from accelerate import PartialState

    for name, options in CASES.items():
        for sharded in (False, True):
            held: list[int] = []

            def look(run: Any, held: list[int] = held) -> dict[str, float]:
                trained = {id(value) for value in run.tensors.values()}
                frozen = [p for p in run.model.parameters() if id(p) not in trained]
                held.append(sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in frozen))
                return {}

            watch = {} if "evaluate" in options else {"evaluate": look, "evaluate_every": 5}
            out = folder / f"{name}-{sharded}.safetensors"
            delta = tune(folder / "llama", ROWS, out=out, shard=sharded, **{**QUICK, **options, **watch})
            assert delta.recipe["processes"] == 2 and (delta.path is not None) == PartialState().is_main_process
            if PartialState().is_main_process:
                out.with_suffix(".json").write_text(json.dumps({"held": held, "steps": delta.notes["steps"]}))
    with pytest.raises(UsageError, match="full trains the weights themselves, so it cannot be sharded"):
        tune(folder / "llama", ROWS, method="full", shard=True, **QUICK)
    (folder / f"{PartialState().process_index}.done").touch()


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, os.getcwd()]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), *words]
    return subprocess.run(run, env=env, capture_output=True, text=True, timeout=280)


def test_everything_trained_leaves_nothing_to_share_out() -> None:
    model = torch.nn.Linear(3, 3)
    with pytest.raises(UsageError, match="nothing to share out"):
        shard(model, list(model.parameters()), torch.device("cpu"))


def test_alone_a_process_shares_with_nobody(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "llama")
    one, two = (tune(base, ROWS, rank=2, shard=on, **QUICK) for on in (False, True))
    assert {key: t.sha256 for key, t in one.tensors.items()} == {key: t.sha256 for key, t in two.tensors.items()}
    assert "processes" not in one.recipe


@pytest.mark.slow
def test_two_processes_tune_as_one_does(tmp_path: Path) -> None:
    tiny.llama(tmp_path / "llama")
    done = torchrun("-m", "tests.test_loop_devices", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("*.done")} == {"0.done", "1.done"}
    for name, options in CASES.items():
        one = tune(tmp_path / "llama", ROWS, **{**QUICK, **options})
        held = []
        for sharded in (False, True):
            two = Delta.load(tmp_path / f"{name}-{sharded}.safetensors")
            about = json.loads((tmp_path / f"{name}-{sharded}.json").read_text())
            assert two.entries.keys() == one.entries.keys() and about["steps"] == one.notes["steps"]
            held += about["held"]
            for key in one.tensors:
                torch.testing.assert_close(torch.tensor(two.get(key)), torch.tensor(one.get(key)), rtol=2e-4, atol=2e-5, msg=f"{name} {sharded} {key}")
        if held:
            assert held[1] < 0.52 * held[0], name  # the first process's share of the frozen weights


@pytest.mark.slow
def test_the_command_line_under_torchrun_says_things_once(tmp_path: Path) -> None:
    base, out = tiny.llama(tmp_path / "llama"), tmp_path / "d.safetensors"
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["tune", str(base), "--data", str(tmp_path / "t.jsonl"), "-p", "steps=3", "-p", "rank=2", "-p", "shard=true", "-o", str(out)]
    done = torchrun("-m", "--", "weft", *words, "--log", str(tmp_path / "log"), "--save-every", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("steps") == 1 and Delta.load(out).recipe["processes"] == 2
    assert [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()] == ["start", "step", "step", "save", "step", "end"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors", "llama", "log", "t.jsonl"]


if __name__ == "__main__":
    together(Path(sys.argv[1]))
