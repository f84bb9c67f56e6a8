"""What is left of a skill when only the signs of the largest entries of its update are kept: accuracy against size.

    python bench/claims/compeft.py [--rows TRAIN.jsonl TEST.jsonl --name TREC] [--steps 300]

Without --rows: the first edition of the microcosm's base learns to judge reviews, by full tuning and by a LoRA. With --rows ({"text", "label"}):
all-MiniLM-L6-v2 learns that classification by full tuning. Each update is compressed with `compeft` at three densities; alpha is chosen among most of the
paper's values on rows that are held out of the training set, and the test set is looked at once for each line. `smaller` compares the payload with the same
tensors in bf16; what is stored as it is (the classification head) is left out of both. Prints a table in markdown.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from typing import Any

import weft
from weft.codes import Coded
from weft.demo import edition, microcosm, minilm
from weft.engine.data import read_rows
from weft.stored import ITEMSIZE

DENSITIES = (0.05, 0.1, 0.2)
ALPHAS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
HELD_OUT, LOOKED_AT = 500, 250

Rows = list[dict[str, Any]]


def updates(args: argparse.Namespace) -> Iterator[tuple[str, weft.Base, weft.Delta, str, Rows, Rows]]:
    """A name, the base, the update, which metric counts, rows to choose alpha with and rows to test with."""
    if args.rows:
        base = weft.Base.open(minilm())
        train, test = (read_rows(path) for path in args.rows)
        random.Random(0).shuffle(train)
        how: dict[str, Any] = {"method": "full", "lr": 2e-4, "objective": "classification", "steps": args.steps, "batch_size": 32}
        delta = weft.tune(base, train[HELD_OUT:], threads=args.threads, progress=lambda event: None, **how)
        yield f"MiniLM, {args.name}, full", base, delta, "accuracy", train[:LOOKED_AT], test
        return
    files, base = microcosm.files(), weft.Base.open(edition("first"))
    train, test = files["judge.train"], files["judge.test"]
    for name, how in {"full": {"method": "full", "lr": 1e-3}, "LoRA, rank 8": {"method": "lora", "lr": 3e-3}}.items():
        delta = weft.tune(base, train[HELD_OUT:], threads=args.threads, progress=lambda event: None, steps=60, batch_size=16, **how)
        yield f"microcosm, judge, {name}", base, delta, "teacher_forced_exact", train[:LOOKED_AT], test


def size(small: weft.Delta) -> float:
    """How many times smaller the coded tensors are than in bf16."""
    coded = [tensor for tensor in small.tensors.values() if isinstance(tensor, Coded)]
    return sum(tensor.nbytes // ITEMSIZE[tensor.dtype] * 2 for tensor in coded) / sum(tensor.payload.nbytes for tensor in coded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs=2, metavar=("TRAIN", "TEST"), help="a classification to tune MiniLM on")
    parser.add_argument("--name", default="rows", help="what to call it")
    parser.add_argument("--steps", type=int, default=300, help="steps of tuning MiniLM")
    parser.add_argument("--trim", nargs="+", default=["global", "tensor"], choices=["global", "tensor"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print("| update | trim | density | alpha | smaller than bf16 | error of increments | accuracy | of the update itself |\n|---|---|---|---|---|---|---|---|")
    for name, base, delta, metric, held_out, test in updates(args):

        def score(given: weft.Delta, rows: Rows, base: weft.Base = base, metric: str = metric) -> float:
            return float(weft.evaluate(base, [given], rows, batch_size=128)["metrics"][metric])

        whole = score(delta, test)
        for trim in args.trim:
            for density in DENSITIES:
                tried = {alpha: weft.compress(delta, "compeft", base, density=density, alpha=alpha, trim=trim) for alpha in ALPHAS}
                alpha = max(ALPHAS, key=lambda a: score(tried[a], held_out))
                small: Any = tried[alpha]
                cells = [name, trim, f"{density:g}", f"{alpha:g}", f"{size(small):.1f}x", f"{small.notes['summary']['error']:.3f}"]
                print(f"| {' | '.join([*cells, f'{score(small, test):.1%}', f'{whole:.1%}'])} |", flush=True)


if __name__ == "__main__":
    main()
