"""Which axes of a checkpoint's tensors count the same units: the tables behind `weft.engine.symmetries`.

A row says `module: axes`, one word for each axis of the module's weight as stored: `query` and `key` are the heads of an attention layer
(key/value heads, and the query heads that belong to each), `mlp` the hidden units of its MLP, `residual` the channels of the stream
between layers, `-` an axis that stays; any other word is a group of its own. `key+key` are two runs of the same units one after the
other (fused projections). `N` is a layer's number. A bias has the word of its weight's output axis. Names may have anything in front.

To add an architecture, write its rows under its `model_type` and add a tiny model to tests/test_permutations.py, which shows whether its
function stays. Rows must name every tensor: one that is forgotten is an error there, not a silent change of the function.
"""

from __future__ import annotations

DECODER = {
    "embed_tokens": "- residual",
    "layers.N.self_attn.q_proj": "query residual",
    "layers.N.self_attn.k_proj": "key residual",
    "layers.N.self_attn.v_proj": "key residual",
    "layers.N.self_attn.qkv_proj": "query+key+key residual",
    "layers.N.self_attn.o_proj": "residual query",
    "layers.N.self_attn.q_norm": "-",
    "layers.N.self_attn.k_norm": "-",
    "layers.N.mlp.gate_proj": "mlp residual",
    "layers.N.mlp.up_proj": "mlp residual",
    "layers.N.mlp.gate_up_proj": "mlp+mlp residual",
    "layers.N.mlp.down_proj": "residual mlp",
    "layers.N.input_layernorm": "residual",
    "layers.N.post_attention_layernorm": "residual",
    "layers.N.pre_feedforward_layernorm": "residual",
    "layers.N.post_feedforward_layernorm": "residual",
    "norm": "residual",
    "lm_head": "- residual",
    "score": "- residual",
}

GPT2 = {
    "wte": "- residual",
    "wpe": "- residual",
    "h.N.ln_1": "residual",
    "h.N.attn.c_attn": "residual query+key+key",
    "h.N.attn.c_proj": "query residual",
    "h.N.ln_2": "residual",
    "h.N.mlp.c_fc": "residual mlp",
    "h.N.mlp.c_proj": "mlp residual",
    "ln_f": "residual",
    "lm_head": "- residual",
    "score": "- residual",
}

GPT_NEOX = {
    "embed_in": "- residual",
    "layers.N.input_layernorm": "residual",
    "layers.N.post_attention_layernorm": "residual",
    "layers.N.attention.query_key_value": "fused residual",
    "layers.N.attention.dense": "residual query",
    "layers.N.mlp.dense_h_to_4h": "mlp residual",
    "layers.N.mlp.dense_4h_to_h": "residual mlp",
    "final_layer_norm": "residual",
    "embed_out": "- residual",
    "score": "- residual",
}

_BLOCK = {
    "attention.output.dense": "residual query",
    "intermediate.dense": "mlp residual",
    "output.dense": "residual mlp",
}

BERT = {
    "embeddings.word_embeddings": "- residual",
    "embeddings.position_embeddings": "- residual",
    "embeddings.token_type_embeddings": "- residual",
    "embeddings.LayerNorm": "residual",
    **{f"layer.N.attention.self.{name}": "key residual" for name in ("query", "key", "value")},
    **{f"layer.N.{name}": axes for name, axes in _BLOCK.items()},
    "layer.N.attention.output.LayerNorm": "residual",
    "layer.N.output.LayerNorm": "residual",
    "pooler.dense": "pooled residual",
    "classifier": "- pooled",
    "qa_outputs": "- residual",
    "cls.seq_relationship": "- pooled",
    "cls.predictions": "-",
    "cls.predictions.transform.dense": "transformed residual",
    "cls.predictions.transform.LayerNorm": "transformed",
    "cls.predictions.decoder": "- transformed",
    "classifier.dense": "dense residual",
    "classifier.out_proj": "- dense",
    "lm_head": "-",
    "lm_head.dense": "transformed residual",
    "lm_head.layer_norm": "transformed",
    "lm_head.decoder": "- transformed",
}

DISTILBERT = {
    "embeddings.word_embeddings": "- residual",
    "embeddings.position_embeddings": "- residual",
    "embeddings.LayerNorm": "residual",
    **{f"layer.N.attention.{name}": "key residual" for name in ("q_lin", "k_lin", "v_lin")},
    "layer.N.attention.out_lin": "residual query",
    "layer.N.sa_layer_norm": "residual",
    "layer.N.ffn.lin1": "mlp residual",
    "layer.N.ffn.lin2": "residual mlp",
    "layer.N.output_layer_norm": "residual",
    "vocab_transform": "transformed residual",
    "vocab_layer_norm": "transformed",
    "vocab_projector": "- transformed",
    "pre_classifier": "pooled residual",
    "classifier": "- pooled",
    "qa_outputs": "- residual",
}

VIT = {
    "embeddings.cls_token": "- - residual",
    "embeddings.mask_token": "- - residual",
    "embeddings.position_embeddings": "- - residual",
    "embeddings.patch_embeddings.projection": "residual - - -",
    **{f"layer.N.attention.attention.{name}": "key residual" for name in ("query", "key", "value")},
    **{f"layer.N.{name}": axes for name, axes in _BLOCK.items()},
    "layer.N.layernorm_before": "residual",
    "layer.N.layernorm_after": "residual",
    "layernorm": "residual",
    "pooler.dense": "- residual",
    "classifier": "- residual",
}

FAMILIES = {
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3": DECODER,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "bert roberta xlm-roberta": BERT,
    "distilbert": DISTILBERT,
    "vit": VIT,
}
"""Rows by model type; a key lists the types."""

TRANSPOSED = frozenset({"gpt2"})
"""Model types whose matrices with biases are stored in x out."""

IGNORED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias", "position_ids", "token_type_ids")
"""Buffers of older checkpoints that count no units."""

WIDTHS = {"gpt2": "n_inner", "distilbert": "hidden_dim"}
"""The config's key for the number of an MLP's hidden units, where it is not `intermediate_size`."""
