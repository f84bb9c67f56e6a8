"""Merging, side by side with mergekit: wall and CPU time and peak memory of whole processes, beside the floor.

    python bench/merge.py [--size 1.0] [--repeat 3] [--methods linear ties] [--peer build/mergekit] [--tiny] [--loras] [--json]

Builds a Llama-shaped bf16 base of SIZE GB in four shards and two fine-tunes of it in a temporary folder (--folder: another
disk), and merges them into a checkpoint by each method, with weft and with mergekit in turn, each in a process of its own.
mergekit runs in an environment of its own, made by pip at --peer when it is not there. `floor`: a process of plain Python
that reads the inputs (base included where the method looks at it) and writes as many bytes as the output, synced. weft
needs no hashes on this way; hashing the three models (what a delta file with names needs, once) is timed apart.

--tiny: a model of 14,400 tiny tensors, without the peer. --loras: 20 LoRA deltas of rank 16 into one of rank 16, at two
sizes of model, to show that time and memory follow the factors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import build_base, build_tuned, layout, write_folder

from weft.base import Base
from weft.delta import Builder
from weft.stored import Computed, Held, Tensor

METHODS: dict[str, tuple[str, dict[str, Any], list[float] | None, str, str]] = {
    # name: weft's method, its options, weights; mergekit's method and the parameters of each of its models
    "linear": ("linear", {}, [0.5, 0.5], "linear", "weight: 0.5"),
    "task-arithmetic": ("task-arithmetic", {}, [0.5, 0.5], "task_arithmetic", "weight: 0.5"),
    "ties": ("ties", {"density": 0.2}, [1.0, 1.0], "ties", "weight: 1.0, density: 0.2"),
    "dare-ties": ("dare", {"drop": 0.2, "signs": "mass"}, [1.0, 1.0], "dare_ties", "weight: 1.0, density: 0.8"),
    "breadcrumbs": ("model-breadcrumbs", {"density": 0.9, "top": 0.01}, [0.5, 0.5], "breadcrumbs", "weight: 0.5, density: 0.9, gamma: 0.01"),
}

MERGE = """
import json, sys
inputs, base, method, weights, options, out, threads = json.loads(sys.argv[1])
from weft.merging import merge
merge(inputs, base, method, weights, into=out, threads=threads, **options)
assert "torch" not in sys.modules
with open("/proc/self/status") as status:  # not ru_maxrss: it starts at what the parent had in memory
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")))
"""

FLOOR = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
count, size, out, *files = sys.argv[1:]
block = 1 << 20
def read(span):
    file, start, stop = span
    buffer = bytearray(block)
    with open(file, "rb", buffering=0) as source:
        source.seek(start)
        while start < stop:
            start += source.readinto(buffer)
def write(start):
    data = bytes(block)
    for position in range(start, min(start + (64 << 20), int(size)), block):
        os.pwrite(fd, data, position)
spans = [(file, start, min(start + (64 << 20), os.path.getsize(file))) for file in files for start in range(0, os.path.getsize(file), 64 << 20)]
fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_EXCL)
with ThreadPoolExecutor(int(count)) as pool:
    list(pool.map(read, spans))
    list(pool.map(write, range(0, int(size), 64 << 20)))
os.fsync(fd)
"""


def run(command: list[str], env: dict[str, str] | None = None) -> dict[str, float]:
    """One process: wall and CPU seconds, peak memory in MB. A process that knows its own peak prints it, in kB."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env)
        assert process.stdout is not None
        printed = process.stdout.read().split()
        errors.seek(0)
        said = errors.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}\nfailed:\n{said.decode()[-2000:]}")
    peak = int(printed[-1]) if printed and printed[-1].isdigit() else usage.ru_maxrss
    return {"wall_s": time.perf_counter() - begin, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": 1024 * peak / 1e6}


def peer(folder: Path) -> Path:
    """mergekit's command, in an environment made for it."""
    command = folder / "bin" / "mergekit-yaml"
    if not command.exists():
        constraints = Path(__file__).parent.parent / "constraints.txt"
        pinned = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", "mergekit", pinned], check=True)
    return command


def recipe(folder: Path, method: str, parameters: str) -> str:
    models = "".join(f"  - model: {folder / name}\n    parameters: {{{parameters}}}\n" for name in ("a", "b"))
    base = "" if method == "linear" else f"base_model: {folder / 'base'}\n"
    return f"merge_method: {method}\n{base}models:\n{models}dtype: bfloat16\n"


def side_by_side(folder: Path, args: argparse.Namespace) -> None:
    theirs = None if args.no_peer else peer(args.peer)
    build_base(folder / "base", args.size)
    for seed, name in enumerate(("a", "b"), 1):
        build_tuned(folder / "base", folder / name, seed)
    size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    for base in ("base", "a", "b"):
        begin, cpu = time.perf_counter(), time.process_time()
        _ = Base.open(folder / base).fingerprint
        print(f"hashing {base}: {time.perf_counter() - begin:.2f} s wall, {time.process_time() - cpu:.2f} s CPU", file=sys.stderr)
    if not args.json:
        head = ["method", "tool", "wall s", "CPU s", "peak MB", "wall / floor", "floor s", "mergekit / weft: wall", "CPU"]
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    out = folder / "out"
    for name in args.methods:
        method, options, weights, their_method, parameters = METHODS[name]
        (folder / "recipe.yml").write_text(recipe(folder, their_method, parameters))
        inputs = [str(folder / model) for model in ("a", "b")]
        files = [str(file) for model in ("base", "a", "b") for file in sorted((folder / model).glob("*.safetensors"))]
        commands = {
            "floor": [sys.executable, "-c", FLOOR, str(args.threads), str(size), str(out), *files],
            "weft": [sys.executable, "-c", MERGE, json.dumps([inputs, str(folder / "base"), method, weights, options, str(out), args.threads])],
        }
        if theirs is not None:
            commands["mergekit"] = [str(theirs), str(folder / "recipe.yml"), str(out)]
        rows: dict[str, list[dict[str, float]]] = {tool: [] for tool in commands}
        for _ in range(args.repeat):
            for tool, command in commands.items():
                rows[tool].append(run(command))
                out.unlink() if out.is_file() else shutil.rmtree(out)
        report(name, rows, args.json)


def report(name: str, rows: dict[str, list[dict[str, float]]], as_json: bool) -> None:
    """Medians, and the medians of the ratios pair by pair."""

    def median(tool: str, figure: str) -> float:
        return statistics.median(row[figure] for row in rows[tool])

    def ratio(tool: str, other: str, figure: str) -> float:
        return statistics.median(a[figure] / b[figure] for a, b in zip(rows[tool], rows[other], strict=True))

    for tool in rows:
        if tool == "floor":
            continue
        found = {figure: median(tool, figure) for figure in ("wall_s", "cpu_s", "peak_mb")}
        extra = {"times_floor": ratio(tool, "floor", "wall_s"), "floor_s": median("floor", "wall_s")}
        if tool == "weft" and "mergekit" in rows:
            extra |= {"wall_ratio": ratio("mergekit", "weft", "wall_s"), "cpu_ratio": ratio("mergekit", "weft", "cpu_s")}
        if as_json:
            print(json.dumps({"method": name, "tool": tool, **{k: round(v, 3) for k, v in (found | extra).items()}}), flush=True)
            continue
        cells = [
            name,
            tool,
            *(f"{v:.2f}" if k != "peak_mb" else f"{v:.0f}" for k, v in found.items()),
            f"{extra['times_floor']:.2f}",
            f"{extra['floor_s']:.2f}",
        ]
        cells += [f"{extra[k]:.1f}" if k in extra else "" for k in ("wall_ratio", "cpu_ratio")]
        print("| " + " | ".join(cells) + " |", flush=True)


def tiny(folder: Path, args: argparse.Namespace) -> None:
    """14,400 tensors of 64 entries."""
    rng = np.random.default_rng(0)
    names = [f"model.layers.{k // 9}.part{k % 9}.weight" for k in range(14_400)]
    start = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in names}
    for model in ("base", "a", "b"):
        values = start if model == "base" else {name: (w + 0.01 * rng.standard_normal(w.shape)).astype(np.float32) for name, w in start.items()}
        tensors: dict[str, Tensor] = {name: Held(w) for name, w in values.items()}
        write_folder(folder / model, {f"model-{k + 1:05}-of-00004.safetensors": dict(list(tensors.items())[k::4]) for k in range(4)}, 1600)
    for name in ("linear", "ties"):
        method, options, weights, _, _ = METHODS[name]
        command = [
            sys.executable, "-c", MERGE,
            json.dumps([[str(folder / m) for m in ("a", "b")], str(folder / "base"), method, weights, options, str(folder / "out"), args.threads]),
        ]  # fmt: skip
        rows = []
        for _ in range(args.repeat):
            rows.append(run(command))
            shutil.rmtree(folder / "out")
        print(f"14,400 tensors, {name}: " + ", ".join(f"{k} {statistics.median(row[k] for row in rows):.2f}" for k in rows[0]), flush=True)


LORAS = """
import json, sys
paths, out, threads = json.loads(sys.argv[1])
from weft.merging import merge
merge(paths, method="linear", rank=16, out=out, threads=threads)
assert "torch" not in sys.modules
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")))
"""


def loras(folder: Path, args: argparse.Namespace) -> None:
    """20 deltas of rank 16 on every linear layer into one, for bases of two sizes."""
    for layers in (4, 16):
        root = folder / f"loras{layers}"
        root.mkdir()
        shapes = {name: shape for name, shape in layout(layers).items() if len(shape) == 2 and "embed" not in name}
        rng = np.random.default_rng(0)
        zeros: dict[str, Tensor] = {name: Computed("BF16", shape, lambda s=shape: iter([bytes(2 * s[0] * s[1])])) for name, shape in shapes.items()}
        write_folder(root / "base", {"model.safetensors": zeros}, layers)
        base = Base.open(root / "base")
        paths = []
        for number in range(20):
            build = Builder(base)
            for name, (rows, columns) in shapes.items():
                a, b = rng.standard_normal((16, columns)), rng.standard_normal((rows, 16))
                build.put(name, "lowrank", {"A": a.astype(np.float32), "B": b.astype(np.float32)}, scale=0.01)
            paths.append(str(root / f"{number}.safetensors"))
            build.done(recipe={"verb": "bench"}).save(paths[-1])
        factors = sum(Path(path).stat().st_size for path in paths)
        rows_ = [run([sys.executable, "-c", LORAS, json.dumps([paths, str(root / "out.safetensors"), args.threads])]) for _ in range(args.repeat)]
        dense = sum(4 * rows * columns for rows, columns in shapes.values())
        found = ", ".join(f"{k} {statistics.median(row[k] for row in rows_):.2f}" for k in rows_[0])
        print(f"20 LoRAs, {layers} layers: factors {factors / 1e6:.0f} MB (one dense increment: {dense / 1e6:.0f} MB): {found}", flush=True)
        shutil.rmtree(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.0, help="GB of each model (default 1.0)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--peer", type=Path, default=Path("build/mergekit"), help="mergekit's environment; made if it is not there")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the models go (default: the system's temporary folder)")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--loras", action="store_true")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weft-bench-", dir=args.folder) as name:
        folder = Path(name)
        os.environ["WEFT_CACHE"] = str(folder / "cache")
        (tiny if args.tiny else loras if args.loras else side_by_side)(folder, args)


if __name__ == "__main__":
    main()
