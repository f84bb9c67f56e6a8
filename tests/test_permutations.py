"""Permutations of units: the function stays and the bytes come back, for each architecture; and what a layout may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weft.attaching import attach, detach
from weft.base import Base
from weft.delta import Delta
from weft.engine.permutations import Group, composed, drawn, inverse, permuting, require
from weft.engine.symmetries import symmetries
from weft.errors import MismatchError, UsageError
from weft.folding import fold

DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 8}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
LM, CLASSIFIER, TOKENS = "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", LM, DECODER),
    "llama-one-pair": ("llama", LM, {**DECODER, "num_key_value_heads": 1}),
    "llama-no-groups": ("llama", LM, {**DECODER, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-classifier": ("llama", CLASSIFIER, DECODER),
    "qwen2": ("qwen2", LM, DECODER),
    "qwen3": ("qwen3", LM, DECODER),
    "gemma2": ("gemma2", LM, DECODER),
    "gemma3": ("gemma3_text", LM, DECODER),
    "phi3": ("phi3", LM, {**DECODER, "eos_token_id": 1}),
    "gpt2": ("gpt2", LM, {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}),
    "gpt2-classifier": ("gpt2", CLASSIFIER, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 40, "bos_token_id": 1, "eos_token_id": 1}),
    "gpt_neox": ("gpt_neox", LM, ENCODER),
    "bert": ("bert", "AutoModel", ENCODER),
    "bert-classifier": ("bert", CLASSIFIER, ENCODER),
    "bert-tokens": ("bert", TOKENS, ENCODER),
    "bert-masked": ("bert", "AutoModelForMaskedLM", ENCODER),
    "bert-masked-untied": ("bert", "AutoModelForMaskedLM", {**ENCODER, "tie_word_embeddings": False}),
    "bert-pretraining": ("bert", "AutoModelForPreTraining", ENCODER),
    "roberta-classifier": ("roberta", CLASSIFIER, ENCODER),
    "roberta-masked": ("roberta", "AutoModelForMaskedLM", ENCODER),
    "distilbert-classifier": ("distilbert", CLASSIFIER, DISTIL),
    "distilbert-masked": ("distilbert", "AutoModelForMaskedLM", DISTIL),
    "vit": ("vit", "AutoModel", {**ENCODER, **IMAGE}),
    "vit-classifier": ("vit", "AutoModelForImageClassification", {**ENCODER, **IMAGE}),
}


def saved(folder: Path, name: str, seed: int = 0) -> Base:
    """A tiny model with every parameter at random, norms and biases too."""
    import transformers

    kind, auto, settings = MODELS[name]
    text = {} if kind == "vit" else {"vocab_size": 64, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(transformers.CONFIG_MAPPING[kind](initializer_range=0.2, **text, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return Base.open(folder)


def shuffled(groups: list[Group], seed: int = 0) -> dict[str, np.ndarray]:
    """A permutation that moves the units of every group, and the key/value heads too."""
    while True:
        order = drawn(groups, seed)
        moves = [(order[g.name] != np.arange(g.length)).any() for g in groups]
        if all(moves) and all((order[g.name][:: g.parts] // g.parts != np.arange(g.size)).any() for g in groups if g.size > 1):
            return order
        seed += 1


def outputs(model: nn.Module, kind: str) -> list[torch.Tensor]:
    torch.manual_seed(7)
    given = {"pixel_values": torch.randn(2, 3, 16, 16)} if kind == "vit" else {"input_ids": torch.randint(2, 64, (2, 9))}
    with torch.no_grad():
        return [value for value in model(**given).to_tuple() if isinstance(value, torch.Tensor)]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_the_function_of_a_transformer_stays(name: str, tmp_path: Path) -> None:
    kind = MODELS[name][0]
    base = saved(tmp_path / "base", name)
    groups = symmetries(base)
    delta = permuting(base, groups, shuffled(groups))
    moved = {place.tensor for group in groups for place in group.places if group.count(place) > 1}
    assert delta.entries.keys() == moved
    if MODELS[name][1] != "AutoModel":  # a head hides the residual stream: then nothing but what counts tokens, classes, places stays where it is
        stay = {tensor for tensor in base.names if tensor not in moved}
        assert all("q_norm" in t or "k_norm" in t or (t.endswith("bias") and base.tensor(t).shape[0] in (2, 64)) for t in stay), stay
    model = base.model()
    before = outputs(model, kind)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attach(model, delta)
    after = outputs(model, kind)
    assert all(close(a, b) for a, b in zip(before, after, strict=True))
    detach(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for tensor in moved:
        assert not np.array_equal(delta.apply(tensor, base.tensor(tensor).read()), base.tensor(tensor).read())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-classifier", "vit-classifier"])
def test_folding_and_folding_back_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", name)
    groups = symmetries(base)
    order = shuffled(groups, 5)
    delta = permuting(base, groups, order)
    delta.save(tmp_path / "order.safetensors")
    fold(base, [Delta.load(tmp_path / "order.safetensors")], tmp_path / "other")
    other = Base.open(tmp_path / "other")
    before, after = (outputs(each.model(), MODELS[name][0]) for each in (base, other))
    assert all(close(a, b) for a, b in zip(before, after, strict=True))
    fold(other, [permuting(other, groups, inverse(order))], tmp_path / "back")
    assert Base.open(tmp_path / "back").fingerprint == base.fingerprint != other.fingerprint


def test_a_permutation_left_out_anywhere_changes_the_function(tmp_path: Path) -> None:
    """The tests above could pass if a place did not matter; take each place of one layer's groups away, and the outputs move."""
    from dataclasses import replace

    base = saved(tmp_path / "base", "llama")
    groups = symmetries(base)
    order = shuffled(groups)
    model = base.model()
    before = outputs(model, "llama")[0]
    for group in groups:
        if group.name.startswith("layers.1"):
            continue
        for place in group.places:
            less = [replace(each, places=tuple(p for p in each.places if p is not place)) for each in groups]
            attach(model, permuting(base, less, order))
            assert (outputs(model, "llama")[0] - before).abs().max() > 1e-3, (group.name, place)
            detach(model)


def test_one_array_is_stored_for_each_group(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama")
    groups = {group.name: group for group in symmetries(base)}
    assert (groups["layers.0.heads"].size, groups["layers.0.heads"].parts, groups["residual"].size, groups["layers.1.mlp"].size) == (2, 2, 32, 48)
    delta = permuting(base, list(groups.values()), drawn(list(groups.values()), seed=2))
    assert all(key.startswith("@shared/") for key in delta.tensors)
    assert delta.tensors["@shared/layers.0.heads"].shape == (4,)
    assert delta.tensors["@shared/residual"].shape == (32,)
    assert len(delta.tensors) <= len(groups) + 2  # and one of key/value heads for each layer in which these move
    with pytest.raises(MismatchError, match="whole or not at all"):
        delta.only(["model.norm.weight"])


def test_composition_and_inverse(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "gpt2")
    groups = symmetries(base)
    first, then = drawn(groups, 1), drawn(groups, 2)
    del then["residual"]
    both = composed(first, then)
    require(groups, both)
    one, two = permuting(base, groups, first), permuting(base, groups, then)
    for tensor in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.bias", "transformer.wte.weight"):
        w = base.tensor(tensor).read()
        stepwise = one.apply(tensor, w)
        if tensor in two.entries:
            stepwise = two.apply(tensor, stepwise)
        assert np.array_equal(permuting(base, groups, both).apply(tensor, w), stepwise)
    back = composed(both, inverse(both))
    assert all((index == np.arange(len(index))).all() for index in back.values())
    with pytest.raises(UsageError, match="moves nothing"):
        permuting(base, groups, back)


def test_query_heads_stay_with_their_key_and_value_head(tmp_path: Path) -> None:
    groups = symmetries(saved(tmp_path / "base", "llama"))
    require(groups, {"layers.0.heads": np.array([3, 2, 0, 1])})
    with pytest.raises(UsageError, match=r"layers.0.heads: the 2 parts of a unit must stay together"):
        require(groups, {"layers.0.heads": np.array([0, 2, 1, 3])})
    with pytest.raises(UsageError, match=r"layers.0.mlp: expected a permutation of 0..47, got 3 positions"):
        require(groups, {"layers.0.mlp": np.array([0, 1, 2])})
    with pytest.raises(UsageError, match=r"no group 'layer.0.mlp'.*layers.0.mlp"):
        require(groups, {"layer.0.mlp": np.arange(48)})


# --- networks without a model type


class Conv(nn.Module):
    """Convolutions with batch norms, flattened before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Flatten(), nn.Linear(12 * 16, 20), nn.GELU(), nn.Linear(20, 5),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


class Mlp(nn.Module):
    """Eleven layers, so that 10 comes after 9 and not after 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip([6, *[9] * 10], [*[9] * 10, 4], strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(1.5 * layer(x))
        out: torch.Tensor = self.layers[-1](x)
        return out


def plain(folder: Path, model: nn.Module, seed: int = 0) -> Base:
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if value.ndim == 1 else torch.randn_like(value) / value[0].numel() ** 0.5)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return Base.open(folder)


CONV = {
    "net.0.weight": "c0 - - -", "net.0.bias": "c0", "net.3.weight": "c1 c0 - -", "net.7.weight": "h c1*16", "net.7.bias": "h", "net.9.weight": "- h",
    **{f"net.{k}.{p}": c for k, c in ((1, "c0"), (4, "c1")) for p in ("weight", "bias", "running_mean", "running_var")},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "layout", "sizes"), [(Conv, "chain", [8, 12, 20]), (Conv, CONV, [8, 12, 20]), (Mlp, "chain", [9] * 10)])
def test_the_function_of_a_plain_network_stays(kind: Any, layout: Any, sizes: list[int], tmp_path: Path) -> None:
    model = kind().eval()
    base = plain(tmp_path / "base", model)
    groups = symmetries(base, layout)
    assert [group.size for group in groups] == sizes
    order = drawn(groups, 1)
    delta = permuting(base, groups, order)
    x = torch.randn(5, 3, 8, 8) if kind is Conv else torch.randn(5, 6)
    with torch.no_grad():
        before = model(x)
        assert before.std(0).min() > 1e-3  # it does see its input
        attach(model, delta, base=base)
        assert close(before, model(x))
        detach(model)
        assert torch.equal(before, model(x))
    fold(base, [delta], tmp_path / "other")
    other = Base.open(tmp_path / "other")
    fold(other, [permuting(other, groups, inverse(order))], tmp_path / "back")
    assert Base.open(tmp_path / "back").fingerprint == base.fingerprint


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    base = plain(tmp_path / "mlp", Mlp())
    with pytest.raises(UsageError, match=r'no model_type.*in no table.*llama.*(?s:.*)give a layout.*"chain"'):
        symmetries(base)
    with pytest.raises(UsageError, match="no layout 'chian'"):
        symmetries(base, "chian")
    llama = saved(tmp_path / "llama", "llama")
    llama.config["model_type"] = "mamba"
    with pytest.raises(UsageError, match="models of type 'mamba' are in no table"):
        symmetries(llama)
    llama.config["model_type"] = "gpt2"
    with pytest.raises(UsageError, match=r"tensor '(lm_head|model.embed_tokens).weight' is in no table for models of type 'gpt2'"):
        symmetries(llama)


def test_a_layout_that_does_not_fit_says_all_that_is_wrong(tmp_path: Path) -> None:
    base = plain(tmp_path / "mlp", Mlp())
    wrong = {
        "layers.0.weight": "a -", "layers.1.weight": "b c*2", "layers.2.weight": "b", "layers.3.wieght": "a b", "layers.4.weight": "d*3 d*3+d*3",
        "layers.5.weight": "a*x -", "layers.10.weight": "a -", "layers.6.weight": "- e+f",
    }  # fmt: skip
    with pytest.raises(UsageError) as error:
        symmetries(base, wrong)
    text = str(error.value)
    for part in (
        "layers.1.weight: axis 1 has no whole number of units of c",
        "layers.2.weight: 'b' names 1 axes, the tensor has the shape [9, 9]",
        "there is no tensor 'layers.3.wieght'; did you mean 'layers.3.weight'",
        "layers.4.weight: axis 1 has no whole number of units of d",
        "layers.5.weight: 'a*x' is no group",
        "layers.10.weight: axis 0 has 4 units of a, elsewhere 9",
        "layers.6.weight: the size of e is not known",
    ):
        assert part in text, (part, text)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), "1 is neither a linear, a convolution nor a batch norm"),
        (nn.Sequential(nn.Linear(4, 6), nn.Linear(5, 2)), "no chain in the order of its names: 1 takes 5 inputs and the layer before it gives 6"),
        (nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(12, 2, 3)), "1 takes 12 inputs"),
    ],
)
def test_what_is_no_chain_is_refused(model: nn.Module, why: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=why):
        symmetries(plain(tmp_path / "net", model), "chain")
