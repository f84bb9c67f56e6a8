"""How small and how fast: ternary coding beside the entropy bound and general compressors, and `weft compress` as a whole.

    python bench/compress.py [--entries 33554432] [--rounds 3]

A bf16 increment of normal numbers, in memory. Coding and decoding run in one thread and are counted in CPU time of the process (the
best of ROUNDS); MB are those of the dense bf16 increment, 2 bytes an entry. `bits` are all bytes of the payload over the entries; `bound` is
H(p) + p at the density p that is really kept (ties at the threshold make it a little more than asked for). zlib and zstd, where it is
there, get the dense increment, and the pruned one in which only the kept entries are not zero. Then `weft compress` in fresh
processes, on a delta file of that increment and on two checkpoints (their hashes in the cache), with everything: reading,
hashing, selection of the threshold, coding, measuring what was lost, writing.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from weft import xp
from weft.base import Base
from weft.codes import Coded, encode
from weft.compressing.compeft import Ternary
from weft.delta import Builder
from weft.engine.stream import reuse_memory
from weft.file import container_header
from weft.stored import Held

STD = 1e-3

_RUN = """
import json, resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""
"""Runs a command from a small process: a child's peak counts what its parent had when it was started."""


def increment(entries: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    return np.concatenate([xp.cast(rng.standard_normal(1 << 20, np.float32) * np.float32(STD), "bfloat16") for _ in range(entries >> 20)])


def best(rounds: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """The least CPU seconds, and the result."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        found = work()
        times.append(time.process_time() - start)
    return min(times), found


def entropy(p: float) -> float:
    return p - p * math.log2(p) - (1 - p) * math.log2(1 - p) if 0 < p < 1 else p


def drain(tensor: Coded) -> None:
    for _ in tensor.blocks():
        pass


def coding(x: np.ndarray[Any, Any], rounds: int) -> None:
    print("| code | density | bits | bound | over bound | smaller than bf16 | coded MB/s | decoded MB/s |\n|---|---|---|---|---|---|---|---|")
    magnitudes = np.sort(abs(xp.cast(x[: 1 << 22], "float32")))
    dense = 2 * x.size
    for density in (0.01, 0.05, 0.1, 0.2, 0.5):
        trim = Ternary(float(magnitudes[-int(density * magnitudes.size)]), STD)
        for form in ("golomb", "bitmask"):
            coded, small = best(rounds, partial(encode, Held(x), "ternary", {"scale": STD, "form": form}, dtype="F32", each=trim.trimmed))
            decoded, _ = best(rounds, partial(drain, small))
            p = sum(int(np.count_nonzero(np.frombuffer(block, np.float32))) for block in small.blocks()) / x.size
            bits, bound = 8 * small.payload.nbytes / x.size, entropy(p)
            speeds = f"{dense / coded / 1e6:,.0f} | {dense / decoded / 1e6:,.0f}"
            print(f"| {form} | {p:.4f} | {bits:.4f} | {bound:.4f} | {bits / bound:.4f} | {16 / bits:.1f}x | {speeds} |", flush=True)
    part = x[: 1 << 22]
    trim = Ternary(float(magnitudes[-int(0.05 * magnitudes.size)]), STD)
    pruned = (np.sign(trim.trimmed(part)) * np.float32(STD)).astype(part.dtype)
    tools: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {"zlib 6": (partial(zlib.compress, level=6), zlib.decompress)}
    try:
        import zstandard

        tools |= {f"zstd {level}": (zstandard.ZstdCompressor(level=level).compress, zstandard.ZstdDecompressor().decompress) for level in (3, 19)}
    except ImportError:
        print("(zstd is not installed)", file=sys.stderr)
    for name, (pack, unpack) in tools.items():
        for what, data in (("dense", part.tobytes()), ("pruned", pruned.tobytes())):
            coded, small = best(1, partial(pack, data))
            decoded, _ = best(1, partial(unpack, small))
            bits = 8 * len(small) / part.size
            cells = f"{bits:.4f} | | | {16 / bits:.1f}x | {len(data) / coded / 1e6:,.0f} | {len(data) / decoded / 1e6:,.0f}"
            print(f"| {name}, {what} | {'0.05' if what == 'pruned' else '1'} | {cells} |", flush=True)


def checkpoint(folder: Path, x: np.ndarray[Any, Any]) -> None:
    folder.mkdir()
    tensors = {f"layer.{number}.weight": Held(part.reshape(-1, 2048)) for number, part in enumerate(np.split(x, 8))}
    with open(folder / "model.safetensors", "wb") as out:
        out.write(container_header(tensors, list(tensors), {"format": "pt"}))
        for tensor in tensors.values():
            out.writelines(tensor.blocks())
    (folder / "config.json").write_text("{}")


def whole(x: np.ndarray[Any, Any], root: Path) -> None:
    print("\n| weft compress, density 0.05 | threads | wall s | CPU s | peak MB | MB/s of bf16, CPU |\n|---|---|---|---|---|---|")
    base = xp.cast(xp.cast(np.roll(x, 12345), "float32") * np.float32(20), "bfloat16")
    checkpoint(root / "base", base)
    checkpoint(root / "tuned", xp.cast(xp.cast(base, "float32") + xp.cast(x, "float32"), "bfloat16"))
    opened = Base.open(root / "base")
    build = Builder(opened)
    for number, part in enumerate(np.split(x, 8)):
        build.put(f"layer.{number}.weight", "dense", {"values": part.reshape(-1, 2048)})
    build.done().save(root / "delta.safetensors")
    Base.open(root / "tuned").fingerprint  # noqa: B018 (into the cache of hashes)
    for name, words in (("a delta of bf16", ["delta.safetensors"]), ("a checkpoint and its base", ["tuned", "--base", "base"])):
        for threads in (1, 2):
            command = [sys.executable, "-m", "weft", "compress", *words, "-p", "density=0.05", "-o", "small.safetensors", "--threads", str(threads)]
            start = time.perf_counter()
            told = subprocess.run([sys.executable, "-c", _RUN, *command], cwd=root, stdout=subprocess.PIPE, check=True, text=True).stdout
            wall, (cpu, peak) = time.perf_counter() - start, json.loads(told)
            print(f"| {name} | {threads} | {wall:.1f} | {cpu:.1f} | {peak / 1024:.0f} | {2 * x.size / cpu / 1e6:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1 << 25, help="a multiple of 2^20")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    reuse_memory()
    x = increment(args.entries)
    coding(x, args.rounds)
    with tempfile.TemporaryDirectory() as root:
        whole(x, Path(root))


if __name__ == "__main__":
    main()
