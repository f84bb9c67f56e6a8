"""Streaming statistics against one pass over all rows, in any pieces, merged and continued."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.engine.capture import capture
from weft.engine.data import opened
from weft.engine.statistics import Moments, SecondMoment, second_moments
from weft.errors import InputError, UsageError

from . import tiny

NAMES = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")


def rows(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 5)) * [1, 10, 0.01, 3, 1] + [0, 1000, -7, 0.5, 1e-3]


def same(got: torch.Tensor, want: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-14)


@settings(max_examples=60)
@given(count=st.integers(2, 60), seed=st.integers(0, 9), cuts=st.lists(st.integers(0, 60), max_size=6), order=st.randoms())
def test_any_pieces_give_one_pass(count, seed, cuts, order):
    x = rows(count, seed)
    pieces = np.split(x, sorted(min(cut, count) for cut in cuts))
    order.shuffle(pieces)  # empty pieces and single rows among them
    added, merged = Moments(5), Moments(5)
    second = SecondMoment(5)
    for piece in pieces:
        added.add(piece)
        one = Moments(5)
        one.add(torch.from_numpy(piece))
        merged.merge(one)
        other = SecondMoment(5)
        other.add(piece)
        second.merge(other)
    for moments in (added, merged):
        assert moments.count == count
        same(moments.mean, x.mean(0))
        same(moments.variance, x.var(0, ddof=1))
        same(moments.std, x.std(0, ddof=1))
    assert second.count == count
    same(second.matrix, x.T @ x / count)


def test_a_state_continues():
    x = rows(40)
    whole, part = Moments(5), Moments(5)
    second, half = SecondMoment(5), SecondMoment(5)
    for each, upto in ((whole, 40), (part, 13), (second, 40), (half, 13)):
        each.add(x[:upto])
    assert all(isinstance(value, np.ndarray) for value in (*part.state().values(), *half.state().values()))
    state = part.state()
    part.add(x[13:20])  # what was taken before stays what it was
    resumed, continued = Moments.from_state(state), SecondMoment.from_state(half.state())
    resumed.add(x[13:])
    continued.add(x[13:])
    assert resumed.count == continued.count == 40
    same(resumed.variance, whole.variance.numpy())
    same(continued.matrix, second.matrix.numpy())
    np.testing.assert_array_equal(Moments.from_state(state).state()["squares"], state["squares"])


def test_rows_of_bfloat16_and_float32_are_summed_in_float64():
    x = torch.from_numpy(rows(50)).bfloat16()
    moments, second = Moments(5), SecondMoment(5)
    moments.add(x)
    second.add(x.float())
    wide = x.double().numpy()
    same(moments.variance, wide.var(0, ddof=1))
    same(second.matrix, wide.T @ wide / 50)


def test_what_is_not_defined_or_does_not_fit_is_told():
    moments = Moments(5)
    with pytest.raises(InputError, match="variance of 0 rows is not defined"):
        _ = moments.variance
    moments.add(rows(1))
    with pytest.raises(InputError, match="variance of 1 row is not defined"):
        _ = moments.std
    with pytest.raises(InputError, match="second moment of no rows"):
        _ = SecondMoment(5).matrix
    for kind in (Moments, SecondMoment):
        with pytest.raises(InputError, match=r"rows of 5 entries, got the shape \[3, 4\]"):
            kind(5).add(np.ones((3, 4)))
        with pytest.raises(InputError, match="not finite"):
            kind(5).add(np.full((3, 5), np.inf))
        with pytest.raises(InputError, match="5 and of 4 columns"):
            kind(5).merge(kind(4))
        with pytest.raises(InputError, match="not a state of these statistics: expected count, "):
            kind.from_state({"mean": np.ones(3)})
    with pytest.raises(InputError, match=r"the mean is \[3\], the squares \[2\]"):
        Moments.from_state({"count": np.array(2), "mean": np.ones(3), "squares": np.ones(2)})
    with pytest.raises(InputError, match="expected a square matrix"):
        SecondMoment.from_state({"count": np.array(2), "sum": np.ones((3, 2))})


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    import weft

    base = weft.Base.open(tiny.llama(tmp_path_factory.mktemp("base")))
    return base.model(), base.tokenizer()


def by_hand(model, tokenizer, texts, limit=None):
    """One text at a time, without padding."""
    modules = {name: model.get_submodule(name) for name in NAMES}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    for text in texts:
        ids = torch.tensor([opened(tokenizer, text)])
        for name, captured in capture(model, {"input_ids": ids}, modules, torch.ones_like(ids, dtype=torch.bool)).items():
            found[name].append(captured.inputs.double())
    return {name: torch.cat(each)[:limit] for name, each in found.items()}


@pytest.mark.parametrize("limit", [None, 31])
@pytest.mark.parametrize("size", [1, 4, 50])
def test_second_moments_over_texts(live, size, limit):
    model, tokenizer = live
    texts = tiny.texts(12)
    modules = {name: model.get_submodule(name) for name in NAMES}
    got = second_moments(model, tokenizer, iter(texts), modules, batch_size=size, limit_tokens=limit)
    want = by_hand(model, tokenizer, texts, limit)
    for name in NAMES:
        assert got[name].count == len(want[name]) == (limit or sum(len(opened(tokenizer, text)) for text in texts))
        matrix = want[name].T @ want[name] / len(want[name])
        assert float((got[name].matrix - matrix).norm()) <= 1e-5 * float(matrix.norm())


def test_long_texts_are_cut_and_reading_stops_at_the_limit(live):
    model, tokenizer = live
    modules = {NAMES[0]: model.get_submodule(NAMES[0])}
    assert second_moments(model, tokenizer, ["how many what is the far"] * 3, modules, max_length=4)[NAMES[0]].count == 12
    texts = iter(tiny.texts(40))
    second_moments(model, tokenizer, texts, modules, batch_size=2, limit_tokens=3)
    assert len(list(texts)) >= 34
    with pytest.raises(InputError, match="no token in the texts"):
        second_moments(model, tokenizer, ["", ""], modules)
    with pytest.raises(UsageError, match="must be 1 at least"):
        second_moments(model, tokenizer, ["how"], modules, limit_tokens=0)


def test_a_module_that_is_shared_between_layers_is_noticed(live):
    import copy

    model, tokenizer = copy.deepcopy(live[0]), live[1]
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    with pytest.raises(InputError, match="ran twice"):
        second_moments(model, tokenizer, tiny.texts(3), {NAMES[0]: model.get_submodule(NAMES[0])})
