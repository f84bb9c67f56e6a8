"""The reader trusts nothing; the writer leaves a whole file or none."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft import canon, file, stored
from weft._write import atomic_file, atomic_folder, sweep, write_bytes
from weft.delta import Delta
from weft.errors import InputError, WeftError
from weft.stored import HEADER_LIMIT, read_container


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + body


def remade(data: bytes, change: Callable[[dict[str, Any]], None], *, honest: bool = True) -> bytes:
    """The file with its manifest changed; with `honest`, id and hashes are computed anew, so only content is wrong."""
    header, body = split(data)
    manifest = json.loads(header["__metadata__"]["weft"])
    change(manifest)
    if honest:
        import hashlib

        manifest["notes_sha256"] = hashlib.sha256(canon.dumps(manifest.get("notes", {}))).hexdigest()
        content = {k: v for k, v in manifest.items() if k not in ("id", "notes", "notes_sha256")}
        manifest["id"] = hashlib.sha256(canon.dumps(content)).hexdigest()
    header["__metadata__"]["weft"] = canon.dumps(manifest).decode()
    return joined(header, body)


def refused(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    with pytest.raises(InputError, match=match) as caught:
        file.read(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_every_single_bit_flip_is_seen(small_delta: Path, tmp_path: Path) -> None:
    data = small_delta.read_bytes()
    assert len(data) < 16_384
    target = tmp_path / "flipped.safetensors"
    survivors = []
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 1 << (position % 8)
        target.write_bytes(broken)
        try:
            file.read(target)
        except InputError:
            continue
        survivors.append(position)
    assert survivors == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_thousand_header_mutations_raise_only_our_own_errors(small_delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(stored, "_LONG", (0, stored._LONG)[seed % 2])  # headers are read in another way where they are long
    data = small_delta.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    source = random.Random(seed)
    target = tmp_path / "mutated.safetensors"
    slowest, accepted = 0.0, 0
    handle = os.open(target, os.O_RDWR | os.O_CREAT)
    try:
        for _ in range(25_000):
            broken = bytearray(data)
            for _ in range(source.randint(1, 3)):
                kind, position = source.random(), source.randrange(end)
                if kind < 0.6:
                    broken[position] = source.randrange(256)
                elif kind < 0.8:
                    del broken[position]
                else:
                    broken.insert(position, source.randrange(256))
            os.ftruncate(handle, 0)
            os.pwrite(handle, broken, 0)
            start = time.perf_counter()
            try:
                file.read(target)
                accepted += broken != data
            except InputError:
                pass
            slowest = max(slowest, time.perf_counter() - start)
    finally:
        os.close(handle)
    assert accepted == 0
    assert slowest < 5, "a mutated header made the reader hang"


def test_truncation_anywhere_is_refused(small_delta: Path, tmp_path: Path) -> None:
    data = small_delta.read_bytes()
    for size in [*range(64), *range(64, len(data), 97), len(data) - 1]:
        refused(tmp_path / "short.safetensors", data[:size], "short|truncated|ends? at|JSON")
    refused(tmp_path / "long.safetensors", data + b"\0", "the tensors end at byte")


@pytest.mark.parametrize("long", [0, stored._LONG])
def test_hostile_containers(small_delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: int) -> None:
    monkeypatch.setattr(stored, "_LONG", long)
    header, body = split(small_delta.read_bytes())
    target = tmp_path / "hostile.safetensors"
    text = json.dumps(header).encode()
    name = next(k for k in header if k != "__metadata__")
    info = header[name]
    twice = text[:-1] + b"," + json.dumps(name).encode() + b":" + json.dumps(info).encode() + b"}"
    refused(target, joined(twice, body), "stands twice")
    refused(target, (HEADER_LIMIT + 1).to_bytes(8, "little") + body, "the header claims")
    refused(target, (2**63).to_bytes(8, "little") + body, "the header claims")
    refused(target, joined(b"[" * 100_000, body), "not valid JSON")
    refused(target, joined(b"[]", body), "not a JSON object")
    refused(target, joined(text.replace(b'"F32"', b'"F99"', 1), body), "unknown dtype")
    for bad in ([-1, 4], [0], [0, 10**30], ["0", 4], [4, 0], [True, 4]):
        refused(target, joined({**header, name: {**info, "data_offsets": bad}}, body), "data_offsets|needs")
    for bad_shape in ([-1], "x", [2**62, 2**62], [1.5], [1] * 65):
        refused(target, joined({**header, name: {**info, "shape": bad_shape}}, body), "shape")
    begin = info["data_offsets"][0]
    others = [k for k in header if k not in ("__metadata__", name)]
    size = header[others[0]]["data_offsets"][1] - header[others[0]]["data_offsets"][0]
    overlap = {**header, others[0]: {**header[others[0]], "data_offsets": [begin, begin + size]}}
    refused(target, joined(overlap, body), "overlaps|hole|end at")
    moved = {k: v if k == "__metadata__" else {**v, "data_offsets": [o + 8 for o in v["data_offsets"]]} for k, v in header.items()}
    refused(target, joined(moved, b"\0" * 8 + body), "hole")
    refused(target, joined({**header, "__metadata__": {"weft": 3}}, body), "strings")
    refused(target, joined({**header, "__metadata__": {"format": "pt"}}, body), "not a weft delta")
    refused(target, joined({**header, "__metadata__": {**header["__metadata__"], "more": "x"}}, body), "not a weft delta")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(format=2), "format 2 is not known"),
        (lambda m: m.update(format=True), "format True is not known"),
        (lambda m: m.pop("over"), "lacks"),
        (lambda m: m.update(extra=1), "unknown"),
        (lambda m: m["base"].update(fingerprint="xyz"), "64 hex digits"),
        (lambda m: m["entries"]["b.bias"]["ops"][0].update(op="lowrnk"), "unknown op 'lowrnk'.*did you mean 'lowrank'"),
        (lambda m: m["entries"]["b.bias"]["ops"][0].update(op="../../evil"), "unknown op"),
        (lambda m: m["entries"]["b.bias"]["ops"][0].update(op="chain"), "unknown op"),
        (lambda m: m["entries"]["b.bias"]["ops"][0]["t"].update(index="gone"), "'gone' is missing"),
        (lambda m: m["entries"]["b.bias"]["ops"][0]["t"].pop("index"), "fields .*index.* are missing"),
        (lambda m: m["entries"]["b.bias"]["ops"][0]["cfg"].update(scale="big"), "must be float"),
        (lambda m: m["entries"].pop("b.bias"), "not used by any op"),
        (lambda m: m["entries"].update({"@odd": {"ops": []}}), "'@odd' is not a target"),
        (lambda m: m["entries"]["b.bias"].pop("base"), "base is missing"),
        (lambda m: m["entries"]["b.bias"]["base"].update(shape=[2, 2]), "positions must be sorted, unique and within 0..3"),
        (lambda m: m["entries"]["b.weight"]["base"].update(shape=[7, 8]), "expected shape"),
        (lambda m: m["entries"]["a.weight"]["ops"][0].update(at={"index": [[2, 60]]}), "outside an axis of size 12"),
        (lambda m: m["entries"]["a.weight"]["ops"][0].update(at={"transpose": [0, 0]}), "name each axis"),
        (lambda m: m["entries"]["a.weight"]["ops"][0].update(at={}), "`at` needs"),
        (lambda m: m["entries"]["a.weight"]["ops"][0].update(terms=[]), "only `sum` has terms"),
        (lambda m: m["entries"]["head.weight"]["change"].update(kind="explode"), "unknown change"),
        (lambda m: m["entries"]["head.weight"]["change"].update(dtype="BF16"), "the target is BF16, got F32"),
        (lambda m: m["tensors"].pop("@shared/A"), "disagree about tensor '@shared/A'"),
        (lambda m: m["tensors"]["@shared/A"].update(shape=[8, 2]), "the manifest says"),
        (lambda m: m.update(over=["short"]), "64 hex digits"),
        (lambda m: m.update(tied=[["x", "y"]]), "touches no entry"),
        (lambda m: m.update(recipe=[]), "recipe must be an object"),
    ],
)
def test_hostile_manifests_with_honest_hashes(small_delta: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], match: str) -> None:
    refused(tmp_path / "hostile.safetensors", remade(small_delta.read_bytes(), change), match)


def test_dishonest_manifests(small_delta: Path, tmp_path: Path) -> None:
    data = small_delta.read_bytes()
    target = tmp_path / "x.safetensors"
    refused(target, remade(data, lambda m: m["recipe"].update(seed=4), honest=False), "the manifest says id")
    refused(target, remade(data, lambda m: m["notes"].update(made="tomorrow"), honest=False), "notes were changed")
    header, body = split(data)
    header["__metadata__"]["weft"] = header["__metadata__"]["weft"].replace('"format":1', '"format": 1')
    refused(target, joined(header, body), "not canonical")


def test_a_missing_file_a_folder_and_a_pickle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        file.read(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        file.read(tmp_path)
    refused(tmp_path / "p.safetensors", b"\x80\x04\x95" + b"\0" * 100, "header claims|JSON")


def test_other_tools_can_list_a_delta(small_delta: Path) -> None:
    from safetensors import safe_open

    delta = Delta.load(small_delta)
    with safe_open(small_delta, "np") as other:
        assert set(other.keys()) == set(delta.tensors)
        for key in other.keys():  # noqa: SIM118 (safe_open is not a mapping)
            np.testing.assert_array_equal(other.get_tensor(key), delta.get(key))
        assert set(other.metadata()) == {"weft"}


def test_the_same_delta_gives_the_same_bytes_under_other_hash_seeds(small_delta: Path, tmp_path: Path) -> None:
    code = "import sys; from weft import Delta; Delta.load(sys.argv[1]).save(sys.argv[2])"
    for seed in ("0", "1", "77"):
        out = tmp_path / f"{seed}.safetensors"
        subprocess.run([sys.executable, "-c", code, small_delta, out], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert out.read_bytes() == small_delta.read_bytes()


# --- writing


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_asks_for(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        write_bytes(tmp_path / "x", b"1")
        with atomic_folder(tmp_path / "d") as folder:
            (folder / "y").write_bytes(b"2")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "d" / "y").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o777 & ~mask


def test_an_error_while_writing_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_file(target) as out:
        out.write(b"new")
        raise RuntimeError
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "d") as folder:
        (folder / "y").write_bytes(b"2")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(InputError, match="exists already"), atomic_folder(tmp_path):
        pass
    with pytest.raises(InputError, match="does not exist"):
        write_bytes(tmp_path / "no" / "x", b"")
    with pytest.raises(InputError, match="it is a folder"):
        write_bytes(tmp_path, b"")


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(WeftError, match=r"cannot write .*x: File too large .*nothing was changed"):
            write_bytes(target, b"n" * 1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_failing_system_calls_leave_the_old_state_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x"
    for name in ("open", "fsync", "replace", "fchmod"):
        target.write_bytes(b"old")
        real = getattr(os, name)

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, name, fail)
        with pytest.raises(WeftError, match="Input/output error"):
            write_bytes(target, b"new")
        monkeypatch.setattr(os, name, real)
        assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_sweep_keeps_names_of_living_processes(tmp_path: Path) -> None:
    mine = tmp_path / f".x.{os.getpid()}-0123abcd.weft-tmp"
    dead = tmp_path / ".x.4194399-0123abcd.weft-tmp"
    other = tmp_path / ".x.weft-tmp"
    for path in (mine, dead, other):
        path.write_bytes(b"")
    assert sweep(tmp_path) == [dead]
    assert sorted(tmp_path.iterdir()) == sorted([mine, other])


@pytest.mark.slow
def test_two_hundred_kills_leave_no_half_file_and_nothing_behind(small_delta: Path, tmp_path: Path) -> None:
    """A child writes one file over and over and is killed at a random instant; the target is always a whole file."""
    target = tmp_path / "out" / "big.safetensors"
    target.parent.mkdir()
    code = """
import sys, numpy as np
from weft.delta import Builder
sys.path.insert(0, sys.argv[2])
from tests.conftest import MemoryBase
build = Builder(MemoryBase({"w": np.zeros((256, 1024), np.float32)}))
build.put("w", "dense", {"values": np.full((256, 1024), 1.5, np.float32)})
delta = build.done()
print("ready", flush=True)
while True:
    delta.save(sys.argv[1])
    print("saved", flush=True)
"""
    source = random.Random(3)
    root = str(Path(__file__).parent.parent)
    done = 0
    while done < 200:
        child = subprocess.Popen([sys.executable, "-c", code, str(target), root], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        # several kills per start would not be independent: one child, one kill, at an instant inside its writing
        time.sleep(source.random() * 0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if target.exists():
            Delta.load(target)
        done += 1
    write_bytes(target.parent / "next", b"the next start")
    assert {p.name for p in target.parent.iterdir()} <= {"big.safetensors", "next"}


def test_canonical_json() -> None:
    """Vectors of RFC 8785, sections 3.2.2 to 3.2.4 and appendix B."""
    vectors = {
        0.0: "0", 1.0: "1", 1e21: "1e+21", 1e20: "100000000000000000000", 1e-6: "0.000001", 1e-7: "1e-7",
        333333333.33333329: "333333333.3333333", 5e-324: "5e-324", 1.7976931348623157e308: "1.7976931348623157e+308",
        9007199254740994.0: "9007199254740994", -1.5e-9: "-1.5e-9", 4.5: "4.5", 2e-3: "0.002", 1.25e22: "1.25e+22",
    }  # fmt: skip
    for value, text in vectors.items():
        assert canon.number(value) == text
        assert float(text) == value
    assert canon.number(-0.0) == "0"
    order = {"\u20ac": 1, "\r": 2, "1": 3, "\U0001f600": 4, "\x80": 5, "\xf6": 6, "\ufb33": 7}
    assert canon.dumps(order) == '{"\\r":2,"1":3,"\x80":5,"\xf6":6,"\u20ac":1,"\U0001f600":4,"\ufb33":7}'.encode()
    assert canon.dumps(["\u000f\n'\"\\/", None, True, [], {}]) == b'["\\u000f\\n\'\\"\\\\/",null,true,[],{}]'
    for bad in (float("nan"), float("inf"), 2**53 + 1, {1: 2}, {1, 2}, "\ud800"):
        with pytest.raises(ValueError):
            canon.dumps(bad)


def test_containers_from_the_reference_library_are_read(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2).bfloat16(), "c": torch.arange(5), "d": torch.tensor(1.5), "e": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    read, metadata = read_container(tmp_path / "t.safetensors")
    assert metadata == {"format": "pt"}
    from weft import xp

    for name, value in tensors.items():
        assert read[name].shape == tuple(value.shape)
        assert read[name].read().tobytes() == xp.to_numpy(value).tobytes()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "pipe.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        read_container(path)


def test_large_tensors_are_read_in_pieces(small_delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = read_container(small_delta)
    whole = {name: tensor.read().tobytes() for name, tensor in tensors.items()}
    monkeypatch.setattr(stored, "_AT_ONCE", 5)
    again, _ = read_container(small_delta)
    assert max(map(len, whole.values())) > 5
    assert {name: tensor.read().tobytes() for name, tensor in again.items()} == whole
    assert not any(tensor.read().flags.writeable for tensor in again.values())
    longest = max(again.values(), key=lambda tensor: tensor.offset)
    os.truncate(small_delta, longest.offset + 6)
    with pytest.raises(InputError, match="changed while it was being read"):
        longest.read()
