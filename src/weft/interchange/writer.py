"""Delta in, adapter folder out: for PEFT, or for vLLM, which serves less.

What LoRA can say is low-rank products on matrices of live modules. Sums of products are concatenated (a product that
was taken out, A0 and B0, doubles the rank), DoRA is a product and a norm, whole values become `modules_to_save`.
Anything else is refused by name, or approximated if a rank or an energy is given.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

from ..base import Base, merge_patch
from ..delta import Delta
from ..errors import MismatchError, UsageError
from ..ops.magnitude import norms
from ..stored import Tensor, hold
from .blocks import Block, Matrix, Unfit, joined, padded
from .contents import Contents, whole_modules
from .folder import PREFIX, some, write
from .vllm import RANKS, lint_vllm

if TYPE_CHECKING:
    from torch import nn

    from .live import Live

Array = Any

_SAVED_BY_TASK = {"classifier", "score"}
"""Module names that PEFT itself adds to `modules_to_save` for classification tasks."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    folder:   the adapter's folder
    to:       "peft" or "vllm"
    modules:  the live modules (or parameters) that carry LoRA
    saved:    the modules that are stored whole
    rank:     the largest rank
    residual: relative error ||change - B A|| / ||change|| of each target that was approximated
    serve:    for vLLM, the options that its server needs
    problems: what `lint_vllm` has to say about the folder, for vLLM
    """

    folder: Path
    to: str
    modules: tuple[str, ...]
    saved: tuple[str, ...]
    rank: int
    residual: Mapping[str, float]
    serve: str = ""
    problems: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "folder": str(self.folder), "to": self.to, "modules": list(self.modules), "saved": list(self.saved), "rank": self.rank,
            "residual": dict(self.residual), "serve": self.serve, "problems": list(self.problems),
        }  # fmt: skip


@dataclass(frozen=True)
class _Lora:
    """The factors of one live matrix in PEFT's own shapes and names."""

    matrix: Matrix
    key: str
    rank: int
    scale: float
    tensors: Mapping[str, Array]


def export(
    delta: Delta,
    out: str | Path,
    base: Base,
    *,
    to: Literal["peft", "vllm"] = "peft",
    served_name: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    model: nn.Module | None = None,
) -> Exported:
    """Write a delta as an adapter folder that computes the same function.

    to:          "peft": what `PeftModel.from_pretrained` loads, with a rank and alpha for each module where they differ.
                 "vllm": LoRA on linear layers and embeddings alone, one rank, filled with zeros, the scale inside B
    out:         a folder that does not exist or is empty
    served_name: `base_model_name_or_path`; vLLM compares it with the name that it serves. Default: how `base` was opened
    rank:        the largest rank allowed for one checkpoint tensor; what is not low-rank, or has a larger one, is approximated by its best rank-r part
    energy:      the same with the smallest rank that keeps this share of the squared norm of a tensor's change (0 to 1)
    model:       the live model, for architectures that the base's config does not build

    MismatchError names every target that the format cannot hold, or if the delta does not belong to the base.
    """
    if to not in ("peft", "vllm"):
        raise UsageError(f"adapters are written for 'peft' or 'vllm', not {to!r}")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise UsageError(f"rank must be at least 1 and energy within 0 to 1, got {rank} and {energy}")
    delta.validate()
    delta.require_base(base)
    from .live import Live, skeleton

    config = merge_patch(base.config, {k: v for k, v in delta.config.items() if k != "tie_word_embeddings"})
    live = Live(base, model if model is not None else skeleton(base, config), [delta])
    contents = Contents(delta, base, live, to=to, rank=rank, energy=energy)
    loras = _loras(contents)
    saved, biases = whole_modules(contents, {lora.matrix.name.rpartition(".")[0] for lora in loras})
    if to == "vllm":
        contents.unfit |= dict.fromkeys(contents.values, "vLLM takes no whole tensors")
    if contents.unfit:
        other = "" if rank or energy else "; rank= or energy= approximates matrices and reports the error"
        raise MismatchError(
            f"{len(contents.unfit)} targets cannot be said in a {'PEFT' if to == 'peft' else 'vLLM'} adapter: "
            + some(f"{target} ({why})" for target, why in contents.unfit.items()),
            hint="`weft fold` writes a checkpoint that holds everything" + other,
        )
    if not loras:
        raise MismatchError("the delta has no low-rank change, and an adapter needs one", hint="`weft fold` writes a checkpoint that holds everything")
    if to == "vllm":
        loras, largest = _one_rank(loras)
    else:
        largest = max(lora.rank for lora in loras)
    tensors, settings = _adapter(loras, saved, biases, live, served_name or base.source)
    write(out, settings, tensors)
    folder, modules = Path(out), tuple(lora.key for lora in loras)
    if to == "peft":
        return Exported(folder, to, modules, tuple(saved), largest, contents.residual)
    need = next(size for size in RANKS if size >= largest)
    serve = f"--enable-lora --max-lora-rank {need} --lora-modules {quote(f'{folder.name}={folder}')}"
    return Exported(folder, to, modules, tuple(saved), largest, contents.residual, serve, tuple(lint_vllm(folder, base, model=live.model)))


# --- from factors to PEFT's tensors


def _loras(contents: Contents) -> list[_Lora]:
    """All matrices in PEFT's shapes; what the format cannot hold is noted as unfit."""
    out = []
    for name, matrix in contents.matrices.items():
        if contents.to == "vllm" and matrix.layout not in ("linear", "embedding"):
            contents.unfit[name] = f"vLLM adapts no {matrix.layout} weights"
        elif contents.norms and matrix.layout == "parameter":
            contents.unfit[name] = "PEFT has no DoRA beside single parameters"
        else:
            try:
                out.append(_lora(name, matrix, contents))
            except Unfit as error:
                contents.unfit[name] = str(error)
    return out


def _lora(name: str, matrix: Matrix, contents: Contents) -> _Lora:
    """One live matrix in PEFT's shapes: A (r, inputs) and B (outputs, r), stacks flattened as PEFT does."""
    import numpy as np

    blocks, flat = contents.blocks[name], matrix.flat
    if matrix.experts:
        b, a, scale = _stacked(blocks, matrix)
        return _Lora(matrix, name, len(a) // matrix.experts, scale, {"lora_A.weight": a, "lora_B.weight": b})
    if not blocks:  # DoRA's norms alone
        blocks = [Block.whole(np.zeros((flat[0], 1), np.float32), np.zeros((1, flat[1]), np.float32), flat)]
    left, right, scale = joined(blocks, flat)
    rank, ones = len(right), (1,) * (len(matrix.shape) - 2)
    b, a = (left, right) if matrix.out == 0 else (right.T, left.T)
    if matrix.layout == "embedding":
        tensors = {"lora_embedding_A": a, "lora_embedding_B": b}
    elif matrix.layout == "conv":
        tensors = {"lora_A.weight": a.reshape(rank, *matrix.shape[1:]), "lora_B.weight": b.reshape(-1, rank, *ones)}
    else:
        tensors = {"lora_A.weight": a, "lora_B.weight": b}
    if contents.norms:
        m = contents.norms.get(name)
        if m is None:  # `use_dora` holds for all modules: this one gets the norms that it has anyway
            w = np.asarray(contents.base.tensor(contents.live.whole(name)).read(), np.float32).reshape(flat)
            m = norms((w + scale * np.asarray(left, np.float64) @ np.asarray(right, np.float64)).astype(np.float32), matrix.out).astype(np.float32)
        tensors["lora_magnitude_vector"] = m.reshape(1, -1, *ones) if matrix.layout == "conv" else m
    return _Lora(matrix, name if matrix.layout == "parameter" else name.rpartition(".")[0], rank, scale, tensors)


def _stacked(blocks: Sequence[Block], matrix: Matrix) -> tuple[Array, Array, float]:
    """The products of all experts at one rank and scale: A (experts * r, inputs), B (outputs, r * experts)."""
    import numpy as np

    shape, each = matrix.shape[1:], []
    for expert in range(matrix.experts):
        own = [block for block in blocks if len(block.box) == 3 and block.box[0] == (expert, expert + 1)]
        flat = [Block(b.b, b.a, b.box[1:], b.row - 1, b.col - 1, b.scale, b.b0, b.a0) for b in own]
        each.append(joined(flat, shape) if flat else (np.zeros((shape[0], 0), np.float32), np.zeros((0, shape[1]), np.float32), 0.0))
    if sum(1 for block in blocks if len(block.box) == 3) != len(blocks):
        raise Unfit("a product over the whole stack is not one of its matrices")
    rank = max(a.shape[0] for _, a, _ in each)
    scales = {scale for _, a, scale in each if a.shape[0]}
    scale = scales.pop() if len(scales) == 1 else 1.0
    pairs = [padded(np.asarray(b, np.float32) * np.float32(s) if scales else b, a, rank) for b, a, s in each]
    if matrix.out > matrix.inp:  # stored as (experts, inputs, outputs)
        pairs = [(a.T, b.T) for b, a in pairs]
    return np.stack([b for b, _ in pairs], 2).reshape(pairs[0][0].shape[0], -1), np.concatenate([a for _, a in pairs], 0), scale


def _one_rank(loras: Sequence[_Lora]) -> tuple[list[_Lora], int]:
    """All factors at the largest rank, their scales inside B: vLLM knows one rank and drops patterns."""
    import numpy as np

    largest = max(lora.rank for lora in loras)
    if largest > RANKS[-1]:
        raise MismatchError(f"vLLM serves ranks up to {RANKS[-1]}, this delta needs {largest}", hint="give rank=, or `weft fold` it")
    out = []
    for lora in loras:
        name_a, name_b = lora.tensors
        b = np.asarray(lora.tensors[name_b], np.float32) * np.float32(lora.scale)
        b, a = padded(b, np.asarray(lora.tensors[name_a], np.float32), largest)
        out.append(_Lora(lora.matrix, lora.key, largest, 1.0, {name_a: a, name_b: b}))
    return out, largest


# --- the folder


def _adapter(
    loras: Sequence[_Lora], saved: Mapping[str, Mapping[str, Array]], biases: Mapping[str, Array], live: Live, name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by key, and the config."""
    import numpy as np

    tensors: dict[str, Array] = {}
    wrapped = [lora for lora in loras if lora.matrix.layout == "parameter"]
    plain = [lora for lora in loras if lora.matrix.layout != "parameter"]
    for lora in loras:
        path = lora.matrix.name.rpartition(".")[0]
        if lora in wrapped:
            order = live.wrapped(path, [one.matrix.name for one in wrapped])
            path += ".base_layer" * (len(order) - 1 - order.index(lora.matrix.name.rpartition(".")[2]))
        tensors |= {f"{PREFIX}{path}.{what}": value for what, value in lora.tensors.items()}
    for module, leaves in saved.items():
        tensors |= {f"{PREFIX}{module}.{leaf}": value for leaf, value in leaves.items()}
    carrying = {lora.key for lora in plain}
    for bias, value in biases.items():
        module = bias.rpartition(".")[0]
        tensors[f"{PREFIX}{module}.base_layer.bias" if module in carrying else f"{PREFIX}{bias}"] = value
    settings = _ranks(loras) | {
        "peft_type": "LORA",
        "base_model_name_or_path": name,
        "bias": ("lora_only" if {bias.rpartition(".")[0] for bias in biases} <= carrying else "all") if biases else "none",
        "fan_in_fan_out": any(lora.matrix.layout == "conv1d" for lora in plain),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(saved) or None,
        "target_modules": _chosen([lora.key for lora in plain], live),
        "use_dora": any("lora_magnitude_vector" in lora.tensors for lora in loras),
        "use_rslora": False,
        **_task(saved, live),
    }
    if wrapped:
        settings["target_parameters"] = sorted(lora.matrix.name for lora in wrapped)
    return {key: hold(np.ascontiguousarray(value)) for key, value in tensors.items()}, settings


def _ranks(loras: Sequence[_Lora]) -> dict[str, Any]:
    """The most common rank and alpha for all, patterns for the others. alpha = scale * r."""
    rank, alpha = Counter((lora.rank, _alpha(lora)) for lora in loras).most_common(1)[0][0]
    exact = {lora.key: "^" + re.escape(lora.key).replace(r"\_", "_") for lora in loras}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exact[lora.key]: lora.rank for lora in loras if lora.rank != rank},
        "alpha_pattern": {exact[lora.key]: _alpha(lora) for lora in loras if _alpha(lora) != alpha},
    }


def _alpha(lora: _Lora) -> int | float:
    alpha = lora.scale * lora.rank
    return int(alpha) if alpha == int(alpha) else alpha


def _chosen(paths: Sequence[str], live: Live) -> list[str] | str:
    """Exactly these modules in PEFT's terms: last names if those choose no others, else whole paths, else an expression."""
    for names in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        if {path for path in live.modules if any(path == name or path.endswith(f".{name}") for name in names)} == set(paths):
            return names
    return "(?:" + "|".join(re.escape(path) for path in sorted(paths)) + ")"


def _task(saved: Iterable[str], live: Live) -> dict[str, Any]:
    """The task type, where PEFT's own additions for it agree with what is stored; else the class by name."""
    kind = type(live.model)
    for ending, task in (
        ("ForCausalLM", "CAUSAL_LM"),
        ("LMHeadModel", "CAUSAL_LM"),
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
    ):
        if kind.__name__.endswith(ending) and (task == "CAUSAL_LM" or _SAVED_BY_TASK & set(saved)):
            return {"task_type": task}
    return {"task_type": None, "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__}}
