"""A quantised frozen base: what is kept in fewer bits, what works on top of it, what is refused. torchao itself where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests import tiny
from weft.attaching import attach
from weft.attaching.quantized import QuantizedLinear, values
from weft.base import Base
from weft.cli import main
from weft.delta import Delta
from weft.engine import quantizing
from weft.engine.quantizing import quantize
from weft.errors import MissingExtra, UsageError
from weft.tuning import tune

ROWS = [{"text": " ".join(tiny.WORDS[(k * j + k) % 20] for j in range(4 + k % 5)), "label": tiny.LABELS[k % 3]} for k in range(16)]
QUICK: dict[str, Any] = {"batch_size": 8, "steps": 6, "lr": 0.01, "progress": lambda event: None}


class Bytes(torch.Tensor):
    """As torchao makes them: looks like float32 to the outside, holds eight bits and a scale a row."""

    qdata: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, qdata: torch.Tensor, scale: torch.Tensor) -> Bytes:
        made = torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype)  # type: ignore[attr-defined]
        made.qdata, made.scale = qdata, scale
        return made  # type: ignore[no-any-return]

    @classmethod
    def of(cls, w: torch.Tensor) -> Bytes:
        scale = w.abs().amax(1, keepdim=True) / 127
        return cls((w / scale).round().to(torch.int8), scale)

    def dequantize(self) -> torch.Tensor:
        return self.qdata.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Bytes(args[0].qdata, args[0].scale)
        raise NotImplementedError(f"nobody but `values` may look into a quantised weight, and {func} does")


@pytest.fixture(params=["stub", "int8", "nf4"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "stub":
        pytest.importorskip("torchao")
        return str(request.param)
    module = ModuleType("torchao")
    monkeypatch.setitem(sys.modules, "torchao", module)
    monkeypatch.setattr(quantizing, "version", lambda name: "0.0")
    monkeypatch.setitem(quantizing.KINDS, "int8", Bytes.of)
    return "int8"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"llama": tiny.llama(root / "llama"), "bert": tiny.bert(root / "bert"), "gpt2": tiny.gpt2(root / "gpt2")}


def nbytes(w: torch.Tensor) -> int:
    held = [value for value in vars(w).values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in held)


def test_bits_are_fewer_and_outputs_close(folders: dict[str, Path], kind: str) -> None:
    plain, small = (Base.open(folders["llama"]).model() for _ in range(2))
    about = quantize(small, kind, ())
    chosen = [m for m in small.modules() if isinstance(m, QuantizedLinear)]
    assert about["kind"] == kind and about["tensors"] == len(chosen) == 14  # not the output over the vocabulary
    assert type(small.get_output_embeddings()) is torch.nn.Linear  # type: ignore[operator]
    bits = 8 * sum(nbytes(m.weight) for m in chosen) / sum(m.weight.numel() for m in chosen)
    assert bits < (10.5 if kind == "int8" else 7.0)  # tiny matrices: scales and tables weigh more than they do in real ones
    limit = 0.01 if kind == "int8" else 0.11
    for path, module in small.named_modules():
        if isinstance(module, QuantizedLinear):
            whole, x = plain.get_submodule(path), torch.randn(50, module.in_features)
            w = whole.weight.detach()  # type: ignore[union-attr]
            assert 0 < float((values(module.weight) - w).norm()) < limit * float(w.norm())  # type: ignore[arg-type]
            assert 0 < float((module(x) - whole(x)).norm()) < limit * float(whole(x).norm())


def test_the_graph_keeps_no_decoded_weight(folders: dict[str, Path], kind: str) -> None:
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(64, 256, bias=False), torch.nn.Linear(256, 64))
    inner.requires_grad_(False)
    quantize(inner, kind, ())
    x = torch.randn(2, 64, requires_grad=True)
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        y = inner(x)
    assert max(kept, default=0) < 64 * 256
    weight = torch.randn(2, 64)
    (y * weight).sum().backward()
    first, last = (values(inner[k].weight) for k in (0, 1))  # type: ignore[arg-type]
    torch.testing.assert_close(x.grad, weight @ last @ first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("space", ["lora", "dora", "bitfit", "pst", "ssf"])
def test_tuning_on_top_comes_close_to_tuning_without(folders: dict[str, Path], kind: str, space: str) -> None:
    """Fast (lora), on materialised weights (dora), on norms alone, with importance from gradients, and on weight and bias."""
    options: dict[str, Any] = {"lora": {"rank": 4}, "dora": {"rank": 4, "dora": True}, "bitfit": {"norms": True}}.get(space, {})
    method = "lora" if space == "dora" else space
    losses: dict[str, list[float]] = {}
    for how in ("", kind):
        seen: list[float] = []

        def progress(event: dict[str, Any], seen: list[float] = seen) -> None:
            if event["event"] == "step":
                seen.append(event["loss"])

        delta = tune(folders["llama"], ROWS, method=method, quantize=how or None, **{**QUICK, **options, "progress": progress})
        losses[how] = seen
        assert ("quantize" in delta.recipe) == bool(how)
    first = slice(4)  # after that PST, which picks entries, may pick others
    assert losses[kind][first] == pytest.approx(losses[""][first], rel=0.02 if kind == "int8" else 0.1)
    assert losses[kind] != losses[""] and losses[kind][-1] < losses[kind][0]
    assert delta.recipe["quantize"]["tensors"] == 14 and {t.dtype for t in delta.tensors.values()} <= {"F32", "I64", "I32"}
    attach(Base.open(folders["llama"]).model(), delta, base=Base.open(folders["llama"]))  # it belongs to the base as it is stored


def test_heads_stay_whole_and_resume_is_exact(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    options = {**QUICK, "objective": "classification", "quantize": kind, "rank": 2}
    whole = tune(folders["bert"], ROWS, **options)
    assert {"classifier.weight", "classifier.bias"} <= set(whole.entries)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "save" and event["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(folders["bert"], ROWS, out=tmp_path / "d.safetensors", save_every=2, **{**options, "progress": stop})
    assert tune(folders["bert"], ROWS, resume=tmp_path / "d.safetensors.state", **options).id == whole.id
    assert tune(folders["bert"], ROWS, **{**options, "quantize": None}).id != whole.id


def test_checkpointing_and_autocast_go_with_it(folders: dict[str, Path], kind: str) -> None:
    one, two = (tune(folders["llama"], ROWS, quantize=kind, checkpointing=on, rank=2, **QUICK) for on in (False, True))
    assert {key: t.sha256 for key, t in one.tensors.items()} == {key: t.sha256 for key, t in two.tensors.items()}
    three = tune(folders["llama"], ROWS, quantize=kind, autocast=True, rank=2, **QUICK)
    assert three.notes["loss"] == pytest.approx(one.notes["loss"], rel=0.05)


def test_a_delta_may_be_made_over_others(folders: dict[str, Path], kind: str) -> None:
    first = tune(folders["llama"], ROWS, rank=4, **QUICK)
    losses: list[float] = []
    options = {**QUICK, "progress": lambda e: losses.append(e["loss"]) if e["event"] == "step" else None}
    second = tune(folders["llama"], ROWS, on=[first], quantize=kind, rank=2, **options)
    tune(folders["llama"], ROWS, on=[first], rank=2, **options)
    assert second.over == (first.id,) and losses[0] == pytest.approx(losses[6], rel=0.02 if kind == "int8" else 0.1)


@pytest.mark.parametrize(("method", "said"), [("full", "trains the weights themselves"), ("lisa", "trains the weights themselves"), ("lt-sft", "own weights")])
def test_what_needs_the_weights_is_refused(folders: dict[str, Path], kind: str, method: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tune(folders["llama"], ROWS, method=method, quantize=kind, **QUICK)


def test_other_models_are_refused(folders: dict[str, Path], kind: str) -> None:
    with pytest.raises(UsageError, match="no linear modules"):
        tune(folders["gpt2"], ROWS, quantize=kind, **QUICK)  # its matrices are Conv1D
    base = Base.open(folders["llama"])
    with pytest.raises(UsageError, match="live model"):
        tune(Base.of(base.model()), ROWS, quantize=kind, tokenizer=base.tokenizer(), **QUICK)
    with pytest.raises(UsageError, match="unknown form of quantisation 'int3'"):
        tune(folders["llama"], ROWS, quantize="int3", **QUICK)


def test_a_missing_torchao_is_one_sentence(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingExtra, match="torchao") as caught:
        tune(folders["llama"], ROWS, quantize="int8", **QUICK)
    assert caught.value.hint == "pip install 'weft[quant]'"


def test_the_command_line_quantises(folders: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "how many is the river"}\n' * 4)
    words = ["tune", str(folders["llama"]), "--data", str(tmp_path / "t.jsonl"), "-o", str(tmp_path / "d.safetensors"), "-p", "steps=2"]
    assert main([*words, "--quantize", kind]) == 0, capsys.readouterr().err
    assert Delta.load(tmp_path / "d.safetensors").recipe["quantize"]["kind"] == kind
