"""The name map: every checkpoint tensor equals, bit for bit, the live views that the map gives for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tests.test_base import BERT as ENCODER
from tests.test_base import LLAMA as DECODER
from weft.base import Base
from weft.errors import MismatchError
from weft.names import NameMap, Place, _Piece, _Traced, _Untraceable, live_tensors, saved_layout
from weft.ops.spec import At

BERT: dict[str, Any] = {**ENCODER, "num_labels": 3}


def randomised(model: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Every tensor distinct from every other: norms are not ones and biases not zeros."""
    gen = torch.Generator().manual_seed(seed)
    model.to(dtype)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=gen))
    return model


def stored_tensors(base: Base) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for file in base.files:
        out |= load_file(file)
    return out


def agree(base: Base, model: nn.Module, absent: set[str] | None = None) -> NameMap:
    """Check the whole map both ways against the data; `absent` are the checkpoint tensors that the model lacks."""
    names, live, seen = NameMap.of(base, model), live_tensors(model), set()
    for name, tensor in stored_tensors(base).items():
        places, covered = names.live(name), 0
        assert bool(places) == (name not in (absent or ())), (name, names.why(name))
        assert bool(names.why(name)) == (not places)
        for place in places:
            view, part = live[place.name].detach(), tensor
            view = place.at.get(view) if place.at else view
            part = place.part.get(part) if place.part else part
            assert view.dtype == part.dtype and torch.equal(view, part), (name, place)
            assert Place(name, place.at, place.part) in names.stored(place.name)
            covered += part.numel()
            seen.update(names.tied(place.name))
        assert covered == (tensor.numel() if places else 0)
    for name, tensor in live.items():
        filled = torch.zeros(tensor.shape)
        for place in names.stored(name):
            (place.at.get(filled) if place.at else filled).add_(1)
        assert bool((filled == 1).all()) == (name in seen), name
    return names


def llama(tied: bool) -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=tied))


def mixtral() -> Any:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=11, num_experts_per_tok=2))


def gpt2() -> Any:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))


def t5() -> Any:
    return tf.T5ForConditionalGeneration(tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0))


def nomic() -> Any:
    return tf.NomicBertModel(tf.NomicBertConfig(**BERT))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(False),
    "llama tied": lambda: llama(True),
    "mixtral": mixtral,
    "gpt2": gpt2,
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)),
    "t5": t5,
    "fused qkv": nomic,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_again(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    original = randomised(FAMILIES[family](), dtype)
    original.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    base = Base.open(tmp_path / "m")
    model = base.model()
    assert type(model) is type(original) and not model.training
    assert {value.dtype for value in model.parameters()} == {dtype}
    agree(base, model)
    for name, value in live_tensors(original).items():
        assert torch.equal(value, live_tensors(model)[name]), name
    live = Base.of(model)
    assert set(base.names) <= set(live.names)
    assert all(live.sha256(name) == base.sha256(name) for name in base.names)


def test_experts_stored_apart_have_their_slice_of_the_stack(tmp_path: Path) -> None:
    randomised(mixtral()).save_pretrained(tmp_path / "m")
    base = Base.open(tmp_path / "m")
    names = agree(base, base.model())
    experts, stack = "model.layers.1.block_sparse_moe.experts", "model.layers.1.mlp.experts"
    assert names.live(f"{experts}.10.w1.weight") == [Place(f"{stack}.gate_up_proj", At(index=(10, (0, 48))))]
    assert names.live(f"{experts}.10.w3.weight") == [Place(f"{stack}.gate_up_proj", At(index=(10, (48, 96))))]
    assert names.live(f"{experts}.2.w2.weight") == [Place(f"{stack}.down_proj", At(index=(2,)))]
    assert [p.name for p in names.stored(f"{stack}.down_proj")] == [f"{experts}.{i}.w2.weight" for i in range(11)]
    assert names.live(f"{experts}.11.w2.weight") == [] and "inside a larger tensor" in names.why(f"{experts}.11.w2.weight")
    with pytest.raises(MismatchError, match="has no place"):
        Base.of(base.model()).tensor(f"{experts}.11.w2.weight")


def test_fused_tensors_are_split_into_parts(tmp_path: Path) -> None:
    randomised(nomic()).save_pretrained(tmp_path / "m")
    base = Base.open(tmp_path / "m")
    names = agree(base, base.model())
    fused = next(name for name in base.names if "Wqkv" in name)
    places = names.live(fused)
    assert [place.part for place in places] == [At(index=((0, 32),)), At(index=((32, 64),)), At(index=((64, 96),))]
    assert [place.name.rpartition("_proj")[0][-1] for place in places] == ["q", "k", "v"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefix_absent_in_the_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    gpt = randomised(gpt2(), dtype)
    gpt.transformer.save_pretrained(tmp_path / "gpt2")
    base = Base.open(tmp_path / "gpt2")
    assert "h.0.attn.c_attn.weight" in base.names
    names = agree(base, base.model(auto_class="GPT2LMHeadModel"))
    assert names.live("wte.weight") == [Place("transformer.wte.weight")]
    assert names.tied("lm_head.weight") == ("transformer.wte.weight", "lm_head.weight")
    assert names.stored("lm_head.weight") == [Place("wte.weight")]
    bert = randomised(tf.BertForSequenceClassification(tf.BertConfig(**BERT)), dtype)
    bert.bert.save_pretrained(tmp_path / "bert")
    base = Base.open(tmp_path / "bert")
    names = agree(base, bert)
    assert names.live("pooler.dense.bias") == [Place("bert.pooler.dense.bias")]
    assert names.stored("classifier.weight") == []
    assert names.live("classifier.weight") == [Place("classifier.weight")]  # what a delta may add


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefix_absent_in_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    randomised(gpt2(), dtype).save_pretrained(tmp_path / "gpt2")
    base = Base.open(tmp_path / "gpt2")
    assert "transformer.wte.weight" in base.names
    names = agree(base, base.model(auto_class="AutoModel"))
    assert names.live("transformer.h.1.ln_1.bias") == [Place("h.1.ln_1.bias")]
    randomised(tf.BertForSequenceClassification(tf.BertConfig(**BERT)), dtype).save_pretrained(tmp_path / "bert")
    base = Base.open(tmp_path / "bert")
    names = agree(base, base.model(auto_class=tf.BertModel), {"classifier.weight", "classifier.bias"})
    assert names.why("classifier.weight") == "the model has no tensor classifier.weight"


def test_tied_tensors_stored_twice_once_or_under_the_other_name(tmp_path: Path) -> None:
    model = randomised(llama(True))
    model.save_pretrained(tmp_path / "once")
    tensors = load_file(tmp_path / "once/model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for folder, more in {"twice": {"lm_head.weight": embedding.clone()}, "unlike": {"lm_head.weight": embedding + 1}}.items():
        (tmp_path / folder).mkdir()
        model.config.save_pretrained(tmp_path / folder)
        save_file(tensors | more, tmp_path / folder / "model.safetensors")
    both = ("model.embed_tokens.weight", "lm_head.weight")
    base = Base.open(tmp_path / "once")
    names = agree(base, base.model())
    assert names.tied("lm_head.weight") == names.tied("model.embed_tokens.weight") == both
    assert names.stored("lm_head.weight") == [Place("model.embed_tokens.weight")]
    base = Base.open(tmp_path / "twice")
    names = agree(base, base.model())
    assert names.tied("lm_head.weight") == both
    assert names.stored("lm_head.weight") == [Place("lm_head.weight")]
    base = Base.open(tmp_path / "unlike")
    names = agree(base, base.model())
    assert names.tied("lm_head.weight") == ("lm_head.weight",)


def test_t5_shares_one_embedding_under_four_names(tmp_path: Path) -> None:
    randomised(t5()).save_pretrained(tmp_path / "m")
    base = Base.open(tmp_path / "m")
    names = agree(base, base.model())
    group = {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert group <= set(names.tied("shared.weight"))
    assert names.stored("decoder.embed_tokens.weight") == [Place("shared.weight")]


def test_legacy_names_and_buffers_that_are_gone(tmp_path: Path) -> None:
    model = randomised(tf.BertModel(tf.BertConfig(**BERT)))
    model.save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value for name, value in tensors.items()}
    save_file(old | {"embeddings.position_ids": torch.arange(32)[None]}, tmp_path / "m/model.safetensors")
    base = Base.open(tmp_path / "m")
    names = agree(base, base.model(), {"embeddings.position_ids"})
    assert names.live("embeddings.LayerNorm.gamma") == [Place("embeddings.LayerNorm.weight")]
    assert names.live("embeddings.position_ids") == []


def test_unknown_names_and_shapes_that_do_not_fit(tmp_path: Path) -> None:
    model = randomised(llama(False))
    model.save_pretrained(tmp_path / "m")
    base = Base.open(tmp_path / "m")
    names = NameMap.of(base, model)
    with pytest.raises(MismatchError, match=r"did you mean 'model\.norm\.weight'"):
        names.live("model.norms.weight")
    with pytest.raises(MismatchError, match="no parameter or buffer"):
        names.tied("model.norms.weight")
    with pytest.raises(MismatchError, match="no parameter or buffer"):
        names.stored("nothing")
    model.resize_token_embeddings(70)
    with pytest.raises(MismatchError, match=r"'lm_head\.weight' has shape \[64, 32\] in the checkpoint, but the model's .* has \[70, 32\]"):
        NameMap.of(base, model).live("lm_head.weight")
    with pytest.raises(MismatchError, match=r"embed_tokens"):
        NameMap.of(base, model).stored("model.embed_tokens.weight")


def test_a_conversion_that_is_no_view_leaves_its_names_without_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import PermuteForRope, Transpose, WeightConverter, WeightRenaming

    model = randomised(llama(False))
    model.save_pretrained(tmp_path / "m")
    base = Base.open(tmp_path / "m")
    rope, turn = PermuteForRope(), Transpose(0, 1)
    converters = [
        WeightRenaming(r"^model\.norm\.", "model.gone."),  # a renaming to nothing is not done, as in the loader
        WeightConverter(r"self_attn\.q_proj\.weight", "self_attn.q_proj.weight", [rope]),
        WeightConverter(r"self_attn\.o_proj\.weight", "self_attn.o_proj.weight", [turn]),
        WeightConverter(r"mlp\.down_proj\.weight", "mlp.down_proj.weight", [turn]),
    ]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: converters)
    names = NameMap.of(base, model)
    q, o, down = (f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
    assert names.live(q) == [] and "not a view of the live tensor" in names.why(q)
    assert names.stored(q) == []
    assert names.live(o) == [Place(o, At(transpose=(1, 0)))]
    assert names.live(down) == [] and "it makes" in names.why(down)  # 32 x 48 turned does not fit
    assert names.live("model.norm.weight") == [Place("model.norm.weight")]


def test_other_modules_keep_their_names() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    module[1].register_buffer("scratch", torch.ones(2), persistent=False)
    base = Base.of(module)
    assert base.names == sorted(module.state_dict())
    names = NameMap.of(base, module)
    assert names.live("0.weight") == [Place("0.weight")] and names.stored("1.running_mean") == [Place("1.running_mean")]
    assert base.tensor("0.weight").shape == (3, 4)
    assert saved_layout(module)["1.num_batches_tracked"] == ("I64", ())


def test_a_live_base_knows_the_names_of_its_checkpoint() -> None:
    model = randomised(mixtral(), torch.bfloat16)
    base = Base.of(model)
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    expert = base.tensor("model.layers.0.block_sparse_moe.experts.3.w3.weight")
    assert expert.dtype == "BF16" and expert.read().tobytes() == stack[3, 48:].detach().contiguous().view(torch.uint8).numpy().tobytes()
    before = base.sha256("model.layers.0.block_sparse_moe.experts.3.w3.weight")
    with torch.no_grad():
        stack[3, 50, 0] += 1
    assert base.sha256("model.layers.0.block_sparse_moe.experts.3.w3.weight") != before
    fused = Base.of(randomised(nomic()))
    name = next(name for name in fused.names if "Wqkv" in name)
    halves = [value.detach() for live, value in live_tensors(fused.module).items() if any(f"layers.0.self_attn.{p}_proj.weight" in live for p in "qkv")]
    assert fused.tensor(name).read().tobytes() == torch.cat(halves).numpy().tobytes()
    headed = Base.of(randomised(tf.BertForSequenceClassification(tf.BertConfig(**BERT))))
    assert headed.sha256("pooler.dense.weight") == headed.sha256("bert.pooler.dense.weight")
    with pytest.raises(MismatchError, match="neither the checkpoint nor the model"):
        headed.tensor("pooler.weight")


STEPS: dict[str, Callable[[list[Any], int, int], list[Any]]] = {
    "cat": lambda x, dim, _: [torch.cat(x, dim=dim)],
    "stack": lambda x, dim, _: [torch.stack(x, dim)],
    "chunk": lambda x, dim, _: list(torch.chunk(x[0], 2, dim=dim)),
    "split": lambda x, dim, n: list(torch.split(x[0], [x[0].shape[dim] - n % x[0].shape[dim], n % x[0].shape[dim]], dim=dim))[:1],
    "unbind": lambda x, dim, _: list(torch.unbind(x[0], dim=dim)),
    "transpose": lambda x, dim, n: [torch.transpose(t, dim0=dim, dim1=n % t.ndim) for t in x],
    "squeeze": lambda x, dim, n: [t.squeeze() if n == 0 else t.squeeze(dim) for t in x],
    "reshape": lambda x, dim, _: [t.reshape(t.shape[dim], -1) for t in x],
    "same": lambda x, *_: [t.contiguous().clone() for t in x],
}


@settings(max_examples=150)
@given(st.data())
def test_traced_blocks_are_where_the_data_is(data: st.DataObject) -> None:
    """Random chains of operations, once on numbers and once traced: every block's two views hold the same numbers."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    count = data.draw(st.integers(1, 3))
    sources = [torch.arange(float(torch.Size(shape).numel())).reshape(shape) + 1000 * i for i in range(count)]
    real, traced = list(sources), [_Traced.leaf(str(i), shape) for i in range(count)]
    try:
        for name in data.draw(st.lists(st.sampled_from(sorted(STEPS)), max_size=5)):
            if real[0].ndim == 0:
                break
            dim, number = data.draw(st.integers(-real[0].ndim, real[0].ndim - 1)), data.draw(st.integers(0, 3))
            real, traced = STEPS[name](real, dim, number), STEPS[name](traced, dim, number)
            if real[0].shape != real[-1].shape:  # an uneven chunk
                real, traced = real[:1], traced[:1]
        for value, trace in zip(real, traced, strict=True):
            assert value.shape == trace.shape
            covered = 0
            for piece in trace.pieces:
                at, part = piece.views(value.shape)
                source = sources[int(piece.source)]
                here, there = (at.get(value) if at else value), (part.get(source) if part else source)
                assert torch.equal(here, there)
                covered += there.numel()
            assert covered == value.numel()
    except _Untraceable as reason:
        assert "reshape" in str(reason)


def test_an_operation_that_makes_new_numbers_is_not_traced() -> None:
    leaf = _Traced.leaf("a", (2, 3))
    with pytest.raises(_Untraceable, match="operation"):
        torch.mul(leaf, 2)
    assert leaf.pieces == (_Piece.whole("a", (2, 3)),)
