"""The bytes of `codebook`, `integers`, `dropped` and `planes`, read again one bit at a time from what their pages say; and Huffman codes."""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections import Counter
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import bits
from weft import codes, xp
from weft.codes import _bits, _huffman
from weft.errors import FormatError, InputError

# --- slow readers


class Bits:
    """Bits from the front: of each byte the lowest first, or the highest."""

    def __init__(self, data: bytes, *, highest: bool) -> None:
        self.text = "".join(f"{byte:08b}" if highest else f"{byte:08b}"[::-1] for byte in data)
        self.highest, self.at = highest, 0

    def number(self, width: int) -> int:
        word = self.text[self.at : self.at + width]
        assert len(word) == width
        self.at += width
        return int((word if self.highest else word[::-1]) or "0", 2)

    def rest_of_byte(self) -> int:
        used = -(-self.at // 8)
        assert set(self.text[self.at : 8 * used]) <= {"0"}
        return used


def test_integers_beyond_float32_are_refused() -> None:
    """Not made infinite, or smaller, without a word."""
    rule, most = codes.get("integers"), float(np.finfo(np.float32).max)
    for numbers, width in [
        (np.array([1.0, most], np.float32), 3),
        (np.array([-most, 1.0], np.float32), 4),
        (np.array([1e300, 2.0]), 8),
        (np.array([4e38, 1]), 2),
    ]:
        with pytest.raises(InputError, match="1 entries are beyond the range of F32"):
            rule.encode_block(numbers, {"bits": width, "group": 2}, 0)
    near = np.array([0.97 * most, 1.0], np.float32)
    got = rule.decode_block(memoryview(rule.encode_block(near, {"bits": 8, "group": 2}, 0)), 2, "F32", {"bits": 8, "group": 2}, 0)
    np.testing.assert_allclose(got[0], near[0], rtol=0.01)


def slow_words(lengths: list[int]) -> dict[str, int]:
    """The canonical words: each is the one before plus 1, with zeros appended where it is longer."""
    words, code, last = {}, 0, 0
    for length, symbol in sorted((n, s) for s, n in enumerate(lengths) if n):
        code <<= length - last
        words[f"{code:0{length}b}"] = symbol
        code, last = code + 1, length
    return words


def slow_symbols(data: bytes, count: int, lengths: list[int]) -> tuple[list[int], int]:
    words, reader = slow_words(lengths), Bits(data, highest=True)
    if len(words) == 1:
        return [*words.values()] * count, 0
    out = []
    for _ in range(count):
        word = ""
        while word not in words:
            word += str(reader.number(1))
        out.append(words[word])
    return out, reader.rest_of_byte()


def slow_codebook(data: bytes, count: int, cfg: dict[str, Any]) -> list[float]:
    table = cfg["table"]

    def lengths(at: int, size: int) -> tuple[list[int], int]:
        reader = Bits(data[at:], highest=False)
        return [reader.number(4) for _ in range(size)], at + (size + 1) // 2

    if cfg["form"] == "packed":
        reader = Bits(data, highest=False)
        out = [table[reader.number(math.ceil(math.log2(len(table))) if len(table) > 1 else 0)] for _ in range(count)]
        assert reader.rest_of_byte() == len(data)
        return out
    if cfg["form"] == "huffman":
        found, at = lengths(0, len(table))
        symbols, used = slow_symbols(data[at:], count, found)
        assert at + used == len(data)
        return [table[s] for s in symbols]
    (there,) = struct.unpack("<I", data[:4])
    if not there:
        assert len(data) == 4
        return [0.0] * count
    far, at = lengths(4, 17)
    which, at = lengths(at, len(table))
    exponents, used = slow_symbols(data[at:], there, far)
    at += used
    reader = Bits(data[at:], highest=True)
    steps = [(1 << e) + reader.number(e) for e in exponents]
    at += reader.rest_of_byte()
    symbols, used = slow_symbols(data[at:], there, which)
    assert at + used == len(data)
    out, place = [0.0] * count, -1
    for step, symbol in zip(steps, symbols, strict=True):
        place += step
        out[place] = table[symbol]
    return out


# --- codebook


def nearest(x: float, table: list[float]) -> float:
    place = bisect_left(table, x)
    return min(table[max(place - 1, 0) : place + 1], key=lambda v: (abs(Fraction(x) - Fraction(v)), v))


TABLES = [
    [0.0],
    [-1.5, 0.0, 0.25],
    [float(v) for v in np.linspace(-2, 2, 17, dtype=np.float32)],
    sorted({float(np.float32(k * k / 999 - 30)) for k in range(256)}),
]


@pytest.mark.parametrize("density", [0.0, 0.02, 0.4, 1.0])
@pytest.mark.parametrize("table", TABLES, ids=len)
@pytest.mark.parametrize("form", ["packed", "huffman", "gaps"])
def test_codebook(form: str, table: list[float], density: float) -> None:
    if form == "gaps" and 0.0 not in table:
        table = sorted({0.0, *table[1:]})
    rng = np.random.default_rng(7)
    values = (rng.standard_normal(3001) * 2 * (rng.random(3001) < density)).astype(np.float32)
    code, cfg = codes.get("codebook"), {"table": table, "form": form}
    data = code.encode_block(values, cfg, 0)
    want = [nearest(float(v), table) for v in values]
    assert slow_codebook(data, values.size, cfg) == want
    for dtype in ("F32", "F64", "BF16", "F16"):
        got = code.decode_block(memoryview(data), values.size, dtype, cfg, 0)
        assert bits(got) == bits(xp.cast(np.array(want, np.float32), str(got.dtype))) and codes.get("codebook").name == "codebook"


def test_codebook_ties_go_down_and_sizes_are_near_the_entropy() -> None:
    code = codes.get("codebook")
    halves = {"table": [-1.0, 0.0, 1.0], "form": "packed"}
    assert code.decode_block(memoryview(code.encode_block(np.array([-0.5, 0.5, 0.5000001]), halves, 0)), 3, "F32", halves, 0).tolist() == [-1, 0, 1]
    rng = np.random.default_rng(1)
    values = rng.choice([-1.0, 0.0, 1.0], 1 << 16, p=[0.02, 0.95, 0.03])
    entropy = sum(-p * math.log2(p) for p in (np.unique(values, return_counts=True)[1] / values.size).tolist())
    size = 8 * len(code.encode_block(values, {**halves, "form": "gaps"}, 0)) / values.size
    assert entropy < size < 1.04 * entropy
    assert 1 < 8 * len(code.encode_block(values, {**halves, "form": "huffman"}, 0)) / values.size < 1.06


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["codebook", "integers", "dropped"])
def test_what_is_not_finite_is_not_coded(name: str, bad: float) -> None:
    cfg = {
        "codebook": {"table": [0.0, 1.0], "form": "packed"},
        "integers": {"bits": 4, "group": 8},
        "dropped": {"key": "0" * 16, "drop": 0, "factor": 1.0, "dtype": "F32"},
    }[name]
    with pytest.raises(InputError, match="NaN"):
        codes.get(name).encode_block(np.array([1.0, bad, 2.0], np.float32), cfg, 0)


def test_dropped_does_not_go_beyond_its_dtype() -> None:
    with pytest.raises(InputError, match="beyond the range of F16"):
        codes.get("dropped").encode_block(np.array([60000.0], np.float32), {"key": "0" * 16, "drop": 0, "factor": 2.0, "dtype": "F16"}, 0)


# --- Huffman


@settings(max_examples=150)
@given(st.lists(st.integers(0, 255), min_size=0, max_size=400), st.integers(1, 256), st.binary(max_size=3))
def test_huffman_against_a_slow_reader(symbols: list[int], size: int, after: bytes) -> None:
    found = np.array([s % size for s in symbols], np.uint8)
    lengths = _huffman.code_lengths(np.bincount(found, minlength=size))
    data = _huffman.pack(found, lengths)
    got, used = _huffman.unpack(data + after, found.size, lengths)
    assert got.tolist() == found.tolist() and used == len(data)
    if found.size:
        assert slow_symbols(data, found.size, lengths.tolist()) == (found.tolist(), len(data))


def test_huffman_words_are_the_shortest_and_never_longer_than_the_limit() -> None:
    counts = np.array([45, 13, 12, 16, 9, 5, 0])  # the textbook's
    assert _huffman.code_lengths(counts).tolist() == [1, 3, 3, 3, 4, 4, 0]
    fibonacci = [1, 1]
    while len(fibonacci) < 60:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = _huffman.code_lengths(np.array(fibonacci))
    assert lengths.max() <= _huffman.LIMIT and sum(Fraction(1, 1 << int(n)) for n in lengths) == 1
    symbols = np.arange(60, dtype=np.uint8)
    assert _huffman.unpack(_huffman.pack(symbols, lengths), 60, lengths)[0].tolist() == symbols.tolist()


@settings(max_examples=200)
@given(st.binary(max_size=60), st.integers(0, 300), st.lists(st.integers(0, 15), min_size=1, max_size=40))
def test_huffman_survives_any_bytes(data: bytes, count: int, lengths: list[int]) -> None:
    """It gives what the slow reader gives, or a FormatError."""
    complete = sum(Fraction(1, 1 << n) for n in lengths if n) == 1 or [n for n in lengths if n] == [1]
    try:
        got, used = _huffman.unpack(data, count, np.array(lengths, np.uint8))
    except FormatError:
        if complete:
            with pytest.raises(AssertionError):
                slow_symbols(data, count, lengths)
        return
    if count:
        assert complete
        words = slow_words(lengths)
        reader = Bits(data, highest=True)
        if len(words) > 1:
            for symbol in got.tolist():
                word = ""
                while word not in words:
                    word += str(reader.number(1))
                assert words[word] == symbol
        assert used == -(-reader.at // 8)


@settings(max_examples=100)
@given(st.integers(0, 8), st.lists(st.integers(0, 255), max_size=50))
def test_numbers_of_one_width(width: int, numbers: list[int]) -> None:
    numbers = [n & ((1 << width) - 1) for n in numbers]
    data = _bits.pack(np.array(numbers, np.uint8), width)
    reader = Bits(data, highest=False)
    assert [reader.number(width) for _ in numbers] == numbers and reader.rest_of_byte() == len(data)
    assert _bits.unpack(data, len(numbers), width).tolist() == numbers
    with pytest.raises(FormatError):
        _bits.unpack(data + b"\0", len(numbers), width)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 16), st.integers(0, 65535)), max_size=50), st.binary(max_size=2))
def test_numbers_of_many_widths(fields: list[tuple[int, int]], after: bytes) -> None:
    widths = np.array([w for w, _ in fields], np.int64)
    numbers = np.array([n & ((1 << w) - 1) for w, n in fields], np.int64)
    data = _bits.pack_fields(numbers, widths)
    reader = Bits(data, highest=True)
    assert [reader.number(w) for w in widths.tolist()] == numbers.tolist() and reader.rest_of_byte() == len(data)
    got, used = _bits.unpack_fields(data + after, widths)
    assert got.tolist() == numbers.tolist() and used == len(data)
    if data:
        with pytest.raises(FormatError):
            _bits.unpack_fields(data[:-1], widths)


# --- integers


def up_to_bf16(x: Fraction) -> Fraction:
    """The least bfloat16 that is not below x > 0."""
    exponent = max(math.floor(math.log2(x)), -126)
    while Fraction(2) ** (exponent + 1) <= x:
        exponent += 1
    while Fraction(2) ** exponent > x and exponent > -126:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 7)
    return math.ceil(x / unit) * unit


@pytest.mark.parametrize("group", [1, 7, 64, 1000])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_integers(width: int, group: int) -> None:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal(500) * 10.0 ** rng.integers(-30, 3, 500)).astype(np.float32)
    values[64:128] = 0
    values[130] = 1e-44
    code, cfg, top = codes.get("integers"), {"bits": width, "group": group}, 2 ** (width - 1) - 1
    data = code.encode_block(values, cfg, 0)
    groups = -(-500 // group)
    scales = np.frombuffer(data[: 2 * groups], ml_dtypes.bfloat16)
    reader = Bits(data[2 * groups :], highest=False)
    want = []
    for g in range(groups):
        part = values[g * group : (g + 1) * group]
        peak = max(Fraction(abs(float(v))) for v in part)
        scale = up_to_bf16(peak / top) if peak else Fraction(0)
        assert Fraction(float(scales[g])) == scale
        for v in part:
            q = reader.number(width) - top
            assert q == (round(Fraction(float(v)) / scale) if scale else 0) and abs(q) <= top
            want.append(float(q * scale))
            assert Fraction(want[-1]) == q * scale
            assert abs(Fraction(want[-1]) - Fraction(float(v))) <= scale / 2
    assert reader.rest_of_byte() == len(data) - 2 * groups
    for dtype in ("F32", "F64"):
        assert code.decode_block(memoryview(data), 500, dtype, cfg, 0).tolist() == want


# --- dropped


@pytest.mark.parametrize("start", [0, 1000])
@pytest.mark.parametrize("stored", ["F32", "BF16", "F16"])
def test_dropped(stored: str, start: int) -> None:
    values = np.random.default_rng(5).standard_normal(400).astype(np.float32)
    code, cfg = codes.get("dropped"), {"key": "00c0ffee00c0ffee", "drop": 49152, "factor": 3.3, "dtype": stored}
    data = code.encode_block(values, cfg, start)
    size = 4 if stored == "F32" else 2
    kept = [xp.sixteen_bits(0x00C0FFEE00C0FFEE, start + i, 1)[0] >= 49152 for i in range(400)]
    assert 60 < sum(kept) < 140 and len(data) == size * sum(kept)
    want = []
    for v, keep in zip(values, kept, strict=True):
        rounded = v * np.float32(3.3)
        want.append(float(rounded.astype({"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}[stored])) if keep else 0.0)
    assert code.decode_block(memoryview(data), 400, "F32", cfg, start).tolist() == want


# --- planes


def test_planes_and_frames_that_lie() -> None:
    code, cfg = codes.get("planes"), {"level": 3, "steps": False}
    values = np.random.default_rng(6).standard_normal(1000).astype(np.float32)
    data = code.encode_block(values, cfg, 0)
    content = zstandard.ZstdDecompressor().decompress(data)
    raw = values.tobytes()
    assert content == b"".join(raw[k::4] for k in range(4))
    places = np.array([5, 6, 900, 2**40, -3], np.int64)
    steps = {"level": 3, "steps": True}
    stepped = code.encode_block(places, steps, 0)
    content = zstandard.ZstdDecompressor().decompress(stepped)
    assert [int.from_bytes(content[i::5], "little", signed=True) for i in range(5)] == [5, 1, 894, 2**40 - 900, -3 - 2**40]
    assert code.decode_block(memoryview(stepped), 5, "I64", steps, 0).tolist() == places.tolist()
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(raw)
    for hostile in (bomb, unsized, data + b"x", data[:-3], b"", raw, zstandard.ZstdCompressor().compress(raw[:-4])):
        with pytest.raises(FormatError):
            code.decode_block(memoryview(hostile), 1000, "F32", cfg, 0)


def test_planes_make_near_things_small() -> None:
    rng = np.random.default_rng(8)
    code = codes.get("planes")
    bf16 = rng.standard_normal(1 << 16).astype(ml_dtypes.bfloat16)
    counts = Counter(bf16.tobytes()[1::2])
    entropy = sum(-n / bf16.size * math.log2(n / bf16.size) for n in counts.values())
    assert 8 * len(code.encode_block(bf16, {"level": 1, "steps": False}, 0)) / bf16.size < 8 + 1.2 * entropy, "the upper byte has less than 8 bits in it"
    places = np.flatnonzero(rng.random(1 << 20) < 0.05)[: 1 << 15]
    sizes = [len(code.encode_block(places, {"level": 3, "steps": steps}, 0)) for steps in (False, True)]
    assert sizes[1] < 0.75 * sizes[0]
