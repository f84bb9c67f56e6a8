"""What each way of compressing is for: against another use of the same bits, on networks for scikit-learn's digits tuned on digits moved by a pixel.

Three networks, and what is claimed holds on each. They are not those on which the claims were found. ComPEFT has its own such test.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import weft
from tests.conftest import MemoryBase
from weft.delta import Builder, Delta

SEEDS = (10, 11, 12)

Increments = dict[str, np.ndarray]


class Network(NamedTuple):
    """Weights before, what tuning added, that as a delta, and held-out digits with their labels."""

    start: dict[str, np.ndarray]
    added: Increments
    delta: Delta
    x: np.ndarray
    y: np.ndarray

    def accuracy(self, added: Increments) -> float:
        weights = {name: torch.from_numpy(w + added[name].astype(np.float32)) for name, w in self.start.items()}
        return float((logits(weights, torch.from_numpy(self.x)).argmax(1).numpy() == self.y).mean())

    def error(self, added: Increments) -> float:
        """Of increments in place of those of tuning, relative."""
        lost = sum(float(((added[name] - d).astype(np.float64) ** 2).sum()) for name, d in self.added.items())
        return float(np.sqrt(lost / sum(float((d.astype(np.float64) ** 2).sum()) for d in self.added.values())))

    def compressed(self, method: str, **options: Any) -> tuple[Increments, float]:
        """The increments that are left, and the bits that one takes."""
        made = weft.compress(self.delta, method, **options)
        return {name: np.asarray(made.apply(name, np.zeros_like(w))) for name, w in self.start.items()}, 8 * made.nbytes / self.size

    @property
    def size(self) -> int:
        return sum(d.size for d in self.added.values())

    @property
    def noise(self) -> float:
        """Two standard errors of an accuracy, at the most."""
        return float(1 / np.sqrt(len(self.y)))

    def largest(self, bits: float) -> Increments:
        """The other use of the same bits that is closest at hand: the largest entries in bf16, with positions at the entropy that no code is below."""
        p = np.linspace(1e-4, 0.5, 5000)
        share = p[np.searchsorted(16 * p - p * np.log2(p) - (1 - p) * np.log2(1 - p), bits)]
        least = np.sort(np.abs(np.concatenate([d.reshape(-1) for d in self.added.values()])))[-int(share * self.size)]
        return {name: d * (np.abs(d) >= least) for name, d in self.added.items()}


def trained(start: dict[str, torch.Tensor], x: np.ndarray, y: np.ndarray, rate: float) -> dict[str, torch.Tensor]:
    weights = {name: w.clone().requires_grad_() for name, w in start.items()}
    optimizer = torch.optim.Adam(weights.values(), rate)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(weights, torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    return {name: w.detach() for name, w in weights.items()}


def logits(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.relu(torch.relu(x @ w["a.weight"].T + w["a.bias"]) @ w["b.weight"].T + w["b.bias"]) @ w["c.weight"].T + w["c.bias"]


def moved(x: np.ndarray) -> np.ndarray:
    """The pictures one pixel further to the right."""
    return np.roll(x.reshape(-1, 8, 8), 1, 2).reshape(-1, 64).copy()


@pytest.fixture(scope="module", params=SEEDS)
def network(request: pytest.FixtureRequest) -> Network:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = (data.data / 16).astype(np.float32), data.target
    order = np.random.default_rng(request.param).permutation(len(y))
    train, test = order[:1200], order[1200:]
    generator = torch.Generator().manual_seed(request.param)
    sizes = {"a": (256, 64), "b": (256, 256), "c": (10, 256)}
    start = {f"{name}.weight": torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in sizes.items()}
    start |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in sizes.items()}
    before = trained(start, x[train], y[train], 3e-3)
    after = trained(before, moved(x[train]), y[train], 1e-3)
    weights = {name: w.numpy() for name, w in before.items()}
    added = {name: after[name].numpy() - w for name, w in weights.items()}
    build = Builder(MemoryBase(weights))
    for name, d in added.items():
        build.put(name, "dense", {"values": d})
    return Network(weights, added, build.done(), moved(x[test]), y[test])


def test_there_is_something_to_keep(network: Network) -> None:
    assert network.accuracy(network.added) > 0.9 and network.accuracy({name: 0 * d for name, d in network.added.items()}) < 0.7


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("bitdelta", {}),
        ("quantize", {"form": "codebook", "bits": 2}),
        ("fedzip", {"density": 0.4, "clusters": 9}),
        ("darex-q", {"drop": 0.9}),
        ("truncate", {"rank": 8}),
    ],
    ids=str,
)
def test_it_keeps_more_than_the_largest_entries_in_as_many_bits(network: Network, method: str, options: dict[str, Any]) -> None:
    made, bits = network.compressed(method, **options)
    assert network.accuracy(made) > network.accuracy(network.largest(bits)) + network.noise


def test_bitdelta_needs_the_fitted_scale(network: Network) -> None:
    """Rounding to one bit as `integers` would, to half the range on either side, takes as much room."""
    made, _ = network.compressed("bitdelta")
    rounded = {name: np.where(d < 0, -0.5, 0.5) * np.abs(d).max() if d.ndim > 1 else d for name, d in network.added.items()}
    assert network.accuracy(made) > network.accuracy(rounded) + network.noise
    for factor in (0.9, 1.1):
        assert network.error(made) < network.error({name: d * factor if d.ndim > 1 else d for name, d in made.items()})


def test_groups_are_worth_more_than_the_bits_of_their_scales(network: Network) -> None:
    """A quarter of a bit an entry at 64 entries a scale: spent on finer steps, it would make the error 2^(1/4) times smaller."""
    (grouped, more), (whole, less) = (network.compressed("quantize", bits=4, group=group) for group in (64, 1 << 20))
    assert network.error(grouped) < network.error(whole) * 2.0 ** -(more - less)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_codebook_is_nearer_than_integers_in_more_bits(network: Network, bits: int) -> None:
    (found, less), (even, more) = (network.compressed("quantize", bits=bits, form=form) for form in ("codebook", "integers"))
    assert less < more and network.error(found) < network.error(even)


def test_dropped_entries_need_the_others_to_be_larger(network: Network) -> None:
    """On one mask and in the same bytes. The error of the increments says the opposite: it is the mean over many entries that counts."""
    (larger, bits), (as_they_were, same) = (network.compressed("darex-q", drop=0.9, q=q) for q in (None, 1.0))
    assert bits == same and network.accuracy(larger) > network.accuracy(as_they_were) + network.noise
    assert network.error(larger) > network.error(as_they_were)


def test_truncation_keeps_more_than_a_random_subspace_of_the_same_rank(network: Network) -> None:
    made, _ = network.compressed("truncate", rank=8)
    rng = np.random.default_rng(5)
    projected = {}
    for name, d in network.added.items():
        q = np.linalg.qr(rng.standard_normal((d.shape[-1], 8)))[0]
        projected[name] = (d @ q) @ q.T if d.ndim > 1 else d
    assert network.accuracy(made) > network.accuracy(projected) + network.noise
