"""What vLLM needs on disk, checked without it: `lint_vllm` reads a folder, `probe` runs it.

vLLM takes an adapter whose keys match nothing, or whose patterns it drops, without a word and answers as the base
does. So a served adapter is checked before: every key is a real module, and the logits move.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base import Base
from ..errors import InputError, MismatchError, WeftError
from .folder import CONFIG, PREFIX, WEIGHTS, config_json, read_weights, some

if TYPE_CHECKING:
    from torch import nn

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank may have; its default is 16."""

_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


def lint_vllm(folder: str | Path, base: Base | None = None, *, model: nn.Module | None = None) -> list[str]:
    """What keeps vLLM from serving an adapter folder as it is meant, each with what to do; [] if nothing does.

    With `base`, keys and shapes are held against the modules of its model (built without data, or given as `model`).
    Raises InputError or FormatError only where there is no readable adapter at all.
    """
    folder = Path(folder)
    config, tensors = config_json(folder), read_weights(folder)
    problems = _lint_files(folder) + _lint_config(config)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    strange = [key for key in shapes if not key.startswith(PREFIX) or not key.endswith(_ENDINGS)]
    if strange:
        problems.append(f"keys that vLLM does not know: {some(strange)}: export again with to='vllm'")
    rank = config.get("r")
    ranks = {shape[1] if key.endswith(("_B.weight", "_B")) else shape[0] for key, shape in shapes.items() if key.endswith(_ENDINGS) and len(shape) == 2}
    if ranks - {rank}:
        problems.append(f"tensors of rank {sorted(ranks - {rank})}, but r is {rank}: vLLM knows one rank; export again with to='vllm'")
    if ranks and max(ranks) > RANKS[-1]:
        problems.append(f"rank {max(ranks)} is above vLLM's {RANKS[-1]}: export with rank=, or fold")
    if base is not None:
        problems += _lint_modules(shapes, base, model)
    return problems


def _lint_files(folder: Path) -> list[str]:
    problems = []
    for name in (CONFIG, WEIGHTS):
        mode = (folder / name).stat().st_mode
        if not mode & stat.S_IROTH:
            problems.append(f"{name} has mode {stat.S_IMODE(mode):04o}: a server under another user cannot read it; chmod 644 {folder / name}")
    if not folder.stat().st_mode & stat.S_IXOTH:
        problems.append(f"the folder is closed to other users; chmod 755 {folder}")
    return problems


def _lint_config(config: Mapping[str, Any]) -> list[str]:
    again = "export again with to='vllm'"
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}, vLLM serves 'LORA' alone: fold it")
    if type(config.get("r")) is not int or config["r"] < 1:
        problems.append(f"r is {config.get('r')!r}: it must be a positive integer; {again}")
    if type(config.get("lora_alpha")) not in (int, float):
        problems.append(f"lora_alpha is {config.get('lora_alpha')!r}: it must be a number; {again}")
    if not config.get("target_modules"):
        problems.append(f"target_modules is {config.get('target_modules')!r}: it must name modules; {again}")
    if not isinstance(config.get("base_model_name_or_path"), str) or not config["base_model_name_or_path"]:
        problems.append("base_model_name_or_path is not set: vLLM's resolver compares it with the served model's name; export with served_name=")
    for name, neutral in (("bias", "none"), ("modules_to_save", None), ("use_dora", False), ("rank_pattern", {}), ("alpha_pattern", {})):
        if config.get(name, neutral) not in (neutral, None):
            dropped = " vLLM drops it without a word and serves the wrong strength;" if name.endswith("_pattern") else " vLLM refuses it;"
            problems.append(f"{name} is {str(config[name])[:60]}:{dropped} {again}, or fold")
    if config.get("target_parameters"):
        problems.append("target_parameters is set: vLLM matches modules; fold")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        problems.append(f"init_lora_weights is {start!r}: the adapter belongs to a changed base; import it with weft and {again}")
    return problems


def _lint_modules(shapes: Mapping[str, tuple[int, ...]], base: Base, model: nn.Module | None) -> list[str]:
    from .live import Live, skeleton

    live = Live(base, model if model is not None else skeleton(base))
    problems, absent = [], []
    for key, shape in shapes.items():
        ending = next((end for end in _ENDINGS if key.endswith(end)), None)
        if ending is None:
            continue
        module = key.removeprefix(PREFIX).removesuffix(ending)
        matrix = live.matrix(module)
        if module not in live.modules:
            absent.append(key)
        elif isinstance(matrix, str) or matrix.layout not in ("linear", "embedding"):
            problems.append(f"{key}: {type(live.modules[module]).__name__} is not a layer that vLLM adapts: fold")
        else:
            axis, along = (matrix.out, 0) if ending.endswith(("B.weight", "_B")) else (matrix.inp, 1)
            if len(shape) != 2 or shape[along] != matrix.shape[axis]:
                problems.append(f"{key} has shape {list(shape)}, which does not fit {matrix.name} of shape {list(matrix.shape)}: check the base")
    if absent:
        problems.append(f"{len(absent)} keys name no module of {type(live.model).__name__}, and vLLM would ignore them: {some(absent)}: export from this base")
    return problems


def probe(folder: str | Path, base: Base, *, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Load the model, put the adapter on it and run both: that every key is used, and that the logits move.

    inputs: what the model is called with; default: a fixed row of tokens, or fixed noise for image and sound models

    Returns {"keys": tensors in the folder, "modules": live modules that they name, "targets": checkpoint tensors changed,
    "max_change": the largest absolute change of a logit, "max_logit": the largest absolute logit of the base}.
    MismatchError if a key matches no module, or if the output is the base's.
    """
    import torch

    from ..attaching import attach, detach
    from .live import Live
    from .reader import import_peft

    folder = Path(folder)
    keys = read_weights(folder)
    delta = import_peft(folder, base)
    model = base.model([delta], dtype="float32")
    live = Live(base, model, [delta])
    names = {key: _module(key) for key in keys}
    absent = [key for key, name in names.items() if name not in live.modules]
    if absent:
        raise MismatchError(f"{folder}: {len(absent)} of {len(keys)} keys name no module of {type(model).__name__}: {some(absent)}", hint="lint_vllm says more")
    given = dict(inputs) if inputs is not None else _inputs(model)
    heads = [name for name, entry in delta.entries.items() if entry.change is not None and entry.change.kind == "add"]
    with torch.no_grad():
        if heads and len(heads) < len(delta.entries):  # the head alone moves the logits: what else there is must move them too
            attach(model, delta.only(heads), base=base, names=live.names)
        before = _logits(model(**given))
        detach(model)
        attach(model, delta, base=base, names=live.names)
        after = _logits(model(**given))
    change = float((after - before).abs().max())
    if not change > 0:
        raise MismatchError(f"{folder}: all {len(keys)} keys match, but the logits are those of the base", hint="was the adapter trained, or saved too early?")
    return {
        "keys": len(keys),
        "modules": len(set(names.values())),
        "targets": len(delta.entries),
        "max_change": change,
        "max_logit": float(before.abs().max()),
    }


def _module(key: str) -> str:
    """The live module that a key speaks of."""
    name = key.removeprefix(PREFIX)
    for mark in (".lora_", ".token_adapter."):
        if mark in name:
            name = name.rpartition(mark)[0]
            while name.endswith(".base_layer"):
                name = name.removesuffix(".base_layer")
            return name.replace(".base_layer.", ".")
    return name.replace(".base_layer.", ".").rpartition(".")[0]


def _inputs(model: Any) -> dict[str, Any]:
    """Fixed inputs for a transformers model: 16 tokens, or noise of the shape that its config asks for."""
    import torch

    from .. import xp

    config, name = model.config, getattr(model, "main_input_name", "input_ids")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if name == "input_ids":
        tokens = (torch.arange(1, 17) * 7 % max(text.vocab_size - 1, 1) + 1).clamp(max=text.vocab_size - 1).reshape(1, -1)
        return {"input_ids": tokens, **({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})}
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        shape = (1, getattr(config, "num_channels", 3), *sides)
        return {name: xp.normals(torch.zeros(0), xp.key(0), 0, shape[1] * shape[2] * shape[3]).reshape(shape)}
    raise InputError(f"{type(model).__name__} takes {name}, for which there is no fixed probe", hint="pass inputs={...}")


def _logits(out: Any) -> Any:
    """The logits of a model's output, or else its first tensor."""
    value = getattr(out, "logits", None)
    value = out[0] if value is None else value
    if not hasattr(value, "abs"):
        raise WeftError(f"the model returns {type(value).__name__}, not a tensor to compare", hint="probe a model that returns logits")
    return value
