"""The delta: builder, validation, algebra, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import MemoryBase
from weft import xp
from weft.delta import BaseTensor, Builder, Change, Delta, Entry, merge_patches
from weft.errors import FormatError, InputError, MismatchError
from weft.ops import Generator, OpEntry, Ref, Term, chain

GEN = Generator(99)
BASE = MemoryBase({"a": GEN.normal((6, 4)), "b": GEN.normal((6, 4)), "c": GEN.normal((4,)), "n": np.arange(3)})


def lowrank(target: str = "a", *, rank: int = 2, seed: int = 1, base: Any = BASE, **manifest: Any) -> Delta:
    gen = Generator(seed)
    build = Builder(base)
    build.put(target, "lowrank", {"A": gen.normal((rank, 4)), "B": gen.normal((6, rank))}, scale=0.5)
    return build.done(**manifest)


def dora(seed: int = 3) -> Delta:
    gen = Generator(seed)
    build = Builder(BASE)
    build.put("a", "lowrank", {"A": gen.normal((2, 4)), "B": gen.normal((6, 2))})
    build.put("a", "magnitude", {"m": gen.normal((6,))})
    return build.done()


def change(delta: Delta, target: str = "a") -> np.ndarray:
    w = BASE.arrays[target]
    return delta.apply(target, w).astype(np.float64) - w


def test_the_id_depends_on_content_and_not_on_notes_or_order(tmp_path: Path) -> None:
    first, other = lowrank(), lowrank(seed=2)
    assert len({first.id, other.id, lowrank(recipe={"seed": 1}).id, lowrank(over=("ab" * 32,)).id, lowrank(config={"x": 1}).id}) == 5
    assert first.id == lowrank(notes={"when": "today"}).id
    swapped = (lowrank("b") + first, first + lowrank("b"))
    entries = [dict(reversed(list(d.entries.items()))) for d in swapped]
    assert list(entries[0]) != list(swapped[0].entries)
    one = Delta(BASE.fingerprint, swapped[0].entries, swapped[0].tensors)
    two = Delta(BASE.fingerprint, entries[0], dict(reversed(list(swapped[0].tensors.items()))))
    assert one.id == two.id
    one.save(tmp_path / "1.safetensors")
    two.save(tmp_path / "2.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_scaling_twice_multiplies_and_keeps_additive_ops_flat() -> None:
    delta = lowrank()
    twice = 3.0 * (2.0 * delta)
    assert [op.op for op in twice.entries["a"].ops] == ["lowrank"] and twice.entries["a"].ops[0].cfg["scale"] == 3.0
    np.testing.assert_allclose(change(twice), 6 * change(delta), atol=1e-5)
    again = 2.0 * (0.25 * dora())
    assert [op.op for op in again.entries["a"].ops] == ["sum"] and len(again.entries["a"].ops[0].terms) == 1
    np.testing.assert_allclose(change(again), 0.5 * change(dora()), atol=1e-5)


def test_sums_of_low_ranks_stay_low_rank_and_other_targets_are_kept() -> None:
    both = lowrank() + lowrank("b") + lowrank(seed=4)
    assert [op.op for op in both.entries["a"].ops] == ["lowrank", "lowrank"] and set(both.entries) == {"a", "b"}
    np.testing.assert_allclose(change(both), change(lowrank()) + change(lowrank(seed=4)), atol=1e-5)
    assert all(key.startswith(("a//0.", "a//1.", "b//0.")) for key in both.tensors)
    assert both.parents[1] == lowrank(seed=4).id and both.recipe["verb"] == "add"


def test_shared_tensors_stay_shared_when_equal_and_apart_when_not() -> None:
    def made(pool_seed: int) -> Delta:
        gen = Generator(7)
        build = Builder(BASE)
        shared = build.share("A", Generator(pool_seed).normal((2, 4)))
        for target in ("a", "b"):
            build.put(target, "lowrank", {"A": shared, "B": gen.normal((6, 2))})
        return build.done()

    same, apart = made(1) + made(1), made(1) + made(2)
    assert [k for k in same.tensors if k.startswith("@shared/")] == ["@shared/A"]
    assert sorted(k for k in apart.tensors if k.startswith("@shared/")) == ["@shared/A", "@shared/A'"]
    np.testing.assert_allclose(change(apart), change(made(1)) + change(made(2)), atol=1e-5)
    with pytest.raises(InputError, match="shared twice"):
        build = Builder(BASE)
        build.share("x", np.ones(1, np.float32))
        build.share("x", np.ones(1, np.float32))


def test_then_is_order_and_drops_the_delta_it_now_contains_from_over() -> None:
    first = dora()
    second = lowrank(over=(first.id, "ef" * 32))
    both = first.then(second)
    assert both.over == ("ef" * 32,)
    np.testing.assert_array_equal(both.apply("a", BASE.arrays["a"]), second.apply("a", first.apply("a", BASE.arrays["a"])))


def test_over_is_asked_for() -> None:
    below = lowrank()
    delta = lowrank(seed=5, over=(below.id,))
    delta.require_base(BASE, on=[below.id])
    with pytest.raises(MismatchError, match=rf"made over {below.id[:12]}; missing: {below.id[:12]}"):
        delta.require_base(BASE)


def test_groups_are_whole_or_not_at_all() -> None:
    build = Builder(BASE)
    perm = build.share("res", np.array([2, 0, 1, 3, 5, 4]))
    for target in ("a", "b"):
        build.put(target, "permute", {"perm": perm}, group="res")
    build.put("c", "dense", {"values": np.ones(4, np.float32)})
    delta = build.done()
    assert set(delta.only(["c"]).entries) == {"c"} and not delta.only(["c"]).tensors.keys() & {"@shared/res"}
    assert set(delta.only(["a", "b"]).entries) == {"a", "b"}
    with pytest.raises(MismatchError, match="b belongs to a group"):
        delta.only(["a", "c"])
    with pytest.raises(MismatchError, match="no entry for 'cc'; did you mean 'c'"):
        delta.only(["cc"])


def test_structure_entries_combine_only_where_that_has_a_meaning() -> None:
    def head(seed: int) -> Delta:
        build = Builder(BASE)
        build.add("head", Generator(seed).normal((2, 4)))
        return build.done(config={"id2label": {"0": "x"}})

    zero = np.zeros((2, 4), np.float32)
    mixed = 0.5 * head(1) + 0.5 * head(2)
    want = 0.5 * (head(1).apply("head", zero) + head(2).apply("head", zero))
    np.testing.assert_allclose(mixed.apply("head", zero), want, atol=1e-6)
    build = Builder(BASE)
    build.remove("b")
    build.copy("b2", "a")
    build.add("c", np.ones(7, np.float32), kind="replace")
    shapes = build.done()
    assert shapes.entries["b2"].base is not None and shapes.entries["b2"].shape == (6, 4)
    with pytest.raises(MismatchError, match="b: a remove entry cannot be scaled"):
        _ = 2.0 * shapes
    with pytest.raises(MismatchError, match="b: the deltas change it in ways that do not combine"):
        _ = shapes + lowrank("b")
    with pytest.raises(MismatchError, match=r"disagree about config\.id2label\.0: 'x' and 'y'"):
        _ = head(1) + Delta(BASE.fingerprint, head(2).entries, head(2).tensors, config={"id2label": {"0": "y"}})
    with pytest.raises(MismatchError, match=r"different bases: abab.* and cdcd"):
        _ = lowrank() + lowrank(base=MemoryBase(BASE.arrays, fingerprint="cd" * 32))


def test_live_targets() -> None:
    from weft import ops

    build = Builder(BASE)
    kind = next(k for k in ops.kinds() if ops.get(k).on == "module")
    build.put("@module/layer.0", kind, ops.get(kind).example((4,), Generator(1)))
    delta = build.done()
    assert delta.unfoldable == ["@module/layer.0"] and not delta.foldable and lowrank().foldable
    with pytest.raises(MismatchError, match="an op that runs on activations cannot be scaled"):
        _ = -delta
    with pytest.raises(FormatError, match="lowrank changes a weight, not this target"):
        build = Builder(BASE)
        build.put("@module/x", "lowrank", {"A": np.ones((1, 4), np.float32), "B": np.ones((6, 1), np.float32)})
        build.done()


def test_entries_that_make_no_sense_are_refused() -> None:
    dense = OpEntry("dense", {}, {"values": Ref("k")})
    held = lowrank().tensors["a//0.A"]
    base = BaseTensor("F32", (2, 4), "00" * 32)

    def refused(entry: Entry, match: str, target: str = "a") -> None:
        with pytest.raises(FormatError, match=match):
            Delta(None, {target: entry}, {"k": held}).validate()

    Delta(None, {"a": Entry((dense,), base)}, {"k": held}).validate()
    refused(Entry((dense,), base, Change("add", "F32", (2, 4))), "an added tensor has no base tensor")
    refused(Entry((dense,)), "base is missing")
    refused(Entry((), base), "no ops")
    refused(Entry((dense,), base, Change("remove")), "a removed tensor takes no ops")
    refused(Entry((dense,), base, Change("copy", "F32", (4, 2), "x")), "dtype and shape of its source")
    refused(Entry((dense,), base), "neither base nor change", "@module/x")
    refused(Entry((dense,), base), "is not a target", "@blob/x")
    refused(Entry((OpEntry("sum", {}, {}, terms=(Term(1.0, (dense,)),)),), BaseTensor("F32", (3,), "00" * 32)), "op 0 .sum.: field values")
    refused(Entry((OpEntry("sum"),), base), "`sum` takes terms")
    taken = OpEntry("dense", {}, {"values": Ref("k", "k", (2, 4))})
    refused(Entry((taken,), base), "positions must be I64 or I32")


def test_positions_are_checked_before_they_are_used(tmp_path: Path) -> None:
    for op, fields, match in (
        ("sparse", {"index": np.array([3, 1]), "values": np.ones(2, np.float32)}, "sorted, unique"),
        ("sparse", {"index": np.array([0, 24]), "values": np.ones(2, np.float32)}, r"within 0\.\.23"),
        ("assign", {"index": np.array([-1]), "values": np.ones(1, np.float32)}, "sorted, unique"),
        ("permute", {"perm": np.array([0, 1, 1, 2, 3, 4])}, "not a permutation"),
    ):
        build = Builder(BASE)
        build.put("a", op, fields)
        (build.done() if op == "permute" else 1.0 * build.done()).save(path := tmp_path / f"{op}.safetensors")
        with pytest.raises(FormatError, match=match):
            Delta.load(path)
    build = Builder(BASE)
    build.share("pool", np.ones((3, 4), np.float32))
    build.share("rows", np.array([0, 3]))
    build.put("a", "lowrank", {"A": Ref("@shared/pool", "@shared/rows", (2, 4)), "B": np.ones((6, 2), np.float32)})
    build.done().save(path)
    with pytest.raises(FormatError, match=r"@shared/rows: positions must be within 0\.\.2"):
        Delta.load(path)


def test_blobs_are_kept_and_need_no_op(tmp_path: Path) -> None:
    build = Builder(BASE)
    build.put("c", "dense", {"values": np.ones(4, np.float32)})
    build.blob("ledger", b"bookkeeping")
    build.done().save(path := tmp_path / "d.safetensors")
    assert Delta.load(path).get("@blob/ledger").tobytes() == b"bookkeeping"
    assert "blob" in " ".join((2.0 * Delta.load(path)).tensors)


def test_config_patches_are_joined_where_they_agree() -> None:
    assert merge_patches({"a": {"b": 1}}, {"a": {"c": 2}, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
    with pytest.raises(MismatchError, match=r"config\.a\.b"):
        merge_patches({"a": {"b": 1}}, {"a": {"b": 2}})


def test_a_file_name_that_is_no_delta_and_a_manifest_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"one \.safetensors file"):
        lowrank().save(tmp_path / "x.bin")
    with pytest.raises(InputError, match="cannot be written as JSON"):
        lowrank(recipe={"seed": 2**60}).save(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == [] and "lowrank" not in repr(lowrank()) and "1 targets" in repr(lowrank())


def test_a_group_inside_a_sum_is_taken_whole_too() -> None:
    build = Builder(BASE)
    perm = build.share("perm", np.array([5, 4, 3, 2, 1, 0]))
    for target in ("a", "b"):
        build.put(target, "permute", {"perm": perm}, group="res")
    half = 0.5 * build.done()
    assert {op.op for entry in half.entries.values() for op in entry.ops} == {"sum"}
    with pytest.raises(MismatchError, match="taken whole or not at all"):
        half.only(["a"])
    assert set(half.only(["a", "b"]).entries) == {"a", "b"}


def test_integers_take_no_arithmetic() -> None:
    """n is I64: its new values can follow one another, but not be scaled or added, and no `sum` may say otherwise."""

    def numbered(*values: int) -> Delta:
        build = Builder(BASE)
        build.put("n", "assign", {"values": np.array(values)})
        return build.done()

    one, two = numbered(1, 2, 3), numbered(4, 5, 6)
    with pytest.raises(MismatchError, match=r"^n: .*I64.*scaled"):
        _ = 2.0 * one
    with pytest.raises(MismatchError, match=r"^n: .*I64.*added"):
        _ = one + two
    assert len(one.then(two).entries["n"].ops) == 2
    entry = one.entries["n"]
    summed = Delta(one.base, {"n": Entry((OpEntry("sum", terms=(Term(1.0, entry.ops),)),), entry.base)}, one.tensors)
    with pytest.raises(FormatError, match="takes only `assign`, got 'sum'"):
        summed.validate()


def test_positions_taken_from_a_pool_cannot_outgrow_the_file(tmp_path: Path) -> None:
    build = Builder(BASE)
    pool, rows = build.share("pool", np.arange(8).reshape(4, 2)), build.share("rows", np.array([0, 2]))
    build.put("a", "sparse", {"index": Ref(pool.key, rows.key, (4,)), "values": np.ones(4, np.float32)})
    build.done().save(path := tmp_path / "d.safetensors")
    with pytest.raises(FormatError, match=r"@shared/pool: positions are taken from a pool of one axis, got shape \[4, 2\]"):
        Delta.load(path)


def test_what_no_op_changes_keeps_its_bytes() -> None:
    """Signs of zeros, infinities and NaNs with a payload, under an op that adds nothing there and under a sum of one."""
    w = np.array([-0.0, 0.0, np.inf, -np.inf, 1.5, 0.0], np.float32)
    w.view(np.uint32)[5] = 0x7FC12345
    data = {"i": np.array([4]), "v": np.array([2.0], np.float32), "A": np.zeros((1, 1), np.float32), "B": np.ones((6, 1), np.float32)}
    sparse, nothing = OpEntry("sparse", {}, {"index": Ref("i"), "values": Ref("v")}), OpEntry("lowrank", {}, {"A": Ref("A"), "B": Ref("B")})
    want = w.copy()
    want[4] = 2.5
    got = chain.rewrite(w, [OpEntry("sum", terms=(Term(0.5, (sparse,)),))], data.__getitem__)
    assert got.tobytes() == want.tobytes()
    finite = w[:2].astype(np.float32)
    data["B"] = data["B"][:2]
    for dtype in (np.float32, np.float16):
        stored = finite.astype(dtype)
        assert chain.rewrite(stored, [nothing], data.__getitem__).tobytes() == stored.tobytes()
        with xp.exact():
            there = {key: xp.to_torch(value) for key, value in data.items()}
            assert xp.to_numpy(chain.rewrite(xp.to_torch(stored), [nothing], there.__getitem__)).tobytes() == stored.tobytes()
