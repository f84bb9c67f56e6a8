"""Faster float32 products: chosen, told with their error, and gone after the run."""

from __future__ import annotations

import io

import pytest
import torch

from tests.test_loop import make
from weft.engine.events import Event, Events, PlainProgress
from weft.engine.loop import train
from weft.engine.products import products, relative_error
from weft.errors import WeftError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_before() -> None:
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_run_is_computed_as_chosen_and_says_how_exactly() -> None:
    seen: list[Event] = []
    inside: list[str] = []

    def hear(event: Event) -> None:
        seen.append(event)
        inside.append(torch.get_float32_matmul_precision())

    with Events(progress=hear) as events:
        train(make(matmul="medium"), events)
    assert set(inside[:-1]) == {"medium"} and torch.get_float32_matmul_precision() == "highest"
    assert 1e-9 < seen[0]["matmul_error"] < 1e-2


def test_nothing_is_said_or_changed_where_nothing_is_chosen() -> None:
    seen: list[Event] = []
    with Events(progress=seen.append) as events:
        train(make(), events)
    assert "matmul_error" not in seen[0]


def test_the_error_is_that_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = relative_error(CPU)
    assert 1e-9 < exact < 1e-5
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.matmul(a.bfloat16().to(a.dtype), b) if a.dtype == torch.float32 else torch.matmul(a, b))
    assert 100 * exact < relative_error(CPU) < 1e-2


def test_an_error_gives_the_switch_back() -> None:
    with pytest.raises(WeftError), products("high", CPU):
        raise WeftError("stop")
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_plain_line_tells_it_at_once() -> None:
    out = io.StringIO()
    PlainProgress(stream=out)({"event": "start", "time": 0.1, "matmul_error": 3.7e-7})
    assert out.getvalue() == "float32 products have a relative error of 3.7e-07 on this machine\n"
