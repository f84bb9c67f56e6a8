"""The prediction before a port, permuted porting, and trans-lora's parts: against direct computations and known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from tests import tiny
from tests.test_merge import write_checkpoint
from tests.test_permutations import Conv, plain
from weft.base import Base
from weft.cli import main
from weft.delta import Builder, Delta
from weft.engine.permutations import drawn, permuting
from weft.engine.symmetries import symmetries
from weft.errors import InputError, MismatchError, UsageError
from weft.porting import port, predict
from weft.porting._discriminator import realness
from weft.porting._drafts import drafts, end_marks, ended
from weft.porting._prediction import _verdict, aligned, leading


def checkpoint(folder: Path, values: dict[str, np.ndarray]) -> Base:
    return write_checkpoint(folder, {name: w.astype(np.float32) for name, w in values.items()})


def two(tmp_path: Path, size: float, seed: int = 0) -> tuple[Base, Base, Delta, dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    old = {"a": rng.standard_normal((30, 20)), "b": rng.standard_normal((12, 25)), "norm": rng.standard_normal(9)}
    new = {name: w + size * rng.standard_normal(w.shape) for name, w in old.items()}
    source, target = checkpoint(tmp_path / f"old{size}", old), checkpoint(tmp_path / f"new{size}", new)
    build, tau = Builder(source), {}
    for name in ("a", "b"):
        fields = {"A": rng.standard_normal((3, old[name].shape[1])).astype(np.float32), "B": rng.standard_normal((old[name].shape[0], 3)).astype(np.float32)}
        build.put(name, "lowrank", fields)
        tau[name] = fields["B"].astype(float) @ fields["A"]
    return source, target, build.done(), old, new, tau


# --- prediction


def test_the_numbers_are_those_of_a_direct_computation(tmp_path: Path) -> None:
    source, target, delta, old, new, tau = two(tmp_path, 0.3)
    found = predict(source, target, delta, rank=4)
    flat = lambda some, names: np.concatenate([some[name].ravel() for name in names])  # noqa: E731
    gone = {name: new[name] - old[name] for name in old}
    assert found.distance == pytest.approx(np.linalg.norm(flat(gone, old)) / np.linalg.norm(flat(old, old)), rel=1e-5)
    t, d = flat(tau, tau), flat(gone, tau)
    assert found.size == pytest.approx(np.linalg.norm(t) / np.linalg.norm(flat(old, tau)), rel=1e-5)
    assert found.cosine == pytest.approx(t @ d / np.linalg.norm(t) / np.linalg.norm(d), rel=1e-4)
    for each in found.matrices:
        k = 4
        parts = {"old": old[each.name], "new": new[each.name], "update": tau[each.name], "difference": gone[each.name]}
        sides = {name: (u, vt.T) for name, (u, _, vt) in ((name, np.linalg.svd(w, full_matrices=False)) for name, w in parts.items())}
        overlap = lambda a, ka, b, kb, side, s=sides: np.sum((s[a][side][:, :ka].T @ s[b][side][:, :kb]) ** 2) / min(ka, kb)  # noqa: E731
        for side in (0, 1):
            assert each.bases[side] == pytest.approx(overlap("old", k, "new", k, side), abs=0.03)
            assert each.update[side] == pytest.approx(overlap("update", 3, "difference", k, side), abs=0.05)  # the update has rank 3
        assert each.chance == (k / parts["old"].shape[0], k / parts["old"].shape[1])
    assert [each.name for each in found.matrices] == ["a", "b"] and found.losses is None and found.shared == (3, 3)
    assert json.loads(json.dumps(found.json()))["distance"] == found.distance


def test_leading_subspaces_come_from_blocks() -> None:
    """A clear spectrum is found to many digits, whatever the blocks; zeros have no directions."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.standard_normal((n, 6)))[0] for n in (50, 40))
    w = u * [9, 8, 7, 1e-3, 1e-3, 1e-3] @ v.T

    def walk(step: int) -> Any:
        return lambda: ({"w": w[k : k + step], "zero": 0 * w[k : k + step]} for k in range(0, 50, step))

    for step in (7, 50):
        found = leading(walk(step), 40, 3)
        left, right = found["w"]
        assert aligned(left, u[:, :3]) == pytest.approx(1, abs=1e-9) and aligned(right, v[:, :3]) == pytest.approx(1, abs=1e-9)
        assert aligned(left, u[:, 3:]) == pytest.approx(0, abs=1e-9) and found["zero"][0].shape == (50, 0) and aligned(*[found["zero"][0]] * 2) == 0


def test_near_bases_are_likely_far_ones_are_not(tmp_path: Path) -> None:
    verdicts = []
    for size in (0.0, 0.1, 0.6, 3.0):
        source, target, delta, *_ = two(tmp_path, size)
        verdicts.append(predict(source, target, delta).verdict)
    assert verdicts == ["likely", "likely", "doubtful", "unlikely"]


@pytest.mark.parametrize(
    ("distance", "bases", "losses", "verdict"),
    [
        (0.0, 1.0, None, "likely"),
        (0.3, 0.7, None, "likely"),
        (0.3, 0.2, None, "unlikely"),
        (0.6, 0.5, None, "doubtful"),
        (0.9, 0.5, None, "unlikely"),
        (0.3, 0.7, (1.0, 1.0, 1.0, 1.0, 1.0), "likely"),
        (0.6, 0.5, (1.0, 1.0, 1.0, 1.0, 1.0), "doubtful"),
        (0.9, 0.7, (1.0, 1.0, 1.0, 1.0, 1.0), "unlikely"),
        (0.3, 0.7, (1.0, 1.1, 1.2, 1.1, 1.0), "doubtful"),
        (0.3, 0.7, (1.0, 2.0, 3.0, 2.0, 1.0), "unlikely"),
    ],
)
def test_the_worst_of_the_numbers_counts(distance: float, bases: float, losses: tuple[float, ...] | None, verdict: str) -> None:
    barrier = None if losses is None else max(losses) - losses[0]
    assert _verdict(distance, bases, barrier, losses)[0] == verdict


def test_the_loss_on_the_line_is_that_of_models_on_the_line(tmp_path: Path) -> None:
    one, other = Base.open(tiny.llama(tmp_path / "1")), Base.open(tiny.llama(tmp_path / "2", seed=3))
    rows = [{"text": text} for text in tiny.texts(12) if " " in text]
    delta = Delta.load(tiny.lowrank(tmp_path / "1", tmp_path / "d.safetensors"))
    found = predict(one, other, delta, rows)
    assert found.losses is not None and found.barrier is not None
    model, away = one.model(), other.model()
    ends = {name: (w.detach().clone(), away.state_dict()[name]) for name, w in model.state_dict().items()}
    for t, loss in zip((0, 0.25, 0.5, 0.75, 1), found.losses, strict=True):
        model.load_state_dict({name: a + t * (b - a) for name, (a, b) in ends.items()})
        ids = [one.tokenizer()(row["text"], return_tensors="pt")["input_ids"] for row in rows]
        with torch.no_grad():
            sums = [torch.nn.functional.cross_entropy(model(each).logits[0, :-1], each[0, 1:], reduction="sum").item() for each in ids]
        assert loss == pytest.approx(sum(sums) / sum(each.shape[1] - 1 for each in ids), rel=1e-4)
    line = [(1 - t) * found.losses[0] + t * found.losses[-1] for t in (0, 0.25, 0.5, 0.75, 1)]
    assert found.barrier == pytest.approx(max(a - b for a, b in zip(found.losses, line, strict=True)))
    twin = predict(one, Base.open(tiny.llama(tmp_path / "3")), delta, rows[:3])
    assert twin.losses is not None and len(set(twin.losses)) == 1 and twin.barrier == pytest.approx(0, abs=1e-12) and twin.update is None


def test_a_head_of_the_update_takes_part_in_the_loss(tmp_path: Path) -> None:
    one, other = Base.open(tiny.bert(tmp_path / "1")), Base.open(tiny.bert(tmp_path / "2", seed=3))
    delta = Delta.load(tiny.classifier(tmp_path / "1", tmp_path / "d.safetensors"))
    rows = [{"text": text, "label": tiny.LABELS[k % 3]} for k, text in enumerate(tiny.texts(6))]
    found = predict(one, other, delta, rows)
    head = delta.only(["classifier.weight", "classifier.bias"])
    assert found.losses is not None and found.losses[0] == pytest.approx(weft.evaluate(one, [head], rows)["metrics"]["nll"], rel=1e-6)


def test_an_update_that_changes_no_matrix_has_a_distance_alone(tmp_path: Path) -> None:
    source, target, *_ = two(tmp_path, 0.1)
    build = Builder(source)
    build.put("@module/x", "adapter", {"down": np.ones((2, 8), np.float32), "up": np.ones((8, 2), np.float32)})
    found = predict(source, target, build.done())
    assert (found.size, found.cosine, found.bases, found.update, found.matrices) == (0.0, None, None, None, ())
    assert found.verdict == "likely" and found.sentence.endswith(f"the bases are {found.distance:.2f} of their size apart") and "cosine" not in found.text()


def test_predictions_refuse_what_means_nothing(tmp_path: Path) -> None:
    source, _, delta, *_ = two(tmp_path, 0.1)
    with pytest.raises(MismatchError, match="no floating-point tensor"):
        predict(source, checkpoint(tmp_path / "x", {"other": np.ones(3)}), delta)
    with pytest.raises(UsageError, match="rank must be at least 1"):
        predict(source, source, delta, rank=0)


# --- permuted


@pytest.mark.parametrize("kind", [tiny.llama, tiny.gpt2])
def test_reordered_units_are_found_and_the_update_follows(tmp_path: Path, kind: Any) -> None:
    """The target is the source with its units in another order, and a little noise: the ported model is the tuned one, in that order."""
    source = Base.open(kind(tmp_path / "old"))
    groups = symmetries(source)
    order = drawn(groups, 4)
    weft.fold(source, [permuting(source, groups, order)], tmp_path / "moved")
    rng = np.random.default_rng(0)
    moved = Base.open(tmp_path / "moved")
    build = Builder(moved)
    for name in moved.names:
        build.put(name, "dense", {"values": (1e-3 * rng.standard_normal(moved.tensor(name).shape)).astype(np.float32)})
    weft.fold(moved, [build.done()], tmp_path / "new")
    target = Base.open(tmp_path / "new")
    build = Builder(source)
    for name in [name for name in source.names if len(source.tensor(name).shape) == 2]:
        rows, columns = source.tensor(name).shape
        fields = {"A": rng.standard_normal((2, columns)).astype(np.float32), "B": 0.1 * rng.standard_normal((rows, 2)).astype(np.float32)}
        build.put(name, "lowrank", fields)
    first = next(name for name in source.names if "norm" in name or "ln_" in name)
    build.put(first, "scale_shift", {"scale": rng.standard_normal(source.tensor(first).shape).astype(np.float32)})
    delta = build.done()
    ported = port(delta, source, target, "permuted")
    assert {name: [op.op for op in e.ops] for name, e in ported.entries.items()} == {
        name: ["dense"] if name == first else ["lowrank"] for name in delta.entries
    }
    assert ported.notes["reordered"] == len(groups) and port(delta, source, target, "permuted").id == ported.id

    ids = torch.arange(20)[None] % 25

    def logits(base: Base, deltas: list[Delta]) -> torch.Tensor:
        model = base.model(deltas)
        if deltas:
            weft.attach(model, deltas, base=base)
        with torch.no_grad():
            return model(ids).logits

    tuned, plain = logits(source, [delta]), logits(source, [])
    error = (logits(target, [ported]) - tuned).norm() / (tuned - plain).norm()
    straight = (logits(target, [port(delta, source, target)]) - tuned).norm() / (tuned - plain).norm()
    assert error < 0.05 < 0.5 < straight


def test_low_rank_updates_of_convolutions_follow_their_channels(tmp_path: Path) -> None:
    """The columns of A count channels and places in the kernel together: such an update becomes dense, that of a linear layer does not."""
    source = plain(tmp_path / "old", Conv())
    groups = symmetries(source, "chain")
    moving = permuting(source, groups, drawn(groups, 4))
    weft.fold(source, [moving], tmp_path / "new")
    rng = np.random.default_rng(0)
    build = Builder(source)
    for name, (rows, columns) in {"net.0.weight": (8, 27), "net.3.weight": (12, 72), "net.9.weight": (5, 20)}.items():
        build.put(name, "lowrank", {"A": rng.standard_normal((2, columns)).astype(np.float32), "B": rng.standard_normal((rows, 2)).astype(np.float32)})
    delta = build.done()
    target = Base.open(tmp_path / "new")
    ported = port(delta, source, target, "permuted", layout="chain")
    assert {name: entry.ops[0].op for name, entry in ported.entries.items()} == {"net.0.weight": "lowrank", "net.3.weight": "dense", "net.9.weight": "lowrank"}
    weft.fold(target, [ported], tmp_path / "ported")
    weft.fold(source, [delta.then(moving)], tmp_path / "tuned")
    for name in delta.entries:
        got, want = (Base.open(tmp_path / folder).tensor(name).read() for folder in ("ported", "tuned"))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bases_in_one_order_are_carried_as_diff_vectors(tmp_path: Path) -> None:
    source = Base.open(tiny.llama(tmp_path / "old"))
    delta = Delta.load(tiny.lowrank(tmp_path / "old", tmp_path / "d.safetensors"))
    build = Builder(source)
    build.put("model.norm.weight", "dense", {"values": np.full(32, 0.1, np.float32)})
    weft.fold(source, [build.done()], tmp_path / "new")
    target = Base.open(tmp_path / "new")
    a, b = port(delta, source, target, "permuted"), port(delta, source, target)
    assert a.entries == b.entries and {key: t.sha256 for key, t in a.tensors.items()} == {key: t.sha256 for key, t in b.tensors.items()}
    assert a.notes["reordered"] == 0


def test_a_head_on_a_reordered_stream_is_refused(tmp_path: Path) -> None:
    source = Base.open(tiny.llama(tmp_path / "old"))
    groups = symmetries(source)
    weft.fold(source, [permuting(source, groups, drawn(groups, 4))], tmp_path / "new")
    build = Builder(source)
    build.put("model.norm.weight", "dense", {"values": np.ones(32, np.float32)})
    build.add("score.weight", np.ones((3, 32), np.float32))
    with pytest.raises(MismatchError, match=r"score.weight: the bases have their residual streams in different orders"):
        port(build.done(), source, Base.open(tmp_path / "new"), "permuted")


# --- trans-lora's parts


def test_drafts_end_where_seeds_end() -> None:
    assert end_marks(["who is it?", "where?"]) == "?" and end_marks(["good.", "bad!"]) == "!."
    assert end_marks(["a. b.", "c."]) == end_marks(["who is it", "where?"]) == end_marks([""]) == ""
    assert ended("who? she.", "?") == "who?" and ended("who", "?") == "" and ended("who", "") == "who"


def test_the_discriminator_tells_what_it_has_not_seen() -> None:
    rng = np.random.default_rng(0)
    real = rng.standard_normal((12, 30)) + 2.0 * (np.arange(30) < 5)
    mixed = rng.standard_normal((80, 30))
    alike = np.arange(80) % 8 == 3
    mixed[alike] += 2.0 * (np.arange(30) < 5)
    odds = realness(real, mixed)
    best = np.argsort(-odds)[: alike.sum()]
    assert alike[best].mean() >= 0.9
    shuffled = rng.permutation(80)
    again = realness(real, mixed[shuffled])
    assert np.corrcoef(again, odds[shuffled])[0, 1] > 0.9  # which half a text is in hardly matters


def test_drafts_are_new_different_and_the_same_for_a_seed(tmp_path: Path) -> None:
    base = Base.open(tiny.llama(tmp_path / "m"))
    seeds = tiny.texts(8)
    how: dict[str, Any] = {"shots": 0, "lead": 0.5, "temperature": 1.5, "device": None}
    found = drafts(base, seeds, 20, seed=1, **how)
    assert len(found) == len(set(found)) == 20 and not set(found) & set(seeds)
    assert found == drafts(base, seeds, 20, seed=1, **how) != drafts(base, seeds, 20, seed=2, **how)


def test_trans_lora_needs_no_likeness(tmp_path: Path) -> None:
    """From a Llama to a GPT-2, from a checkpoint or a delta, for both kinds of rows."""
    source, target = Base.open(tiny.llama(tmp_path / "old")), Base.open(tiny.gpt2(tmp_path / "new"))
    delta = Delta.load(tiny.lowrank(tmp_path / "old", tmp_path / "d.safetensors"))
    how: dict[str, Any] = {"shots": 0, "lead": 0.5, "inputs": 12, "answer": 4, "rank": 2, "epochs": 1}
    rows = [{"prompt": text} for text in tiny.texts(6)]
    ported = port(delta, source, target, "trans-lora", data=rows, **how)
    assert ported.base == target.fingerprint and ported.parents == (delta.id,) and ported.notes["inputs"] == 12 and ported.notes["seeds"] == 6
    assert ported.recipe["made"]["verb"] == "tune" and ported.recipe["data"] and ported.recipe["seed"] == 0
    assert {op.op for e in ported.entries.values() for op in e.ops} == {"lowrank"}
    assert port(delta, source, target, "trans-lora", data=rows, **how).id == ported.id
    weft.fold(source, [delta], tmp_path / "tuned")
    assert port(tmp_path / "tuned", source, target, "trans-lora", data=rows, keep=1.0, **how).parents == ()
    with pytest.raises(UsageError, match="needs a few inputs as seeds"):
        port(delta, source, target, "trans-lora")
    with pytest.raises(InputError, match="'prompt'"):
        port(delta, source, target, "trans-lora", data=[{"question": "who"}], **how)


# --- the command


def test_the_command_says_what_it_expects_and_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tiny.llama(tmp_path / "1"), tiny.llama(tmp_path / "2", seed=3)
    delta = tiny.lowrank(one, tmp_path / "d.safetensors")
    common = ["port", str(delta), "--from", str(one), "--to", str(other)]
    assert main([*common, "-o", str(tmp_path / "p.safetensors")]) == 0
    said = capsys.readouterr()
    assert "porting is unlikely to work" in said.err and "4 carried as they are, 0 as dense increments" in said.out and "next: weft eval" in said.err
    assert main([*common, "-o", str(tmp_path / "q.safetensors"), "--method", "portllm", "--format", "json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["method"] == "portllm" and record["prediction"]["verdict"] == "unlikely" and record["base"] == Base.open(other).fingerprint
    assert main([*common, "-o", str(tmp_path / "r.safetensors"), "--no-predict", "--format", "json"]) == 0
    assert "prediction" not in json.loads(capsys.readouterr().out)
    assert main([*common, "-o", str(tmp_path / "r.safetensors"), "-p", "missing=drop"]) == 2
    assert main(["port", str(delta), "--from", str(other), "--to", str(one), "-o", str(tmp_path / "r.safetensors")]) == 3
