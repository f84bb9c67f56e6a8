"""Tuning steps of LoRA, side by side with HF PEFT: CPU time a step, forward, attaching, and peak memory.

    python bench/tune.py [--model llama] [--steps 9] [--threads 1] [--dtypes float32 bfloat16] [--attention eager] [--medium] [--small] [--json]

LoRA of rank 8 on all linear layers of each block, with AdamW: on a random Llama of 97M parameters (12 layers of width 768) with batches of 4 x 256 tokens,
or on all-MiniLM-L6-v2 (--model minilm, 6 layers of width 384) as a classifier with batches of 32 x 32. Each contender has a model of its own, and their
steps take turns in one process, so that whatever else the machine does hurts both; figures are medians. `bare` is the model's own forward and the full
tuning step. weft's steps run as those of `weft.tune` do: where the processor has no 16-bit products, they are made of float32 ones (`widened`), in its
forward without gradients they are not. `floor`: the same matrix products by themselves (also made of float32 ones where that is so), those of a forward
and of the gradient by the activations (4 N T operations), measured in the same turns.

`attach_ms`: weft loads, checks and attaches a delta from a file; PEFT injects fresh adapters.

Peak memory comes from a process for each contender: the largest resident set in three steps, less that before the first one: the model, with
what is attached, is not in it.
--medium: float32 products as torch.set_float32_matmul_precision("medium") does them, with the error of one product printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tuned import forget, random_llama, status

from weft.engine.memory import trim
from weft.engine.products import relative_error, widened

RANK, ALPHA = 8, 16.0
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "query", "key", "value", "dense")
SHAPE = {"llama": (4, 256), "minilm": (32, 32)}
"""Rows and tokens of a batch."""


def build(args: argparse.Namespace, dtype: str) -> nn.Module:
    if args.model == "llama":
        return random_llama(args.small, attn_implementation=args.attention).to(getattr(torch, dtype))  # type: ignore[no-any-return]
    from transformers import AutoModelForSequenceClassification

    from weft.demo import minilm

    torch.manual_seed(0)
    found = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=6, attn_implementation=args.attention, local_files_only=True)
    return found.to(getattr(torch, dtype))  # type: ignore[no-any-return]


def with_weft(model: nn.Module) -> tuple[list[nn.Parameter], float]:
    """What is trained, and the milliseconds from a file to an attached delta; the base is a folder whose fingerprint is known."""
    from weft import Base, Delta
    from weft.attaching import attach
    from weft.delta import Builder
    from weft.ops import Generator, lowrank

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        base = Base.open(folder)
        build = Builder(base)
        gen = Generator(0)
        for name in base.names:
            if name.split(".")[-2] in LINEAR and name.endswith("weight"):
                build.put(name, "lowrank", lowrank.OP.init(base.tensor(name).shape, gen, rank=RANK), scale=ALPHA / RANK)
        path = Path(folder) / "delta.safetensors"
        build.done().save(path)
        base.hash_all()
        begin = time.process_time()
        handle = attach(model, Delta.load(path), base=base, trainable=True)
        return handle.parameters(), (time.process_time() - begin) * 1e3


def with_peft(model: nn.Module) -> tuple[list[nn.Parameter], float]:
    from peft import LoraConfig, inject_adapter_in_model

    begin = time.process_time()
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEAR), task_type=None), model)
    took = (time.process_time() - begin) * 1e3
    found = [p for name, p in model.named_parameters() if "lora_" in name]
    if next(model.parameters()).dtype == torch.bfloat16:  # get_peft_model's default: adapters of 16-bit models are float32
        for p in found:
            p.data = p.data.float()
    return found, took


CONTENDERS: dict[str, Callable[[nn.Module], tuple[list[nn.Parameter], float]]] = {"weft": with_weft, "peft": with_peft}


class Runner:
    """A contender: its model, what it trains and its optimizer."""

    def __init__(self, name: str, args: argparse.Namespace, dtype: str) -> None:
        self.model = build(args, dtype)
        for p in self.model.parameters():
            p.requires_grad_(name == "bare")
        trained, self.attach_ms = (list(self.model.parameters()), 0.0) if name == "bare" else CONTENDERS[name](self.model)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        gen = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, 8000, SHAPE[args.model], generator=gen)
        self.labels = self.ids if args.model == "llama" else torch.randint(6, self.ids.shape[:1], generator=gen)
        self.model.train()
        self.inside = widened(self.model) if name == "weft" else nullcontext()

    def step(self) -> float:
        begin = time.process_time()
        with self.inside:
            loss = self.model(input_ids=self.ids, labels=self.labels).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = float(loss.detach())
        return (time.process_time() - begin) * 1e3

    def forward(self) -> float:
        begin = time.process_time()
        with torch.no_grad():
            self.model(input_ids=self.ids)
        return (time.process_time() - begin) * 1e3


class Floor:
    """The products of all linear layers of a step: forward, and the gradient by the activations."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self.weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
        self.inside = widened(model)
        self.inputs = {n: torch.randn(tokens, n).to(self.weights[0].dtype) for w in self.weights for n in w.shape}

    def step(self) -> float:
        begin = time.process_time()
        with self.inside:
            for w in self.weights:
                F.linear(self.inputs[w.shape[1]], w)
                self.inputs[w.shape[0]] @ w
        return (time.process_time() - begin) * 1e3


def memory(name: str, args: argparse.Namespace, dtype: str) -> float:
    """MiB above the model, from a process of its own."""
    flags = [f"--model={args.model}", f"--threads={args.threads}", f"--attention={args.attention}", *["--small"] * args.small, *["--medium"] * args.medium]
    run = [sys.executable, __file__, "--peak", name, "--dtypes", dtype, *flags]
    return float(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak(name: str, args: argparse.Namespace, dtype: str) -> None:
    before = build(args, dtype)
    with torch.no_grad():  # what libraries keep for themselves after a first call is nobody's delta
        before(input_ids=torch.zeros((1, 8), dtype=torch.long))
    del before
    import peft  # noqa: F401

    import weft.attaching  # noqa: F401

    runner = Runner(name, args, dtype)
    trim()  # the random weights' own copies, the saved checkpoint
    resident = status("VmRSS")
    forget()
    for _ in range(3):
        runner.step()
    print(status("VmHWM") - resident)


def compare(args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    runners = {name: Runner(name, args, dtype) for name in ("bare", *CONTENDERS)}
    floor = Floor(runners["bare"].model, runners["bare"].ids.numel())
    times: dict[str, list[float]] = {name: [] for name in (*runners, "floor")}
    forwards: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(args.steps + 1):
        for name, runner in runners.items():
            times[name].append(runner.step())
            forwards[name].append(runner.forward())
        times["floor"].append(floor.step())
    step = {name: statistics.median(each[1:]) for name, each in times.items()}
    ahead = {name: statistics.median(each[1:]) for name, each in forwards.items()}
    rows = []
    for name in runners:
        row = {"dtype": dtype, "tool": name, "step_ms": round(step[name]), "of_floor": round(step[name] / step["floor"], 2)}
        row |= {"forward_ms": round(ahead[name]), "forward_overhead": round(ahead[name] / ahead["bare"] - 1, 3)}
        row |= {"peak_mib": round(memory(name, args, dtype)), "attach_ms": round(runners[name].attach_ms), "loss": round(runners[name].loss, 4)}
        rows.append(row | {"faster_than_peft": round(step["peft"] / step[name], 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPE), default="llama")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--attention", default="eager")
    parser.add_argument("--medium", action="store_true")
    parser.add_argument("--small", action="store_true", help="a model of two narrow layers, to try the script")
    parser.add_argument("--peak", choices=["bare", *CONTENDERS], help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.medium:
        torch.set_float32_matmul_precision("medium")
        if not args.peak:
            print(f"relative error of a float32 product: {relative_error(torch.device('cpu')):.1e}", file=sys.stderr)
    if args.peak:
        peak(args.peak, args, args.dtypes[0])
        return
    rows = [row for dtype in args.dtypes for row in compare(args, dtype)]
    if args.json:
        print("\n".join(map(json.dumps, rows)))
        return
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
