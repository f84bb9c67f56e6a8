"""Models for merges that look at data: tiny ones in many forms, and two skills that a model which knows its world has learnt."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import weft
from tests import tiny
from tests.conftest import MemoryBase
from weft.base import Base
from weft.delta import Builder, Delta
from weft.engine.increments import Increments

Rows = list[dict[str, Any]]
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Family:
    """A base, updates of it with what they are made over, and rows for each."""

    base: Base
    updates: list[Any]
    data: list[Rows]
    on: tuple[Delta, ...] = ()

    def models(self, folder: Path) -> list[Any]:
        """Each update as a live model of its own, read from the checkpoint that folding gives."""
        made = []
        for number, update in enumerate(self.updates):
            if isinstance(update, Delta):
                weft.fold(self.base, [*self.on, update], folder / str(number))
            made.append((Base.open(folder / str(number)) if isinstance(update, Delta) else update).model())
        return made


def updated(base: Base, seed: int, ends: Sequence[str], size: float = 0.1, **manifest: Any) -> Delta:
    """Dense changes of every tensor whose name ends in one of `ends`."""
    build, rng = Builder(base), np.random.default_rng(seed)
    for name in base.names:
        if name.endswith(tuple(ends)):
            build.put(name, "dense", {"values": (size * rng.standard_normal(base.tensor(name).shape)).astype(np.float32)})
    return build.done(**manifest)


def headed(base: Base, seed: int = 5) -> Delta:
    """A classification head for `tiny.LABELS` alone."""
    build, rng = Builder(base), np.random.default_rng(seed)
    build.add("classifier.weight", rng.normal(size=(len(tiny.LABELS), 32)).astype(np.float32))
    build.add("classifier.bias", rng.normal(size=len(tiny.LABELS)).astype(np.float32))
    names = {str(number): label for number, label in enumerate(tiny.LABELS)}
    config = {"architectures": ["BertForSequenceClassification"], "id2label": names, "label2id": {label: int(number) for number, label in names.items()}}
    return build.done(recipe={"verb": "test"}, config={**config, "problem_type": "single_label_classification"})


def labelled(count: int, seed: int) -> Rows:
    return [{"text": text, "label": tiny.LABELS[number % 3]} for number, text in enumerate(tiny.texts(count, seed))]


def classifiers(folder: Path) -> Family:
    """Two deltas over one head: one of low rank, one that changes embeddings, a norm and biases too."""
    base = Base.open(tiny.bert(folder / "bert"))
    head = headed(base)
    build, rng = Builder(base), np.random.default_rng(3)
    for name in base.names:
        if name.endswith("query.weight"):
            build.put(name, "lowrank", {"A": rng.normal(size=(2, 32)).astype(np.float32), "B": rng.normal(size=(32, 2)).astype(np.float32)}, scale=0.1)
    low = build.done(over=(head.id,))
    wide = updated(base, 4, ("query.weight", "query.bias", "output.dense.weight", "LayerNorm.weight", "word_embeddings.weight"), over=(head.id,))
    return Family(base, [low, wide], [labelled(9, 1), labelled(7, 2)], (head,))


def languages(folder: Path, kind: str = "gpt2") -> Family:
    """A delta and a checkpoint of a causal language model: "gpt2" (tied, its matrices stored in x out) or "llama"."""
    base = Base.open((tiny.gpt2 if kind == "gpt2" else tiny.llama)(folder / kind))
    both = ("c_proj.weight", "ln_f.weight", "wte.weight", "q_proj.weight", "down_proj.weight")
    one = updated(base, 1, (*both, "c_fc.bias", "input_layernorm.weight"))
    weft.fold(base, [updated(base, 2, (*both, "c_attn.weight"))], folder / f"{kind}-tuned")
    rows = [[{"text": f"the {text}"} for text in tiny.texts(8, seed)] for seed in (1, 2)]
    rows[1] = [{"prompt": row["text"], "completion": " a good film"} for row in rows[1]]
    return Family(base, [one, Base.open(folder / f"{kind}-tuned")], rows)


# --- scikit-learn's digits: a small network, fine-tunes of it, and merges of these whose settings are chosen on held-out digits


def digits(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All 1797 in a random order, as rows of 64 pixels from 0 to 1, and what they are."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    return (images[order] / 16).astype(np.float32), labels[order]


def network(sizes: Sequence[int], rng: np.random.Generator) -> Values:
    """A fresh network of linear layers with ReLU between them."""
    weights = {}
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        weights[f"{number}.weight"] = (rng.standard_normal((outputs, inputs)) * (2 / inputs) ** 0.5).astype(np.float32)
        weights[f"{number}.bias"] = np.zeros(outputs, np.float32)
    return weights


def logits(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Of networks stacked along the first axis, each with inputs (rows, pixels) of its own."""
    last = len(weights) // 2 - 1
    for number in range(last + 1):
        x = torch.baddbmm(weights[f"{number}.bias"][:, None], x, weights[f"{number}.weight"].mT)
        x = torch.relu(x) if number < last else x
    return x


def learnt(
    start: Values, xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], steps: int, rate: float, batch: int, seed: int, sgd: bool = False
) -> list[Values]:
    """The network after training on each of several sets, on batches drawn from it at random, by Adam or by plain gradient descent."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.tensor(np.stack([value] * len(xs))).requires_grad_() for name, value in start.items()}
    optimizer = (torch.optim.SGD if sgd else torch.optim.Adam)(weights.values(), lr=rate)
    sets = [(torch.tensor(x), torch.tensor(y)) for x, y in zip(xs, ys, strict=True)]
    for _ in range(steps):
        rows = [torch.randint(len(y), (batch,), generator=generator) for _, y in sets]
        found = logits(weights, torch.stack([x[some] for (x, _), some in zip(sets, rows, strict=True)]))
        loss = torch.nn.functional.cross_entropy(found.flatten(0, 1), torch.cat([y[some] for (_, y), some in zip(sets, rows, strict=True)]), reduction="sum")
        optimizer.zero_grad()
        (loss / batch).backward()
        optimizer.step()
    return [{name: value[k].detach().numpy() for name, value in weights.items()} for k in range(len(xs))]


def accuracy(weights: Values, x: np.ndarray, y: np.ndarray) -> float:
    guess = logits({name: torch.tensor(value)[None] for name, value in weights.items()}, torch.tensor(x)[None])[0].argmax(1)
    return float((guess.numpy() == y).mean())


def increment(start: Values, models: Sequence[Values], method: str, **params: Any) -> Values:
    """What `weft.merge` makes of fine-tunes."""
    base, deltas = MemoryBase(start), []
    for model in models:
        build = Builder(base)
        for name, value in model.items():
            build.put(name, "dense", {"values": value - start[name]})
        deltas.append(build.done())
    merged = weft.merge(deltas, method=method, threads=1, **params)
    return {name: merged.apply(name, np.zeros_like(value)) for name, value in start.items()}


def plus(start: Values, change: Values, scale: float = 1.0) -> Values:
    return {name: value + np.float32(scale) * change[name] for name, value in start.items()}


SCALES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)
"""The factors on a merged increment that are tried, for every method alike."""


@dataclass(frozen=True)
class Tuned:
    """A network and its fine-tunes; pixels and labels to choose settings by (`held`) and to judge them by (`asked`)."""

    start: Values
    models: list[Values]
    held: tuple[np.ndarray, np.ndarray]
    asked: tuple[np.ndarray, np.ndarray]

    def searched(self, method: str, choices: Sequence[dict[str, Any]] = ({},)) -> float:
        """The accuracy on `asked` with the parameters out of `choices` and the scale out of `SCALES` that are best on `held`; the first of equals."""
        found = []
        for params in choices:
            change = increment(self.start, self.models, method, **params)
            found += [(accuracy(weights, *self.held), weights) for weights in (plus(self.start, change, scale) for scale in SCALES)]
        return accuracy(max(found, key=lambda each: each[0])[1], *self.asked)

    def average(self) -> float:
        """The accuracy on `asked` of the plain average."""
        return accuracy(plus(self.start, increment(self.start, self.models, "linear")), *self.asked)


def standing(seed: int) -> Tuned:
    """Eight tasks: to read a digit that stands in one of eight places, with noise (a standard deviation of 0.3) in the other seven.

    512-64-64-10, 300 steps of Adam on 60 digits in all places, then 200 of plain gradient descent for each place on the same 600 others. What a
    fine-tune does to the weights of the other places is noise, just where another fine-tune has what it learnt. Scores are means over the tasks.
    """
    rng = np.random.default_rng(seed)
    x, y = digits(rng)
    places = []
    for place in range(8):
        pixels = (0.3 * rng.standard_normal((len(x), 8, 64))).astype(np.float32)
        pixels[:, place] = x
        places.append(pixels.reshape(len(x), 512))
    return _tuned(places, y, [y[300:900]] * 8, network((512, 64, 64, 10), rng), 60, {"rate": 0.1, "batch": 32, "sgd": True}, seed)


def turned(seed: int) -> Tuned:
    """Eight tasks, learnt badly: digits as they are, turned three ways, mirrored three ways, and inverted, where 40 % of the labels are drawn at random.

    64-128-10, 300 steps of Adam on 40 digits in all eight ways, then 200 more for each way on the same 600 others, in batches of 8 at a rate of
    0.003. Scores are means over the tasks.
    """
    rng = np.random.default_rng(seed)
    x, y = digits(rng)
    grid = x.reshape(-1, 8, 8)
    ways = [grid, *(np.rot90(grid, turns, (1, 2)) for turns in (1, 2, 3)), 1 - grid, grid[:, :, ::-1], grid[:, ::-1], grid.transpose(0, 2, 1)]
    start = network((64, 128, 10), rng)
    labels = [np.where(rng.random(600) < 0.4, rng.integers(0, 10, 600), y[300:900]) for _ in ways]
    return _tuned([np.ascontiguousarray(way).reshape(len(x), 64) for way in ways], y, labels, start, 40, {"rate": 3e-3, "batch": 8}, seed)


def _tuned(tasks: list[np.ndarray], y: np.ndarray, labels: list[np.ndarray], fresh: Values, known: int, how: dict[str, Any], seed: int) -> Tuned:
    def all_of(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([task[rows] for task in tasks]), np.concatenate([y[rows]] * len(tasks))

    (x, right) = all_of(slice(known))
    (start,) = learnt(fresh, [x], [right], 300, 2e-3, 64, seed)
    models = learnt(start, [task[300:900] for task in tasks], labels, 200, seed=seed, **how)
    return Tuned(start, models, all_of(slice(1100, 1300)), all_of(slice(1300, None)))


# --- two skills of the microcosm's base, for what papers claim. The direction is theirs; how much better a method must be was set after one run of
# one seed had been seen, with room, so those factors guard what was measured and prove no more


@functools.cache
def skills() -> tuple[Base, list[Path], list[Rows], list[Rows]]:
    """The microcosm's base, tuned whole on judging reviews and on answering in sentences; 40 rows of each to merge with, 60 to ask about."""
    from weft.demo import edition, microcosm

    base, files, folder = Base.open(edition("first")), microcosm.files(), Path(tempfile.mkdtemp(prefix="weft-test-"))
    made, names = [], ("judge", "style")
    for name in names:
        how: dict[str, Any] = {"method": "full", "steps": 30, "batch_size": 8, "lr": 5e-4, "threads": 1}
        weft.tune(base, files[f"{name}.train"][:600], out=folder / f"{name}.safetensors", progress=lambda event: None, **how)
        made.append(folder / f"{name}.safetensors")
    return base, made, [files[f"{name}.train"][:40] for name in names], [files[f"{name}.test"][:60] for name in names]


def merged(models: Increments, merge: Any) -> Delta:
    """What `merge(increments, block)` makes of every tensor."""
    build = Builder(models.base)
    for name, target in models.targets.items():
        build.put(name, "dense", {"values": merge(models.read_all(target.whole), target.whole).astype(np.float32)})
    return build.done()


def held() -> list[Rows]:
    """40 rows of each skill that neither is tuned on nor asked about."""
    from weft.demo import microcosm

    files = microcosm.files()
    return [files[f"{name}.train"][900:940] for name in ("judge", "style")]


def nll(delta: Delta, rows: list[Rows] | None = None) -> list[float]:
    """Of a merge of the two skills: the mean -log p of a token of the right answers of each, on what `skills` asks if no rows are given."""
    base, _, _, asked = skills()
    return [weft.evaluate(base, [delta], each, batch_size=60)["metrics"]["nll"] for each in rows or asked]
