"""How fast fold is and how much memory it takes, beside the floor: copying the same bytes.

    python bench/fold.py [--size 1.0] [--threads 1 2] [--json]

Builds a Llama-shaped bf16 checkpoint of about SIZE GB in four shards and two deltas that touch every layer (a rank-16
LoRA on every linear; dense float32 increments on every tensor) in a temporary folder, folds each in a fresh process and
prints one line a run: `wall` of the whole process, which also reads and verifies the delta; `fold` of the call alone;
`peak`, the process's largest resident set; `floor`, the time to copy the checkpoint's files with plain read, write and
fsync just before. The base's hashes are in the cache, as after any earlier use of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import build_base, noise

from weft.base import Base
from weft.delta import Builder
from weft.stored import Computed


def build_deltas(base: Base, folder: Path) -> dict[str, Path]:
    lora, dense = Builder(base), Builder(base)
    for number, name in enumerate(base.names):
        shape = base.tensor(name).shape
        if len(shape) == 2 and "embed" not in name:
            a = np.frombuffer(b"".join(noise((16, shape[1]), 1000 + number, "float32", shape[1] ** -0.5)), np.float32).reshape(16, -1)
            b = np.frombuffer(b"".join(noise((shape[0], 16), 2000 + number, "float32", 1e-3)), np.float32).reshape(-1, 16)
            lora.put(name, "lowrank", {"A": a, "B": b}, scale=2.0)
        dense.put(name, "dense", {"values": Computed("F32", shape, lambda s=shape, n=number: noise(s, 3000 + n, "float32", 1e-3))})
    paths = {}
    for kind, build in {"lora": lora, "dense": dense}.items():
        paths[kind] = folder / f"{kind}.safetensors"
        build.done(recipe={"verb": "bench"}).save(paths[kind])
    return paths


FOLD = """
import sys, time
from weft.base import Base
from weft.delta import Delta
from weft.folding import fold
delta = Delta.load(sys.argv[2])
begin = time.perf_counter()
fold(Base.open(sys.argv[1]), [delta], sys.argv[3], threads=int(sys.argv[4]))
assert "torch" not in sys.modules
seconds = time.perf_counter() - begin
with open("/proc/self/status") as status:  # not ru_maxrss: it starts at what the parent had in memory
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
print(seconds, peak * 1024)
"""


def folded(model: Path, delta: Path, out: Path, threads: int) -> dict[str, Any]:
    """One fold in a process of its own: wall and CPU seconds, peak memory in MB."""
    before = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", FOLD, str(model), str(delta), str(out), str(threads)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = process.stdout.read().split()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("the fold failed; its own message is above")
    return {
        "wall_s": round(time.perf_counter() - before, 2),
        "fold_s": round(float(printed[0]), 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(int(printed[1]) / 1e6, 1),
    }


def floor(model: Path, out: Path) -> float:
    """Seconds to copy the weights with plain read, write and fsync."""
    out.mkdir()
    begin = time.perf_counter()
    for file in sorted(model.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as source, open(out / file.name, "wb", buffering=0) as target:
            while block := source.read(1 << 20):
                target.write(block)
            os.fsync(target.fileno())
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.0, help="GB of the checkpoint (default 1.0)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=2, help="runs of each, interleaved with the floor")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as name:
        folder = Path(name)
        os.environ["WEFT_CACHE"] = str(folder / "cache")
        model = folder / "model"
        build_base(model, args.size)
        time.sleep(2.1)  # the cache trusts no file that changed just now
        base = Base.open(model)
        base.hash_all()
        deltas = build_deltas(base, folder)
        if not args.json:
            print("| delta | threads | wall s | fold s | CPU s | peak MB | floor s | fold / floor |\n|---|---|---|---|---|---|---|---|")
        for _ in range(args.repeat):
            for kind, path in deltas.items():
                for threads in args.threads:
                    out = folder / "out"
                    base_line = floor(model, out)
                    shutil.rmtree(out)
                    row = folded(model, path, out, threads)
                    shutil.rmtree(out)
                    ratio = row["fold_s"] / base_line
                    if args.json:
                        print(json.dumps({"delta": kind, "threads": threads, **row, "floor_s": round(base_line, 2), "ratio": round(ratio, 2)}), flush=True)
                    else:
                        cells = [kind, threads, row["wall_s"], row["fold_s"], row["cpu_s"], row["peak_mb"], f"{base_line:.2f}", f"{ratio:.2f}"]
                        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
