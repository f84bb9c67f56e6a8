"""Spaces that train some entries, or some tensors at a time: what they share, and the claim of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from tests import tiny
from tests.conftest import bits
from tests.test_tune import LABELLED, QUICK, ROWS, Stop, logits, save_model
from weft import config, methods, xp
from weft.attaching import attach, detach
from weft.base import Base
from weft.delta import Builder, Delta
from weft.engine.loop import Batch, Run
from weft.errors import UsageError
from weft.names import NameMap
from weft.ops import Generator
from weft.stored import hold
from weft.tuning import tune
from weft.tuning._positions import Budget, carry, counts, drawn, gradients, largest, moved, movements, sensitivities, smallest, top
from weft.tuning.space import Job
from weft.tuning.space.dsee import outstanding
from weft.tuning.space.mobiletl import packed, signed, unpacked
from weft.tuning.space.pst import PST, Importance, PSTConfig

SPACES: dict[str, dict[str, Any]] = {
    "ssf": {},
    "hft": {"period": 3},
    "lisa": {"layers": 1, "period": 3},
    "lt-sft": {"density": 0.05, "trial": 3},
    "spt": {"density": 0.1, "batches": 2, "rank": 2},
    "spiel": {"density": 0.05, "period": 3, "gather": 2},
    "sara": {"density": 0.1, "nuclear": 0.05},
    "dreamstyler": {"trial": 2},
    "pockengine": {},
    "pst": {"rank": 2},
    "apet": {"density": 0.05, "tensors": 0.5},
    "dsee": {"rank": 2, "entries": 20, "prune": 0.3},
    "mobiletl": {"signed": "all"},
}
LIVE = ("hft", "lisa")
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, options) for name, options in SPACES.items()},
    "spiel-ma": ("spiel", {"density": 0.05, "period": 3, "gather": 2, "grow": "ma"}),
    "pst-rarely": ("pst", {"rank": 2, "every": 3}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {kind: save_model(root / kind, kind) for kind in ("llama", "bert", "mixtral")}
    made["llama16"] = save_model(root / "llama16", "llama", torch.bfloat16)
    return made


class Watch:
    """Losses, the run itself, and what `look(run)` gives after each step."""

    def __init__(self, look: Any = None) -> None:
        self.losses: list[float] = []
        self.seen: list[Any] = []
        self.look = look

    def progress(self, event: Any) -> None:
        if event["event"] == "step":
            self.losses.append(event["loss"])

    def evaluate(self, run: Run) -> dict[str, float]:
        if self.look is not None:
            self.seen.append(self.look(run))
        return {}


def watched(base: Any, watch: Watch, rows: Any = ROWS, **options: Any) -> Delta:
    return tune(base, rows, **{**QUICK, "progress": watch.progress, "evaluate": watch.evaluate, "evaluate_every": 1, **options})


def space_of(run: Run) -> Any:
    return run.hooks[0]


def flat(base: Base, name: str) -> torch.Tensor:
    return xp.to_torch(base.tensor(name).read()).float().reshape(-1)


def size_of(delta: Delta) -> int:
    return sum(tensor.nbytes for tensor in delta.tensors.values())


def changed(base: Base, delta: Delta, name: str) -> np.ndarray[Any, Any]:
    """Where a tensor is not the base's."""
    w = base.tensor(name).read().astype(np.float32)
    new: np.ndarray[Any, Any] = delta.apply(name, w) if name in delta.entries else w
    return np.flatnonzero((new != w).reshape(-1))


# --- what all share


@pytest.mark.parametrize("space", [name for name in SPACES if name != "pst"])
def test_the_start_is_the_base(folders: dict[str, Path], space: str) -> None:
    watch, plain = Watch(), Watch()
    watched(folders["llama"], watch, method=space, **SPACES[space])
    watched(folders["llama"], plain, method="lora")
    assert watch.losses[0] == pytest.approx(plain.losses[0], rel=2e-6) and watch.losses[2] != pytest.approx(plain.losses[2], rel=1e-4)


@pytest.mark.parametrize("space", SPACES)
def test_attached_is_folded_with_any_numbers(folders: dict[str, Path], tmp_path: Path, space: str) -> None:
    base = Base.open(folders["bert"])
    delta = tune(base, LABELLED, method=space, objective="classification", **QUICK, **SPACES[space])
    rng = np.random.default_rng(1)
    given = {op.t["values"].key for entry in delta.entries.values() for op in entry.ops if op.op == "assign" and entry.change is None}
    tensors = {
        key: value if key in given or value.dtype != "F32" else hold((value.read() + 0.1 * rng.normal(size=value.shape)).astype(np.float32))
        for key, value in delta.tensors.items()
    }
    delta = replace(delta, tensors=tensors)
    weft.fold(base, [delta], tmp_path / "folded")
    folded = Base.open(tmp_path / "folded").model()
    model = base.model([delta])
    before = {key: bits(value) for key, value in model.state_dict().items()}
    attach(model, delta, base=base)
    assert all(bits(value) == bits(model.state_dict()[key]) for key, value in folded.state_dict().items())
    detach(model)
    assert before == {key: bits(value) for key, value in model.state_dict().items()}
    attach(model, delta, base=base, mode="functional")
    torch.testing.assert_close(logits(model, base), logits(folded, base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", SPACES)
def test_the_same_seed_gives_the_same_id(folders: dict[str, Path], space: str) -> None:
    one, two = (tune(folders["llama16"], ROWS, method=space, **QUICK, **SPACES[space]) for _ in range(2))
    assert one.id == two.id


@pytest.mark.parametrize("space", MORE)
def test_k_and_k_steps_are_2k_steps(folders: dict[str, Path], tmp_path: Path, space: str) -> None:
    method, own = MORE[space]
    options: dict[str, Any] = {**QUICK, "method": method, **own, "objective": "classification", "steps": 8}
    out = tmp_path / "d.safetensors"
    for stop in (4, 6):
        with pytest.raises(KeyboardInterrupt):
            tune(folders["bert"], LABELLED, out=out, save_every=stop, **{**options, "progress": Stop()})
        resumed = tune(folders["bert"], LABELLED, out=out, resume=f"{out}.state", **options)
        assert resumed.id == tune(folders["bert"], LABELLED, **options).id


@pytest.mark.parametrize("space", SPACES)
def test_a_delta_is_as_large_as_is_said(folders: dict[str, Path], space: str) -> None:
    base = Base.open(folders["llama"])
    delta = tune(base, ROWS, method=space, **QUICK, **SPACES[space])
    shapes = {name: base.tensor(name).shape for name in delta.entries}
    linear = {name: shape for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name and "lm_head" not in name}
    entries = sum(np.prod(shape) for shape in linear.values())
    targets = sum(np.prod(base.tensor(name).shape) for name in base.names if len(base.tensor(name).shape) == 2 and ".layers." in name)
    sides = sum(sum(shape) for shape in linear.values())
    ops = [op.op for entry in delta.entries.values() for op in entry.ops]
    expected = {
        "ssf": sum(4 * len(base.tensor(name).read()) * (1 + (name.replace("weight", "bias") in base.tensors)) for name in shapes if name.endswith("weight")),
        **{name: sum(4 * int(np.prod(shape)) for shape in shapes.values()) for name in ("hft", "lisa", "pockengine", "mobiletl")},
        **{name: 12 * round(0.05 * targets) for name in ("lt-sft", "spiel", "apet")},
        **{name: 12 * round(0.1 * targets) for name in ("sara", "dreamstyler")},
        "pst": 4 * 2 * sides + 12 * (entries - sum(round(np.prod(shape) / 2) for shape in linear.values())),
        "dsee": 4 * 2 * sides + len(linear) * 12 * 20 + sum(12 * int(0.3 * np.prod(shape)) for shape in linear.values()),
    }
    if space == "spt":
        whole = [delta.entries[name].shape for name, entry in delta.entries.items() if entry.ops[0].op == "lowrank"]
        chosen = sum(tensor.shape[0] for key, tensor in delta.tensors.items() if key.endswith("values"))
        assert size_of(delta) == 4 * 2 * sum(sum(shape) for shape in whole) + 12 * chosen and set(ops) <= {"lowrank", "sparse"}
        assert 2 * sum(sum(shape) for shape in whole) + chosen <= 0.1 * targets
    else:
        assert size_of(delta) == expected[space]


class Bytes:
    """Bytes of gradients before each step of AdamW, of its moments after it, and of all that is trained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module | None = None) -> None:
        self.grads: list[int] = []
        self.moments: list[int] = []
        step = torch.optim.AdamW.step

        def counted(optimizer: Any, *args: Any) -> Any:
            own = [p for group in optimizer.param_groups for p in group["params"]]
            every = {id(p): p for p in [*own, *(model.parameters() if model is not None else ())]}.values()
            self.grads.append(sum(p.grad.nbytes for p in every if p.grad is not None))
            return step(optimizer, *args)

        monkeypatch.setattr(torch.optim.AdamW, "step", counted)

    def __call__(self, run: Run) -> int:
        self.moments.append(sum(value.nbytes for state in run.optimizer.state.values() for value in state.values() if value.ndim))
        return sum(value.nbytes for value in run.tensors.values())


@pytest.mark.parametrize("space", [name for name in MORE if name not in LIVE])
def test_only_what_is_active_has_gradients_and_moments(folders: dict[str, Path], space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, own = MORE[space]
    base = Base.open(folders["llama"])
    live = Base.of(base.model())
    count = Bytes(monkeypatch, live.module)
    watch = Watch(count)
    watched(live, watch, method=method, tokenizer=base.tokenizer(), **{**own, "steps": 5})
    (trained,) = set(watch.seen)
    assert set(count.moments) == {2 * trained} and set(count.grads[-5:]) == {trained}
    assert trained < 0.7 * sum(value.nbytes for value in live.module.parameters())


# --- positions


def test_budgets_are_met_exactly_and_the_first_of_equals_are_taken() -> None:
    scores = [torch.tensor([[3.0, -5.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0, -4.0, 1.0])]
    assert [index.tolist() for index in largest(scores, Budget(count=4))] == [[0, 1, 2], [2]]
    assert [index.tolist() for index in largest(scores, Budget(count=4, across="tensor"))] == [[0, 1], [0, 2]]
    assert [index.tolist() for index in smallest(scores, Budget(count=2))] == [[], [1, 3]]
    assert [index.tolist() for index in smallest(scores, Budget(count=8))] == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert [index.tolist() for index in top(scores, 0)] == [[], []]
    rng = torch.Generator().manual_seed(0)
    many = [torch.randn(size, generator=rng) for size in (1, 70, 333, 1000)]
    found = largest(many, Budget(density=0.31))
    joined = torch.cat(many).abs()
    expected = set(joined.argsort(descending=True)[: round(0.31 * 1404)].tolist())
    starts = np.cumsum([0, 1, 70, 333])
    assert {int(k) + int(start) for index, start in zip(found, starts, strict=True) for k in index} == expected
    assert all(k <= size for k, size in zip(counts([1, 70, 333, 1000], Budget(density=0.31, across="tensor")), (1, 70, 333, 1000), strict=True))
    assert sum(counts([1, 70, 333, 1000], Budget(count=77, across="tensor"))) == 77
    with pytest.raises(UsageError, match="1,404 entries"):
        counts([1404], Budget(count=1405))


def test_moments_move_with_their_entries() -> None:
    p = torch.nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[p].items()}
    carry(optimizer, p, torch.tensor([2, -1, 0, 3]))
    for name in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[p][name].tolist() == [before[name][2], 0.0, before[name][0], before[name][3]]
    assert optimizer.state[p]["step"] == before["step"]
    assert moved(torch.tensor([5.0, 6.0]), torch.tensor([-1, 0, 1])).tolist() == [0.0, 5.0, 6.0]


def job_of(base: Base, goal: Any, model: Any = None, **more: Any) -> Job:
    model = model or base.model()
    model.requires_grad_(False)
    return Job(base, model, NameMap.of(base, model), Generator(3), goal=goal, **more)


def goal_of(base: Base) -> Any:
    found = methods.get("objective", "causal-lm")
    return found.run(config.make(found.config, {}, ""), base, base.tokenizer(), ROWS)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_sensitivities_are_sums_of_squared_gradients_and_nothing_is_left(folders: dict[str, Path], kind: str) -> None:
    base = Base.open(folders[kind])
    goal = goal_of(base)
    job = job_of(base, goal)
    parts = job.parts("mlp" if kind == "llama" else "experts", kinds=("linear", "parameter"))
    before = {key: bits(value) for key, value in job.model.state_dict().items()}
    sums = sensitivities(job, parts, 1)
    (grads,) = gradients(job, parts, 1)
    assert all(torch.equal(total, grad.square()) for total, grad in zip(sums, grads, strict=True)) and max(float(total.max()) for total in sums) > 0
    assert before == {key: bits(value) for key, value in job.model.state_dict().items()}
    assert not any(p.requires_grad or p.grad is not None for p in job.model.parameters())
    # a small step along one part's gradient changes the loss by its squared norm
    (batch,) = drawn(job, 1)
    number = max(range(len(parts)), key=lambda k: float(sums[k].sum()))
    place = job.names.live(parts[number].target)[0]
    live = job.model.state_dict()[place.name]
    values = {}
    for way in (1, -1):
        view = place.at.get(live) if place.at else live
        view.add_(way * 1e-2 * grads[number])
        with torch.no_grad():
            values[way] = float(goal.loss(job.model, batch))
        view.sub_(way * 1e-2 * grads[number])
    assert (values[1] - values[-1]) / 2e-2 == pytest.approx(float(sums[number].sum()), rel=0.02)


def test_movements_are_those_of_full_tuning(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base.open(folders["llama"])
    moves: dict[str, torch.Tensor] = {}

    def build(self: Any, into: Any) -> None:
        parts = self.job.parts("mlp")
        moves.update(zip((part.target for part in parts), movements(self.job, parts, 3), strict=True))
        parts[0].put(into, "dense", {"values": np.zeros(parts[0].shape, np.float32)})

    monkeypatch.setattr("weft.tuning.space.bitfit.BitFit.build", build)
    tune(base, ROWS, method="bitfit", **{**QUICK, "steps": 6, "schedule": "constant"})
    full = tune(base, ROWS, method="full", targets="mlp", **{**QUICK, "steps": 3, "schedule": "constant"})
    assert moves.keys() == full.entries.keys()
    for target, value in moves.items():
        w = base.tensor(target).read()
        torch.testing.assert_close(torch.from_numpy(full.apply(target, w) - w), value, rtol=1e-4, atol=1e-6)


# --- ssf


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ssf_scales_and_shifts_what_a_layer_puts_out(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    base = Base.open(folders["llama"] if kind == "llama" else tiny.gpt2(tmp_path / "gpt2"))
    delta = tune(base, ROWS, method="ssf", std=0.3, **QUICK)
    name, module = ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj") if kind == "llama" else ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_fc")
    gamma, beta = (
        torch.from_numpy(np.asarray(delta.get(op.t[field].key))) for op, field in ((delta.entries[f"{name}.bias"].ops[0], f) for f in ("scale", "shift"))
    )
    model = base.model()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.get_submodule(module)(x)
        weft.fold(base, [delta], tmp_path / "folded")
        after = Base.open(tmp_path / "folded").model().get_submodule(module)(x)
    assert float((gamma - 1).abs().max()) > 0.2 and float(beta.abs().max()) > 0.2
    torch.testing.assert_close(after, gamma * before + beta, rtol=1e-5, atol=1e-5)
    assert Base.open(tmp_path / "folded").tensors.keys() == base.tensors.keys()  # nothing is added, so nothing more is computed


# --- whole tensors at a time


def test_hft_trains_half_of_every_kind_and_draws_anew(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base.open(folders["llama"])
    count = Bytes(monkeypatch)

    def awake(run: Run) -> set[str]:
        count(run)
        return {name for name, value in run.tensors.items() if value.requires_grad}

    watch = Watch(awake)
    delta = watched(base, watch, method="hft", steps=5)
    (half,) = {frozenset(names) for names in watch.seen}
    assert set(delta.entries) == half
    for layer in (0, 1):
        attention = [name for name in half if f".{layer}.self_attn." in name and name.endswith("weight")]
        assert len(attention) == 2 and all(name.replace("weight", "bias") in half for name in attention)
        assert len([name for name in half if f".{layer}." in name and "layernorm" in name]) == 1
    assert sorted(len([n for n in half if f".{layer}.mlp." in n and n.endswith("weight")]) for layer in (0, 1)) == [1, 2]
    inside = {name: int(np.prod(base.tensor(name).shape)) for name in base.names if ".layers." in name}
    assert sum(inside[name] for name in half if name in inside) == pytest.approx(0.5 * sum(inside.values()), rel=0.15)
    trained = sum(4 * int(np.prod(base.tensor(name).shape)) for name in half)
    assert set(count.grads) == {trained} and set(count.moments) == {2 * trained}
    again = Watch(awake)
    watched(base, again, method="hft", period=2, steps=6)
    assert len({frozenset(names) for names in again.seen[1:]}) == 3
    assert set(tune(base, ROWS, method="hft", outside=True, **QUICK).entries) >= {name for name in base.names if ".layers." not in name}


def test_lisa_trains_as_many_layers_as_it_says_and_forgets_the_others(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base.open(folders["llama"])
    outside = [name for name in base.names if ".layers." not in name]
    one = sum(4 * int(np.prod(base.tensor(name).shape)) for name in base.names if ".layers.0." in name)
    rest = sum(4 * int(np.prod(base.tensor(name).shape)) for name in outside)
    count = Bytes(monkeypatch)
    weights: list[dict[str, torch.Tensor]] = []

    def look(run: Run) -> int:
        weights.append({name: value.detach().clone() for name, value in run.tensors.items()})
        return count(run)

    delta = watched(base, Watch(look), method="lisa", layers=1, period=4, seed=2, steps=12)
    assert max(count.grads) == one + rest and max(count.moments) == 2 * (one + rest)
    layers = []
    for start in (0, 4, 8):
        first = {name: flat(base, name) for name in weights[0]} if not start else weights[start - 1]
        moved_ = {name for name, value in weights[start + 3].items() if not torch.equal(value.reshape(-1), first[name].reshape(-1))}
        assert set(outside) <= moved_
        layers.append({name.split(".")[2] for name in moved_ - set(outside)})
        assert len(layers[-1]) == 1
    assert len({*map(tuple, layers)}) == 2 and set(delta.entries) <= set(base.names)


def test_lisa_with_all_layers_is_full_tuning(folders: dict[str, Path]) -> None:
    lisa, full = (tune(folders["llama"], ROWS, method=method, **QUICK, **more) for method, more in (("lisa", {"layers": 2, "period": 2}), ("full", {})))
    assert lisa.tensors.keys() == full.tensors.keys()
    assert all(lisa.tensors[key].sha256 == full.tensors[key].sha256 for key in full.tensors)
    with pytest.raises(UsageError, match="2 layers"):
        tune(folders["llama"], ROWS, method="lisa", layers=3, **QUICK)


# --- chosen entries


def test_lt_sft_keeps_what_full_tuning_moves_most(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    same = {**QUICK, "schedule": "constant", "steps": 3}
    delta = tune(base, ROWS, method="lt-sft", count=300, **same)
    full = tune(base, ROWS, method="full", targets="all-linear", **same)
    moves = {name: np.abs(full.apply(name, base.tensor(name).read()) - base.tensor(name).read()).reshape(-1) for name in full.entries}
    least = np.sort(np.concatenate(list(moves.values())))[-300]
    index = {name: delta.get(f"{name}//0.index") for name in delta.entries}
    assert sum(each.size for each in index.values()) == 300
    assert all(moves[name][each].min() >= 0.999 * least for name, each in index.items())
    assert all(set(changed(base, delta, name)) <= set(index[name].tolist()) for name in index)
    pulled = tune(base, ROWS, method="lt-sft", count=300, l1=300.0, **same)
    size = [sum(float(np.abs(each.get(key)).sum()) for key in each.tensors if key.endswith("values")) for each in (delta, pulled)]
    assert size[1] < 0.5 * size[0]


def test_two_sparse_deltas_compose_by_adding(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    first = tune(base, ROWS, method="lt-sft", count=400, trial=3, **QUICK)
    second = tune(base, ROWS[::-1][:9], method="lt-sft", count=400, trial=3, seed=4, **QUICK)
    both, swapped = first + second, second + first
    overlap = 0
    for name in {*first.entries, *second.entries}:
        w = base.tensor(name).read()
        one, two = ((each.apply(name, w) if name in each.entries else w) - w for each in (first, second))
        overlap += int(((one != 0) & (two != 0)).sum())
        np.testing.assert_allclose(both.apply(name, w), w + one + two, rtol=0, atol=1e-6)
        np.testing.assert_allclose(swapped.apply(name, w), both.apply(name, w), rtol=0, atol=1e-6)
    assert 0 < overlap < 400


def test_dreamstyler_takes_the_same_share_of_every_tensor(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    delta = tune(base, ROWS, method="dreamstyler", trial=3, **QUICK)
    for name, entry in delta.entries.items():
        size = int(np.prod(entry.shape))
        assert abs(delta.get(f"{name}//0.index").size - 0.1 * size) <= 1 and 0 < changed(base, delta, name).size <= 0.1 * size + 1


class OneLayer:
    """An objective that sees no further than the first layer."""

    def __init__(self, inner: Any) -> None:
        self.examples, self.collate = inner.examples, inner.collate

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        out: list[torch.Tensor] = []
        hook = model.model.layers[0].register_forward_hook(lambda m, x, y: out.append(y if isinstance(y, torch.Tensor) else y[0]))
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        hook.remove()
        return out[0].square().mean()


def test_spt_chooses_the_most_sensitive_and_only_where_the_loss_looks(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    found = methods.get("space", "spt")
    job = job_of(base, OneLayer(goal_of(base)))
    space: Any = found.run(config.make(found.config, {"count": 900, "rank": 2, "batches": 2, "alpha": 1.2}, ""), job)
    build = Builder(base)
    space.build(build)
    delta = build.done()
    assert all(".layers.0." in name for name in delta.entries) and {op.op for e in delta.entries.values() for op in e.ops} == {"lowrank", "sparse"}
    scores = sensitivities(job, space.parts, 2)
    tau = sum(index.size for index in space.positions)
    least = torch.cat([score.reshape(-1) for score in scores]).sort().values[-tau]
    for score, index in zip(scores, space.positions, strict=True):
        assert np.array_equal(np.flatnonzero(score.reshape(-1).numpy() >= float(least)), index)
    for part, index in zip(space.parts, space.positions, strict=True):
        whole = 1.2 * index.size >= 2 * sum(part.shape)
        assert (part.target in delta.entries) == bool(index.size)
        assert not index.size or delta.entries[part.target].ops[0].op == ("lowrank" if whole else "sparse")
    assert 0.7 * 900 < sum(int(np.prod(t.shape)) for key, t in delta.tensors.items() if not key.endswith("index")) <= 900


@pytest.mark.parametrize("grow", ["ag", "ma"])
def test_spiel_keeps_its_density_and_gives_back_what_it_drops(folders: dict[str, Path], grow: str) -> None:
    base = Base.open(folders["llama"])

    def look(run: Run) -> dict[str, tuple[Any, Any]]:
        space = space_of(run)
        return {space.parts[n].target: (space.positions[n].copy(), values.detach().clone().numpy()) for n, _, values in space.trained()}

    watch = Watch(look)
    delta = watched(base, watch, method="spiel", density=0.05, period=4, gather=2, rate=0.5, grow=grow, steps=16)
    counted = [{name: index.size for name, (index, _) in seen.items()} for seen in watch.seen]
    assert all(each == counted[0] for each in counted)
    ever: dict[str, set[int]] = {name: set() for name in counted[0]}
    turned = []
    for seen in watch.seen:
        assert all(np.all(np.diff(index) > 0) for index, _ in seen.values())
        for name, (index, _) in seen.items():
            ever[name] |= set(index.tolist())
    for before, after in zip(watch.seen, watch.seen[1:], strict=False):
        new = {name: ~np.isin(after[name][0], before[name][0]) for name in after}
        turned.append(sum(int(mask.sum()) for mask in new.values()))
        assert all((after[name][1][mask] == 0).all() for name, mask in new.items())
        for name, mask in new.items():  # what went was smaller than what stayed
            gone = ~np.isin(before[name][0], after[name][0])
            assert gone.sum() == mask.sum()
    total = sum(counted[0].values())
    assert [bool(count) for count in turned] == [step in (2, 6, 10, 14) for step in range(2, 17)]
    assert turned[0] > 0.8 * total and turned[4] <= 0.5 * total and turned[12] < turned[4]
    for name in delta.entries:
        index = set(watch.seen[-1][name][0].tolist())
        assert set(changed(base, delta, name)) <= index and len(ever[name]) > len(index)


def test_spiel_hears_dense_gradients_and_sums_those_of_the_largest(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])

    def look(run: Run) -> dict[str, Any]:
        space = space_of(run)
        return {
            space.parts[n].target: [space.kept[f"{what}/{n}"].clone() for what in ("candidates", "sums") if f"{what}/{n}" in space.kept]
            for n, _, _ in space.trained()
        }

    # with so small a learning rate the weights stay, so these are the base's gradients, and the head of the run is that of full tuning
    watch, same = Watch(look), {"schedule": "constant", "clip": 0.0, "optimizer": "sgd", "momentum": 0.0}
    watched(base, watch, method="spiel", density=0.05, period=9, gather=3, **{**same, "lr": 1e-9, "steps": 2})
    sums = []
    for steps in (1, 2):
        full = Watch(lambda run: {name: value.detach().clone() for name, value in run.tensors.items()})
        watched(base, full, method="full", targets="all-linear", **{**same, "lr": 1e-4, "steps": steps})
        sums.append({name: (flat(base, name) - value.reshape(-1)) / 1e-4 for name, value in full.seen[-1].items()})
    for name, (candidates, first) in watch.seen[0].items():
        assert len(set(top([sums[0][name]], candidates.numel())[0].tolist()) & set(candidates.tolist())) >= 0.98 * candidates.numel()
        torch.testing.assert_close(first, sums[0][name][candidates], rtol=0.02, atol=2e-3)
        again, second = watch.seen[1][name]
        assert torch.equal(again, candidates) and not torch.equal(first, second)
        torch.testing.assert_close(second, sums[1][name][candidates], rtol=0.05, atol=1e-2)


def test_spiel_grows_the_best_that_are_not_there(folders: dict[str, Path]) -> None:
    found = methods.get("space", "spiel")
    base = Base.open(folders["llama"])
    index, staying = np.array([1, 4, 7]), np.array([4, 7])
    for grow in ("ag", "ma"):
        space: Any = found.run(config.make(found.config, {"grow": grow}, ""), job_of(base, None))
        assert space._grown(0, index, staying, 1).size == 0  # nothing is known of this tensor
        space.kept = {"candidates/0": torch.tensor([1, 3, 4, 8]), "sums/0": torch.tensor([1.0, -3.0, 9.0, 2.0])}
        space.kept |= {"rows/0": torch.tensor([1.0, 5.0, 2.0]), "columns/0": torch.tensor([1.0, 3.0, 2.0])}  # 3 x 3
        assert space._grown(0, index, staying, 2).tolist() == {"ag": [3, 8], "ma": [5, 8]}[grow] if grow == "ag" else [5, 3]


@pytest.mark.slow
def test_spiel_beats_a_fixed_random_mask(folders: dict[str, Path]) -> None:
    scores = {}
    for name, own in (("apet", {"across": "tensor"}), ("spiel", {"period": 10, "gather": 3}), ("spiel", {"period": 10, "gather": 3, "grow": "ma"})):
        watch = Watch()
        for seed in (0, 1):
            watched(folders["llama"], watch, method=name, density=0.02, seed=seed, schedule="cosine", **{**own, "steps": 120, "batch_size": 6, "lr": 0.02})
        scores[name, own.get("grow")] = float(np.mean([watch.losses[k] for k in (*range(100, 120), *range(220, 240))]))
    assert max(scores["spiel", None], scores["spiel", "ma"]) < 0.97 * scores["apet", None]


def test_sara_trains_the_smallest_and_then_those_still_small(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    watch = Watch(lambda run: {space_of(run).parts[n].target: v.detach().clone().numpy() for n, _, v in space_of(run).trained()})
    delta = watched(base, watch, method="sara", threshold=0.02, reselect=0.5, nuclear=0.0, lr=0.01, schedule="constant", steps=8)
    froze = moved_on = 0
    for name in delta.entries:
        w, index = flat(base, name).numpy(), delta.get(f"{name}//0.index")
        assert np.array_equal(index, np.flatnonzero(np.abs(w) < 0.02))
        assert set(changed(base, delta, name)) <= set(index.tolist())
        large = np.abs(w[index] + watch.seen[3][name]) >= 0.02
        assert np.array_equal(watch.seen[3][name][large], watch.seen[7][name][large])
        froze, moved_on = froze + int(large.sum()), moved_on + int((watch.seen[3][name] != watch.seen[7][name])[~large].sum())
    assert froze > 50 and moved_on > 50


def test_saras_nuclear_norm_keeps_what_is_learnt_of_low_rank(folders: dict[str, Path]) -> None:
    def norm(strength: float) -> float:
        delta = tune(folders["llama"], ROWS, method="sara", nuclear=strength, targets="model.layers.0.mlp.up_proj.weight", **{**QUICK, "steps": 30})
        (name,) = delta.entries
        values = np.zeros(int(np.prod(delta.entries[name].shape)), np.float32)
        values[delta.get(f"{name}//0.index")] = delta.get(f"{name}//0.values")
        return float(np.linalg.norm(values.reshape(delta.entries[name].shape), "nuc"))

    assert norm(0.2) < 0.8 * norm(0.0)


def test_apet_takes_random_entries_of_a_random_share_of_the_targets(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    few = tune(base, ROWS, method="apet", count=500, tensors=0.2, **QUICK)
    all_ = tune(base, ROWS, method="apet", count=500, **QUICK)
    assert len(few.entries) == 3 and len(all_.entries) == 14
    assert [sum(d.get(f"{name}//0.index").size for name in d.entries) for d in (few, all_)] == [500, 500]
    other = tune(base, ROWS, method="apet", count=500, tensors=0.2, seed=1, **QUICK)
    assert set(other.entries) != set(few.entries)
    with pytest.raises(UsageError, match="do not fit"):
        tune(base, ROWS, method="apet", count=5000, tensors=0.1, **QUICK)


# --- schemes


@pytest.mark.parametrize("channels", [1.0, 0.25])
def test_pockengine_makes_no_graph_below_its_scheme(folders: dict[str, Path], channels: float) -> None:
    base = Base.open(folders["llama"])
    live = Base.of(base.model())
    graphs: dict[str, set[bool]] = {}

    def note(name: str) -> Any:
        return lambda m, x, y: (
            graphs.setdefault(name, set()).add((y if isinstance(y, torch.Tensor) else y[0]).grad_fn is not None) if torch.is_grad_enabled() else None
        )

    hooks = [module.register_forward_hook(note(name)) for name, module in live.module.named_modules() if name]
    delta = tune(live, ROWS, method="pockengine", weights=0.5, biases=0.5, channels=channels, tokenizer=base.tokenizer(), **QUICK)
    for hook in hooks:
        hook.remove()
    assert all(".layers.1." in name for name in delta.entries)
    assert all(graphs[name] == {False} for name in graphs if ".layers.0" in name or "embed" in name) and any(".layers.0.mlp" in name for name in graphs)
    assert graphs["model.layers.1.self_attn.q_proj"] == {True} and graphs["lm_head"] == {True}
    whole = delta.apply("model.layers.1.mlp.up_proj.weight", base.tensor("model.layers.1.mlp.up_proj.weight").read())
    moved_ = whole != base.tensor("model.layers.1.mlp.up_proj.weight").read()
    assert moved_[:, : round(32 * channels)].mean() > 0.95 and not moved_[:, round(32 * channels) :].any()


def test_pockengine_updates_as_full_tuning_of_the_same_tensors_does(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    same = {**QUICK, "steps": 3, "optimizer": "sgd"}
    sparse = tune(base, ROWS, method="pockengine", weights=0.5, biases=0.0, **same)
    full = tune(base, ROWS, method="full", targets=list(sparse.entries), **same)
    assert sparse.entries.keys() == full.entries.keys()
    for name in full.entries:
        w = base.tensor(name).read()
        np.testing.assert_allclose(sparse.apply(name, w) - w, full.apply(name, w) - w, rtol=1e-3, atol=2e-7)


def test_a_sign_takes_a_bit_and_points_the_same_way() -> None:
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(5, 7, generator=rng) < 0.5
    assert packed(mask).dtype == torch.uint8 and packed(mask).numel() == 5 and torch.equal(unpacked(packed(mask), mask.shape), mask)
    for exact, top_ in ((torch.nn.functional.hardswish, float("inf")), (torch.nn.functional.relu6, 6.0), (torch.nn.functional.gelu, float("inf"))):
        x = (torch.randn(64, 32, generator=rng) * 3).requires_grad_()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = signed(x, exact, top_)
        assert torch.equal(y, exact(x)) and sum(t.nbytes for t in kept) == 64 * 32 // 8
        weight = torch.randn(64, 32, generator=rng)
        (mine,) = torch.autograd.grad((y * weight).sum(), x)
        (true,) = torch.autograd.grad((exact(x) * weight).sum(), x)
        assert float(torch.cosine_similarity(mine.reshape(-1), true.reshape(-1), dim=0)) > 0.85
        if exact is torch.nn.functional.relu6:
            assert torch.equal(mine, true)


def test_mobiletl_trains_shifts_below_and_all_above_and_keeps_bits(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base.open(folders["bert"])
    kept: dict[str, list[int]] = {}
    forward = torch.nn.Module.__call__
    losses = {}
    for how in ("none", "all"):
        kept[how] = []

        def counted(self: Any, *args: Any, how: str = how, **kwargs: Any) -> Any:
            if "GELU" not in type(self).__name__ or not torch.is_grad_enabled():
                return forward(self, *args, **kwargs)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept[how].append(t.nbytes) or t, lambda t: t):
                return forward(self, *args, **kwargs)

        monkeypatch.setattr(torch.nn.Module, "__call__", counted)
        watch = Watch()
        delta = watched(base, watch, LABELLED, method="mobiletl", objective="classification", signed=how, steps=30)
        losses[how] = watch.losses
    assert kept["none"] and sum(kept["none"]) == pytest.approx(32 * sum(kept["all"]), rel=0.01)
    assert losses["none"][0] == losses["all"][0] and losses["none"][-1] != losses["all"][-1]
    assert sum(losses["all"][-5:]) < 1.3 * sum(losses["none"][-5:]) + 0.5 and sum(losses["all"][-5:]) < 0.7 * sum(losses["all"][:5])
    below = {name for name in delta.entries if ".layer.0." in name}
    assert below == {name for name in base.names if ".layer.0." in name and "LayerNorm.bias" in name}
    assert {name for name in delta.entries if ".layer.1." in name} == {name for name in base.names if ".layer.1." in name}


# --- pruning


def test_pst_prunes_to_the_share_and_trains_small_tensors_only(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    watch = Watch(lambda run: {name: tuple(value.shape) for name, value in run.tensors.items()})
    delta = watched(base, watch, method="pst", rank=2, density=0.3, steps=6)
    assert all(2 in shape or len(shape) == 1 for shape in watch.seen[0].values())
    moved_ = 0
    for name, entry in delta.entries.items():
        w = base.tensor(name).read()
        new = delta.apply(name, w)
        assert int((new != 0).sum()) == round(0.3 * w.size)
        by_size = np.zeros(w.size, bool)
        by_size[np.abs(w).reshape(-1).argsort()[: w.size - round(0.3 * w.size)]] = True
        moved_ += int(((new == 0).reshape(-1) != by_size).sum())
        assert entry.ops[-1].op == "assign" and not delta.get(f"{name}//1.values").any()
    assert moved_ > 100


@pytest.mark.parametrize("density", [0.01, 0.37, 0.9999])
def test_pst_prunes_what_sorting_would_and_the_last_of_equals(folders: dict[str, Path], density: float) -> None:
    base = Base.open(folders["llama"])
    space = PST(PSTConfig(density=density), job_of(base, None))
    for importance in (torch.randint(0, 4, (30, 40)).float(), torch.zeros(7, 9), torch.rand(20, 30)):
        kept = importance.reshape(-1).argsort(descending=True, stable=True)[: round(density * importance.numel())]
        assert sorted({*range(importance.numel())} - {*kept.tolist()}) == space._pruned(importance).tolist()


def test_psts_importance_learns_by_its_true_gradient() -> None:
    rng = torch.Generator().manual_seed(0)
    p, q, r, c = (torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((6, 2), (2, 5), (6,), (5,)))
    each = Importance(None, p, q, r, c)  # type: ignore[arg-type]
    grad = torch.randn(6, 5, generator=rng)
    each.learn(grad)
    each.learn(2 * grad)
    learnt = [parameter.grad.clone() for parameter in (p, q, r, c) if parameter.grad is not None]
    expected = torch.autograd.grad((each.value() * 3 * grad).sum(), (p, q, r, c))
    for mine, true in zip(learnt, expected, strict=True):
        torch.testing.assert_close(mine, true)


def test_pst_hears_the_gradient_of_every_entry_pruned_or_not(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: dict[str, torch.Tensor] = {}
    learn = Importance.learn

    def note(self: Importance, grad: torch.Tensor) -> None:
        heard.setdefault(self.part.target, grad.clone())
        learn(self, grad)

    monkeypatch.setattr(Importance, "learn", note)
    base = Base.open(folders["llama"])
    one = {**QUICK, "batch_size": 18, "steps": 1}
    start = tune(base, ROWS, method="pst", rank=2, **{**one, "lr": 1e-30})
    weft.fold(base, [start], tmp_path / "pruned")
    pruned = Base.open(tmp_path / "pruned")
    job = job_of(pruned, goal_of(pruned))
    parts = job.parts("all-linear")
    (grads,) = gradients(job, parts, 1)
    assert {part.target for part in parts} == heard.keys()
    for part, grad in zip(parts, grads, strict=True):
        expected = grad * xp.to_torch(base.tensor(part.target).read())
        torch.testing.assert_close(heard[part.target], expected, rtol=1e-3, atol=1e-6)
        assert expected[xp.to_torch(pruned.tensor(part.target).read()) == 0].abs().max() > 1e-4


def test_psts_importance_follows_the_full_movement_score() -> None:
    """Of a score with a number for each entry, summed over many noisy gradients, the low-rank importance finds most of the largest."""
    rng = torch.Generator().manual_seed(0)
    rows, columns, rank = 48, 32, 4
    planted = torch.randn(rows, 2, generator=rng) @ torch.randn(2, columns, generator=rng)
    shapes = ((rows, rank), (rank, columns), (rows,), (columns,))
    start = torch.rand(rows, rank, generator=rng) - 0.5
    each = Importance(None, *(torch.nn.Parameter(start if not k else torch.zeros(shape)) for k, shape in enumerate(shapes)))  # type: ignore[arg-type]
    own = [each.p, each.q, each.r, each.c]
    optimizer, full = torch.optim.SGD(own, lr=1e-3), torch.zeros(rows, columns)
    for _ in range(100):
        grad = -planted + torch.randn(rows, columns, generator=rng)
        full -= grad
        each.learn(grad)
        optimizer.step()
        optimizer.zero_grad()
    k = full.numel() // 5
    low, high = (set(value.detach().reshape(-1).argsort(descending=True)[:k].tolist()) for value in (each.value(), full))
    assert len(low & high) / k > 0.6  # by chance: 0.2
    assert sum(parameter.numel() for parameter in own) < full.numel() / 3


def test_dsee_without_its_extras_is_lora(folders: dict[str, Path]) -> None:
    plain = tune(folders["llama"], ROWS, method="lora", rank=4, alpha=8.0, **QUICK)
    dsee = tune(folders["llama"], ROWS, method="dsee", rank=4, alpha=8.0, entries=0, **QUICK)
    assert plain.tensors.keys() == dsee.tensors.keys()
    assert all(plain.tensors[key].sha256 == dsee.tensors[key].sha256 for key in plain.tensors)


def test_dsee_finds_what_stands_out_and_prunes_in_time(folders: dict[str, Path]) -> None:
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(30, 3, generator=rng) @ torch.randn(3, 20, generator=rng)
    planted = torch.randperm(600, generator=rng)[:15].sort().values
    w.view(-1)[planted] += 2.0 * torch.where(torch.rand(15, generator=rng) < 0.5, -1.0, 1.0)
    assert np.array_equal(outstanding(w, 3, 15, 20), planted.numpy())
    base = Base.open(folders["llama"])
    gone: list[list[bool]] = []

    def look(run: Run) -> None:
        gone.append([bool((values == 0).all()) for _, values in space_of(run)._fixed()])

    delta = watched(base, Watch(look), method="dsee", rank=2, entries=16, prune=0.4, steps=6)
    assert [set(each) for each in gone] == [{False}] * 2 + [{True}] * 4
    for name, entry in delta.entries.items():
        w_ = base.tensor(name).read()
        assert [op.op for op in entry.ops] == ["assign", "lowrank", "sparse"] and delta.get(f"{name}//2.values").size == 16
        rest = delta.apply(name, w_) - delta.get(f"{name}//1.B") @ delta.get(f"{name}//1.A") * 8.0
        rest.reshape(-1)[delta.get(f"{name}//2.index")] -= delta.get(f"{name}//2.values")
        index = delta.get(f"{name}//0.index")
        assert index.size == int(0.4 * w_.size) and np.abs(rest.reshape(-1)[index]).max() < 1e-5
        kept = np.setdiff1d(np.arange(w_.size), index)
        np.testing.assert_allclose(rest.reshape(-1)[kept], w_.reshape(-1)[kept], atol=1e-5)
        assert np.abs(w_.reshape(-1)[index]).max() <= np.abs(w_.reshape(-1)[kept]).min()
