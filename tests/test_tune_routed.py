"""Spaces that route: experts picked by token (mola), changes picked by the row's task (mhr, mtlora), and what they share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import weft
from tests import tiny
from tests.conftest import bits
from weft import methods
from weft.attaching import attach, detach, set_tasks
from weft.base import Base
from weft.config import make
from weft.delta import Builder, Delta
from weft.engine.data import tasks_of
from weft.engine.events import Event, Events
from weft.engine.loop import LoopConfig, Run, train
from weft.engine.routed import of_task
from weft.errors import FormatError, InputError, MismatchError, UsageError
from weft.names import NameMap
from weft.ops import Generator, routing
from weft.tuning.objective import Objective
from weft.tuning.space import Job, Space

TASKS = ("ask", "tell")
ROWS = [{"text": text, "task": TASKS[k % 2]} for k, text in enumerate(tiny.texts(16, seed=4))]
SPACES: dict[str, dict[str, Any]] = {
    "mola": {"experts": (2, 3), "rank": 2, "balance": 0.01},
    "mhr": {"skills": 3, "heads": 4, "rank": 2},
    "mtlora": {"rank": 3, "alpha": 6, "task_rank": 2, "task_alpha": 4},
}
ONE = {"targets": ("attention.query", "mlp.down")}
QUICK: dict[str, Any] = {"batch_size": 4, "steps": 6, "lr": 0.02, "threads": 1, "weight_decay": 0.1}
IDS = torch.arange(5, 17).reshape(2, 6)


def silent(event: Event) -> None:
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"llama": tiny.llama(root / "llama"), "gpt2": tiny.gpt2(root / "gpt2"), "bert": tiny.bert(root / "bert")}


def tuned(folder: Path, name: str, rows: Sequence[Any] = ROWS, **options: Any) -> Delta:
    where = ONE if "llama" in str(folder) else {}
    return weft.tune(folder, rows, method=name, **{"progress": silent, **QUICK, **where, **SPACES.get(name, {}), **options})


# --- the router


def test_weights_are_of_the_largest_and_sum_to_one() -> None:
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    for k in (1, 2, 7, 9):
        weights = routing.top(logits, k)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5))
        assert torch.equal((weights > 0).sum(-1), torch.full((3, 5), min(k, 7)))
        least = torch.where(weights > 0, logits, torch.inf).amin(-1)
        assert bool((torch.where(weights > 0, -torch.inf, logits).amax(-1) <= least).all())
    two = logits[0, 0].sort(descending=True).values[:2].softmax(-1)
    torch.testing.assert_close(routing.top(logits, 2)[0, 0].sort(descending=True).values[:2], two)
    assert routing.top(logits.bfloat16(), 2).dtype == torch.float32


def test_balance_is_one_where_experts_are_used_alike_and_their_number_where_one_is_all() -> None:
    even = torch.eye(4).repeat(2, 1) * 50
    assert float(routing.balance(even, routing.top(even, 1))) == pytest.approx(1.0)
    one = torch.eye(4)[:1].repeat(8, 1) * 50
    assert float(routing.balance(one, routing.top(one, 1))) == pytest.approx(4.0)
    both = torch.cat([even, one])
    counted = torch.arange(16) < 8
    assert float(routing.balance(both, routing.top(both, 1), counted)) == pytest.approx(1.0), "what is padding does not count"
    logits = torch.tensor([[1.0, 0.5, 0.0]]).repeat(4, 1).requires_grad_()
    routing.balance(logits, routing.top(logits, 1)).backward()
    assert logits.grad is not None and bool((logits.grad[:, 0] > 0).all()) and bool((logits.grad[:, 1:] < 0).all())


# --- the ops


class Net(nn.Module):
    """One linear module."""

    def __init__(self, into: int = 8, out: int = 6, seed: int = 0) -> None:
        super().__init__()
        self.m = nn.Linear(into, out, bias=False)
        with torch.no_grad():
            self.m.weight.copy_(torch.randn(out, into, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.m(x)
        return y


def beside(model: Net, op: str, t: dict[str, Any], **cfg: Any) -> Any:
    build = Builder(Base.of(model))
    build.put("@module/m", op, t, **cfg)
    return attach(model, build.done(), trainable=True)


def floats(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_mixture_is_its_formula_token_by_token() -> None:
    model, x = Net(), floats(2, 5, 8)
    plain = model(x).detach()
    t = {"router": floats(4, 8, seed=2), "A": floats(4, 3, 8, seed=3), "B": floats(4, 6, 3, seed=4)}
    handle = beside(model, "mixture", {k: v.numpy() for k, v in t.items()}, scale=0.5, top_k=2)
    y = model(x)
    for row in range(2):
        for k in range(5):
            token = x[row, k]
            g = t["router"] @ token
            chosen = g.topk(2).indices
            p = g[chosen].softmax(0)
            want = plain[row, k] + 0.5 * sum(p[n] * t["B"][e] @ t["A"][e] @ token for n, e in enumerate(chosen))
            torch.testing.assert_close(y[row, k].detach(), want, rtol=1e-4, atol=1e-5)
    (term,) = handle.losses
    g = x.reshape(-1, 8) @ t["router"].T
    torch.testing.assert_close(term.detach(), routing.balance(g, routing.top(g, 2)))
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in handle.parameters())
    with torch.no_grad():
        model(x)
    assert not handle.losses, "nothing is asked of a model that does not learn"
    detach(model)
    assert torch.equal(model(x), plain)


def test_one_expert_is_lora() -> None:
    model, x = Net(), floats(2, 5, 8)
    a, b = floats(1, 3, 8).numpy(), floats(1, 6, 3, seed=2).numpy()
    beside(model, "mixture", {"router": floats(1, 8).numpy(), "A": a, "B": b}, scale=0.5)
    mixed = model(x)
    detach(model)
    build = Builder(Base.of(model))
    build.put("m.weight", "lowrank", {"A": a[0], "B": b[0]}, scale=0.5)
    attach(model, build.done(), trainable=True)
    assert torch.equal(mixed, model(x))


def test_each_row_has_the_change_of_its_task() -> None:
    model, x = Net(), floats(5, 3, 8)
    plain = model(x).detach()
    t = {"A": floats(3, 2, 8, seed=2), "B": floats(3, 6, 2, seed=3)}
    handle = beside(model, "by_task", {k: v.numpy() for k, v in t.items()}, scale=0.5, tasks=["a", "b", "c"])
    rows = ["b", "a", "b", "b", "a"]
    y = model(x, task=rows)
    for k, name in enumerate(rows):
        number = "abc".index(name)
        torch.testing.assert_close(y[k].detach(), plain[k] + 0.5 * x[k] @ t["A"][number].T @ t["B"][number].T, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    for value in handle.parameters():
        assert value.grad is not None and bool((value.grad[:2].flatten(1).abs().sum(1) > 0).all()) and not value.grad[2].any()
    torch.testing.assert_close(model(x[:1], task="a"), model(x[:1], task=["a"]))
    set_tasks(model, rows)
    torch.testing.assert_close(model(x), y)
    tensor = tasks_of([{"task": name} for name in rows])["task"]
    set_tasks(model)
    torch.testing.assert_close(model(x, task=tensor), y)
    twice = model(x.repeat_interleave(2, 0), task=rows)  # as beams stand together
    torch.testing.assert_close(twice[::2], y)
    torch.testing.assert_close(model(x.reshape(15, 8), task=rows).reshape(5, 3, 6), y)


def test_tasks_must_be_known_and_named() -> None:
    model, x = Net(), floats(4, 8)
    t = {"A": floats(2, 2, 8).numpy(), "B": floats(2, 6, 2).numpy()}
    beside(model, "by_task", t, tasks=["summary", "story"])
    with pytest.raises(InputError, match="no task was named; it knows summary, story"):
        model(x)
    with pytest.raises(InputError, match="there is no task 'sumary'; did you mean 'summary'"):
        model(x, task="sumary")
    with pytest.raises(InputError, match="3 tasks were named for 4 rows"):
        model(x, task=["story"] * 3)
    detach(model)
    beside(model, "by_task", {k: v[:1] for k, v in t.items()}, tasks=["summary"])
    torch.testing.assert_close(model(x), model(x, task="summary"))
    for fields, cfg, message in (
        (t, {"tasks": ["a"]}, "expected 1 tasks, got 2"),
        (t, {"tasks": ["a", "a"]}, "each once"),
        ({**t, "Z": floats(2, 4, 2).numpy()}, {}, "4 heads must divide"),
        ({**t, "Z": floats(2, 1, 3).numpy()}, {}, "field Z"),
    ):
        with pytest.raises(FormatError, match=message):
            build = Builder(Base.of(Net()))
            build.put("@module/m", "by_task", fields, **cfg)
            build.done()


def test_one_head_is_poly_and_more_mix_blocks() -> None:
    model, x = Net(), floats(2, 3, 8)
    a, b, z = floats(3, 2, 8, seed=2), floats(3, 6, 2, seed=3), floats(2, 2, 3, seed=4)
    p = z.softmax(-1)
    for heads in (1, 2):
        beside(model, "by_task", {"A": a.numpy(), "B": b.numpy(), "Z": z[:, :heads].numpy().copy()}, tasks=["a", "b"])
        y = model(x, task=["b", "a"]).detach()
        detach(model)
        for row, task in ((0, 1), (1, 0)):
            if heads == 1:
                mixed_a, mixed_b = sum(p[task, 0, s] * a[s] for s in range(3)), sum(p[task, 0, s] * b[s] for s in range(3))
            else:
                mixed_a = torch.cat([sum(p[task, h, s] * a[s, :, 4 * h : 4 * h + 4] for s in range(3)) for h in range(2)], 1)
                mixed_b = torch.cat([sum(p[task, h, s] * b[s, 3 * h : 3 * h + 3] for s in range(3)) for h in range(2)], 0)
            torch.testing.assert_close(y[row], model(x[row]).detach() + x[row] @ mixed_a.T @ mixed_b.T, rtol=1e-4, atol=1e-5)


# --- what all three spaces keep to


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", SPACES)
def test_the_start_is_the_base_and_detaching_restores_it(folders: dict[str, Path], name: str, kind: str) -> None:
    base = Base.open(folders[kind])
    model = base.model()
    before = {key: bits(value) for key, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(IDS).logits
    delta = tuned(folders[kind], name, lr=1e-12, weight_decay=0)
    attach(model, delta, base=base, trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, task="ask").logits, plain, atol=1e-5, rtol=1e-5)
    detach(model)
    moved = tuned(folders[kind], name)
    for mode in ("auto", "functional"):
        attach(model, moved, base=base, mode=mode)
        with torch.no_grad():
            assert float((model(IDS, task="ask").logits - plain).abs().max()) > 1e-2
        detach(model)
    assert {key: bits(value) for key, value in model.state_dict().items()} == before
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain)


class Stop:
    """Interrupts a run at its first saved state."""

    def __call__(self, event: Event) -> None:
        if event["event"] == "save":
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", SPACES)
def test_an_interrupted_run_is_the_whole_one(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    whole = tuned(folders["llama"], name)
    assert tuned(folders["llama"], name).id == whole.id
    out = tmp_path / "d.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tuned(folders["llama"], name, out=out, save_every=3, progress=Stop())
    assert tuned(folders["llama"], name, out=out, resume=f"{out}.state").id == whole.id
    assert Delta.load(out).id == whole.id


@pytest.mark.parametrize("name", SPACES)
def test_micro_batches_change_rounding_only(folders: dict[str, Path], name: str) -> None:
    quiet = {"dropout": 0.0} if name != "mhr" else {}
    quiet |= {"balance": 0.0} if name == "mola" else {}  # its term is of each micro-batch
    one, two = (tuned(folders["llama"], name, steps=1, micro_batch_size=size, **quiet) for size in (0, 2))
    for key, value in one.tensors.items():
        np.testing.assert_allclose(value.read(), two.tensors[key].read(), atol=2e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("name", ["mhr", "mtlora"])
def test_for_one_task_it_folds(folders: dict[str, Path], name: str, kind: str, tmp_path: Path) -> None:
    folder = folders[kind]
    base = Base.open(folder)
    rows = [{**row, "label": "ab"[len(row["text"]) % 2]} for row in ROWS]
    delta = tuned(folder, name, rows, objective="classification" if kind == "bert" else "causal-lm", targets=("all-linear",))
    model = base.model([delta])
    with pytest.raises(MismatchError, match="cannot be folded") as refused:
        weft.fold(base, [delta], tmp_path / "no")
    assert "weft.of_task" in str(refused.value)
    found = {}
    for task in TASKS:
        attach(model, delta, base=base)
        with torch.no_grad():
            live = found[task] = model(IDS, task=task).logits
        detach(model)
        one = of_task(delta, base, task)
        assert one.foldable and one.parents == (delta.id,) and one.config == delta.config
        weft.fold(base, [one], tmp_path / task)
        with torch.no_grad():
            folded = Base.open(tmp_path / task).model().eval()
            torch.testing.assert_close(folded(IDS).logits, live, atol=1e-4, rtol=1e-4)
    assert float((found["ask"] - found["tell"]).abs().max()) > 1e-3
    with pytest.raises(InputError, match="there is no task 'tel'; did you mean 'tell'"):
        of_task(delta, base, "tel")
    with pytest.raises(MismatchError, match="does not differ by task"):
        of_task(one, base, "tell")


def test_rows_must_name_their_task(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="which task it belongs to"):
        tuned(folders["llama"], "mhr", [{"text": row["text"]} for row in ROWS])
    with pytest.raises(InputError, match="3 as 'task'"):
        tuned(folders["llama"], "mtlora", [*ROWS, {"text": "it is", "task": 3}])
    plain = tuned(folders["llama"], "lora", [*ROWS, {"text": "it is", "task": 3}])  # nobody else asks
    assert plain.foldable
    with pytest.raises(InputError, match="there is no task 'tall'; did you mean 'tell'"):
        tuned(folders["llama"], "mtlora", evaluate=[{"text": "how far is it", "task": "tall"}])


@pytest.mark.parametrize("objective", ["causal-lm", "masked-lm"])
def test_examples_keep_their_tasks(folders: dict[str, Path], objective: str) -> None:
    base = Base.open(folders["bert" if objective == "masked-lm" else "llama"])
    found = methods.get("objective", objective)
    for options in ({}, {"packing": True, "max_length": 20}) if objective == "causal-lm" else ({},):
        goal = found.run(make(found.config, options, objective), base, base.tokenizer(), ROWS)
        assert "task" not in goal.collate(goal.examples[:2], [1, 2])
        assert goal.tasks() == ["ask", "tell"]
        batch = goal.collate(goal.examples, range(len(goal.examples)))
        names = [bytes(row).rstrip(b"\0").decode() for row in batch["task"].tolist()]
        assert names == [example["task"] for example in goal.examples] and set(names) == set(TASKS)
        for task in TASKS:
            tokens = [sorted(k for e in examples if e["task"] == task for k in e["input_ids"]) for examples in (goal.examples, goal.encode(ROWS))]
            assert tokens[0] == tokens[1], "packed or not, the rows of a task are with their own"


def test_evaluating_and_generating_take_tasks(folders: dict[str, Path], tmp_path: Path) -> None:
    base = Base.open(folders["llama"])
    delta = tuned(folders["llama"], "mtlora", steps=20)
    rows = [row for row in ROWS if " " in row["text"]]
    found = {task: weft.evaluate(base, [delta], [{**row, "task": task} for row in rows])["metrics"]["nll"] for task in TASKS}
    mixed = weft.evaluate(base, [delta], rows)["metrics"]["nll"]
    for task in TASKS:
        alone = weft.evaluate(base, [of_task(delta, base, task)], [{"text": row["text"]} for row in rows])["metrics"]["nll"]
        assert found[task] == pytest.approx(alone, rel=1e-5)
    assert len({*found.values(), mixed}) == 3
    with pytest.raises(InputError, match="no task was named"):
        weft.evaluate(base, [delta], [{"text": row["text"]} for row in rows])
    said = weft.generate(base, [delta], "the river", max_new_tokens=8, task="ask")
    assert said == weft.generate(base, [of_task(delta, base, "ask")], "the river", max_new_tokens=8)
    assert weft.generate(base, [delta], "the river", max_new_tokens=8, num_beams=3, task="ask")


# --- each for itself


def test_mola_spends_the_same_on_any_allocation_and_puts_more_above(folders: dict[str, Path]) -> None:
    def experts(delta: Delta) -> dict[str, int]:
        return {target: delta.tensors[op.t["A"].key].shape[0] for target, entry in delta.entries.items() for op in entry.ops}

    found = {each: experts(tuned(folders["llama"], "mola", steps=1, experts=each)) for each in ((2, 6), (6, 2), (4,))}
    assert {sum(counts.values()) for counts in found.values()} == {16}
    assert {target.split(".")[2]: count for target, count in found[2, 6].items()} == {"0": 2, "1": 6}
    with pytest.raises(UsageError, match="one expert at least"):
        tuned(folders["llama"], "mola", experts=(0, 2))


def test_the_balance_evens_out_a_router_that_has_a_favourite(folders: dict[str, Path]) -> None:
    model, x = Net(), floats(16, 4, 8)
    x[..., 0] = 1.0
    router = 0.1 * floats(4, 8)
    router[0, 0] = 3.0
    handle = beside(model, "mixture", {"router": router.numpy(), "A": floats(4, 2, 8).numpy(), "B": floats(4, 6, 2).numpy()})
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.05)
    seen = []
    for _ in range(60):
        model(x)
        handle.losses[0].backward()
        seen.append(handle.losses[0].item())
        optimizer.step()
        optimizer.zero_grad()
    assert seen[0] > 1.5 and 0.95 < seen[-1] < 1.1
    without, within = (tuned(folders["llama"], "mola", steps=1, balance=weight, dropout=0).notes["loss"] for weight in (0.0, 0.5))
    assert 0.45 < within - without < 0.8  # 0.5 E sum f p, near 1 at the start


def test_only_a_tasks_own_rows_reach_its_factors(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    delta = tuned(folders["llama"], "mtlora")
    layers = {target.split(".")[2] for target in delta.unfoldable}
    assert layers == {"1"}, "only the last layer tells tasks apart"
    model = base.model()
    handle = attach(model, delta, base=base, trainable=True)
    model(IDS, labels=IDS, task="tell").loss.backward()
    own = {key: value for key, value in handle.tensors().items() if key.startswith("@module/")}
    assert own
    for value in own.values():
        assert value.grad is not None and not value.grad[0].any() and bool(value.grad[1].any())
    assert all(value.grad is not None and bool(value.grad.any()) for key, value in handle.tensors().items() if key not in own)
    more = tuned(folders["llama"], "mtlora", [{**row, "task": f"{k % 4}"} for k, row in enumerate(ROWS)])
    added = more.notes["parameters"] - delta.notes["parameters"]
    assert added == sum(2 * np.prod(delta.tensors[key].shape[1:]) for key in own), "parameters grow by the specific part alone"


def test_with_one_task_mtlora_is_one_lora(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    delta = tuned(folders["llama"], "mtlora", [{**row, "task": "all"} for row in ROWS])
    one = of_task(delta, base, "all")
    model = base.model()
    attach(model, delta, base=base)
    with torch.no_grad():
        live = model(IDS).logits
        detach(model)
        attach(model, one, base=base)
        torch.testing.assert_close(model(IDS).logits, live, atol=1e-5, rtol=1e-5)
    ranks = {target: sum(one.tensors[op.t["A"].key].shape[0] for op in entry.ops) for target, entry in one.entries.items()}
    assert set(ranks.values()) == {3, 5}  # below, and in the last layer


def test_mhr_goes_on_from_its_skills(folders: dict[str, Path], tmp_path: Path) -> None:
    base = Base.open(folders["llama"])
    first = tuned(folders["llama"], "mhr", out=tmp_path / "first.safetensors")
    rows = [{**row, "task": "new"} for row in ROWS]
    pools = {key: value for key, value in first.tensors.items() if not key.endswith("Z")}
    routing_only = tuned(folders["llama"], "mhr", rows, tune="z", origin=tmp_path / "first.safetensors")
    assert routing_only.parents == (first.id,) and routing_only.notes["parameters"] == len(first.entries) * 1 * 4 * 3  # tasks, heads, skills
    assert {key: value.sha256 for key, value in routing_only.tensors.items() if key in pools} == {key: value.sha256 for key, value in pools.items()}
    both = tuned(folders["llama"], "mhr", [*rows, *ROWS], tune="z", origin=first, lr=1e-12, weight_decay=0)
    for target, entry in both.entries.items():
        assert entry.ops[0].cfg["tasks"] == ["ask", "new", "tell"]
        z, old = both.get(f"{target}//0.Z"), first.get(f"{target}//0.Z")
        np.testing.assert_allclose(z[[0, 2]], old, atol=1e-8)
        assert np.abs(z[1]).max() <= 1e-3 and np.abs(old).max() > 1e-2
    mean = tuned(folders["llama"], "mhr", rows, tune="mu", origin=first, lr=1e-12, weight_decay=0)
    assert mean.foldable and mean.parents == (first.id,)
    even = Builder(base)
    for target, entry in first.entries.items():
        t = {name: first.get(ref.key) for name, ref in entry.ops[0].t.items()}
        even.put(target, "by_task", {**t, "Z": np.zeros_like(t["Z"][:1])}, **{**entry.ops[0].cfg, "tasks": ["any"]})
    model, seen = base.model(), []
    for delta in (mean, even.done()):
        attach(model, delta, base=base)
        with torch.no_grad():
            seen.append(model(IDS).logits)
        detach(model)
    torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-5)
    out = tmp_path / "d.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tuned(folders["llama"], "mhr", rows, tune="z", origin=first, out=out, save_every=3, progress=Stop())
    assert tuned(folders["llama"], "mhr", rows, tune="z", origin=first, out=out, resume=f"{out}.state").id == routing_only.id
    with pytest.raises(UsageError, match="tune=z begins from a delta"):
        tuned(folders["llama"], "mhr", tune="z")
    with pytest.raises(UsageError, match="lora does not begin from an earlier delta"):
        tuned(folders["llama"], "lora", origin=first)
    with pytest.raises(MismatchError, match="has no skills"):
        tuned(folders["llama"], "mhr", origin=mean)


# --- what each is for, against LoRA with at least as many trained numbers


class Planted(Objective):
    """Regression on one linear module: the answers of `change(x, task)` beside those of the module."""

    def __init__(self, model: Net, x: torch.Tensor, y: torch.Tensor, tasks: Sequence[str] = ()) -> None:
        self.x, self.y = x, y
        self.examples = [{"input_ids": [k], "task": tasks[k] if tasks else "one"} for k in range(len(x))]
        with torch.no_grad():
            self.y = self.y + model(x)

    def collate(self, examples: Any, keys: Any) -> dict[str, torch.Tensor]:
        index = torch.tensor([each["input_ids"][0] for each in examples])
        return self.routed({"input_ids": index[:, None], "x": self.x[index], "y": self.y[index]}, examples)

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        task = {"task": batch["task"]} if "task" in batch else {}
        return (model(batch["x"], **task) - batch["y"]).square().mean()


def learnt(model: Net, name: str, goal: Planted, steps: int, lr: float = 0.02, origin: Delta | None = None, **options: Any) -> tuple[Delta, int]:
    """A delta trained on `goal`, and how many numbers were."""
    base, found = Base.of(model), methods.get("space", name)
    job = Job(base, model, NameMap.of(base, model), Generator(3), goal=goal, origin=origin)
    space: Space = found.run(make(found.config, {"targets": ("all",), **options}, name), job)
    build = Builder(base)
    space.build(build)
    job.delta = build.done()
    job.handle = attach(model, job.delta, base=base, trainable=True, names=job.names)
    tensors = space.tensors()
    optimizer = torch.optim.AdamW(list(tensors.values()), lr=lr, weight_decay=0)
    config = LoopConfig(steps=steps, batch_size=32, clip=0)
    train(Run(model, goal, tensors, optimizer, lambda place, total: 1 - place / total, config, 0, [space]), Events(None, silent))
    made = space.finish()
    detach(model)
    return made, sum(value.numel() for value in tensors.values())


def error(model: Net, delta: Delta, goal: Planted) -> float:
    """The mean square error of a delta on all of `goal`."""
    attach(model, delta)
    with torch.no_grad():
        found = float(goal.loss(model, goal.collate(goal.examples, range(len(goal.examples)))))
    detach(model)
    return found


@pytest.mark.parametrize("seed", range(2))
def test_mola_learns_two_changes_where_tokens_are_of_two_kinds(seed: int) -> None:
    """Tokens of one kind need one change of rank 2, those of the other another."""
    model, x = Net(16, 12, seed), floats(256, 16, seed=seed + 10)
    x[:, 0] = torch.where(torch.arange(256) % 2 == 0, 2.0, -2.0)
    changes = floats(2, 12, 2, seed=seed + 20) @ floats(2, 2, 16, seed=seed + 30) / 4
    goal = Planted(model, x, torch.einsum("nd,nod->no", x, changes[torch.arange(256) % 2]))
    mixed, few = learnt(model, "mola", goal, 150, experts=(2,), rank=2, alpha=4, dropout=0, balance=0.001)
    plain, many = learnt(model, "lora", goal, 150, rank=6, alpha=12)
    assert few < many
    assert error(model, mixed, goal) < 0.3 * error(model, plain, goal)


@pytest.mark.parametrize("seed", range(2))
def test_mhr_learns_a_new_task_from_few_rows_by_routing_alone(seed: int) -> None:
    """Nine tasks need one of three changes of rank 2 each; a tenth, of which there are eight rows, needs one of them too."""
    model = Net(16, 12, seed)
    changes = floats(3, 12, 2, seed=seed + 20) @ floats(3, 2, 16, seed=seed + 30) / 4

    def data(needs: Sequence[int], count: int, names: str, more: int = 0) -> Planted:
        x, number = floats(count * len(needs), 16, seed=seed + 40 + more), torch.arange(count * len(needs)) % len(needs)
        return Planted(model, x, torch.einsum("nd,nod->no", x, changes[torch.tensor(needs)[number]]), [names[k] for k in number])

    options = {"skills": 3, "heads": 1, "rank": 2, "alpha": 2}
    first, _ = learnt(model, "mhr", data([k % 3 for k in range(9)], 30, "abcdefghi"), 400, **options, z_rate=10)
    adapted, few = learnt(model, "mhr", data([seed], 8, "z", 1), 100, 0.1, origin=first, tune="z", z_rate=1)
    plain, many = learnt(model, "lora", data([seed], 8, "z", 1), 100, rank=2, alpha=2)
    test = data([seed], 200, "z", 2)
    assert (few, many) == (3, 2 * (16 + 12))
    assert error(model, adapted, test) < 0.3 * error(model, plain, test)


@pytest.mark.parametrize(("name", "seed"), [("mhr", 0), ("mtlora", 1)])
def test_tasks_that_disagree(name: str, seed: int) -> None:
    """Two tasks have a change of rank 2 in common, and each one of its own: what LoRA learns for one is wrong for the other."""
    model, x = Net(16, 12, seed), floats(256, 16, seed=seed + 10)
    own = floats(3, 12, 2, seed=seed + 20) @ floats(3, 2, 16, seed=seed + 30) / 4
    number = torch.arange(256) % 2
    y = torch.einsum("nd,nod->no", x, own[2] + own[number])
    tasks = [TASKS[k] for k in number]
    options = {"skills": 2, "heads": 1, "rank": 4, "alpha": 8, "z_rate": 5}
    if name == "mtlora":
        options = {"rank": 2, "alpha": 4, "task_rank": 2, "task_alpha": 4, "dropout": 0}
    goal = Planted(model, x, y, tasks)
    routed, few = learnt(model, name, goal, 200, **options)
    other = Planted(model, x, y, tasks)
    plain, many = learnt(model, "lora", other, 200, rank=10, alpha=20)
    assert few < many
    assert error(model, routed, goal) < 0.3 * error(model, plain, other)


def test_the_command_line_takes_tasks_and_origins(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from weft.cli import main

    data, first, second = tmp_path / "rows.jsonl", tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    llama = str(folders["llama"])
    some = ["-p", "steps=2", "-p", "skills=2", "--threads", "1", "--format", "quiet"]
    assert main(["tune", llama, "--data", str(data), "--method", "mhr", "-o", str(first), *some]) == 0
    assert main(["tune", llama, "--data", str(data), "--method", "mhr", "--origin", str(first), "-p", "tune=z", "-o", str(second), *some]) == 0
    assert Delta.load(second).parents == (Delta.load(first).id,)
    assert main(["fold", llama, str(second), "-o", str(tmp_path / "no")]) == 3
    assert "--task NAME" in capsys.readouterr().err
    assert main(["fold", llama, str(second), "--task", "tel", "-o", str(tmp_path / "no")]) == 3
    assert "did you mean 'tell'" in capsys.readouterr().err
    assert main(["fold", llama, str(second), "--task", "tell", "-o", str(tmp_path / "folded")]) == 0
    capsys.readouterr()
    assert main(["generate", llama, str(second), "--prompt", "the river", "--task", "tell", "--max-new-tokens", "6", "--format", "quiet"]) == 0
    live = capsys.readouterr().out
    assert main(["generate", str(tmp_path / "folded"), "--prompt", "the river", "--max-new-tokens", "6", "--format", "quiet"]) == 0
    assert capsys.readouterr().out == live


@pytest.mark.parametrize("name", SPACES)
def test_activations_that_are_computed_again_are_the_same(folders: dict[str, Path], name: str) -> None:
    one, two = (tuned(folders["llama"], name, steps=2, checkpointing=again) for again in (False, True))
    for key, value in one.tensors.items():
        np.testing.assert_allclose(value.read(), two.tensors[key].read(), atol=1e-6)
