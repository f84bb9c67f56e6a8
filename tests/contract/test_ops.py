"""The contract of every op. A new file in `weft/ops` is tested here without another line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.conftest import MemoryBase, bits, raw_for
from weft import ops, xp
from weft.delta import Builder, Delta
from weft.errors import FormatError, MismatchError
from weft.ops import Generator, Ref, chain

WEIGHT_OPS = [kind for kind in ops.kinds() if ops.get(kind).on == "weight"]
LIVE_OPS = [kind for kind in ops.kinds() if ops.get(kind).on != "weight"]
SHAPES = [(24, 16), (16, 16), (12, 8, 3, 3), (24,), (3, 8, 6)]
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def made(kind: str, shape: tuple[int, ...], dtype: Any = np.float32, *, at_init: bool = False) -> tuple[Delta, np.ndarray]:
    """A delta with one op on `w`, with random tensors or as initialised, and the base tensor."""
    gen = Generator(11)
    op = ops.get(kind)
    w = gen.normal(shape).astype(dtype)
    t = op.init(shape, gen) if at_init else op.example(shape, gen)
    t, cfg = raw_for(t, dtype) if op.raw else (t, {})
    build = Builder(MemoryBase({"w": w}))
    build.put("w", kind, t, **cfg)
    return build.done(), w


def shape_for(kind: str) -> tuple[int, ...]:
    """What `init` wants: the shape of a weight, or the width of what flows through a module or an input."""
    return (24, 16) if ops.get(kind).on == "weight" else (16,)


def test_there_are_ops() -> None:
    assert {"dense", "assign", "sparse", "lowrank", "svd", "bilinear", "kron", "tucker", "scale_shift", "magnitude", "permute", "seeded"} <= set(WEIGHT_OPS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHT_OPS)
def test_identity_at_init(kind: str, shape: tuple[int, ...]) -> None:
    delta, w = made(kind, shape, at_init=True)
    same = bits(delta.apply("w", w)) == bits(w)
    assert same or not ops.get(kind).identity_at_init


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHT_OPS)
def test_random_tensors_change_w_in_the_same_bits_in_numpy_and_torch(kind: str, shape: tuple[int, ...]) -> None:
    delta, w = made(kind, shape)
    changed = delta.apply("w", w)
    assert changed.dtype == w.dtype and changed.shape == w.shape
    assert bits(changed) != bits(w)
    before = w.copy()
    with xp.exact():
        assert bits(delta.apply("w", torch.from_numpy(w))) == bits(changed)
    assert bits(before) == bits(w), "apply wrote in place"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHT_OPS)
def test_plain_torch_agrees_and_has_gradients(kind: str, shape: tuple[int, ...]) -> None:
    delta, w = made(kind, shape)
    op = ops.get(kind)
    leaves = {k: xp.to_torch(delta.get(k)).clone() for k in delta.tensors}
    for leaf in leaves.values():
        if leaf.is_floating_point():
            leaf.requires_grad_()
    out = chain.apply_chain(torch.from_numpy(w), delta.entries["w"].ops, leaves.__getitem__)
    torch.testing.assert_close(out.detach(), torch.from_numpy(delta.apply("w", w)), rtol=2e-5, atol=2e-5)
    weights = torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)
    if any(leaf.requires_grad for leaf in leaves.values()):
        (out * weights).sum().backward()
        for name, leaf in leaves.items():
            if leaf.requires_grad and leaf.numel():
                assert leaf.grad is not None and leaf.grad.abs().sum() > 0, f"{op.kind}: no gradient on {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHT_OPS)
def test_rewrite_rounds_once_and_blocks_of_rows_give_the_same_bytes(kind: str, shape: tuple[int, ...], dtype: Any) -> None:
    delta, w = made(kind, shape, dtype)
    chained = delta.entries["w"].ops
    whole = chain.rewrite(w, chained, delta.get)
    assert bits(whole) == bits(delta.apply("w", w.astype(np.float32)).astype(dtype))
    with xp.exact():
        assert bits(chain.rewrite(xp.to_torch(w), chained, lambda key: xp.to_torch(delta.get(key)))) == bits(whole)
    if chain.streams(shape, chained):
        parts = []
        for lo in range(0, shape[0], 5):
            rows = chain.Rows(chained, delta.tensors.__getitem__, shape, lo, min(lo + 5, shape[0]))
            parts.append(chain.rewrite(w[lo : lo + 5], rows.ops, rows.get))
        assert bits(np.concatenate(parts)) == bits(whole)


@pytest.mark.parametrize("kind", WEIGHT_OPS)
def test_the_row_contract_is_kept_by_most_ops(kind: str) -> None:
    """What cannot stream must have a reason; a new op that forgets `by_rows` is seen here."""
    delta, _ = made(kind, (24, 16))
    assert chain.streams((24, 16), delta.entries["w"].ops) == (kind not in {"kron", "permute"})


@pytest.mark.parametrize("kind", WEIGHT_OPS)
def test_nan_bytes_that_no_op_touches_are_kept(kind: str) -> None:
    delta, w = made(kind, (24, 16), ml_dtypes.bfloat16)
    raw = w.view(np.uint16).copy()
    raw[3, 4] = 0x7FA5  # a signalling NaN with a payload
    out = chain.rewrite(raw.view(ml_dtypes.bfloat16), delta.entries["w"].ops, delta.get).view(np.uint16)
    if kind in ("sparse", "assign"):
        touched = set(delta.get("w//0.index").tolist())
        assert (3 * 16 + 4 in touched) or out[3, 4] == 0x7FA5
    assert np.isnan(out.view(ml_dtypes.bfloat16).astype(np.float32)).any() or kind == "assign"


@pytest.mark.parametrize("factor", [0.5, -1.0, 3.0])
@pytest.mark.parametrize("kind", WEIGHT_OPS)
def test_scale_and_add_speak_of_increments(kind: str, factor: float) -> None:
    delta, w = made(kind, (24, 16))
    step = delta.apply("w", w).astype(np.float64) - w
    np.testing.assert_allclose(delta.scaled(factor).apply("w", w) - w.astype(np.float64), factor * step, atol=2e-5)
    other, _ = made("lowrank", (24, 16))
    both = step + (other.apply("w", w).astype(np.float64) - w)
    np.testing.assert_allclose((delta + other).apply("w", w) - w.astype(np.float64), both, atol=2e-5)
    np.testing.assert_array_equal(delta.then(other).apply("w", w), other.apply("w", delta.apply("w", w)))
    np.testing.assert_allclose((delta + (-delta)).apply("w", w), w, atol=1e-5)


@pytest.mark.parametrize("kind", ops.kinds())
def test_save_load_save_is_byte_identical(kind: str, tmp_path: Path) -> None:
    op = ops.get(kind)
    build = Builder(MemoryBase({"w": Generator(1).normal((24, 16))}))
    target = {"weight": "w", "module": "@module/layer", "input": "@input/embeddings"}[op.on]
    build.put(target, kind, op.example(shape_for(kind), Generator(2)))
    delta = build.done(recipe={"verb": "test"}, notes={"when": "now"})
    id = delta.save(first := tmp_path / "a.safetensors")
    again = Delta.load(first)
    assert again.save(second := tmp_path / "b.safetensors") == id == delta.id == again.id
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("kind", ops.kinds())
def test_missing_extra_unknown_and_misshapen_fields_are_refused(kind: str) -> None:
    op = ops.get(kind)
    target = {"weight": "w", "module": "@module/layer", "input": "@input/embeddings"}[op.on]
    t = op.example(shape_for(kind), Generator(2))

    def build(fields: dict[str, Any], **cfg: Any) -> Delta:
        builder = Builder(MemoryBase({"w": Generator(1).normal((24, 16))}))
        builder.put(target, kind, fields, **cfg)
        return builder.done()

    build(t)
    with pytest.raises(FormatError, match="nonsense"):
        build({**t, "nonsense": np.ones(2, np.float32)})
    with pytest.raises(FormatError, match="unknown config key 'nonsense'"):
        build(t, nonsense=1)
    for field in op.fields:
        with pytest.raises(FormatError, match=field):
            build({k: v for k, v in t.items() if k != field})
    for field, value in t.items():
        with pytest.raises(FormatError, match=r"\[|kron|ranks?|positions"):
            build({**t, field: np.ones((*value.shape, 2), value.dtype)})
        wrong = np.zeros(value.shape, np.float32 if value.dtype.kind == "i" else np.int64)
        with pytest.raises(FormatError, match=field):
            build({**t, field: wrong})


@pytest.mark.parametrize("kind", WEIGHT_OPS)
def test_wrong_base_is_refused(kind: str) -> None:
    delta, w = made(kind, (24, 16))
    delta.require_base(MemoryBase({"w": w}))
    with pytest.raises(MismatchError, match=r"abababababab.*cdcdcdcdcdcd"):
        delta.require_base(MemoryBase({"w": w}, fingerprint="cd" * 32))
    with pytest.raises(MismatchError, match="'w' is not the one it was made for"):
        delta.require_base(MemoryBase({"w": w + 1}, fingerprint=None))


@pytest.mark.parametrize("kind", WEIGHT_OPS)
def test_views_limit_an_op_to_a_part(kind: str) -> None:
    """The same op through reshape, transpose and index equals the op on the part cut out by hand."""
    gen = Generator(4)
    op = ops.get(kind)
    w = gen.normal((4, 6, 10))
    at = ops.At(reshape=(4, 60), transpose=(1, 0), index=((6, 30),))
    part = w.reshape(4, 60).T[6:30]
    t = op.example(part.shape, gen)
    build = Builder(MemoryBase({"w": w}))
    build.put("w", kind, t, at=at)
    out = build.done().apply("w", w).reshape(4, 60).T
    np.testing.assert_array_equal(out[6:30], op.apply(np.ascontiguousarray(part), t, op.config({})))
    np.testing.assert_array_equal(out[:6], w.reshape(4, 60).T[:6])
    np.testing.assert_array_equal(out[30:], w.reshape(4, 60).T[30:])


def test_references_take_rows_of_a_shared_pool() -> None:
    """Mixture of shards: A is made of rows of a pool, the gradient of A arrives at the pool."""
    gen = Generator(6)
    w, pool = gen.normal((5, 8)), gen.normal((7, 4))
    index = np.array([[0, 3], [6, 3]], np.int32)
    build = Builder(MemoryBase({"w": w}))
    build.share("pool", pool)
    build.share("rows", index)
    b = gen.normal((5, 2))
    build.put("w", "lowrank", {"A": Ref("@shared/pool", "@shared/rows", (2, 8)), "B": b})
    delta = build.done()
    a = pool[index.reshape(-1)].reshape(2, 8)
    np.testing.assert_allclose(delta.apply("w", w), w + b @ a, atol=1e-6)
    leaf = torch.from_numpy(pool.copy()).requires_grad_()
    values = {"@shared/pool": leaf, "@shared/rows": torch.from_numpy(index), "w//0.B": torch.from_numpy(b)}
    chain.apply_chain(torch.from_numpy(w), delta.entries["w"].ops, values.__getitem__).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[3].abs().sum() > 0 and leaf.grad[1].abs().sum() == 0


def test_assign_after_floats_replays_bytes_and_integers_take_nothing_else() -> None:
    gen = Generator(8)
    base = MemoryBase({"w": gen.normal((6, 4)), "i": np.arange(5)})
    build = Builder(base)
    build.put("w", "lowrank", {"A": gen.normal((2, 4)), "B": gen.normal((6, 2))})
    build.put("w", "assign", {"index": np.array([0, 5]), "values": np.array([np.nan, -0.0], np.float32)})
    build.put("i", "assign", {"values": np.arange(5)[::-1].copy()})
    delta = build.done()
    out = chain.rewrite(base.arrays["w"], delta.entries["w"].ops, delta.get)
    assert np.isnan(out[0, 0]) and bits(out[1, 1]) == bits(np.float32(-0.0)) and out[2, 2] != base.arrays["w"][2, 2]
    np.testing.assert_array_equal(chain.rewrite(base.arrays["i"], delta.entries["i"].ops, delta.get), [4, 3, 2, 1, 0])
    build = Builder(base)
    build.put("i", "dense", {"values": np.ones(5, np.float32)})
    with pytest.raises(FormatError, match="I64 tensor takes only `assign`"):
        build.done()
