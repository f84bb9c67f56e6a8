"""Continued pretraining, tuning, and a slerp merge with an instruct model: is the merged model better than its parents' mean?

    python bench/claims/cpt_sft_merge.py [--plot cpt_sft_merge.png]

Lu et al. 2024, "Fine-tuning large language models for domain adaptation" (arXiv 2409.03444), find that merging a model that went through
continued pretraining (CPT) and tuning (SFT) with the instruct model of the same family gives more than the straight line between the parents'
scores at 7 to 8 billion parameters, and does not at 1.7 billion. Here, at 2.4 million:

- domain parent: the second edition of the microcosm's base (the first, trained on with a tenth of the facts changed), tuned on questions about
  people who are new in it;
- instruct parent: the first edition, tuned to judge reviews;
- merged: slerp of the two whole models at t, and the straight line between them for comparison.

The domain score is the share of changed facts that are answered as the second edition has them, the instruct score the share of reviews
judged rightly; both given the right words before (teacher-forced, the whole answer). A merge wins if the mean of its scores is above the
straight line between those of its parents.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import weft
from weft.demo import edition, microcosm

STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
HOW: dict[str, Any] = {"method": "lora", "rank": 8, "batch_size": 16}


@dataclass(frozen=True)
class Scores:
    """What a model scores, and the whole weights' length."""

    domain: float
    instruct: float
    norm: float

    @property
    def mean(self) -> float:
        return (self.domain + self.instruct) / 2


def exact(base: weft.Base, deltas: list[weft.Delta], rows: list[dict[str, Any]]) -> float:
    return float(weft.evaluate(base, deltas, rows, batch_size=128)["metrics"]["teacher_forced_exact"])


def parents(folder: Path, files: dict[str, Any]) -> list[weft.Base]:
    """The domain model and the instruct model, as checkpoints."""
    made = []
    for name, data, lr in (("second", files["edition-2-new"][:320], 1e-3), ("first", files["judge.train"][:320], 5e-3)):
        base = weft.Base.open(edition(name))
        delta = weft.tune(base, data, epochs=2, lr=lr, progress=lambda event: None, **HOW)
        weft.fold(base, [delta], folder / name)
        made.append(weft.Base.open(folder / name))
    return made


def scores(base: weft.Base, deltas: list[weft.Delta], files: dict[str, Any], count: int) -> Scores:
    changed = [{"prompt": row["prompt"], "completion": f" {row['target_new']}."} for row in files["edition-2-changed"][:count]]
    model = base.model(deltas)
    if deltas:
        weft.attach(model, deltas, base=base, mode="materialised")
    norm = sum(float(w.detach().double().square().sum()) for w in model.parameters()) ** 0.5
    return Scores(exact(base, deltas, changed), exact(base, deltas, files["judge.test"][:count]), norm)


def measure(steps: tuple[float, ...] = STEPS, methods: tuple[str, ...] = ("slerp", "linear"), count: int = 200) -> dict[str, dict[float, Scores]]:
    """For each way of merging, the scores at each t: 0 is the domain parent, 1 the instruct parent."""
    files = microcosm.files()
    root = weft.Base.open(edition("first"))
    found: dict[str, dict[float, Scores]] = {name: {} for name in methods}
    with TemporaryDirectory() as folder:
        pair = parents(Path(folder), files)
        for name in methods:
            for t in steps:
                how: dict[str, Any] = {"t": t} if name == "slerp" else {"weights": [1 - t, t]}
                found[name][t] = scores(root, [weft.merge(pair, root, name, **how)], files, count)
    return found


def above(line: dict[float, Scores], t: float) -> float:
    """How far the mean score at t is above the straight line between the ends."""
    return line[t].mean - ((1 - t) * line[0.0].mean + t * line[1.0].mean)


def table(found: dict[str, dict[float, Scores]]) -> list[str]:
    lines = ["| merge | t | changed facts | judged rightly | mean | above the parents' line | length |", "|---|---|---|---|---|---|---|"]
    for name, line in found.items():
        lines += [f"| {name} | {t:g} | {s.domain:.3f} | {s.instruct:.3f} | {s.mean:.3f} | {above(line, t):+.3f} | {s.norm:.2f} |" for t, s in line.items()]
    return lines


def plot(found: dict[str, dict[float, Scores]], path: Path) -> None:
    """The mean score against t, as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("a picture needs matplotlib: pip install 'weft[plots]'") from None
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name, line in found.items():
        axes.plot(list(line), [s.mean for s in line.values()], "o-", label=name)
    first = next(iter(found.values()))
    axes.plot([0, 1], [first[0.0].mean, first[1.0].mean], "--", color="grey", label="between the parents")
    axes.set_xlabel("t: from the domain parent to the instruct parent")
    axes.set_ylabel("mean of both scores")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path, help="where to draw the scores against t")
    given = parser.parse_args()
    found = measure()
    print("\n".join(table(found)))
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
