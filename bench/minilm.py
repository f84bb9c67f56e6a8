"""Every space on two text classifications with a real encoder: accuracy, what is trained, bytes, seconds, memory.

    python bench/minilm.py run --rows TREC trec.train.jsonl trec.test.jsonl --rows SUBJ subj.train.jsonl subj.test.jsonl --log minilm.jsonl [--steps 100 50]
    python bench/minilm.py page minilm.jsonl --out bench/results/minilm

`run` tunes all-MiniLM-L6-v2 with every space in turn, each in a process of its own, and adds a line of JSON to the log for each; what is in the log already
is not run again, so a run that was stopped goes on, and new spaces join. Every space has its own defaults, and all have the same batches, head and
schedule. The learning rate is the space's own; where that gets less than 90 % of rows that are held out of the training set right, five times as much is
tried, and again while it helps. What is found on the first data set is used for the others; where a run with it has learned nothing there (less than 70 %),
a fifth of it is tried. The test set is looked at for the page, not for this choice.
Seconds are CPU time of `weft.tune`, from opening the base to the saved delta; memory is the largest resident set while tuning, less that of the process
before (Python and its libraries). `page` makes the table and the picture.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tuned import forget, status

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora, DoRA": ("lora", {"dora": True}),
    "lora, PiSSA": ("lora", {"init": "pissa"}),
    "lamda, adaptive": ("lamda", {"adaptive": True}),
    "spiel, momenta": ("spiel", {"grow": "ma"}),
}
"""Rows beside those of the spaces with nothing but defaults."""


def contenders() -> dict[str, tuple[str, dict[str, Any]]]:
    from weft import methods

    return {name: (name, {}) for name in methods.names("space")} | VARIANTS


HELD_OUT, TESTED, GOOD, FAILED, MORE, MOST = 500, 500, 0.9, 0.7, 5, 25
"""Rows to choose the learning rate with, rows to test with at most, what is good enough and what is not, how much more is tried, and the most."""


TICKS = (0.2, 0.5, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96)
LINE = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5}


def one(method: str, options: dict[str, Any], train: str, test: str, steps: int, seed: int, factor: float) -> dict[str, Any]:
    """Tune and test once, in this process."""
    import torch

    import weft
    import weft.tuning
    from weft import methods
    from weft.checking import evaluate
    from weft.demo import minilm
    from weft.engine.data import read_rows

    torch.set_num_threads(1)
    base = weft.Base.open(minilm())
    rows = read_rows(train)
    random.Random(0).shuffle(rows)
    held, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    lr = methods.get("space", method).run.lr * factor  # type: ignore[attr-defined]
    heard: list[dict[str, Any]] = []
    before = status("VmRSS")
    forget()
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "delta.safetensors"
        delta = weft.tune(
            base,
            rows,
            method=method,
            objective="classification",
            out=out,
            seed=seed,
            threads=1,
            progress=heard.append,
            **{f"space.{name}": value for name, value in options.items()},
            **{"optimizer.lr": lr, "loop.steps": steps, "loop.batch_size": 32},
        )
        seconds, peak = time.process_time() - began, status("VmHWM") - before
        size = out.stat().st_size
    held_out, accuracy = (evaluate(base, delta, each)["metrics"]["accuracy"] for each in (held, read_rows(test)[:TESTED]))
    parameters = next(event["parameters"] for event in heard if event["event"] == "start")
    return {"lr": lr, "held_out": held_out, "accuracy": accuracy, "parameters": parameters, "bytes": size, "seconds": seconds, "memory": peak}


def run(args: argparse.Namespace) -> None:
    for number, (data, train, test) in enumerate(args.rows):
        steps = args.steps[min(number, len(args.steps) - 1)]
        for name in args.spaces or contenders():
            found = [line for line in read(args.log) if line["space"] == name]
            own, first = [line for line in found if line["data"] == data], [line for line in found if line["data"] == args.rows[0][0]]
            factor = best(first)["factor"] if first and number else 1
            while line := next((line for line in own if line["factor"] == factor), None) or added(own, args, name, data, train, test, steps, factor):
                tried = [line for line in own if line["factor"] <= factor]
                if number and line["held_out"] < FAILED and factor > 1 / MOST:
                    factor /= MORE
                elif number or line["held_out"] >= GOOD or factor >= MOST or best(tried) is not line:
                    break
                else:
                    factor *= MORE


def added(own: list[dict[str, Any]], args: argparse.Namespace, *what: Any) -> dict[str, Any] | None:
    """A line that was not there, also in the log."""
    line = started(*what, args.seed)
    if line is not None:
        own.append(line)
        with args.log.open("a") as out:
            out.write(json.dumps(line) + "\n")
    return line


def started(name: str, data: str, train: str, test: str, steps: int, factor: float, seed: int) -> dict[str, Any] | None:
    """A line of the log, from a process of its own."""
    command = [sys.executable, __file__, "one", name, train, test, f"--steps={steps}", f"--seed={seed}", f"--factor={factor}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{data}, {name}: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]}", file=sys.stderr)
        return None
    line = {"data": data, "space": name, "steps": steps, "seed": seed, "factor": factor, **json.loads(done.stdout.splitlines()[-1])}
    print(json.dumps(line), flush=True)
    return line


def best(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return max(lines, key=lambda line: line["held_out"])


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for each space, columns for each data set; by accuracy on the first."""
    sets = list(dict.fromkeys(line["data"] for line in lines))
    found = {(line["data"], line["space"]): line for line in sorted(lines, key=lambda line: line["held_out"])}  # the best last
    spaces = sorted({line["space"] for line in lines}, key=lambda name: -found.get((sets[0], name), {"accuracy": 0.0})["accuracy"])
    columns = [f"accuracy, {data}" for data in sets] + ["learning rate", "trained", "delta bytes"]
    columns += [f"CPU s, {data}" for data in sets] + [f"peak MiB, {data}" for data in sets]
    out = ["| space | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in spaces:
        each = [found.get((data, name)) for data in sets]
        first = next(line for line in each if line)
        cells = [f"{line['accuracy']:.3f}" if line else "" for line in each]
        cells += [f"{first['lr']:g}", f"{first['parameters']:,}", f"{first['bytes']:,}"]
        cells += [f"{line['seconds']:.0f}" if line else "" for line in each] + [f"{line['memory']:.0f}" if line else "" for line in each]
        out.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the bytes of the delta."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator
    except ImportError:
        raise SystemExit("a picture needs matplotlib: pip install 'weft[plots]'") from None
    sets = list(dict.fromkeys(line["data"] for line in lines))
    figure = Figure(figsize=(7 * len(sets), 7), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        axes.set(xscale="log", yscale="logit", title=data, xlabel="bytes of the delta", ylabel="accuracy")
        axes.grid(alpha=0.3)
        axes.margins(x=0.12)
        chosen = {line["space"]: line for line in sorted(lines, key=lambda line: line["held_out"]) if line["data"] == data}  # the best last
        axes.plot([line["bytes"] for line in chosen.values()], [line["accuracy"] for line in chosen.values()], "o", color="#1f6feb", markersize=4)
        lowest = 0.97 * min(line["accuracy"] for line in chosen.values())
        shown = [tick for tick in TICKS if tick > lowest]
        axes.set_yticks(shown, [str(tick) for tick in shown], minor=False)
        axes.set_ylim(lowest, TICKS[-1])
        axes.yaxis.set_minor_locator(NullLocator())
        figure.draw_without_rendering()  # so that it is known where points lie
        taken: list[tuple[float, float, float]] = []
        for name, line in sorted(chosen.items(), key=lambda item: -item[1]["accuracy"]):
            x, y = axes.transData.transform((line["bytes"], line["accuracy"]))
            while any(abs(y - other) < 9 and x < right and left < x + 6 * len(name) for left, right, other in taken):
                y -= 1  # labels of points that lie close stand below one another
            taken.append((x, x + 6 * len(name), y))
            axes.annotate(name, (line["bytes"], line["accuracy"]), (x + 5, y - 3), textcoords="figure pixels", fontsize=7, arrowprops=LINE)
    figure.savefig(path, dpi=100)


def page(args: argparse.Namespace) -> None:
    lines = read(args.log)
    print(table(lines))
    if args.out:
        plot(lines, args.out.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True)
    parse = parts.add_parser("run")
    parse.add_argument("--rows", nargs=3, action="append", required=True, metavar=("NAME", "TRAIN", "TEST"))
    parse.add_argument("--log", type=Path, required=True)
    parse.add_argument("--spaces", nargs="*", help="default: all")
    parse = parts.add_parser("one")
    parse.add_argument("space")
    parse.add_argument("train")
    parse.add_argument("test")
    for name in ("run", "one"):
        parts.choices[name].add_argument("--seed", type=int, default=0)
    parts.choices["run"].add_argument("--steps", type=int, nargs="+", default=[100], help="for each data set, or for all")
    parts.choices["one"].add_argument("--steps", type=int, default=100)
    parts.choices["one"].add_argument("--factor", type=float, default=1.0, help="of the space's learning rate")
    parse = parts.add_parser("page")
    parse.add_argument("log", type=Path)
    parse.add_argument("--out", type=Path, help="the picture, without .png")
    args = parser.parse_args()
    if args.what == "one":
        print(json.dumps(one(*contenders()[args.space], args.train, args.test, args.steps, args.seed, args.factor)))
    else:
        {"run": run, "page": page}[args.what](args)


if __name__ == "__main__":
    main()
