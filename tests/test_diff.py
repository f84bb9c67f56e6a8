"""diff: what it writes, folded again, is the other checkpoint: to the bit, or as near as the mode says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.conftest import bits
from tests.test_fold import DTYPES, read_all, same, save, save_file
from weft import diffing as diff_module
from weft.base import Base
from weft.delta import Delta
from weft.diffing import diff
from weft.engine import lowrank
from weft.errors import MismatchError, UsageError
from weft.folding import fold
from weft.stored import Computed


def weights(dtype: Any, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"embed": (40, 16), "a.weight": (16, 24), "a.bias": (16,), "conv": (6, 4, 3, 3), "scale": (), "empty": (0, 4)}
    return {name: np.asarray(rng.standard_normal(shape), np.float32).astype(dtype) for name, shape in shapes.items()}


def tuned(arrays: dict[str, Any], seed: int = 1) -> dict[str, Any]:
    """Low-rank changes on two matrices, everything of a bias and the scalar, three entries of the convolution."""
    rng = np.random.default_rng(seed)
    out = {name: a.copy() for name, a in arrays.items()}
    for name in ("embed", "a.weight"):
        rows, columns = out[name].shape
        change = rng.standard_normal((rows, 3)) @ rng.standard_normal((3, columns))
        out[name] = (out[name].astype(np.float64) + 0.1 * change).astype(out[name].dtype)
    out["a.bias"] = (out["a.bias"].astype(np.float32) * np.float32(1.25)).astype(out["a.bias"].dtype)
    out["scale"] = np.asarray(3.5, out["scale"].dtype)
    out["conv"].reshape(-1)[[0, 100, 215]] = [1, 2, 3]
    return out


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("mode", diff_module.MODES)
def test_fold_gives_the_checkpoint_back(tmp_path: Path, code: str, mode: str) -> None:
    dtype = DTYPES[code]
    old = {**weights(dtype), "ids": np.arange(12), "mask": np.array([True, False, True])}
    new = {**tuned(old), "ids": np.arange(12)[::-1].copy(), "mask": np.array([True, True, False])}
    base, other = save(tmp_path / "old", old, shards=2), save(tmp_path / "new", dict(reversed(new.items())), shards=3)
    delta = diff(base, other, mode, **({"rank": 3} if mode == "lowrank" else {}))
    delta.save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    assert delta.recipe == {"verb": "diff", "method": mode, "config": {"rank": 3} if mode == "lowrank" else {}}
    assert set(delta.entries) == {"embed", "a.weight", "a.bias", "scale", "conv", "ids", "mask"}
    fold(base, [delta], tmp_path / "out", block=32)
    got = read_all(tmp_path / "out")
    if mode == "exact" or (mode != "lowrank" and code != "F32"):  # float32 holds the increments of the 16-bit types
        same(got, new)
        return
    eps = 2.0**-24 if code == "F32" else float(ml_dtypes.finfo(dtype).eps)
    for name in new:
        if name in ("ids", "mask"):
            assert bits(got[name]) == bits(new[name])
        elif name == "conv" and mode == "lowrank":  # three entries anywhere are of rank 3: nothing is lost
            np.testing.assert_allclose(got[name].astype(np.float64), new[name].astype(np.float64), rtol=0, atol=20 * eps * 3)
        else:
            np.testing.assert_allclose(
                got[name].astype(np.float64), new[name].astype(np.float64), rtol=0, atol=4 * eps * abs(new[name].astype(np.float64)).max(initial=0)
            )


def test_exact_keeps_every_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    for code, dtype in {**DTYPES, "F64": np.float64, "F8": ml_dtypes.float8_e5m2}.items():
        size = np.dtype(dtype).itemsize
        raw = rng.integers(0, 256, (50, 20 * size)).astype(np.uint8)  # every kind of NaN, infinity and zero
        changed = raw.copy()
        changed[10:12] = rng.integers(0, 256, (2, 20 * size))
        old[code], new[code] = raw.view(dtype), changed.view(dtype)
    old["zero"], new["zero"] = np.zeros(100, np.float32), np.zeros(100, np.float32)
    new["zero"][7] = -0.0
    nan = np.full(100, np.nan, np.float32)
    old["nan"], new["nan"], old["same"], new["same"] = nan, nan.copy(), nan, nan.copy()
    new["nan"].view(np.uint32)[3] ^= 1
    base = save(tmp_path / "old", old)
    delta = diff(base, save(tmp_path / "new", new, shards=2), block=64)
    assert set(delta.entries) == {*DTYPES, "F64", "F8", "zero", "nan"}
    assert delta.get("zero//0.index").tolist() == [7] and delta.get("nan//0.index").tolist() == [3]
    fold(base, [delta], tmp_path / "out", block=100)
    same(read_all(tmp_path / "out"), new)


def test_exact_takes_the_smaller_form(tmp_path: Path) -> None:
    old = {name: np.zeros((10, 10), np.float32) for name in "abc"}
    new = {name: array.copy() for name, array in old.items()}
    for name, count in {"a": 49, "b": 50, "c": 100}.items():
        new[name].reshape(-1)[:count] = 1
    delta = diff(save(tmp_path / "old", old), save(tmp_path / "new", new))
    assert ["index" in delta.entries[name].ops[0].t for name in "abc"] == [True, False, False]
    assert delta.nbytes == 49 * 8 + 400 + 400


def test_structure_and_config(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    old = {f"layer.{k}": rng.standard_normal((4, 4)).astype(np.float32) for k in range(3)} | {"gone": np.ones(3, np.int8)}
    new: dict[str, Any] = {
        "layer.0": old["layer.0"], "layer.1": rng.standard_normal((5, 4)).astype(np.float32), "layer.2": old["layer.2"].astype(np.float16),
        "layer.3": old["layer.0"], "layer.4": old["layer.0"].reshape(2, 8), "head": rng.standard_normal((2, 4)).astype(np.float32),
    }  # fmt: skip
    was = {"n": 3, "gone": 1, "null": None, "inner": {"a": 1, "b": [1, 2]}, "flag": True, "kind": {"x": 1}, "transformers_version": "1", "old_null": None}
    now = {
        "n": 5,
        "null": 4,
        "inner": {"a": 1, "b": [1, 2.5]},
        "flag": 1,
        "kind": 7,
        "more": {"deep": {"er": []}},
        "transformers_version": "2",
        "_name_or_path": "x",
    }
    base, other = save(tmp_path / "old", old, config=was), save(tmp_path / "new", new, shards=2, config=now)
    for mode in ("exact", "sparse"):
        delta = diff(base, other, mode)
        changes = {name: entry.change.kind for name, entry in delta.entries.items() if entry.change}
        assert changes == {"gone": "remove", "layer.1": "replace", "layer.2": "replace", "layer.3": "copy", "layer.4": "add", "head": "add"}
        assert delta.config == {"n": 5, "gone": None, "null": 4, "inner": {"b": [1, 2.5]}, "flag": 1, "kind": 7, "more": {"deep": {"er": []}}}
        fold(base, [delta], tmp_path / mode)
        same(read_all(tmp_path / mode), new)
        folded = json.loads((tmp_path / mode / "config.json").read_text())
        expected = {
            "n": 5,
            "null": 4,
            "inner": {"a": 1, "b": [1, 2.5]},
            "flag": 1,
            "kind": 7,
            "more": {"deep": {"er": []}},
            "transformers_version": "1",
            "old_null": None,
        }
        assert folded == expected and folded["flag"] is not True
    assert delta.notes["summary"] == {"tensors": 2, "entries": 36, "added": 3, "removed": 1}
    only = diff(base, save(tmp_path / "only", old, config={**was, "n": 4}))
    assert not only.entries and only.config == {"n": 4}


@pytest.mark.parametrize("stored", ["one", "both"])
def test_tied_embeddings(tmp_path: Path, stored: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True
    )
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / str(seed))
        arrays = read_all(tmp_path / str(seed))
        assert "lm_head.weight" not in arrays
        states.append(arrays)
    if stored == "both":
        states[1]["lm_head.weight"] = states[1]["model.embed_tokens.weight"].copy()
    other = save(tmp_path / "other", states[1], shards=3, config=json.loads((tmp_path / "1/config.json").read_text()))
    base = Base.open(tmp_path / "0")
    fold(base, [diff(base, other)], tmp_path / "out")
    same(read_all(tmp_path / "out"), states[1])
    live = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert bits(live.lm_head.weight) == bits(states[1]["model.embed_tokens.weight"])


def test_same_id_and_file_for_any_sharding_threads_and_blocks(tmp_path: Path) -> None:
    old = weights(np.float32)
    new = tuned(old)
    pairs = [(save(tmp_path / f"old{n}", old, shards=n), save(tmp_path / f"new{n}", dict(reversed(new.items())), shards=n)) for n in (1, 3)]
    for mode, settings in {"exact": {}, "dense": {}, "lowrank": {"energy": 0.95}, "sparse": {"tolerance": 0.01}}.items():
        seen = set()
        for number, (threads, block) in enumerate([(1, None), (2, 7), (3, 1000)]):
            delta = diff(*pairs[number % 2], mode, threads=threads, block=block, notes={"who": "me"}, **settings)
            id = delta.save(tmp_path / "delta.safetensors")
            assert id == delta.id and delta.notes["who"] == "me"
            seen.add((id, (tmp_path / "delta.safetensors").read_bytes()))
        assert len(seen) == 1, mode


def test_lowrank_is_the_best_one_and_energy_is_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    spectrum = 0.7 ** np.arange(40)
    u, v = np.linalg.qr(rng.standard_normal((60, 40)))[0], np.linalg.qr(rng.standard_normal((40, 40)))[0]
    change = (u * spectrum) @ v.T
    w = rng.standard_normal((60, 40))
    base = save(tmp_path / "old", {"w": w, "same": np.ones((3, 3))})
    other = save(tmp_path / "new", {"w": w + change, "same": np.ones((3, 3))})
    for rank in (1, 4, 13):
        delta = diff(base, other, "lowrank", rank=rank)
        a, b = delta.get("w//0.A"), delta.get("w//0.B")
        assert a.shape == (rank, 40) and b.shape == (60, rank)
        lost = np.linalg.norm(change - b @ a)
        assert lost == pytest.approx(np.sqrt((spectrum[rank:] ** 2).sum()), rel=1e-6)
        assert (np.take_along_axis(a, abs(a).argmax(1)[:, None], 1) > 0).all()
        share = lost**2 / (spectrum**2).sum()
        assert delta.notes["summary"]["ranks"] == {"w": rank} and delta.notes["summary"]["lost"] == pytest.approx(share, rel=1e-2)
    energies = np.cumsum(spectrum**2) / (spectrum**2).sum()
    for energy in (0.5, 0.9, 0.999):
        delta = diff(base, other, "lowrank", energy=energy)
        assert delta.get("w//0.A").shape[0] == int((energies >= energy).argmax()) + 1
    assert diff(base, other, "lowrank", energy=1.0).entries["w"].ops[0].op == "dense", "all of it takes less room whole"


def test_lowrank_of_large_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The randomised way, which only large matrices take, against the whole decomposition."""
    rng = np.random.default_rng(8)
    change = rng.standard_normal((300, 150)) * 0.01 + rng.standard_normal((300, 5)) @ rng.standard_normal((5, 150))
    w = rng.standard_normal((300, 150))
    base, other = save(tmp_path / "old", {"w": w}), save(tmp_path / "new", {"w": w + change})
    whole = {"rank": diff(base, other, "lowrank", rank=5), "energy": diff(base, other, "lowrank", energy=0.9)}
    flat = diff(base, other, "lowrank", rank=20)
    monkeypatch.setattr(lowrank, "_DIRECT", 0)
    for name, settings in {"rank": {"rank": 5}, "energy": {"energy": 0.9}}.items():
        fast = diff(base, other, "lowrank", **settings)
        assert fast.get("w//0.A").shape == whole[name].get("w//0.A").shape
        np.testing.assert_allclose(fast.get("w//0.A"), whole[name].get("w//0.A"), rtol=0, atol=1e-9)
        np.testing.assert_allclose(fast.get("w//0.B"), whole[name].get("w//0.B"), rtol=0, atol=1e-9)
    lost = [np.linalg.norm(change - d.get("w//0.B") @ d.get("w//0.A")) for d in (diff(base, other, "lowrank", rank=20), flat)]
    assert lost[0] <= lost[1] * 1.01, "a flat tail is the hard case"


def test_a_rank_that_saves_nothing_is_stored_dense(tmp_path: Path) -> None:
    old = weights(np.float32)
    base = save(tmp_path / "old", old)
    delta = diff(base, save(tmp_path / "new", tuned(old)), "lowrank", rank=11)
    kinds = {name: entry.ops[0].op for name, entry in delta.entries.items()}
    assert kinds == {"embed": "lowrank", "a.weight": "dense", "a.bias": "dense", "conv": "lowrank", "scale": "dense"}
    assert delta.get("conv//0.A").shape == (3, 36)


def test_sparse_with_a_tolerance(tmp_path: Path) -> None:
    old = np.zeros((5, 5), np.float32)
    new = old.copy()
    new.reshape(-1)[[2, 9, 20]] = [0.5, -0.25, 1e-4]
    delta = diff(save(tmp_path / "old", {"w": old}), save(tmp_path / "new", {"w": new}), "sparse", tolerance=1e-3)
    assert delta.get("w//0.index").tolist() == [2, 9] and delta.get("w//0.values").tolist() == [0.5, -0.25]
    assert delta.get("w//0.index").dtype == np.int32 and delta.recipe["config"] == {"tolerance": 1e-3}
    assert isinstance(delta.tensors["w//0.index"], Computed)


def test_checkpoints_of_other_models_are_refused(tmp_path: Path) -> None:
    one, other = ({name: np.ones(3, np.float32)} for name in ("here", "there"))
    with pytest.raises(MismatchError, match=r"no tensor in common: .*old \('here', \.\.\.\) and .*new \('there', \.\.\.\)"):
        diff(save(tmp_path / "old", one), save(tmp_path / "new", other))


def test_identical_checkpoints_are_refused(tmp_path: Path) -> None:
    arrays = weights(ml_dtypes.bfloat16) | {"nan": np.full(3, np.nan, np.float32)}
    base = save(tmp_path / "old", arrays, config={"a": 1, "transformers_version": "4"})
    other = save(tmp_path / "new", arrays, shards=2, config={"a": 1, "_name_or_path": "old"})
    for mode in diff_module.MODES:
        with pytest.raises(MismatchError, match="the checkpoints are identical"):
            diff(base, other, mode, rank=1 if mode == "lowrank" else None)


def test_changes_that_are_no_increments_are_refused(tmp_path: Path) -> None:
    old, new = np.ones((3, 3), np.float16), np.ones((3, 3), np.float16)
    new[1, 1] = np.inf
    base, other = save(tmp_path / "old", {"w": old}), save(tmp_path / "new", {"w": new})
    for mode in ("dense", "lowrank", "sparse"):
        with pytest.raises(MismatchError, match=r"new: tensor 'w': the change of entry 4 .* from 1.0 to inf"):
            diff(base, other, mode, rank=1 if mode == "lowrank" else None)
    fold(base, [diff(base, other)], tmp_path / "out")
    same(read_all(tmp_path / "out"), {"w": new})
    # NaNs that stay as they are need no increment
    old[0, 0] = new[0, 0] = np.nan
    new[1, 1] = 2
    base, other = save(tmp_path / "old2", {"w": old}), save(tmp_path / "new2", {"w": new})
    fold(base, [diff(base, other, "dense")], tmp_path / "out2")
    same(read_all(tmp_path / "out2"), {"w": new})


@pytest.mark.parametrize(
    ("mode", "settings", "said"),
    [
        ("lowrnk", {}, "did you mean 'lowrank'"),
        ("lowrank", {}, "either a rank or an energy"),
        ("lowrank", {"rank": 2, "energy": 0.5}, "either a rank or an energy"),
        ("lowrank", {"rank": 0}, "at least 1, got 0"),
        ("lowrank", {"energy": 1.5}, "share"),
        ("dense", {"rank": 2}, "not to dense"),
        ("exact", {"tolerance": 0.1}, "not to exact"),
        ("sparse", {"tolerance": -1.0}, "at least 0"),
        ("exact", {"threads": 0}, "threads"),
    ],
)
def test_wrong_usage(tmp_path: Path, mode: str, settings: dict[str, Any], said: str) -> None:
    save_file(tmp_path / "a.safetensors", {"w": np.ones(2)})
    base = Base.open(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=said):
        diff(base, base, mode, **settings)


def test_a_live_model_can_be_either_side(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, max_position_embeddings=9))
    model.save_pretrained(tmp_path / "base")
    base = Base.open(tmp_path / "base")
    with torch.no_grad():
        model.pooler.dense.weight += torch.randn(8, 8)
    delta = diff(base, Base.of(model))
    assert set(delta.entries) == {"pooler.dense.weight"} and not delta.config
    fold(base, [delta], tmp_path / "out")
    assert bits(read_all(tmp_path / "out")["pooler.dense.weight"]) == bits(model.pooler.dense.weight)


def test_no_torch(tmp_path: Path) -> None:
    old = weights(ml_dtypes.bfloat16)
    save(tmp_path / "old", old)
    save(tmp_path / "new", tuned(old))
    code = (
        "import sys; import weft.folding, weft.diffing; assert 'numpy' not in sys.modules\n"
        "from weft.base import Base\n"
        "a, b = Base.open(sys.argv[1]), Base.open(sys.argv[2])\n"
        "for n, mode in enumerate(weft.diffing.MODES):\n"
        "    d = weft.diff(a, b, mode, rank=2 if mode == 'lowrank' else None)\n"
        "    weft.fold(a, [d], sys.argv[3] + mode)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "old"), str(tmp_path / "new"), str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
