"""Porting tensor by tensor: what is carried as it is, what becomes an increment, vocabularies, names, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weft
from tests.conftest import bits
from tests.test_merge import base_values, exact_delta, tuned_values, write_checkpoint
from weft.base import Base
from weft.delta import At, Builder, Delta
from weft.errors import MismatchError, UsageError
from weft.folding import fold
from weft.porting import port
from weft.porting._vocabulary import by_token, tokens

OLD = {
    "embed_tokens.weight": (7, 6),
    "layers.0.up.weight": (8, 6),
    "layers.0.down.weight": (6, 8),
    "layers.0.same.weight": (6, 6),
    "norm.weight": (6,),
    "scale": (),
}


def values(seed: int, like: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Random tensors, or some near `like`, in which one is the same."""
    rng = np.random.default_rng(seed)
    out = {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in OLD.items()}
    if like is not None:
        out = {name: np.asarray(like[name] + np.float32(0.3) * w) for name, w in out.items()}
        out["layers.0.same.weight"] = like["layers.0.same.weight"]
    return out


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Base, Base, dict[str, np.ndarray], dict[str, np.ndarray]]:
    old = values(1)
    new = values(2, old)
    return write_checkpoint(tmp_path / "old", old), write_checkpoint(tmp_path / "new", new, shards=2), old, new


def update(base: Base, seed: int = 3) -> Delta:
    """Independent ops, a DoRA, a permutation, new values, and a head."""
    rng = np.random.default_rng(seed)
    f = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    build = Builder(base)
    build.put("layers.0.up.weight", "lowrank", {"A": f(2, 6), "B": f(8, 2)}, scale=0.5)
    build.put("layers.0.down.weight", "lowrank", {"A": f(2, 8), "B": f(6, 2)})
    build.put("layers.0.down.weight", "magnitude", {"m": np.abs(f(6))})
    build.put("layers.0.same.weight", "lowrank", {"A": f(1, 6), "B": f(6, 1)})
    build.put("layers.0.same.weight", "magnitude", {"m": np.abs(f(6))})
    build.put("norm.weight", "permute", {"perm": np.array([2, 0, 1, 5, 3, 4])})
    build.put("scale", "dense", {"values": np.asarray(f())})
    build.put("embed_tokens.weight", "sparse", {"index": np.array([1, 9, 30]), "values": f(3)})
    build.add("head.weight", f(3, 6))
    return build.done(recipe={"verb": "test"}, config={"id2label": {"0": "a"}})


def kinds(delta: Delta) -> dict[str, list[str]]:
    return {name: [op.op for op in entry.ops] for name, entry in delta.entries.items()}


def after(base: Base, delta: Delta, folder: Path) -> dict[str, np.ndarray]:
    fold(base, [delta], folder)
    return {name: tensor.read() for name, tensor in Base.open(folder).tensors.items()}


@pytest.mark.parametrize("alpha", [1.0, -0.7])
def test_the_difference_is_added_to_the_new_base(bases: Any, tmp_path: Path, alpha: float) -> None:
    source, target, old, new = bases
    delta = update(source)
    ported = port(delta, source, target, alpha=alpha)
    tuned, found = after(source, delta, tmp_path / "a"), after(target, ported, tmp_path / "b")
    for name in OLD:
        want = new[name].astype(np.float64) + alpha * (tuned[name].astype(np.float64) - old[name])
        np.testing.assert_allclose(found[name], want, rtol=3e-6, atol=3e-6, err_msg=name)
        assert alpha != 1 or name != "layers.0.same.weight" or bits(found[name]) == bits(tuned[name])
    assert bits(found["head.weight"]) == bits(tuned["head.weight"])  # a head is no difference: alpha is not for it
    assert kinds(ported) == {
        "layers.0.up.weight": ["lowrank"],
        "layers.0.down.weight": ["dense"],
        "layers.0.same.weight": ["lowrank", "magnitude"] if alpha == 1 else ["sum"],
        "norm.weight": ["dense"],
        "scale": ["dense"],
        "embed_tokens.weight": ["sparse"],
        "head.weight": ["assign"],
    }
    assert ported.base == target.fingerprint and ported.parents == (delta.id,) and ported.over == () and ported.config == delta.config
    assert (ported.recipe["verb"], ported.recipe["method"], ported.recipe["from"]) == ("port", "diff-vector-transfer", source.fingerprint)
    assert all(entry.base is None or entry.base.sha256 == target.sha256(name) for name, entry in ported.entries.items())
    assert {"carried": 5, "dense": 2, "left": {}}.items() <= ported.notes.items()


def test_the_same_base_gives_the_same_model_to_the_bit(bases: Any, tmp_path: Path) -> None:
    source, _, old, _ = bases
    twin = write_checkpoint(tmp_path / "twin", old, shards=3)
    whole = write_checkpoint(tmp_path / "whole", values(5, old))
    for number, given in enumerate((update(source), whole, exact_delta(source, old, values(6, old)))):
        ported = port(given, source, twin)
        if isinstance(given, Delta):
            assert kinds(ported) == kinds(given)
            tuned = after(source, given, tmp_path / f"a{number}")
        else:
            tuned = {name: tensor.read() for name, tensor in given.tensors.items()}
        found = after(twin, ported, tmp_path / f"b{number}")
        assert {name: bits(w) for name, w in found.items()} == {name: bits(w) for name, w in tuned.items()}


def test_a_checkpoint_is_its_difference(tmp_path: Path) -> None:
    """Against slow arithmetic, for every dtype, with tensors of no rows, shards, threads and saving."""
    start, other = base_values(), base_values(9)
    tuned = tuned_values(start, 4)
    source, target, whole = (write_checkpoint(tmp_path / n, v, shards=k) for n, v, k in (("o", start, 1), ("n", other, 3), ("t", tuned, 2)))
    ported = port(whole, source, target, threads=2, out=tmp_path / "p.safetensors")
    assert ported.id == port(whole, source, target).id and ported.parents == () and ported.recipe["checkpoint"] == whole.fingerprint
    found = after(target, ported, tmp_path / "f")
    for name, w in other.items():
        if name in ("unchanged.weight", "ids", "empty"):
            assert name not in ported.entries
            continue
        wide = np.float64 if w.dtype == np.float64 else np.float32
        tau = (tuned[name].astype(wide) - start[name].astype(wide)).astype(np.float64)
        assert bits(found[name]) == bits(np.asarray((w.astype(np.float64) + tau).astype(wide)).astype(w.dtype)), name


def test_a_checkpoint_of_another_dtype_is_its_difference(tmp_path: Path) -> None:
    old, tuned = values(1), values(5, values(1))
    low = {name: w.astype(ml_dtypes.bfloat16) for name, w in old.items()}
    source, update = write_checkpoint(tmp_path / "old", low), write_checkpoint(tmp_path / "tuned", tuned)
    target = write_checkpoint(tmp_path / "new", {**low, "norm.weight": low["norm.weight"] + low["norm.weight"]})
    found = after(target, port(update, source, target), tmp_path / "f")
    for name, w in tuned.items():
        want = w if name != "norm.weight" else 2 * low[name].astype(np.float32) + (w - low[name].astype(np.float32))
        np.testing.assert_array_equal(found[name], want.astype(ml_dtypes.bfloat16), err_msg=name)


def test_a_patch_keeps_its_ops(bases: Any, tmp_path: Path) -> None:
    source, target, old, new = bases
    delta = update(source)
    ported = port(delta, source, target, "portllm")
    assert kinds(ported) == kinds(delta) and ported.notes["dense"] == 0
    assert {key: t.sha256 for key, t in ported.tensors.items()} == {key: t.sha256 for key, t in delta.tensors.items()}
    found = after(target, ported, tmp_path / "f")
    for name in OLD:
        np.testing.assert_array_equal(found[name], np.asarray(delta.apply(name, new[name])), err_msg=name)
    tau = after(source, delta, tmp_path / "a")["layers.0.down.weight"] - old["layers.0.down.weight"]
    assert np.abs(found["layers.0.down.weight"] - new["layers.0.down.weight"] - tau).max() > 0.1  # what the magnitude does depends on the base


def test_new_values_are_no_patch(bases: Any, tmp_path: Path) -> None:
    source, target, old, _ = bases
    exact = exact_delta(source, old, values(6, old))
    with pytest.raises(MismatchError, match=r"5 of the 5 tensors(.|\n)*put the old base's values back"):
        port(exact, source, target, "portllm")
    with pytest.raises(MismatchError, match="a checkpoint, not a patch"):
        port(write_checkpoint(tmp_path / "t", values(5, old)), source, target, "portllm")


# --- names and shapes


def test_renamed_tensors_are_found(bases: Any, tmp_path: Path) -> None:
    source, _, _, new = bases
    moved = {f"model.{name}".replace("layers.", "h.") if name.startswith("layers") else name: w for name, w in new.items()}
    target = write_checkpoint(tmp_path / "moved", moved)
    delta = update(source)
    with pytest.raises(MismatchError, match=r"3 of the 7 tensors(.|\n)*no tensor 'layers.0.up.weight'(.|\n)*rename=OLD=NEW"):
        port(delta, source, target)
    found = after(target, port(delta, source, target, rename=("layers.*.weight=model.h.*.weight",)), tmp_path / "f")
    want = after(write_checkpoint(tmp_path / "plain", new), port(delta, source, write_checkpoint(tmp_path / "plain2", new)), tmp_path / "g")
    assert {name: bits(found[name]) for name in moved} == {name: bits(want[old]) for name, old in zip(moved, new, strict=True)}
    with pytest.raises(UsageError, match=r"'x\*=y': expected OLD=NEW(.|\n)*'q=r' fits none"):
        port(delta, source, target, rename=("x*=y", "q=r"))
    build = Builder(source)
    build.add("a", np.ones(2, np.float32))
    build.add("b", np.ones(2, np.float32))
    with pytest.raises(UsageError, match="two tensors the name 'b': 'a' and 'b'"):
        port(build.done(), source, target, rename=("a=b",))


def test_the_recipe_has_the_seed_that_units_are_matched_with(bases: Any) -> None:
    source, target, _, _ = bases
    assert [port(update(source), source, target, seed=seed).recipe["seed"] for seed in (0, 5)] == [0, 5]


def test_what_does_not_fit_is_listed_or_left_out(bases: Any, tmp_path: Path) -> None:
    source, _, _, new = bases
    odd = {**new, "layers.0.up.weight": new["layers.0.up.weight"][:5], "norm.weight": np.arange(6), "head.weight": np.ones((3, 6), np.float32)}
    del odd["scale"]
    target = write_checkpoint(tmp_path / "odd", odd)
    delta = update(source)
    with pytest.raises(MismatchError) as error:
        port(delta, source, target)
    for part in ("4 of the 7", "[8, 6], the target's [5, 6]", "it is F32, the target's I64", "has it already", "no tensor 'scale'"):
        assert part in str(error.value)
    ported = port(delta, source, target, missing="skip")
    assert set(ported.entries) == {"layers.0.down.weight", "layers.0.same.weight", "embed_tokens.weight"}
    assert set(ported.notes["left"]) == {"layers.0.up.weight", "norm.weight", "head.weight", "scale"}
    none = write_checkpoint(tmp_path / "none", {"other": np.ones(3, np.float32)})
    with pytest.raises(MismatchError, match="nothing of the update fits"):
        port(delta.only(["scale"]), source, none, missing="skip")


def test_groups_are_carried_whole_or_not_at_all(bases: Any, tmp_path: Path) -> None:
    source, _, old, new = bases
    build = Builder(source)
    perm = build.share("res", np.array([1, 0, 2, 3, 5, 4]))
    build.put("norm.weight", "permute", {"perm": perm}, group="res")
    build.put("layers.0.down.weight", "permute", {"perm": perm}, group="res")
    build.put("scale", "dense", {"values": np.float32(2)})
    delta = build.done()
    lacks = {name: w for name, w in new.items() if name != "norm.weight"} | {"layers.0.down.weight": old["layers.0.down.weight"]}
    target = write_checkpoint(tmp_path / "t", lacks)
    with pytest.raises(MismatchError, match="belongs to a group that does not fit as a whole"):
        port(delta, source, target, "portllm")
    assert set(port(delta, source, target, missing="skip").entries) == {"scale"}


def test_what_shares_a_group_with_what_was_left_out_goes_too(bases: Any, tmp_path: Path) -> None:
    source, _, _, new = bases
    build = Builder(source)
    six, eight = build.share("six", np.array([1, 0, 2, 3, 5, 4])), build.share("eight", np.array([1, 0, 2, 3, 5, 4, 7, 6]))
    build.put("layers.0.up.weight", "permute", {"perm": eight}, group="hidden")
    build.put("layers.0.down.weight", "permute", {"perm": eight}, group="hidden", axis=1)
    build.put("layers.0.down.weight", "permute", {"perm": six}, group="res")
    build.put("norm.weight", "permute", {"perm": six}, group="res")
    build.put("scale", "dense", {"values": np.float32(2)})
    target = write_checkpoint(tmp_path / "t", {name: w for name, w in new.items() if name != "norm.weight"})
    assert set(port(build.done(), source, target, "portllm", missing="skip").entries) == {"scale"}


def test_structure_and_activations(bases: Any) -> None:
    source, target, _, _ = bases
    build = Builder(source)
    build.add("norm.weight", np.ones(4, np.float32), kind="replace")
    build.put("@module/layers.0.up", "adapter", {name: np.ones(shape, np.float32) for name, shape in ADAPTER.items()})
    delta = build.done()
    with pytest.raises(MismatchError, match=r"1 of the 2(.|\n)*a replace entry changes the structure"):
        port(delta, source, target)
    ported = port(delta, source, target, missing="skip")
    assert set(ported.entries) == {"@module/layers.0.up"}
    with pytest.raises(MismatchError, match="cannot be scaled"):
        port(delta.only(["@module/layers.0.up"]), source, target, alpha=0.5)


ADAPTER = {"down": (2, 8), "up": (8, 2)}


def test_the_wrong_base_and_deltas_over_others_are_refused(bases: Any) -> None:
    source, target, _, _ = bases
    first = update(source)
    with pytest.raises(MismatchError, match="was made for base"):
        port(first, target, source)
    build = Builder(source)
    build.put("scale", "dense", {"values": np.float32(2)})
    second = build.done(over=(first.id,))
    with pytest.raises(MismatchError, match=r"made over other deltas(.|\n)*first.then\(second\)"):
        port(second, source, target)
    assert port(first.then(second), source, target).entries.keys() == first.entries.keys()
    with pytest.raises(UsageError, match="diff-vector-transfer"):
        port(first, source, target, "diff-vector")
    with pytest.raises(UsageError, match="alphas"):
        port(first, source, target, alphas=2)
    with pytest.raises(UsageError, match="looks at no data"):
        port(first, source, target, data=[{"text": "a"}])


# --- vocabularies


def tokenizer(folder: Path, words: list[str], *, added: list[str] = (), kind: str = "BPE") -> None:  # type: ignore[assignment]
    vocab: Any = [[word, -1.0] for word in words] if kind == "Unigram" else {word: number for number, word in enumerate(words)}
    extra = [{"id": len(words) + number, "content": word} for number, word in enumerate(added)]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": kind, "vocab": vocab}, "added_tokens": extra}))


def vocabularies(tmp_path: Path, new_words: list[str], rows: int, *, kind: str = "BPE") -> tuple[Base, Base, dict[str, np.ndarray], dict[str, np.ndarray]]:
    old = values(1) | {"lm_head.weight": np.random.default_rng(8).standard_normal((7, 6)).astype(np.float32), "lm_head.bias": np.ones(7, np.float32)}
    new = values(2, values(1))
    rng = np.random.default_rng(9)
    new |= {name: rng.standard_normal((rows, *old[name].shape[1:])).astype(np.float32) for name in ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")}
    source, target = write_checkpoint(tmp_path / "old", old), write_checkpoint(tmp_path / "new", new)
    tokenizer(tmp_path / "old", list("abcdef"), added=["<s>"])
    tokenizer(tmp_path / "new", new_words, kind=kind)
    return source, target, old, new


@pytest.mark.parametrize(("words", "rows", "kind"), [([*"xdb", "<s>", *"aeyz"], 10, "BPE"), (list("gfedcba"), 7, "Unigram")])
def test_rows_follow_their_tokens(tmp_path: Path, words: list[str], rows: int, kind: str) -> None:
    """A dense, a low-rank and a vector update, on vocabularies of another size or another order; padding rows get nothing."""
    source, target, old, new = vocabularies(tmp_path, words, rows, kind=kind)
    rng = np.random.default_rng(4)
    build = Builder(source)
    build.put("embed_tokens.weight", "dense", {"values": rng.standard_normal((7, 6)).astype(np.float32)}, scale=0.5)
    a, b = rng.standard_normal((2, 6)).astype(np.float32), rng.standard_normal((7, 2)).astype(np.float32)
    build.put("lm_head.weight", "lowrank", {"A": a, "B": b})
    build.put("lm_head.bias", "scale_shift", {"shift": rng.standard_normal(7).astype(np.float32)})
    delta = build.done()
    ported = port(delta, source, target)
    tuned, found = after(source, delta, tmp_path / "a"), after(target, ported, tmp_path / "b")
    where = {word: row for row, word in enumerate([*"abcdef", "<s>"])}
    for name in ("embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        for row in range(rows):
            word = words[row] if row < len(words) else None
            tau = tuned[name][where[word]].astype(np.float64) - old[name][where[word]] if word in where else 0.0
            np.testing.assert_allclose(found[name][row], new[name][row] + tau, rtol=1e-5, atol=1e-6, err_msg=f"{name} {row}")
    assert kinds(ported)["lm_head.weight"] == ["lowrank"] and kinds(ported)["embed_tokens.weight"] == ["dense"]
    known = len(set(words) & set(where))
    assert ported.notes["vocabulary"]["lm_head.weight"] == {"moved": known, "new": rows - known}
    with pytest.raises(MismatchError, match=r"2 of the 3(.|\n)*only low-rank ops can be carried row by row"):
        port(delta, source, target, "portllm")
    assert kinds(port(delta.only(["lm_head.weight"]), source, target, "portllm")) == {"lm_head.weight": ["lowrank"]}


def test_an_increment_of_other_rows_streams_in_blocks(tmp_path: Path) -> None:
    source, target, _, _ = vocabularies(tmp_path, [*"xdb", "<s>", *"aeyz"], 10)
    build = Builder(source)
    build.put("embed_tokens.weight", "dense", {"values": np.random.default_rng(4).standard_normal((7, 6)).astype(np.float32)})
    ported = port(build.done(), source, target)
    fold(target, [ported], tmp_path / "1", block=7)
    fold(target, [ported], tmp_path / "2", threads=2)
    assert (tmp_path / "1" / "model.safetensors").read_bytes() == (tmp_path / "2" / "model.safetensors").read_bytes()
    assert port(Delta.load(_saved(ported, tmp_path / "p.safetensors")), target, source).entries.keys() == ported.entries.keys()  # and back


def _saved(delta: Delta, path: Path) -> Path:
    delta.save(path)
    return path


def test_without_tokenizers_rows_are_not_guessed(tmp_path: Path) -> None:
    source, target, _, _ = vocabularies(tmp_path, list("abc"), 9)
    (tmp_path / "new" / "tokenizer.json").unlink()
    build = Builder(source)
    build.put("embed_tokens.weight", "sparse", {"index": np.array([3]), "values": np.ones(1, np.float32)})
    with pytest.raises(MismatchError, match="it is not known which row is which token"):
        port(build.done(), source, target)


def test_the_same_vocabulary_moves_nothing(tmp_path: Path) -> None:
    source, target, _, _ = vocabularies(tmp_path, [*"abcdef", "<s>"], 7)
    build = Builder(source)
    build.put("embed_tokens.weight", "sparse", {"index": np.array([3]), "values": np.ones(1, np.float32)})
    ported = port(build.done(), source, target)
    assert kinds(ported) == {"embed_tokens.weight": ["sparse"]} and "vocabulary" not in ported.notes


def test_tokens_are_read_as_transformers_reads_them() -> None:
    from weft.demo import edition, minilm

    for folder in (edition("first"), minilm()):
        assert tokens(Base.open(folder)) == Base.open(folder).tokenizer().get_vocab()


def test_token_tensors_are_known_by_name() -> None:
    yes = (
        "model.embed_tokens.weight transformer.wte.weight bert.embeddings.word_embeddings.weight lm_head.weight lm_head.bias cls.predictions.bias shared.weight"
    )
    no = "model.norm.weight transformer.wpe.weight bert.embeddings.position_embeddings.weight model.layers.0.mlp.up_proj.weight score.weight"
    assert all(map(by_token, yes.split())) and not any(map(by_token, no.split()))


def test_a_tied_tensor_reaches_both_where_the_target_has_two(tmp_path: Path) -> None:
    old = {"embed_tokens.weight": np.ones((4, 3), np.float32)}
    new = {"embed_tokens.weight": np.full((4, 3), 2, np.float32), "lm_head.weight": np.full((4, 3), 5, np.float32)}
    source, target = write_checkpoint(tmp_path / "old", old), write_checkpoint(tmp_path / "new", new)
    build = Builder(source)
    build.put("embed_tokens.weight", "lowrank", {"A": np.ones((1, 3), np.float32), "B": np.arange(4, dtype=np.float32)[:, None]})
    delta = build.done(tied=(("embed_tokens.weight", "lm_head.weight"),))
    found = after(target, port(delta, source, target), tmp_path / "f")
    for name, w in new.items():
        np.testing.assert_array_equal(found[name] - w, np.arange(4)[:, None] * np.ones((1, 3)))


def test_the_second_of_two_tensors_is_changed_by_what_was_added_not_by_the_old_values(tmp_path: Path) -> None:
    """The target's embedding is the source's, its output layer is not: one gets the tuned values, the other their difference."""
    rng = np.random.default_rng(0)
    old, tuned, head = rng.standard_normal((3, 4, 3)).astype(np.float32)
    source = write_checkpoint(tmp_path / "old", {"embed_tokens.weight": old})
    target = write_checkpoint(tmp_path / "new", {"embed_tokens.weight": old, "lm_head.weight": head})
    build = Builder(source)
    build.put("embed_tokens.weight", "assign", {"values": tuned})
    ported = port(build.done(tied=(("embed_tokens.weight", "lm_head.weight"),)), source, target)
    assert kinds(ported) == {"embed_tokens.weight": ["assign"], "lm_head.weight": ["dense"]} and (ported.notes["carried"], ported.notes["dense"]) == (1, 1)
    found = after(target, ported, tmp_path / "f")
    np.testing.assert_array_equal(found["embed_tokens.weight"], tuned)
    np.testing.assert_allclose(found["lm_head.weight"], head + (tuned - old), rtol=1e-6)


# --- what goes with it


def test_single_edits_can_still_be_taken_back(tmp_path: Path) -> None:
    """The ledger of an edit goes along where all ops do."""
    from tests import tiny
    from weft.editing import ledger

    one, two = tiny.llama(tmp_path / "1"), tiny.llama(tmp_path / "2", seed=5)
    rows = [{"prompt": "the river is", "target_new": "good"}, {"prompt": "who is in the city", "target_new": "it"}]
    delta = weft.edit(one, rows, "ultraedit", threads=1)
    ported = port(delta, Base.open(one), Base.open(two))
    assert [each["prompt"] for each in ledger(ported)] == [row["prompt"] for row in rows]
    less, want = weft.undo(ported, 0), port(weft.undo(delta, 0), Base.open(one), Base.open(two))
    assert {key: t.sha256 for key, t in less.tensors.items() if "//" in key} == {key: t.sha256 for key, t in want.tensors.items() if "//" in key}


def test_views_stay_what_they_are(bases: Any, tmp_path: Path) -> None:
    source, target, old, new = bases
    build = Builder(source)
    fields = {"A": np.ones((1, 6), np.float32), "B": np.ones((3, 1), np.float32)}
    build.put("layers.0.up.weight", "lowrank", fields, at=At(index=((2, 5),)))
    build.put("layers.0.down.weight", "scale_shift", {"scale": np.full(8, 2, np.float32)}, at=At(transpose=(1, 0)))
    found = after(target, port(build.done(), source, target), tmp_path / "f")
    np.testing.assert_allclose(found["layers.0.up.weight"][2:5], new["layers.0.up.weight"][2:5] + 1, rtol=1e-6)
    np.testing.assert_allclose(found["layers.0.down.weight"], new["layers.0.down.weight"] + old["layers.0.down.weight"], rtol=1e-5, atol=1e-6)


def test_bfloat16_rounds_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old, new = ({"w": rng.standard_normal((40, 5)).astype(ml_dtypes.bfloat16)} for _ in range(2))
    tuned = {"w": (old["w"].astype(np.float32) + 0.01 * rng.standard_normal((40, 5)).astype(np.float32)).astype(ml_dtypes.bfloat16)}
    source, target, whole = (write_checkpoint(tmp_path / name, w) for name, w in (("o", old), ("n", new), ("t", tuned)))
    found = after(target, port(whole, source, target), tmp_path / "f")["w"]
    exact = new["w"].astype(np.float64) + (tuned["w"].astype(np.float64) - old["w"].astype(np.float64))
    assert bits(found) == bits(exact.astype(np.float32).astype(ml_dtypes.bfloat16))


def test_porting_files_never_imports_torch(bases: Any, tmp_path: Path) -> None:
    source, target, _, _ = bases
    update(source).save(path := tmp_path / "u.safetensors")
    code = f"""
import sys
from weft.cli import main
command = ["port", {str(path)!r}, "--from", {str(source.path)!r}, "--to", {str(target.path)!r}, "-o", {str(tmp_path / "p.safetensors")!r}]
assert main(command) == 0
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of their size apart" in done.stderr and "5 carried as they are, 2 as dense increments" in done.stdout
    assert Delta.load(tmp_path / "p.safetensors").id == port(update(source), source, target).id
