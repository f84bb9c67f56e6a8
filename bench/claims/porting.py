"""What porting gains, against the distance of the bases; and what it saves when one tunes on from there.

    python bench/claims/porting.py [--plot porting.png]

The first edition of the microcosm's base learns to judge reviews (a LoRA of rank 8, 40 steps). That is carried, with diff-vector-transfer, to bases
further and further away: along the line to the second edition and beyond it, to the first edition with noise, to the second edition
itself, and to the second edition with all its units in another order. The gain is what the update takes off the loss on held-out
reviews, as a share of what it takes off on its own base. Nothing is random but by seed; times are not measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import weft
from weft.demo import edition, microcosm
from weft.porting import Prediction, predict

TRAIN, TEST, LOOK = 320, 200, 100
HOW: dict[str, Any] = {"method": "lora", "rank": 8, "lr": 5e-3, "batch_size": 16}
LINE, NOISE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0), (0.1, 0.2, 0.32, 0.5)


@dataclass(frozen=True)
class Point:
    """One target: its loss without the update and with it, the share of reviews that it then judges rightly, and what was predicted."""

    kind: str
    name: str
    method: str
    bare: float
    ported: float
    right: float
    predicted: Prediction


def judged(base: weft.Base, deltas: list[weft.Delta], rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The loss (nats a token) and the share of right answers (0.5 is chance, once the answer is a good or a bad)."""
    found = weft.evaluate(base, deltas, rows, batch_size=128)["metrics"]
    return float(found["nll"]), float(found["teacher_forced_exact"])


def nll(base: weft.Base, deltas: list[weft.Delta], rows: list[dict[str, Any]]) -> float:
    return judged(base, deltas, rows)[0]


def skill(base: weft.Base, rows: list[dict[str, Any]], *, epochs: float = 2, **more: Any) -> weft.Delta:
    """A LoRA that has learnt to judge."""
    return weft.tune(base, rows[:TRAIN], epochs=epochs, progress=lambda event: None, **HOW, **more)


def on_the_line(source: weft.Base, target: weft.Base, t: float, folder: Path) -> weft.Base:
    """source + t (target - source) as a checkpoint."""
    weft.fold(source, [t * weft.diff(source, target, "dense")], folder, allow_noop=t == 0)
    return weft.Base.open(folder)


def noisy(source: weft.Base, size: float, folder: Path, seed: int = 0) -> weft.Base:
    """The source with normal noise on each tensor, `size` times as long as that."""
    rng = np.random.default_rng(seed)
    build = weft.Builder(source)
    for name in source.names:
        w = source.tensor(name).read()
        noise = rng.standard_normal(w.shape)
        build.put(name, "dense", {"values": (noise * (size * np.linalg.norm(w) / np.linalg.norm(noise))).astype(np.float32)})
    weft.fold(source, [build.done()], folder)
    return weft.Base.open(folder)


def reordered(base: weft.Base, folder: Path, seed: int = 1) -> weft.Base:
    """The same function with all units in another order."""
    from weft.engine.permutations import drawn, permuting
    from weft.engine.symmetries import symmetries

    groups = symmetries(base)
    weft.fold(base, [permuting(base, groups, drawn(groups, seed))], folder)
    return weft.Base.open(folder)


def targets(first: weft.Base, second: weft.Base, folder: Path, line: tuple[float, ...], noise: tuple[float, ...]) -> Iterator[tuple[str, str, str, weft.Base]]:
    """Kind, name, method and base of each point."""
    for t in line:
        yield "line", f"first + {t:g} (second - first)", "diff-vector-transfer", on_the_line(first, second, t, folder / f"line{t}")
    for size in noise:
        yield "noise", f"first + noise {size:g}", "diff-vector-transfer", noisy(first, size, folder / f"noise{size}")
    apart = reordered(second, folder / "reordered")
    yield "reordered", "second, reordered", "diff-vector-transfer", apart
    yield "reordered", "second, reordered", "permuted", apart


def measure(update: weft.Delta, line: tuple[float, ...] = LINE, noise: tuple[float, ...] = NOISE, *, data: bool = True) -> tuple[float, list[Point]]:
    """What the update takes off the loss on its own base, and each point."""
    files = microcosm.files()
    ask, text = files["judge.test"][:TEST], files["scenes"][:LOOK]
    first, second = (weft.Base.open(edition(name)) for name in ("first", "second"))
    own = nll(first, [], ask) - nll(first, [update], ask)
    points = []
    with TemporaryDirectory() as folder:
        for kind, name, method, base in targets(first, second, Path(folder), line, noise):
            ported = weft.port(update, first, base, method)
            predicted = predict(first, base, update, text if data else None)
            points.append(Point(kind, name, method, nll(base, [], ask), *judged(base, [ported], ask), predicted))
    return own, points


def recycled(update: weft.Delta, steps: tuple[int, ...] = (5, 10, 20, 40)) -> list[tuple[int, float, float]]:
    """Steps of tuning the second edition, and the loss from the bare base and from the ported update."""
    files = microcosm.files()
    ask = files["judge.test"][:TEST]
    first, second = (weft.Base.open(edition(name)) for name in ("first", "second"))
    ported = weft.port(update, first, second)
    found = [(0, nll(second, [], ask), nll(second, [ported], ask))]
    for count in steps:
        bare = skill(second, files["judge.train"], steps=count)
        after = skill(second, files["judge.train"], steps=count, on=[ported])
        found.append((count, nll(second, [bare], ask), nll(second, [ported, after], ask)))
    return found


def table(own: float, points: list[Point]) -> list[str]:
    heads = ("target", "method", "distance", "overlap of the bases", "barrier", "bare", "ported", "gain", "right", "predicted")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for p in points:
        q = p.predicted
        numbers = (q.distance, q.bases or 0.0, q.barrier or 0.0, p.bare, p.ported, gain(own, p), p.right)
        lines.append(f"| {p.name} | {p.method} | {' | '.join(f'{number:.2f}' for number in numbers)} | {q.verdict} |")
    return lines


def gain(own: float, point: Point) -> float:
    """What the update takes off the loss there, as a share of what it takes off on its own base."""
    return (point.bare - point.ported) / own


def plot(own: float, points: list[Point], path: Path) -> None:
    """The gain, and the share judged rightly, against the distance, as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("a picture needs matplotlib: pip install 'weft[plots]'") from None
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for axes, about in ((left, "gain, as a share of that on its own base"), (right, "share of reviews judged rightly")):
        for kind, mark in (("line", "o-"), ("noise", "s-"), ("reordered", "x")):
            mine = [p for p in points if p.kind == kind]
            axes.plot([p.predicted.distance for p in mine], [gain(own, p) if axes is left else p.right for p in mine], mark, label=kind)
        axes.set_xlabel("||new - old|| / ||old||")
        axes.set_ylabel(about)
        axes.axhline(0, color="grey", linewidth=0.5)
    right.axhline(0.5, color="grey", linewidth=0.5, linestyle=":")
    left.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path, help="where to draw the gain against the distance")
    given = parser.parse_args()
    first = weft.Base.open(edition("first"))
    update = skill(first, microcosm.files()["judge.train"])
    own, points = measure(update)
    print(f"on its own base the update takes {own:.2f} off the loss\n")
    print("\n".join(table(own, points)), flush=True)
    if given.plot:
        plot(own, points, given.plot)
    print("\n| steps | from the bare base | from the ported update |\n|---|---|---|")
    for count, bare, after in recycled(update):
        print(f"| {count} | {bare:.3f} | {after:.3f} |", flush=True)


if __name__ == "__main__":
    main()
