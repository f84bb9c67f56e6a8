"""Models for merges that look at data: tiny ones in many forms, and two skills that a model which knows its world has learnt."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import weft
from tests import tiny
from weft.base import Base
from weft.delta import Builder, Delta
from weft.engine.increments import Increments

Rows = list[dict[str, Any]]


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


def nll(delta: Delta) -> list[float]:
    """Of a merge of the two skills: the mean -log p of a token of the right answers of each."""
    base, _, _, asked = skills()
    return [weft.evaluate(base, [delta], rows, batch_size=60)["metrics"]["nll"] for rows in asked]
