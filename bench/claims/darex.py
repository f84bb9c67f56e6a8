"""Dropping most of a fine-tune: where DARE fails, and what a tuned q and AdamR do about it.

    python bench/claims/darex.py [--task judge] [--task style] [--plot darex.png]

Deng et al. 2024, "DARE the extreme" (arXiv 2410.09344): rescaling what is left by 1/(1-p) fails at high drop rates, the more so the larger the
entries of the increment are; dividing by a larger q, found on unlabelled data for the model (q_e) or for each layer by a bound, saves much of
it, and so does training with decay towards the base (AdamR), after which plain DARE is enough.

The microcosm's base is tuned whole (`full`) on two tasks: judging reviews, and answering in whole sentences. From each fine-tune p of the entries
are dropped. The score is the perplexity of right answers on rows that neither training nor the search for q saw; beside it
the mean square of the largest five logits' change, what q_e makes small, on the same rows, and q. AdamR runs longer, to about the loss of AdamW.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import weft
from weft.demo import edition, microcosm

DROPS = (0.9, 0.99)
HOW: dict[str, Any] = {"method": "full", "batch_size": 16, "schedule": "linear"}
TRAINED: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "steps": 40},
    "adamr": {"optimizer": "adamr", "lr": 1e-3, "steps": 80, "decay": 0.1},
}
WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DARE": ("adamw", "dare", {}),
    "DAREx-q, output": ("adamw", "darex-q", {"find": "output"}),
    "DAREx-q, layers": ("adamw", "darex-q", {"find": "analytic"}),
    "AdamR, DARE": ("adamr", "dare", {}),
}
HEAD = "| task | drop | way | q | perplexity | was | change of logits |\n|---|---|---|---|---|---|---|"
ROWS, ASKED = 32, 60


def perplexity(base: weft.Base, delta: weft.Delta, rows: Sequence[Any]) -> float:
    return float(weft.evaluate(base, [delta], rows, batch_size=ASKED)["metrics"]["perplexity"])


def logits(base: weft.Base, delta: weft.Delta, rows: Sequence[Any]) -> list[torch.Tensor]:
    """Of every row, at every token."""
    model, tokenizer = base.model(), base.tokenizer()
    weft.attach(model, delta, base=base)
    with torch.no_grad():
        return [model(**tokenizer(row["prompt"] + row["completion"], return_tensors="pt")).logits[0] for row in rows]


def change(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    pairs = [((a - b).gather(1, b.topk(5).indices)) for a, b in zip(after, before, strict=True)]
    return float(torch.cat(pairs).square().mean())


def spread(base: weft.Base, delta: weft.Delta) -> tuple[float, float]:
    """Mean of |tau| and variance of tau over all entries."""
    parts = [torch.tensor(delta.apply(name, base.tensor(name).read()) - base.tensor(name).read()).reshape(-1) for name in delta.entries]
    whole = torch.cat(parts)
    return float(whole.abs().mean()), float(whole.var())


def q_of(delta: weft.Delta) -> str:
    blob = delta.tensors.get("@blob/darex-q")
    if blob is None:
        return "1-p"
    found = [q for (q,) in json.loads(blob.read().tobytes()).values()]
    return f"{min(found):.3f}" if min(found) == max(found) else f"{min(found):.3f} to {max(found):.3f}"


def run(base: weft.Base, files: dict[str, Any], task: str, folder: Path) -> list[dict[str, Any]]:
    rows, asked = files[f"{task}.train"], files[f"{task}.test"][:ASKED]
    quiet: Any = lambda event: None  # noqa: E731
    tuned = {name: weft.tune(base, rows, progress=quiet, **HOW, **how) for name, how in TRAINED.items()}
    before = {name: logits(base, delta, asked) for name, delta in tuned.items()}
    was = {name: perplexity(base, delta, asked) for name, delta in tuned.items()}
    for name, delta in tuned.items():
        mean, variance = spread(base, delta)
        print(f"{task}, {name}: loss {delta.notes['loss']:.3f}, mean of |tau| {mean:.2e}, variance {variance:.2e}, perplexity {was[name]:.3f}", flush=True)
    found = []
    for drop in DROPS:
        for way, (trained, method, options) in WAYS.items():
            data = {"data": rows[-ROWS:]} if method == "darex-q" else {}
            merged = weft.merge([tuned[trained]], base, method, drop=drop, **options, **data)
            merged.save(folder / "merged.safetensors")  # else it would be computed again each time that it is read
            merged = weft.Delta.load(folder / "merged.safetensors")
            one = {"task": task, "drop": drop, "way": way, "q": q_of(merged), "perplexity": perplexity(base, merged, asked), "was": was[trained]}
            found.append(one | {"change": change(before[trained], logits(base, merged, asked))})
            print(line(found[-1]), flush=True)
    return found


def line(one: dict[str, Any]) -> str:
    return f"| {one['task']} | {one['drop']} | {one['way']} | {one['q']} | {one['perplexity']:.3f} | {one['was']:.3f} | {one['change']:.3g} |"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over the drop rate, one panel a task."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("a picture needs matplotlib: pip install 'weft[plots]'") from None
    tasks = sorted({one["task"] for one in found})
    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for way in WAYS:
            mine = [one for one in found if one["task"] == task and one["way"] == way]
            axes.plot([str(one["drop"]) for one in mine], [one["perplexity"] for one in mine], marker="o", label=way)
        axes.axhline(next(one["was"] for one in found if one["task"] == task), color="grey", linestyle=":", label="nothing dropped")
        axes.set(title=task, xlabel="share of entries dropped", ylabel="perplexity of right answers")
        axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=("judge", "style"), action="append", help="default: both")
    parser.add_argument("--plot", type=Path, help="a picture of the table")
    given = parser.parse_args()
    base, files = weft.Base.open(edition("first")), microcosm.files()
    with TemporaryDirectory() as folder:
        found = [one for task in given.task or ("judge", "style") for one in run(base, files, task, Path(folder))]
    print("\n".join([HEAD, *map(line, found)]))
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
