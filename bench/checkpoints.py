"""Llama-shaped bf16 checkpoints of any size, made of seeded noise: what the benchmarks work on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from weft import xp
from weft.file import container_header
from weft.stored import Computed, Stored, Tensor, numpy_dtype, read_container

HIDDEN, INNER, VOCABULARY, SHARDS = 2048, 5504, 32000, 4


def layout(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        for name, shape in {
            **{f"self_attn.{k}_proj": (HIDDEN, HIDDEN) for k in "qkvo"},
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return shapes | {"model.norm.weight": (HIDDEN,)}


def noise(shape: tuple[int, ...], stream: int, dtype: str, std: float) -> Iterator[bytes]:
    """Normal numbers, the same on every machine, in blocks."""
    left, start = int(np.prod(shape)), 0
    key = xp.key(7, stream)
    while left:
        count = min(left, 1 << 20)
        yield xp.cast(xp.normals(np.zeros(0), key, start, count) * np.float32(std), dtype).tobytes()
        start, left = start + count, left - count


def _tuned(tensor: Stored, stream: int) -> Iterator[bytes]:
    """A tensor's values plus noise of a fortieth of their size."""
    for old, new in zip(tensor.blocks(2 << 20), noise(tensor.shape, stream, "float32", 5e-4), strict=True):
        values = xp.cast(np.frombuffer(old, numpy_dtype("BF16")), "float32") + np.frombuffer(new, np.float32)
        yield xp.cast(values, "bfloat16").tobytes()


def write_folder(folder: Path, files: dict[str, dict[str, Tensor]], layers: int) -> None:
    """A checkpoint folder with its index and config."""
    folder.mkdir()
    for file, tensors in files.items():
        with open(folder / file, "wb") as out:
            out.write(container_header(tensors, list(tensors), {"format": "pt"}))
            for tensor in tensors.values():
                out.writelines(tensor.blocks())
            os.fsync(out.fileno())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_attention_heads": 16, "vocab_size": VOCABULARY, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def build_base(folder: Path, size: float) -> None:
    """A base of about `size` GB in four shards."""
    per_layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN)
    layers = max(1, round((size * 1e9 - 2 * VOCABULARY * HIDDEN) / per_layer))
    shapes = layout(layers)
    share = sum(int(np.prod(s)) for s in shapes.values()) / SHARDS
    parts: dict[int, dict[str, Tensor]] = {}
    full = 0.0
    for number, (name, shape) in enumerate(shapes.items()):
        parts.setdefault(min(SHARDS - 1, int(full / share)), {})[name] = Computed("BF16", shape, lambda s=shape, n=number: noise(s, n, "bfloat16", 0.02))
        full += int(np.prod(shape))
    write_folder(folder, {f"model-{number + 1:05}-of-{len(parts):05}.safetensors": inside for number, inside in parts.items()}, layers)


def build_tuned(base: Path, folder: Path, seed: int) -> None:
    """A fine-tune of a base of `build_base`: every entry moved."""
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    files: dict[str, dict[str, Tensor]] = {}
    stream = 100_000 * seed
    for file in sorted(base.glob("*.safetensors")):
        files[file.name] = {}
        for name, tensor in read_container(file)[0].items():
            stream += 1
            files[file.name][name] = Computed("BF16", tensor.shape, lambda t=tensor, n=stream: _tuned(t, n))
    write_folder(folder, files, layers)
