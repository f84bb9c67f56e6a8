"""Optimizers: each against its formula, in the loop, resumed, and for what its paper promises."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import weft
from tests.killed import tune_until_killed
from tests.test_tune import LABELLED, QUICK, ROWS, save_model
from weft import config, methods
from weft.attaching import attach
from weft.delta import Builder
from weft.engine.events import Events
from weft.engine.loop import Hooks, LoopConfig, Part, Run, train
from weft.errors import UsageError
from weft.tuning import tune
from weft.tuning.optimizer import Rates, depth, groups
from weft.tuning.optimizer.adadagrad import variance
from weft.tuning.optimizer.mkor import sherman_morrison
from weft.tuning.optimizer.sophia import Sophia, SophiaConfig, gauss_newton_bartlett, hutchinson

NAMES = ("adadagrad", "adafactor", "adamr", "adamw", "mkor", "mkor-h", "muon", "sgd", "sophia", "sso")


def optimizer(name: str, tensors: dict[str, nn.Parameter], **options: Any) -> Any:
    found = methods.get("optimizer", name)
    return found.run(tensors, config.make(found.config, options, name))


class Rows:
    """Rows x with classes y (cross-entropy), or with numbers y (half the squared error); `width` tells how long each seems to be."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y
        self.examples = [{"input_ids": [k]} for k in range(len(x))]
        self.seen: list[int] = []

    def collate(self, examples: Sequence[dict[str, Any]], keys: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = torch.tensor([example["input_ids"][0] for example in examples])
        self.seen += rows.tolist()
        return {"input_ids": rows[:, None], "x": self.x[rows], "y": self.y[rows]}

    def weight(self, batch: dict[str, torch.Tensor]) -> float:
        return float(len(batch["x"]))

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        out = model(batch["x"])
        return nn.functional.cross_entropy(out, batch["y"]) if batch["y"].dtype == torch.int64 else (out - batch["y"]).square().sum() / (2 * len(out))


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net(seed: int = 0, sizes: Sequence[int] = (5, 7, 3), bias: bool = True, dropout: float = 0.0) -> nn.Sequential:
    """A small net whose tensors are all away from zero."""
    parts: list[nn.Module] = []
    for k, (a, b) in enumerate(pairwise(sizes)):
        parts += [nn.Linear(a, b, bias=bias), nn.Tanh(), *([nn.Dropout(dropout)] if dropout else [])]
        with torch.no_grad():
            for j, p in enumerate(parts[-3 if dropout else -2].parameters()):
                p.copy_(drawn(100 * seed + 10 * k + j, *p.shape) / a**0.5)
    return nn.Sequential(*parts[: -2 if dropout else -1])


def classes(count: int = 24, size: int = 5, of: int = 3) -> Rows:
    x = drawn(7, count, size)
    return Rows(x, (x @ drawn(8, size, of)).argmax(1))


def run_of(model: nn.Module, rows: Any, name: str, *, hooks: Sequence[Hooks] = (), loop: dict[str, Any] | None = None, **options: Any) -> Run:
    tensors = {key: p for key, p in model.named_parameters() if p.requires_grad}
    made = LoopConfig(**{"batch_size": len(rows.examples), "steps": 1, "clip": 0, "bucket": False, **(loop or {})})
    return Run(model, rows, tensors, optimizer(name, tensors, **options), lambda place, total: 1.0, made, 3, hooks)


def go(run: Run, **options: Any) -> list[dict[str, Any]]:
    """Train; the events of the steps."""
    found: list[dict[str, Any]] = []
    with Events(None, lambda event: found.append(event) if event["event"] == "step" else None) as events:
        train(run, events, **options)
    return found


def values(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.tensors.items()}


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], rtol: float = 2e-5, atol: float = 2e-6) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def gradients_of(model: nn.Module, rows: Rows, chosen: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
    chosen = range(len(rows.x)) if chosen is None else chosen
    loss = rows.loss(model, rows.collate([rows.examples[k] for k in chosen], []))
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, params), strict=True))


def test_these_are_all_the_optimizers_tested_here() -> None:
    assert sorted(NAMES) == methods.names("optimizer")


# --- through tune


@pytest.mark.parametrize("name", [*NAMES, "hutchinson"])
@pytest.mark.parametrize(("space", "objective"), [("lora", "classification"), pytest.param("full", "causal-lm", marks=pytest.mark.slow)])
def test_k_and_k_steps_are_2k_steps(tmp_path: Path, name: str, space: str, objective: str) -> None:
    kind, data = ("bert", LABELLED * 4) if objective == "classification" else ("llama", ROWS * 4)
    folder = save_model(tmp_path / kind, kind)
    options: dict[str, Any] = {**QUICK, "method": space, "objective": objective, "optimizer": name, "steps": 12, "lr": 0.003, "b_ratio": 3.0}
    options |= {"optimizer.every": 2} if name in ("mkor", "mkor-h", "sophia", "adadagrad") else {}
    options |= {"window": 1, "least": 0.9} if name == "mkor-h" else {"eta": 1.5} if name == "adadagrad" else {}
    options |= {"optimizer": "sophia", "estimator": "hutchinson", "optimizer.every": 5} if name == "hutchinson" else {}
    losses: list[float] = []
    whole = tune(folder, data, **{**options, "progress": lambda event: losses.append(event["loss"]) if event["event"] == "step" else None})
    tune_until_killed(folder, data, step=5, out=tmp_path / "d.safetensors", save_every=3, **{**options, "progress": None})
    again = tune(folder, data, out=tmp_path / "d.safetensors", resume=tmp_path / "d.safetensors.state", **options)
    assert again.id == whole.id and again.notes["steps"] == len(losses) > 4 and len(set(losses)) == len(losses)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"optimizer": "sophia"}, {"optimizer": "sophia", "estimator": "hutchinson"}, {"optimizer": "mkor"}, {"optimizer": "sso"}])
def test_bfloat16_and_micro_batches_go_with_it(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save_model(tmp_path / "llama", "llama")
    options = {**QUICK, **options, "lr": 0.003, "micro_batch_size": 3}
    found = [tune(folder, ROWS, autocast=autocast, **options) for autocast in (False, True)]
    one, two = (np.concatenate([delta.get(key).reshape(-1) for key in sorted(delta.tensors) if key.endswith(".B")]) for delta in found)
    assert np.abs(one).max() > 0 and not np.array_equal(one, two)
    assert one @ two / (np.linalg.norm(one) * np.linalg.norm(two)) > 0.95


@pytest.mark.parametrize("name", ["sophia", "mkor", "sso", "adadagrad"])
def test_nothing_is_left_on_the_model(name: str) -> None:
    """Neither after a run nor after one that broke off in the middle of a step."""

    class Broken(Rows):
        def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            if len(self.seen) > 30:
                raise KeyboardInterrupt
            return super().loss(model, batch)

    for kind in (Rows, Broken):
        rows, model = kind(classes().x, classes().y), net()
        run = run_of(model, rows, name, loop={"steps": 9, "batch_size": 6})
        try:
            go(run)
            assert kind is Rows
        except KeyboardInterrupt:
            assert kind is Broken
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any(p._backward_hooks for p in model.parameters())


# --- rates


def test_names_tell_layers_and_factors() -> None:
    names = {
        "bert.embeddings.word_embeddings.weight//0.A": None,
        "bert.encoder.layer.0.output.dense.weight//0.A": ("bert.encoder.layer", 0),
        "bert.encoder.layer.0.output.dense.weight//0.B": ("bert.encoder.layer", 0),
        "bert.encoder.layer.2.output.dense.bias": ("bert.encoder.layer", 2),
        "classifier.weight": None,
        "transformer.h.11.mlp.c_fc.weight": ("transformer.h", 11),
    }
    assert {name: depth(name) for name in names} == names
    tensors = {name: nn.Parameter(torch.zeros(() if name.endswith("bias") else (2, 2))) for name in list(names)[:-1]}
    made = groups(tensors, Rates(lr=0.1, b_ratio=16.0, layer_decay=0.5), decay=0.3)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in made for p in group["params"]}
    assert [rate[id(p)] for p in tensors.values()] == [(0.1 / 16, 0.3), (0.1 / 8, 0.3), (1.6 / 8, 0.3), (0.05, 0.0), (0.1, 0.3)]
    # nothing asked: matrices, then vectors, and no more groups than that
    assert [len(group["params"]) for group in groups(tensors, Rates(lr=0.1), decay=0.3)] == [4, 1]
    assert len(groups(tensors, Rates(lr=0.1))) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_takes_the_ratio(tmp_path: Path, name: str) -> None:
    """The schedule multiplies each group's own rate."""
    tensors = {"a.weight//0.A": nn.Parameter(drawn(0, 4, 3)), "a.weight//0.B": nn.Parameter(drawn(1, 4, 3))}
    made = optimizer(name, tensors, lr=0.01, b_ratio=4.0)
    assert sorted(group["lr"] for group in made.param_groups) == pytest.approx([0.01, 0.04])


def test_lora_plus_moves_b_so_many_times_as_far(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama", "llama")
    options: dict[str, Any] = {**QUICK, "steps": 1, "optimizer": "sgd", "momentum": 0.0, "lr": 0.01, "warmup": 0.0, "clip": 0}
    plain, plus = (tune(folder, ROWS, b_ratio=ratio, **options) for ratio in (1.0, 16.0))
    for key in plain.tensors:
        if key.endswith(".B"):
            assert np.abs(plain.get(key)).max() > 0
            np.testing.assert_allclose(plus.get(key), 16 * plain.get(key), rtol=1e-6)


# --- those that are torch's


def test_sgd_with_momentum_is_its_formula() -> None:
    for nesterov in (False, True):
        p, g = nn.Parameter(drawn(0, 3, 4)), [drawn(k, 3, 4) for k in range(1, 6)]
        want, m = p.detach().double(), torch.zeros(3, 4).double()
        made = optimizer("sgd", {"p": p}, lr=0.1, momentum=0.8, nesterov=nesterov)
        for each in g:
            p.grad = each.clone()
            made.step()
            m = 0.8 * m + each
            want = want - 0.1 * (each + 0.8 * m if nesterov else m)
        torch.testing.assert_close(p.detach(), want.float())
    with pytest.raises(UsageError, match="needs momentum"):
        optimizer("sgd", {"p": p}, momentum=0.0, nesterov=True)


def test_adafactor_is_its_formula() -> None:
    p, g = nn.Parameter(drawn(0, 3, 4)), [drawn(k, 3, 4) for k in range(1, 6)]
    w, row, column = p.detach().numpy().astype(float), np.zeros((3, 1)), np.zeros((1, 4))
    made = optimizer("adafactor", {"p": p}, lr=0.3)
    for t, each in enumerate(g, 1):
        p.grad = each.clone()
        made.step()
        b, square = 1 - t**-0.8, each.numpy().astype(float) ** 2
        row, column = b * row + (1 - b) * square.mean(1, keepdims=True), b * column + (1 - b) * square.mean(0, keepdims=True)
        u = each.numpy() / np.sqrt(row * column / row.mean())
        w = w - min(0.3, t**-0.5) * np.sqrt((w**2).mean()) * u / max(1.0, np.sqrt((u**2).mean()))
    np.testing.assert_allclose(p.detach().numpy(), w, rtol=2e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_muon_is_for_the_matrices_of_layers_and_adamw_for_the_rest() -> None:
    shapes = {"embed.weight": (6, 4), "layers.0.up.weight": (8, 4), "layers.0.up.bias": (8,), "layers.0.experts.w": (2, 3, 4), "lm_head.weight": (6, 4)}
    tensors = {name: nn.Parameter(drawn(k, *shape)) for k, (name, shape) in enumerate(shapes.items())}
    apart = {name: nn.Parameter(p.detach().clone()) for name, p in tensors.items()}
    made = optimizer("muon", tensors, lr=0.01, weight_decay=0.1)
    inside = ["layers.0.up.weight"]
    muon = torch.optim.Muon([apart[name] for name in inside], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = optimizer("adamw", {name: p for name, p in apart.items() if name not in inside}, lr=0.01, weight_decay=0.1)
    before = tensors["layers.0.up.weight"].detach().clone()
    for k in range(4):
        for name in shapes:
            tensors[name].grad = drawn(50 + 10 * k + len(name), *shapes[name])
            apart[name].grad = tensors[name].grad.clone()  # type: ignore[union-attr]
        for each in (made, muon, rest):
            each.step()
        if k == 0:  # the step's singular values are alike, and its size is AdamW's
            step = (before * (1 - 0.001) - tensors["layers.0.up.weight"].detach()) / 0.01
            s = torch.linalg.svdvals(step)
            assert float(s.max() / s.min()) < 1.8 and 0.1 < float(step.square().mean().sqrt()) < 0.2
        if k == 1:
            other = optimizer("muon", tensors, lr=0.5, weight_decay=0.1)
            other.load_state_dict(made.state_dict())
            made = other
    for name in shapes:
        assert torch.equal(tensors[name], apart[name]), name


def test_muon_without_layers_takes_every_matrix_and_an_old_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = optimizer("muon", {"a.weight": nn.Parameter(drawn(0, 3, 3))})
    assert type(made) is torch.optim.Muon
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UsageError, match="no Muon"):
        optimizer("muon", {"a.weight": nn.Parameter(drawn(0, 3, 3))})


# --- sophia


def test_sophia_is_its_formula() -> None:
    p = nn.Parameter(drawn(0, 4, 5))
    made = optimizer("sophia", {"p": p}, lr=0.02, gamma=0.4, beta1=0.9, beta2=0.8, weight_decay=0.5)
    w, m, h = p.detach().double(), torch.zeros(4, 5).double(), torch.zeros(4, 5).double()
    clipped = []
    for k in range(12):
        g = drawn(k + 1, 4, 5)
        if k % 3 == 0:
            found = 8 * drawn(k + 50, 4, 5)  # negative in places, as Hutchinson's may be
            made.curvature({p: found})
            h = 0.8 * h + 0.2 * found
        p.grad = g.clone()
        made.step()
        m = 0.9 * m + 0.1 * g
        ratio = m / torch.clamp(0.4 * h, min=1e-12)
        clipped.append(float((ratio.abs() > 1).double().mean()))
        w = w * (1 - 0.02 * 0.5) - 0.02 * ratio.clamp(-1, 1)
    assert 0.2 < np.mean(clipped) < 0.9
    torch.testing.assert_close(p.detach(), w.float(), rtol=1e-5, atol=1e-6)


def estimate(model: nn.Module, rows: Rows, how: Callable[..., Any], seed: int, micro: int = 0) -> dict[str, torch.Tensor]:
    """One estimate for all rows, as the loop would ask for it at step `seed`."""
    from accelerate import Accelerator

    run = run_of(model, rows, "sophia", loop={"micro_batch_size": micro})
    run.step, run.accelerator = seed, Accelerator()
    torch.manual_seed(seed)
    size = micro or len(rows.x)
    cut = [range(k, min(k + size, len(rows.x))) for k in range(0, len(rows.x), size)]
    parts = [Part(rows.collate([rows.examples[k] for k in each], []), len(each) / len(rows.x)) for each in cut]
    found = how(run, parts, list(run.tensors.values()))
    return {name: found[p] for name, p in run.tensors.items()}


def test_gauss_newton_bartlett_is_the_square_of_the_gradient_with_drawn_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the likeliest label in place of a drawn one, so that it can be computed twice; however the batch is cut."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n: p.argmax(-1, keepdim=True))
    model, rows = net(), classes()
    guessed = Rows(rows.x, model(rows.x).argmax(1))
    assert not torch.equal(guessed.y, rows.y)
    want = {name: len(rows.x) * g.square() for name, g in gradients_of(model, guessed).items()}
    for micro in (0, 5):
        close(estimate(model, rows, gauss_newton_bartlett, 0, micro), want)


@pytest.mark.slow
def test_gauss_newton_bartlett_averages_to_the_gauss_newton_matrix() -> None:
    model, rows = net(sizes=(5, 3), bias=False), classes(6)
    p = model(rows.x).softmax(-1).detach()
    # of one row: x_j^2 (p_c - p_c^2) for the weight from j to c; the estimate is N times that of the mean over N rows
    want = torch.einsum("nj,nc->cj", rows.x.square(), p - p.square()) / len(rows.x)
    found = torch.stack([estimate(model, rows, gauss_newton_bartlett, k)["0.weight"] for k in range(500)])
    error = (found.mean(0) - want) / (found.std(0) / math.sqrt(len(found)))
    assert float(error.abs().max()) < 4.5 and float(want.min()) > 0.02


@pytest.mark.slow
def test_hutchinson_averages_to_the_hessians_diagonal() -> None:
    model, rows = net(sizes=(3, 4, 3)), classes(10, 3)
    names = [name for name, _ in model.named_parameters()]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), rows.x), rows.y)

    given = tuple(p.detach() for p in model.parameters())
    whole = torch.autograd.functional.hessian(loss, given)
    want = {name: whole[k][k].reshape(given[k].numel(), -1).diagonal().reshape(given[k].shape) for k, name in enumerate(names)}
    assert min(float(value.min()) for value in want.values()) < 0  # it is no Gauss-Newton matrix
    found = [estimate(model, rows, hutchinson, k) for k in range(400)]
    for name, value in want.items():
        each = torch.stack([one[name] for one in found])
        assert float(((each.mean(0) - value) / (each.std(0) / math.sqrt(len(each)))).abs().max()) < 4.5, name
    close(estimate(model, rows, hutchinson, 5, 3), estimate(model, rows, hutchinson, 5), rtol=1e-4)


def test_only_scored_tokens_count(tmp_path: Path) -> None:
    """A causal model with prompts and padding: N is the number of tokens that are predicted."""
    base = weft.Base.open(save_model(tmp_path / "llama", "llama"))
    found = methods.get("objective", "causal-lm")
    data = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}, {"input_ids": [6, 9, 11], "labels": [-100, 9, 11]}]
    goal = found.run(config.make(found.config, {}, ""), base, None, data)
    seen: list[int] = []
    real = torch.multinomial

    def counted(p: torch.Tensor, n: int) -> torch.Tensor:
        seen.append(len(p))
        return real(p, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", counted)
        go(run_of(base.model(), goal, "sophia", lr=1e-3))
    assert seen == [5]


def test_sophia_draws_nothing_from_the_steps_own_random_numbers() -> None:
    first = [go(run_of(net(dropout=0.5), classes(), name, loop={"steps": 2}, lr=1e-9))[0]["loss"] for name in ("sophia", "sgd")]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_an_objective_without_classes_is_told(tmp_path: Path) -> None:
    rows = Rows(drawn(0, 8, 5), drawn(1, 8, 1))
    with pytest.raises(UsageError, match="needs logits of two classes"):
        go(run_of(net(sizes=(5, 4, 1)), rows, "sophia"))
    go(run_of(net(sizes=(5, 4, 1)), rows, "sophia", estimator="hutchinson"))
    with pytest.raises(UsageError, match="sso needs logits"):
        go(run_of(net(sizes=(5, 4, 1)), rows, "sso"))


def descent(make: Callable[[nn.Parameter], Any], curvature: torch.Tensor, steps: int, goal: float = 1e-6) -> int:
    """Steps until the loss sum(c x^2)/2 is `goal` of what it was, x at distances of 0.1 to 10; `steps` if it never is."""
    x = nn.Parameter(torch.logspace(-1, 1, len(curvature))[torch.randperm(len(curvature), generator=torch.Generator().manual_seed(1))])
    made = make(x)
    start = float((curvature * x.detach().square()).sum())
    for k in range(steps):
        loss = float((curvature * x.detach().square()).sum())
        if not loss < math.inf or loss < goal * start:
            return k if math.isfinite(loss) else steps
        if isinstance(made, Sophia):
            made.curvature({x: curvature})
        x.grad = curvature * x.detach()
        made.step()
    return steps


@pytest.mark.slow
def test_sophia_does_not_mind_conditioning_and_beats_adam_where_curvatures_differ() -> None:
    """Section 1 of the paper: each entry has the step that its curvature allows, and no more than the learning rate. Every optimizer at the best of
    the same rates, on quadratics with the true curvature: a bound on what estimates can do."""
    rates = [10 ** (k / 3) for k in range(-9, 2)]
    found: dict[str, list[int]] = {"sophia": [], "adamw": [], "sgd": []}
    makers: dict[str, Callable[[float], Callable[[nn.Parameter], Any]]] = {
        "sophia": lambda lr: lambda x: Sophia([{"params": [x], "lr": lr, "weight_decay": 0.0}], SophiaConfig(gamma=1.0, beta1=0.0, beta2=0.0)),
        "adamw": lambda lr: lambda x: optimizer("adamw", {"x": x}, lr=lr, weight_decay=0.0),
        "sgd": lambda lr: lambda x: optimizer("sgd", {"x": x}, lr=lr, momentum=0.0),
    }
    for condition in (1.0, 1e2, 1e4):
        c = torch.logspace(0, math.log10(condition), 20) / condition
        for name, make in makers.items():
            found[name].append(min(descent(make(lr), c, 400) for lr in rates))
    assert max(found["sophia"]) <= min(found["sophia"]) + 2, found
    assert found["sgd"][2] == 400, found
    assert all(3 * a < b for a, b in zip(found["sophia"], found["adamw"], strict=True)), found


# --- mkor


def test_the_rank_1_update_is_the_inverse_of_the_decayed_factor() -> None:
    inverse, factor = torch.eye(7, dtype=torch.float64), np.eye(7)
    for k in range(30):
        v = 3 * drawn(k, 7).double()
        inverse = sherman_morrison(inverse, v, 0.9)
        factor = 0.9 * factor + 0.1 * np.outer(v, v)
    np.testing.assert_allclose(inverse.numpy(), np.linalg.inv(factor), rtol=1e-9, atol=1e-12)


def mkor_reference(model: nn.Sequential, rows: Rows, steps: int, every: int, limit: float, lr: float, mu: float) -> dict[str, torch.Tensor]:
    """The file's head, in float64, for nets of linear layers with biases."""
    model = model.double()
    x = rows.x.double()
    names = [name for name, _ in model.named_parameters()]
    eyes = {k: [np.eye(m.out_features), np.eye(m.in_features + 1)] for k, m in enumerate(model) if isinstance(m, nn.Linear)}
    momentum = dict.fromkeys(names, 0.0)
    drawn_back = 0
    for step in range(steps):
        inputs, outputs, z = {}, {}, x
        for k, m in enumerate(model):
            inputs[k], z = z, m(z)
            outputs[k] = z
        loss = nn.functional.cross_entropy(z, rows.y)
        found = torch.autograd.grad(loss, [*[outputs[k] for k in eyes], *model.parameters()])
        dy, grads = dict(zip(eyes, found, strict=False)), dict(zip(names, found[len(eyes) :], strict=True))
        for k, pair in eyes.items():
            if step % every == 0:
                a = np.append(inputs[k].mean(0).detach().numpy(), 1.0)
                g = (dy[k] * len(x)).mean(0).numpy()  # of each example's own loss
                for side, v in enumerate((g, a)):
                    m = pair[side]
                    if abs(m).max() > limit:
                        drawn_back += 1
                        pair[side] = 0.9 * m + 0.1 * np.eye(len(m))
                    else:
                        pair[side] = np.linalg.inv(0.95 * np.linalg.inv(m) + 0.05 * np.outer(v, v))
            joint = torch.cat([grads[f"{k}.weight"], grads[f"{k}.bias"][:, None]], 1).numpy()
            new = pair[0] @ joint @ pair[1]
            new *= np.linalg.norm(joint) / np.linalg.norm(new)
            grads[f"{k}.weight"], grads[f"{k}.bias"] = torch.tensor(new[:, :-1]), torch.tensor(new[:, -1])
        with torch.no_grad():
            for name, p in model.named_parameters():
                momentum[name] = mu * momentum[name] + grads[name]
                p.sub_(lr * momentum[name])
    assert drawn_back > 0
    return {name: p.detach().float() for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro", [0, 5])
def test_mkor_is_its_formula(micro: int) -> None:
    rows = classes()
    want = mkor_reference(net(), rows, 12, 2, 1.15, 0.2, 0.8)
    run = run_of(net(), rows, "mkor", every=2, limit=1.15, lr=0.2, momentum=0.8, loop={"steps": 12, "micro_batch_size": micro})
    go(run)
    close(values(run), want, rtol=2e-4, atol=2e-5)
    plain = run_of(net(), rows, "sgd", lr=0.2, momentum=0.8, loop={"steps": 12})
    go(plain)
    assert max(float((p - want[name]).abs().max()) for name, p in values(plain).items()) > 0.02


def test_rows_without_a_gradient_are_in_no_mean() -> None:
    """Padding: a net that looks at the first rows only, and the same rows alone."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = net(sizes=(5, 3))[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(torch.cat([x, 100 + x]))[: len(x)]  # type: ignore[no-any-return]

    class Short(Cut):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(x)  # type: ignore[no-any-return]

    runs = [run_of(kind(), classes(), "mkor", every=1, loop={"steps": 3}) for kind in (Cut, Short)]
    for run in runs:
        go(run)
    close(values(runs[0]), values(runs[1]))


def test_factors_of_lora_are_layers_of_their_own() -> None:
    """The same product as two linear modules in a row gives the same inverses and steps; scaled, so that B's gradients are not the layer's."""
    scale = 2.5
    host = nn.Sequential(nn.Linear(5, 4, bias=False))
    with torch.no_grad():
        host[0].weight.copy_(drawn(3, 4, 5) / 2)
    a, b = drawn(1, 2, 5) / 2, drawn(2, 4, 2) / 2

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 2, bias=False), nn.Linear(2, 4, bias=False)
            self.w = host[0].weight.detach().clone()
            with torch.no_grad():
                self.a.weight.copy_(a)
                self.b.weight.copy_(b)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # the scale after B, as on a layer: B's own output is not scaled, and its gradient is
            return x @ self.w.T + scale * self.b(self.a(x))  # type: ignore[no-any-return]

    rows = classes(of=4)
    apart = run_of(Apart(), rows, "mkor", every=1, lr=0.05, loop={"steps": 5})
    go(apart)
    base = weft.Base.of(host)
    build = Builder(base)
    build.put("0.weight", "lowrank", {"A": a, "B": b}, scale=scale)
    handle = attach(host, build.done(), base=base, trainable=True)
    tensors = {key: p for key, p in handle.tensors().items() if isinstance(p, nn.Parameter)}
    for p in host.parameters():
        p.requires_grad_(any(p is each for each in tensors.values()))
    run = run_of(host, rows, "mkor", every=1, lr=0.05, loop={"steps": 5})
    run.tensors = tensors
    run.optimizer = optimizer("mkor", tensors, every=1, lr=0.05)
    run.__post_init__()
    go(run)
    close({key[-1].lower(): p for key, p in values(run).items()}, {key[0]: p for key, p in values(apart).items()})
    for name, module in (("A", apart.model.a), ("B", apart.model.b)):
        key = next(key for key in tensors if key.endswith(name))
        for side in ("left", "right"):
            got, want = run.optimizer.state[tensors[key]][side], apart.optimizer.state[module.weight][side]
            torch.testing.assert_close(got, want)
            assert not torch.allclose(want, torch.eye(len(want)) * 0.95**-5, rtol=1e-4)


@pytest.mark.parametrize("op", ["svd", "dense", "assign"])
def test_other_ops_on_a_linear_layer_have_factors_too(op: str) -> None:
    """Their mean inputs and gradients, from the layer's, are those of the gradient: with one row it is their outer product."""
    host = nn.Sequential(nn.Linear(5, 4, bias=False))
    base = weft.Base.of(host)
    build = Builder(base)
    fields = {"P": drawn(1, 4, 2), "lam": drawn(2, 2), "Q": drawn(3, 2, 5)} if op == "svd" else {"values": drawn(1, 4, 5)}
    build.put("0.weight", op, fields, **({} if op == "assign" else {"scale": 1.7}))
    handle = attach(host, build.done(), base=base, trainable=True)
    tensors = {key: p for key, p in handle.tensors().items() if isinstance(p, nn.Parameter)}
    rows = Rows(drawn(4, 1, 5), torch.tensor([2]))
    run = run_of(host, rows, "mkor")
    run.tensors, run.optimizer = tensors, optimizer("mkor", tensors)
    seen: list[int] = []

    class Look(Hooks):
        def gradients(self, run: Run) -> None:
            loss = rows.loss(host, rows.collate(rows.examples, []))
            out = torch.autograd.grad(nn.functional.cross_entropy(made := host(rows.x), rows.y), made)[0][0]
            for _, layers in run.optimizer._layers:
                for layer in layers:
                    want = torch.autograd.grad(loss, layer.weight, retain_graph=True)[0]
                    torch.testing.assert_close(torch.outer(layer.grads(out), layer.inputs(rows.x[0])).detach(), want)
                    seen.append(layer.weight.numel())

    run.hooks = [Look()]
    run.__post_init__()
    go(run)
    assert sorted(seen) == ([8, 10] if op == "svd" else [20])


def test_mkor_without_matrices_is_momentum_and_says_so() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    runs = [run_of(Table(), classes(), name, loop={"steps": 3}) for name in ("mkor", "sgd")]
    with pytest.warns(UserWarning, match="momentum alone"):
        go(runs[0])
    go(runs[1])
    assert torch.equal(*(run.tensors["scale"] for run in runs))


def steps_to(goal: float, seed: int, name: str, rates: Sequence[float], sizes: Sequence[int], most: int, **options: Any) -> int:
    """Full-batch steps until a net has the loss `goal`, at the best of the rates; on inputs of very different sizes with a common part."""
    scale = torch.logspace(0, -1.3, 12)
    clean = drawn(seed, 200, 12)
    rows = Rows(clean * scale + 1.0, (clean @ drawn(seed + 50, 12, 4)).argmax(1))
    for rate in rates:
        losses: list[float] = []

        def heard(event: dict[str, Any], losses: list[float] = losses) -> None:
            if event["event"] == "step":
                losses.append(event["loss"])
                if event["loss"] < goal:
                    raise KeyboardInterrupt

        try:
            with Events(None, heard) as events:
                train(run_of(net(seed, sizes), rows, name, lr=rate, loop={"steps": most}, **options), events)
        except KeyboardInterrupt:
            most = len(losses)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mkor_needs_fewer_steps_than_sgd_and_adamw_at_their_best_rates(seed: int) -> None:
    """A net of two layers; the direction is the paper's claim, the problem is ours. 2,000 steps in all at most."""
    task: Any = (0.3, seed)
    found = {
        "mkor": steps_to(*task, "mkor", (0.3, 0.1, 1.0), (12, 24, 4), 150, every=1),
        "sgd": steps_to(*task, "sgd", (0.3, 0.1, 0.03, 1.0), (12, 24, 4), 150),
        "adamw": steps_to(*task, "adamw", (0.03, 0.1, 0.01, 0.3), (12, 24, 4), 150, weight_decay=0.0),
    }
    assert 1.5 * found["mkor"] < min(found["sgd"], found["adamw"]), found


# --- mkor-h


def test_mkor_h_falls_back_for_good_and_gives_its_factors_up(tmp_path: Path) -> None:
    rows = classes()
    options: dict[str, Any] = {"every": 1, "lr": 0.3, "momentum": 0.5, "window": 4, "least": 0.15}
    run = run_of(net(), rows, "mkor-h", loop={"steps": 60}, **options)
    kept: list[bool] = []
    states: list[dict[str, torch.Tensor]] = []

    class Watch(Hooks):
        def after_step(self, run: Run) -> None:
            kept.append(any("left" in state for state in run.optimizer.state.values()))
            states.append(values(run))

    run.hooks = [Watch()]
    losses = [event["loss"] for event in go(run)]
    assert kept[0] and not kept[-1] and kept == sorted(kept, reverse=True)
    fell = kept.index(False)  # after this step
    means = [sum(losses[k : k + 4]) / 4 for k in range(0, 60, 4)]
    assert fell % 4 == 3 and fell == 4 * next(k for k in range(1, 15) if means[k] > means[k - 1] * 0.85) + 3 > 7
    # until then it is mkor, and then momentum
    twin = run_of(net(), rows, "mkor", loop={"steps": fell + 1}, **{key: options[key] for key in ("every", "lr", "momentum")})
    go(twin)
    assert all(torch.equal(p, states[fell][name]) for name, p in values(twin).items())
    model = net()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(states[fell][name])
    before, g = states[fell - 1], gradients_of(model, rows)
    for name, p in model.named_parameters():
        torch.testing.assert_close(states[fell + 1][name], (p + 0.5 * (p - before[name]) - 0.3 * g[name]).detach(), rtol=1e-4, atol=1e-5)
    # resumed on either side of the switch
    for cut in (fell - 1, fell + 5):
        state = tmp_path / f"{cut}.state"
        stopped(run_of(net(), rows, "mkor-h", loop={"steps": 60}, **options), state, cut)
        again = run_of(net(), rows, "mkor-h", loop={"steps": 60}, **options)
        go(again, resume=state)
        assert all(torch.equal(p, states[-1][name]) for name, p in values(again).items())


def stopped(run: Run, state: Path, steps: int) -> None:
    """Break off after so many steps, when the state has been written."""

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "save":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Events(None, stop) as events:
        train(run, events, state=state, save_every=steps)


# --- adadagrad


def test_adadagrad_is_its_formula() -> None:
    for scalar in (False, True):
        shapes = {"a": (3, 4), "b": (5,)}
        tensors = {name: nn.Parameter(drawn(0, *shape)) for name, shape in shapes.items()}
        w = {name: p.detach().double() for name, p in tensors.items()}
        total: dict[str, Any] = dict.fromkeys(shapes, 0.0)
        made = optimizer("adadagrad", tensors, lr=0.3, scalar=scalar)
        for k in range(6):
            g = {name: drawn(10 * k + len(name) + len(shape), *shape) for name, shape in shapes.items()}
            for name, p in tensors.items():
                p.grad = g[name].clone()
            made.step()
            whole = sum(each.double().square().sum() for each in g.values())
            for name in shapes:
                total[name] = total[name] + (whole if scalar else g[name].double().square())
                w[name] = w[name] - 0.3 * g[name] / (total[name].sqrt() + 1e-8)
        close({name: p.detach() for name, p in tensors.items()}, {name: value.float() for name, value in w.items()})


def test_the_variance_is_that_of_the_examples() -> None:
    """With one example a piece it is the sample variance of their gradients; with more it is so on average."""
    g = drawn(0, 60, 9).double() * torch.logspace(0, 1, 9) + 0.4
    want = float(g.var(0, correction=1).sum())
    square = float(g.mean(0).square().sum())
    assert variance(float(g.square().sum()) / 60, square, 60, 60) == pytest.approx(want)
    found = []
    for k in range(400):
        cut = g[torch.randperm(60, generator=torch.Generator().manual_seed(k))].split([10, 20, 30])
        found.append(variance(sum(len(part) / 60 * float(part.mean(0).square().sum()) for part in cut), square, 3, 60))
    assert np.mean(found) == pytest.approx(want, abs=4 * np.std(found) / 20)


def test_the_norm_test_is_taken_from_the_steps_own_micro_batches() -> None:
    """The width after a step is the formula's, with gradients taken one by one."""
    rows, model = classes(24), net()
    each = [torch.cat([g.reshape(-1) for g in gradients_of(model, rows, [k]).values()]) for k in range(24)]
    widths = []
    for eta in (0.2, 0.5, 1.0):
        rows.seen.clear()
        run = run_of(net(), rows, "adadagrad", eta=eta, pieces=6, loop={"batch_size": 6, "steps": 4})
        seen: list[int] = []

        class First(Hooks):
            def after_step(self, run: Run, seen: list[int] = seen) -> None:
                seen.append(run.width)

        run.hooks = [First()]
        go(run)
        g = torch.stack([each[k] for k in rows.seen[:6]])
        needed = float(g.var(0, correction=1).sum()) / (eta**2 * float(g.mean(0).square().sum()))
        assert seen[0] == max(1, min(4, math.ceil(needed / 6)))  # four batches are an epoch
        widths.append(seen[0])
    assert widths[0] > widths[-1]


def test_batches_grow_with_the_noise_and_never_shrink_and_take_every_example_once_an_epoch() -> None:
    found = {}
    for noise in (0.0, 1.0, 4.0):
        x = drawn(0, 256, 6)
        x = x if noise else x[:1].expand(256, 6).clone()  # no noise at all: every example is the same
        rows = Rows(x, x @ drawn(1, 6, 1) + noise * drawn(2, 256, 1))
        run = run_of(nn.Sequential(nn.Linear(6, 1)), rows, "adadagrad", lr=0.5, eta=1.0, loop={"batch_size": 4, "steps": 256})
        sizes = [event.get("batches", 1) for event in go(run)]
        assert sum(sizes) == 256 and run.place == run.total and run.step == len(sizes) < 257
        assert all(sorted(rows.seen[k : k + 256]) == list(range(256)) for k in range(0, 1024, 256))
        inside = [size for k, size in enumerate(sizes) if sum(sizes[: k + 1]) % 64]  # an epoch's last may be smaller
        assert inside == sorted(inside)
        found[noise] = [inside[len(inside) // 8], inside[-1]]
    assert found[0.0] == [1, 1]
    assert found[4.0][1] >= found[1.0][1] > 1 and found[4.0][0] >= found[1.0][0], found


def test_a_run_whose_batches_grow_is_resumed_exactly(tmp_path: Path) -> None:
    x = drawn(0, 90, 6)
    rows = Rows(x, x @ drawn(1, 6, 1) + 2 * drawn(2, 90, 1))
    options: dict[str, Any] = {"lr": 0.5, "eta": 0.6, "every": 2, "largest": 7, "loop": {"batch_size": 4, "steps": 120}}
    whole = run_of(nn.Sequential(net(sizes=(6, 1))[0]), rows, "adadagrad", **options)
    sizes = [event.get("batches", 1) for event in go(whole)]
    assert 1 in sizes and 7 in sizes and len(set(sizes)) > 3
    for cut in (1, 3, sizes.index(7) + 2):
        state = tmp_path / f"{cut}.state"

        stopped(run_of(nn.Sequential(net(sizes=(6, 1))[0]), rows, "adadagrad", **options), state, cut)
        second = run_of(nn.Sequential(net(sizes=(6, 1))[0]), rows, "adadagrad", **options)
        assert [event.get("batches", 1) for event in go(second, resume=state)] == sizes[cut:]
        assert all(torch.equal(p, values(whole)[name]) for name, p in values(second).items())
        assert second.step == whole.step


# --- sso


def test_one_inner_step_is_sgd_bit_for_bit() -> None:
    runs = [run_of(net(dropout=0.3), classes(), name, loop={"steps": 4, "batch_size": 7}, lr=0.2, **options) for name, options in
            (("sso", {"inner": 1}), ("sgd", {"momentum": 0.0}))]  # fmt: skip
    for run in runs:
        go(run)
    assert all(torch.equal(p, values(runs[1])[name]) for name, p in values(runs[0]).items())


@pytest.mark.parametrize("micro", [0, 5])
def test_sso_is_its_formula(micro: int) -> None:
    rows, model = classes(), net()
    run = run_of(net(), rows, "sso", inner=4, eta=0.7, lr=0.3, loop={"steps": 3, "micro_batch_size": micro})
    go(run)
    for _ in range(3):
        start = model(rows.x).detach().requires_grad_()
        pull = torch.autograd.grad(nn.functional.cross_entropy(start, rows.y, reduction="sum"), start)[0]
        for _ in range(4):
            z = model(rows.x)
            surrogate = ((pull * z).sum(1) + (z - start.detach()).square().sum(1) / (2 * 0.7)).mean()
            for p, g in zip(model.parameters(), torch.autograd.grad(surrogate, list(model.parameters())), strict=True):
                p.data -= 0.3 * g
    close(values(run), {name: p.detach() for name, p in model.named_parameters()})


def test_the_surrogate_is_never_below_the_loss() -> None:
    """Cross-entropy is 1/2-smooth in the logits, so for eta up to 2."""
    for seed in range(200):
        z, y = 3 * drawn(seed, 4), torch.tensor(seed % 4)
        z.requires_grad_()
        loss = nn.functional.cross_entropy(z, y)
        g = torch.autograd.grad(loss, z)[0]
        other = z.detach() + 10 ** (seed % 5 - 2) * drawn(seed + 1000, 4)
        bound = loss + g @ (other - z) + (other - z).square().sum() / (2 * 2.0)
        assert float(bound.detach()) >= float(nn.functional.cross_entropy(other, y)) - 1e-5


def test_inner_steps_see_the_same_dropout_and_the_hooks() -> None:
    """With a rate of next to nothing the second inner step has the first one's gradient; masks hold for all of them."""

    class Mask(Hooks):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def gradients(self, run: Run) -> None:
            run.tensors["0.bias"].grad.zero_()  # type: ignore[union-attr]
            self.seen.append(run.tensors["0.weight"].grad.clone())  # type: ignore[union-attr]

    hook = Mask()
    run = run_of(net(dropout=0.5), classes(), "sso", hooks=[hook], inner=3, lr=1e-7, loop={"micro_batch_size": 7})
    before = values(run)
    go(run)
    assert len(hook.seen) == 3 and float(hook.seen[0].abs().max()) > 0.01
    for each in hook.seen[1:]:
        torch.testing.assert_close(each, hook.seen[0], rtol=1e-3, atol=1e-5)
    assert torch.equal(before["0.bias"], values(run)["0.bias"]) and not torch.equal(before["0.weight"], values(run)["0.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sso_needs_fewer_gradients_of_the_loss_than_sgd(seed: int) -> None:
    """A linear classifier, whose surrogate is convex; each step of either is one gradient of the loss, at the best of the same rates."""
    rates = (0.3, 0.1, 0.2, 1.0)
    sgd = steps_to(0.9, seed, "sgd", rates, (12, 4), 150, momentum=0.0)
    sso = steps_to(0.9, seed, "sso", rates, (12, 4), 60, inner=10, eta=2.0)
    assert 2 * sso < sgd, (sso, sgd)


# --- several processes


def in_two() -> dict[str, torch.Tensor]:
    """Runs of all that add up over processes; with the likeliest label for a drawn one, and one example a micro-batch for adadagrad."""
    torch.multinomial = lambda p, n: p.argmax(-1, keepdim=True)  # type: ignore[assignment]
    options: dict[str, dict[str, Any]] = {
        "sophia": {"every": 2, "lr": 0.05},
        "mkor": {"every": 1, "lr": 0.1},
        "sso": {"inner": 3, "lr": 0.2},
        "adadagrad": {"pieces": 24, "eta": 0.6, "lr": 0.2},
    }
    found: dict[str, torch.Tensor] = {}
    for name, chosen in options.items():
        run = run_of(net(), classes(), name, loop={"batch_size": 6, "steps": 8}, **chosen)
        go(run)
        found |= {f"{name}/{key}": p for key, p in values(run).items()} | {f"{name}/steps": torch.tensor(float(run.step))}
    run = run_of(net(), classes(), "sophia", loop={"batch_size": 6, "steps": 8}, estimator="hutchinson", every=2, lr=0.05)
    go(run)
    return found | {f"hutchinson/{key}": p for key, p in values(run).items()}


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = "import sys, torch; from tests.test_optimizers import in_two; torch.save(in_two(), sys.argv[1])"

    def begin(rank: int, size: int) -> subprocess.Popen[bytes]:
        env = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, os.getcwd()])}
        if size > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return subprocess.Popen([sys.executable, "-c", script, str(tmp_path / f"{size}-{rank}.pt")], env=env)

    assert [process.wait(timeout=300) for process in [begin(0, 1), begin(0, 2), begin(1, 2)]] == [0, 0, 0]
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert one["adadagrad/steps"] < 8
    for got in two:
        close(got, one, rtol=2e-4, atol=2e-5)
