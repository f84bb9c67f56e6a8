"""The format holds still: golden files, a second reader written from docs/format.md alone, and every attack it lists.

The reader in this file (`Mini`) imports nothing of weft. If it and weft disagree, one of them is not what the page says.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from math import ceil, frexp, log2, prod, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from tests.golden.make import write_all

GOLDEN = Path(__file__).parent / "golden"
PAGE = Path(__file__).parents[1] / "docs" / "format.md"

IDS = {
    "tiny": "d1994287ee263de709be83698c34c9e393396b815927ca926d4d3429b7614018",
    "additive": "f835d7edfc0a7d447c6a002aee15d3ff00bfb601ab177ea0eb5bd42520b34ab5",
    "factors": "88d999248699e3b90887ab5534b81a4554b2ce3ad1c78879a2812c535a7ac918",
    "axes": "bb9e341265924ee83a94a8a9126274a230f12a3a21ec685540db05c96d9aaa57",
    "relative": "ca2b725b122ab2fcd907b3f57b6c8b2fd7065bc236c0ef1bc07b42e762458c8b",
    "structure": "8437b7e746d99a757fb1bd0a63e41bf982bde4b1ba26b23ef2e9eb003f0a5463",
    "references": "134efe219cf457405ae5bc7de911c9b4e8360712ec8e3cbc3526fdd673bc9641",
    "pools": "38323d3b23c75209ba83509d11ecde4767fd4b0ae86256216a88c7ad0fb2269d",
    "replay": "ef468664f745c79237ee9eb74c9f790cfabcff079181a34193776cb91f016c27",
    "flipped": "79daa191d9092060da5a2d1cc20d9364c87bee6668a918c85e6d1cd9fb41c1f8",
    "live": "91cbd59db8e5a96b9551313e75098f550b70e903b5953c58398caf0a8c8bce77",
    "routed": "3bddc868a78e4a4940895a381b68958b3c01993b5d7322db91632870ad93a82c",
}
FINGERPRINT = "6e5782227ab46cb37c202eae784eab32c68b8073a9cd416efd06d22dc1231438"
FOLDABLE = [name for name in IDS if name not in ("live", "routed")]

# fmt: off
TINY = (
    b'P\x04\x00\x00\x00\x00\x00\x00{"__metadata__":{"weft":"{\\"base\\":{\\"fingerprint\\":\\"6e5782227ab46cb37c202eae784eab32c68b80'
    b'73a9cd416efd06d22dc1231438\\"},\\"config\\":{},\\"entries\\":{\\"a.weight\\":{\\"base\\":{\\"dtype\\":\\"F32\\",\\'
    b'"sha256\\":\\"3e3f0a8c3e37a62ca01a17e142a3489548e4be69c9f2dbb1bbcf22a0062fa676\\",\\"shape\\":[4,3]},\\"op'
    b's\\":[{\\"cfg\\":{\\"scale\\":0.5},\\"op\\":\\"lowrank\\",\\"t\\":{\\"A\\":\\"a.weight//0.A\\",\\"B\\":\\"a.weight//0.'
    b'B\\"}}]}},\\"format\\":1,\\"id\\":\\"d1994287ee263de709be83698c34c9e393396b815927ca926d4d3429b7614018\\",\\"'
    b'notes\\":{\\"title\\":\\"tiny\\"},\\"notes_sha256\\":\\"2914f0271b9df51988af7bd1237b815e7ab840f3e8f0f5dfc74c'
    b'0f9fec197975\\",\\"over\\":[],\\"parents\\":[],\\"recipe\\":{\\"verb\\":\\"example\\"},\\"tensors\\":{\\"a.weight/'
    b'/0.A\\":{\\"dtype\\":\\"F32\\",\\"sha256\\":\\"2ce4bdb6b34a50ac7092eb9fee94337a27498e9eb9bae44192f15b88831b2'
    b'422\\",\\"shape\\":[1,3]},\\"a.weight//0.B\\":{\\"dtype\\":\\"F32\\",\\"sha256\\":\\"275cfcf3d53da6b29fb6b5f4fc4'
    b'5f6eed2b4ccb23aeee51878c338b104115848\\",\\"shape\\":[4,1]}},\\"tied\\":[]}"},"a.weight//0.A":{"data_offs'
    b'ets":[0,12],"dtype":"F32","shape":[1,3]},"a.weight//0.B":{"data_offsets":[12,28],"dtype":"F32","shap'
    b'e":[4,1]}}  \x00\x00\x80?\x00\x00\x00\xc0\x00\x00\x00?\x00\x00\x80?\x00\x00\x00\x00\x00\x00\x80\xbf\x00\x00\x80>'
)
# fmt: on


# --- the second reader


class Number(str):
    """A JSON number as it was written."""


def canonical(value: Any) -> str:
    if isinstance(value, Number):
        return value
    if isinstance(value, dict):
        order = sorted(value, key=lambda k: k.encode("utf-16-be"))
        return "{" + ",".join(canonical(str(k)) + ":" + canonical(value[k]) for k in order) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


CODES = {"F64": "<f8", "I64": "<i8", "U64": "<u8", "F32": "<f4", "I32": "<i4", "U32": "<u4", "F16": "<f2", "U16": "<u2", "U8": "u1", "BF16": "<u2"}
FLOATS = ("F64", "F32", "F16", "BF16")


def read(path: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]:
    """Tensors (dtype, shape, data) and metadata of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    body = data[8 + length :]
    return {k: (v["dtype"], v["shape"], body[slice(*v["data_offsets"])]) for k, v in header.items()}, metadata


def array(tensor: tuple[str, list[int], bytes]) -> np.ndarray:
    """A tensor as numbers; bfloat16 becomes the float32 of the same value."""
    dtype, shape, data = tensor
    values = np.frombuffer(data, CODES[dtype])
    if dtype == "BF16":
        values = (values.astype("<u4") << 16).view("<f4")
    return values.reshape(shape)


def store(values: np.ndarray, dtype: str) -> bytes:
    """Numbers in the working type as bytes of a dtype, rounded to nearest even."""
    if dtype != "BF16":
        with np.errstate(over="ignore", invalid="ignore"):
            return np.ascontiguousarray(values.astype(CODES[dtype])).tobytes()
    bits = np.ascontiguousarray(values.astype("<f4")).view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def plain_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) @ b.astype(np.float64)


def split(values: list[float], bits: int) -> list[tuple[Fraction, Fraction]]:
    """hi and lo of numbers that share one grid."""
    peak = max(map(abs, values), default=0.0)
    e = max(frexp(peak)[1], -900)
    unit_hi, unit_lo = Fraction(2) ** (e - bits), Fraction(2) ** (e - 2 * bits)
    pairs = []
    for value in values:
        x = Fraction(value)
        hi = round(x / unit_hi) * unit_hi
        pairs.append((hi, round((x - hi) / unit_lo) * unit_lo))
    return pairs


def grid(count: int) -> int:
    return (53 - ceil(log2(2 * max(count, 1)))) // 2


def exact_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """P of section 6, in rational arithmetic."""
    bits = grid(a.shape[1])
    left = [split(row.tolist(), bits) for row in a]
    right = [split(column.tolist(), bits) for column in b.T]
    out = np.zeros((a.shape[0], b.shape[1]))
    for i, row in enumerate(left):
        for j, column in enumerate(right):
            high = sum((x[0] * y[0] for x, y in zip(row, column, strict=True)), Fraction(0))
            cross = sum((x[0] * y[1] + x[1] * y[0] for x, y in zip(row, column, strict=True)), Fraction(0))
            assert float(high) == high and float(cross) == cross, "the page says that these need no rounding"
            out[i, j] = float(high) + float(cross)
    return out


def exact_squares(x: np.ndarray) -> float:
    pairs = split(x.tolist(), grid(x.size))
    return float(sum(hi * hi for hi, _ in pairs)) + float(2 * sum(hi * lo for hi, lo in pairs))


M64 = (1 << 64) - 1
GOLD = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def random_key(seed: int, stream: int) -> int:
    return mix((mix((seed + GOLD) & M64) + stream * GOLD) & M64)


def word(key: int, i: int) -> int:
    return mix((key + (i + 1) * GOLD) & M64)


TABLE = [round(NormalDist().inv_cdf((j + 0.5) / 65536) * 2**20) / 2**20 for j in range(65536)]


class Mini:
    """A delta file, as docs/format.md describes it. `exact`: section 6 to the letter; else plain float64."""

    def __init__(self, path: Path, *, exact: bool = True) -> None:
        self.tensors, metadata = read(path)
        assert list(metadata) == ["weft"]
        self.text = metadata["weft"]
        self.manifest = json.loads(self.text)
        self.product = exact_product if exact else plain_product
        self.squares = exact_squares if exact else lambda x: float((x.astype(np.float64) ** 2).sum())

    def check(self) -> None:
        raw = json.loads(self.text, parse_int=Number, parse_float=Number)
        assert canonical(raw) == self.text
        assert sha256(canonical({k: v for k, v in raw.items() if k not in ("id", "notes", "notes_sha256")})) == self.manifest["id"]
        assert sha256(canonical(raw["notes"])) == self.manifest["notes_sha256"]
        assert set(self.tensors) == set(self.manifest["tensors"])
        for key, info in self.manifest["tensors"].items():
            dtype, shape, data = self.tensors[key]
            assert (dtype, shape, sha256(data)) == (info["dtype"], info["shape"], info["sha256"])

    def stored(self, ref: Any) -> np.ndarray:
        if isinstance(ref, str):
            return array(self.tensors[ref])
        rows = array(self.tensors[ref["take"]]).reshape(-1)
        taken = array(self.tensors[ref["key"]])[rows].reshape(ref["shape"])
        return taken.T if ref.get("transpose") else taken

    def fields(self, entry: dict[str, Any], w: np.ndarray) -> dict[str, np.ndarray]:
        found = {field: self.stored(ref) for field, ref in entry["t"].items()}
        return {field: v.astype(w.dtype) if v.dtype.kind == "f" else v for field, v in found.items()}

    # views: positions of the view's entries in the flat target

    def view(self, shape: tuple[int, ...], at: dict[str, Any] | None) -> np.ndarray:
        where = np.arange(prod(shape)).reshape(shape)
        if at and "reshape" in at:
            where = where.reshape(at["reshape"])
        if at and "transpose" in at:
            where = where.transpose(at["transpose"])
        if at and "index" in at:
            where = where[tuple(slice(*part) if isinstance(part, list) else part for part in at["index"])]
        return where

    def chain(self, w: np.ndarray, ops: list[dict[str, Any]]) -> np.ndarray:
        for entry in ops:
            where = self.view(w.shape, entry.get("at"))
            new = w.reshape(-1).copy()
            new[where.reshape(-1)] = self.op(w.reshape(-1)[where], entry).reshape(-1)
            w = new.reshape(w.shape)
        return w

    def op(self, w: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
        if entry["op"] == "sum":
            new = w.astype(np.float64)
            for term in entry["terms"]:
                new = new + term["scale"] * (self.chain(w, term["ops"]).astype(np.float64) - w.astype(np.float64))
            return new.astype(w.dtype)
        t, cfg = self.fields(entry, w), entry["cfg"]
        method: Callable[..., np.ndarray] = getattr(self, entry["op"])
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(method(w, t, cfg)).reshape(w.shape).astype(w.dtype)

    # section 7

    def dense(self, w: Any, t: Any, cfg: Any) -> Any:
        return w.astype(np.float64) + cfg.get("scale", 1) * t["values"].astype(np.float64)

    def assign(self, w: Any, t: Any, cfg: Any) -> Any:
        if "index" not in t:
            return t["values"]
        new = w.reshape(-1).copy()
        new[t["index"]] = t["values"]
        return new

    def xor(self, w: Any, t: Any, cfg: Any) -> Any:
        dtype = cfg.get("dtype", "F32")
        flipped = np.frombuffer(store(w, dtype), t["bits"].dtype) ^ t["bits"].reshape(-1)
        return array((dtype, list(w.shape), flipped.tobytes()))

    def sparse(self, w: Any, t: Any, cfg: Any) -> Any:
        new = w.reshape(-1).astype(np.float64)
        for i, value in zip(t["index"], t["values"], strict=True):
            new[i] = new[i] + cfg.get("scale", 1) * float(value)
        return new

    def added(self, w: Any, cfg: Any, change: Any) -> Any:
        return w.astype(np.float64) + cfg.get("scale", 1) * change.reshape(w.shape)

    def lowrank(self, w: Any, t: Any, cfg: Any) -> Any:
        change = self.product(t["B"], t["A"])
        return self.added(w, cfg, change - self.product(t["B0"], t["A0"]) if "A0" in t else change)

    def svd(self, w: Any, t: Any, cfg: Any) -> Any:
        change = self.product(t["P"], t["lam"][:, None] * t["Q"])
        return self.added(w, cfg, change - self.product(t["P0"], t["lam0"][:, None] * t["Q0"]) if "P0" in t else change)

    def bilinear(self, w: Any, t: Any, cfg: Any) -> Any:
        return self.added(w, cfg, self.product(t["B"], self.product(t["M"], t["A"]).astype(w.dtype)))

    def kron(self, w: Any, t: Any, cfg: Any) -> Any:
        (n, p, q), (_, s, u) = t["A"].shape, t["B"].shape
        change = self.product(t["A"].reshape(n, p * q).T, t["B"].reshape(n, s * u)).reshape(p, q, s, u)
        return self.added(w, cfg, change.transpose(0, 2, 1, 3))

    def tucker(self, w: Any, t: Any, cfg: Any) -> Any:
        x = t["core"]
        for axis in reversed(range(w.ndim)):
            fibres = np.moveaxis(x, axis, 0)
            grown = self.product(t[f"U{axis}"], fibres.reshape(fibres.shape[0], -1))
            x = np.moveaxis(grown.reshape(-1, *fibres.shape[1:]), 0, axis)
            x = x.astype(w.dtype) if axis else x
        return self.added(w, cfg, x)

    def scale_shift(self, w: Any, t: Any, cfg: Any) -> Any:
        new = np.moveaxis(w.astype(np.float64), cfg.get("axis", 0), -1)
        new = new * t["scale"] if "scale" in t else new
        new = new + t["shift"] if "shift" in t else new
        return np.moveaxis(new, -1, cfg.get("axis", 0))

    def permute(self, w: Any, t: Any, cfg: Any) -> Any:
        moved = np.moveaxis(w, cfg.get("axis", 0), 0)
        return np.moveaxis(np.stack([moved[i] for i in t["perm"]]), 0, cfg.get("axis", 0))

    def magnitude(self, w: Any, t: Any, cfg: Any) -> Any:
        moved = np.moveaxis(w, cfg.get("axis", 0), 0)
        new = [part.astype(np.float64) * (float(m) / sqrt(self.squares(part.reshape(-1)))) for part, m in zip(moved, t["m"], strict=True)]
        return np.moveaxis(np.stack(new), 0, cfg.get("axis", 0))

    def seeded(self, w: Any, t: Any, cfg: Any) -> Any:
        rows, columns = w.shape[0], prod(w.shape[1:])
        seed, stream, rank = (cfg.get(name, 0) for name in ("seed", "stream", "rank"))
        first, total = cfg.get("first_row", 0), cfg.get("all_rows", 0) or rows

        def mixture(key: int, c: Any, size: int, start: int, count: int) -> Any:
            out = np.zeros(count)
            for i in range(count):
                for k, value in enumerate(c):
                    out[i] = out[i] + float(value) * TABLE[word(key, k * size + start + i) % 65536]
            return (out / sqrt(len(c))).astype(w.dtype)

        if not rank:
            return self.added(w, cfg, mixture(random_key(seed, 2 * stream), t["coef"], total * columns, first * columns, rows * columns).astype(np.float64))
        a = mixture(random_key(seed, 2 * stream), t["a"], rank * columns, 0, rank * columns).reshape(rank, columns)
        b = mixture(random_key(seed, 2 * stream + 1), t["b"], total * rank, first * rank, rows * rank).reshape(rows, rank)
        return self.added(w, cfg, self.product(b, a))

    def fastfood(self, w: Any, t: Any, cfg: Any) -> Any:
        length = max(64, 1 << (len(t["coef"]) - 1).bit_length())
        one, two = (random_key(cfg.get("seed", 0), 2 * cfg.get("stream", 0) + k) for k in (0, 1))
        a, c, half = one % length | 1, (one >> 32) % length, length.bit_length() // 2

        def place(i: int) -> int:
            u = (a * i + c) % length
            return (a * (u ^ (u >> half)) + c) % length

        def hadamard(x: list[float]) -> list[float]:
            h = 1
            while h < length:
                for i in range(length):
                    if i % (2 * h) < h:
                        x[i], x[i + h] = x[i] + x[i + h], x[i] - x[i + h]
                h *= 2
            return x

        out: list[float] = []
        z = [*map(float, t["coef"]), *[0.0] * (length - len(t["coef"]))]
        first = cfg.get("first", 0)
        while len(out) < first + w.size:
            start = len(out)
            inner = hadamard([(1 - 2 * (word(one, start + i) >> 63)) * z[i] for i in range(length)])
            out += [value / sqrt(length) for value in hadamard([TABLE[word(two, start + i) % 65536] * inner[place(i)] for i in range(length)])]
        change = np.array(out[first : first + w.size]).astype(w.dtype).astype(np.float64) * (float(t["gain"][0]) if "gain" in t else 1.0)
        return self.added(w, cfg, change)

    # section 4 and 6

    def fold(self, base: dict[str, tuple[str, list[int], bytes]]) -> dict[str, tuple[str, list[int], bytes]]:
        out = dict(base)
        for target, entry in self.manifest["entries"].items():
            change = entry.get("change", {})
            if "base" in entry:
                dtype, shape, data = base[change.get("from", target)]
                assert {"dtype": dtype, "shape": shape, "sha256": sha256(data)} == entry["base"]
            if change.get("kind") == "remove":
                del out[target]
                continue
            result = change if change.get("kind") in ("add", "replace") else entry["base"]
            dtype, shape = result["dtype"], result["shape"]
            if change.get("kind") in ("add", "replace"):
                data = bytes(prod(shape) * np.dtype(CODES[dtype]).itemsize)
            out[target] = dtype, shape, self.rewrite(dtype, shape, data, entry["ops"])
        return out

    def rewrite(self, dtype: str, shape: list[int], data: bytes, ops: list[dict[str, Any]]) -> bytes:
        whole = [k for k, op in enumerate(ops) if op["op"] == "assign" and "index" not in op["t"] and "at" not in op]
        if whole:
            data, ops = self.tensors[ops[whole[-1]]["t"]["values"]][2], ops[whole[-1] + 1 :]
        end = len(ops)
        while end and ops[end - 1]["op"] in ("assign", "xor"):
            end -= 1
        if end:
            assert dtype in FLOATS
            old = array((dtype, shape, data)).astype(np.float64 if dtype == "F64" else np.float32)
            new = self.chain(old, ops[:end])
            bits = f"i{old.itemsize}"
            same = (np.ascontiguousarray(old).view(bits) == np.ascontiguousarray(new).view(bits)).reshape(-1)
            size = np.dtype(CODES[dtype]).itemsize
            before, after = np.frombuffer(data, f"V{size}"), np.frombuffer(store(new, dtype), f"V{size}")
            data = b"".join(bytes(a if keep else b) for a, b, keep in zip(before, after, same, strict=True))
        raw = np.frombuffer(data, CODES[dtype]).copy()
        for op in ops[end:]:
            where = self.view(tuple(shape), op.get("at")).reshape(-1)
            if op["op"] == "xor":
                assert op["cfg"].get("dtype", "F32") == dtype
                flips = np.frombuffer(self.tensors[op["t"]["bits"]][2], f"<u{raw.itemsize}")
                raw[where] = (raw[where].view(flips.dtype) ^ flips).view(raw.dtype)
                continue
            where = where[array(self.tensors[op["t"]["index"]])] if "index" in op["t"] else where
            raw[where] = np.frombuffer(self.tensors[op["t"]["values"]][2], CODES[dtype])
        return raw.tobytes()


# --- golden files


def test_the_writer_reproduces_every_golden_file(tmp_path: Path) -> None:
    assert write_all(tmp_path) == IDS
    made = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert made == sorted(path.name for path in GOLDEN.glob("*.safetensors")) and len(made) == len(IDS) + 1
    for name in made:
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes(), name
        assert (GOLDEN / name).stat().st_size < 4096


def test_golden_files_cover_every_op_and_kind_of_entry() -> None:
    from weft import ops
    from weft.delta import CHANGES, Delta

    deltas = [Delta.load(GOLDEN / f"{name}.safetensors") for name in IDS]
    own = {kind for kind in ops.kinds() if type(ops.get(kind)).__module__.startswith("weft.ops.")}
    used = {inner.op for delta in deltas for entry in delta.entries.values() for op in entry.ops for inner in op.walk()}
    assert used == own | {"sum"}
    assert {entry.change.kind for delta in deltas for entry in delta.entries.values() if entry.change} == set(CHANGES)


@pytest.mark.parametrize("name", IDS)
def test_the_reader_knows_the_golden_files(name: str, tmp_path: Path) -> None:
    from weft.delta import Delta

    delta = Delta.load(GOLDEN / f"{name}.safetensors")
    assert delta.id == IDS[name]
    assert delta.base == FINGERPRINT
    delta.save(again := tmp_path / "again.safetensors")
    assert again.read_bytes() == (GOLDEN / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize("name", IDS)
def test_a_second_reader_computes_the_same_identity(name: str) -> None:
    mini = Mini(GOLDEN / f"{name}.safetensors")
    mini.check()
    assert mini.manifest["id"] == IDS[name]
    assert mini.manifest["base"]["fingerprint"] == FINGERPRINT


def test_a_second_reader_computes_the_same_fingerprint() -> None:
    from weft.base import Base

    tensors, _ = read(GOLDEN / "base.safetensors")
    rows = [[name, dtype, shape, sha256(data)] for name, (dtype, shape, data) in sorted(tensors.items())]
    assert sha256(json.dumps(rows, separators=(",", ":"))) == FINGERPRINT == Base.open(GOLDEN / "base.safetensors").fingerprint
    example = re.search(r"^  (\[\[.*\]\])$.*?`([0-9a-f]{64})`", PAGE.read_text(), re.M | re.S)
    assert example and sha256(example[1]) == example[2]


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_second_reader_folds_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    """Section 6 in rational arithmetic against the fold that streams blocks through numpy."""
    from weft.base import Base
    from weft.delta import Delta
    from weft.folding import fold

    (folder := tmp_path / "base").mkdir()
    shutil.copy(GOLDEN / "base.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text('{"problem_type": "x", "id2label": {"0": "a", "2": "c"}}')
    fold(Base.open(folder), [Delta.load(GOLDEN / f"{name}.safetensors")], tmp_path / "out", block=3)
    got, _ = read(tmp_path / "out" / "model.safetensors")
    before, _ = read(GOLDEN / "base.safetensors")
    want = Mini(GOLDEN / f"{name}.safetensors").fold(before)
    assert got == want
    assert got != before
    if name == "structure":
        patched = {"num_labels": 2, "id2label": {"0": "no", "1": "yes", "2": "c"}}
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == patched


@pytest.mark.parametrize("name", FOLDABLE)
def test_plain_float64_agrees_within_rounding(name: str) -> None:
    """What a simple reader that ignores section 6 would get."""
    from weft.delta import Delta

    mini, delta = Mini(GOLDEN / f"{name}.safetensors", exact=False), Delta.load(GOLDEN / f"{name}.safetensors")
    base, _ = read(GOLDEN / "base.safetensors")
    compared = 0
    for target, entry in mini.manifest["entries"].items():
        change = entry.get("change", {})
        if change.get("kind") == "remove" or delta.entries[target].dtype not in FLOATS:
            continue
        if change.get("kind") in ("add", "replace"):
            w = np.zeros(change["shape"])
        else:
            w = array(base[change.get("from", target)]).astype(np.float64)
            w[~np.isfinite(w)] = 0.5
        want = mini.chain(w, entry["ops"])
        for wide in (np.float32, np.float64):
            got = delta.apply(target, w.astype(wide))
            assert got.dtype == wide
            exact = {op["op"] for op in entry["ops"]} <= {"assign", "permute"}
            if exact:
                np.testing.assert_array_equal(got, want.astype(wide))
            else:
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
                assert not np.array_equal(got, w)
        compared += 1
    assert compared


def test_the_numbers_that_the_page_gives_for_seeded() -> None:
    page = PAGE.read_text()
    assert sha256(np.array(TABLE, "<f4").tobytes()) in page
    assert f"TABLE[0] = {TABLE[0]!r}" in page and f"{TABLE[32768]:.18f}" in page
    assert f"key(0, 0) = {random_key(0, 0):#018x}" in page
    assert f"word(key(7, 6), 0) = {word(random_key(7, 6), 0):#018x}" in page
    assert all(low == -high for low, high in zip(TABLE, reversed(TABLE), strict=True))


def test_a_file_written_as_bytes_is_read(tmp_path: Path) -> None:
    from weft.delta import Delta

    (path := tmp_path / "tiny.safetensors").write_bytes(TINY)
    assert (GOLDEN / "tiny.safetensors").read_bytes() == TINY
    delta = Delta.load(path)
    assert delta.id == IDS["tiny"] and delta.recipe == {"verb": "example"} and delta.notes == {"title": "tiny"}
    np.testing.assert_array_equal(delta.apply("a.weight", np.zeros((4, 3), np.float32))[0], [0.5, -1, 0.25])


def test_the_complete_file_of_the_page_is_the_golden_one() -> None:
    section = PAGE.read_text().split("## 10. A complete file")[1]
    blocks = re.findall(r"^```\w*\n(.*?)\n```$", section, re.M | re.S)
    start, end, manifest, identity = blocks
    for dump in (start, end):
        for line in dump.splitlines():
            position, data = int(line[:8], 16), bytes.fromhex(line[10:57])
            assert TINY[position : position + 16] == data
    assert "".join(part.removeprefix(" ") for part in manifest.splitlines()) == Mini(GOLDEN / "tiny.safetensors").text
    assert sha256(identity) == IDS["tiny"]


# --- attacks: each row of section 9


def parts(name: str) -> tuple[dict[str, Any], bytes]:
    data = (GOLDEN / f"{name}.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_header(change: Callable[[dict[str, Any]], Any], name: str = "tiny", body: bytes | None = None) -> bytes:
    header, data = parts(name)
    change(header)
    return joined(header, data if body is None else body)


def with_text(change: Callable[[str], str], name: str = "tiny") -> bytes:
    def edit(header: dict[str, Any]) -> None:
        header["__metadata__"]["weft"] = change(header["__metadata__"]["weft"])

    return with_header(edit, name)


def with_manifest(change: Callable[[dict[str, Any]], Any], name: str = "tiny", *, honest: bool = True) -> bytes:
    """The file with other content; with `honest`, its hashes are right, so that only the content is wrong."""

    def edit(text: str) -> str:
        manifest = json.loads(text, parse_int=Number, parse_float=Number)
        change(manifest)
        if honest:
            manifest["notes_sha256"] = sha256(canonical(manifest["notes"]))
            manifest["id"] = sha256(canonical({k: v for k, v in manifest.items() if k not in ("id", "notes", "notes_sha256")}))
        return canonical(manifest)

    return with_text(edit, name)


def with_op(name: str, target: str, change: Callable[[dict[str, Any]], Any], number: int = 0) -> bytes:
    return with_manifest(lambda m: change(m["entries"][target]["ops"][number]), name)


def with_values(name: str, values: dict[str, list[int]]) -> bytes:
    """Other positions in tensors of a golden file, with hashes to match."""
    header, body = parts(name)
    data = bytearray(body)
    hashes = {}
    for key, numbers in values.items():
        info = header[key]
        new = np.array(numbers, CODES[info["dtype"]]).tobytes()
        lo, hi = info["data_offsets"]
        assert len(new) == hi - lo
        data[lo:hi] = new
        hashes[key] = sha256(new)

    changed = with_manifest(lambda m: [m["tensors"][key].update(sha256=h) for key, h in hashes.items()], name)
    return changed[: len(changed) - len(body)] + bytes(data)


def pooled_index() -> bytes:
    """`sparse` whose positions are taken from a pool: the pool's numbers are good positions of it, but what is taken is not sorted."""

    def change(m: dict[str, Any]) -> None:
        op = m["entries"]["a.weight"]["ops"][0]
        op["t"]["index"] = {"key": op["t"]["index"], "take": op["t"]["index"], "shape": [3]}

    header, body = parts("additive")
    lo, hi = header["a.weight//0.index"]["data_offsets"]
    new = np.array([1, 2, 0], "<i4").tobytes()
    data = with_manifest(lambda m: (change(m), m["tensors"]["a.weight//0.index"].update(sha256=sha256(new))), "additive")
    start = len(data) - len(body)
    return data[: start + lo] + new + data[start + hi :]


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def set_in(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: Any) -> None:
        for step in path[:-1]:
            value = value[step]
        value[path[-1]] = to

    return change


def without(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(value: Any) -> None:
        for step in path[:-1]:
            value = value[step]
        del value[path[-1]]

    return change


A, B = "a.weight//0.A", "a.weight//0.B"
W = ("entries", "a.weight")
OP = (*W, "ops", 0)

ATTACKS: dict[str, Callable[[], bytes]] = {
    "a truncated file": lambda: TINY[:600],
    "a file cut in its data": lambda: TINY[:-4],
    "bytes after the last tensor": lambda: TINY + b"\0",
    "a header of 2^60 bytes": lambda: struct.pack("<Q", 1 << 60) + TINY[8:],
    "a header that is not JSON": lambda: joined(b"{'a': 1}", b""),
    "a tensor key twice": lambda: joined(json.dumps(parts("tiny")[0])[:-1].encode() + f', "{A}": 1}}'.encode(), parts("tiny")[1]),
    "an unknown dtype": lambda: with_header(set_in(A, "dtype", to="F4")),
    "a negative size": lambda: with_header(set_in(A, "shape", to=[-1, -3])),
    "offsets that do not fit the shape": lambda: with_header(set_in(A, "shape", to=[1, 2])),
    "overlapping tensors": lambda: with_header(set_in(B, "data_offsets", to=[8, 24])),
    "a hole between tensors": lambda: with_header(set_in(B, "data_offsets", to=[16, 32]), body=bytes(32)),
    "a second metadata key": lambda: with_header(set_in("__metadata__", "format", to="pt")),
    "a manifest key twice": lambda: with_text(lambda text: text[:-1] + ',"tied":[]}'),
    "a manifest with a space": lambda: with_text(lambda text: text.replace(":", ": ", 1)),
    "NaN in the manifest": lambda: with_text(lambda text: text.replace("0.5", "NaN")),
    "an integer of 400 digits": lambda: with_text(lambda text: text.replace("0.5", "1" + "0" * 399)),
    "nesting 100,000 deep": lambda: with_text(lambda text: text.replace("0.5", "[" * 100_000 + "]" * 100_000)),
    "an unknown member": lambda: with_manifest(set_in("surprise", to=1)),
    "a missing member": lambda: with_manifest(without("over")),
    "format 2": lambda: with_manifest(set_in("format", to=2)),
    "an unknown op": lambda: with_manifest(set_in(*OP, "op", to="run_this")),
    "an op that names a module to import": lambda: with_manifest(set_in(*OP, "op", to="os.path")),
    "an unknown config key": lambda: with_manifest(set_in(*OP, "cfg", to={"alpha": 2})),
    "a config value of the wrong type": lambda: with_manifest(set_in(*OP, "cfg", to={"scale": "2"})),
    "a field that is missing": lambda: with_manifest(without(*OP, "t", "A")),
    "an unknown field": lambda: with_manifest(set_in(*OP, "t", "C", to=A)),
    "a reference to an absent tensor": lambda: with_manifest(set_in(*OP, "t", "A", to="elsewhere")),
    "a tensor that no op uses": lambda: with_manifest(without("entries", "a.weight"), "additive"),
    "a tensor that only the file has": lambda: with_manifest(without("tensors", A)),
    "a field of the wrong shape": lambda: with_manifest(set_in(*OP, "t", to={"A": B, "B": A})),
    "integers where floats belong": lambda: with_op("additive", "a.weight", set_in("t", "values", to="a.weight//0.index")),
    "a position outside the target": lambda: with_values("additive", {"a.weight//0.index": [0, 5, 12]}),
    "a negative position": lambda: with_values("additive", {"a.weight//0.index": [-1, 5, 11]}),
    "a position twice": lambda: with_values("additive", {"a.weight//0.index": [0, 5, 5]}),
    "a position outside the target, through take": pooled_index,
    "a permutation that is none": lambda: with_values("relative", {"@shared/stream": [2, 0, 3, 3]}),
    "take outside the pool": lambda: with_values("references", {"@shared/rows": [4, 0, 5]}),
    "a view outside the target": lambda: with_op("references", "conv.weight", set_in("at", "index", to=[[2, 5], 2])),
    "a view that selects nothing": lambda: with_op("references", "conv.weight", set_in("at", to={"index": []})),
    "a view of 70 axes": lambda: with_op("references", "conv.weight", set_in("at", to={"reshape": [1] * 69 + [12]})),
    "a rank that asks for petabytes": lambda: with_op("axes", "half.weight", set_in("cfg", "rank", to=2**50)),
    "arithmetic on integers": lambda: with_op("replay", "steps", set_in("op", to="dense")),
    "a reserved target": lambda: with_manifest(lambda m: m["entries"].update({"@other/a": m["entries"].pop("a.weight")})),
    "a weight op on a module": lambda: with_manifest(lambda m: m["entries"].update({"@module/a": {"ops": m["entries"].pop("a.weight")["ops"]}})),
    "an added tensor with a base": lambda: with_manifest(set_in(*W, "change", to={"kind": "add", "dtype": "F32", "shape": [4, 3]})),
    "a removed tensor with ops": lambda: with_manifest(set_in(*W, "change", to={"kind": "remove"})),
    "a quantisation that is no object": lambda: with_manifest(set_in("base", "quantisation", to=None)),
    "a changed byte of data": lambda: flip(TINY, len(TINY) - 1),
    "a changed manifest": lambda: with_manifest(set_in(*OP, "cfg", "scale", to=0.25), honest=False),
    "changed notes": lambda: with_manifest(set_in("notes", "title", to="tidy"), honest=False),
}


def rows_of_section_9() -> dict[str, str]:
    section = PAGE.read_text().split("## 9. What a reader refuses")[1].split("## 10.")[0]
    return dict(re.findall(r"^\| (?!attack|---)(.*?) \| (.*) \|$", section, re.M))


def test_every_attack_of_the_page_is_tried() -> None:
    assert list(rows_of_section_9()) == list(ATTACKS)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_with_the_message_that_the_page_gives(attack: str, tmp_path: Path) -> None:
    from weft.delta import Delta
    from weft.errors import FormatError

    (path := tmp_path / "hostile.safetensors").write_bytes(ATTACKS[attack]())
    with pytest.raises(FormatError, match=re.escape(rows_of_section_9()[attack])) as caught:
        Delta.load(path)
    assert str(path) in str(caught.value)


def test_what_the_attacks_start_from_is_accepted(tmp_path: Path) -> None:
    """So that no attack is refused only because of how it was made."""
    from weft.delta import Delta

    for name in IDS:
        (path := tmp_path / f"{name}.safetensors").write_bytes(with_manifest(lambda m: None, name))
        assert Delta.load(path).id == IDS[name]


# --- what writing the page down brought to light


def one_op(kind: str, fields: dict[str, Any], w: np.ndarray, **cfg: Any) -> Any:
    from tests.conftest import MemoryBase
    from weft.delta import Builder

    build = Builder(MemoryBase({"w": w}))
    build.put("w", kind, fields, **cfg)
    return build.done()


def test_a_raw_assign_takes_its_values_through_references_too() -> None:
    from tests.conftest import MemoryBase
    from weft.delta import Builder
    from weft.ops import Ref, chain

    w, pool = np.zeros((3, 2), np.float32), np.arange(8, dtype=np.float32).reshape(4, 2)
    build = Builder(MemoryBase({"w": w}))
    build.share("pool", pool)
    build.share("rows", np.array([3, 0, 2]))
    build.put("w", "assign", {"values": Ref("@shared/pool", "@shared/rows", (3, 2))})
    delta = build.done()
    np.testing.assert_array_equal(chain.rewrite(w, delta.entries["w"].ops, delta.get), pool[[3, 0, 2]])
    np.testing.assert_array_equal(delta.apply("w", w), pool[[3, 0, 2]])


def test_seeded_on_a_part_of_its_bases_streams_to_the_same_bytes() -> None:
    from weft.errors import FormatError
    from weft.ops import chain

    w = np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4)
    coef = np.array([0.5, -2], np.float32)
    delta = one_op("seeded", {"coef": coef}, w, first_row=3, all_rows=10, seed=4)
    whole = one_op("seeded", {"coef": coef}, np.zeros((10, 4), np.float32), seed=4).apply("w", np.zeros((10, 4), np.float32))
    np.testing.assert_allclose(delta.apply("w", w) - w, whole[3:9], atol=1e-6)
    rows = chain.Rows(delta.entries["w"].ops, delta.tensors.__getitem__, w.shape, 2, 5)
    np.testing.assert_array_equal(chain.rewrite(w[2:5], rows.ops, rows.get), delta.apply("w", w)[2:5])
    with pytest.raises(FormatError, match="outside bases of 8 rows"):
        one_op("seeded", {"coef": coef}, w, first_row=3, all_rows=8)
    with pytest.raises(FormatError, match="at least one coefficient"):
        one_op("seeded", {"coef": coef[:0]}, w)


def test_sizes_of_zero_and_the_smallest_float64_are_ordinary() -> None:
    from weft import xp

    w = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    nothing = {"core": np.zeros((0, 2), np.float32), "U0": np.zeros((3, 0), np.float32), "U1": np.ones((4, 2), np.float32)}
    np.testing.assert_array_equal(one_op("tucker", nothing, w).apply("w", w), w)
    empty = np.zeros((0, 4), np.float32)
    assert one_op("magnitude", {"m": np.zeros(0, np.float32)}, empty).apply("w", empty).shape == (0, 4)
    small = np.full((1, 1), 1e-310)
    with np.errstate(all="raise", under="ignore"):
        assert xp.mm(small, np.ones((1, 1))) == 0.0


def test_a_delta_whose_file_was_replaced_says_so(tmp_path: Path) -> None:
    from weft.delta import Delta
    from weft.errors import InputError

    (path := tmp_path / "a.safetensors").write_bytes(TINY)
    delta = Delta.load(path)
    (delta + delta).save(path)
    with pytest.raises(InputError, match="changed while it was being read"):
        delta.get("a.weight//0.A")
    with pytest.raises(InputError, match="changed while it was being read"):
        delta.save(tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
