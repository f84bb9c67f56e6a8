"""Every space with every kind of optimizer, schedule and guard: a run that is killed and goes on ends with the same delta, which folds.

`make test` takes as few runs as have every pair of choices in one of them; `make test-all` takes all there are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

import weft
from tests import tiny
from tests.killed import tune_until_killed
from weft import methods
from weft.base import Base
from weft.errors import UsageError

CHOICES: dict[str, Sequence[str]] = {
    "method": methods.names("space"),
    "optimizer": ("adamw", "sophia", "mkor"),
    "schedule": ("cosine", "rex"),
    "guard": ("", "l2"),
}

STILL = {("s2-lora", "mkor")}
"""Choices that may leave the model as it was: the soft threshold of s2-lora takes back more than a step of plain momentum gives."""

AT_RUN_TIME = {"mhr", "mola", "mtlora", "polyhistor"}
"""Spaces that change what modules do and not tensors: there is no weight whose change the guard could measure."""

ROWS = [{"text": f"what is the {a} of {b}", "task": b} for a in ("river", "city", "film") for b in ("good", "bad", "a", "it")]


def every_pair(choices: dict[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """Combinations such that any two choices for two different things stand in one of them: always the one with the most new pairs next."""
    rows = list(product(*choices.values()))
    left = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(left & _pairs(row)))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


def _pairs(row: Sequence[str]) -> set[tuple[tuple[int, str], ...]]:
    return set(combinations(enumerate(row), 2))


def test_every_pair_is_there() -> None:
    small = {"a": "xyz", "b": "uv", "c": "pq"}
    rows = every_pair(small)
    assert len(rows) == 6  # no fewer can be: three by two pairs of the first two
    assert {pair for row in rows for pair in _pairs(row)} == {pair for row in product(*small.values()) for pair in _pairs(row)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.gpt2(tmp_path_factory.mktemp("combinations") / "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("chosen", list(product(*CHOICES.values())) if os.environ.get("WEFT_TEST_ALL") else every_pair(CHOICES), ids="-".join)
def test_choices_combine(model: Path, tmp_path: Path, chosen: tuple[str, ...]) -> None:
    """Two steps; one step, a saved state, SIGKILL, and one more; the same delta, which a checkpoint takes up."""
    options: dict[str, Any] = {name: choice for name, choice in zip(CHOICES, chosen, strict=True) if name != "guard"}
    options |= {
        "guards": [each for each in chosen[3:] if each],
        "steps": 2,
        "batch_size": 4,
        "threads": 1,
        "progress": lambda event: None,
        "optimizer.lr": 1e-2,
    }
    if chosen[0] in AT_RUN_TIME and "l2" in chosen:
        with pytest.raises(UsageError, match="has no weight whose change could be measured"):
            weft.tune(model, ROWS, **options)
        return
    whole = weft.tune(model, ROWS, **options)
    out = tmp_path / "d.safetensors"
    tune_until_killed(model, ROWS, step=2, out=out, save_every=1, **{**options, "progress": None})
    assert not out.exists()
    again = weft.tune(model, ROWS, out=out, resume=f"{out}.state", **options)
    assert again.id == whole.id
    if whole.foldable:
        report = weft.fold(Base.open(model), [again], tmp_path / "folded", allow_noop=True)
        assert (report.changed > 0) == (chosen[:2] not in STILL)
    else:
        assert all(name.startswith("@") for name in whole.unfoldable) and chosen[0] in AT_RUN_TIME
