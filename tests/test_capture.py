"""Capture against plain autograd, and what it must not do: weight gradients, graph below, work above."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weft.engine.capture import capture, outputs
from weft.errors import InputError, UsageError, WeftError

from . import tiny

UP = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_proj")


def llama(dtype: torch.dtype = torch.float64) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=40, initializer_range=0.3, **shape)).to(dtype).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(4)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)).double().eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def rows() -> torch.Tensor:
    chosen = torch.zeros(3, 7, dtype=torch.bool)
    chosen[0, 2:4] = chosen[1, 4] = chosen[2, 0] = chosen[2, 4:6] = True
    return chosen


def loss(logits: torch.Tensor) -> torch.Tensor:
    """Of every token that has one before it, so that gradients reach every row."""
    made = batch()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), made["input_ids"][:, 1:].flatten(), reduction="sum")


def of(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in names}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("make", "names"), [(llama, UP), (gpt2, ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj", "transformer.h.1.attn.c_attn"))])
def test_rows_make_the_weight_gradient_of_autograd(make, names, training):
    model = make().train(training)
    modules = of(model, names)
    everything = torch.ones(3, 7, dtype=torch.bool)
    torch.manual_seed(0)  # GPT-2 drops out while it trains
    found = capture(model, batch(), modules, everything, loss=loss)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(m.training is training for m in model.modules())
    torch.manual_seed(0)
    loss(model(**batch()).logits).backward()
    for name, module in modules.items():
        inputs, grads = found[name].inputs, found[name].grads
        assert inputs.dtype == grads.dtype == torch.float32 and not inputs.requires_grad and not grads.requires_grad
        product = grads.T @ inputs if isinstance(module, nn.Linear) else inputs.T @ grads
        assert float((product - module.weight.grad).norm()) <= 2e-6 * float(module.weight.grad.norm())


def test_rows_are_in_row_major_order_and_single():
    model = llama()
    whole = capture(model, batch(), of(model, UP), torch.ones(3, 7, dtype=torch.bool), loss=loss)
    some = capture(model, batch(), of(model, UP), rows(), loss=loss)
    where = rows().flatten()
    for name in UP:
        assert some[name].inputs.shape[0] == 6
        assert torch.equal(some[name].inputs, whole[name].inputs[where]) and torch.equal(some[name].grads, whole[name].grads[where])
        assert float(some[name].grads.norm(dim=1).min()) > 0
    none = capture(model, batch(), of(model, UP), torch.zeros(3, 7, dtype=torch.bool), loss=loss)
    assert [tuple(none[name].grads.shape) for name in UP] == [(0, 48), (0, 32), (0, 48)]


def test_other_modules_do_not_matter_and_the_same_one_twice_is_the_same():
    model = llama()
    alone = capture(model, batch(), of(model, UP[1:2]), rows(), loss=loss)[UP[1]]
    again = capture(model, batch(), {**of(model, UP), "again": model.get_submodule(UP[1])}, rows(), loss=loss)
    for found in (again[UP[1]], again["again"]):
        assert torch.equal(found.inputs, alone.inputs)
        assert torch.allclose(found.grads, alone.grads, rtol=1e-6, atol=0)


class Seen:
    """Which modules ran, and whether what they gave had a graph."""

    def __init__(self, model: nn.Module) -> None:
        self.graph: dict[str, bool] = {}
        self._hooks = [module.register_forward_hook(self._note(name)) for name, module in model.named_modules()]

    def _note(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, y: Any) -> None:
            first = y if isinstance(y, torch.Tensor) else y[0]
            self.graph[name] = first.grad_fn is not None

        return hook


def test_there_is_no_graph_below_the_lowest_module():
    model = llama()
    seen = Seen(model)
    capture(model, batch(), of(model, UP[1:]), rows(), loss=loss)
    assert not any(graph for name, graph in seen.graph.items() if name.startswith(("model.layers.0", "model.layers.1.self_attn", "model.embed")))
    assert not seen.graph["model.layers.1.mlp.up_proj"] and seen.graph["lm_head"]


def test_parameters_that_need_no_gradient_still_do_not():
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]

    def bad(logits: torch.Tensor) -> torch.Tensor:
        assert not any(p.requires_grad for p in model.parameters())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        capture(model, batch(), of(model, UP), rows(), loss=bad)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks for m in model.modules())


def test_without_a_loss_the_forward_ends_at_the_last_module():
    model = llama()
    with_loss = capture(model, batch(), of(model, UP[:1]), rows(), loss=loss)[UP[0]]
    seen = Seen(model)
    found = capture(model, batch(), of(model, UP[:1]), rows())[UP[0]]
    assert found.grads is None and torch.equal(found.inputs, with_loss.inputs)
    assert "model.layers.0.mlp.gate_proj" in seen.graph and not any(name.startswith(("model.layers.1", "lm_head", "model.norm")) for name in seen.graph)
    seen.graph.clear()
    capture(model, batch(), of(model, UP[:1]), rows(), whole=True)
    assert seen.graph["lm_head"] is False  # it ran, and nothing had a graph
    before = model(**batch()).logits
    assert torch.equal(before, llama()(**batch()).logits)  # nothing of it stayed


def test_under_no_grad_with_checkpointing_and_in_bfloat16():
    model = llama()
    expected = capture(model, batch(), of(model, UP), rows(), loss=loss)
    model.train()
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        found = capture(model, batch(), of(model, UP), rows(), loss=loss)
    assert all(torch.equal(found[name].grads, expected[name].grads) for name in UP)
    assert model.is_gradient_checkpointing
    half = llama(torch.bfloat16)
    rough = capture(half, batch(), of(half, UP), rows(), loss=loss)
    for name in UP:
        assert rough[name].grads.dtype == torch.float32
        assert float((rough[name].grads - expected[name].grads).norm()) <= 0.1 * float(expected[name].grads.norm())


class Inplace(nn.Module):
    """Writes into what its linear modules gave, and runs them on flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.table, self.one, self.two, self.idle = nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, times: int = 1, inplace: bool = True) -> torch.Tensor:
        x = self.table(input_ids).flatten(0, 1)
        for _ in range(times):
            x = self.one(x)
            x = x.mul_(3) if inplace else x * 3
            x = self.two(input=x)
            x = x.tanh_() if inplace else x.tanh()
        return x.reshape(*input_ids.shape, 8)


def test_what_is_written_into_afterwards_and_flattened_tokens():
    model = Inplace()
    ids = {"input_ids": batch()["input_ids"]}
    modules = {"one": model.one, "two": model.two}
    found = capture(model, ids, modules, rows(), loss=lambda y: y.square().sum())
    plain = capture(model, {**ids, "inplace": False}, modules, rows(), loss=lambda y: y.square().sum())
    for name in modules:
        assert torch.allclose(found[name].grads, plain[name].grads, rtol=1e-6) and torch.allclose(found[name].inputs, plain[name].inputs)
    model(**ids, inplace=False).square().sum().backward()
    whole = capture(model, ids, modules, torch.ones(3, 7, dtype=torch.bool), loss=lambda y: y.square().sum())
    assert torch.allclose(whole["one"].grads.T @ whole["one"].inputs, model.one.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_module_that_runs_twice_or_not_at_all_is_named():
    model = Inplace()
    ids = {"input_ids": batch()["input_ids"]}
    with pytest.raises(InputError, match="one ran twice"):
        capture(model, {**ids, "times": 2}, {"one": model.one}, rows(), loss=lambda y: y.sum())
    with pytest.raises(InputError, match="one ran twice"):
        capture(model, {**ids, "times": 2}, {"one": model.one}, rows(), whole=True)
    for how in ({"loss": lambda y: y.sum()}, {}):
        with pytest.raises(InputError, match="1 of 2 modules did not run: idle"):
            capture(model, ids, {"one": model.one, "idle": model.idle}, rows(), **how)
    with pytest.raises(InputError, match="Linear did not run"):
        outputs(model, ids, model.idle, rows())
    assert not any(m._forward_hooks for m in model.modules())


def test_what_cannot_be_is_told():
    model = llama()
    modules = of(model, UP)
    with pytest.raises(UsageError, match="no modules"):
        capture(model, batch(), {}, rows())
    with pytest.raises(UsageError, match="rows must be booleans"):
        capture(model, batch(), modules, rows().long())
    with pytest.raises(InputError, match=r"was given \[3, 7, 32\]; expected \[3, 6, d\]"):
        capture(model, batch(), modules, rows()[:, :6])
    with pytest.raises(InputError, match="layer gave a tuple; expected"):
        capture(model, batch(), {"layer": model.model.layers[0].self_attn}, rows(), loss=loss)
    with pytest.raises(WeftError, match=r"one finite number, got the shape \[3, 7, 40\]"):
        capture(model, batch(), modules, rows(), loss=lambda logits: logits)
    with pytest.raises(WeftError, match="one finite number, got nan"):
        capture(model, batch(), modules, rows(), loss=lambda logits: logits.sum() * float("nan"))
    with pytest.raises(WeftError, match="the loss does not depend on model"):
        capture(model, batch(), modules, rows(), loss=lambda logits: logits.new_ones(()))


@pytest.mark.parametrize("mode", ["materialised", "functional", "fast"])
def test_deltas_on_the_model_take_part(tmp_path, mode):
    import weft

    base = weft.Base.open(tiny.llama(tmp_path / "base"))
    names = ("up_proj.weight", "down_proj.weight", "q_proj.weight")
    delta = weft.Delta.load(tiny.lowrank(base.path, tmp_path / "d.safetensors", names=names))
    made = {"input_ids": batch()["input_ids"] % 20, "attention_mask": batch()["attention_mask"]}

    def found(model: Any) -> Any:
        return capture(model, made, of(model, UP[:2]), rows(), loss=lambda logits: logits.logsumexp(-1).sum())

    plain, folded, attached = base.model(), base.model(), base.model()
    weft.attach(folded, delta, base=base, mode="materialised")
    weft.attach(attached, delta, base=base, mode=mode)
    if mode == "fast":
        attached.train()  # so that the delta's own tensors are among those frozen
    want, got, without = found(folded), found(attached), found(plain)
    for name in UP[:2]:
        for one, two, far in ((want[name].inputs, got[name].inputs, without[name].inputs), (want[name].grads, got[name].grads, without[name].grads)):
            assert float((one - two).norm()) <= 1e-4 * float(one.norm()) < float((one - far).norm())


def test_outputs_of_a_block_and_a_linear():
    for model, path, index in ((llama(), "model.layers.0", 1), (gpt2(), "transformer.h.0", 1)):
        want = model(**batch(), output_hidden_states=True).hidden_states[index]
        seen = Seen(model)
        got = outputs(model, batch(), model.get_submodule(path), rows())
        assert torch.equal(got, want[rows()].float()) and got.grad_fn is None and got.dtype == torch.float32 and len(got) == 6
        assert "lm_head" not in seen.graph and not any(".1." in name for name in seen.graph if name.startswith(("model.layers", "transformer.h")))
    model = llama()
    attention = outputs(model, batch(), model.model.layers[0].self_attn, rows())  # which gives a tuple
    assert attention.shape == (6, 32)
    flat = Inplace()  # which runs its modules on flattened tokens
    ids = {"input_ids": batch()["input_ids"]}
    assert torch.equal(outputs(flat, ids, flat.one, rows()), flat.one(flat.table(ids["input_ids"]))[rows()].detach())
    with pytest.raises(InputError, match="Odd gave a int; expected"):

        class Odd(nn.Module):
            def forward(self, input_ids: torch.Tensor) -> int:
                return 3

        outputs(odd := Odd(), {"input_ids": torch.zeros(1, 1)}, odd, rows())
