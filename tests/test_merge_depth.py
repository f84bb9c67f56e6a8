"""Options and weights that vary over depth: against slow references with a number for each layer, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weft
from tests import merging_tasks, tiny
from tests.test_merge import close, lora, product, same, slow_sum, values_of, wide, write_checkpoint
from tests.test_merge_dare import rate, slow_masked
from tests.test_merge_pcb_merging import whole as slow_pcb
from tests.test_merge_slerp import reference as slow_slerp
from weft.base import Base
from weft.cli import main
from weft.delta import Builder, Delta
from weft.errors import UsageError
from weft.merging import join
from weft.merging._depth import Depth, _between, before_layers, layer

Values = dict[str, np.ndarray]
BF16 = ml_dtypes.bfloat16
LAYERS = 5
SHAPES: dict[str, tuple[tuple[int, ...], Any]] = {
    "model.embed_tokens.weight": ((7, 6), np.float32),
    "model.norm.weight": ((6,), BF16),
    "lm_head.weight": ((7, 6), np.float32),
}
for _k in range(LAYERS):
    SHAPES |= {f"model.layers.{_k}.attn.q.weight": ((5, 6), (BF16, np.float32)[_k % 2]), f"model.layers.{_k}.norm.weight": ((6,), BF16)}
    SHAPES |= {f"model.layers.{_k}.gate": ((), np.float64)}


def place_of(name: str) -> int:
    """The layer whose number a tensor has."""
    return int(name.split(".")[2]) if ".layers." in name else 0 if "embed" in name else LAYERS - 1


def spread(first: float, middle: float, last: float) -> list[float]:
    """Three numbers over five layers; powers of two between them make this exact."""
    return [first, (first + middle) / 2, middle, (middle + last) / 2, last]


def layered(slow: Callable[[list[Values], int], Values], taus: list[Values]) -> Values:
    """A slow reference tensor by tensor, each with the numbers of its layer."""
    return {name: slow([{name: tau[name]} for tau in taus], place_of(name))[name] for name in taus[0]}


def made(folder: Path, draw: Callable[[tuple[int, ...], float], Any]) -> Any:
    """A base of five layers, its tensors, the increments of three checkpoints, and those; `draw` gives numbers of a shape and size."""
    start = {name: np.asarray(draw(shape, 1.0)).astype(dtype) for name, (shape, dtype) in SHAPES.items()}
    tuned = [{name: (w.astype(np.float64) + draw(w.shape, 0.5)).astype(w.dtype) for name, w in start.items()} for _ in range(3)]
    taus = [{name: np.asarray(wide(values[name]) - wide(start[name])) for name in sorted(start)} for values in tuned]
    ckpts = [write_checkpoint(folder / f"tuned{k}", values, shards=k + 1) for k, values in enumerate(tuned)]
    return write_checkpoint(folder / "base", start, shards=2), start, taus, ckpts


@pytest.fixture
def family(tmp_path: Path) -> Any:
    rng = np.random.default_rng(5)
    return made(tmp_path, lambda shape, size: size * rng.standard_normal(shape))


@pytest.fixture
def coarse(tmp_path: Path) -> Any:
    """Increments of small whole numbers, which often cancel each other."""
    rng = np.random.default_rng(6)
    (tmp_path / "coarse").mkdir()
    return made(tmp_path / "coarse", lambda shape, size: rng.integers(-round(4 * size), round(4 * size) + 1, shape).astype(np.float64))


def both_ways(ckpts: Sequence[Any], base: Base, method: str, want: Values, check: Any = same, **options: Any) -> None:
    """A merge is what is wanted, whatever the blocks and threads."""
    for threads, block in ((1, 10**6), (3, 7)):
        check(values_of(weft.merge(ckpts, base, method, threads=threads, block=block, **options)), want)


# --- against slow references


def test_weights_over_depth(family: Any) -> None:
    base, _, taus, ckpts = family
    first, third = spread(0.25, 1.0, -0.5), spread(1.0, 0.5, 0.0)
    want = layered(lambda some, k: slow_sum(some, [first[k], 0.75, third[k]]), taus)
    both_ways(ckpts, base, "linear", want, weights=[[0.25, 1.0, -0.5], 0.75, (1.0, 0.5, 0.0)])


def test_normalised_weights_are_normalised_in_each_layer(family: Any) -> None:
    base, _, taus, ckpts = family
    first = spread(1.0, 2.0, 4.0)
    want = layered(lambda some, k: slow_sum(some, [w / (first[k] + 1.5) for w in (first[k], 1.0, 0.5)]), taus)
    both_ways(ckpts, base, "linear", want, weights=[[1.0, 2.0, 4.0], 1.0, 0.5], normalize=True)


def test_scale_and_weights_together(family: Any) -> None:
    base, _, taus, ckpts = family
    scale, weight = spread(0.25, 0.5, 1.0), spread(1.0, 0.0, -1.0)
    want = layered(lambda some, k: slow_sum(some, [scale[k], scale[k] * weight[k], scale[k] * 2]), taus)
    both_ways(ckpts, base, "task-arithmetic", want, scale=[0.25, 0.5, 1.0], weights=[1, [1.0, -1.0], 2])


@pytest.mark.parametrize("space", ["weights", "increments"])
def test_slerp(family: Any, space: str) -> None:
    base, start, taus, ckpts = family
    t = spread(0.0, 0.25, 1.0)
    want = layered(lambda some, k: slow_slerp(start, some, t[k], space), taus[:2])
    both_ways(ckpts[:2], base, "slerp", want, close, t=[0.0, 0.25, 1.0], space=space)
    ends = {name: taus[0][name] if place_of(name) == 0 else taus[1][name] for name in want if place_of(name) in (0, LAYERS - 1)}
    got = values_of(weft.merge(ckpts[:2], base, "slerp", t=[0.0, 0.25, 1.0], space=space))
    same({name: got[name] for name in ends}, ends)


def slow_ties(taus: list[Values], density: list[float], scale: list[float], weights: list[list[float]], weighted: bool) -> Values:
    """`trim=tensor` with numbers for each layer; one majority for the whole model."""
    trimmed: dict[str, list[list[Any]]] = {}
    mass: dict[str, list[Any]] = {}
    for name in taus[0]:
        k = place_of(name)
        kept = []
        for tau in taus:
            flat = tau[name].reshape(-1)
            h = sorted((abs(np.float32(v)) for v in flat), reverse=True)[max(1, int(density[k] * flat.size)) - 1]
            kept.append([v if abs(np.float32(v)) >= h else v.dtype.type(0) for v in flat])
        trimmed[name] = kept
        kind = taus[0][name].dtype.type
        mass[name] = []
        for entries in zip(*kept, strict=True):
            total = kind(0)
            for v, w in zip(entries, weights[k], strict=True):
                total += kind(w) * v if weighted else v
            mass[name].append(total)
    majority = sum(float(np.sign(m)) for each in mass.values() for m in each) > 0
    out = {}
    for name, tau in taus[0].items():
        k, flat, kind = place_of(name), [], tau.dtype.type
        for j, m in enumerate(mass[name]):
            sign = np.sign(m) or (1 if majority else -1)
            total = count = kind(0)
            for v, w in zip((each[j] for each in trimmed[name]), weights[k], strict=True):
                vote = v * np.sign(w) if weighted else v
                if vote * sign > 0:
                    total, count = total + kind(scale[k] * w) * v, count + kind(1)
            flat.append(total / (count or kind(1)))
        out[name] = np.array(flat, tau.dtype).reshape(tau.shape)
    return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["family", "coarse"])
def test_ties_by_tensor(request: Any, kind: str, weighted: bool) -> None:
    base, _, taus, ckpts = request.getfixturevalue(kind)
    numbers: dict[str, Any] = {"density": [0.25, 0.5, 1.0], "scale": [1.0, 0.5, 2.0]}
    second = spread(1.0, -0.5, 2.0)
    want = slow_ties(taus, *(spread(*each) for each in numbers.values()), [[1.0, w, 0.5] for w in second], weighted)
    both_ways(ckpts, base, "ties", want, trim="tensor", weights=[1, [1.0, -0.5, 2.0], 0.5], elect_weighted=weighted, **numbers)


def test_ties_over_the_whole_model_takes_scales(family: Any) -> None:
    base, _, _, ckpts = family
    scale = spread(0.25, 1.0, 0.5)
    each = [values_of(weft.merge(ckpts, base, "ties", scale=number)) for number in scale]
    both_ways(ckpts, base, "ties", {name: each[place_of(name)][name] for name in each[0]}, scale=[0.25, 1.0, 0.5])


def test_the_majority_counts_votes_as_each_layer_has_them(tmp_path: Path) -> None:
    """Where models cancel exactly, the sign is that of more entries of the whole model; here most are in the second layer."""
    first, rest = np.array([[1.0, 2.0]], np.float32), np.full((20, 3), 1.0, np.float32)
    base = write_checkpoint(tmp_path / "base", {f"layers.{k}.a.weight": np.zeros_like(w) for k, w in enumerate((first, rest))})
    both = [{"layers.0.a.weight": first * [sign, 1], "layers.1.a.weight": rest} for sign in (1, -1)]
    ckpts = [write_checkpoint(tmp_path / f"t{k}", {name: w.astype(np.float32) for name, w in values.items()}) for k, values in enumerate(both)]

    def cancelled(method: str, **options: Any) -> float:
        return float(values_of(weft.merge(ckpts, base, method, **options))["layers.0.a.weight"][0, 0])

    ties: dict[str, Any] = {"density": 1.0, "elect_weighted": True}
    assert (cancelled("ties", **ties), cancelled("ties", **ties, weights=[[1, -1], [1, -1]])) == (1, -1)
    for w in both:
        w["layers.1.a.weight"] = -rest
    ckpts = [write_checkpoint(tmp_path / f"m{k}", {name: w.astype(np.float32) for name, w in values.items()}) for k, values in enumerate(both)]
    assert (cancelled("dare", signs="mass", drop=0), cancelled("dare", signs="mass", drop=[0, 0.9999])) == (-1, 1)


def test_opcm_is_as_long_as_its_models(family: Any) -> None:
    base, _, taus, ckpts = family
    merged = weft.merge(ckpts, base, "opcm", alpha=[0.0, 0.5, 1.0])
    (scale,) = {entry.ops[0].cfg["scale"] for entry in merged.entries.values()}

    def length(values: Values) -> float:
        return float(np.sqrt(sum(np.square(each.astype(np.float64)).sum() for each in values.values())))

    assert scale * length(values_of(merged)) == pytest.approx(np.mean([length(tau) for tau in taus]), rel=1e-9)


def test_dare(family: Any) -> None:
    base, _, taus, ckpts = family
    drop, scale = spread(0.0, 0.25, 0.75), spread(1.0, 0.5, 2.0)
    want = layered(lambda some, k: slow_sum(slow_masked(some, drop[k], 3), [scale[k] / (1 - rate(drop[k])) * w for w in (1, -2, 0.5)]), taus)
    both_ways(ckpts, base, "dare", want, drop=[0.0, 0.25, 0.75], scale=[1.0, 0.5, 2.0], weights=[1, -2, 0.5], seed=3)


def test_pcb_scales(family: Any) -> None:
    base, _, taus, ckpts = family
    scale = spread(1.0, 0.5, 0.25)
    each = [slow_pcb(taus, scale=number) for number in scale]
    both_ways(ckpts, base, "pcb-merging", {name: each[place_of(name)][name] for name in taus[0]}, close, scale=[1.0, 0.5, 0.25])


# --- every option that may vary: each layer has what its own numbers make of it


VARIED: dict[str, list[dict[str, Any]]] = {
    "linear": [{"weights": [[0.5, 1.0], 0.25]}],
    "task-arithmetic": [{"scale": [0.5, 1.0]}, {"weights": [[0.5, 1.0], [1.0, -1.0]]}],
    "slerp": [{"t": [0.25, 0.75]}, {"t": [0.0, 0.5], "space": "increments"}],
    "ties": [{"scale": [0.5, 1.0]}, {"density": [0.25, 0.5], "trim": "tensor"}, {"weights": [1, [1.0, 0.5]], "normalize": True}],
    "dare": [{"drop": [0.25, 0.5]}, {"drop": [0.25, 0.5], "signs": "mass"}, {"scale": [0.5, 1.0], "signs": "count"}, {"weights": [[1, 2], 1]}],
    "darex-q": [
        {"q": [0.5, 0.25], "drop": [0.75, 0.5]},
        {"scale": [0.5, 1.0], "q": 0.5},
        {"eta": [0.05, 1.0], "find": "analytic", "data": ...},
        {"drop": [0.5, 0.75], "eta": 0.1, "find": "analytic", "data": ...},
    ],
    "model-breadcrumbs": [{"density": [0.25, 0.5], "top": [0.0, 0.25]}, {"scale": [0.5, 1.0]}],
    "pcb-merging": [{"scale": [0.5, 1.0]}, {"weights": [[0.5, 1.0], 1.0]}],
    "opcm": [{"alpha": [0.25, 1.0]}],
    "fisher": [{"floor": [1e-6, 1.0], "data": ...}, {"weights": [[1.0, 4.0], 1.0], "data": ...}],
    "regmean": [{"shrink": [0.0, 1.0], "data": ...}, {"jitter": [1e-6, 1.0], "data": ...}, {"weights": [[1.0, 4.0], 1.0], "data": ...}],
    "atlas": [{"start": [0.25, 1.0], "steps": 0, "data": ...}],
    "scalearn": [{"start": [0.25, 1.0], "steps": 0, "data": ...}],
    "weight-matching": [{"weights": [[0.25, 1.0], 0.5]}],
    "pleas": [{"ridge": [1e-4, 1.0], "data": ...}, {"weights": [[0.25, 0.75]], "data": ...}],
}


def test_every_option_that_may_vary_is_tried() -> None:
    for record in weft.methods.catalogue("merge"):
        tried = {name for options in VARIED.get(record["name"], []) for name, value in options.items() if isinstance(value, list)}
        assert set(record["varies"]) <= tried, record["name"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> merging_tasks.Family:
    """Two updates of a Llama of two layers, whose head is stored and is no copy of the embeddings; in float32, without cancellations."""
    folder = tmp_path_factory.mktemp("llama")
    base = Base.open(tiny.llama(folder / "base"))
    names = ("q_proj.weight", "down_proj.weight", "embed_tokens.weight", "norm.weight", "lm_head.weight")
    return merging_tasks.Family(base, [merging_tasks.updated(base, seed, names) for seed in (1, 2)], [[{"text": "the river is"}, {"text": "a good film"}]] * 2)


def dense(delta: Delta) -> Values:
    """What each entry adds, without a factor on all of them; opcm's belongs to the whole model."""
    return {name: delta.get(entry.ops[0].t["values"].key) * delta_scale(delta, name) for name, entry in delta.entries.items()}


def delta_scale(delta: Delta, name: str) -> np.float32:
    cfg = delta.entries[name].ops[0].cfg
    return np.float32(1 if delta.recipe["method"] == "opcm" else cfg.get("scale", 1))


@pytest.mark.parametrize(("method", "options"), [(method, options) for method, several in VARIED.items() for options in several], ids=str)
def test_each_layer_is_what_its_own_numbers_make_of_it(models: merging_tasks.Family, method: str, options: dict[str, Any]) -> None:
    updates = models.updates[:1] if method == "pleas" else models.updates
    how = {name: models.data[: len(updates)] if value is ... else value for name, value in options.items()}

    def at(end: int) -> dict[str, Any]:
        def one(value: Any) -> Any:
            return value[end] if isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value) else value

        return {name: [one(w) for w in value] if name == "weights" else value if name == "data" else one(value) for name, value in how.items()}

    got = dense(weft.merge(updates, models.base, method, **how))
    first, last = (dense(weft.merge(updates, models.base, method, **at(end))) for end in (0, 1))
    early = {name for name in got if ".layers.0." in name or "embed" in name}
    if method == "darex-q" and "find" in options:  # elsewhere q is the mean of the layers'
        got, early = {name: values for name, values in got.items() if "proj" in name}, {name for name in early if "proj" in name}
    same(got, {name: (first if name in early else last)[name] for name in got})
    moved = {name for name in got if (first[name] != last[name]).any()}
    assert moved & early and moved - early


SAME = [("linear", {}), ("task-arithmetic", {"scale": 0.3}), ("slerp", {"t": 0.3}), ("ties", {"density": 0.3, "trim": "tensor", "scale": 0.7})]
SAME += [
    ("dare", {"drop": 0.3}),
    ("dare", {"drop": 0.3, "signs": "mass"}),
    ("model-breadcrumbs", {"density": 0.3, "top": 0.1}),
    ("pcb-merging", {"scale": 0.3}),
]
SAME += [("opcm", {"alpha": 0.3}), ("darex-q", {"drop": 0.3, "q": 0.9})]


@pytest.mark.parametrize(("method", "options"), SAME, ids=str)
def test_a_list_of_equal_numbers_is_that_number(family: Any, method: str, options: dict[str, Any]) -> None:
    base, _, _, ckpts = family
    weighs = method not in ("slerp", "opcm")
    plain = weft.merge(ckpts[:2], base, method, weights=[0.7, 0.1] if weighs else None, **options)
    lists = {name: [value] * 3 if isinstance(value, float) else value for name, value in options.items()}
    got = weft.merge(ckpts[:2], base, method, weights=[[0.7] * 4, [0.1]] if weighs else None, **lists)
    assert got.entries == plain.entries
    same(values_of(got), values_of(plain))


# --- the rest of a merge


def test_low_rank_stays_low_rank(tmp_path: Path) -> None:
    base = write_checkpoint(
        tmp_path / "base", {name: np.random.default_rng(k).standard_normal(shape).astype(dtype) for k, (name, (shape, dtype)) in enumerate(SHAPES.items())}
    )
    targets = {f"model.layers.{k}.attn.q.weight": (5, 6) for k in range(1, LAYERS)} | {"model.embed_tokens.weight": (7, 6)}  # none in the first layer
    deltas = [lora(base, seed, targets) for seed in (1, 2)]
    scale, second = spread(0.25, 0.5, 1.0), spread(2.0, 0.0, 1.0)
    merged = weft.merge(deltas, base, scale=[0.25, 0.5, 1.0], weights=[1, [2.0, 0.0, 1.0]], out=tmp_path / "merged.safetensors")
    for name, entry in merged.entries.items():
        k = place_of(name)
        assert [(op.op, op.cfg["scale"]) for op in entry.ops] == [("lowrank", 2 * scale[k] * w) for w in (1, second[k]) if w]
    assert merged.entries.keys() == targets.keys()
    got = weft.merge(deltas, base, scale=[0.25, 0.5, 1.0], weights=[1, [2.0, 0.0, 1.0]], rank=4)
    for name, (rows, columns) in targets.items():
        k = place_of(name)
        want = scale[k] * (product(deltas[0], name) + second[k] * product(deltas[1], name))
        np.testing.assert_allclose(got.apply(name, np.zeros((rows, columns), np.float32)), want, atol=1e-5)
    assert merged.recipe["config"] == {"scale": [0.25, 0.5, 1.0]} and merged.recipe["weights"] == [1.0, [2.0, 0.0, 1.0]]
    ends = weft.merge(deltas, base, "slerp", t=[0.0, 0.5, 1.0])
    kinds = {name: [op.op for op in entry.ops] for name, entry in ends.entries.items()}
    assert kinds == {name: ["lowrank" if place_of(name) in (0, LAYERS - 1) else "dense"] for name in targets}


@pytest.mark.parametrize(
    ("method", "options"), [("ties", {"trim": "tensor", "density": [0.25, 1.0]}), ("dare", {"drop": [0.1, 0.8], "weights": [[0, 1], 1, 1]})]
)
def test_shards_and_checkpoints(family: Any, tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    base, start, _, ckpts = family
    whole = weft.merge(ckpts, base, method, **options)
    parts = [weft.merge(ckpts, base, method, shard=(k, 3), threads=2, block=11, out=tmp_path / f"{k}.safetensors", **options) for k in (3, 1, 2)]
    assert join(parts).id == whole.id
    merged = values_of(whole)
    weft.merge(ckpts, base, method, into=tmp_path / "into", threads=2, block=9, **options)
    got = Base.open(tmp_path / "into")
    for name, (_, dtype) in SHAPES.items():
        assert got.tensor(name).read().tobytes() == (start[name].astype(merged[name].dtype) + merged[name]).astype(dtype).tobytes(), name


def test_copies_of_a_tied_matrix_stay_equal(tmp_path: Path) -> None:
    """And norms that have the same bytes are no copies of each other."""
    rng = np.random.default_rng(2)
    start = {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in SHAPES.items()}
    start |= {name: np.ones_like(w) for name, w in start.items() if name.endswith("norm.weight")}
    start |= {"lm_head.weight": start["model.embed_tokens.weight"], "model.embeddings.LayerNorm.weight": start["model.norm.weight"]}
    tuned = {name: (w.astype(np.float64) + 1).astype(w.dtype) for name, w in start.items()}
    base = write_checkpoint(tmp_path / "base", start)
    got = values_of(weft.merge([write_checkpoint(tmp_path / "tuned", tuned)], base, scale=[0.25, 1.0]))
    assert got["lm_head.weight"].tobytes() == got["model.embed_tokens.weight"].tobytes()
    assert {name: float(got[name].flat[0]) for name in got if name.lower().endswith("norm.weight")} == {
        "model.norm.weight": 1.0,
        "model.embeddings.LayerNorm.weight": 0.25,
        **{f"model.layers.{k}.norm.weight": pytest.approx(0.25 + 0.75 * k / 4) for k in range(LAYERS)},
    }
    build = Builder(base)  # of the head alone, by a delta that knows what else the head is
    build.put("lm_head.weight", "dense", {"values": np.ones((7, 6), np.float32)})
    build.put("model.norm.weight", "dense", {"values": np.ones(6, np.float32)})
    for tied, want in (((), 0.75), ((("lm_head.weight", "model.embed_tokens.weight"),), 0.25)):
        merged = weft.merge([build.done(tied=tied)], base, scale=[0.25, 0.75])
        assert [entry.ops[0].cfg["scale"] for _, entry in sorted(merged.entries.items())] == [want, 0.75]


def test_the_command_line(family: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _, _, ckpts = family
    words = ["merge", *(str(each.path) for each in ckpts), "--base", str(base.path), "-p", "scale=0.25,0.5,1", "--weights", "1:0.5:0,0.5,-1", "-o"]
    assert main([*words, str(tmp_path / "a.safetensors"), "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    want = weft.merge(ckpts, base, scale=[0.25, 0.5, 1.0], weights=[[1.0, 0.5, 0.0], 0.5, -1.0])
    assert Delta.load(tmp_path / "a.safetensors").id == want.id and told["method"] == "task-arithmetic"
    words[words.index("scale=0.25,0.5,1")] = "scale=[0.25, 0.5, 1]"
    assert main([*words, str(tmp_path / "b.safetensors")]) == 0 and Delta.load(tmp_path / "b.safetensors").id == want.id
    words[words.index("1:0.5:0,0.5,-1")] = "1:x,0.5,-1"
    assert main([*words, str(tmp_path / "c.safetensors")]) == 2
    assert "A:B:... for one that varies over depth" in capsys.readouterr().err
    assert main(["methods", "ties"]) == 0
    assert "float > 0 and <= 1, or a list over depth" in capsys.readouterr().out


# --- where tensors lie


def test_numbers_lie_evenly_and_are_met_exactly() -> None:
    names = [f"layers.{k}.a.weight" for k in range(8)]
    depth = Depth(names)
    got = [_between([0.1, 0.7, 0.3], depth.place(name)) for name in names]
    np.testing.assert_allclose(got, np.interp(np.arange(8) * 2 / 7, range(3), [0.1, 0.7, 0.3]), rtol=1e-15)
    assert (got[0], got[7]) == (0.1, 0.3)
    rng = np.random.default_rng(1)
    for low, high in rng.standard_normal((200, 2)):
        between = [_between([low, high], depth.place(name)) for name in names]
        assert (between[0], between[-1]) == (low, high) and min(low, high) <= min(between) and max(between) <= max(low, high)
        assert {_between([low] * 4, depth.place(name)) for name in names} == {low}
    assert _between([0.3], depth.place(names[4])) == 0.3


def test_each_stack_is_counted_by_itself() -> None:
    stacks = [f"encoder.block.{k}.layer.0.SelfAttention.q.weight" for k in range(3)] + [f"decoder.block.{k}.layer.1.layer_norm.weight" for k in range(5)]
    outside = ["shared.weight", "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight", "lm_head.weight"]
    depth = Depth([*stacks, *outside], [["lm_head.weight", "decoder.embed_tokens.weight"]])
    assert [float(depth.place(name)) for name in stacks] == [0, 0.5, 1, 0, 0.25, 0.5, 0.75, 1]
    assert [int(depth.place(name)) for name in outside] == [0, 1, 1, 0]
    assert Depth(["h.0.attn.c_attn.weight", "ln_f.weight"]).place("h.0.attn.c_attn.weight") == 0  # a single layer
    assert sorted(set(Depth(["h.0.attn.c_attn.weight"]).places())) == [0, 1]


@pytest.mark.parametrize(
    ("kind", "before"),
    [
        ("Llama", ["embed_tokens.weight"]),
        ("GPT2", ["wte.weight", "wpe.weight"]),
        (
            "Bert",
            [
                f"embeddings.{name}"
                for name in ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
            ],
        ),
        (
            "ViT",
            [
                "embeddings.cls_token",
                "embeddings.position_embeddings",
                "embeddings.patch_embeddings.projection.weight",
                "embeddings.patch_embeddings.projection.bias",
            ],
        ),
        ("ModernBert", ["embeddings.tok_embeddings.weight", "embeddings.norm.weight"]),
        ("T5", ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]),
    ],
)
def test_layers_of_real_architectures(kind: str, before: list[str]) -> None:
    """The layers that the live model has, read from names alone."""
    import torch
    import transformers

    from weft.sites import all_sites

    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")())
    for site in all_sites(model):
        found = layer(site.name)
        assert (found and found[1]) == site.layer, site.name
    assert sorted(name for name in model.state_dict() if layer(name) is None and before_layers(name)) == sorted(before)


def test_heads_and_single_modules_are_no_layers() -> None:
    assert not any(map(before_layers, ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "model.norm.weight", "classifier.bias")))
    assert layer("layers.0.weight") is None and layer("classifier.1.weight") is None
    assert layer("model.layers.12.mlp.experts.3.w1.weight") == ("model.layers", 12)


# --- what is refused


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("ties", {"density": [0.2, 0.4]}, "density: it belongs to the whole model, so it is one number (trim=global ranks the entries of all tensors together"),
        ("ties", {"density": "0.2,1.5", "trim": "tensor"}, "density: expected float > 0 and <= 1 (each), got '0.2,1.5'"),
        ("ties", {"scale": []}, "scale: expected float (each), got []"),
        ("ties", {"scale": [0.5, None]}, "scale: expected float (each), got [0.5, None]"),
        ("ties", {"scale": [0.5, float("nan")]}, "scale: expected float (each), got [0.5, nan]"),
        ("ties", {"normalize": [True, False]}, "normalize: expected bool, got [True, False]"),
        ("dare", {"seed": [1, 2]}, "seed: it belongs to the whole model, so it is one number\n  try: what may be a list here: drop, scale"),
        ("pcb-merging", {"density": [0.1, 0.2]}, "density: it belongs to the whole model"),
        ("darex-q", {"drop": [0.1, 0.2]}, "drop: it belongs to the whole model, so it is one number (one q is sought for it; give q, or find=analytic)"),
        ("atlas", {"lr": [0.1, 0.2], "steps": "1,2"}, "lr: it belongs to the whole model, so it is one number\n  - steps: it belongs to the whole model"),
        ("scalearn", {"start": [0.1, 0.2], "shared": True}, "start: it belongs to the whole model, so it is one number (with shared, layers"),
        ("linear", {"weights": [[0.5, float("inf")], [], 1]}, "weight 1 is inf\n  - weight 2 is an empty list"),
        ("linear", {"weights": [[1.0, -1.0], 0.5, -0.5], "normalize": True}, "normalize: the weights add up to 0"),  # in the middle
        ("ties", {"weights": [1, 1, [1.0, -1.0]], "normalize": True}, "normalize: every weight must be positive"),
    ],
)  # fmt: skip
def test_what_cannot_vary_is_refused(family: Any, method: str, options: dict[str, Any], text: str) -> None:
    base, _, _, ckpts = family
    with pytest.raises(UsageError) as caught:
        weft.merge(ckpts, base, method, **options)
    assert text in str(caught.value)


def test_layers_must_be_known(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"layers.0.weight": np.ones((2, 3), np.float32), "fc.bias": np.ones(3, np.float32)})
    delta = lora(base, 1, {"layers.0.weight": (2, 3)})
    with pytest.raises(UsageError, match="tell of no layers"):
        weft.merge([delta], base, scale=[0.1, 0.2])
    with pytest.raises(UsageError, match="is for the base to say"):
        weft.merge([delta], scale=[0.1, 0.2])
    with pytest.raises(UsageError, match="is for the base to say"):
        weft.merge([delta], weights=[[0.1, 0.2]])
