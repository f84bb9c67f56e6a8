"""darex-q: dare where q is 1 - p, the q that it finds against models folded one by one, and what the paper claims."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from tests import merging_tasks, tiny
from tests.test_merge import close, exact_delta, family, lora, same, taus_of, values_of  # noqa: F401
from tests.test_merge_dare import slow_masked
from weft.base import Base
from weft.delta import Delta
from weft.engine.increments import Increments
from weft.errors import UsageError, WeftError
from weft.merging._data import Study
from weft.merging._thinned import _best
from weft.merging.darex_q import analytic_q, share_left


@pytest.mark.parametrize("drop", [0.3, 0.99])
@pytest.mark.parametrize("options", [{}, {"weights": [1.0, -2.0, 0.5], "scale": 0.4, "seed": 7}], ids=str)
def test_q_of_one_minus_p_is_dare(family: Any, drop: float, options: dict[str, Any]) -> None:  # noqa: F811
    base, start, tuned, ckpts = family
    want = values_of(weft.merge(ckpts, base, "dare", drop=drop, **options))
    diffs = [exact_delta(base, start, values) for values in tuned]
    for inputs, threads, block in ((ckpts, 1, 10**6), (diffs, 2, 1), (ckpts, 3, 17)):
        same(values_of(weft.merge(inputs, base, "darex-q", drop=drop, q=share_left(drop), threads=threads, block=block, **options)), want)


def test_what_is_left_is_divided_by_q(family: Any) -> None:  # noqa: F811
    base, start, tuned, ckpts = family
    kept = slow_masked(taus_of(start, tuned), 0.8, 3)
    weights = [0.5, 1.0, -1.0]
    want = {
        name: np.asarray(sum(w / 0.35 * each[name].astype(np.float64) for w, each in zip(weights, kept, strict=True))).astype(first.dtype)
        for name, first in kept[0].items()
    }
    close(values_of(weft.merge(ckpts, base, "darex-q", weights, drop=0.8, q=0.35, seed=3)), want)


def test_without_dropping_and_with_q_given_deltas_keep_their_ops(family: Any) -> None:  # noqa: F811
    base, _, _, _ = family
    deltas = [lora(base, seed, {"embed.weight": (13, 6)}) for seed in (1, 2)]
    merged = weft.merge(deltas, method="darex-q", drop=0, q=0.5)
    assert merged.entries == weft.merge(deltas, method="task-arithmetic", scale=2.0).entries


# --- the q that is found

FAMILIES = [merging_tasks.classifiers, merging_tasks.languages, lambda folder: merging_tasks.languages(folder, "llama")]


def found_in(delta: Delta) -> list[dict[str, float]]:
    """q of every tensor, for each of the two models."""
    stored = json.loads(delta.tensors["@blob/darex-q"].read().tobytes())
    assert stored.keys() == delta.entries.keys()
    return [{name: q[number] for name, q in stored.items()} for number in range(2)]


def texts_of(tasks: merging_tasks.Family, number: int) -> list[torch.Tensor]:
    """The rows of a model as tokens."""
    study = Study(Increments(tasks.updates, tasks.base, on=tasks.on), tasks.data)
    return [torch.tensor([example["input_ids"]]) for example in study.examples[number]]


def told(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    """The logits of a live model at all tokens (of a classifier, rows), one text after the other."""
    with torch.no_grad():
        return torch.cat([logits.reshape(-1, logits.shape[-1]) for logits in (model(input_ids=ids).logits for ids in texts)])


@pytest.mark.parametrize("make", FAMILIES)
def test_the_q_found_by_output_is_better_than_others(tmp_path: Path, make: Any) -> None:
    """Against live models with the masked increments of one model on them, text by text."""
    tasks = make(tmp_path)
    merged = weft.merge(tasks.updates, tasks.base, "darex-q", drop=0.9, data=tasks.data, on=tasks.on, batch_size=3)
    step = share_left(0.9) ** (1 / 9)
    for number, (each, model) in enumerate(zip(found_in(merged), tasks.models(tmp_path), strict=True)):
        texts = texts_of(tasks, number)
        right = told(model, texts)
        places = right.topk(min(5, right.shape[1])).indices
        alone = tasks.base.model([*tasks.on, *(update for update in tasks.updates if isinstance(update, Delta))])

        def error(q: float) -> float:
            weights = [float(k == number) for k in range(2)]  # noqa: B023
            delta = weft.merge(tasks.updates, tasks.base, "darex-q", weights, drop=0.9, q=q, on=tasks.on)
            weft.attach(alone, [*tasks.on, delta], base=tasks.base)  # noqa: B023
            got = told(alone, texts)  # noqa: B023
            weft.detach(alone)  # noqa: B023
            return float((got - right).gather(1, places).square().mean())  # noqa: B023

        (q,) = set(each.values())
        mine = error(q)
        assert share_left(0.9) <= q <= 1 and mine > 1e-6
        around = [q * step ** (k / 6) for k in (-1, 1)]
        assert all(mine <= error(other) * (1 + 1e-4) for other in (share_left(0.9), 1.0, step**3, *around) if share_left(0.9) <= other <= 1)


def test_an_update_over_another_input_is_held_against_what_it_found(tmp_path: Path) -> None:
    """Its q is the one that is found where that other input is no input but goes before."""
    tasks = merging_tasks.languages(tmp_path, "llama")
    first = merging_tasks.updated(tasks.base, 5, ("o_proj.weight", "norm.weight"), 1.0)
    second = merging_tasks.updated(tasks.base, 6, ("down_proj.weight",), 1.0, over=(first.id,))
    how: dict[str, Any] = {"drop": 0.3, "data": tasks.data[0]}
    other = merging_tasks.updated(tasks.base, 7, ("q_proj.weight",))
    inside = found_in(weft.merge([first, second], tasks.base, "darex-q", **how))[1]
    before = found_in(weft.merge([other, second], tasks.base, "darex-q", on=[first], **how))[1]
    assert {share_left(0.3) < inside[name] == before[name] < 1 for name in second.entries} == {True}


def test_the_same_data_gives_the_same_delta(tmp_path: Path) -> None:
    tasks = merging_tasks.classifiers(tmp_path)
    for find in ("output", "analytic"):
        one, two = (
            weft.merge(tasks.updates, tasks.base, "darex-q", find=find, rows=4, data=tasks.data, on=tasks.on, threads=threads, block=block)
            for threads, block in ((1, 10**6), (2, 50))
        )
        assert one.id == two.id and one.recipe["config"]["rows"] == 4


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("eta", [0.05, None])
def test_the_q_found_for_layers(tmp_path: Path, make: Any, eta: float | None) -> None:
    """Mean inputs and sums by hooks on the folded models; q by trying out a fine grid, as the bound is written down."""
    tasks = make(tmp_path)
    drop, options = 0.8, {} if eta is None else {"eta": eta}
    merged = weft.merge(tasks.updates, tasks.base, "darex-q", drop=drop, find="analytic", data=tasks.data, on=tasks.on, **options)
    increments = [weft.merge(tasks.updates, tasks.base, "task-arithmetic", [float(k == number) for k in range(2)], on=tasks.on) for number in range(2)]
    for number, (each, model) in enumerate(zip(found_in(merged), tasks.models(tmp_path), strict=True)):
        seen: dict[str, list[torch.Tensor]] = {}

        def hook(path: str, given: Any, seen: dict[str, list[torch.Tensor]] = seen) -> None:
            seen.setdefault(path, []).append(given[0].detach().reshape(-1, given[0].shape[-1]))

        for path, module in model.named_modules():
            if type(module).__name__ in ("Linear", "Conv1D") and not path.startswith(("classifier", "lm_head", "bert.pooler")):
                module.register_forward_hook(lambda _, given, y, path=path, hook=hook: hook(path, given))
        told(model, texts_of(tasks, number))
        layers = {}
        for path, rows in seen.items():
            name = f"{path.removeprefix('bert.')}.weight"
            name = name if name in merged.entries else name.removeprefix("transformer.")
            if name not in merged.entries or not touched(tasks.updates[number], tasks.base, name):
                continue
            tau = added(increments[number], tasks, name)
            c = (tau.T if "Conv1D" in type(model.get_submodule(path)).__name__ else tau) * torch.cat(rows).double().mean(0).numpy()
            bias = name.replace(".weight", ".bias")
            if bias in increments[number].entries and touched(tasks.updates[number], tasks.base, bias):
                c = np.concatenate([c, added(increments[number], tasks, bias)[:, None]], 1)
            layers[name] = c
        assert layers
        if eta is not None:
            for name, c in layers.items():
                assert each[name] == pytest.approx(slow_q(c, drop, eta), rel=2e-3), name
            mean = np.mean([each[name] for name in layers])
            assert all(each[name] == pytest.approx(mean) for name in each if name not in layers)
        else:
            grid = [10 ** (k / 3 - 2) for k in range(10)]
            fits = [max(abs(each[name] / analytic_q(c.sum(1), np.square(c).sum(1), drop, e) - 1) for name, c in layers.items()) for e in grid]
            assert min(fits) < 1e-5


def touched(update: Any, base: Base, name: str) -> bool:
    return name in update.entries if isinstance(update, Delta) else update.sha256(name) != base.sha256(name)


def added(delta: Delta, tasks: merging_tasks.Family, name: str) -> np.ndarray:
    w = tasks.base.tensor(name).read().astype(np.float32)
    return np.asarray(delta.apply(name, np.zeros_like(w)), np.float64)


def slow_q(c: np.ndarray, drop: float, eta: float) -> float:
    grid = np.geomspace(1 - drop, 1, 4000)
    phi = (1 - 2 * drop) / log((1 - drop) / drop)
    found = []
    for row in c:
        if row.any():
            bound = abs(1 - (1 - drop) / grid) * abs(row.sum()) + eta * phi * (row**2).sum() / (4 * grid**2)
            found.append(grid[bound.argmin()])
    return float(np.mean(found))


@pytest.mark.parametrize("drop", [0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("eta", [0.01, 0.3, 3.0])
def test_the_formula_is_the_smallest_bound(drop: float, eta: float) -> None:
    rng = np.random.default_rng(0)
    c = rng.standard_normal((40, 25)) * 10.0 ** rng.uniform(-2, 1, (40, 1)) + rng.standard_normal((40, 1))
    c[3] = 0
    got = analytic_q(c.sum(1), np.square(c).sum(1), drop, eta)
    assert got == pytest.approx(slow_q(c, drop if drop != 0.5 else 0.5 + 1e-7, eta), rel=2e-3)
    assert share_left(drop) <= got <= 1
    cancelled = np.array([[1.0, -1.0]])
    assert analytic_q(cancelled.sum(1), np.square(cancelled).sum(1), drop, eta) == 1.0  # nothing to lose
    assert analytic_q(np.zeros(4), np.zeros(4), drop, eta) == analytic_q(np.ones(4), np.zeros(4), drop, eta) == share_left(drop)
    assert analytic_q(c.sum(1), np.square(c).sum(1), 0.0, eta) == 1.0


def test_what_is_refused(tmp_path: Path, family: Any) -> None:  # noqa: F811
    base, _, _, ckpts = family
    with pytest.raises(UsageError, match="needs data"):
        weft.merge(ckpts, base, "darex-q")
    with pytest.raises(UsageError, match="looks at no data"):
        weft.merge(ckpts, base, "darex-q", q=0.3, data=[{"text": "a"}])
    for wrong in ({"drop": 1}, {"q": 0}, {"find": "guess"}, {"eta": 0}, {"rows": 0}, {"seed": -1}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            weft.merge(ckpts, base, "darex-q", **wrong)
    with pytest.raises(WeftError, match="not finite"):
        _best([0.1, 0.2], lambda q: float("nan"))
    assert _best([0.1, 0.2, 0.3], lambda q: float("inf") if q < 0.15 else 1.0) == 0.2


# --- what the paper claims


def test_at_99_per_cent_a_tuned_q_changes_the_output_less_than_dare(tmp_path: Path) -> None:
    """On texts that q was not found on, whether one q is found for the model or one for each layer (Deng et al., section 4). What that does to
    a tuned model's answers is measured by bench/claims/darex.py."""
    tasks = merging_tasks.languages(tmp_path, "llama")
    update, model = tasks.updates[0], tasks.base.model()
    texts = texts_of(merging_tasks.Family(tasks.base, [update], [[{"text": f"it was {text}"} for text in tiny.texts(20, 9)]]), 0)

    def said(delta: Delta) -> torch.Tensor:
        weft.attach(model, delta, base=tasks.base)
        out = told(model, texts)
        weft.detach(model)
        return out

    right = said(update)
    places = right.topk(5).indices
    found = {"dare": weft.merge([update], tasks.base, "dare", drop=0.99)}
    found |= {find: weft.merge([update], tasks.base, "darex-q", drop=0.99, find=find, data=tasks.data[0]) for find in ("output", "analytic")}
    errors = {name: float((said(delta) - right).gather(1, places).square().mean()) for name, delta in found.items()}
    assert errors["output"] < 0.8 * errors["dare"] and errors["analytic"] < 0.8 * errors["dare"], errors
