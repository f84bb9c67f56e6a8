"""Spaces that tune a smaller model than the one they are for, quantised or pruned; and one whose changes are written by a smaller network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests import tiny
from weft import evaluate, methods
from weft.attaching import attach, detach
from weft.base import Base
from weft.config import make
from weft.delta import Builder, Delta
from weft.engine.data import data_hash
from weft.engine.events import Event
from weft.engine.loop import Run
from weft.engine.permutations import by_tensor
from weft.engine.routed import of_task
from weft.engine.symmetries import symmetries
from weft.errors import UsageError
from weft.folding import fold
from weft.names import NameMap
from weft.ops import At, Generator
from weft.tuning import tune
from weft.tuning._positions import sensitivities
from weft.tuning.space import Job, Space
from weft.tuning.space._slim import cut
from weft.tuning.space.light_peft import LightPEFT
from weft.tuning.space.lq_lora import Form, cheapest, decoded, normal_float, quantised, split, stored_bits

TEXTS = [{"text": text, "task": "ab"[number % 2]} for number, text in enumerate(tiny.texts(16, seed=4))]
QUICK: dict[str, Any] = {"batch_size": 4, "steps": 8, "lr": 0.02, "threads": 1, "weight_decay": 0.1}
SPACES: dict[str, dict[str, Any]] = {
    "lq-lora": {"rank": 3, "budget": 3.5, "fisher": 4},
    "loram": {"rank": 3, "ratio": 0.5},
    "light-peft": {"rank": 4, "early": 0.5, "early_lr": 0.02},
    "polyhistor": {"rank": 3, "embedding": 4, "inner": 2},
}


def silent(event: Event) -> None:
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"llama": tiny.llama(root / "llama"), "gpt2": tiny.gpt2(root / "gpt2"), "bert": tiny.bert(root / "bert")}


def tuned(folder: Path | Base, name: str, **options: Any) -> Delta:
    return tune(folder, TEXTS, method=name, **{"progress": silent, **QUICK, **SPACES[name], **options})


def job_of(base: Base, name: str, options: Mapping[str, Any], rows: Any = TEXTS) -> tuple[Space, Job]:
    """A space and its run, with nothing built yet."""
    found, goal = methods.get("space", name), methods.get("objective", "causal-lm")
    model = base.model()
    job = Job(base, model, NameMap.of(base, model), Generator(3), goal=goal.run(make(goal.config, {}, "objective"), base, base.tokenizer(), rows))
    space: Space = found.run(make(found.config, dict(options), name), job)
    return space, job


# --- what every one keeps to


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", SPACES)
def test_an_interrupted_run_is_the_whole_one(folders: dict[str, Path], tmp_path: Path, name: str, kind: str) -> None:
    whole, out = tuned(folders[kind], name), tmp_path / "d.safetensors"
    assert tuned(folders[kind], name).id == whole.id

    def stop(event: Event) -> None:
        if event["event"] == "save":
            raise KeyboardInterrupt

    for at in (3, 5):
        with pytest.raises(KeyboardInterrupt):
            tuned(folders[kind], name, out=out, save_every=at, progress=stop)
        assert tuned(folders[kind], name, out=out, resume=f"{out}.state").id == whole.id
    assert Delta.load(out).id == whole.id


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", [name for name in SPACES if name != "polyhistor"])
def test_what_is_attached_is_what_is_folded(folders: dict[str, Path], name: str, kind: str, tmp_path: Path) -> None:
    base, ids = Base.open(folders[kind]), torch.arange(5, 17)[None]
    delta = tuned(base, name)
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


# --- lq-lora


def test_the_values_are_quantiles_of_the_normal_distribution() -> None:
    bitsandbytes = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
    bitsandbytes += [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    assert normal_float(4) == pytest.approx([*bitsandbytes, 0.7229568362236023, 1.0], abs=1e-6), "NF4's own"
    for bits in range(2, 9):
        table = normal_float(bits)
        assert len(set(table)) == 2**bits and table == sorted(table) and (table[0], table[-1]) == (-1.0, 1.0) and 0.0 in table


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_quantised_is_the_nearest_value_times_the_largest_of_the_block(dtype: str) -> None:
    w = torch.randn(24, 20, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, 24)[:, None]
    w.view(-1)[:16] = 0
    values, scales = quantised(w, w.shape, dtype, Form(3, 16))
    blocks, q = w.reshape(-1, 16), decoded(values, scales)
    top = blocks.abs().amax(1)
    scale = torch.from_numpy(scales.read())
    assert not q[0].any() and float((scale - top).abs().max()) < float(top.max()) / 250
    table = torch.tensor(normal_float(3))
    nearest = table[((blocks / scale.clamp_min(1e-9)[:, None])[..., None] - table).abs().argmin(-1)] * scale[:, None]
    torch.testing.assert_close(q, nearest, atol=0, rtol=0.0 if dtype == "F32" else 2**-8)
    assert 8 * (values.payload.nbytes + scales.payload.nbytes) == stored_bits(w.numel(), Form(3, 16))


def test_the_size_is_told_to_the_byte_for_large_matrices_too() -> None:
    w = torch.zeros(700, 300)
    for form in (Form(2, 4), Form(3, 16), Form(8, 100)):
        values, scales = quantised(w, w.shape, "F32", form)
        assert 8 * (values.payload.nbytes + scales.payload.nbytes) == stored_bits(w.numel(), form)


@pytest.mark.parametrize("form", [Form(2, 16), Form(3, 32), Form(4, 64)])
def test_the_split_is_nearer_than_quantising_at_the_same_bits(form: Form) -> None:
    gen = torch.Generator().manual_seed(1)
    w = torch.randn(96, 64, generator=gen)
    plain = float((w - decoded(*quantised(w, w.shape, "F32", form)).reshape(w.shape)).square().sum())
    one, many = (split(w, w.shape, "F32", form, 8, turns) for turns in (1, 100))
    assert many.error < 0.9 * one.error and one.error < 0.95 * plain
    left = w - decoded(many.values, many.scales).reshape(w.shape) - many.b @ many.a
    assert float(left.double().square().sum()) == pytest.approx(many.error, rel=1e-6)
    assert many.b.shape == (96, 8) and many.a.shape == (8, 64)
    afterwards = plain - float(torch.linalg.svdvals(w - decoded(*quantised(w, w.shape, "F32", form)).reshape(w.shape))[:8].square().sum())
    assert many.error < afterwards, "quantising first and making up for it once"


def test_weights_lower_the_weighted_error() -> None:
    gen = torch.Generator().manual_seed(2)
    w, rows, columns = (torch.randn(size, generator=gen) for size in ((48, 64), (48, 1), (1, 64)))
    fisher = (2 * rows).exp() * (2 * columns).exp() * torch.rand(48, 64, generator=gen)
    fisher[3] = 0
    form = Form(3, 32)

    def weighted(found: Any) -> float:
        left = w - decoded(found.values, found.scales).reshape(w.shape) - found.b @ found.a
        return float((fisher * left.square()).sum())

    plain, aware = split(w, w.shape, "F32", form, 6, 100), split(w, w.shape, "F32", form, 6, 100, fisher)
    assert weighted(aware) == pytest.approx(aware.error, rel=1e-5) and aware.error < 0.5 * weighted(plain)


def test_the_program_finds_the_best_choice_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        errors, sizes = rng.uniform(1, 10, (5, 4)).tolist(), rng.integers(10, 60, (5, 4)).tolist()
        for allowed in (100, 150, 200):
            if sum(min(row) for row in sizes) > allowed:
                continue
            every = np.stack(np.meshgrid(*[np.arange(4)] * 5, indexing="ij"), -1).reshape(-1, 5)
            size, error = (np.array(table)[np.arange(5), every].sum(1) for table in (sizes, errors))
            chosen = cheapest(errors, sizes, allowed)
            assert sum(row[k] for row, k in zip(sizes, chosen, strict=True)) <= allowed
            assert sum(row[k] for row, k in zip(errors, chosen, strict=True)) == pytest.approx(error[size <= allowed].min(), rel=1e-4)


@cache
def microcosm() -> Base:
    from weft.demo import edition

    return Base.open(edition("first"))


def built(base: Base, rows: Any = TEXTS, **options: Any) -> tuple[Delta, dict[str, Form]]:
    """LQ-LoRA's start: the delta, and the forms."""
    space, _ = job_of(base, "lq-lora", {"rank": 4, **options}, rows)
    build = Builder(base)
    space.build(build)
    delta = build.done()
    return delta, dict(zip(delta.entries, space.forms, strict=True))  # type: ignore[attr-defined]


def error(base: Base, delta: Delta, weights: Mapping[str, torch.Tensor] | None = None) -> float:
    """The sum of the squared errors of all targets, each entry with its weight."""
    total = 0.0
    for name in delta.entries:
        w = base.tensor(name).read()
        total += float((np.square(delta.apply(name, w) - w) * (1.0 if weights is None else weights[name].numpy())).sum())
    return total


def weights_of(base: Base, rows: Any, number: int, **options: Any) -> dict[str, torch.Tensor]:
    """Squared gradients of so many examples."""
    _, job = job_of(base, "lq-lora", options, rows)
    job.loop = msgspec.structs.replace(job.loop, batch_size=1)
    parts = job.matrices(options.get("targets", "all-linear"))
    return {part.target: value for part, value in zip(parts, sensitivities(job, parts, number), strict=True)}


def coded(delta: Delta) -> int:
    """Bits of what is quantised, as they lie in the file."""
    return 8 * sum(value.storage.nbytes for key, value in delta.tensors.items() if key.endswith(("//0.values", "//1.scale")))


@pytest.mark.slow
def test_the_budget_is_met_and_beats_uniform_bits(tmp_path: Path) -> None:
    from weft.demo.microcosm import files

    base, rows = microcosm(), files()["statements"][:40]
    options: dict[str, Any] = {"targets": ("attention",), "turns": 3, "fisher": 8, "rows": rows}
    weights = weights_of(base, rows, 8, targets=("attention",))
    uniform, forms = built(base, widths=(3,), blocks=(64,), budget=4.0, **options)
    size = sum(prod(base.tensor(name).shape) for name in uniform.entries)
    assert set(forms.values()) == {Form(3, 64)} and coded(uniform) == sum(stored_bits(prod(base.tensor(name).shape), Form(3, 64)) for name in forms)
    few: dict[str, Any] = {"widths": (2, 3, 4), "blocks": (32, 64), **options}
    free, forms = built(base, budget=coded(uniform) / size, **few)
    assert len(set(forms.values())) > 2 and coded(free) <= coded(uniform) and error(base, free, weights) < 0.9 * error(base, uniform, weights)
    free.save(tmp_path / "free.safetensors")
    factors = sum(4 * 4 * sum(base.tensor(name).shape) for name in free.entries)
    assert (tmp_path / "free.safetensors").stat().st_size < coded(free) / 8 + factors + 40_000 < 4 * size / 6
    small, _ = built(base, budget=2.2, **few)
    assert 0.97 * 2.2 * size < coded(small) <= 2.2 * size


def test_what_the_data_says_lowers_the_error_that_it_weights(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    weights = weights_of(base, TEXTS, 16)
    same: dict[str, Any] = {"rank": 3, "widths": (3,), "blocks": (32,), "budget": 9}
    assert error(base, built(base, fisher=16, **same)[0], weights) < 0.9 * error(base, built(base, **same)[0], weights)


def test_what_cannot_be_quantised_is_said(folders: dict[str, Path]) -> None:
    for options, said in (
        ({"budget": 2.0}, r"cannot be met: the least is 2\.\d+"),
        ({"blocks": (7,)}, "1,024 entries, which none of the blocks"),
        ({"widths": (1, 3)}, "widths are from 2 to 8 bits"),
    ):
        with pytest.raises(UsageError, match=said):
            tuned(folders["llama"], "lq-lora", **options)


def test_only_the_factors_are_trained_and_the_rest_stays_coded(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    start, _ = built(base, rank=3, budget=3.5)
    delta = tuned(base, "lq-lora", fisher=0)
    assert delta.notes["parameters"] == sum(3 * sum(base.tensor(name).shape) for name in delta.entries)
    for key, value in delta.tensors.items():
        if key.endswith((".A", ".B")):
            assert not np.array_equal(value.read(), start.tensors[key].read())
        else:
            assert value.coding == start.tensors[key].coding and value.sha256 == start.tensors[key].sha256


@pytest.mark.slow
def test_lq_lora_beats_quantising_before_lora_at_the_same_bits() -> None:
    """2.3 bits for each entry, scales included, and the same rank; the quantised part has the same bits and blocks, matrix by matrix."""
    base = microcosm()
    from weft.demo.microcosm import files

    rows = files()["statements"][:300]

    def trained(**options: Any) -> tuple[Delta, float]:
        losses: list[float] = []

        def heard(event: Event) -> None:
            if event["event"] == "step":
                losses.append(event["loss"])

        delta = tune(base, rows, steps=40, batch_size=16, threads=1, lr=2e-3, rank=8, progress=heard, **options)
        return delta, float(np.mean(losses[-10:]))

    ours, loss = trained(method="lq-lora", budget=2.3, turns=20)
    build = Builder(base)
    for name in ours.entries:
        table, scales = ours.tensors[f"{name}//0.values"].coding["cfg"]["table"], ours.tensors[f"{name}//1.scale"].shape[0]  # type: ignore[index]
        w = torch.from_numpy(base.tensor(name).read().copy())
        values, scale = quantised(w, w.shape, "F32", Form(len(table).bit_length() - 1, w.numel() // scales))
        build.put(name, "assign", {"values": values})
        build.put(name, "scale_shift", {"scale": scale}, at=At(reshape=(scales, w.numel() // scales)))
    _, theirs = trained(method="lora", alpha=8, on=[build.done()])
    assert loss < 0.5 * theirs


# --- loram


def heads_and_units(base: Base) -> list[Any]:
    return [group for group in symmetries(base) if group.name.endswith(("heads", "mlp"))]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_what_is_cut_out_computes_what_is_masked(folders: dict[str, Path], kind: str) -> None:
    """Heads and hidden units at random, as many in each layer as it happens; grouped queries go with their keys."""
    base, ids = Base.open(folders[kind]), torch.arange(5, 17)[None]
    rng = np.random.default_rng(0)
    groups = heads_and_units(base)
    assert len(groups) == 4
    keep = {group.name: np.sort(rng.permutation(group.size)[: rng.integers(1, group.size)]) for group in groups}
    masked, model = base.model(), base.model()
    live = masked.state_dict(keep_vars=True)
    for group in groups:
        gone = np.setdiff1d(np.arange(group.size), keep[group.name])
        place = next(place for place in group.places if place.tensor.endswith(LEAVING))
        many = group.parts if place.by_part else 1
        wide = live[place.tensor].data.movedim(place.axis, 0).view(group.size, many * place.width, -1)
        wide[torch.from_numpy(gone)] = 0
    before = sum(value.numel() for value in model.parameters())
    cuts = cut(job_on(base, model), keep)
    after = sum(value.numel() for value in model.parameters())
    gone_entries = sum(prod(base.tensor(name).shape) - prod(model.state_dict()[name].shape) for name in cuts)
    assert after == before - gone_entries < 0.9 * before
    with torch.no_grad():
        expected, got = masked(input_ids=ids)[0], model(input_ids=ids)[0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert float((base.model()(input_ids=ids)[0] - expected).abs().max()) > 1e-2


LEAVING = ("o_proj.weight", "down_proj.weight", "c_proj.weight", "output.dense.weight")


class Outputs:
    """An objective whose loss is made of all that the model puts out."""

    examples = tuple({"input_ids": [k]} for k in range(4))

    def collate(self, examples: Any, keys: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(5, 17)[None]}

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        return model(**batch)[0].square().mean()


def job_on(base: Base, model: Any) -> Job:
    goal: Any = Outputs()
    return Job(base, model, NameMap.of(base, model), Generator(0), goal=goal)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("prune", ["size", "random"])
def test_factors_are_recovered_with_zeros_where_units_were_pruned(folders: dict[str, Path], kind: str, prune: str) -> None:
    base = Base.open(folders[kind])
    seen: dict[str, np.ndarray[Any, Any]] = {}
    entries: list[int] = []

    def last(run: Run) -> dict[str, float]:
        seen.update({name: value.detach().numpy().copy() for name, value in run.tensors.items()})
        entries.append(sum(value.numel() for name, value in run.model.named_parameters() if "delta" not in name))
        return {}

    delta = tuned(base, "loram", prune=prune, evaluate=last, evaluate_every=QUICK["steps"])
    groups = by_tensor(heads_and_units(base))
    cut_away = 0
    for name in delta.entries:
        axes: dict[int, int] = {}
        for group, place in groups[name]:
            axes[place.axis] = axes.get(place.axis, 0) + group.count(place) // 2 * place.width
        whole = base.tensor(name).shape
        for field, axis in (("B", 0), ("A", 1)):
            value, small = delta.get(f"{name}//0.{field}"), seen[f"{name}//{field}"]
            left = np.flatnonzero(value.any(1 - axis))
            assert value.shape[axis] == whole[axis] and len(left) == small.shape[axis] == axes.get(axis, whole[axis])
            assert np.array_equal(value.take(left, axis), small)
        cut_away += prod(whole) - prod(axes.get(axis, whole[axis]) for axis in (0, 1))
    biases = sum(group.count(place) // 2 * place.width for name, places in groups.items() if name.endswith(".bias") for group, place in places)
    assert entries == [sum(value.numel() for value in base.model().parameters()) - cut_away - biases], "nothing of the whole model is left in memory"
    assert delta.notes["parameters"] == sum(value.size for value in seen.values())


def test_the_smallest_units_go(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    delta = tuned(base, "loram", ratio=0.25, steps=1)
    for layer in (0, 1):
        path = f"model.layers.{layer}.mlp."
        size = sum(np.square(base.tensor(f"{path}{name}.weight").read().astype(np.float64)).sum(1) for name in ("gate_proj", "up_proj"))
        size = size + np.square(base.tensor(f"{path}down_proj.weight").read().astype(np.float64)).sum(0)
        gone = np.flatnonzero(~delta.get(f"{path}down_proj.weight//0.A").any(0))
        assert gone.tolist() == np.sort(np.argsort(size)[:12]).tolist()
    spared = tuned(folders["llama"], "loram", ratio=0.25, steps=1, spare=1)
    assert all(spared.get(f"{name}//0.A").any(0).all() for name in spared.entries), "two layers, both spared"


def test_unstructured_pruning_empties_the_smallest_entries_and_keeps_whole_factors(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    shares: list[float] = []

    def count(run: Run) -> dict[str, float]:
        w = run.model.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr, index]
        start = base.tensor("model.layers.0.mlp.up_proj.weight").read()
        shares.append(float((w == 0).float().mean()))
        assert np.abs(start[w.detach().numpy() == 0]).max() <= np.abs(start[w.detach().numpy() != 0]).min()
        return {}

    delta = tuned(base, "loram", prune="unstructured", ratio=0.6, evaluate=count, evaluate_every=QUICK["steps"])
    assert shares == [pytest.approx(0.6, abs=1e-3)]
    assert all(delta.get(key).any(0).all() and delta.get(key).any(1).all() for key in delta.tensors)


def test_where_nothing_can_be_pruned_it_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    base = Base.open(folders["llama"])
    with pytest.raises(UsageError, match="must be a checkpoint"):
        tuned(Base.of(base.model()), "loram", tokenizer=base.tokenizer())
    with pytest.raises(UsageError, match="no delta may be under this one"):
        tuned(base, "loram", on=[Delta.load(tiny.lowrank(folders["llama"], tmp_path / "d.safetensors"))])
    with pytest.raises(UsageError, match="to align takes steps and text"):
        tuned(base, "loram", align=3)


def test_a_head_is_trained_on_the_pruned_model_and_written(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{**row, "label": tiny.LABELS[k % 3]} for k, row in enumerate(TEXTS)]
    delta = tune(folders["bert"], rows, method="loram", objective="classification", ratio=0.5, rank=3, progress=silent, **QUICK)
    base = Base.open(folders["bert"])
    assert delta.entries["classifier.weight"].shape == (3, 32) and delta.get("classifier.bias//0.values").any()
    model = base.model([delta])
    attach(model, delta, base=base)
    with torch.no_grad():
        assert model(input_ids=torch.arange(5, 17)[None]).logits.shape == (1, 3)


@pytest.mark.slow
def test_loram_serves_the_whole_model_and_better_after_alignment(tmp_path: Path) -> None:
    """A task that the base cannot do, learnt on half of the heads and hidden units, is done by the whole model; text that brings back
    what was pruned leaves the factors to the task."""
    from weft.demo.microcosm import files

    base, asked = microcosm(), files()["judge.test"][:100]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": row["text"]}) for row in files()["corpus"][:1000]))
    how: dict[str, Any] = {"method": "loram", "ratio": 0.5, "steps": 60, "batch_size": 8, "threads": 1, "lr": 2e-3, "progress": silent}
    plain = tune(base, files()["judge.train"][:600], **how)
    aligned = tune(base, files()["judge.train"][:600], align=60, align_lr=1e-3, align_data=str(text), **how)
    before, one, two = (evaluate(base, deltas, asked, batch_size=50)["metrics"]["nll"] for deltas in ([], [plain], [aligned]))
    assert two < 0.8 * one and one < 0.3 * before


@pytest.mark.parametrize(("name", "option", "more"), [("loram", "align_data", {"align": 1}), ("corda", "context", {})])
def test_the_recipe_has_the_hash_of_a_file_and_not_its_place(folders: dict[str, Path], tmp_path: Path, name: str, option: str, more: dict[str, Any]) -> None:
    rows = [{"text": text} for text in tiny.texts(8)]
    how: dict[str, Any] = {"method": name, "steps": 2, "batch_size": 4, "threads": 1, "progress": silent, **more}
    found = []
    for place, count in (("a", 8), ("b", 8), ("c", 7)):
        path = tmp_path / f"{place}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows[:count]))
        found.append(tune(folders["llama"], rows, **how, **{option: str(path)}))
    assert found[0].id == found[1].id and found[0].recipe["config"]["space"][option] == data_hash(rows[:8])
    assert found[2].recipe["config"]["space"][option] == data_hash(rows[:7])


# --- light-peft


def shares(size: int, gone: float) -> int:
    return max(1, size - round(gone * size))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_shares_are_met_and_the_pruned_model_computes_what_the_delta_says(folders: dict[str, Path], kind: str) -> None:
    base, ids = Base.open(folders[kind]), torch.arange(5, 17)[None]
    seen: list[Any] = []

    def last(run: Run) -> dict[str, float]:
        with torch.no_grad():
            size = sum(value.numel() for name, value in run.model.named_parameters() if "delta" not in name)
            seen.append((run.model(input_ids=ids).logits, size, sum(value.numel() for value in run.tensors.values())))
        return {}

    options: dict[str, Any] = {"heads": 0.5, "units": 0.25, "modules": 0.4, "ranks": 0.5, "rank": 4}
    delta = tuned(base, "light-peft", evaluate=last, evaluate_every=QUICK["steps"], **options)
    ((logits, size, trained),) = seen
    cut_away = 0
    for group in heads_and_units(base):
        kept = shares(group.size, options["heads" if group.name.endswith("heads") else "units"])
        place = next(place for place in group.places if place.tensor.endswith(LEAVING))
        (mask,) = (op for op in delta.entries[place.tensor].ops if op.op == "scale_shift")
        ones = delta.get(mask.t["scale"].key).reshape(group.size, -1)
        assert (ones == ones[:, :1]).all() and set(np.unique(ones)) == {0, 1} and ones[:, 0].sum() == kept
        for each in group.places:
            other = prod(base.tensor(each.tensor).shape) // base.tensor(each.tensor).shape[each.axis]
            cut_away += (group.count(each) - kept * group.count(each) // group.size) * each.width * other
    assert size == sum(value.numel() for value in base.model().parameters()) - cut_away
    factors = [op for entry in delta.entries.values() for op in entry.ops if op.op == "lowrank"]
    assert len(factors) == shares({"llama": 14, "gpt2": 8}[kind], 0.4)
    assert all(delta.tensors[op.t["A"].key].shape[0] == 2 for op in factors) and trained == delta.notes["parameters"]
    model = base.model()
    with torch.no_grad():
        attach(model, delta, base=base)
        torch.testing.assert_close(model(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_the_components_that_count_are_kept_as_they_were(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing else pruned, the run starts from the early steps' factors: those of the components with the largest |p dL/dp|."""
    base = Base.open(folders["llama"])
    space, job = job_of(base, "light-peft", {"rank": 4, "heads": 0, "units": 0, "modules": 0, "early": 1.0, "early_lr": 0.02})
    job.loop = msgspec.structs.replace(job.loop, steps=6, batch_size=4)
    found: list[Any] = []
    estimated = space._estimated  # type: ignore[attr-defined]

    def spy(parts: Any) -> Any:
        found.append(estimated(parts))
        return found[-1]

    monkeypatch.setattr(space, "_estimated", spy)
    space.build(Builder(base))
    learnt = space._learnt  # type: ignore[attr-defined]
    for number, (pair, b, a) in enumerate(space._trained()):  # type: ignore[attr-defined]
        best = np.sort(np.argsort(-found[0].ranks[number].numpy(), kind="stable")[:2])
        whole_b, whole_a = learnt[pair.part.target]
        assert torch.equal(b, whole_b[:, best]) and torch.equal(a, whole_a[best]) and bool(b.any())
    assert all(float(ratio) > 0 for ratio in found[0].ratios)
    assert all((mask != 1).all() for mask in found[0].masks.values()), "trained"


@pytest.mark.slow
def test_masks_are_found_early_and_better_than_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all heads and hidden units: those found in a quarter of the run are mostly those found in half of it, and to prune them costs
    less than to prune as many at random."""
    from weft.demo.microcosm import files

    base, found = microcosm(), list[dict[str, Any]]()
    chosen = LightPEFT.chosen

    def watched(self: LightPEFT, parts: Any) -> Any:
        found.append(dict(chosen(self, parts)))
        return found[-1]

    def at_random(self: LightPEFT, parts: Any) -> Any:
        rng = np.random.default_rng(0)
        return {name: np.sort(rng.permutation(2 * len(index))[: len(index)]) for name, index in chosen(self, parts).items()}

    def loss(how: Any, early: float) -> float:
        monkeypatch.setattr(LightPEFT, "chosen", how)
        options: dict[str, Any] = {"steps": 60, "batch_size": 8, "threads": 1, "lr": 2e-3, "early": early, "early_lr": 3e-3, "progress": silent}
        delta = tune(base, files()["style.train"][:600], method="light-peft", **options)
        return float(evaluate(base, [delta], files()["style.test"][:100], batch_size=50)["metrics"]["nll"])

    quarter, half, chance = loss(watched, 0.25), loss(watched, 0.5), loss(at_random, 0.25)
    assert max(quarter, half) < 0.9 * chance
    one, two = found
    same = [len(np.intersect1d(one[name], two[name])) / len(one[name]) for name in one]
    assert np.mean(same) > 0.8, "0.5 would be chance"


# --- polyhistor


def attached(base: Base, **options: Any) -> tuple[Any, Job]:
    space, job = job_of(base, "polyhistor", options)
    build = Builder(base)
    space.build(build)
    job.delta = build.done()
    job.handle = attach(job.model, job.delta, base=base, trainable=True, names=job.names)
    with torch.no_grad():
        for value in space.tensors().values():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    return space, job


class OneProcess:
    num_processes = 1


def test_kernels_expand_the_templates_of_their_kind_to_every_width(folders: dict[str, Path]) -> None:
    """Queries 32 to 32, keys 32 to 16, MLPs 32 to 48 and back: the greatest width that divides all is 16."""
    base = Base.open(folders["llama"])
    space, job = attached(base, rank=3, embedding=4, inner=2)
    net = {name: value.detach().numpy() for name, value in space.network.items()}
    shapes = set()
    for number, module in enumerate(space._modules):
        kind = module.path.replace(".0.", ".N.").replace(".1.", ".N.")
        a, b = (space.written(module, field).detach().numpy() for field in "AB")
        shapes.add(module.shape)
        for task in (0, 1):
            first, second = (np.tensordot(net["z"][task], net[f"{name}.{kind}"], 1) for name in "PQ")
            np.testing.assert_allclose(a[task], np.kron(net[f"k.{number}"][None], first @ second), atol=1e-5)
            first, second = (np.tensordot(net["z"][task], net[f"{name}.{kind}"], 1) for name in "RS")
            np.testing.assert_allclose(b[task], np.kron(net[f"h.{number}"][:, None], first @ second), atol=1e-5)
        assert (a.shape, b.shape) == ((2, 3, module.shape[1]), (2, module.shape[0], 3))
    assert shapes == {(32, 32), (16, 32), (48, 32), (32, 48)}
    detach(job.model)


def test_gradients_reach_the_network(folders: dict[str, Path]) -> None:
    """What the hooks pass on is what autograd gives where the written factors stand in the model themselves."""
    space, job = attached(Base.open(folders["llama"]), rank=3, embedding=4, inner=2)
    run: Any = type("AnyRun", (), {"accelerator": OneProcess()})()
    assert job.goal is not None
    batch = job.goal.collate(job.goal.examples[:8], range(8))
    job.model.requires_grad_(False)
    for value in space.network.values():
        value.requires_grad_(True)
    space.start(run)
    for _ in range(2):  # gradients add up, as those of other tensors do
        job.goal.loss(job.model, batch).backward()  # type: ignore[no-untyped-call]
    assert all(value.grad is None for _, _, value in space._places())
    names = {id(value): name for name, value in job.model.named_parameters()}
    written = {names[id(value)]: space.written(module, field) for module, field, value in space._places()}

    def model(**inputs: Any) -> Any:
        return torch.func.functional_call(job.model, written, (), inputs)

    expected = torch.autograd.grad(job.goal.loss(model, batch), list(space.network.values()))  # type: ignore[arg-type]
    for (name, value), slope in zip(space.network.items(), expected, strict=True):
        assert bool(slope.any()), name
        torch.testing.assert_close(value.grad, 2 * slope, atol=1e-4, rtol=1e-3)
    space.close(run)
    detach(job.model)


def test_a_task_more_costs_an_embedding(folders: dict[str, Path], tmp_path: Path) -> None:
    base = Base.open(folders["gpt2"])

    def made(tasks: int) -> Delta:
        rows = [{"text": row["text"], "task": f"t{number % tasks}"} for number, row in enumerate(TEXTS)]
        return tune(base, rows, method="polyhistor", embedding=5, inner=2, rank=3, progress=silent, **{**QUICK, "steps": 2})

    few, many = made(2), made(8)
    count = 2 * 5 + 4 * 2 * 5 * 2 * (3 + 16) + 2 * sum(sum(shape) // 16 for shape in ((96, 32), (32, 32), (48, 32), (32, 48)))
    assert few.notes["parameters"] == count and many.notes["parameters"] == count + 6 * 5
    one = of_task(few, base, "t1")
    assert one.foldable and len(one.entries) == 8
    fold(base, [one], tmp_path / "folded")


@pytest.mark.slow
def test_polyhistor_tells_tasks_apart_that_share_their_questions(folders: dict[str, Path]) -> None:
    """Four tasks answer the same questions, two of them always alike and two against each other. LoRA, with as many numbers, cannot do better
    than half of the answers; apart LoRAs of this rank would take more numbers."""
    answers = {"plain": "good bad", "contrary": "bad good", "kind": "good good", "harsh": "bad bad"}
    rows = [
        {"prompt": f"what is the {word}", "completion": f" {said.split()[number % 2]}", "task": task}
        for task, said in answers.items()
        for number, word in enumerate(tiny.WORDS[:12])
    ]
    how: dict[str, Any] = {"steps": 100, "batch_size": 16, "threads": 1, "progress": silent, "lr": 1e-3}
    ours = tune(folders["llama"], rows, method="polyhistor", **how)
    theirs = tune(folders["llama"], rows, method="lora", rank=24, **how)
    each = tune(folders["llama"], rows[:4], method="lora", rank=8, **{**how, "steps": 1}).notes["parameters"]
    assert ours.notes["parameters"] < min(theirs.notes["parameters"], 4 * each)
    assert ours.notes["loss"] < 0.5 * theirs.notes["loss"]
