"""fold: every op as its definition says, the same bytes for any threads, blocks and sharding, and no half results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.conftest import bits, raw_for
from weft import ops
from weft.base import Base
from weft.delta import Builder, Delta
from weft.engine import stream
from weft.errors import InputError, MismatchError, UsageError, WeftError
from weft.file import container_header
from weft.folding import fold
from weft.ops import At, Generator, chain
from weft.stored import Computed, Tensor, hold, read_container

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
WEIGHT_OPS = [kind for kind in ops.kinds() if ops.get(kind).on == "weight"]
SHAPES = [(24, 16), (12, 8, 3, 3), (24,), (3, 8, 6)]


def save_file(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    tensors = {name: hold(np.asarray(a)) for name, a in arrays.items()}
    with open(path, "wb") as out:
        out.write(container_header(tensors, list(tensors), {"format": "pt"} if metadata is None else metadata))
        for tensor in tensors.values():
            out.writelines(tensor.blocks())


def save(folder: Path, arrays: Mapping[str, Any], *, shards: int = 1, config: Mapping[str, Any] | None = None) -> Base:
    """A checkpoint on disk, with its tensors dealt out to `shards` files in the order in which they are given."""
    folder.mkdir(parents=True)
    names = list(arrays)
    if shards == 1:
        save_file(folder / "model.safetensors", arrays)
    else:
        weight_map = {name: f"model-{1 + k * shards // len(names):05}-of-{shards:05}.safetensors" for k, name in enumerate(names)}
        for file in set(weight_map.values()):
            save_file(folder / file, {name: arrays[name] for name in names if weight_map[name] == file})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1, "made_by": "x"}, "weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return Base.open(folder)


def read_all(path: Path) -> dict[str, Any]:
    return {name: tensor.read() for name, tensor in Base.open(path).tensors.items()}


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    assert sorted(a) == sorted(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert bits(a[name]) == bits(b[name]), name


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def every_op(dtype: Any) -> tuple[dict[str, Any], Any]:
    """A tensor for every kind of op and shape, some untouched ones, and a function that puts the ops into a Builder."""
    gen = Generator(3)
    arrays = {f"{kind}.{len(shape)}d": gen.normal(shape).astype(dtype) for kind in WEIGHT_OPS for shape in SHAPES}
    arrays |= {"free.a": gen.normal((5, 3)).astype(dtype), "free.b": gen.normal((7,)).astype(dtype), "scalar": gen.normal((1,)).astype(dtype).reshape(())}
    arrays = dict(sorted(arrays.items(), key=lambda item: bits(item[1])))

    def put(build: Builder) -> None:
        draw = Generator(4)
        for kind in WEIGHT_OPS:
            for shape in SHAPES:
                t = ops.get(kind).example(shape, draw)
                t, cfg = raw_for(t, dtype) if ops.get(kind).raw else (t, {})
                build.put(f"{kind}.{len(shape)}d", kind, t, **cfg)
        build.put("lowrank.2d", "magnitude", ops.get("magnitude").example((24, 16), draw))
        build.put("dense.2d", "dense", {"values": draw.normal((4, 16))}, at=At(index=((8, 12),)), scale=-0.5)
        build.put("scalar", "dense", {"values": draw.normal((1,)).reshape(())})

    return arrays, put


@pytest.mark.parametrize("code", DTYPES)
def test_every_op_for_any_threads_blocks_and_sharding_is_its_definition(tmp_path: Path, code: str) -> None:
    arrays, put = every_op(DTYPES[code])
    single, sharded = save(tmp_path / "single", arrays), save(tmp_path / "sharded", arrays, shards=3)
    build = Builder(single)
    put(build)
    delta = build.done()
    expected = {name: chain.rewrite(a, delta.entries[name].ops, delta.get) if name in delta.entries else a for name, a in arrays.items()}
    assert all(bits(expected[name]) != bits(arrays[name]) for name in delta.entries)
    delta.save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    runs = [(single, 1, None), (single, 2, 16), (sharded, 1, 1), (sharded, 2, 50), (sharded, 3, None)]
    for number, (base, threads, block) in enumerate(runs):
        report = fold(base, [delta], tmp_path / f"out{number}", threads=threads, block=block)
        same(read_all(tmp_path / f"out{number}"), expected)
        assert set(report.tensors) == set(delta.entries)
    assert files_of(tmp_path / "out0") == files_of(tmp_path / "out1")
    assert files_of(tmp_path / "out2") == files_of(tmp_path / "out3") == files_of(tmp_path / "out4")


def test_several_deltas_apply_in_order_with_one_rounding(tmp_path: Path, rng: np.random.Generator) -> None:
    w = rng.standard_normal((32, 16)).astype(ml_dtypes.bfloat16)
    base = save(tmp_path / "base", {"w": w})
    deltas = []
    for seed in (1, 2):
        gen, build = Generator(seed), Builder(base)
        build.put("w", "lowrank", {"A": gen.normal((2, 16)), "B": gen.normal((32, 2), 1e-2)})  # the same keys in both
        build.put("w", "scale_shift", {"scale": 1 + gen.normal((32,), 0.1)})
        deltas.append(build.done())
    a, b = deltas
    fold(base, [a, b], tmp_path / "ab", block=48)
    wide = w.astype(np.float32)
    expected = b.apply("w", a.apply("w", wide)).astype(ml_dtypes.bfloat16)
    got = read_all(tmp_path / "ab")["w"]
    assert bits(got) == bits(expected)
    once = b.apply("w", a.apply("w", wide).astype(ml_dtypes.bfloat16).astype(np.float32)).astype(ml_dtypes.bfloat16)
    assert bits(got) != bits(once), "rounded between the deltas"
    fold(base, [b, a], tmp_path / "ba")
    assert bits(read_all(tmp_path / "ba")["w"]) != bits(got)


def test_untouched_bytes_headers_and_files_are_kept(tmp_path: Path, rng: np.random.Generator) -> None:
    odd = rng.integers(0, 1 << 32, (64,), dtype=np.uint64).astype(np.uint32)
    odd[:4] = [0x7F800001, 0xFFC12345, 0x80000000, 0x7FA00000]  # NaNs with payloads, minus zero
    nans = odd.view(np.float32)
    arrays = {"b": nans, "a": rng.standard_normal((8, 8)).astype(np.float32), "c": nans[::-1].copy(), "n": np.arange(5), "e": np.zeros((0, 3), np.float32)}
    folder = tmp_path / "base"
    save(folder, arrays, config={"model_type": "x", "zeta": 1, "alpha": [1.5]})
    # an oddly made header: spaces, its own order of keys, more metadata
    header = {"__metadata__": {"z": "1", "format": "pt"}, **json.loads((folder / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")}
    header["__metadata__"] = {"z": "1", "format": "pt"}
    data = (folder / "model.safetensors").read_bytes()
    data = data[8 + int.from_bytes(data[:8], "little") :]
    text = json.dumps(header, indent=1).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "tokenizer.json").write_text("{}")
    (folder / ".hidden").write_text("x")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    for name in ("1_Pooling/config.json", "onnx/model.onnx", "onnx/config.json", ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    base = Base.open(folder)
    build = Builder(base)
    build.put("a", "dense", {"values": rng.standard_normal((8, 8)).astype(np.float32)})
    build.put("c", "sparse", {"index": np.array([10, 40]), "values": np.array([0.5, 1.0], np.float32)})
    fold(base, [build.done()], tmp_path / "out")
    got = files_of(tmp_path / "out")
    assert sorted(got) == ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert got["config.json"] == (folder / "config.json").read_bytes()
    assert got["model.safetensors"][: len(text) + 8] == len(text).to_bytes(8, "little") + text
    new = read_all(tmp_path / "out")
    same({k: new[k] for k in "bne"}, {k: arrays[k] for k in "bne"})
    left, right = new["c"].view(np.uint32), arrays["c"].view(np.uint32)
    assert set(np.flatnonzero(left != right)) <= {10, 40}
    assert bits(new["a"]) != bits(arrays["a"])


def test_kernel_copy_and_its_fallback_agree(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tmp_path / "base", {str(k): rng.standard_normal((50, 50)).astype(np.float32) for k in range(4)}, shards=2)
    build = Builder(base)
    build.put("2", "sparse", {"index": np.array([3]), "values": np.array([1.0], np.float32)})
    delta = build.done()
    fold(base, [delta], tmp_path / "kernel")

    def unsupported(*_: Any) -> int:
        raise OSError(38, "not here")

    monkeypatch.setattr(os, "copy_file_range", unsupported, raising=False)
    fold(base, [delta], tmp_path / "plain", threads=2)
    assert files_of(tmp_path / "kernel") == files_of(tmp_path / "plain")
    changed = read_all(tmp_path / "plain")
    assert changed["2"].reshape(-1)[3] != base.tensor("2").read().reshape(-1)[3]


@pytest.mark.parametrize("shards", [1, 2])
def test_structure(tmp_path: Path, rng: np.random.Generator, shards: int) -> None:
    arrays: dict[str, Any] = {f"layer.{k}": rng.standard_normal((6, 4)).astype(ml_dtypes.bfloat16) for k in range(4)}
    arrays["steps"] = np.arange(7)
    base = save(tmp_path / "base", arrays, shards=shards, config={"layers": 4, "drop": 1, "keep": {"a": 1, "b": 2}})
    build = Builder(base)
    head = rng.standard_normal((3, 4)).astype(np.float32)
    build.add("head", head)
    build.put("head", "dense", {"values": np.ones((3, 4), np.float32)}, scale=0.5)
    wider = rng.standard_normal((9, 4)).astype(ml_dtypes.bfloat16)
    build.add("layer.1", wider, kind="replace")
    build.copy("layer.4", "layer.0")
    build.copy("layer.5", "layer.0")
    build.put("layer.5", "dense", {"values": rng.standard_normal((6, 4)).astype(np.float32)})
    build.copy("layer.3", "layer.2")
    build.remove("steps")
    build.put("layer.0", "dense", {"values": rng.standard_normal((6, 4)).astype(np.float32)})
    delta = build.done(config={"layers": 6, "drop": None, "keep": {"b": 3}})
    report = fold(base, [delta], tmp_path / "out", block=8)
    get = delta.get
    expected = {
        "head": (head + np.float32(0.5)).astype(np.float32),
        "layer.0": chain.rewrite(arrays["layer.0"], delta.entries["layer.0"].ops, get),
        "layer.1": wider,
        "layer.2": arrays["layer.2"],
        "layer.3": arrays["layer.2"],
        "layer.4": arrays["layer.0"],
        "layer.5": chain.rewrite(arrays["layer.0"], delta.entries["layer.5"].ops, get),
    }
    same(read_all(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"layers": 6, "keep": {"a": 1, "b": 3}}
    assert {name: t.change for name, t in report.tensors.items() if t.change} == {
        "head": "add", "layer.1": "replace", "layer.3": "copy", "layer.4": "copy", "layer.5": "copy", "steps": "remove",
    }  # fmt: skip
    if shards > 1:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": sum(a.nbytes for a in expected.values()), "made_by": "x"}
        assert set(index["weight_map"]) == set(expected) and index["weight_map"]["head"] == "model-00002-of-00002.safetensors"
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert read_container(file)[1] == {"format": "pt"}


def test_a_shard_whose_tensors_are_all_removed_is_not_written(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"a": np.ones(3, np.float32), "b": np.ones(4, np.float32)}, shards=2)
    build = Builder(base)
    build.remove("a")
    fold(base, [build.done()], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    same(read_all(tmp_path / "out"), {"b": np.ones(4, np.float32)})


def test_a_classification_head_loads_in_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20)
    BertModel(config).save_pretrained(tmp_path / "base")
    base = Base.open(tmp_path / "base")
    gen, build = Generator(1), Builder(base)
    build.add("classifier.weight", gen.normal((3, 16)))
    build.add("classifier.bias", gen.normal((3,)))
    for name in base.names:
        if name.endswith("query.weight"):
            build.put(name, "lowrank", {"A": gen.normal((4, 16)), "B": gen.normal((16, 4))})
    patch = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "x", "1": "y", "2": "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    delta = build.done(config=patch)
    fold(base, [delta], tmp_path / "out")
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    state = model.state_dict()
    for name, value in read_all(tmp_path / "out").items():
        live = name if name in state else f"bert.{name}"
        assert bits(state[live]) == bits(value), name
    assert bits(state["classifier.weight"]) == bits(delta.get("classifier.weight//0.values"))


def test_integer_tensors_and_assign(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {"q": rng.integers(0, 255, (8, 6)).astype(np.uint8), "n": rng.integers(-9, 9, (30,)), "f8": rng.standard_normal(9).astype(ml_dtypes.float8_e4m3fn)}
    base = save(tmp_path / "base", arrays)
    build = Builder(base)
    build.put("q", "assign", {"index": np.array([0, 7, 47]), "values": np.array([1, 2, 3], np.uint8)})
    build.put("n", "assign", {"values": arrays["n"][::-1].copy()})
    build.put("f8", "assign", {"index": np.array([2]), "values": np.array([0.25], ml_dtypes.float8_e4m3fn)})
    report = fold(base, [build.done()], tmp_path / "out", block=12)
    got = read_all(tmp_path / "out")
    expected = arrays["q"].copy()
    expected.reshape(-1)[[0, 7, 47]] = [1, 2, 3]
    assert bits(got["q"]) == bits(expected) and bits(got["n"]) == bits(arrays["n"][::-1])
    assert float(got["f8"][2]) == 0.25
    assert report.tensors["n"].relative is None


def test_report(tmp_path: Path, rng: np.random.Generator) -> None:
    w = rng.standard_normal((40, 30)).astype(ml_dtypes.bfloat16)
    base = save(tmp_path / "base", {"w": w, "v": np.ones(4, np.float32), "far": np.full((5,), 1e9, np.float32)})
    build = Builder(base)
    change = rng.standard_normal((40, 30)).astype(np.float32) * np.float32(1e-3)
    build.put("w", "dense", {"values": change})
    build.put("far", "dense", {"values": np.full((5,), 1e-3, np.float32)})
    delta = build.done()
    report = fold(base, [delta], tmp_path / "out", block=90)
    new = read_all(tmp_path / "out")["w"].astype(np.float64)
    old = w.astype(np.float64)
    found = report.tensors["w"]
    assert found.entries == 1200 and found.changed == int((new != old).sum()) and 0 < found.changed < 1200
    assert found.relative == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old), rel=1e-6)  # the digits that are promised
    assert report.lost == ["far"] and report.tensors["far"].relative == 0.0
    whole = np.sqrt((old**2).sum() + 5e18)
    assert report.relative == pytest.approx(np.linalg.norm(new - old) / whole, rel=1e-12)
    assert report.deltas == (delta.id,) and report.base == base.fingerprint
    text = json.loads(json.dumps(report.json()))
    assert text["changed"] == report.changed and text["tensors"]["w"]["relative"] == found.relative
    again = fold(base, [delta], tmp_path / "again", block=90, threads=2)
    assert again.tensors == report.tensors


def test_nothing_changed_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"w": np.ones((4, 4), np.float32)}, config={"a": 1})
    build = Builder(base)
    build.put("w", "dense", {"values": np.full((4, 4), 1e-12, np.float32)})
    tiny = build.done()
    for deltas in ([tiny], []):
        with pytest.raises(MismatchError, match="changes nothing"):
            fold(base, deltas, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["base"]
    report = fold(base, [tiny], tmp_path / "out", allow_noop=True)
    assert report.changed == 0 and files_of(tmp_path / "out") == files_of(tmp_path / "base")
    patch = Delta(base.fingerprint, {}, {}, config={"a": 2})
    assert fold(base, [patch], tmp_path / "patched").config_changed


def test_what_does_not_fit_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    base = save(tmp_path / "base", {"w": rng.standard_normal((4, 4)).astype(np.float32), "v": np.ones((4, 4), np.float32)})
    other = save(tmp_path / "other", {"w": np.zeros((4, 4), np.float32)})

    def dense(**manifest: Any) -> Delta:
        build = Builder(base)
        build.put("w", "dense", {"values": rng.standard_normal((4, 4)).astype(np.float32)})
        return build.done(**manifest)

    first = dense()
    second = dense(over=(first.id,))
    with pytest.raises(MismatchError, match="made for base"):
        fold(other, [first], tmp_path / "out")
    with pytest.raises(MismatchError, match=f"missing: {first.id[:12]}"):
        fold(base, [second], tmp_path / "out")
    with pytest.raises(MismatchError, match="missing"):
        fold(base, [second, first], tmp_path / "out")
    fold(base, [first, second], tmp_path / "good")

    gen, build = Generator(1), Builder(base)
    kind = next(kind for kind in ops.kinds() if ops.get(kind).on == "module")
    build.put("@module/encoder", kind, ops.get(kind).example((4, 4), gen))
    with pytest.raises(MismatchError, match=rf"@module/encoder \({kind}\)"):
        fold(base, [first, build.done()], tmp_path / "out")

    build = Builder(base)
    build.add("v2", np.ones(3, np.float32))
    added = build.done()
    grown = save(tmp_path / "grown", {"w": np.ones(3, np.float32), "v2": np.ones(3, np.float32)})
    with pytest.raises(MismatchError, match="v2: the delta adds it"):
        fold(grown, [Delta(None, added.entries, added.tensors)], tmp_path / "out")
    build = Builder(base)
    build.add("w", np.ones(3, np.float32), kind="replace")
    with pytest.raises(MismatchError, match="w: the deltas change it in ways that do not combine"):
        fold(base, [first, build.done()], tmp_path / "out")
    with pytest.raises(UsageError):
        fold(base, [first], tmp_path / "out", threads=0)
    with pytest.raises(InputError, match="exists already"):
        fold(base, [first], tmp_path / "good")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_positions_outside_a_tensor_are_refused_by_name(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"w": np.ones((4, 4), np.float32)})
    build = Builder(base)
    build.put("w", "sparse", {"index": np.array([3, 99]), "values": np.ones(2, np.float32)}, at=At(transpose=(1, 0)))
    with pytest.raises(InputError, match="w: "):
        fold(base, [build.done()], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_one_file_in_one_file_out(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {"w": rng.standard_normal((4, 4)).astype(np.float32), "v": np.arange(3)}
    save_file(tmp_path / "weights.safetensors", arrays)
    base = Base.open(tmp_path / "weights.safetensors")
    build = Builder(base)
    build.put("w", "dense", {"values": np.ones((4, 4), np.float32)})
    delta = build.done()
    report = fold(base, [delta], tmp_path / "new.safetensors")
    expected = {**arrays, "w": arrays["w"] + np.float32(1)}
    same(read_all(tmp_path / "new.safetensors"), expected)
    assert report.path == tmp_path / "new.safetensors"
    fold(base, [delta], tmp_path / "folder")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["weights.safetensors"]
    same(read_all(tmp_path / "folder/weights.safetensors"), expected)
    with pytest.raises(InputError, match="is the base itself"):
        fold(base, [delta], tmp_path / "weights.safetensors")
    same(read_all(tmp_path / "weights.safetensors"), arrays)
    with pytest.raises(UsageError, match="config"):
        fold(base, [delta, Delta(base.fingerprint, {}, {}, config={"a": 1})], tmp_path / "x.safetensors")
    sharded = save(tmp_path / "sharded", arrays, shards=2)
    with pytest.raises(UsageError, match="2 files"):
        fold(sharded, [delta], tmp_path / "x.safetensors")


def test_all_stored_copies_of_a_tied_tensor_change(tmp_path: Path, rng: np.random.Generator) -> None:
    shared = rng.standard_normal((6, 4)).astype(np.float32)
    change = rng.standard_normal((6, 4)).astype(np.float32)
    arrays = {"embed": shared, "head": shared.copy(), "free": shared.copy(), "apart": shared + 1}
    base = save(tmp_path / "base", arrays)
    build = Builder(base)
    build.put("embed", "dense", {"values": change})
    delta = build.done(tied=(("embed", "head", "apart"),))
    report = fold(base, [delta], tmp_path / "out")
    same(read_all(tmp_path / "out"), {**arrays, "embed": shared + change, "head": shared + change})
    assert set(report.tensors) == {"embed", "head"}


def test_a_full_disk_is_known_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tmp_path / "base", {"w": np.ones((100, 100), np.float32)})
    build = Builder(base)
    build.put("w", "dense", {"values": np.ones((100, 100), np.float32)})
    delta = build.done()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 40_000, 40_000))
    for out in ("out", "out.safetensors"):
        with pytest.raises(WeftError, match=r"needs 40,\d\d\d bytes, 40,000 are free") as caught:
            fold(base, [delta], tmp_path / out)
        assert caught.value.exit_code == 4
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_leaves_nothing(tmp_path: Path, threads: int) -> None:
    base = save(tmp_path / "base", {f"w{k}": np.ones((100, 100), np.float32) for k in range(20)})
    build = Builder(base)
    for name in base.names:
        build.put(name, "dense", {"values": np.ones((100, 100), np.float32)})
    delta = build.done()

    def interrupt(done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold(base, [delta], tmp_path / "out", threads=threads, block=1000, progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    seen: list[tuple[int, int]] = []
    fold(base, [delta], tmp_path / "out", threads=threads, block=1000, progress=lambda *at: seen.append(at))
    assert seen == sorted(seen) and seen[-1] == (800_000, 800_000)


RUN = """
import sys
from weft.base import Base
from weft.delta import Delta
import weft, weft.diffing, weft.folding
weft.fold(Base.open(sys.argv[1]), [Delta.load(sys.argv[2])], sys.argv[3], threads=2)
assert not {"torch", "transformers"} & set(sys.modules)
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model_and_torch_is_not_imported(tmp_path: Path) -> None:
    shape = (16384, 2048)  # 67 MB in bf16, 134 MB of increments

    def steps(dtype: Any, scale: float) -> Any:
        part = (np.arange(1 << 20) * scale).astype(dtype).tobytes()
        return lambda: (part for _ in range(32))

    tensors: dict[str, Tensor] = {"w": Computed("BF16", shape, steps(ml_dtypes.bfloat16, 1e-6))}
    with open(tmp_path / "base.safetensors", "wb") as out:
        out.write(container_header(tensors, ["w"], {}))
        out.writelines(tensors["w"].blocks())
    base = Base.open(tmp_path / "base.safetensors")
    build = Builder(base)
    build.put("w", "lowrank", {"A": np.ones((16, 2048), np.float32), "B": np.ones((16384, 16), np.float32)}, scale=1e-3)
    build.put("w", "dense", {"values": Computed("F32", shape, steps(np.float32, -2e-6))})
    build.done().save(tmp_path / "delta.safetensors")
    command = [sys.executable, "-c", RUN, str(tmp_path / "base.safetensors"), str(tmp_path / "delta.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000, f"peak {done.stdout.strip()} kB"


# --- the walk


def test_row_blocks_cover_everything_once() -> None:
    for shape in [(7, 3), (1, 1000), (1000,), (5, 0), (0, 4), (4, 2, 3)]:
        for block in (1, 6, 7, 10**6):
            ranges = list(stream.row_blocks(shape, block))
            assert [k for lo, hi in ranges for k in range(lo, hi)] == list(range(shape[0]))
    assert list(stream.row_blocks((10, 4), 8, 3, 8)) == [(3, 5), (5, 7), (7, 8)]


@pytest.mark.parametrize("threads", [1, 3])
def test_jobs_give_results_in_order_and_errors_cancel_the_rest(threads: int) -> None:
    assert list(stream.in_threads((lambda k=k: k * k for k in range(50)), threads)) == [k * k for k in range(50)]
    ran = []

    def job(k: int) -> int:
        ran.append(k)
        if k == 3:
            raise ValueError("three")
        return k

    with pytest.raises(ValueError, match="three"):
        list(stream.in_threads((lambda k=k: job(k) for k in range(1000)), threads))
    assert len(ran) < 100


def test_blas_gets_its_threads_back() -> None:
    get, put = stream._blas()
    before = get()
    put(2)
    try:
        with stream.one_blas_thread(), stream.one_blas_thread():
            assert get() == 1
        assert get() in (1, 2) and (get() == 2 or before == 1)
        with pytest.raises(RuntimeError), stream.one_blas_thread():
            raise RuntimeError
        assert get() in (1, 2) and (get() == 2 or before == 1)
    finally:
        put(before)
