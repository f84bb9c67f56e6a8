"""What tuning a Llama takes in memory and time, for spaces that promise to take less than full tuning.

    python bench/tuning_memory.py [--steps 4] [--threads 1] [--small] [--spaces full lisa ...]

A random Llama of 97M parameters (12 layers of width 768) in float32, batches of 4 x 256 tokens, AdamW: gradients and moments of full tuning are three times
the weights. Each space tunes in a process of its own; `above the model` is the largest resident set less that before and less the weights. Where a space
first finds out what to train (lt-sft trains everything for that), `while training` is the peak from the first step on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tuned import forget, random_llama, status

SPACES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "hft": ("hft", {}),
    "lisa": ("lisa", {"layers": 2, "period": 2}),
    "lt-sft, 1 %": ("lt-sft", {"trial": 1}),
    "spiel, gradients, 1 %": ("spiel", {"period": 4, "gather": 2}),
    "spiel, momenta, 1 %": ("spiel", {"grow": "ma", "period": 2, "gather": 1}),
    "pockengine": ("pockengine", {}),
    "lora": ("lora", {}),
}
ROWS, TOKENS = 4, 256


def build(folder: Path, small: bool) -> None:
    """A checkpoint with the microcosm's tokenizer."""
    from transformers import AutoTokenizer

    from weft.demo import edition

    random_llama(small).save_pretrained(folder)
    AutoTokenizer.from_pretrained(edition("first")).save_pretrained(folder)


def one(name: str, folder: Path, steps: int, threads: int) -> dict[str, Any]:
    import time

    import torch

    import weft
    import weft.tuning

    torch.set_num_threads(threads)
    base = weft.Base.open(folder)
    weights = sum(base.tensor(each).nbytes for each in base.names) / 2**20
    text = " ".join(f"the river {k} runs to the city" for k in range(200))
    method, options = SPACES[name]
    seen: dict[str, Any] = {}

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            seen.update(parameters=event["parameters"], before=status("VmHWM"), began=time.process_time())
            forget()

    resident = status("VmRSS")
    forget()
    options = {f"space.{key}": value for key, value in options.items()} | {"loop.steps": steps, "loop.batch_size": ROWS, "objective.max_length": TOKENS}
    delta = weft.tune(base, [{"text": text}] * (ROWS * steps), method=method, threads=threads, progress=hear, **options)
    seconds, training = time.process_time() - seen["began"], status("VmHWM")
    whole = max(training, seen["before"]) - resident - weights
    return {
        "space": name,
        "trained": seen["parameters"],
        "above the model, MiB": round(whole),
        "while training, MiB": round(training - resident - weights),
        "CPU s a step": round(seconds / steps, 2),
        "delta, MB": round(sum(tensor.nbytes for tensor in delta.tensors.values()) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a model of two narrow layers, to try the script")
    parser.add_argument("--spaces", nargs="*", choices=SPACES, default=list(SPACES))
    parser.add_argument("--one", nargs=2, metavar=("SPACE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], Path(args.one[1]), args.steps, args.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), args.small)
        head = False
        for name in args.spaces:
            command = [sys.executable, __file__, "--one", name, folder, f"--steps={args.steps}", f"--threads={args.threads}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            line = json.loads(done.stdout.splitlines()[-1])
            if not head:
                print("| " + " | ".join(line) + " |\n" + "|---" * len(line) + "|")
                head = True
            print("| " + " | ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in line.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
