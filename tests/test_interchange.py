"""Interchange: adapters made by PEFT give the same logits as deltas, and come back as adapters that PEFT loads."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from weft.base import Base
from weft.delta import Builder, Delta
from weft.errors import FormatError, InputError, MismatchError, WeftError
from weft.folding import fold
from weft.interchange import export, import_peft, lint_vllm, probe
from weft.interchange.blocks import Block, joined
from weft.ops import At, Generator
from weft.ops.spec import OpEntry, Term

TOKENS = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZE, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 32}
IDS = torch.tensor([[3, 17, 5, 40, 1, 60, 22, 9], [8, 2, 33, 33, 4, 51, 7, 6]])

Make = Callable[[], Any]


def llama(**changes: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA, "tie_word_embeddings": False, **changes}))


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def mixtral() -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2))


def gpt_oss() -> Any:
    """Experts stored stacked, and as (inputs, outputs)."""
    config = hf.GptOssConfig(**{**LLAMA, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2})
    return hf.GptOssForCausalLM(config)


def qwen3_moe() -> Any:
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**LLAMA, head_dim=8, moe_intermediate_size=24, num_experts=3, num_experts_per_tok=2))


def bert() -> Any:
    return hf.BertForMaskedLM(hf.BertConfig(**SIZE, **TOKENS, max_position_embeddings=32))


def bare_bert() -> Any:
    return hf.BertModel(hf.BertConfig(**SIZE, **TOKENS, max_position_embeddings=32))


def saved(make: Make, folder: Path) -> Any:
    torch.manual_seed(1)
    model = make().eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():  # biases start at zero and norms at one: no test runs there
            parameter.normal_(1.0 if "norm" in name.lower() or "ln_" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


def randomised(model: Any) -> Any:
    """All that was trained, away from where it started."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                if "magnitude" in name:
                    parameter.mul_(torch.rand_like(parameter) + 0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def folded(base: Base, delta: Delta, out: Path) -> Any:
    fold(base, [delta], out)
    return Base.open(out).model(dtype="float32").eval()


CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "llama": (llama, {"target_modules": ["q_proj", "k_proj", "down_proj", "lm_head"]}),
    "all-linear": (llama, {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 5, "^model.layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"1.*up_proj": 9},
        },
    ),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_dora": True}),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied-embedding": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"]}),
    "tied-head": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head", "o_proj"]}),
    "tied-both": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens", "lm_head"]}),
    "kept-tied": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "saved-tied": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["q_proj"], "trainable_token_indices": [40, 3]}),
    "bias": (lambda: llama(attention_bias=True), {"target_modules": ["q_proj"], "bias": "all"}),
    "lora-bias": (lambda: llama(attention_bias=True), {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "gpt2-dora": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "mixtral": (mixtral, {"target_modules": ["q_proj", "v_proj"]}),
    "experts": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
            "rank_pattern": {"experts.down_proj": 3},
        },
    ),
    "stacked": (gpt_oss, {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "qwen3": (qwen3_moe, {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
}


def trained(make: Make, settings: dict[str, Any], tmp: Path) -> tuple[Any, Path]:
    """A base in tmp/base and an adapter on it in tmp/adapter; the live PEFT model."""
    torch.manual_seed(3)
    model = randomised(peft.get_peft_model(saved(make, tmp / "base"), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings})))
    model.save_pretrained(tmp / "adapter")
    return model, tmp / "adapter"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_keeps_its_logits_both_ways(case: str, tmp_path: Path) -> None:
    """PEFT's adapter, imported and folded; saved, exported and loaded by PEFT again."""
    make, settings = CASES[case]
    model, adapter = trained(make, settings, tmp_path)
    base = Base.open(tmp_path / "base")
    delta = import_peft(adapter, base)
    assert delta.save(tmp_path / "delta.safetensors") == Delta.load(tmp_path / "delta.safetensors").id
    want = logits(model)
    assert (logits(base.model()) - want).abs().max() > 1e-2
    torch.testing.assert_close(logits(folded(base, delta, tmp_path / "folded")), want, atol=1e-5, rtol=1e-5)
    if case == "tokens":
        return  # rows of an embedding come in, but do not go out: see the refusals below
    export(delta, tmp_path / "again", base)
    torch.testing.assert_close(peft_logits(tmp_path / "again", base), want, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["tied-head", "experts", "tokens"])
def test_probe_runs_what_peft_wrote(case: str, tmp_path: Path) -> None:
    make, settings = CASES[case]
    model, adapter = trained(make, settings, tmp_path)
    base = Base.open(tmp_path / "base")
    tokens = torch.arange(1, 17).reshape(1, -1) * 7 % 60 + 1
    moved = (logits(model, tokens) - logits(base.model(), tokens)).abs().max().item()
    done = probe(adapter, base)
    assert done["keys"] == len(load_file(adapter / "adapter_model.safetensors"))
    assert probe(adapter, base, inputs={"input_ids": tokens})["max_change"] == pytest.approx(moved, abs=1e-5)


# --- more ways in


@pytest.mark.parametrize("make", [bert, bare_bert])
def test_heads_are_added_with_their_labels(make: Make, tmp_path: Path) -> None:
    """On a base with another head, and on one without a head and without the prefix that the trained model's names have."""
    saved(make, tmp_path / "base")
    base = Base.open(tmp_path / "base")
    torch.manual_seed(4)
    raw = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "dense"], modules_to_save=["bert.pooler"], exclude_modules=[".*pooler.*"])
    model = randomised(peft.get_peft_model(raw, settings))
    model.save_pretrained(tmp_path / "adapter")
    delta = import_peft(tmp_path / "adapter", base)
    assert delta.entries["classifier.weight"].change.kind == "add"
    assert delta.config["architectures"] == ["BertForSequenceClassification"]
    result = folded(base, delta, tmp_path / "folded")
    assert result.config.num_labels == 5
    torch.testing.assert_close(logits(result), logits(model), atol=1e-5, rtol=1e-5)
    done = export(delta, tmp_path / "again", base)
    assert done.saved == ("bert.pooler", "classifier") and read(done.folder)["task_type"] == "SEQ_CLS"
    fresh = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "again").eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    assert probe(tmp_path / "again", base)["max_change"] > 1e-3


def read(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1)
        self.point = nn.Conv2d(6, 10, 1)
        self.out = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.point(self.first(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_of_a_plain_module(dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(5)
    plain = Pictures().eval()
    base = Base.of(plain)
    x = torch.randn(2, 3, 9, 9)
    wrapped = Pictures()
    wrapped.load_state_dict(plain.state_dict())
    model = randomised(peft.get_peft_model(wrapped, peft.LoraConfig(r=2, target_modules=["first", "point", "out"], use_dora=dora)))
    model.save_pretrained(tmp_path / "adapter")
    delta = import_peft(tmp_path / "adapter", base)
    want = model(x)
    again = Pictures()
    again.load_state_dict(
        {name: torch.from_numpy(np.array(delta.apply(name, w.numpy()))) if name in delta.entries else w for name, w in plain.state_dict().items()}
    )
    torch.testing.assert_close(again(x), want, atol=1e-5, rtol=1e-5)
    export(delta, tmp_path / "again", base)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(plain, tmp_path / "again").eval()(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("make", "start"), [(llama, "pissa"), (llama, "olora"), (llama, "pissa_niter_2"), (gpt2, "pissa")])
def test_starts_that_change_the_base(make: Make, start: str, tmp_path: Path) -> None:
    """The adapter as it is, converted by PEFT, or with the start beside it: three ways to the same delta."""
    target = ["q_proj", "down_proj"] if make is llama else ["c_attn", "c_proj"]
    model = peft.get_peft_model(saved(make, tmp_path / "base"), peft.LoraConfig(r=4, lora_alpha=6, target_modules=target, init_lora_weights=start))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    randomised(model)
    model.save_pretrained(tmp_path / "raw")
    want = logits(model)
    base = Base.open(tmp_path / "base")
    with_start = import_peft(tmp_path / "raw", base, initial=tmp_path / "start")
    torch.testing.assert_close(logits(folded(base, with_start, tmp_path / "a")), want, atol=1e-4, rtol=1e-4)
    if "niter" in start:
        with pytest.raises(InputError, match=r"pissa_niter_2.*cannot be computed again"):
            import_peft(tmp_path / "raw", base)
    else:
        recomputed = import_peft(tmp_path / "raw", base)
        torch.testing.assert_close(logits(folded(base, recomputed, tmp_path / "b")), want, atol=1e-4, rtol=1e-4)
    done = export(with_start, tmp_path / "converted", base)
    assert done.rank == 8
    again = peft.PeftModel.from_pretrained(base.model(dtype="float32"), tmp_path / "converted").eval()
    torch.testing.assert_close(logits(again), want, atol=1e-4, rtol=1e-4)
    with pytest.raises(MismatchError, match=r"not where .* started"):
        import_peft(tmp_path / "converted", base, initial=tmp_path / "start")


def test_experts_named_one_by_one(tmp_path: Path, rng: np.random.Generator) -> None:
    """Adapters of the time when experts were modules name them as the checkpoint does; only some experts need be there."""
    saved(mixtral, tmp_path / "base")
    base = Base.open(tmp_path / "base")
    tensors = {}
    for name in ("block_sparse_moe.experts.1.w1", "block_sparse_moe.experts.2.w2", "self_attn.k_proj"):
        rows, columns = base.tensor(f"model.layers.0.{name}.weight").shape
        tensors[f"base_model.model.model.layers.0.{name}.lora_A.weight"] = rng.normal(size=(2, columns)).astype(np.float32)
        tensors[f"base_model.model.model.layers.0.{name}.lora_B.weight"] = rng.normal(size=(rows, 2)).astype(np.float32)
    folder = adapter_folder(tmp_path / "old", tensors, r=2, lora_alpha=1)
    delta = import_peft(folder, base)
    want = logits(folded(base, delta, tmp_path / "folded"))
    name = "model.layers.0.block_sparse_moe.experts.2.w2"
    change = delta.apply(f"{name}.weight", base.tensor(f"{name}.weight").read()) - base.tensor(f"{name}.weight").read()
    product = tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
    np.testing.assert_allclose(change, 0.5 * product, atol=1e-5)
    export(delta, tmp_path / "new", base)
    assert read(tmp_path / "new")["target_parameters"] == ["model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"]
    again = peft.PeftModel.from_pretrained(base.model(dtype="float32"), tmp_path / "new").eval()
    torch.testing.assert_close(logits(again), want, atol=1e-5, rtol=1e-5)


def adapter_folder(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir()
    save_file({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **config}))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_comes_with_the_adapter(tied: bool, tmp_path: Path) -> None:
    model = saved(lambda: llama(tie_word_embeddings=tied), tmp_path / "base")
    base = Base.open(tmp_path / "base")
    model.resize_token_embeddings(66, mean_resizing=False)
    model = randomised(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    delta = import_peft(tmp_path / "adapter", base)
    assert delta.config == {"vocab_size": 66} and delta.entries["model.embed_tokens.weight"].change.kind == "replace"
    result = folded(base, delta, tmp_path / "folded")
    torch.testing.assert_close(logits(result, IDS + 5), logits(model, IDS + 5), atol=1e-5, rtol=1e-5)
    with pytest.raises(MismatchError, match="a replace entry changes the model's structure"):
        export(delta, tmp_path / "again", base)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    """A checkpoint without a config: the model is given."""
    torch.manual_seed(6)
    plain = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    (tmp_path / "base").mkdir()
    save_file(plain.state_dict(), tmp_path / "base" / "model.safetensors")
    base, x = Base.open(tmp_path / "base"), torch.arange(8)
    model = randomised(peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["0", "2"])))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="cannot build the model"):
        import_peft(tmp_path / "adapter", base)
    fresh = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    delta = import_peft(tmp_path / "adapter", base, model=fresh)
    fresh.load_state_dict(
        {
            name: torch.from_numpy(np.array(delta.apply(name, base.tensor(name).read())))
            if name in delta.entries
            else torch.from_numpy(np.array(base.tensor(name).read()))
            for name in base.names
        }
    )
    torch.testing.assert_close(fresh(x), model(x), atol=1e-5, rtol=1e-5)
    fresh.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"))
    export(delta, tmp_path / "again", base, model=fresh)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(fresh, tmp_path / "again").eval()(x), model(x), atol=1e-5, rtol=1e-5)


# --- more ways out

Q, DOWN, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture
def base(tmp_path: Path) -> Base:
    saved(llama, tmp_path / "base")
    return Base.open(tmp_path / "base")


def product(build: Builder, module: str, rank: int, scale: float, gen: Generator) -> None:
    rows, columns = build._base.tensor(f"{module}.weight").shape
    build.put(f"{module}.weight", "lowrank", {"A": gen.normal((rank, columns), 0.3), "B": gen.normal((rows, rank), 0.3)}, scale=scale)


def peft_logits(folder: Path, base: Base) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(base.model(dtype="float32"), folder).eval())


def test_sums_and_other_products_become_one_lora(base: Base, tmp_path: Path) -> None:
    gen = Generator(1)
    build, other = Builder(base), Builder(base)
    product(build, Q, 3, 0.5, gen)
    product(build, DOWN, 2, 1.5, gen)
    product(other, Q, 2, 2.0, gen)
    rows, columns = base.tensor(f"{UP}.weight").shape
    other.put(f"{UP}.weight", "svd", {"P": gen.normal((rows, 2)), "lam": gen.normal((2,)), "Q": gen.normal((2, columns))}, scale=0.3)
    other.put(f"{UP}.weight", "bilinear", {"B": gen.normal((rows, 2)), "M": gen.normal((2, 3)), "A": gen.normal((3, columns))}, scale=0.2)
    delta = build.done(recipe={"verb": "test"}) + 0.5 * other.done(recipe={"verb": "test"})
    done = export(delta, tmp_path / "out", base)
    assert done.rank == 5 and not done.residual
    config = read(tmp_path / "out")
    assert {config["r"], *config["rank_pattern"].values()} == {5, 4, 2}
    torch.testing.assert_close(peft_logits(tmp_path / "out", base), logits(folded(base, delta, tmp_path / "folded")), atol=1e-5, rtol=1e-5)


def test_dora_beside_lora_keeps_both(base: Base, tmp_path: Path) -> None:
    """`use_dora` holds for every module of an adapter: those without a magnitude are given the one they have."""
    gen, build = Generator(2), Builder(base)
    for module in (Q, DOWN):
        product(build, module, 2, 0.7, gen)
    for module in (Q, UP):
        build.put(f"{module}.weight", "magnitude", {"m": 1 + gen.uniform((base.tensor(f"{module}.weight").shape[0],), 0.5)})
    delta = build.done(recipe={"verb": "test"})
    export(delta, tmp_path / "out", base)
    torch.testing.assert_close(peft_logits(tmp_path / "out", base), logits(folded(base, delta, tmp_path / "folded")), atol=1e-5, rtol=1e-5)


def test_norms_and_whole_values_are_saved_as_modules(base: Base, tmp_path: Path) -> None:
    gen, build = Generator(3), Builder(base)
    product(build, Q, 2, 1.0, gen)
    build.put("model.norm.weight", "dense", {"values": gen.normal((32,), 0.3)})
    build.put("model.layers.1.mlp.up_proj.weight", "assign", {"values": gen.normal((48, 32), 0.3)})
    delta = build.done(recipe={"verb": "test"})
    done = export(delta, tmp_path / "out", base)
    assert done.saved == ("model.layers.1.mlp.up_proj", "model.norm")
    torch.testing.assert_close(peft_logits(tmp_path / "out", base), logits(folded(base, delta, tmp_path / "folded")), atol=1e-5, rtol=1e-5)


def test_a_sum_inside_a_view_is_a_product_too(base: Base, tmp_path: Path) -> None:
    """Heads of a projection changed by scaled terms: rows 8 to 16 alone."""
    gen, build = Generator(8), Builder(base)
    build.put(f"{Q}.weight", "lowrank", {"A": gen.normal((2, 32), 0.3), "B": gen.normal((8, 2), 0.3)}, at=At(index=((8, 16),)))
    plain = build.done(recipe={"verb": "test"})
    entry = plain.entries[f"{Q}.weight"]
    inner = replace(entry.ops[0], at=None)
    summed = OpEntry("sum", at=entry.ops[0].at, terms=(Term(0.5, (inner,)), Term(-2.0, (inner,))))
    delta = replace(plain, entries={f"{Q}.weight": replace(entry, ops=(summed,))})
    delta.validate()
    done = export(delta, tmp_path / "out", base)
    assert done.rank == 2
    torch.testing.assert_close(peft_logits(tmp_path / "out", base), logits(folded(base, -1.5 * plain, tmp_path / "folded")), atol=1e-5, rtol=1e-5)


def full_rank(base: Base) -> Delta:
    gen, build = Generator(4), Builder(base)
    product(build, Q, 2, 1.0, gen)
    build.put(f"{DOWN}.weight", "dense", {"values": gen.normal((32, 48), 0.1)})
    return build.done(recipe={"verb": "test"})


def test_what_is_no_lora_is_refused_by_name_or_approximated(base: Base, tmp_path: Path) -> None:
    delta = full_rank(base)
    with pytest.raises(MismatchError, match=r"1 targets .*down_proj.weight \(dense is not a low-rank product\)") as error:
        export(delta, tmp_path / "out", base)
    assert "weft fold" in error.value.hint and "rank=" in error.value.hint
    assert not (tmp_path / "out").exists()
    done = export(delta, tmp_path / "out", base, rank=6)
    values = delta.get(next(key for key in delta.tensors if key.endswith("values")))
    s = np.linalg.svd(values.astype(np.float64), compute_uv=False)
    assert done.residual == {f"{DOWN}.weight": pytest.approx(np.sqrt((s[6:] ** 2).sum() / (s**2).sum()))}
    assert read(done.folder)["rank_pattern"] or read(done.folder)["r"] == 6
    by_energy = export(delta, tmp_path / "energy", base, energy=0.9)
    assert 0 < by_energy.residual[f"{DOWN}.weight"] <= 0.1**0.5
    smaller = int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9)) + 1
    assert by_energy.rank == smaller
    whole = export(delta, tmp_path / "whole", base, rank=32)
    assert whole.residual[f"{DOWN}.weight"] < 1e-6
    torch.testing.assert_close(peft_logits(whole.folder, base), logits(folded(base, delta, tmp_path / "folded")), atol=1e-5, rtol=1e-5)


def test_entries_that_no_adapter_has_are_refused(base: Base, tmp_path: Path) -> None:
    gen, build = Generator(5), Builder(base)
    product(build, Q, 2, 1.0, gen)
    build.remove("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(MismatchError, match="a remove entry changes the model's structure"):
        export(build.done(recipe={"verb": "test"}), tmp_path / "out", base)
    only = Builder(base)
    only.put("model.norm.weight", "dense", {"values": gen.normal((32,))})
    with pytest.raises(MismatchError, match="no low-rank change"):
        export(only.done(recipe={"verb": "test"}), tmp_path / "out", base)
    tokens = Builder(base)
    tokens.put("model.embed_tokens.weight", "assign", {"index": np.arange(32), "values": gen.normal((32,))})
    with pytest.raises(MismatchError, match="assign is not a low-rank product"):
        export(tokens.done(recipe={"verb": "test"}), tmp_path / "out", base)
    wrong = Builder(base)
    product(wrong, Q, 2, 1.0, gen)
    other = wrong.done(recipe={"verb": "test"})
    saved(lambda: llama(hidden_size=16), tmp_path / "second")
    with pytest.raises(MismatchError, match="was made for base"):
        export(other, tmp_path / "out", Base.open(tmp_path / "second"))


# --- vLLM


def test_a_folder_for_vllm(base: Base, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    before = os.umask(0o022)
    request.addfinalizer(lambda: os.umask(before))
    gen, build = Generator(6), Builder(base)
    product(build, Q, 3, 0.5, gen)
    product(build, DOWN, 18, 1.5, gen)
    delta = build.done(recipe={"verb": "test"})
    done = export(delta, tmp_path / "served", base, to="vllm", served_name="org/model")
    config, tensors = read(done.folder), load_file(done.folder / "adapter_model.safetensors")
    assert done.rank == config["r"] == config["lora_alpha"] == 18
    assert done.serve.startswith("--enable-lora --max-lora-rank 32 ")
    assert (config["bias"], config["modules_to_save"], config["use_rslora"], config["use_dora"]) == ("none", None, False, False)
    assert not config["rank_pattern"] and not config["alpha_pattern"] and config["base_model_name_or_path"] == "org/model"
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        f"base_model.model.{Q}.lora_A.weight": (18, 32),
        f"base_model.model.{Q}.lora_B.weight": (32, 18),
        f"base_model.model.{DOWN}.lora_A.weight": (18, 48),
        f"base_model.model.{DOWN}.lora_B.weight": (32, 18),
    }
    assert done.problems == () and lint_vllm(done.folder, base) == []
    assert {(path.name, path.stat().st_mode & 0o777) for path in done.folder.iterdir()} == {
        ("adapter_config.json", 0o644),
        ("adapter_model.safetensors", 0o644),
    }
    torch.testing.assert_close(peft_logits(done.folder, base), logits(folded(base, delta, tmp_path / "folded")), atol=1e-5, rtol=1e-5)
    assert probe(done.folder, base)["max_change"] > 1e-2


def test_vllm_serves_less_than_peft(tmp_path: Path, base: Base) -> None:
    gen, build = Generator(7), Builder(base)
    product(build, Q, 2, 1.0, gen)
    build.put(f"{Q}.weight", "magnitude", {"m": 1 + gen.uniform((32,), 0.5)})
    build.put("model.norm.weight", "dense", {"values": gen.normal((32,))})
    delta = build.done(recipe={"verb": "test"})
    with pytest.raises(MismatchError, match=r"2 targets .*q_proj.weight \(vLLM has no DoRA\), .*norm.weight \(vLLM takes no whole tensors\)"):
        export(delta, tmp_path / "out", base, to="vllm")
    done = export(delta.only([f"{Q}.weight"]), tmp_path / "out", base, to="vllm", rank=32)
    assert done.residual[f"{Q}.weight"] < 1e-6 and done.problems == ()


def test_lint_names_what_is_wrong_and_what_to_do(base: Base, tmp_path: Path, rng: np.random.Generator) -> None:
    def factors(module: str, rank: int = 4, prefix: str = "base_model.model.", rows: int = 32) -> dict[str, Any]:
        return {f"{prefix}{module}.lora_A.weight": rng.normal(size=(rank, 32)), f"{prefix}{module}.lora_B.weight": rng.normal(size=(rows, rank))}

    def problems(name: str, tensors: dict[str, Any], **config: Any) -> str:
        folder = adapter_folder(tmp_path / name, tensors, **{"target_modules": ["q_proj"], "base_model_name_or_path": "org/model", **config})
        for path in folder.iterdir():
            path.chmod(0o644)
        return "\n".join(lint_vllm(folder, base))

    assert problems("good", factors(Q)) == ""
    assert "name no module of LlamaForCausalLM" in problems("prefix", factors("language_model." + Q))
    assert "does not know" in problems("named", factors(Q) | {f"base_model.model.{Q}.lora_A.default.weight": np.zeros((4, 32))})
    assert "does not know" in problems("bare", factors(Q, prefix=""))
    assert "does not fit" in problems("shape", factors(Q, rows=40))
    assert "tensors of rank [7], but r is 4" in problems("rank", factors(Q) | factors(UP, 7, rows=48), rank_pattern={"up_proj": 7})
    for setting, word in [
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "wrong strength"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"base_model_name_or_path": None}, "served_name"),
        ({"target_modules": None}, "target_modules"),
        ({"init_lora_weights": "pissa"}, "changed base"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
        ({"r": 4.0}, "positive integer"),
    ]:
        assert word in problems(f"{word} {setting}".replace("/", ""), factors(Q), **setting)
    folder = adapter_folder(tmp_path / "closed", factors(Q), target_modules=["q_proj"], base_model_name_or_path="m")
    (folder / "adapter_config.json").chmod(0o600)
    assert "chmod 644" in "\n".join(lint_vllm(folder))


def test_probe_finds_adapters_that_do_nothing(base: Base, tmp_path: Path, rng: np.random.Generator) -> None:
    a, zero = rng.normal(size=(4, 32)).astype(np.float32), np.zeros((32, 4), np.float32)
    folder = adapter_folder(tmp_path / "idle", {f"base_model.model.{Q}.lora_A.weight": a, f"base_model.model.{Q}.lora_B.weight": zero})
    with pytest.raises(MismatchError, match="the logits are those of the base"):
        probe(folder, base)
    done = probe(adapter_folder(tmp_path / "busy", {f"base_model.model.{Q}.lora_A.weight": a, f"base_model.model.{Q}.lora_B.weight": a.T}), base)
    assert done["keys"] == 2 and done["modules"] == 1 and done["targets"] == 1 and done["max_change"] > 1e-4


# --- folders that do not fit


def good(folder: Path, **config: Any) -> Path:
    rng = np.random.default_rng(0)
    tensors = {f"base_model.model.{Q}.lora_A.weight": rng.normal(size=(4, 32)), f"base_model.model.{Q}.lora_B.weight": rng.normal(size=(32, 4))}
    return adapter_folder(folder, {key: value.astype(np.float32) for key, value in tensors.items()}, **config)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    save_file({change(key): value for key, value in load_file(folder / "adapter_model.safetensors").items()}, folder / "adapter_model.safetensors")


def test_names_that_match_nothing(base: Base, tmp_path: Path) -> None:
    folder = good(tmp_path / "a", base_model_name_or_path="org/other")
    rename(folder, lambda key: key.replace("model.layers", "transformer.h"))
    with pytest.raises(MismatchError, match=r"none of its names match in LlamaForCausalLM: .*transformer\.h\.0") as error:
        import_peft(folder, base)
    assert "org/other" in error.value.hint and error.value.exit_code == 3
    half = good(tmp_path / "b")
    more = load_file(half / "adapter_model.safetensors")
    save_file(more | {key.replace("q_proj", "w_proj"): value.clone() for key, value in more.items()}, half / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match=r"2 of its 4 keys match nothing .*w_proj.*did you mean"):
        import_peft(half, base)


def test_damaged_folders(base: Base, tmp_path: Path) -> None:
    folder = good(tmp_path / "unknown")
    rename(folder, lambda key: key.replace("lora_A.weight", "lora_A.default.weight"))
    with pytest.raises(FormatError, match=r"1 keys of an unknown form: .*lora_A\.default\.weight"):
        import_peft(folder, base)
    folder = good(tmp_path / "half")
    save_file({k: v for k, v in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in k}, folder / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"one is missing beside .*lora_A"):
        import_peft(folder, base)
    folder = good(tmp_path / "cut")
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-5])
    with pytest.raises(FormatError, match="the file has"):
        import_peft(folder, base)
    folder = good(tmp_path / "pickle")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="is a pickle") as error:
        import_peft(folder, base)
    assert "save_pretrained" in error.value.hint
    folder = good(tmp_path / "json")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        import_peft(folder, base)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="is not a folder"):
        import_peft(folder, base)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"peft_type": "IA3"}, InputError, "peft_type is 'IA3'"),
        ({"r": 0}, FormatError, "r must be a positive integer"),
        ({"r": 8}, MismatchError, r"A \[4, 32\] and B \[32, 4\] do not fit .* at rank 8"),
        ({"lora_alpha": 10**400}, FormatError, "lora_alpha must be a positive number"),
        ({"rank_pattern": {"q_proj": "4"}}, FormatError, "must map to a positive integer"),
        ({"rank_pattern": {"(": 4}}, FormatError, "not a regular expression"),
        ({"kasa_config": {"beta": 1.0}}, InputError, "kasa_config"),
        ({"layer_replication": [[0, 2]]}, InputError, "layer_replication"),
        ({"init_lora_weights": "corda"}, InputError, "'corda' changed the base"),
        ({"init_lora_weights": "loftq"}, InputError, "'loftq' changed the base"),
    ],
)
def test_settings_that_do_not_fit(config: dict[str, Any], kind: type[Exception], message: str, base: Base, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        import_peft(good(tmp_path / "a", **config), base)


def test_import_of_plain_names_needs_no_torch(base: Base, tmp_path: Path) -> None:
    folder = good(tmp_path / "a", use_rslora=True)
    code = "import sys; from weft import Base, import_peft; d = import_peft(sys.argv[2], Base.open(sys.argv[1])); print('torch' in sys.modules, d.id)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "base"), str(folder)], capture_output=True, text=True, check=True)
    delta = import_peft(folder, base)
    assert done.stdout.split() == ["False", delta.id]
    assert delta.entries[f"{Q}.weight"].ops[0].cfg == {"scale": 4.0}


def test_no_setting_breaks_the_reader(base: Base, tmp_path: Path) -> None:
    """Whatever stands in the config: a delta, or an error of ours."""
    values = [None, True, 0, -1, 4, 2.5, 1e300, "", "x", [], ["q_proj"], [1], {}, {"a": 1}, {"q_proj": 4}, {"a": [1]}]
    names = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "init_lora_weights", "target_modules", "auto_mapping"]
    names += ["target_parameters", "trainable_token_indices", "task_type", "modules_to_save", "peft_type", "base_model_name_or_path", "else"]
    folder, pick, done = good(tmp_path / "a"), random.Random(7), 0
    plain = read(folder)
    for _ in range(200):
        (folder / "adapter_config.json").write_text(json.dumps(plain | {pick.choice(names): pick.choice(values) for _ in range(2)}))
        try:
            done += len(import_peft(folder, base).entries)
        except WeftError as error:
            assert error.exit_code == 3 and str(folder) in str(error)
    assert done


def test_rows_that_the_config_does_not_name(tmp_path: Path) -> None:
    make, settings = CASES["tokens"]
    _, adapter = trained(make, settings, tmp_path)
    config = read(adapter)
    for rows in ([1], [1, 61], [1, 1], None, [1, True], {"lm_head": [1, 2]}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": rows}))
        with pytest.raises(FormatError, match=r"must list the rows of model\.embed_tokens\.weight"):
            import_peft(adapter, Base.open(tmp_path / "base"))


# --- blocks


def dense(block: Block, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The increment as a tensor of `shape`, entry by entry."""
    out = np.zeros(shape)
    matrix = block.scale * block.b @ block.a
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            where = [span[0] for span in block.box]
            where[block.row] += i
            where[block.col] += j
            out[tuple(where)] = matrix[i, j]
    return out


def test_blocks_follow_views(rng: np.random.Generator) -> None:
    pick, shown = random.Random(3), 0
    for _ in range(300):
        shape = tuple(pick.randint(2, 5) for _ in range(3))
        row, col, other = pick.sample(range(3), 3)
        box = [tuple(sorted(pick.sample(range(size + 1), 2))) for size in shape]
        box[other] = (start := pick.randrange(shape[other]), start + 1)
        sizes = [stop - start for start, stop in box]
        block = Block(rng.normal(size=(sizes[row], 2)), rng.normal(size=(2, sizes[col])), tuple(box), row, col, 0.5)
        order = tuple(pick.sample(range(3), 3)) if pick.random() < 0.7 else None
        turned = [shape[axis] for axis in order or range(3)]
        whole = [tuple(sorted(pick.sample(range(size + 1), 2))) for size in turned]
        index = [pick.randrange(size) if (order or range(3))[axis] == other else whole[axis] for axis, size in enumerate(turned)][: pick.randint(0, 3)]
        at = At(None, order, tuple(index))
        seen = block.seen(at, shape)
        view = at.shape(shape)
        np.testing.assert_allclose(at.get(dense(block, shape)), np.zeros(view) if seen is None else dense(seen, view))
        if seen is not None:
            shown += 1
            placed = seen.placed(at, shape)
            np.testing.assert_allclose(dense(placed, shape), at.set(np.zeros(shape), dense(seen, view)))
            np.testing.assert_allclose(dense(placed.upright(), shape), dense(placed, shape))
            inside = placed.upright().at(shape)
            np.testing.assert_allclose((inside or At()).get(dense(placed, shape)), 0.5 * placed.upright().b @ placed.upright().a)
    assert shown > 50


def test_parts_of_a_product_join_at_its_old_rank(rng: np.random.Generator) -> None:
    whole = Block.whole(rng.normal(size=(9, 3)), rng.normal(size=(3, 7)), (9, 7), scale=0.7)
    cuts = [At(index=((0, 4), (0, 7))), At(index=((4, 9), (0, 5))), At(index=((4, 9), (5, 7)))]
    parts = [seen.placed(at, (9, 7)) for at in cuts if (seen := whole.seen(at, (9, 7)))]
    b, a, scale = joined(parts[:2] + parts[2:], (9, 7))
    np.testing.assert_allclose(scale * b @ a, dense(whole, (9, 7)), rtol=1e-5)
    rows = [seen.placed(at, (9, 7)) for at in (At(index=((0, 4),)), At(index=((4, 9),))) if (seen := whole.seen(at, (9, 7)))]
    b, a, scale = joined(rows, (9, 7))
    assert a.shape == (3, 7) and scale == 0.7
    b, a, scale = joined([*rows, Block.whole(whole.b, whole.a, (9, 7), scale=-0.2, b0=whole.b + 1, a0=whole.a)], (9, 7))
    np.testing.assert_allclose(b @ a * scale, dense(whole, (9, 7)) - 0.2 * (whole.b @ whole.a - (whole.b + 1) @ whole.a), rtol=1e-4, atol=1e-6)
