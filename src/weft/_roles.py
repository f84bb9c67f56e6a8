"""Which part of a model plays which role: the tables behind `weft.sites`.

A row says `role: patterns`. A pattern is the end of a path, component by component: `mlp.c_proj` fits
`transformer.h.0.mlp.c_proj` and not `attn.c_proj`; `*` stands for one integer. The longest pattern that fits wins. A path is
the module's (`weight` and `bias` belong to the module), with the parameter's name at its end when that is something else
(`experts.gate_up_proj`, `embeddings.cls_token`).

To add an architecture, run `all_sites` on a tiny model of it and look at the roles. Names that mean the same wherever they
are found go into `COMMON`; names that mean something of their own there go into `BY_TYPE`, under the `model_type` of the
configuration. Then add the model to the golden counts in tests/test_sites.py.
"""

from __future__ import annotations

COMMON: dict[str, str] = {
    "attention.query": "q_proj q_attn q_lin query query_proj",
    "attention.key": "k_proj k_lin key key_proj",
    "attention.value": "v_proj v_lin value value_proj",
    "attention.qkv": "attn.c_attn self_attn.in_proj multihead_attn.in_proj self_attn.qkv_proj attn.qkv attn.Wqkv query_key_value",
    "attention.key_value": "crossattention.c_attn",
    "attention.output": "o_proj self_attn.out_proj encoder_attn.out_proj multihead_attn.out_proj attn.out_proj attn.c_proj crossattention.c_proj attn.proj "
    "attention.dense self_attention.dense self_attn.dense attention.output.dense crossattention.output.dense attention.out_lin",
    "mlp.gate": "gate_proj",
    "mlp.up": "up_proj mlp.fc1 mlp.fc_in layers.*.fc1 layers.*.linear1 mlp.c_fc dense_h_to_4h intermediate.dense ffn.lin1",
    "mlp.gate_up": "mlp.gate_up_proj",
    "mlp.down": "down_proj mlp.fc2 mlp.fc_out layers.*.fc2 layers.*.linear2 mlp.c_proj dense_4h_to_h output.dense ffn.lin2",
    "mlp.router": "mlp.gate mlp.router block_sparse_moe.gate shared_expert_gate",
    "experts.gate": "experts.*.gate_proj experts.*.w1",
    "experts.up": "experts.*.up_proj experts.*.w3",
    "experts.gate_up": "experts.gate_up_proj",
    "experts.down": "experts.down_proj experts.*.down_proj experts.*.w2",
    "embedding.token": "embed_tokens embed_in wte shared token_embedding word_embeddings",
    "embedding.position": "embed_positions wpe pos_embed position_embedding position_embeddings relative_attention_bias",
    "embedding.type": "token_type_embeddings",
    "embedding.patch": "patch_embeddings.projection patch_embedding patch_embed.proj",
    "embedding.special": "cls_token mask_token distillation_token class_embedding",
    "norm.attention": "input_layernorm ln_1 layer_norm1 self_attn_layer_norm layernorm_before attention.output.LayerNorm sa_layer_norm",
    "norm.query": "q_norm",
    "norm.key": "k_norm",
    "norm.cross_attention": "encoder_attn_layer_norm ln_cross_attn crossattention.output.LayerNorm",
    "norm.mlp": "post_attention_layernorm pre_feedforward_layernorm ln_2 layer_norm2 layers.*.final_layer_norm layernorm_after output.LayerNorm "
    "output_layer_norm",
    "norm.mlp.post": "post_feedforward_layernorm",
    "norm.embedding": "embeddings.LayerNorm layernorm_embedding word_embeddings_layernorm pre_layrnorm patch_embed.norm",
    "norm.final": "norm ln_f layernorm final_layer_norm post_layernorm encoder.layer_norm decoder.layer_norm",
    "norm.head": "transform.LayerNorm lm_head.layer_norm classifier.layernorm",
    "head.lm": "lm_head lm_head.decoder proj_out cls.predictions cls.predictions.decoder",
    "head.transform": "predictions.transform.dense lm_head.dense",
    "head.classifier": "classifier score qa_outputs seq_relationship classifier.dense classifier.out_proj classification_head.dense "
    "classification_head.out_proj pre_classifier",
    "head.pooler": "pooler.dense",
    "head.projection": "visual_projection text_projection",
    "head.scale": "logit_scale",
}
"""Rows for every model, known or not."""

BY_TYPE: dict[str, dict[str, str]] = {
    # Gemma 2 and 3 normalise before and after each block; elsewhere this name is the norm before the MLP.
    "gemma2 gemma3 gemma3_text": {"norm.attention.post": "post_attention_layernorm"},
    "opt": {"embedding.projection": "project_in", "head.projection": "project_out"},
    # Sub-layers are numbered: 0 attends, the last is the MLP, and between them the decoder's looks at the encoder.
    "t5 mt5 umt5": {
        "attention.query": "q",
        "attention.key": "k",
        "attention.value": "v",
        "attention.output": "o",
        "mlp.gate": "DenseReluDense.wi_0",
        "mlp.up": "DenseReluDense.wi DenseReluDense.wi_1",
        "mlp.down": "DenseReluDense.wo",
        "norm.attention": "layer.0.layer_norm",
        "norm.cross_attention": "decoder.block.*.layer.1.layer_norm",
        "norm.mlp": "encoder.block.*.layer.1.layer_norm layer.2.layer_norm",
    },
    "whisper": {"embedding.patch": "conv1 conv2", "norm.final": "layer_norm", "head.projection": "projector"},
}
"""Rows that hold for some model types only, and come before the common ones. A key lists the types."""

CROSS_ATTENTION = frozenset({"encoder_attn", "crossattention", "cross_attn", "multihead_attn", "EncDecAttention"})
"""Path components below which `attention.X` is `cross_attention.X`."""

LAYER_LISTS = frozenset({"layers", "layer", "h", "block", "blocks", "stages"})
"""Names of the lists that hold a model's layers: the integer after the first of them is the layer index."""

STACKS = {
    "encoder": "encoder", "decoder": "decoder",
    "vision_model": "vision", "vision_tower": "vision", "visual": "vision",
    "text_model": "text", "language_model": "text",
    "audio_model": "audio", "audio_tower": "audio",
}  # fmt: skip
"""Path components that name a stack of layers; the first one in a path counts."""
