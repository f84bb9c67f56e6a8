"""The same start, data and optimizer give the loss curve of HF PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import weft
import weft.tuning
from tests import tiny
from weft.base import Base
from weft.engine.loop import Run, train
from weft.ops import magnitude

ROWS = [
    {"text": f"what is the {a} of {b} and {c}"} for a in ("river", "city", "film", "it") for b in ("good", "bad", "a") for c in ("how", "many", "far", "was")
]
STEPS = 50


class Recorded:
    """A run of tune: where its tensors start, the batches of each step, their losses and learning rates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base: Path, **options: Any) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.batches: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        monkeypatch.setattr(weft.tuning, "train", self._train)
        weft.tune(base, ROWS, steps=STEPS, batch_size=8, lr=2e-2, weight_decay=0.05, threads=1, progress=self._heard, **options)

    def _train(self, run: Run, *args: Any, **kwargs: Any) -> Any:
        self.start = {name: value.detach().clone() for name, value in run.tensors.items()}
        loss = run.objective.loss

        def recorded(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            self.batches.append({name: value.clone() for name, value in batch.items()})
            return loss(model, batch)

        run.objective.loss = recorded  # type: ignore[method-assign]
        return train(run, *args, **kwargs)

    def _heard(self, event: Any) -> None:
        if event["event"] == "step":
            self.losses.append(event["loss"])
            self.rates.append(event["lr"])


def with_peft(recorded: Recorded, base: Path, **options: Any) -> list[float]:
    """The losses of PEFT's LoRA from the same start, over the same batches, by the same optimizer."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(Base.open(base).model(), LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", **options))
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(recorded.start)
    with torch.no_grad():
        for key, value in recorded.start.items():
            target, _, field = key.rpartition("//")
            trained[f"base_model.model.{target.removesuffix('.weight')}.{names[field.rpartition('.')[2]]}"].copy_(value)
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    model.train()
    losses = []
    for batch, rate in zip(recorded.batches[-STEPS:], recorded.rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rslora: bool) -> None:
    base = tiny.llama(tmp_path / "llama")
    recorded = Recorded(monkeypatch, base, method="lora", rank=4, rslora=rslora)
    losses = with_peft(recorded, base, use_rslora=rslora)
    assert recorded.losses[-1] < 0.8 * recorded.losses[0]
    assert recorded.losses == pytest.approx(losses, rel=1e-4)


def test_dora_up_to_the_gradient_of_the_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT takes ||w + s B A|| for a constant in the backward pass (section 4.3 of the paper, to save memory), and nothing else is different: here the gradient
    goes through it, unless it is cut off."""
    base = tiny.llama(tmp_path / "llama")
    recorded = Recorded(monkeypatch, base, method="lora", rank=4, dora=True)
    losses = with_peft(recorded, base, use_dora=True)
    assert recorded.losses[0] == pytest.approx(losses[0], rel=1e-5)
    assert recorded.losses != pytest.approx(losses, rel=1e-2)
    norms = magnitude.norms
    monkeypatch.setattr(magnitude, "norms", lambda w, axis: norms(w.detach() if isinstance(w, torch.Tensor) else w, axis))
    cut = Recorded(monkeypatch, base, method="lora", rank=4, dora=True)
    assert cut.losses[-1] < 0.8 * cut.losses[0]
    assert cut.losses == pytest.approx(with_peft(cut, base, use_dora=True), rel=1e-4)
