"""Coded tensors: one suite over every code, the payload, and hostile bytes; then `ternary` against a slow reading of its own page."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import tracemalloc
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import MemoryBase, bits
from weft import codes
from weft.codes import BLOCK, Coded, Spool, encode, entries
from weft.codes.ternary import rice
from weft.delta import Builder, Delta
from weft.engine.stream import in_threads
from weft.errors import FormatError
from weft.stored import ITEMSIZE, Computed, Held, Stored, Tensor, numpy_dtype, read_container

EXAMPLES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "codebook": [
        ("F32", "F32", {"table": [-0.5, 0, 0.25, 2], "form": "packed"}),
        ("BF16", "BF16", {"table": [-0.5, 0, 0.5], "form": "huffman"}),
        ("F32", "F16", {"table": [-1, 0, 1], "form": "gaps"}),
    ],
    "dropped": [
        ("F32", "F32", {"key": "00ff00ff12345678", "drop": 45875, "factor": 2.5, "dtype": "BF16"}),
        ("BF16", "F32", {"key": "0000000000000001", "drop": 0, "factor": 1, "dtype": "F32"}),
    ],
    "integers": [("F32", "F32", {"bits": 4, "group": 64}), ("BF16", "BF16", {"bits": 8, "group": 100}), ("F64", "F32", {"bits": 3, "group": 1 << 40})],
    "planes": [
        ("F32", "F32", {"level": 3, "steps": False}),
        ("BF16", "BF16", {"level": 1, "steps": False}),
        ("I64", "I64", {"level": 3, "steps": True}),
        ("U8", "U8", {"level": 9, "steps": True}),
        ("BOOL", "BOOL", {"level": 3, "steps": False}),
    ],
    "ternary": [
        ("F32", "F32", {"scale": 0.01, "form": "golomb"}),
        ("BF16", "F32", {"scale": 3, "form": "golomb"}),
        ("F64", "F32", {"scale": 0.5, "form": "bitmask"}),
    ],
}
"""For each code: the dtype that it is given, the one that it gives back, its config."""

CASES = [pytest.param(name, *example, id=f"{name}-{number}") for name, each in EXAMPLES.items() for number, example in enumerate(each)]
SHAPES = [(0,), (), (1,), (7, 0, 3), (3, 1000), (BLOCK,), (BLOCK + 1,), (5, 7, 9000), (2 * BLOCK - 1, 1)]


def values(dtype: str, shape: tuple[int, ...], seed: int = 1) -> np.ndarray[Any, Any]:
    """Numbers of any dtype, a third of them zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * (rng.random(shape) < 0.67)
    return (x * 50 if dtype[0] in "IU" else x > 0 if dtype == "BOOL" else x).astype(np.int64 if dtype[0] in "IU" else None).astype(numpy_dtype(dtype))


def coded(name: str, given: str, made: str, cfg: dict[str, Any], shape: tuple[int, ...], **more: Any) -> Coded:
    return encode(Held(values(given, shape)), name, cfg, dtype=made, **more)


def test_every_code_is_tried_here() -> None:
    assert sorted(EXAMPLES) == codes.names()
    for name in codes.names():
        assert codes.get(name).name == name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "given", "made", "cfg"), CASES)
def test_any_part_is_part_of_the_whole(name: str, given: str, made: str, cfg: dict[str, Any], shape: tuple[int, ...]) -> None:
    tensor = coded(name, given, made, cfg, shape)
    tensor.check()
    whole = tensor.read()
    assert (whole.shape, whole.dtype, tensor.shape, tensor.dtype) == (shape, numpy_dtype(made), shape, made)
    assert tensor.nbytes == whole.nbytes and tensor.payload.nbytes >= 4 * math.ceil(whole.size / BLOCK)
    assert b"".join(map(bytes, tensor.blocks(1000))) == bits(whole) == b"".join(map(bytes, tensor.blocks()))
    if codes.get(name).lossless:
        assert bits(whole) == bits(values(given, shape))
    if shape:
        rng = np.random.default_rng(3)
        for lo, hi in [(0, shape[0]), (0, 0), *(sorted(rng.integers(0, shape[0] + 1, 2)) for _ in range(6))]:
            assert bits(tensor.rows(int(lo), int(hi))) == bits(whole[lo:hi])
            assert tensor.rows(int(lo), int(hi)).shape == (hi - lo, *shape[1:])


@pytest.mark.parametrize(("name", "given", "made", "cfg"), CASES)
def test_the_payload_depends_on_the_numbers_alone(name: str, given: str, made: str, cfg: dict[str, Any]) -> None:
    """Not on threads, on where it is kept, or on how the tensor gives its bytes."""
    shape = (5, 7, 9000)
    raw = values(given, shape).tobytes()

    def ragged() -> Iterator[bytes]:
        size = 1
        start = 0
        while start < len(raw):
            yield raw[start : start + size]
            start, size = start + size, size * 3 + 1

    one = coded(name, given, made, cfg, shape)
    spool = Spool(in_memory=1000)
    first = coded(name, given, made, cfg, (3, 5), spool=spool)
    others = [
        coded(name, given, made, cfg, shape, run=partial(in_threads, threads=4)),
        coded(name, given, made, cfg, shape, spool=spool),
        encode(Computed(given, shape, ragged), name, cfg, dtype=made),
        encode(Held(values(given, shape)), name, cfg, dtype=made, each=lambda x: x.copy()),
    ]
    assert {each.sha256 for each in others} == {one.sha256} == {hashlib.sha256(bits(one.payload.read())).hexdigest()}
    assert bits(others[1].rows(2, 4)) == bits(one.rows(2, 4))
    assert first.sha256 == coded(name, given, made, cfg, (3, 5)).sha256


@pytest.mark.parametrize(("name", "given", "made", "cfg"), CASES)
def test_a_delta_with_coded_tensors_is_a_file_like_any_other(name: str, given: str, made: str, cfg: dict[str, Any], tmp_path: Path) -> None:
    shape = (30, 5000)
    tensor = coded(name, given, made, cfg, shape)
    base = MemoryBase({"a.weight": values(made, shape, 2), "b.weight": values(made, shape, 3)})
    build = Builder(base)
    shared = build.share("values", tensor)
    for target in base.arrays:
        build.put(target, "assign", {"values": shared})
    delta = build.done(recipe={"verb": "test"})
    assert delta.nbytes == tensor.payload.nbytes
    path = tmp_path / "coded.safetensors"
    id = delta.save(path)
    back = Delta.load(path)
    assert back.id == id == delta.id
    key = "@shared/values"
    found = back.tensors[key]
    assert isinstance(found, Coded) and isinstance(found.payload, Stored) and found.coding == {"code": name, "cfg": cfg, "dtype": made, "shape": list(shape)}
    assert bits(back.get(key)) == bits(tensor.read()) and bits(found.rows(3, 17)) == bits(tensor.rows(3, 17))
    again = tmp_path / "again.safetensors"
    back.save(again)
    assert again.read_bytes() == path.read_bytes()
    stored, metadata = read_container(path)
    manifest = json.loads(metadata["weft"])
    assert stored[key].dtype == "U8" and manifest["tensors"][key]["dtype"] == "U8" and list(manifest["codes"]) == [key]


def test_without_coded_tensors_the_manifest_is_as_it_always_was(small_delta: Path) -> None:
    assert "codes" not in Delta.load(small_delta).manifest()


def test_the_same_payload_in_another_code_is_another_tensor() -> None:
    """Shared tensors are one only if they mean the same numbers."""
    base = MemoryBase({"w": values("F32", (4, 5))})
    deltas = []
    for scale in (1.0, 2.0):
        build = Builder(base)
        build.put("w", "dense", {"values": build.share("v", encode(Held(values("F32", (4, 5))), "ternary", {"scale": scale, "form": "golomb"}))})
        deltas.append(build.done())
    assert deltas[0].tensors["@shared/v"].sha256 == deltas[1].tensors["@shared/v"].sha256 and deltas[0].id != deltas[1].id
    got = (deltas[0] + deltas[1]).apply("w", np.zeros((4, 5), np.float32))
    assert bits(got) == bits(3 * np.sign(values("F32", (4, 5))) + np.float32(0))


# --- hostile bytes


def payload_of(tensor: Coded) -> bytes:
    return b"".join(map(bytes, tensor.payload.blocks()))


def held(data: bytes) -> Tensor:
    return Held(np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(("name", "given", "made", "cfg"), CASES)
def test_hostile_payloads(name: str, given: str, made: str, cfg: dict[str, Any]) -> None:
    """Whatever the bytes, reading ends in numbers of the right shape or in a FormatError that says which code and block."""
    shape = (300, 7)
    good = coded(name, given, made, cfg, shape)
    payload = payload_of(good)
    body = payload[4:]

    def attempt(data: bytes) -> bool:
        try:
            got = Coded(made, shape, name, cfg, held(data)).read()
        except FormatError as error:
            assert name in error.message
            return True
        assert got.shape == shape and got.dtype == numpy_dtype(made)
        return False

    def framed(block: bytes) -> bytes:
        return len(block).to_bytes(4, "little") + block

    assert not attempt(framed(body))
    for cut in sorted({0, 1, 3, 4, 5, len(body) // 2, len(body) - 1} & set(range(len(body)))):
        assert attempt(framed(body[:cut])), cut
    assert attempt(framed(body + b"\x00")) and attempt(framed(body + body))
    assert attempt(payload[:-1]) and attempt(payload + b"\x00") and attempt(b"") and attempt(b"\xff" * 4) and attempt((1 << 31).to_bytes(4, "little") + body)
    rng = np.random.default_rng(5)
    for _ in range(300):
        damaged = bytearray(body)
        for place in rng.integers(0, len(damaged), rng.integers(1, 4)):
            damaged[place] ^= 1 << int(rng.integers(0, 8))
        attempt(framed(bytes(damaged)))
    for size in (1, 4, 5, 100, 4000):
        for _ in range(20):
            attempt(framed(rng.integers(0, 256, size, np.uint8).tobytes()))
        attempt(framed(b"\xff" * size))
        attempt(framed(b"\x00" * size))


@pytest.mark.parametrize(("name", "given", "made", "cfg"), CASES)
def test_hostile_configs(name: str, given: str, made: str, cfg: dict[str, Any]) -> None:
    """Each member of the config missing, unknown, or of any other kind."""
    good = coded(name, given, made, cfg, (20, 20))
    hostile: list[Any] = [None, "", "surprise", [], {}, -1, math.nan, math.inf, True, 10**400, "9" * 10000, [[]], ["x"]]
    bad: list[dict[str, Any]] = [{**cfg, "surprise": 1}]
    for key in cfg:
        bad += [{k: v for k, v in cfg.items() if k != key}]
        bad += [{**cfg, key: value} for value in hostile if value is not cfg[key]]
    for config in bad:
        with pytest.raises(FormatError, match=name) as caught:
            Coded(made, (20, 20), name, config, good.payload).read()
        assert len(caught.value.message) < 400


def test_a_hostile_block_takes_no_more_memory_than_its_entries() -> None:
    """Quotients in unary are bits, each of which becomes an entry."""
    block = (1 << 8).to_bytes(4, "little") + b"\x00" + b"\xff" * (16 << 20)
    bad = Coded("F32", (20, 20), "ternary", {"scale": 1, "form": "golomb"}, held(len(block).to_bytes(4, "little") + block))
    tracemalloc.start()
    with pytest.raises(FormatError, match="quotients for 1 of 400 positions"):
        bad.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("op", ["sparse", "assign"])
def test_more_positions_than_entries_are_refused_before_they_are_read(op: str) -> None:
    """A few kilobytes of planes can stand for gigabytes of positions."""
    count = 50 * BLOCK
    index = encode(Held(np.arange(count)), "planes", {"level": 1, "steps": True})
    assert index.nbytes > 200 * index.payload.nbytes
    x = encode(Held(np.zeros(count, np.float32)), "planes", {"level": 1, "steps": False})
    build = Builder(MemoryBase({"w": values("F32", (20, 20))}))
    build.put("w", op, {"index": index, "values": x})
    with pytest.raises(FormatError, match="field index: 3,276,800 positions in a target of 400 entries"):
        build.done()


def test_nothing_is_kept_of_a_tensor_that_is_gone() -> None:
    """Not its payload either, which may be a file: the blocks that a thread remembers are not the tensor."""
    spool = Spool(in_memory=10)
    tensor = coded("planes", *EXAMPLES["planes"][0], (3, 1000), spool=spool)
    assert tensor.rows(1, 2).shape == (1, 1000)
    file, gone = spool._file, weakref.ref(spool)
    del spool, tensor
    gc.collect()
    assert gone() is None and file.closed


def test_hostile_claims() -> None:
    good = coded("ternary", *EXAMPLES["ternary"][0], (20, 20))
    cfg = dict(good.cfg)
    for dtype, shape, code, payload, said in [
        ("F32", (1 << 40, 1 << 20), "ternary", good.payload, "at least"),
        ("F32", (20, 0), "ternary", good.payload, "none: 0"),
        ("F33", (20, 20), "ternary", good.payload, "unknown dtype"),
        ("I64", (20, 20), "ternary", good.payload, "F32"),
        ("F32", (20, 20), "ternari", good.payload, "did you mean 'ternary'"),
        ("F32", (20, 20), "_spool", good.payload, "unknown code"),
        ("F32", (20, 20), "../ops/dense", good.payload, "unknown code"),
        ("F32", (20, 20), "ternary", Held(np.zeros((2, 40), np.uint8)), "one axis"),
        ("F32", (20, 20), "ternary", Held(np.zeros(40, np.int8)), "U8"),
    ]:
        with pytest.raises(FormatError, match=said):
            Coded(dtype, shape, code, cfg, payload)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(codes={}), "not empty"),
        (lambda m: m.update(codes=[]), "object"),
        (lambda m: m["codes"].update({"w//0.other": m["codes"]["w//0.values"]}), "is not there"),
        (lambda m: m["codes"]["w//0.values"].update(more=1), "unknown"),
        (lambda m: m["codes"]["w//0.values"].pop("cfg"), "lacks"),
        (lambda m: m["codes"]["w//0.values"].update(shape=[20, 21]), "expected shape"),
        (lambda m: m["codes"]["w//0.values"].update(shape=[-20, -20]), "sizes"),
        (lambda m: m["codes"]["w//0.values"].update(shape=[2**52, 2**52]), "at least"),
        (lambda m: m["codes"]["w//0.values"].update(dtype=7), "dtype"),
        (lambda m: m["codes"]["w//0.values"].update(code=None), "name"),
        (lambda m: m["codes"]["w//0.values"]["cfg"].update(scale=0), "scale"),
        (lambda m: m.pop("codes"), "expected shape"),
    ],
)
def test_hostile_manifests(change: Any, said: str, tmp_path: Path) -> None:
    """With honest hashes, as in test_file."""
    from tests.test_file import refused, remade

    build = Builder(MemoryBase({"w": values("F32", (20, 20))}))
    build.put("w", "dense", {"values": coded("ternary", *EXAMPLES["ternary"][0], (20, 20))})
    build.done().save(path := tmp_path / "good.safetensors")
    refused(tmp_path / "hostile.safetensors", remade(path.read_bytes(), change), said)


def test_a_wrong_table_of_lengths_is_found_when_the_file_is_opened(tmp_path: Path) -> None:
    good = coded("ternary", *EXAMPLES["ternary"][0], (2, BLOCK))
    data = bytearray(payload_of(good))
    data[0] ^= 1
    build = Builder(MemoryBase({"w": values("F32", (2, BLOCK))}))
    build.put("w", "dense", {"values": Coded("F32", (2, BLOCK), "ternary", good.cfg, held(bytes(data)))})
    build.done().save(path := tmp_path / "bad.safetensors")
    with pytest.raises(FormatError, match=r"bad\.safetensors.*w//0\.values.*its blocks end at byte"):
        Delta.load(path)


def test_a_wrong_block_is_named_and_others_can_be_read() -> None:
    good = coded("ternary", *EXAMPLES["ternary"][0], (3, BLOCK))
    data = bytearray(payload_of(good))
    second = 12 + int.from_bytes(data[:4], "little")
    data[second : second + 4] = b"\xff" * 4
    bad = Coded("F32", (3, BLOCK), "ternary", good.cfg, held(bytes(data)), "somewhere")
    assert bits(bad.rows(2, 3)) == bits(good.rows(2, 3))
    with pytest.raises(FormatError, match=r"somewhere, code 'ternary': block 1: .* cannot hold"):
        bad.read()


def test_entries_of_any_size() -> None:
    x = values("I64", (1000,))
    got = list(entries(Held(x), 300))
    assert [len(part) for part in got] == [300, 300, 300, 100] and bits(np.concatenate(got)) == bits(x)
    with pytest.raises(FormatError, match="too few"):
        list(entries(Computed("F32", (10,), lambda: iter([bytes(12)]))))


# --- ternary


def slow_block(x: list[float], form: str) -> bytes:
    """A block as the page of the code says it, bit by bit."""

    def filled(flags: list[int]) -> bytes:
        out = bytearray(-(-len(flags) // 8))
        for place, flag in enumerate(flags):
            out[place // 8] |= flag << place % 8
        return bytes(out)

    if form == "bitmask":
        return filled([int(v != 0) for v in x]) + filled([int(v < 0) for v in x])
    positions = [place for place, v in enumerate(x) if v != 0]
    k, n = len(positions), len(x)
    if not k:
        return bytes(4)
    phi = (math.sqrt(5) + 1) / 2
    b = 0 if k == n else max(0, 1 + math.floor(math.log2(math.log(phi - 1) / math.log(1 - k / n))))
    gaps = [here - before - 1 for here, before in zip(positions, [-1, *positions], strict=False)]
    unary: list[int] = []
    for gap in gaps:
        unary += [0] * (gap >> b) + [1]
    planes = [(gap >> place) & 1 for place in range(b) for gap in gaps]
    return (k * 256 + b).to_bytes(4, "little") + filled([int(x[p] < 0) for p in positions]) + filled(planes) + filled(unary)


@pytest.mark.parametrize("form", ["golomb", "bitmask"])
@pytest.mark.parametrize("density", [0.0, 1e-3, 0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("size", [1, 2, 37, 3000])
def test_ternary_is_what_its_page_says(size: int, density: float, form: str) -> None:
    rng = np.random.default_rng(size)
    x = (rng.standard_normal(size) * (rng.random(size) < density)).astype(np.float32)
    tensor = encode(Held(x), "ternary", {"scale": 0.1, "form": form})
    block = slow_block([float(v) for v in x], form)
    assert payload_of(tensor) == len(block).to_bytes(4, "little") + block
    want = np.array([np.float32(0.1) if v > 0 else -np.float32(0.1) if v < 0 else 0 for v in x], np.float32)
    assert bits(tensor.read()) == bits(want)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=40))), st.sampled_from(["golomb", "bitmask"]))
@settings(max_examples=200)
def test_any_positions_survive(shape: tuple[int, list[int]], form: str) -> None:
    size, places = shape
    x = np.zeros(size, np.float32)
    x[places] = np.where(np.arange(len(places)) % 3, 1, -1)
    assert bits(encode(Held(x), "ternary", {"scale": 1, "form": form}).read()) == bits(x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", ["golomb", "bitmask"])
def test_the_smallest_numbers_keep_their_sign_and_minus_zero_does_not(dtype: Any, form: str) -> None:
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    x = np.array([tiny, -tiny, 0.0, -0.0, -1e4], dtype)
    tensor = encode(Held(x), "ternary", {"scale": 2.0**-149, "form": form}, dtype="F32")
    s = np.float32(2.0**-149)
    assert bits(tensor.read()) == bits(np.array([s, -s, 0, 0, -s], np.float32))


def expected_bits(p: float) -> tuple[float, float]:
    """Bits an entry of random positions with signs: the entropy, and what Golomb's code takes."""
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p) + p
    b = rice(int(p * 10**6), 10**6)
    return entropy, p * (1 + b + 1 / (1 - (1 - p) ** (1 << b)))


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2])
def test_golomb_is_next_to_the_entropy(density: float) -> None:
    """Done when: at most 1.03 times H(p) + p bits an entry at 5 % of 4 million entries, all bytes of the payload counted."""
    size = 1 << 22
    rng = np.random.default_rng(9)
    x = rng.standard_normal(size, np.float32) * (rng.random(size, np.float32) < density)
    p = np.count_nonzero(x) / size
    got = 8 * encode(Held(x), "ternary", {"scale": 1, "form": "golomb"}).payload.nbytes / size
    entropy, golomb = expected_bits(p)
    assert entropy < got <= 1.03 * entropy
    assert got == pytest.approx(golomb, rel=0.015)  # 8 to 10 bytes a block over what the code itself takes


def test_each_item_size_is_known() -> None:
    assert {example[1] for each in EXAMPLES.values() for example in each} <= set(ITEMSIZE)
