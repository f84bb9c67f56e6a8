"""A PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`, read strictly and written atomically.

Keys are `base_model.model.` + the path of a live module + what it is: `.lora_A.weight` (r, in), `.lora_B.weight`
(out, r), `.lora_embedding_A` (r, count), `.lora_embedding_B` (width, r), `.lora_magnitude_vector`; anything else is
the name of a whole parameter (heads, biases, embeddings). Several parameters of one module (stacked experts) are
wrapped in each other, the first one innermost: each layer of wrapping adds `.base_layer` to the path.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._write import atomic_file, atomic_folder, write_bytes
from ..errors import FormatError, InputError
from ..file import container_header
from ..stored import ITEMSIZE, Stored, Tensor, read_container, strict_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

_FACTOR = re.compile(r"^(?P<module>.+?)(?P<nest>(?:\.base_layer)*)\.lora_(?P<what>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B|magnitude_vector)$")
_TOKENS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta$")
_PAIRS = (("A.weight", "B.weight"), ("embedding_A", "embedding_B"))
_PICKLE_HINT = "load it once with PEFT and save it again: PeftModel.from_pretrained(MODEL, FOLDER).save_pretrained(NEW_FOLDER)"

_LARGEST = 1e12
"""Ranks and alphas beyond this are damage."""

_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout",
    "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "alpha_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
    "velora_config",
}  # fmt: skip
"""Settings that weft reads, or that say nothing about what the trained adapter means (how it was started and trained)."""


@dataclass(frozen=True)
class Part:
    """What an adapter says of one module, or of one parameter that it wraps at a depth of `.base_layer`."""

    module: str
    depth: int
    a: Tensor
    b: Tensor
    bias: Tensor | None
    magnitude: Tensor | None
    embedding: bool
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter folder's content: its config, the LoRA parts, whole parameters and trained token rows by live name."""

    path: Path
    config: Mapping[str, Any]
    parts: tuple[Part, ...]
    values: Mapping[str, Tensor]
    tokens: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: str | Path) -> Adapter:
        """Read and check a folder. InputError if a file is absent or it is no LoRA adapter, FormatError if it is damaged
        or holds keys of an unknown form, all of them listed."""
        folder = Path(folder)
        config = read_config(folder)
        tensors = read_weights(folder)
        found: dict[tuple[str, int], dict[str, str]] = {}
        values: dict[str, Tensor] = {}
        tokens: dict[str, Tensor] = {}
        unknown = []
        for key, tensor in tensors.items():
            name = key.removeprefix(PREFIX)
            if match := _FACTOR.match(name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name):
                module, depth = match["module"].replace(".base_layer.", "."), match["nest"].count(".base_layer")
                found.setdefault((module, depth), {})[match["what"]] = key
            elif match := _TOKENS.match(name):
                tokens[match["module"].removesuffix(".base_layer") + ".weight"] = tensor
            elif ".lora_" in name or ".token_adapter." in name or name.replace(".base_layer.", ".") in values:
                unknown.append(key)
            else:
                values[name.replace(".base_layer.", ".")] = tensor
        if unknown:
            raise FormatError(f"{folder / WEIGHTS}: {len(unknown)} keys of an unknown form: {some(unknown)}", hint="save the adapter with a current PEFT")
        if not tensors:
            raise FormatError(f"{folder / WEIGHTS}: it holds no tensors", hint="save the adapter again, on the process that has its weights")
        half = [key for keys in found.values() if not any(set(pair) <= set(keys) for pair in _PAIRS) for key in keys.values()]
        if half:
            raise FormatError(f"{folder / WEIGHTS}: A and B come together, but one is missing beside {some(half)}")
        parts = tuple(_part(module, depth, keys, tensors) for (module, depth), keys in found.items())
        return cls(folder, config, parts, values, tokens)

    def rank(self, key: str) -> int:
        """The rank that the config gives to the module (or parameter) `key`."""
        return int(_matching(self.config.get("rank_pattern"), key, self.config["r"]))

    def scale(self, key: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732), with the patterns applied."""
        rank = self.rank(key)
        alpha = _matching(self.config.get("alpha_pattern"), key, self.config["lora_alpha"])
        return float(alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank)


def _part(module: str, depth: int, keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Part:
    a, b = next(pair for pair in _PAIRS if set(pair) <= set(keys))
    bias, magnitude = (tensors[keys[what]] if what in keys else None for what in ("B.bias", "magnitude_vector"))
    return Part(module, depth, tensors[keys[a]], tensors[keys[b]], bias, magnitude, a == "embedding_A", tuple(keys.values()))


def _matching(patterns: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that, as a regular expression, is all of `key` or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default


def some(names: Iterable[str], most: int = 8) -> str:
    """The first names of many, and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, with the settings that matter checked for type, and those refused that weft has no meaning for."""
    config = config_json(folder)
    where = folder / CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{where}: peft_type is {kind!r}; expected 'LORA'", hint="merge it with PEFT (merge_and_unload), save the model, then `weft diff`")
    for name, default in (("r", 8), ("lora_alpha", 8)):
        value = config.setdefault(name, default)
        if type(value) not in (int, float) or not 0 < value < _LARGEST or (name == "r" and value != int(value)):
            raise FormatError(f"{where}: {name} must be a positive {'integer' if name == 'r' else 'number'}, got {str(value)[:40]}")
    for name, rank in (("rank_pattern", True), ("alpha_pattern", False)):
        _check_pattern(config.get(name), f"{where}: {name}", rank)
    strange = sorted(name for name, value in config.items() if name not in _NEUTRAL and value not in (None, False, [], {}, ""))
    if strange:
        listed = ", ".join(f"{name} = {str(config[name])[:40]}" for name in strange)
        raise InputError(f"{where}: weft does not know what these settings change: {listed}", hint="merge it with PEFT, save the model, then `weft diff`")
    return config


def _check_pattern(value: Any, where: str, whole: bool) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise FormatError(f"{where} must be an object, got {str(value)[:60]}")
    for pattern, number in value.items():
        if (type(number) is not int and (whole or type(number) is not float)) or not 0 < number < _LARGEST:
            raise FormatError(f"{where}: {pattern!r} must map to a positive {'integer' if whole else 'number'}, got {str(number)[:40]}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise FormatError(f"{where}: {pattern!r} is not a regular expression ({error})") from None


def config_json(folder: Path) -> dict[str, Any]:
    """adapter_config.json as it stands."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with {CONFIG} and {WEIGHTS}")
    try:
        text = (folder / CONFIG).read_bytes()
    except OSError as error:
        found = some(entry.name for entry in folder.iterdir())
        raise InputError(f"{folder}: cannot read {CONFIG} ({error.strerror}); the folder has {found or 'nothing'}") from None
    config = strict_json(text, str(folder / CONFIG))
    if not isinstance(config, dict):
        raise FormatError(f"{folder / CONFIG}: expected a JSON object")
    return config


def read_weights(folder: Path) -> dict[str, Stored]:
    """The tensors of adapter_model.safetensors, from its header. A pickle is refused: reading one runs code."""
    if not (folder / WEIGHTS).is_file():
        if pickles := [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).is_file()]:
            raise InputError(f"{folder / pickles[0]} is a pickle; weft reads safetensors only, because loading a pickle runs code", hint=_PICKLE_HINT)
        raise InputError(f"{folder}: {WEIGHTS} is missing; the folder has {some(entry.name for entry in folder.iterdir())}")
    return read_container(folder / WEIGHTS)[0]


def write(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files of an adapter into a new folder, atomically and reproducibly."""
    order = sorted(tensors, key=lambda key: (-ITEMSIZE[tensors[key].dtype], key))
    with atomic_folder(folder) as new:
        write_bytes(new / CONFIG, (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())
        with atomic_file(new / WEIGHTS) as out:
            out.write(container_header(tensors, order, {"format": "pt"}))
            for key in order:
                for block in tensors[key].blocks():
                    out.write(block)
