"""16-bit products on processors that have none: as exact as they were, in forward and backward passes, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import weft
from tests.tiny import WORDS, llama
from weft import Base
from weft.checking import evaluate, generate
from weft.editing import edit
from weft.engine import products
from weft.engine.products import Widened, has_instructions, widened

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_instructions", lambda dtype: False)


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operators that arrive below `Widened`, with the dtype of their first tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = next((x for x in args if isinstance(x, torch.Tensor)), None)
        if first is not None:
            self.found.add((func.overloadpacket.__name__, first.dtype))
        return func(*args, **(kwargs or {}))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES: dict[str, tuple[str, Callable[..., torch.Tensor], list[tuple[int, ...]]]] = {
    "linear": ("addmm_", F.linear, [(2, 40, 96), (64, 96), (64,)]),
    "linear without bias": ("addmm_", F.linear, [(40, 96), (64, 96)]),
    "matmul": ("bmm", torch.matmul, [(3, 40, 96), (3, 96, 32)]),
    "baddbmm": ("baddbmm", torch.baddbmm, [(3, 40, 32), (3, 40, 96), (3, 96, 32)]),
    "scaled": ("addmm_", lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2.0), [(40, 32), (40, 96), (96, 32)]),
    "einsum": ("bmm", lambda a, b: torch.einsum("bij,kj->bik", a, b), [(2, 40, 96), (64, 96)]),
    "conv": ("convolution", F.conv2d, [(2, 12, 9, 9), (16, 12, 3, 3), (16,)]),
}


def results(case: str, dtype: torch.dtype, *, double: bool = False) -> list[torch.Tensor]:
    """The value and the gradients of a case; `double`: of the same numbers in float64."""
    _, function, shapes = CASES[case]
    inputs = [drawn(*shape, seed=k).to(dtype) for k, shape in enumerate(shapes)]
    inputs = [(x.double() if double else x).requires_grad_() for x in inputs]
    out = function(*inputs)
    upstream = drawn(*out.shape, seed=9).to(dtype)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_exact_ones_rounded_once(case: str, dtype: torch.dtype) -> None:
    exact = results(case, dtype, double=True)
    plain = results(case, dtype)
    with Seen() as seen, Widened(HALVES):
        wide = results(case, dtype)
    assert (CASES[case][0], torch.float32) in seen.found
    assert not any(found == dtype for name, found in seen.found if "mm" in name or "conv" in name)
    for e, p, w in zip(exact, plain, wide, strict=True):
        assert w.dtype == dtype and w.shape == e.shape
        # half a unit in the last place, and what float32 sums add to it where terms cancel
        assert bool(((w.double() - e).abs() <= e.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all())
        assert float((w.double() - e).norm()) <= 1.001 * float((p.double() - e).norm())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES)
def test_without_gradients_it_is_the_same(case: str, dtype: torch.dtype) -> None:
    with Widened(HALVES):
        expected = results(case, dtype)[0]
    _, function, shapes = CASES[case]
    with torch.inference_mode(), Seen() as seen, Widened(HALVES):
        found = function(*(drawn(*shape, seed=k).to(dtype) for k, shape in enumerate(shapes)))
    assert torch.equal(found, expected) and (CASES[case][0], torch.float32) in seen.found


@pytest.mark.parametrize("dtype", HALVES)
def test_large_matrices_are_multiplied_in_squares(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_SIDE", 16)
    a, b, c = drawn(40, 50, seed=1).to(dtype), drawn(70, 50, seed=2).to(dtype).T, drawn(70, seed=3).to(dtype)
    with Widened(HALVES):
        found = torch.addmm(c, a, b, beta=0.25, alpha=3), a @ b
    exact = 0.25 * c.double() + 3 * (a.double() @ b.double()), a.double() @ b.double()
    for x, e in zip(found, exact, strict=True):
        assert x.dtype == dtype and bool(((x.double() - e).abs() <= e.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_the_backward_pass_of_attention(dtype: torch.dtype) -> None:
    def grads(cast: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (drawn(2, 3, 20, 16, seed=n).to(dtype).to(cast).requires_grad_() for n in range(3))
        mask = torch.ones(20, 20, dtype=torch.bool).tril()
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).backward(drawn(2, 3, 20, 16, seed=4).to(dtype).to(cast))
        return [x.grad for x in (q, k, v)]  # type: ignore[misc]

    exact, plain = grads(torch.float64), grads(dtype)
    with Seen() as seen, Widened(HALVES):
        wide = grads(dtype)
    name = "_scaled_dot_product_flash_attention_for_cpu"
    assert {(name, dtype), (f"{name}_backward", torch.float32)} <= seen.found
    for e, p, w in zip(exact, plain, wide, strict=True):
        assert w.dtype == dtype and float((w.double() - e).norm()) <= 1.001 * float((p.double() - e).norm())


REFUSED: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "lengths": lambda dtype: F.linear(drawn(40, 1024).to(dtype), drawn(64, 2048).to(dtype)),
    "no length": lambda dtype: drawn(40, 0).to(dtype) @ drawn(50, 40).to(dtype),
    "a vector": lambda dtype: torch.mm(drawn(40, 30).to(dtype), drawn(30).to(dtype)),
    "batches": lambda dtype: torch.bmm(drawn(2, 40, 30).to(dtype), drawn(3, 30, 40).to(dtype)),
    "dtypes": lambda dtype: torch.mm(drawn(40, 30).to(dtype), drawn(30, 40)),
    "whole numbers": lambda dtype: torch.mm(drawn(40, 30).to(dtype), drawn(30, 40).long()),
    "bias": lambda dtype: torch.addmm(drawn(40), drawn(40, 30).to(dtype), drawn(30, 40).to(dtype)),
    "kernel": lambda dtype: F.conv1d(drawn(2, 40, 30).to(dtype), drawn(40, 40, 3)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_it_still_refuses_in_the_same_words(case: str, inference: bool) -> None:
    said = []
    for inside in (nullcontext(), Widened(HALVES)):
        with torch.inference_mode(inference), inside, pytest.raises(RuntimeError) as error:
            REFUSED[case](torch.bfloat16)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", HALVES)
def test_sparse_and_empty_matrices(dtype: torch.dtype) -> None:
    sparse, dense = drawn(40, 30).relu().to(dtype).to_sparse(), drawn(30, 40, seed=1).to(dtype)
    nothing, bias = torch.empty(40, 0, dtype=dtype), torch.full((40,), torch.nan, dtype=dtype)

    def results() -> list[torch.Tensor]:
        return [torch.mm(sparse, dense), nothing @ nothing.T, torch.addmm(bias, dense.T, dense, beta=0), torch.addmm(bias, dense.T, dense)]

    plain = results()
    with Widened(HALVES):
        wide = results()
    assert [x.dtype for x in wide] == [dtype] * 4 and not wide[1].any() and bool(wide[3].isnan().all())
    torch.testing.assert_close(wide, plain, equal_nan=True)


def test_other_dtypes_and_small_products_are_left_as_they_are() -> None:
    with Seen() as seen, Widened([torch.bfloat16]):
        drawn(40, 96).half() @ drawn(96, 40).half()
        drawn(40, 96).double() @ drawn(96, 40).double()
        drawn(3, 96).bfloat16() @ drawn(96, 40).bfloat16()
    assert {(name, dtype) for name, dtype in seen.found if name == "mm"} == {("mm", torch.float16), ("mm", torch.float64), ("mm", torch.bfloat16)}
    with Seen() as seen:
        with widened(nn.Linear(4, 4).bfloat16()):
            pass
        drawn(40, 96).bfloat16() @ drawn(96, 40).bfloat16()
    assert not any(dtype == torch.float32 for name, dtype in seen.found if "mm" in name)


def test_it_is_there_where_a_model_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4)
    assert isinstance(found := widened(half), Widened) and found.dtypes == {torch.bfloat16}
    assert isinstance(found := widened(single, autocast=True), Widened) and found.dtypes == {torch.bfloat16}
    assert isinstance(widened(single), nullcontext) and isinstance(widened(half.to("meta")), nullcontext)
    assert isinstance(widened(single.to("meta"), autocast=True), nullcontext)
    monkeypatch.setattr(products, "has_instructions", lambda dtype: dtype == torch.bfloat16)
    assert isinstance(widened(nn.Linear(4, 4).bfloat16()), nullcontext) and isinstance(widened(nn.Linear(4, 4).half()), Widened)


@pytest.mark.parametrize(
    ("found", "bf16", "f16"),
    [
        ({"architecture": "x86_64", "avx2": True}, False, False),
        ({"architecture": "x86_64", "avx512_bf16": True, "avx512_fp16": False}, True, False),
        ({"architecture": "x86_64", "amx_bf16": True, "avx512_fp16": True}, True, True),
        ({"architecture": "aarch64"}, True, True),
    ],
)
def test_what_processors_say(found: dict[str, Any], bf16: bool, f16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert [has_instructions.__wrapped__(dtype) for dtype in HALVES] == [bf16, f16]  # type: ignore[attr-defined]


ROWS = [{"text": " ".join(WORDS[(3 * k + j * j) % 7] for j in range(20))} for k in range(16)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_tuning_is_the_same_up_to_rounding(attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Base.open(llama(tmp_path / "m"))
    losses: dict[bool, list[float]] = {}
    for plain in (True, False):
        monkeypatch.setattr(products, "has_instructions", lambda dtype, plain=plain: plain)
        heard: list[dict[str, Any]] = []
        model: Any = checkpoint.model(dtype="bfloat16")
        model.set_attn_implementation(attention)
        with Seen() as seen:
            how: dict[str, Any] = {"tokenizer": checkpoint.tokenizer(), "progress": heard.append, "steps": 12, "batch_size": 8, "lr": 1e-2}
            weft.tune(Base.of(model), ROWS, method="lora", objective="causal-lm", **how)
        losses[plain] = [event["loss"] for event in heard if event["event"] == "step"]
        assert (("addmm_", torch.float32) in seen.found) is not plain
    assert losses[True][-1] < losses[True][0] - 0.5
    assert losses[False] == pytest.approx(losses[True], rel=0.02)


def test_flex_attention_is_left_alone(tmp_path: Path) -> None:
    model: Any = Base.open(llama(tmp_path / "m")).model(dtype="bfloat16")
    assert isinstance(widened(model), Widened)
    model.set_attn_implementation("flex_attention")
    assert isinstance(widened(model), nullcontext)


def test_an_edit_is_made_so_and_a_text(tmp_path: Path) -> None:
    base = Base.open(llama(tmp_path / "m"))
    with Seen() as seen:
        edit(base, [{"prompt": "who was the", "target_new": "city", "subject": "the"}], "ultraedit", dtype="bfloat16", sites="mlp.down")
    assert ("addmm_", torch.float32) in seen.found
    with Seen() as seen:
        generate(base, [], " ".join(WORDS), dtype="bfloat16", max_new_tokens=2)
    assert ("addmm_", torch.float32) in seen.found


def test_autocast_is_widened(tmp_path: Path) -> None:
    base = Base.open(llama(tmp_path / "m"))
    with Seen() as seen:
        weft.tune(base, ROWS, method="lora", objective="causal-lm", steps=1, batch_size=8, autocast=True)
    assert ("addmm_", torch.float32) in seen.found and not any(dtype == torch.bfloat16 for name, dtype in seen.found if name == "addmm")


def test_a_check_is_the_same_up_to_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base.open(llama(tmp_path / "m"))
    found = {}
    for plain in (True, False):
        monkeypatch.setattr(products, "has_instructions", lambda dtype, plain=plain: plain)
        with Seen() as seen:
            found[plain] = evaluate(base, [], ROWS, dtype="bfloat16")["metrics"]
        assert (("addmm_", torch.float32) in seen.found) is not plain
    assert found[False] == pytest.approx(found[True], rel=0.02)
