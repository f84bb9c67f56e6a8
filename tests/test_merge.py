"""Merging: every method against a slow reference over whole vectors, identities, the protocol, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np
import pytest

import weft
from weft import methods, xp
from weft.base import Base
from weft.delta import At, Builder, Delta
from weft.engine.increments import Increments
from weft.errors import InputError, MismatchError, UsageError
from weft.file import container_header
from weft.folding import fold
from weft.merging._method import MergeMethod
from weft.stored import hold

BF16 = ml_dtypes.bfloat16
SHAPES: dict[str, tuple[tuple[int, ...], Any]] = {
    "conv.weight": ((4, 3, 2, 2), BF16),
    "embed.weight": ((13, 6), np.float32),
    "half.weight": ((5, 7), np.float16),
    "norm.weight": ((6,), BF16),
    "scale": ((), np.float32),
    "wide.weight": ((3, 4), np.float64),
    "unchanged.weight": ((2, 5), np.float32),
}
EMPTY = {"empty": np.zeros((0, 3), np.float32), "ids": np.arange(4)}


def write_checkpoint(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> Base:
    folder.mkdir()
    names, where = sorted(tensors), {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = {name: hold(tensors[name]) for name in names[number::shards]}
        order = sorted(mine, key=lambda name: -tensors[name].itemsize)
        (folder / file).write_bytes(container_header(mine, order, {"format": "pt"}) + b"".join(b"".join(mine[name].blocks()) for name in order))
        where |= dict.fromkeys(mine, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text("{}")
    return Base.open(folder)


def base_values(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, (shape, dtype) in SHAPES.items()} | EMPTY


def tuned_values(start: dict[str, np.ndarray], seed: int, size: float = 0.1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = dict(start)
    for name, (shape, dtype) in SHAPES.items():
        if name != "unchanged.weight":
            out[name] = (start[name].astype(np.float64) + size * rng.standard_normal(shape)).astype(dtype)
    return out


@pytest.fixture
def family(tmp_path):
    """A base and three checkpoints tuned from it; one of them in shards."""
    start = base_values()
    base = write_checkpoint(tmp_path / "base", start, shards=3)
    tuned = [tuned_values(start, seed) for seed in (1, 2, 3)]
    return base, start, tuned, [write_checkpoint(tmp_path / f"tuned{k}", values, shards=k + 1) for k, values in enumerate(tuned)]


def wide(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.float64 else x.astype(np.float32)


def taus_of(start: dict[str, np.ndarray], tuned: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    names = [name for name in sorted(SHAPES) if name != "unchanged.weight"]
    return [{name: np.asarray(wide(values[name]) - wide(start[name])) for name in names} for values in tuned]


def values_of(delta: Delta) -> dict[str, np.ndarray]:
    assert all([op.op for op in entry.ops] == ["dense"] for entry in delta.entries.values())
    return {name: delta.get(f"{name}//0.values") for name in delta.entries}


def close(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert (got[name].dtype, got[name].shape) == (values.dtype, values.shape)
        assert np.linalg.norm(got[name] - values) <= 1e-6 * np.linalg.norm(values), name


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def exact_delta(base: Base, start: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> Delta:
    """What an exact diff is: the new bytes of every tensor that differs."""
    build = Builder(base)
    for name in values:
        if values[name].tobytes() != start[name].tobytes():
            build.put(name, "assign", {"values": values[name]})
    return build.done(recipe={"verb": "diff"})


# --- slow references: entry by entry, one operation after the other in the dtype of increments


def slow_sum(taus: list[dict[str, np.ndarray]], coefficients: list[float]) -> dict[str, np.ndarray]:
    out = {}
    for name, first in taus[0].items():
        flat, kind = [], first.dtype.type
        for j in range(first.size):
            total = kind(0)
            for tau, c in zip(taus, coefficients, strict=True):
                total = total + kind(c) * tau[name].reshape(-1)[j]
            flat.append(total)
        out[name] = np.array(flat, first.dtype).reshape(first.shape)
    return out


def slow_ties(
    taus: list[dict[str, np.ndarray]],
    density: float = 0.2,
    scale: float = 1.0,
    trim: str = "global",
    elect: str = "mass",
    elect_weighted: bool = False,
    normalize: bool = False,
    weights: list[float] | None = None,
) -> dict[str, np.ndarray]:
    weights = weights or [1.0] * len(taus)
    vectors = {name: [list(tau[name].reshape(-1)) for tau in taus] for name in taus[0]}

    def threshold(values: list[float]) -> float:
        ordered = sorted((abs(float(np.float32(v))) for v in values), reverse=True)
        return ordered[max(1, int(density * len(ordered))) - 1]

    trimmed = {name: [] for name in vectors}
    for i in range(len(taus)):
        h = threshold([v for name in vectors for v in vectors[name][i]])
        for name in vectors:
            here = threshold(vectors[name][i]) if trim == "tensor" else h
            trimmed[name].append([v if abs(float(np.float32(v))) >= here else v.dtype.type(0) for v in vectors[name][i]])

    def votes(name: str, j: int) -> list[Any]:
        return [(t[j].dtype.type(w) * t[j] if elect_weighted else t[j]) for t, w in zip(trimmed[name], weights, strict=True)]

    def mass(name: str, j: int) -> float:
        total = votes(name, j)[0].dtype.type(0)
        for vote in votes(name, j):
            total += np.sign(vote) if elect == "count" else vote
        return total

    balance = sum(float(np.sign(mass(name, j))) for name in vectors for j in range(len(vectors[name][0])))
    out = {}
    for name, like in taus[0].items():
        flat, kind = [], like.dtype.type
        for j in range(like.size):
            m = mass(name, j)
            sign = np.sign(m) if m else np.sign(balance)
            total = divisor = kind(0)
            for vote, t, w in zip(votes(name, j), trimmed[name], weights, strict=True):
                if vote > 0 if sign > 0 else vote < 0:
                    total += kind(scale * w) * t[j]
                    divisor += kind(w if normalize else 1)
            flat.append(total / (divisor or kind(1)))
        out[name] = np.array(flat, like.dtype).reshape(like.shape)
    return out


@pytest.mark.parametrize("params", [{}, {"normalize": True}, {"weights": [0.7, -0.2, 1.5]}, {"weights": [2, 3, 5], "normalize": True}])
def test_linear_is_the_slow_reference(family, params):
    base, start, tuned, ckpts = family
    weights = params.get("weights", [1 / 3] * 3)
    if params.get("normalize"):
        weights = [w / sum(weights) for w in weights]
    same(values_of(weft.merge(ckpts, base, "linear", **params)), slow_sum(taus_of(start, tuned), weights))


@pytest.mark.parametrize("params", [{}, {"scale": 0.3}, {"weights": [1, -1, 0.25], "scale": 0.4}])
def test_task_arithmetic_is_the_slow_reference(family, params):
    base, start, tuned, ckpts = family
    coefficients = [params.get("scale", 1.0) * w for w in params.get("weights", [1.0] * 3)]
    same(values_of(weft.merge(ckpts, base, "task-arithmetic", **params)), slow_sum(taus_of(start, tuned), coefficients))


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"density": 1.0},
        {"density": 0.5, "scale": 1.3},
        {"trim": "tensor"},
        {"trim": "tensor", "density": 0.6, "elect": "count"},
        {"density": 0.7, "weights": [0.5, 2.0, -1.0]},
        {"density": 0.7, "weights": [0.5, 2.0, -1.0], "elect_weighted": True},
        {"density": 0.7, "weights": [0.5, 2.0, 1.0], "elect_weighted": True, "normalize": True, "trim": "tensor"},
        {"density": 0.001},
    ],
    ids=str,
)
def test_ties_is_the_slow_reference(family, params):
    base, start, tuned, ckpts = family
    got = values_of(weft.merge(ckpts, base, "ties", threads=2, block=16, **params))
    same(got, slow_ties(taus_of(start, tuned), **params))
    assert any(values.any() for values in got.values())


def test_ties_sign_of_exact_cancellation_is_the_majority(tmp_path):
    """Increments on a coarse grid cancel exactly; those entries go with the sign that won more entries."""
    rng = np.random.default_rng(8)
    start = {"w": np.zeros((9, 8), np.float32)}
    base = write_checkpoint(tmp_path / "base", start)
    for shift, name in ((0.4, "plus"), (-0.4, "minus")):
        tuned = [{"w": np.round(rng.standard_normal((9, 8)) + shift).astype(np.float32)} for _ in range(2)]
        cancelled = (tuned[0]["w"] + tuned[1]["w"] == 0) & (tuned[0]["w"] != 0)
        assert cancelled.sum() > 3
        ckpts = [write_checkpoint(tmp_path / f"{name}{k}", values) for k, values in enumerate(tuned)]
        got = values_of(weft.merge(ckpts, base, "ties", density=1.0))["w"]
        same({"w": got}, slow_ties([{"w": t["w"]} for t in tuned], density=1.0))
        assert (np.sign(got[cancelled]) == np.sign(shift)).all()


def test_ties_keeps_every_entry_at_the_threshold(tmp_path):
    values = np.array([[3, -2, 2, 2, 1], [0, 0, -1, 0.5, 0]], np.float32)
    base = write_checkpoint(tmp_path / "base", {"w": np.zeros((2, 5), np.float32)})
    one = write_checkpoint(tmp_path / "one", {"w": values})

    def kept(density: float) -> list[float]:
        got = values_of(weft.merge([one], base, "ties", density=density))["w"]
        return sorted(np.abs(got[got != 0]))

    assert kept(0.05) == kept(0.19) == [3]  # at least one
    assert kept(0.2) == kept(0.4) == [2, 2, 2, 3]  # k = 2 and k = 4
    assert kept(0.5) == [1, 1, 2, 2, 2, 3]


# --- identities


def test_ties_of_one_model(family):
    """At full density: task arithmetic. Below: trimming, by a sort of the whole vector."""
    base, start, tuned, ckpts = family
    options = {"scale": 0.7, "weights": [-1.3]}
    same(values_of(weft.merge(ckpts[:1], base, "ties", density=1.0, **options)), values_of(weft.merge(ckpts[:1], base, "task-arithmetic", **options)))
    tau = taus_of(start, tuned)[0]
    every = np.sort(np.abs(np.concatenate([t.astype(np.float32).reshape(-1) for t in tau.values()])))
    h = every[-int(0.3 * every.size)]
    trimmed = {name: np.asarray(np.where(np.abs(t).astype(np.float32) >= h, t, 0), t.dtype) for name, t in tau.items()}
    same(values_of(weft.merge(ckpts[:1], base, "ties", density=0.3)), trimmed)


@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "ties"])
def test_checkpoints_merge_as_their_exact_diffs_do(family, method):
    base, start, tuned, ckpts = family
    diffs = [exact_delta(base, start, values) for values in tuned]
    plain = values_of(weft.merge(ckpts, base, method))
    same(plain, values_of(weft.merge([ckpts[0], *diffs[1:]], base, method)))
    assert "unchanged.weight" not in plain and "empty" not in plain
    if method == "ties":
        same(plain, values_of(weft.merge(diffs, base, method)))


def test_linear_of_one_delta_is_itself(family):
    base, start, tuned, _ = family
    delta = exact_delta(base, start, tuned[0])
    got = weft.merge([delta], method="linear")
    assert got.entries == delta.entries
    assert {k: t.sha256 for k, t in got.tensors.items()} == {k: t.sha256 for k, t in delta.tensors.items()}


def test_a_model_and_its_negative_cancel_exactly(family, tmp_path):
    base, start, tuned, ckpts = family
    merged = weft.merge([ckpts[0], exact_delta(base, start, tuned[0])], base, weights=[0.7, -0.7])
    assert len(merged.entries) == 6
    assert not any(values.any() for values in values_of(merged).values())
    fold(base, [merged], tmp_path / "folded", allow_noop=True)
    same({n: Base.open(tmp_path / "folded").tensor(n).read() for n in start}, start)


@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "ties"])
def test_two_models_commute(family, method):
    base, _, _, ckpts = family
    same(values_of(weft.merge(ckpts[:2], base, method)), values_of(weft.merge(ckpts[1::-1], base, method)))


def test_order_does_not_matter_where_sums_are_exact(tmp_path):
    rng = np.random.default_rng(5)
    base = write_checkpoint(tmp_path / "base", {"w": np.zeros((6, 6), np.float32)})
    ckpts = [write_checkpoint(tmp_path / f"t{k}", {"w": rng.integers(-9, 10, (6, 6)).astype(np.float32)}) for k in range(3)]
    first = values_of(weft.merge(ckpts, base, "ties", density=0.6, weights=[1, 2, 4]))
    same(first, values_of(weft.merge([ckpts[2], ckpts[0], ckpts[1]], base, "ties", density=0.6, weights=[4, 1, 2])))


# --- deltas


def lora(base: Base, seed: int, targets: dict[str, tuple[int, int]], rank: int = 2, scale: float = 2.0, **manifest: Any) -> Delta:
    rng = np.random.default_rng(seed)
    build = Builder(base)
    for name, (rows, columns) in targets.items():
        fields = {"A": rng.standard_normal((rank, columns)).astype(np.float32), "B": rng.standard_normal((rows, rank)).astype(np.float32)}
        build.put(name, "lowrank", fields, scale=scale)
    return build.done(recipe={"verb": "tune"}, **manifest)


TARGETS = {"embed.weight": (13, 6), "half.weight": (5, 7)}


def product(delta: Delta, name: str) -> np.ndarray:
    (op,) = delta.entries[name].ops
    return op.cfg.get("scale", 1.0) * (delta.get(op.t["B"].key).astype(np.float64) @ delta.get(op.t["A"].key).astype(np.float64))


def test_lora_deltas_stay_low_rank(family, tmp_path):
    base, start, _, _ = family
    a, b = lora(base, 1, TARGETS), lora(base, 2, {"embed.weight": (13, 6)}, rank=3)
    merged = weft.merge([a, b], method="linear", weights=[0.25, 0.5], out=tmp_path / "merged.safetensors")
    assert {name: [(op.op, op.cfg["scale"]) for op in entry.ops] for name, entry in merged.entries.items()} == {
        "embed.weight": [("lowrank", 0.5), ("lowrank", 1.0)],
        "half.weight": [("lowrank", 0.5)],
    }
    assert merged.nbytes == a.nbytes + b.nbytes
    want = start["embed.weight"] + 0.25 * product(a, "embed.weight") + 0.5 * product(b, "embed.weight")
    got = merged.apply("embed.weight", start["embed.weight"])
    assert np.abs(got - want).max() <= 2 * np.spacing(np.abs(np.stack([got, start["embed.weight"]])).max())  # one rounding for each op
    dense = weft.merge([a, b, write_same(base, start, tmp_path)], base, "linear", weights=[0.25, 0.5, 1.0])
    again = dense.apply("embed.weight", start["embed.weight"])
    assert [op.op for op in dense.entries["embed.weight"].ops] == ["dense"]
    assert np.abs(again - got).max() <= 2 * np.spacing(np.abs(np.stack([got, again])).max())
    assert [op.op for op in dense.entries["half.weight"].ops] == ["lowrank"]  # the checkpoint left it alone


def write_same(base: Base, start: dict[str, np.ndarray], tmp_path: Path) -> Base:
    """A checkpoint that differs from the base in one entry of embed.weight, by the smallest number there is."""
    values = {**start, "embed.weight": start["embed.weight"].copy()}
    values["embed.weight"][0, 0] = np.nextafter(values["embed.weight"][0, 0], np.float32(9))
    return write_checkpoint(tmp_path / "nearly", values)


def test_lora_deltas_in_ties_need_no_base(family):
    base, _, _, _ = family
    a, b = lora(base, 1, TARGETS), lora(base, 2, TARGETS)
    taus = [{name: product(d, name).astype(np.float32) for name in TARGETS} for d in (a, b)]
    got = weft.merge([a, b], method="ties", density=0.4, block=20)
    same(values_of(got), slow_ties(taus, density=0.4))
    assert got.base == base.fingerprint


def test_a_weight_of_zero_leaves_a_delta_out(family):
    base, _, _, _ = family
    a, b = lora(base, 1, {"half.weight": (5, 7)}), lora(base, 2, {"embed.weight": (13, 6)})
    merged = weft.merge([a, b], weights=[0, 2])
    assert list(merged.entries) == ["embed.weight"]
    assert merged.parents == (a.id, b.id)


def test_changes_that_depend_on_the_base(family, tmp_path):
    """A permutation, a rescaling and a low-rank change on one tensor: by algebra for sums, dense for ties."""
    base, start, _, _ = family
    rng = np.random.default_rng(4)
    w = start["embed.weight"]
    perm, factor = rng.permutation(13), rng.uniform(0.5, 2, 13).astype(np.float32)
    one, two, three = Builder(base), Builder(base), lora(base, 3, {"embed.weight": (13, 6)})
    one.put("embed.weight", "permute", {"perm": perm})
    two.put("embed.weight", "scale_shift", {"scale": factor})
    deltas = [one.done(), two.done(), three]
    taus = [w[perm] - w, w * factor[:, None] - w, product(three, "embed.weight").astype(np.float32)]
    summed = weft.merge(deltas, scale=0.5)
    assert [op.op for op in summed.entries["embed.weight"].ops] == ["sum"]
    want = w + 0.5 * sum(t.astype(np.float64) for t in taus)
    assert np.abs(summed.apply("embed.weight", w) - want).max() < 1e-5
    for block in (1, 7, 1000):
        got = values_of(weft.merge(deltas, base, "ties", density=0.5, block=block, threads=2))
        same(got, slow_ties([{"embed.weight": t} for t in taus], density=0.5))
    with pytest.raises(UsageError, match=r"'embed.weight' depends on the base's values.*\n.*base=PATH"):
        weft.merge(deltas, method="ties")
    weft.merge([three], method="ties")


def test_a_view_of_a_tensor(family):
    base, _, _, _ = family
    build = Builder(base)
    values = np.arange(1.0, 13, dtype=np.float32).reshape(2, 6)
    build.put("embed.weight", "dense", {"values": values}, at=At(index=((3, 5),)))
    want = np.zeros((13, 6), np.float32)
    want[3:5] = values
    same(values_of(weft.merge([build.done()], method="ties", density=1.0, block=6)), {"embed.weight": want})


def test_heads_are_merged_relative_to_zeros(family, tmp_path):
    base, start, _, _ = family
    patch = {"num_labels": 2}

    def headed(seed: int, shape: tuple[int, ...] = (2, 6), config: dict[str, Any] = patch) -> Delta:
        build = Builder(base)
        build.add("classifier.weight", np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
        return build.done(config=config)

    a, b = headed(1), headed(2)
    heads = [d.get("classifier.weight//0.values") for d in (a, b)]
    for method, want in (("linear", slow_sum([{"h": h} for h in heads], [0.5, 0.5])), ("ties", slow_ties([{"h": h} for h in heads]))):
        merged = weft.merge([a, b], base, method)
        fold(base, [merged], tmp_path / method)
        got = Base.open(tmp_path / method)
        assert np.array_equal(got.tensor("classifier.weight").read(), want["h"])
        assert got.config["num_labels"] == 2
        assert got.tensor("embed.weight").read().tobytes() == start["embed.weight"].tobytes()
    with pytest.raises(MismatchError, match=r"(?s)num_labels: 2 and 3.*") as caught:
        weft.merge([a, headed(3, (3, 6), {"num_labels": 3})])
    with pytest.raises(MismatchError, match=r"'classifier.weight': added F32 \[2, 6\] in input 1, added F32 \[3, 6\] in input 2"):
        weft.merge([a, headed(3, (3, 6))])
    assert "input 2" in str(caught.value)


def test_tied_copies_move_together(tmp_path):
    """The base stores both names of a tied tensor; one input changes it by one name, the other by the other."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((5, 4)).astype(np.float32)
    base = write_checkpoint(tmp_path / "base", {"embed": w, "head": w})
    parts = []
    for name in ("embed", "head"):
        build = Builder(base)
        build.put(name, "dense", {"values": rng.standard_normal((5, 4)).astype(np.float32)})
        parts.append(build.done(tied=(("embed", "head"),)))
    for method in ("linear", "ties"):
        weft.merge(parts, base, method, into=tmp_path / method)
        got = Base.open(tmp_path / method)
        assert got.tensor("embed").read().tobytes() == got.tensor("head").read().tobytes() != w.tobytes()
    only_one = weft.merge(parts[:1], base, "ties")
    assert list(only_one.entries) == ["embed"] and only_one.tied == (("embed", "head"),)


# --- deltas made over others


def test_over(family, tmp_path):
    base, start, _, _ = family
    w = start["embed.weight"]
    first = lora(base, 1, {"embed.weight": (13, 6)})
    factor = np.linspace(0.5, 1.5, 13).astype(np.float32)
    build = Builder(base)
    build.put("embed.weight", "scale_shift", {"scale": factor})
    second = build.done(over=(first.id,))
    with pytest.raises(MismatchError, match=f"input 1 was made over other deltas; missing: {first.id[:12]}"):
        weft.merge([second], base)

    start_of_second = first.apply("embed.weight", w)
    tau2 = xp.narrow(start_of_second * factor[:, None].astype(np.float64), w) - start_of_second
    both = values_of(weft.merge([first, second], base))
    same(both, slow_sum([{"embed.weight": product(first, "embed.weight").astype(np.float32)}, {"embed.weight": tau2}], [1, 1]))
    assert weft.merge([first, second], base).over == ()

    alone = weft.merge([second], base, "ties", density=1.0, on=[first])
    same(values_of(alone), {"embed.weight": tau2})
    assert alone.over == (first.id,)
    kept = weft.merge([second], on=[first])
    assert [op.op for op in kept.entries["embed.weight"].ops] == ["scale_shift"] and kept.over == (first.id,)
    weft.merge([second], base, on=[first], into=tmp_path / "into")
    fold(base, [first, second], tmp_path / "fold")
    assert (tmp_path / "into" / base.files[0].name).read_bytes() == (tmp_path / "fold" / base.files[0].name).read_bytes()
    with pytest.raises(MismatchError, match="given as `on`, but no input was made over it"):
        weft.merge([first], base, on=[lora(base, 9, TARGETS)])


# --- files


def test_bytes_do_not_depend_on_threads_blocks_or_hash_seed(family, tmp_path):
    base, start, tuned, ckpts = family
    exact_delta(base, start, tuned[1]).save(tmp_path / "one.safetensors")
    inputs = [str(ckpts[0].path), str(tmp_path / "one.safetensors"), str(ckpts[2].path)]
    script = (
        "import json, sys, weft\n"
        "inputs, base, method, out, options = json.loads(sys.argv[1])\n"
        "weft.merge(inputs, base, method, out=out, **options)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    for method in ("linear", "ties"):
        seen = set()
        for number, options in enumerate([{"threads": 1}, {"threads": 2, "block": 1}, {"threads": 3, "block": 17}]):
            out = tmp_path / f"{method}{number}.safetensors"
            argument = json.dumps([inputs, str(base.path), method, str(out), options])
            env = {**os.environ, "PYTHONHASHSEED": str(number), "WEFT_CACHE": str(tmp_path / f"cache{number}")}
            subprocess.run([sys.executable, "-c", script, argument], check=True, env=env)
            seen.add(hashlib.sha256(out.read_bytes()).hexdigest())
        assert len(seen) == 1
        want = slow_ties(taus_of(start, tuned)) if method == "ties" else slow_sum(taus_of(start, tuned), [1 / 3] * 3)
        same(values_of(Delta.load(tmp_path / f"{method}0.safetensors")), want)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_into_is_the_fold_of_the_merged_delta(family, tmp_path, method):
    base, start, _, ckpts = family
    merged = weft.merge([*ckpts, lora(base, 1, TARGETS)], base, method, out=tmp_path / "merged.safetensors")
    fold(base, [merged], tmp_path / "folded")
    report = weft.merge([*ckpts, lora(base, 1, TARGETS)], base, method, into=tmp_path / "into", threads=2, block=11)
    assert report.changed > 100 and report.base == base.fingerprint and report.deltas == ()  # the merged delta has no id: it was never made
    for file in base.files:
        assert (tmp_path / "into" / file.name).read_bytes() == (tmp_path / "folded" / file.name).read_bytes()
    w = start["norm.weight"].astype(np.float32)
    got = Base.open(tmp_path / "into").tensor("norm.weight").read()
    assert got.tobytes() == (w + merged.get("norm.weight//0.values")).astype(BF16).tobytes()


def test_what_the_merged_delta_says_of_itself(family, tmp_path):
    base, _, _, ckpts = family
    delta = lora(base, 1, TARGETS)
    merged = weft.merge([delta, ckpts[1]], base, "ties", [2, 1], density=0.3, out=tmp_path / "m.safetensors")
    assert merged.parents == (delta.id,)
    assert merged.base == base.fingerprint
    assert merged.recipe == {
        "verb": "merge",
        "method": "ties",
        "config": {"density": 0.3, "scale": 1, "trim": "global", "elect": "mass", "elect_weighted": False, "normalize": False},
        "weights": [2, 1],
        "inputs": [{"delta": delta.id}, {"checkpoint": ckpts[1].fingerprint}],
    }
    held = weft.merge([delta, ckpts[1]], base, "ties", [2, 1], density=0.3)
    assert held.id == merged.id
    assert held.tensors["embed.weight//0.values"].rows(2, 5).tobytes() == merged.tensors["embed.weight//0.values"].rows(2, 5).tobytes()


# --- the protocol, by a method that draws random numbers and one that needs whole tensors


class DropConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0


@methods.method("merge", config=DropConfig)
class Drop(MergeMethod[DropConfig]):
    """Each entry is dropped with probability one half."""

    def merge(self, taus, weights, cfg, state, block):
        name = int.from_bytes(hashlib.sha256(block.target.name.encode()).digest()[:4], "big")
        total = np.zeros(block.shape)
        for number, tau in enumerate(taus):
            kept = xp.uniforms(np.zeros(0), xp.key(cfg.seed, name + number), block.start, tau.size) < 0.5
            total = total + kept.reshape(tau.shape) * tau.astype(np.float64)
        return total


@methods.method("merge", config=DropConfig)
class Directions(MergeMethod[DropConfig]):
    """Each increment is divided by its largest entry in the tensor."""

    whole = True

    def prepare(self, models, settings):
        return models.labels

    def merge(self, taus, weights, cfg, state, block):
        assert len(state) == len(taus) and block == block.target.whole
        return sum(tau / (np.abs(tau).max() or 1.0) for tau in taus)


@pytest.mark.parametrize("kind", [Drop, Directions])
def test_methods_to_come_do_not_depend_on_blocks(family, monkeypatch, tmp_path, kind):
    base, start, _, ckpts = family
    monkeypatch.setattr(weft.merging, "get", lambda verb, name: kind.weft_method)
    whole = values_of(weft.merge(ckpts[:2], base, "any", block=10**6, threads=1, seed=3))
    same(whole, values_of(weft.merge(ckpts[:2], base, "any", block=7, threads=2, seed=3)))
    weft.merge(ckpts[:2], base, "any", block=7, threads=2, seed=3, into=tmp_path / "into")
    got = Base.open(tmp_path / "into").tensor("embed.weight").read()
    assert got.tobytes() == (start["embed.weight"] + whole["embed.weight"]).tobytes()
    if kind is Drop:
        dropped = whole["embed.weight"] == 0
        assert 5 < dropped.sum() < 40
        other = values_of(weft.merge(ckpts[:2], base, "any", seed=4))
        assert (other["embed.weight"] == 0).tobytes() != dropped.tobytes()


# --- what the papers claim


def test_ties_resolves_interference(tmp_path):
    """Two models share half of what they learnt and contradict each other on small, redundant changes elsewhere. Averaging dilutes what one
    of them alone knows and lets noise flip signs; TIES gives both tasks more of their own increment back (Yadav et al., sections 3 and 7)."""
    rng = np.random.default_rng(11)
    shape = (64, 64)
    base = write_checkpoint(tmp_path / "base", {"w": rng.standard_normal(shape).astype(np.float32)})
    start = base.tensor("w").read()
    owner = rng.choice(4, shape, p=[0.8, 0.08, 0.04, 0.08])  # nobody, the first, both, the second
    strong = np.sign(rng.standard_normal(shape)) * rng.uniform(0.8, 1.2, shape)
    taus = [np.where((owner == k) | (owner == 2), strong, 0.15 * rng.standard_normal(shape)) for k in (1, 3)]
    ckpts = [write_checkpoint(tmp_path / f"t{k}", {"w": (start + tau).astype(np.float32)}) for k, tau in enumerate(taus)]

    def error(method: str, **params: Any) -> float:
        got = values_of(weft.merge(ckpts, base, method, **params))["w"]
        return sum(float(np.square((got - tau)[np.abs(tau) > 0.7]).mean()) for tau in taus)

    ties, average, total = error("ties", density=0.15), error("linear"), error("task-arithmetic")
    assert ties < 0.05 * average
    assert ties < 0.2 * total


def test_a_conflict_of_signs_is_decided_by_mass_and_not_averaged(tmp_path):
    base = write_checkpoint(tmp_path / "base", {"w": np.zeros(5, np.float32)})
    rows = [[2, 3, 1, -4, 0], [4, -1, 1, -2, 0], [0, -1, -5, -3, 0]]
    ckpts = [write_checkpoint(tmp_path / f"t{k}", {"w": np.array(row, np.float32)}) for k, row in enumerate(rows)]
    assert values_of(weft.merge(ckpts, base, "ties", density=1.0))["w"].tolist() == [3, 3, -5, -3, 0]
    assert values_of(weft.merge(ckpts, base, "ties", density=1.0, elect="count"))["w"].tolist() == [3, -1, 1, -3, 0]
    assert values_of(weft.merge(ckpts, base, "ties", density=1.0, elect_weighted=True, weights=[1, 1, 0.2]))["w"].tolist() == [3, 3, 1, np.float32(-6.6 / 3), 0]


# --- what is refused


def test_all_that_does_not_fit_is_said_at_once(family, tmp_path):
    base, start, tuned, _ = family
    bad = {k: v for k, v in tuned[0].items() if k != "scale"}
    bad["embed.weight"] = np.zeros((14, 6), np.float32)
    bad["ids"] = np.arange(4).astype(np.int32)
    bad["head.weight"] = np.ones((2, 6), np.float32)
    ckpt = write_checkpoint(tmp_path / "bad", bad)
    other = write_checkpoint(tmp_path / "other", {**start, "embed.weight": start["embed.weight"] + 1})
    wrong_base = lora(other, 1, TARGETS)
    structure = Builder(base)
    structure.remove("half.weight")
    with pytest.raises(MismatchError) as caught:
        weft.merge([ckpt, wrong_base, structure.done()], base, out=tmp_path / "never.safetensors")
    text = str(caught.value)
    for part in (
        "bad: tensor 'scale' of the base is missing",
        "bad: tensor 'embed.weight': expected F32 [13, 6], got F32 [14, 6]",
        "bad: tensor 'ids': expected I64 [4], got I32 [4]",
        "bad: tensor 'head.weight' is not in the base",
        f"was made for base {wrong_base.base[:12]}",
        "input 3: tensor 'half.weight': a remove entry changes the structure and cannot be merged",
    ):
        assert part in text
    assert text.count("\n  - ") == 6
    assert caught.value.exit_code == 3
    assert not (tmp_path / "never.safetensors").exists()


def test_deltas_whose_entries_do_not_fit_the_base_they_name(family, tmp_path):
    """What a delta says of the base's tensors is held against the base, whatever its fingerprint says."""
    base, _, _, _ = family
    wider = write_checkpoint(tmp_path / "wider", {"embed.weight": np.ones((14, 6), np.float32), "more": np.ones(3, np.float32)})
    build = Builder(wider)
    build.put("embed.weight", "dense", {"values": np.ones((14, 6), np.float32)})
    build.put("more", "dense", {"values": np.ones(3, np.float32)})
    build.add("scale", np.ones(2, np.float32))
    ints = Builder(base)
    ints.put("ids", "assign", {"values": np.arange(4)[::-1].copy()})
    quantised = replace(lora(base, 1, TARGETS), quantisation={"method": "x"})
    with pytest.raises(MismatchError) as caught:
        weft.merge([replace(build.done(), base=base.fingerprint), ints.done(), quantised], base)
    for part in (
        "input 1: tensor 'embed.weight': made for F32 [14, 6], the base has F32 [13, 6]",
        "input 1: tensor 'more' is not in the base",
        "input 1: tensor 'scale' is added, but the base has it already",
        "input 2: tensor 'ids' is I64; only floating-point tensors can be merged",
        "the deltas disagree about how the base is quantised",
    ):
        assert part in str(caught.value)


def test_a_delta_over_one_that_changes_the_structure(family):
    base, _, _, _ = family
    build = Builder(base)
    build.add("embed.weight", np.ones((3, 6), np.float32), kind="replace")
    first = build.done()
    with pytest.raises(MismatchError, match=r"input 1: tensor 'embed\.weight': a delta that it was made over changes the structure"):
        weft.merge([lora(base, 1, TARGETS, over=(first.id,))], base, on=[first])


def test_entries_that_live_at_run_time_are_refused_by_name(family):
    base, _, _, _ = family
    delta = lora(base, 1, TARGETS)
    entry = replace(delta.entries["embed.weight"], base=None)
    live = replace(delta, entries={**delta.entries, "@module/layers.0": entry})
    with pytest.raises(MismatchError, match=r"@module/layers\.0 changes activations"):
        weft.merge([live])


def test_deltas_of_different_bases_without_the_base(family, tmp_path):
    base, start, _, _ = family
    other = write_checkpoint(tmp_path / "other", {**start, "embed.weight": start["embed.weight"] + 1})
    with pytest.raises(MismatchError, match="different bases"):
        weft.merge([lora(base, 1, TARGETS), lora(other, 1, TARGETS)])
    half = {"half.weight": (5, 7)}
    unknown = [replace(lora(each, seed, half), base=None) for seed, each in enumerate((base, other))]
    assert len(weft.merge(unknown).entries["half.weight"].ops) == 2
    with pytest.raises(MismatchError, match=r"tensor 'embed.weight': changed in place F32 \[13, 6\] \w+ in input 1, changed in place"):
        weft.merge([replace(lora(each, 1, TARGETS), base=None) for each in (base, other)])


def test_integers_that_differ(family, tmp_path):
    base, _, tuned, _ = family
    ckpt = write_checkpoint(tmp_path / "ints", {**tuned[0], "ids": np.array([0, 1, 2, 4])})
    with pytest.raises(MismatchError, match="'ids' is I64 and differs from the base"):
        weft.merge([ckpt], base)


def test_other_float_dtypes_are_compared_in_float32(family, tmp_path):
    base, start, tuned, _ = family
    values = {name: v.astype(np.float32) if name in SHAPES and v.dtype != np.float64 else v for name, v in tuned[0].items()}
    merged = values_of(weft.merge([write_checkpoint(tmp_path / "f32", values)], base))
    merged.pop("unchanged.weight", None)
    same(merged, slow_sum(taus_of(start, tuned[:1]), [1.0]))


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_nan_and_infinity(family, tmp_path, method):
    base, _, tuned, _ = family
    for number, value in enumerate((np.nan, np.inf)):
        values = {**tuned[0], "embed.weight": tuned[0]["embed.weight"].copy()}
        values["embed.weight"][4, 2] = value
        ckpt = write_checkpoint(tmp_path / f"bad{number}", values)
        with pytest.raises(InputError, match=rf"bad{number}: tensor 'embed.weight': the increment is NaN or infinite at 1 entries"):
            weft.merge([ckpt], base, method, out=tmp_path / "never.safetensors")
    assert not list(tmp_path.glob("*never*"))


def test_an_infinity_of_the_base_that_nobody_changed(tmp_path):
    mask = np.array([0, -np.inf, 1, np.nan], np.float32)
    base = write_checkpoint(tmp_path / "base", {"mask": mask})
    tuned = mask.copy()
    tuned[2] = 4
    ckpt = write_checkpoint(tmp_path / "tuned", {"mask": tuned})
    assert values_of(weft.merge([ckpt], base, "ties", density=1.0))["mask"].tolist() == [0, 0, 3, 0]
    weft.merge([ckpt], base, into=tmp_path / "into")
    assert Base.open(tmp_path / "into").tensor("mask").read().tobytes() == tuned.tobytes()


def test_wrong_use(family, tmp_path):
    base, _, _, ckpts = family
    with pytest.raises(UsageError, match="did you mean 'task-arithmetic'"):
        weft.merge(ckpts, base, "task-arithmetics")
    with pytest.raises(UsageError, match=r"(?s)densty.*did you mean 'density'.*scale: expected float"):
        weft.merge(ckpts, base, "ties", densty=0.1, scale="much")
    with pytest.raises(UsageError, match="density"):
        weft.merge(ckpts, base, "ties", density=0)
    with pytest.raises(UsageError, match="expected one weight for each of 3 inputs, got 2"):
        weft.merge(ckpts, base, weights=[1, 2])
    with pytest.raises(UsageError, match="weight 2 is nan"):
        weft.merge(ckpts, base, weights=[1, float("nan"), 1])
    with pytest.raises(UsageError, match="the weights add up to 0"):
        weft.merge(ckpts[:2], base, "linear", [1, -1], normalize=True)
    with pytest.raises(UsageError, match="every weight must be positive"):
        weft.merge(ckpts[:2], base, "ties", [1, -1], normalize=True)
    with pytest.raises(UsageError, match="a checkpoint: an update only in relation to its base"):
        weft.merge(ckpts)
    with pytest.raises(UsageError, match="a list"):
        weft.merge(str(ckpts[0].path), base)
    with pytest.raises(UsageError, match="a list"):
        weft.merge([], base)
    with pytest.raises(UsageError, match="not both"):
        weft.merge(ckpts, base, out=tmp_path / "x.safetensors", into=tmp_path / "x")
    with pytest.raises(UsageError, match="give the base"):
        weft.merge([lora(base, 1, TARGETS)], into=tmp_path / "x")
    with pytest.raises(InputError, match=r"one \.safetensors file"):
        weft.merge(ckpts, base, out=tmp_path / "x.bin")
    with pytest.raises(InputError, match="does not exist"):
        weft.merge(ckpts, base, out=tmp_path / "no" / "x.safetensors")
    for wrong in ({"threads": 0}, {"block": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            weft.merge(ckpts, base, **wrong)


def test_increments_read_what_a_model_does_not_change_as_zeros(family):
    base, _, _, ckpts = family
    models = Increments([lora(base, 1, {"half.weight": (5, 7)}), ckpts[0]], base, block=10)
    assert [models.touches(0, n) for n in ("half.weight", "embed.weight")] == [True, False]
    for block in models.blocks():
        first, second = models.read_all(block)
        assert first.shape == second.shape == block.shape and first.dtype == second.dtype == block.target.wide
        assert first.any() == (block.target.name == "half.weight") and second.any()


# --- in parts, and in one pair of factors


@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_parts_of_a_merge_join_to_the_merge(family, tmp_path, method):
    base, _, _, ckpts = family
    inputs = [*ckpts[:2], lora(base, 1, TARGETS)]
    weft.merge(inputs, base, method, out=tmp_path / "whole.safetensors")
    parts = [weft.merge(inputs, base, method, out=tmp_path / f"{i}.safetensors", shard=(i, 3)) for i in (1, 2, 3)]
    assert sum(len(each.entries) for each in parts) == len(Delta.load(tmp_path / "whole.safetensors").entries) and all(each.entries for each in parts)
    weft.merging.join([tmp_path / f"{i}.safetensors" for i in (3, 1, 2)], tmp_path / "joined.safetensors")
    assert (tmp_path / "joined.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_what_is_not_all_the_parts_of_one_merge(family, tmp_path):
    base, _, _, ckpts = family
    parts = [weft.merge(ckpts, base, shard=(i, 3)) for i in (1, 2, 3)]
    other = weft.merge(ckpts, base, shard=(3, 3), scale=0.5)
    with pytest.raises(MismatchError, match="part 2 of 3 is missing"):
        weft.merging.join([parts[0], parts[2]])
    with pytest.raises(MismatchError, match=r"part 1 of 3 is given twice\n.*part 3 of 3 is missing"):
        weft.merging.join([parts[0], parts[1], parts[0]])
    with pytest.raises(MismatchError, match="differ in recipe"):
        weft.merging.join([*parts[:2], other])
    with pytest.raises(MismatchError, match="is no part of a merge"):
        weft.merging.join([*parts, weft.merge(ckpts, base)])
    with pytest.raises(UsageError, match="got 4/3"):
        weft.merge(ckpts, base, shard=(4, 3))
    with pytest.raises(UsageError, match="a part of a merge is a delta"):
        weft.merge(ckpts, base, shard=(1, 3), into=tmp_path / "into")


def test_twenty_loras_become_one_pair_of_factors(family, tmp_path):
    base, _start, _, ckpts = family
    deltas = [lora(base, seed, TARGETS, rank=2) for seed in range(20)]
    weights = [1 / 20] * 20
    plain, merged = weft.merge(deltas, method="linear"), weft.merge(deltas, method="linear", rank=3, out=tmp_path / "merged.safetensors")
    for name, shape in TARGETS.items():
        (op,) = merged.entries[name].ops
        assert op.op == "lowrank" and merged.tensors[op.t["A"].key].shape == (3, shape[1])
        dense = sum(w * product(delta, name) for w, delta in zip(weights, deltas, strict=True))
        u, s, vt = np.linalg.svd(dense)
        best = (u[:, :3] * s[:3]) @ vt[:3]
        np.testing.assert_allclose(product(merged, name), best, atol=1e-5)
        np.testing.assert_allclose(plain.apply(name, np.zeros(shape)), dense, atol=1e-5)
    assert weft.merge(deltas, method="linear", energy=1.0).tensors["embed.weight//0.A"].shape == (6, 6)  # all of it: no more than the matrix's own rank
    assert merged.id != plain.id and merged.recipe["rank"] == 3
    mixed = weft.merge([*deltas, ckpts[0]], base, rank=3)  # what a checkpoint changes too is dense
    assert {entry.ops[0].op for entry in mixed.entries.values()} == {"dense"}
    with pytest.raises(UsageError, match="energy in"):
        weft.merge(deltas, energy=1.5)


def test_one_pair_of_factors_knows_what_a_frozen_pair_takes_out(family):
    base, _, _, _ = family
    rng = np.random.default_rng(6)
    fields = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in {"A": (2, 6), "B": (13, 2), "A0": (2, 6), "B0": (13, 2)}.items()}
    build = Builder(base)
    build.put("embed.weight", "lowrank", fields, scale=0.5)
    delta = build.done(recipe={"verb": "tune"})
    merged = weft.merge([delta, lora(base, 1, {"embed.weight": (13, 6)})], method="linear", rank=6)
    zero = np.zeros((13, 6), np.float32)
    want = 0.5 * delta.apply("embed.weight", zero) + 0.5 * product(lora(base, 1, {"embed.weight": (13, 6)}), "embed.weight")
    np.testing.assert_allclose(merged.apply("embed.weight", zero), want, atol=1e-5)
    assert len(merged.entries["embed.weight"].ops) == 1


def test_bits_that_differ_from_the_base_s_mean_nothing_after_another_delta(family):
    base, start, tuned, _ = family
    first = lora(base, 1, TARGETS)
    build = Builder(base)
    bits = start["embed.weight"].view(np.uint32) ^ tuned[0]["embed.weight"].view(np.uint32)
    build.put("embed.weight", "xor", {"bits": bits}, dtype="F32")
    second = build.done(over=(first.id,))
    with pytest.raises(MismatchError, match="'xor' must be the first op"):
        values_of(weft.merge([first, second], base, "ties"))
