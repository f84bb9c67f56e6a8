"""Low-rank spaces: what every one keeps to, and what each is for."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import tiny
from weft import methods
from weft.attaching import attach, detach
from weft.base import Base
from weft.config import make
from weft.delta import Builder, Delta
from weft.engine.events import Event, Events
from weft.engine.loop import LoopConfig, Run, train
from weft.errors import UsageError
from weft.folding import fold
from weft.names import NameMap
from weft.ops import Generator
from weft.tuning import tune
from weft.tuning.space import Job, Space

TEXTS = [{"text": text} for text in tiny.texts(16, seed=4)]
ONE = {"targets": ("attention.query", "mlp.down")}
SPACES: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 4, "target_rank": 2, "interval": 2, "begin": 0.2},
    "increlora": {"rank": 1, "target_rank": 2, "interval": 2, "restart": 2, "begin": 0.0},
    "triadaptlora": {"rank": 1, "target_rank": 2, "interval": 2, "restart": 2, "begin": 0.0, "high": 0.5},
    "svfit": {"rank": 20},
    "kasa": {"rank": 3},
    "lamda": {"rank": 4, "freeze": 0.6, "adaptive": True},
    "s2-lora": {"rank": 4, "sparsity": 0.2},
    "nola": {"k": 5, "rank": 3},
    "intrinsic-dimension": {"targets": ("all",), "d": 20, "scale": 0.1},
    "corda": {"rank": 3, "alpha": 6},
    "flora": {"rank": 3},
    "mixture-of-shards": {"rank": 6, "budget": 3, "shards": 4, "private": 1},
}
QUICK: dict[str, Any] = {"batch_size": 4, "steps": 8, "lr": 0.02, "threads": 1, "weight_decay": 0.1}


def silent(event: Event) -> None:
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"llama": tiny.llama(root / "llama"), "gpt2": tiny.gpt2(root / "gpt2")}


def tuned(folder: Path | Base, name: str, **options: Any) -> Delta:
    return tune(folder, TEXTS, method=name, **{"progress": silent, **QUICK, **ONE, **SPACES[name], **options})


def job_of(base: Base, model: nn.Module, name: str, options: Mapping[str, Any], goal: Any = None) -> tuple[Space, Job]:
    """A space with its delta attached, as `tune` does it."""
    found = methods.get("space", name)
    job = Job(base, model, NameMap.of(base, model), Generator(3), goal=goal)
    space: Space = found.run(make(found.config, dict(options), name), job)
    build = Builder(base)
    space.build(build)
    job.delta = build.done()
    job.handle = attach(model, job.delta, base=base, trainable=True, names=job.names)
    return space, job


def changes(delta: Delta, base: Base) -> dict[str, float]:
    """The largest change of each target."""
    found = {}
    for target in delta.entries:
        w = base.tensor(target).read().astype(np.float32)
        found[target] = float(np.abs(delta.apply(target, w) - w).max())
    return found


STARTS = {"increlora": 1e-6, "kasa": 1.0}
"""How far a start may be from the base; bit for bit the base where nothing is said. KaSA's is the truncated base."""


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", SPACES)
def test_the_start_is_the_base(folders: dict[str, Path], name: str, kind: str) -> None:
    base = Base.open(folders[kind])
    goal = methods.get("objective", "causal-lm")
    objective = goal.run(make(goal.config, {}, "objective"), base, base.tokenizer(), TEXTS)
    _, job = job_of(base, base.model(), name, {**(ONE if kind == "llama" else {}), **SPACES[name]}, objective)
    assert job.delta is not None
    assert max(changes(job.delta, base).values()) <= STARTS.get(name, 0.0)


@pytest.mark.parametrize("name", SPACES)
def test_what_is_attached_is_what_is_folded(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    base = Base.open(folders["llama"])
    ids = torch.arange(5, 17)[None]
    seen: list[torch.Tensor] = []

    def last(run: Run) -> dict[str, float]:
        with torch.no_grad():
            seen.append(run.model(input_ids=ids).logits)
        return {}

    delta = tuned(base, name, evaluate=last, evaluate_every=QUICK["steps"])
    assert max(changes(delta, base).values()) > 1e-3
    model = base.model()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        handle = attach(model, delta, base=base, trainable=True)
        live = model(input_ids=ids).logits
        detach(model, handle)
        assert torch.equal(model(input_ids=ids).logits, before)
        fold(base, [delta], tmp_path / "folded")
        folded = Base.open(tmp_path / "folded").model()(input_ids=ids).logits
    assert float((live - before).abs().max()) > 1e-2
    torch.testing.assert_close(live, folded, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(live, seen[-1], atol=1e-4, rtol=1e-4)


class Stop:
    """Interrupts a run at its first saved state."""

    def __call__(self, event: Event) -> None:
        if event["event"] == "save":
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", SPACES)
def test_an_interrupted_run_is_the_whole_one(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    whole, again = tuned(folders["llama"], name), tuned(folders["llama"], name)
    assert whole.id == again.id
    out = tmp_path / "d.safetensors"
    for at in (3, 5):
        with pytest.raises(KeyboardInterrupt):
            tuned(folders["llama"], name, out=out, save_every=at, progress=Stop())
        assert tuned(folders["llama"], name, out=out, resume=f"{out}.state").id == whole.id
    assert Delta.load(out).id == whole.id


# --- adalora, increlora, triadaptlora: rank where it matters


class Line:
    """Two linear modules side by side, one of which has something to learn: y = a(x_a) + b(x_b)."""

    examples = tuple({"input_ids": [k]} for k in range(64))

    def __init__(self, learns: str, seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.model = nn.ModuleDict({name: nn.Linear(12, 10, bias=False) for name in ("a", "b")})
        self.inputs = torch.randn(64, 2, 12, generator=gen)
        with torch.no_grad():
            for module in self.model.values():
                module.weight.copy_(torch.randn(10, 12, generator=gen))
        w = {name: module.weight.detach().clone() for name, module in self.model.items()}
        w[learns] += torch.randn(10, 3, generator=gen) @ torch.randn(3, 12, generator=gen)
        self.answers = self.inputs[:, 0] @ w["a"].T + self.inputs[:, 1] @ w["b"].T

    def collate(self, examples: Any, keys: Any) -> dict[str, torch.Tensor]:
        index = torch.tensor([each["input_ids"][0] for each in examples])
        return {"input_ids": index[:, None], "x": self.inputs[index], "y": self.answers[index]}

    def weight(self, batch: Any) -> float:
        return float(len(batch["x"]))

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        return (model["a"](batch["x"][:, 0]) + model["b"](batch["x"][:, 1]) - batch["y"]).square().mean()


def learnt(name: str, goal: Line, steps: int, lr: float = 0.02, **options: Any) -> tuple[Space, list[float]]:
    """A space after training on `goal`, and the losses."""
    space, _ = job_of(Base.of(goal.model), goal.model, name, {"targets": ("all",), **options}, goal)
    losses: list[float] = []

    def heard(event: Event) -> None:
        if event["event"] == "step":
            losses.append(event["loss"])

    tensors = space.tensors()
    config = LoopConfig(steps=steps, batch_size=16, clip=0)
    train(Run(goal.model, goal, tensors, torch.optim.AdamW(list(tensors.values()), lr=lr), lambda place, total: 1.0, config, 0, [space]), Events(None, heard))
    detach(goal.model)
    return space, losses


RANKS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 4, "target_rank": 2, "interval": 5, "orthogonal": 0.1},
    "increlora": {"rank": 1, "target_rank": 2.5, "capacity": 5, "interval": 5, "restart": 5},
    "triadaptlora": {"rank": 1, "target_rank": 2.5, "capacity": 5, "interval": 5, "restart": 5},
}


@pytest.mark.parametrize("learns", ["a", "b"])
@pytest.mark.parametrize("name", RANKS)
def test_rank_goes_to_where_the_change_is(name: str, learns: str) -> None:
    space, losses = learnt(name, Line(learns), 120, **RANKS[name])
    delta = space.finish()
    right, left = ("Q", "P") if name != "triadaptlora" else ("A", "B")
    ranks = {module: delta.tensors[f"{module}.weight//0.{right}"].shape[0] if f"{module}.weight" in delta.entries else 0 for module in "ab"}
    other = "b" if learns == "a" else "a"
    total = round(RANKS[name]["target_rank"] * 2)
    assert ranks[learns] >= 3 > ranks[other] and (sum(ranks.values()) == total or (name == "triadaptlora" and sum(ranks.values()) <= total))
    assert delta.tensors[f"{learns}.weight//0.{left}"].shape == (10, ranks[learns])
    plain = learnt("lora", Line(learns), 120, rank=2)[1]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(plain[-5:]), "LoRA with as much rank, evenly spread, cannot reach what has rank 3"


def test_a_component_that_joins_changes_nothing_and_triangles_stay_triangles() -> None:
    """`increlora` and `triadaptlora`, at every step at which a rank grows."""
    for name in ("increlora", "triadaptlora"):
        goal = Line("a")
        space, job = job_of(Base.of(goal.model), goal.model, name, {"targets": ("all",), **RANKS[name]}, goal)
        seen: list[tuple[int, float]] = []
        before: list[torch.Tensor] = []

        def change() -> torch.Tensor:
            return torch.cat([job.handle.delta().apply(f"{m}.weight", goal.model[m].weight.detach()).flatten() for m in "ab"])  # noqa: B023

        run_after, pace_after = space.after_step, space._pace.after  # type: ignore[attr-defined]

        def paced(tensors: Any) -> None:
            pace_after(tensors)  # noqa: B023
            before[:] = [change()]  # noqa: B023

        def after(run: Run) -> None:
            run_after(run)  # noqa: B023
            seen.append((sum(space.ranks().values()), float((change() - before[0]).abs().max())))  # type: ignore[attr-defined] # noqa: B023

        space._pace.after, space.after_step = paced, after  # type: ignore[attr-defined, method-assign]
        tensors = space.tensors()
        optimizer = torch.optim.AdamW(list(tensors.values()), lr=0.02, weight_decay=0.1)
        train(Run(goal.model, goal, tensors, optimizer, lambda place, total: 1.0, LoopConfig(steps=60, batch_size=16), 0, [space]), Events(None, silent))
        ranks = [rank for rank, _ in seen]
        assert ranks == sorted(ranks) and ranks[0] == 2 and ranks[-1] > 3
        assert max(moved for _, moved in seen) < 2e-5
        if name == "triadaptlora":
            delta = space.finish()
            for module in "ab":
                b, a = delta.get(f"{module}.weight//0.B"), delta.get(f"{module}.weight//0.A")
                assert np.array_equal(b, np.tril(b)) and np.array_equal(a, np.triu(a)) and b.any()
        detach(goal.model)


def test_adalora_has_the_losses_and_ranks_of_peft(folders: dict[str, Path]) -> None:
    """50 steps from the same start, on the same batches."""
    from peft import AdaLoraConfig, get_peft_model

    base = Base.open(folders["llama"])
    found = methods.get("objective", "causal-lm")
    goal = found.run(make(found.config, {}, "objective"), base, base.tokenizer(), TEXTS)
    options = {"targets": ("q_proj", "down_proj"), "rank": 4, "target_rank": 2, "alpha": 8, "begin": 0.1, "settle": 0.3, "interval": 5}
    space, job = job_of(base, base.model(), "adalora", options, goal)
    assert job.delta is not None
    batches: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []
    space.batches = lambda run, parts: batches.extend(part.batch for part in parts)  # type: ignore[method-assign]
    tensors = space.tensors()
    optimizer = torch.optim.AdamW(list(tensors.values()), lr=0.01, weight_decay=0.0)
    run = Run(job.model, goal, tensors, optimizer, lambda place, total: 1.0, LoopConfig(steps=50, batch_size=4, clip=0), 0, [space])
    train(run, Events(None, lambda event: losses.append(event["loss"]) if event["event"] == "step" else None))
    same = {"init_r": 4, "target_r": 2, "tinit": 5, "tfinal": 15, "deltaT": 5, "lora_alpha": 8, "orth_reg_weight": 0.5, "total_step": 50}
    theirs = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], **same)
    model = get_peft_model(base.model(), theirs)
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora_E"):
                prefix = f"{name.removeprefix('base_model.model.')}.weight//0"
                for field, place in (("P", module.lora_B), ("Q", module.lora_A)):
                    place["default"].copy_(torch.from_numpy(job.delta.get(f"{prefix}.{field}")))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    peft, expected = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0), []
    model.train()
    for number, batch in enumerate(batches):
        value = model(**batch).loss
        expected.append(float(value.detach()))
        value.backward()
        peft.step()
        model.base_model.update_and_allocate(number + 1)
        peft.zero_grad()
    assert losses == pytest.approx(expected, abs=1e-4) and losses[-1] < losses[0] - 0.1
    patterns = theirs.rank_pattern or model.peft_config["default"].rank_pattern
    for name, mask in patterns.items():
        assert space.final[f"{name.removeprefix('base_model.model.').partition('.lora_E')[0]}.weight//0"].tolist() == mask  # type: ignore[attr-defined]
    assert sum(sum(mask) for mask in patterns.values()) == 2 * len(patterns)


# --- what is trained, and what is written


def numbers(name: str, shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """How many numbers a space trains on matrices of `shapes`, and how many it writes, as its page says (options as in `SPACES`)."""
    sides, count = [sum(shape) for shape in shapes], len(shapes)
    one_each = {shape: sum(shape) for shape in shapes}
    return {
        "adalora": (sum(4 * (side + 1) for side in sides), -1),
        "increlora": (sum(6 * (side + 1) for side in sides), -1),
        "triadaptlora": (sum(6 * side for side in sides), -1),
        "svfit": (20 * count, sum(20 * (side + 1) for side in sides)),
        "kasa": (sum(3 * (side + 1) for side in sides), sum(6 * (side + 1) for side in sides)),
        "s2-lora": (4 * sum(one_each.values()) + 4 * count, 4 * sum(one_each.values()) + 4 * count),
        "nola": (2 * 5 * count, 2 * 5 * count),
        "intrinsic-dimension": (20, 20),
        "corda": (sum(3 * side for side in sides), sum(6 * side for side in sides)),
        "flora": (sum(3 * side + 9 for side in sides), sum(3 * side + 9 for side in sides)),
        "mixture-of-shards": (sum(3 * side for side in sides), sum(3 * side + 6 * 4 * 2 for side in sides)),
    }[name]


@pytest.mark.parametrize("name", [name for name in SPACES if name != "lamda"])
def test_so_many_numbers_are_trained_and_written(folders: dict[str, Path], name: str) -> None:
    base = Base.open(folders["llama"])
    delta = tuned(base, name, steps=8)
    names = [name for name in base.names if name.endswith(("q_proj.weight", "down_proj.weight"))]
    assert len(names) == 4
    trained, written = numbers(name, [tuple(base.tensor(name).shape) for name in names])
    assert delta.notes["parameters"] == trained
    if written < 0:  # two components of each matrix on average
        field = "A" if name == "triadaptlora" else "Q"
        alive = [delta.tensors[f"{target}//0.{field}"].shape[0] for target in delta.entries]
        assert sum(alive) == 8 or (name == "triadaptlora" and 4 < sum(alive) <= 8)
        written = sum(rank * (sum(base.tensor(target).shape) + (name != "triadaptlora")) for target, rank in zip(delta.entries, alive, strict=True))
    assert sum(int(np.prod(tensor.shape)) for tensor in delta.tensors.values()) == written


# --- one by one


def test_svfit_changes_singular_values_and_nothing_else(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    delta = tuned(base, "svfit", rank=6)
    for target in delta.entries:
        w = base.tensor(target).read()
        u, s, v = np.linalg.svd(w.astype(np.float64), full_matrices=False)
        core = u.T @ delta.apply(target, w) @ v.T
        moved = core - np.diag(s)
        np.testing.assert_allclose(moved, np.diag(np.diag(moved)), atol=2e-5)
        assert (np.abs(np.diag(moved))[:6] > 2e-4).all() and np.abs(np.diag(moved))[6:].max() < 2e-5
    with pytest.raises(UsageError, match="cannot be taken out"):
        tuned(base, "kasa", rank=32)


def test_kasa_starts_from_the_truncated_base_and_learns_near_orthogonal_vectors() -> None:
    goal = Line("a")
    _, job = job_of(Base.of(goal.model), goal.model, "kasa", {"targets": ("all",), "rank": 3})
    assert job.delta is not None
    for module in "ab":
        w = goal.model[module].weight.detach().numpy()
        u, s, v = np.linalg.svd(w.astype(np.float64))
        np.testing.assert_allclose(job.delta.apply(f"{module}.weight", w), (u[:, :7] * s[:7]) @ v[:7], atol=1e-5)
    detach(goal.model)

    def departure(orthogonal: float) -> float:
        delta = learnt("kasa", Line("a"), 80, rank=3, orthogonal=orthogonal)[0].finish()
        found = [delta.get(f"{module}.weight//0.{field}").astype(np.float64) for module in "ab" for field in ("P", "Q")]
        return sum(float(np.linalg.norm((x.T @ x if x.shape[1] == 3 else x @ x.T) - np.eye(3))) for x in found)

    assert departure(1.0) < min(0.5 * departure(0.0), 2 * 3**0.5), "less than without the penalty, and less than that of the start's zeros"


def test_lamda_ends_with_only_the_small_matrices_in_training() -> None:
    goal = Line("a")
    space, job = job_of(Base.of(goal.model), goal.model, "lamda", {"targets": ("all",), "rank": 4, "freeze": 0.5}, goal)
    assert job.handle is not None
    start = {key: value.detach().clone() for key, value in job.handle.tensors().items()}
    seen: list[dict[str, torch.Tensor]] = []
    after = space.after_step

    def watched(run: Run) -> None:
        after(run)
        seen.append({key: value.detach().clone() for key, value in run.tensors.items()})

    space.after_step = watched  # type: ignore[method-assign]
    tensors = space.tensors()
    assert all(key.endswith((".M", ".B")) for key in tensors)
    optimizer = torch.optim.AdamW(list(tensors.values()), lr=0.02)
    train(Run(goal.model, goal, tensors, optimizer, lambda place, total: 1.0, LoopConfig(steps=40, batch_size=16), 0, [space]), Events(None, silent))
    assert {id(value) for value in optimizer.state} == {id(tensors[f"{m}.weight//0.M"]) for m in "ab"}, "no state for what is at rest"
    assert all(not value.requires_grad and value.grad is None for key, value in tensors.items() if key.endswith(".B"))
    for m in "ab":
        columns = [step[f"{m}.weight//0.B"].T for step in seen]
        moving = [[not torch.equal(one[k], two[k]) for k in range(4)] for one, two in pairwise(columns)]
        counts = [sum(each) for each in moving]
        assert counts == sorted(counts, reverse=True) and counts[0] == 4 and counts[8] in (2, 3) and not any(counts[19:])
        assert all(each == sorted(each, reverse=True) for each in moving), "the last column first"
        assert torch.equal(job.handle.tensors()[f"{m}.weight//0.A"], start[f"{m}.weight//0.A"])
        assert not torch.equal(seen[-1][f"{m}.weight//0.M"], seen[-2][f"{m}.weight//0.M"])
    detach(goal.model)


def test_lamda_gives_flat_spectra_more_rank() -> None:
    model = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in ("flat", "steep")})
    with torch.no_grad():
        nn.init.orthogonal_(model["flat"].weight)
        model["steep"].weight.copy_(model["flat"].weight * 0.5 ** torch.arange(16))
    _, job = job_of(Base.of(model), model, "lamda", {"targets": ("all",), "rank": 5, "adaptive": True})
    assert job.delta is not None
    ranks = {name: job.delta.tensors[f"{name}.weight//0.M"].shape[0] for name in model}
    assert sum(ranks.values()) == 10 and ranks["flat"] >= 8
    detach(model)


def test_s2_lora_leaves_coefficients_zero_where_nothing_is_to_be_learnt() -> None:
    delta = learnt("s2-lora", Line("a"), 200, rank=8, alpha=32, sparsity=0.5)[0].finish()
    zero = {m: int((delta.get(f"{m}.weight//0.lam") == 0).sum()) for m in "ab"}
    assert zero["a"] <= 3 and zero["b"] >= 6
    refs = [delta.entries[f"{m}.weight"].ops[0].t for m in "ab"]
    assert refs[0]["P"] == refs[1]["P"] and refs[0]["Q"] == refs[1]["Q"]


def test_nola_is_as_small_whatever_the_rank(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    small, large = (tuned(base, "nola", rank=rank) for rank in (1, 20))
    assert small.nbytes == large.nbytes == 4 * 2 * 5 * 4
    w = base.tensor(next(iter(large.entries))).read()
    assert np.linalg.matrix_rank(large.apply(next(iter(large.entries)), w) - w, tol=1e-4) == 20


def test_shards_are_picked_from_the_seed_and_private_ones_by_nobody_else(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    options = {"targets": ("q_proj", "o_proj"), "rank": 6, "budget": 3, "shards": 4, "private": 1}

    def tables(options: dict[str, Any]) -> tuple[Delta, dict[str, np.ndarray[Any, Any]]]:
        _, job = job_of(base, base.model(), "mixture-of-shards", options)
        assert job.delta is not None
        return job.delta, {key: job.delta.get(key) for key in job.delta.tensors if key.endswith(".take")}

    delta, first = tables(options)
    again = tables(options)[1]
    assert len(first) == 8 and all(np.array_equal(first[key], again[key]) for key in first)
    for field in "AB":
        chosen = [table.reshape(6, 4) for key, table in first.items() if f".{field}." in key]
        assert all(len(np.unique(table)) == 24 for table in chosen)
        for number, table in enumerate(chosen):
            others = np.concatenate([other.reshape(-1) for k, other in enumerate(chosen) if k != number])
            assert not np.isin(table[0], others).any() and np.isin(table[1:], others).any()
    assert not np.array_equal(*(first[f"model.layers.0.self_attn.q_proj.weight//0.{field}.take"] for field in "AB")), "pairs are dissociated"
    target = "model.layers.1.self_attn.o_proj.weight"
    pools = {field: delta.get(f"@shared/{field}.32x32") for field in "AB"}
    pools["B"] = np.random.default_rng(0).normal(size=pools["B"].shape).astype(np.float32)
    a, b = (pools[field][first[f"{target}//0.{field}.take"]].reshape(6, 32) for field in "AB")
    moved = Delta(delta.base, delta.entries, {**delta.tensors, "@shared/B.32x32": held(pools["B"])})
    np.testing.assert_allclose(moved.apply(target, np.zeros((32, 32), np.float32)), 16 / 6 * b.T @ a, atol=1e-5)
    _, own = tables({**options, "rank": 3, "private": 3})
    assert sorted(np.concatenate([table for key, table in own.items() if ".A." in key]).tolist()) == list(range(4 * 3 * 4)), "LoRA of rank 3"
    with pytest.raises(UsageError, match="part of the budget"):
        tables({**options, "private": 3})


def held(values: np.ndarray[Any, Any]) -> Any:
    from weft.stored import hold

    return hold(values)


def test_more_dimensions_reach_lower_losses_and_gains_count() -> None:
    """90 % of what full tuning gains takes more dimensions than there are to begin with; with all of them it is there."""
    ends = [learnt("intrinsic-dimension", Line("a"), 80, d=d, scale=1.0, lr=0.3)[1][-1] for d in (2, 120, 240)]
    assert ends[0] > 1.5 * ends[1] > 2.5 * ends[2]
    goal = Line("a")
    _, job = job_of(Base.of(goal.model), goal.model, "intrinsic-dimension", {"targets": ("all",), "d": 7})
    assert job.delta is not None and job.delta.tensors["@shared/coef"].shape == (6,) and job.delta.tensors["@shared/gain.layer.none"].shape == (1,)
    detach(goal.model)
    with pytest.raises(UsageError, match="not more than"):
        job_of(Base.of(goal.model), goal.model, "intrinsic-dimension", {"targets": ("all",), "d": 1})


def test_a_random_projection_keeps_lengths_and_differs_from_stream_to_stream() -> None:
    from weft.ops import fastfood

    coef = np.random.default_rng(1).normal(size=90).astype(np.float32)
    w = np.zeros((500, 40), np.float32)
    one, two = (fastfood.OP.apply(w, {"coef": coef}, fastfood.OP.config({"seed": 5, "stream": stream})).reshape(-1) for stream in (0, 1))
    length = float(np.linalg.norm(coef))
    assert one.std() == pytest.approx(length, rel=0.05) and abs(one.mean()) < 0.05 * length
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.05
    share = np.abs(one / length)
    assert (share < 1).mean() == pytest.approx(0.683, abs=0.02) and (share < 2).mean() == pytest.approx(0.954, abs=0.01)
    basis = np.stack([fastfood.OP.apply(w, {"coef": row}, fastfood.OP.config({"seed": 5})).reshape(-1) for row in np.eye(90, dtype=np.float32)])
    gram = basis @ basis.T / one.size
    np.testing.assert_allclose(gram, np.eye(90), atol=0.08)
    np.testing.assert_allclose(coef @ basis, one, atol=1e-3)


@pytest.mark.parametrize(("d", "shape", "first"), [(5, (7, 30), 0), (200, (3, 700), 130), (700, (5, 900), 2000), (70_000, (300, 600), 0)])
def test_the_fast_projection_is_the_plain_one_with_its_gradients(d: int, shape: tuple[int, int], first: int) -> None:
    """Products in pieces against the sums that folding takes; the gradient is the transpose, and passes through once more."""
    from weft.ops import fastfood

    rng = np.random.default_rng(d)
    cfg = fastfood.OP.config({"seed": 9, "stream": 3, "first": first, "scale": 0.5})
    coef, w, weight = (rng.normal(size=each) for each in (d, shape, shape))

    def plain(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.asarray(fastfood.OP.apply(w, {"coef": z}, cfg))

    z = torch.tensor(coef, requires_grad=True)
    out = fastfood.OP.apply(torch.tensor(w), {"coef": z}, cfg)
    np.testing.assert_allclose(out.detach().numpy(), plain(coef), rtol=1e-9, atol=1e-9)
    (grad,) = torch.autograd.grad((out * torch.tensor(weight)).sum(), z, create_graph=True)
    for k in rng.choice(d, 3, replace=False):
        one = np.zeros(d)
        one[k] = 1.0
        assert float(grad[k]) == pytest.approx(float(((plain(one) - w) * weight).sum()), rel=1e-7, abs=1e-7)
    if d < 100:
        assert torch.autograd.gradgradcheck(lambda each: fastfood.OP.apply(torch.tensor(w), {"coef": each}, cfg).square().sum(), (z,))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_corda_takes_what_the_context_uses_least_or_most(folders: dict[str, Path], kind: str) -> None:
    base = Base.open(folders[kind])
    model = base.model()
    found = methods.get("objective", "causal-lm")
    goal = found.run(make(found.config, {}, "objective"), base, base.tokenizer(), TEXTS)
    targets = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}[kind]
    taken: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for mode in ("knowledge", "instruction"):
        space, job = job_of(base, model, "corda", {"targets": targets, "rank": 4, "mode": mode, "damp": 1e-4}, goal)
        assert job.delta is not None
        detach(model)
        part = {p.target: p for p in job.parts(targets, kinds=("linear", "conv1d"))}
        inputs = space._moments({p.site.module: model.get_submodule(p.site.module) for p in part.values()})  # type: ignore[attr-defined]
        taken[mode] = {t: job.delta.get(f"{t}//0.B0") @ job.delta.get(f"{t}//0.A0") * 2.0 for t in part}
    for target in part:
        turn = (lambda x: x.T) if kind == "gpt2" else (lambda x: x)
        w = turn(base.tensor(target).read().astype(np.float64))
        c = inputs[part[target].site.module].numpy()
        c = c + 1e-4 * np.diag(c).mean() * np.eye(len(c))
        least, most = (float(np.linalg.norm(turn(taken[mode][target]) @ c)) for mode in ("knowledge", "instruction"))
        u, s, v = np.linalg.svd(w @ c)
        assert least == pytest.approx(float(np.linalg.norm(s[-4:])), rel=1e-3) and most == pytest.approx(float(np.linalg.norm(s[:4])), rel=1e-3)
        u, s, v = np.linalg.svd(w, full_matrices=False)
        assert least < 0.5 * float(np.linalg.norm((u[:, -4:] * s[-4:]) @ v[-4:] @ c)) < most


def test_corda_without_a_context_of_its_own_is_milora_and_pissa(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    for mode, chosen in (("knowledge", slice(-3, None)), ("instruction", slice(3))):
        cfg = make(methods.get("space", "corda").config, {"rank": 3, "mode": mode, "targets": ("q_proj",)}, "corda")
        model = base.model()
        space = methods.get("space", "corda").run(cfg, Job(base, model, NameMap.of(base, model), Generator(0)))
        for part in space.job.parts(("q_proj",)):
            b, a = space._factors(part, torch.eye(32, dtype=torch.float64))
            u, s, v = np.linalg.svd(base.tensor(part.target).read().astype(np.float64))
            np.testing.assert_allclose(b.double().numpy() @ a.double().numpy() * 8 / 3, (u[:, chosen] * s[chosen]) @ v[chosen], atol=1e-5)
    with pytest.raises(UsageError, match="no training data"):
        space.build(Builder(base))


def test_flora_keeps_the_axes_of_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(16 * 36, 5, bias=False))
    base = Base.of(model)
    _, job = job_of(base, model, "flora", {"targets": ("all",), "rank": 4, "kernel": 2, "scale": 0.5})
    assert job.delta is not None
    t = {field: job.delta.get(f"0.weight//0.{field}") for field in ("core", "U0", "U1", "U2", "U3")}
    assert [t["core"].shape, t["U0"].shape, t["U2"].shape] == [(4, 4, 2, 2), (16, 4), (3, 2)]
    flattened = 4 * (16 + 12 * 9)
    assert sum(value.size for value in t.values()) < flattened, "fewer than LoRA of this rank on the flattened kernel"
    gen = np.random.default_rng(0)
    core = gen.normal(size=t["core"].shape).astype(np.float32)
    cores = {"0.weight//0.core": held(core), "2.weight//0.core": held(np.eye(4, dtype=np.float32))}
    moved = Delta(job.delta.base, job.delta.entries, {**job.delta.tensors, **cores})
    w = gen.normal(size=(16, 12, 3, 3)).astype(np.float32)
    expected = w + 0.5 * np.einsum("abcd,ia,jb,kc,ld->ijkl", core, t["U0"], t["U1"], t["U2"], t["U3"])
    np.testing.assert_allclose(moved.apply("0.weight", w), expected, atol=1e-5)
    b, a = job.delta.get("2.weight//0.U0"), job.delta.get("2.weight//0.U1").T
    np.testing.assert_allclose(moved.apply("2.weight", np.zeros((5, 576), np.float32)), 0.5 * b @ a, atol=1e-5)
    detach(model)
