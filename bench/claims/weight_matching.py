"""Weight matching on digits: the barrier between two networks that were trained apart, and what moves when it falls.

    python bench/claims/weight_matching.py                       the figures
    python bench/claims/weight_matching.py --plot barrier.png    and the loss along the line between the two

Two MLPs (64-256-256-256-10) are trained on scikit-learn's digits from different seeds. The *barrier* is how far the loss on unseen digits,
along the straight line between their weights, rises above the line between the losses at its ends (Git Re-Basin, arXiv 2209.04836). After
matching the second network computes what it did, but lies elsewhere. Its singular values are the same, its distance to the first falls
little, and the directions of the leading singular vectors come together (arXiv 2402.04051): the *overlap* is

    sum_ij s_i t_j (u_i . p_j) (v_i . q_j) / sum_i s_i t_i

over the singular triplets (u, s, v) and (p, t, q) of a layer in both networks that reach 0.3 of its largest singular value.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import weft

SPLIT, WIDTH, POINTS, LEADING = 1200, 256, 11, 0.3
Weights = dict[str, torch.Tensor]


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def network() -> nn.Sequential:
    hidden = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


def trained(seed: int, steps: int = 300) -> Weights:
    """A network from a seed of its own, with batches of its own."""
    images, labels = digits()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(steps):
            batch = torch.randint(0, SPLIT, (256,))
            loss = cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def matched(a: Weights, b: Weights, folder: Path) -> Weights:
    """b with its units in a's order."""
    for name, weights in (("a", a), ("b", b)):
        (folder / name).mkdir()
        save_file(weights, folder / name / "model.safetensors")
    delta = weft.merge([folder / "b"], folder / "a", "weight-matching", weights=[1.0], layout="chain")
    return {name: a[name] + torch.from_numpy(delta.get(f"{name}//0.values")) for name in a}


def losses(a: Weights, b: Weights) -> list[float]:
    """The loss on unseen digits at points on the line from a to b."""
    images, labels = digits()
    model, out = network(), []
    for t in np.linspace(0, 1, POINTS):
        model.load_state_dict({name: torch.lerp(a[name], b[name], float(t)) for name in a})
        with torch.no_grad():
            out.append(float(cross_entropy(model(images[SPLIT:]), labels[SPLIT:])))
    return out


def barrier(a: Weights, b: Weights) -> float:
    found = losses(a, b)
    return max(np.array(found) - np.linspace(found[0], found[-1], POINTS))


def distance(a: Weights, b: Weights) -> float:
    return float(sum((a[name] - b[name]).square().sum() for name in a) ** 0.5)


def overlap(a: Weights, b: Weights) -> float:
    """Of the leading singular vectors, the mean over layers."""
    found = []
    for name in a:
        if a[name].ndim == 2:
            (u, s, v), (p, t, q) = (np.linalg.svd(w[name].double().numpy(), full_matrices=False) for w in (a, b))
            i, j = int((s >= LEADING * s[0]).sum()), int((t >= LEADING * t[0]).sum())
            inner = (u[:, :i].T @ p[:, :j]) * (v[:i] @ q[:j].T)
            k = min(i, j)
            found.append(s[:i] @ inner @ t[:j] / (s[:k] @ t[:k]))
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="a picture of the loss along the line (needs matplotlib)")
    plot = parser.parse_args().plot
    if plot is not None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            parser.error("--plot needs matplotlib: pip install 'weft[plots]'")
    a, b = trained(0), trained(1)
    with TemporaryDirectory() as folder:
        near = matched(a, b, Path(folder))
    print("| second network | barrier | distance | overlap |\n|---|---|---|---|")
    for name, other in (("as trained", b), ("matched", near)):
        print(f"| {name} | {barrier(a, other):.3f} | {distance(a, other):.1f} | {overlap(a, other):.3f} |")
    if plot is not None:
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name, other, mark in (("as trained", b, "o-"), ("matched", near, "s-")):
            axes.plot(np.linspace(0, 1, POINTS), losses(a, other), mark, label=name)
        axes.set(xlabel="from the first network (0) to the second (1)", ylabel="loss on unseen digits", ylim=(0, None))
        axes.legend()
        figure.savefig(plot, dpi=100)


if __name__ == "__main__":
    main()
