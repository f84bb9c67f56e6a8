"""What each way of compressing is for, on real data: a network for scikit-learn's digits, tuned on the same digits moved by a pixel.

The papers' figures are of language models, in which far more of an update can go than in 84,000 weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from tests.test_merge import write_checkpoint
from weft.base import Base
from weft.folding import fold

Digits = tuple[Base, Base, np.ndarray, np.ndarray, float, float]


def trained(start: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, steps: int, rate: float) -> dict[str, torch.Tensor]:
    weights = {name: w.clone().requires_grad_() for name, w in start.items()}
    optimizer = torch.optim.Adam(weights.values(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(weights, x), y).backward()
        optimizer.step()
    return {name: w.detach() for name, w in weights.items()}


def logits(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.relu(torch.relu(x @ w["a.weight"].T + w["a.bias"]) @ w["b.weight"].T + w["b.bias"]) @ w["c.weight"].T + w["c.bias"]


def moved(x: np.ndarray) -> np.ndarray:
    """The pictures one pixel further to the right."""
    return np.roll(x.reshape(-1, 8, 8), 1, 2).reshape(-1, 64).copy()


def accuracy(base: Base, x: np.ndarray, y: np.ndarray) -> float:
    weights = {name: torch.from_numpy(tensor.read().copy()) for name, tensor in base.tensors.items()}
    return float((logits(weights, torch.from_numpy(x)).argmax(1).numpy() == y).mean())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """The base, the tuned network, held-out digits that are moved with their labels, and what both score on them."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    x, y = (data.data / 16).astype(np.float32), data.target
    order = np.random.default_rng(1).permutation(len(y))
    train, test = order[:1200], order[1200:]
    generator = torch.Generator().manual_seed(2)
    sizes = {"a": (256, 64), "b": (256, 256), "c": (10, 256)}
    start = {f"{name}.weight": torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in sizes.items()}
    start |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in sizes.items()}
    before = trained(start, torch.from_numpy(x[train]), torch.from_numpy(y[train]), 100, 3e-3)
    after = trained(before, torch.from_numpy(moved(x[train])), torch.from_numpy(y[train]), 100, 1e-3)
    base = write_checkpoint(root / "base", {name: w.numpy() for name, w in before.items()})
    tuned = write_checkpoint(root / "tuned", {name: w.numpy() for name, w in after.items()})
    unseen = moved(x[test])
    return base, tuned, unseen, y[test], accuracy(base, unseen, y[test]), accuracy(tuned, unseen, y[test])


def compressed(digits: Digits, folder: Path, method: str, **options: Any) -> tuple[float, float]:
    """Times smaller than the increments in bf16, and the accuracy after folding."""
    base, tuned, x, y, *_ = digits
    made = weft.compress(tuned, method, base, **options)
    entries = sum(int(np.prod(entry.shape)) for entry in made.entries.values())
    fold(base, [made], folder)
    return 2 * entries / made.nbytes, accuracy(Base.open(folder), x, y)


@pytest.mark.parametrize(
    ("method", "options", "smaller", "lost"),
    [
        ("quantize", {"bits": 8}, 1.9, 0.005),
        ("quantize", {"bits": 4}, 3.7, 0.01),
        ("quantize", {"bits": 3, "form": "codebook"}, 5.0, 0.02),
        ("bitdelta", {}, 13.0, 0.08),
        ("fedzip", {"density": 0.4, "clusters": 9}, 8.0, 0.08),
        ("darex-q", {"drop": 0.75}, 3.9, 0.03),
        ("truncate", {"energy": 0.9}, 3.0, 0.02),
    ],
    ids=str,
)
def test_a_fraction_of_the_bytes_keeps_the_accuracy(digits: Digits, method: str, options: dict[str, Any], smaller: float, lost: float, tmp_path: Path) -> None:
    before, tuned = digits[4:]
    assert tuned > 0.9 and before < 0.7, "there is something to keep"
    ratio, got = compressed(digits, tmp_path / "folded", method, **options)
    print(f"{method} {options}: {ratio:.1f} times smaller than bf16, accuracy {got:.3f} (base {before:.3f}, tuned {tuned:.3f})")
    assert ratio > smaller and got > tuned - lost
