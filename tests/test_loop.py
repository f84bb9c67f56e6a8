"""The training loop on a toy model: accumulation, clipping, hooks, events, exact resume."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from weft.engine.events import Events, PlainProgress
from weft.engine.loop import Hooks, LoopConfig, Run, _deep, _flat, train
from weft.errors import FormatError, MismatchError, UsageError, WeftError

SIZE = 6


class Toy(nn.Module):
    """Counts tokens, mixes, guesses a class; with dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.table = nn.Embedding(11, SIZE)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(SIZE, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mean = (self.table(input_ids) * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        logits: torch.Tensor = self.out(self.drop(mean.tanh()))
        return logits


class Guess:
    """Examples of different lengths; an example counts as much as it has tokens."""

    def __init__(self, count: int = 22) -> None:
        self.examples = [{"input_ids": [(3 * k + j) % 10 + 1 for j in range(k % 5 + 1)], "labels": (3 * k) % 10 // 4} for k in range(count)]

    def collate(self, examples: Sequence[dict[str, Any]], keys: Sequence[int]) -> dict[str, torch.Tensor]:
        from weft.engine.data import padded

        return padded(examples, 0)

    def weight(self, batch: dict[str, torch.Tensor]) -> float:
        return float(batch["attention_mask"].sum())

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        each = nn.functional.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"], reduction="none")
        length = batch["attention_mask"].sum(1)
        return (each * length).sum() / length.sum()


def make(dropout: float = 0.0, *, seed: int = 3, hooks: Sequence[Hooks] = (), sgd: float = 0.0, **options: Any) -> Run:
    model = Toy(dropout)
    tensors = dict(model.named_parameters())
    optimizer: torch.optim.Optimizer = torch.optim.SGD(tensors.values(), lr=sgd) if sgd else torch.optim.AdamW(tensors.values(), lr=0.05)
    config = LoopConfig(**{"batch_size": 8, "steps": 8, **options})
    return Run(model, Guess(), tensors, optimizer, lambda step, total: 1 - step / total, config, seed, hooks)


def go(run: Run, progress: Callable[[dict[str, Any]], None] | None = None, **options: Any) -> dict[str, torch.Tensor]:
    with Events(None, progress) as events:
        train(run, events, **options)
    return {name: value.detach().clone() for name, value in run.tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns() -> None:
    losses: list[float] = []
    go(make(steps=60), lambda event: losses.append(event["loss"]) if event["event"] == "step" else None)
    assert len(losses) == 60 and sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("micro", [1, 3, 5])
def test_how_a_batch_is_cut_changes_nothing_but_rounding(micro: int) -> None:
    whole, cut = go(make(sgd=0.5, clip=0)), go(make(sgd=0.5, clip=0, micro_batch_size=micro))
    assert not same(whole, go(make(sgd=0.5, clip=0, steps=7)))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=2e-5, atol=2e-6)


def test_clipping_shortens_and_never_lengthens() -> None:
    start = {name: value.detach().clone() for name, value in make().tensors.items()}
    free, short, long = ({n: v - start[n] for n, v in go(make(sgd=1.0, steps=1, clip=clip)).items()} for clip in (0, 0.01, 100))
    length = math.sqrt(sum(float(v.square().sum()) for v in short.values()))
    assert length == pytest.approx(0.01, rel=1e-3)
    assert all(torch.allclose(free[n], long[n]) for n in free)
    ratio = math.sqrt(sum(float(v.square().sum()) for v in free.values())) / length
    assert ratio > 2 and all(torch.allclose(short[n] * ratio, free[n], rtol=1e-3, atol=3e-5) for n in free)


def test_the_seed_decides_and_the_callers_generator_does_not() -> None:
    torch.manual_seed(1)
    one = go(make(0.5))
    torch.manual_seed(2)
    run = make(0.5)
    before = torch.get_rng_state()
    two = go(run)
    assert same(one, two) and torch.equal(before, torch.get_rng_state())
    assert not same(one, go(make(0.5, seed=4)))


def test_modes_come_back_and_evaluation_leaves_no_trace() -> None:
    run = make(0.5)
    run.model.eval()
    run.model.drop.train()
    seen: list[tuple[int, bool, bool]] = []

    def evaluate(run: Run) -> dict[str, float]:
        seen.append((run.step, run.model.training, torch.is_grad_enabled()))
        return {"noise": float(torch.rand(()))}

    got = go(run, evaluate=evaluate, evaluate_every=3)
    assert seen == [(3, False, False), (6, False, False)]
    assert not run.model.training and run.model.drop.training
    assert same(got, go(make(0.5)))


class Recorder(Hooks):
    """Writes down what is called; pulls weights towards zero; keeps a count that goes through the state."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.count = torch.zeros((), dtype=torch.int64)

    def start(self, run: Run) -> None:
        self.calls.append(f"start {run.step}")

    def loss(self, run: Run, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return 0.01 * int(self.count) * sum(p.square().sum() for p in run.tensors.values())  # type: ignore[return-value]

    def gradients(self, run: Run) -> None:
        self.calls.append("gradients")
        run.tensors["out.bias"].grad.zero_()  # type: ignore[union-attr]

    def after_step(self, run: Run) -> None:
        self.count = self.count + 1
        self.calls.append(f"after {run.step}")

    def end(self, run: Run) -> None:
        self.calls.append("end")

    def state(self) -> dict[str, torch.Tensor]:
        return {"count": self.count}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.count = state["count"]


def test_hooks_are_called_in_order_and_have_their_effect() -> None:
    hook = Recorder()
    run = make(hooks=[hook], steps=2)
    bias = run.tensors["out.bias"].detach().clone()
    got = go(run)
    assert hook.calls == ["start 0", "gradients", "after 1", "gradients", "after 2", "end"]
    plain = go(make(steps=2))
    assert not torch.equal(got["out.weight"], plain["out.weight"])
    factor = float(got["out.bias"][0] / bias[0])
    assert 0.99 < factor < 1 and torch.allclose(got["out.bias"], bias * factor)  # its gradient is gone: decay alone is left


def test_the_loss_term_counts_once_however_the_batch_is_cut() -> None:
    whole, cut = (go(make(hooks=[Recorder()], sgd=0.5, clip=0, micro_batch_size=micro)) for micro in (0, 2))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_k_and_k_steps_are_2k_steps(tmp_path: Path, steps: int) -> None:
    """Three batches an epoch, so the cut falls inside an epoch, at its end, and after it."""
    state = tmp_path / "run.state"
    whole = go(make(0.5, hooks=[Recorder()]))

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "save":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(make(0.5, hooks=[Recorder()]), stop, state=state, save_every=steps, identity={"run": 1})
    second = make(0.5, hooks=[Recorder()])
    assert same(whole, go(second, resume=state, identity={"run": 1}))
    assert second.hooks[0].calls[0] == f"start {steps}"  # type: ignore[attr-defined]


def test_a_state_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "run.state"
    go(make(steps=2), state=state, save_every=2, identity={"data": "a", "seed": 1})
    with pytest.raises(MismatchError, match='data: "a" there, "b" here'):
        go(make(), resume=state, identity={"data": "b", "seed": 1})
    data = state.read_bytes()
    state.write_bytes(data[:-5])
    with pytest.raises(FormatError, match="the tensors end"):
        go(make(), resume=state, identity={"data": "a", "seed": 1})
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(FormatError, match="not the state"):
        go(make(), resume=other)


def test_states_of_any_nesting_come_back() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = {"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3)}}, "groups": [{"betas": (0.9, 0.999), "fused": None, "lr": 1e-3, "on": True}]}
    back = _deep(json.loads(json.dumps(_flat(state, "optimizer", tensors))), tensors.__getitem__)
    assert back["groups"] == state["groups"] and list(back["state"]) == [0]
    assert all(torch.equal(back["state"][0][n], v) for n, v in state["state"][0].items())
    with pytest.raises(WeftError, match="object at optimizer/x"):
        _flat({"x": object()}, "optimizer", {})


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    class Broken(Guess):
        def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return super().loss(model, batch) * (math.inf if run.step == 3 else 1.0)

    run = make()
    run.objective = Broken()
    log = tmp_path / "log.jsonl"
    with pytest.raises(WeftError, match="step 4 of 8: the loss is not finite") as caught, Events(log) as events:
        train(run, events)
    assert caught.value.exit_code == 4
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "step", "step", "step", "step"] and lines[-1]["loss"] is None
    assert all(torch.isfinite(value).all() for value in run.tensors.values())


def test_the_log_says_what_happened(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with Events(log) as events:
        summary = train(make(), events, state=tmp_path / "s", save_every=4)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["lr"] for line in steps] == pytest.approx([0.05 * (1 - k / 8) for k in range(8)])
    assert lines[0] == {"event": "start", "time": lines[0]["time"], "total": 8, "first": 0, "parameters": 11 * SIZE + 3 * SIZE + 3, "examples": 22}
    assert [line["step"] for line in lines if line["event"] == "save"] == [4, 8]
    assert lines[-1]["loss"] == pytest.approx(sum(line["loss"] for line in steps) / 8) == summary.loss
    assert summary.steps == 8 and summary.tokens == lines[-1]["tokens"] > 0


def test_epochs_become_steps_and_nothing_to_train_is_said() -> None:
    assert make(steps=0, epochs=2.0).total == 6 and make(steps=0, epochs=0.1).total == 1
    run = make()
    run.tensors = {}
    with pytest.raises(UsageError, match="nothing to train"):
        go(run)


def test_the_plain_line_comes_every_ten_seconds_only(capsys: pytest.CaptureFixture[str]) -> None:
    line = PlainProgress()
    line({"event": "start", "time": 1.0})
    for second in (3, 9, 11, 15, 20, 22):
        line({"event": "step", "time": float(second), "step": second, "first": 0, "total": 40, "loss": 1.5, "lr": 1e-3, "tokens_per_s": 1234.5})
    err = capsys.readouterr().err.splitlines()
    assert [text.split("  ")[0] for text in err] == ["step 11/40", "step 22/40"]
    assert "1,234 tokens/s" in err[0] and "26 s left" in err[0]  # 10 s for 11 steps, 29 to go


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = (
        "import sys, torch; from tests.test_loop import make, go; run = make(sgd=0.5, clip=0, batch_size=7, micro_batch_size=2); got = go(run); "
        "assert run.accelerator.num_processes == 2; torch.save(got, sys.argv[1])"
    )
    running = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, os.getcwd()])}
        running.append(subprocess.Popen([sys.executable, "-c", script, str(tmp_path / f"{rank}.pt")], env=env))
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    one = go(make(sgd=0.5, clip=0, batch_size=7))
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in one.items():
            torch.testing.assert_close(got[name], value, rtol=2e-5, atol=2e-6)
