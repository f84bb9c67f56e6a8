"""Models of a few kilobytes with tokenizers, made on the spot, and deltas on them that do something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ["how", "many", "what", "is", "the", "far", "who", "was", "where", "film", "river", "city", "made", "in", "a", "it", "of", "and", "good", "bad"]
LABELS = ("HUM", "LOC", "NUM")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _tokenizer(folder: Path, *, framed: bool) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *WORDS])}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 32}
    if framed:
        rules.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        names |= {"eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=rules, **names).save_pretrained(folder)
    return len(vocabulary)


def bert(folder: Path, seed: int = 0) -> Path:
    """A BertModel without a head."""
    import torch
    from transformers import BertConfig, BertModel

    size = _tokenizer(folder, framed=True)
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=size, max_position_embeddings=40, initializer_range=0.3, **shape)).save_pretrained(folder)
    return folder


def llama(folder: Path, seed: int = 0) -> Path:
    """A LlamaForCausalLM."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = _tokenizer(folder, framed=False)
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=40, initializer_range=0.3, **shape, **tokens)).save_pretrained(folder)
    return folder


def gpt2(folder: Path, seed: int = 0) -> Path:
    """A GPT2LMHeadModel, whose matrices are stored in x out."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    size = _tokenizer(folder, framed=False)
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}
    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    GPT2LMHeadModel(GPT2Config(vocab_size=size, initializer_range=0.3, **shape, **tokens)).save_pretrained(folder)
    return folder


def lowrank(base: Path, out: Path, seed: int = 1, names: Sequence[str] = ("query.weight", "value.weight", "q_proj.weight", "v_proj.weight")) -> Path:
    """A delta of rank 2 on every tensor whose name ends in one of `names`."""
    _start(base, seed, names).done(recipe={"verb": "test", "seed": seed}).save(out)
    return out


def classifier(base: Path, out: Path, seed: int = 1) -> Path:
    """A delta that makes a BertModel a classifier of `LABELS`, with a head at random."""
    build = _start(base, seed, ("query.weight",))
    rng = np.random.default_rng(seed)
    build.add("classifier.weight", rng.normal(size=(len(LABELS), 32)).astype(np.float32))
    build.add("classifier.bias", rng.normal(size=len(LABELS)).astype(np.float32))
    names = {str(number): label for number, label in enumerate(LABELS)}
    config = {"architectures": ["BertForSequenceClassification"], "id2label": names, "label2id": {label: int(number) for number, label in names.items()}}
    config |= {"problem_type": "single_label_classification"}
    build.done(recipe={"verb": "test", "seed": seed}, config=config).save(out)
    return out


def _start(base: Path, seed: int, names: Sequence[str]) -> Any:
    from weft import Base, Builder

    opened = Base.open(base)
    rng = np.random.default_rng(seed)
    build = Builder(opened)
    for name in opened.names:
        if name.endswith(tuple(names)):
            out, into = opened.tensor(name).shape
            parts = {"A": rng.normal(size=(2, into)).astype(np.float32), "B": rng.normal(size=(out, 2)).astype(np.float32)}
            build.put(name, "lowrank", parts, scale=0.25)
    return build


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 12 known words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, 13))) for _ in range(count)]
