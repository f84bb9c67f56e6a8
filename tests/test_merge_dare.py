"""dare: against a slow reference with a splitmix64 of its own, its masks, its identities and what the paper claims."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

import weft
from tests.test_merge import SHAPES, exact_delta, family, lora, same, slow_sum, slow_ties, taus_of, values_of, write_checkpoint  # noqa: F401
from weft.base import Base
from weft.delta import Builder
from weft.errors import UsageError

Values = dict[str, np.ndarray]
_64 = (1 << 64) - 1


def splitmix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _64
    return z ^ (z >> 31)


def key(seed: int, stream: int) -> int:
    return splitmix((splitmix((seed + 0x9E3779B97F4A7C15) & _64) + stream * 0x9E3779B97F4A7C15) & _64)


def sixteen_bits(seed: int, name: str, model: int, place: int) -> int:
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    word = (key(key(seed, word), model) + (place // 4 + 1) * 0x9E3779B97F4A7C15) & _64
    return (splitmix(word) >> 16 * (place % 4)) & 0xFFFF


def rate(drop: float) -> float:
    """The rate that is used."""
    return round(drop * 65536) / 65536


def slow_masked(taus: list[Values], drop: float, seed: int = 0) -> list[Values]:
    """m_i tau_i, entry by entry."""
    out = []
    for model, tau in enumerate(taus):
        kept = {name: [sixteen_bits(seed, name, model, place) >= 65536 * rate(drop) for place in range(t.size)] for name, t in tau.items()}
        out.append({name: np.asarray(np.where(np.array(kept[name]).reshape(t.shape), t, 0), t.dtype) for name, t in tau.items()})
    return out


@pytest.mark.parametrize(
    ("params", "weights"),
    [({}, None), ({"drop": 0.9, "seed": 7}, None), ({"drop": 0.5, "scale": 0.4, "seed": 2**64 - 1}, [1.0, -2.0, 0.5])],
    ids=str,
)
def test_dare_is_the_slow_reference(family, params, weights):  # noqa: F811
    base, start, tuned, ckpts = family
    p, scale = params.get("drop", 0.2), params.get("scale", 1.0)
    want = slow_sum(slow_masked(taus_of(start, tuned), p, params.get("seed", 0)), [scale / (1 - rate(p)) * w for w in weights or [1.0] * 3])
    for threads, block in ((1, 10**6), (2, 1), (3, 17)):
        same(values_of(weft.merge(ckpts, base, "dare", weights, threads=threads, block=block, **params)), want)


@pytest.mark.parametrize("signs", ["mass", "count"])
def test_signs_are_resolved_as_ties_does(family, signs):  # noqa: F811
    base, start, tuned, ckpts = family
    masked = slow_masked(taus_of(start, tuned), 0.6, 3)
    want = slow_ties(masked, density=1.0, elect=signs, scale=1.3 / (1 - rate(0.6)), weights=[0.5, 2.0, -1.0])
    for threads, block in ((1, 10**6), (2, 5)):
        same(values_of(weft.merge(ckpts, base, "dare", [0.5, 2.0, -1.0], drop=0.6, scale=1.3, seed=3, signs=signs, threads=threads, block=block)), want)
    assert any((want[name] != slow_sum(masked, [1.0] * 3)[name]).any() for name in want)


def test_shards_and_files_change_no_mask(family, tmp_path):  # noqa: F811
    """The same models in one shard, or as the deltas that an exact diff makes."""
    base, start, tuned, ckpts = family
    want = values_of(weft.merge(ckpts, base, "dare", drop=0.5))
    again = [write_checkpoint(tmp_path / f"again{k}", values, shards=4 - k) for k, values in enumerate(tuned)]
    same(values_of(weft.merge(again, write_checkpoint(tmp_path / "base1", start), "dare", drop=0.5)), want)
    same(values_of(weft.merge([exact_delta(base, start, values) for values in tuned], base, "dare", drop=0.5)), want)


def test_into_is_base_and_the_merged_increment_rounded_once(family, tmp_path):  # noqa: F811
    base, start, _, ckpts = family
    merged = values_of(weft.merge(ckpts, base, "dare", drop=0.5, signs="mass"))
    weft.merge(ckpts, base, "dare", drop=0.5, signs="mass", into=tmp_path / "into", threads=2, block=9)
    got = Base.open(tmp_path / "into")
    for name, (_, dtype) in SHAPES.items():
        want = start[name] if name not in merged else (start[name].astype(merged[name].dtype) + merged[name]).astype(dtype)
        assert got.tensor(name).read().tobytes() == want.tobytes(), name


# --- identities


def test_without_dropping_it_is_task_arithmetic(family):  # noqa: F811
    base, _, _, ckpts = family
    options: dict[str, Any] = {"weights": [1, -1, 0.25], "scale": 0.4}
    same(values_of(weft.merge(ckpts, base, "dare", drop=0, **options)), values_of(weft.merge(ckpts, base, "task-arithmetic", **options)))
    targets = {"embed.weight": (13, 6)}
    deltas = [lora(base, seed, targets) for seed in (1, 2)]
    merged, plain = (weft.merge(deltas, None, method, scale=0.4, **more) for method, more in (("dare", {"drop": 0}), ("task-arithmetic", {})))
    assert merged.entries == plain.entries and [op.op for op in merged.entries["embed.weight"].ops] == ["lowrank", "lowrank"]
    assert [op.op for op in weft.merge(deltas, method="dare", drop=0.1).entries["embed.weight"].ops] == ["dense"]


@pytest.mark.parametrize("signs", ["mass", "count"])
def test_without_dropping_elected_signs_are_ties_at_full_density(family, signs):  # noqa: F811
    base, _, _, ckpts = family
    same(values_of(weft.merge(ckpts, base, "dare", drop=0, signs=signs)), values_of(weft.merge(ckpts, base, "ties", density=1.0, elect=signs)))
    deltas = [lora(base, seed, {"embed.weight": (13, 6)}) for seed in (1, 2)]
    same(values_of(weft.merge(deltas, method="dare", drop=0, signs=signs)), values_of(weft.merge(deltas, method="ties", density=1.0, elect=signs)))


def test_one_model_with_elected_signs_is_the_sum(family):  # noqa: F811
    base, _, _, ckpts = family
    same(values_of(weft.merge(ckpts[:1], base, "dare", drop=0.5, signs="mass")), values_of(weft.merge(ckpts[:1], base, "dare", drop=0.5)))


# --- masks


@pytest.fixture
def flat(tmp_path):
    """An increment of 1 on each of 40,000 entries, so that the merged increment shows the mask."""
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal((100, 200)).astype(np.float32) for name in ("a", "b")}
    base = write_checkpoint(tmp_path / "base", start)
    build = Builder(base)
    for name in start:
        build.put(name, "dense", {"values": np.ones((100, 200), np.float32)})
    return base, build.done()


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9, 0.99])
def test_share_and_size_of_what_is_kept(flat, drop):
    """Binomial: 40,000 entries, five standard deviations. What is kept is 1/(1-p), nothing else is there."""
    _, delta = flat
    got = values_of(weft.merge([delta], method="dare", drop=drop))
    kept = np.concatenate([(values != 0).reshape(-1) for values in got.values()])
    assert abs(kept.mean() - (1 - drop)) < 5 * np.sqrt(drop * (1 - drop) / kept.size)
    assert {float(v) for values in got.values() for v in np.unique(values)} == {0.0, float(np.float32(1 / (1 - rate(drop))))}


def test_unbiased_over_seeds(family):  # noqa: F811
    """The mean of the merged increment over seeds goes to the plain sum: within five standard errors of every entry's own variance."""
    base, start, tuned, _ = family
    drop, runs = 0.5, 400
    taus = taus_of(start, tuned)
    deltas = [exact_delta(base, start, {n: v if n in ("embed.weight", "scale") else start[n] for n, v in values.items()}) for values in tuned]
    mean: Values = {name: np.zeros(SHAPES[name][0]) for name in ("embed.weight", "scale")}
    for seed in range(runs):
        for name, values in values_of(weft.merge(deltas, base, "dare", drop=drop, seed=seed, threads=1)).items():
            mean[name] += values / runs
    for name, got in mean.items():
        want = sum(tau[name].astype(np.float64) for tau in taus)
        error = np.sqrt(sum(np.square(tau[name].astype(np.float64)) for tau in taus) * drop / (1 - drop) / runs)
        assert (abs(got - want) < 5 * error).all()
        assert (error > 0).all()


def test_masks_of_seeds_tensors_and_models_are_independent(flat):
    _, delta = flat

    def mask(seed: int, count: int = 1) -> Values:
        """The mask of the last of `count` models."""
        weights = [0.0] * (count - 1) + [1.0]
        return {name: values != 0 for name, values in values_of(weft.merge([delta] * count, None, "dare", weights, drop=0.5, seed=seed)).items()}

    masks = [mask(0)["a"], mask(0)["b"], mask(1)["a"], mask(0, 2)["a"], mask(0, 3)["a"], mask(1, 2)["a"], mask(2)["a"]]
    for k, one in enumerate(masks):
        for other in masks[:k]:
            assert abs((one == other).mean() - 0.5) < 5 * 0.5 / np.sqrt(one.size)
    for axis in (0, 1):  # neither rows nor columns repeat
        assert np.unique(masks[0], axis=axis).shape == masks[0].shape


def test_a_model_more_leaves_the_masks_of_the_others(family):  # noqa: F811
    base, _, _, ckpts = family
    same(values_of(weft.merge(ckpts[:2], base, "dare")), values_of(weft.merge(ckpts, base, "dare", [1, 1, 0])))


def test_stored_copies_of_a_tied_tensor_stay_equal(tmp_path):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((30, 20)).astype(np.float32)
    base = write_checkpoint(tmp_path / "base", {"embed": w, "head": w})
    tuned = w + rng.standard_normal(w.shape).astype(np.float32)
    ckpt = write_checkpoint(tmp_path / "tuned", {"embed": tuned, "head": tuned})
    build = Builder(base)
    build.put("head", "dense", {"values": rng.standard_normal(w.shape).astype(np.float32)})
    weft.merge([ckpt, build.done(tied=(("embed", "head"),))], base, "dare", drop=0.5, into=tmp_path / "into")
    got = Base.open(tmp_path / "into")
    assert got.tensor("embed").read().tobytes() == got.tensor("head").read().tobytes() != w.tobytes()


def test_wrong_use(family):  # noqa: F811
    base, _, _, ckpts = family
    for wrong in ({"drop": 1}, {"drop": -0.1}, {"seed": -1}, {"signs": "some"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            weft.merge(ckpts, base, "dare", **wrong)


# --- what the paper claims


def logits(w: Values, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hidden = np.maximum(x @ w["a"].T + w["b"], 0)
    return hidden, hidden @ w["c"].T + w["d"]


def trained(w: Values, x: np.ndarray, y: np.ndarray, steps: int, seed: int) -> Values:
    """Adam, lr 1e-3, batches of 64, on a net with one hidden layer."""
    rng = np.random.default_rng(seed)
    w = dict(w)
    m, v = ({name: np.zeros(value.shape) for name, value in w.items()} for _ in range(2))
    for t in range(1, steps + 1):
        rows = rng.choice(len(x), 64)
        hidden, z = logits(w, x[rows])
        p = np.exp(z - z.max(1, keepdims=True))
        p = (p / p.sum(1, keepdims=True) - np.eye(10)[y[rows]]) / 64
        back = (p @ w["c"]) * (hidden > 0)
        for name, g in {"a": back.T @ x[rows], "b": back.sum(0), "c": p.T @ hidden, "d": p.sum(0)}.items():
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g * g
            w[name] = w[name] - 1e-3 * (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
    return {name: value.astype(np.float32) for name, value in w.items()}


def test_most_of_a_fine_tune_can_be_dropped_if_the_rest_is_rescaled(tmp_path):
    """A net for handwritten digits, tuned on digits that lie on their side. Four in five entries of the increment go, and its skill hardly
    does; without rescaling it is gone (Yu et al., on the redundancy of increments and on rescaling)."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    upright, labels = images[order] / 16, labels[order]
    lying = upright.reshape(-1, 8, 8).transpose(0, 2, 1).reshape(-1, 64)
    first = {"a": rng.standard_normal((512, 64)) / 8, "b": np.zeros(512), "c": rng.standard_normal((10, 512)) / 16, "d": np.zeros(10)}
    before = trained(first, upright[:1200], labels[:1200], 200, seed=1)
    after = trained(before, lying[:1200], labels[:1200], 120, seed=2)
    base, tuned = write_checkpoint(tmp_path / "base", before), write_checkpoint(tmp_path / "tuned", after)

    def accuracy(w: Values) -> float:
        return float((logits(w, lying[1200:])[1].argmax(1) == labels[1200:]).mean())

    def merged(seed: int, scale: float) -> float:
        delta = weft.merge([tuned], base, "dare", drop=0.8, scale=scale, seed=seed)
        return accuracy({name: delta.apply(name, w) for name, w in before.items()})

    assert accuracy(before) < 0.2 and accuracy(after) > 0.88
    for seed in range(3):
        assert merged(seed, 1.0) > 0.8
        assert merged(seed, 1 - 0.8) < 0.3  # what is left as it was
