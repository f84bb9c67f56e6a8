"""Products of 16-bit matrices on a CPU: as torch computes them, and in float32, rounded once (`weft.engine.products.widened`).

    python bench/half_products.py [--rows 1 8 16 64 1024] [--widths 384 768] [--repeats 9] [--json]

CPU milliseconds of x W^T (a forward pass) and x W (a backward pass) for x of rows x width and W of width x width, one thread, medians of turns taken one
after the other; and the relative error of both (Frobenius, against float64). A second table is of a process in which torch and oneDNN use AVX2 alone, as
on a processor that has no more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from weft.engine.products import Widened

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ONLY_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def compare(dtype: str, what: str, rows: int, width: int, repeats: int) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, width, generator=gen).to(HALVES[dtype]) for n in (rows, width))
    w = w.T if what == "x W^T" else w
    exact = x.double() @ w.double()
    times: dict[str, list[float]] = {"plain": [], "wide": []}
    errors = {}

    def timed(name: str, product: Callable[[], torch.Tensor]) -> None:
        begin = time.process_time()
        out = product()
        times[name].append((time.process_time() - begin) * 1e3)
        errors[name] = float((out - exact).norm() / exact.norm())

    for _ in range(repeats + 1):
        timed("plain", lambda: x @ w)
        with Widened(HALVES.values()):
            timed("wide", lambda: x @ w)
    plain, wide = (statistics.median(each[1:]) for each in times.values())
    found = {
        "dtype": dtype,
        "product": what,
        "rows": rows,
        "width": width,
        "plain_ms": round(plain, 3),
        "wide_ms": round(wide, 3),
        "ratio": round(plain / wide, 1),
    }
    return found | {f"{name}_error": f"{error:.2e}" for name, error in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 1024])
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [compare(dtype, what, rows, width, args.repeats) for dtype in HALVES for what in ("x W^T", "x W") for rows in args.rows for width in args.widths]
    if args.json:
        print("\n".join(map(json.dumps, lines)))
    else:
        print(f"\n{torch.backends.cpu.get_cpu_capability()}:\n\n| " + " | ".join(lines[0]) + " |\n" + "|---" * len(lines[0]) + "|")
        print("\n".join("| " + " | ".join(map(str, line.values())) + " |" for line in lines), flush=True)
    if not ONLY_AVX2.items() <= os.environ.items():
        subprocess.run([sys.executable, *sys.argv], check=True, env=os.environ | ONLY_AVX2)


if __name__ == "__main__":
    main()
