"""PEFT adapter folder in, delta out. PEFT's keys name live modules; a delta's targets are checkpoint tensors.

Most checkpoints use the live names, and then this runs without torch. Where they do not (prefixes, stacked experts,
Conv1D, ties, heads that the base lacks) the model is built without data and its name map translates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import xp
from ..base import Base, LiveBase
from ..delta import Builder, Delta
from ..errors import FormatError, MismatchError, UsageError, near
from ..ops.op import flat_shape
from ..ops.spec import At
from ..stored import Tensor, hold, numpy_dtype
from . import starts
from .blocks import Block, Matrix, Unfit
from .folder import CONFIG, WEIGHTS, Adapter, Part, some

if TYPE_CHECKING:
    from torch import nn

    from .live import Live

Array = Any
Spot = tuple[str, At | None, At | None]
"""A checkpoint tensor, the view of the live tensor that it holds, and the view of itself that holds it."""

_TRANSPOSED = {"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"}
"""Model types whose Conv1D stores weights as (in, out): for square ones only the model tells."""

_LABELS = {"SEQ_CLS", "TOKEN_CLS"}
_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "bias")


def import_peft(folder: str | Path, base: Base, *, initial: str | Path | None = None, model: nn.Module | None = None) -> Delta:
    """A PEFT LoRA adapter as a delta on `base`: the same function, tensor by tensor.

    folder:   adapter_config.json and adapter_model.safetensors. Read: LoRA on linear layers, transformers' Conv1D,
              embeddings, convolutions and stacked expert parameters, with rank and alpha patterns; rsLoRA, DoRA, LoRA
              and trained biases, modules_to_save (added to the model where the base has no such tensor), trained
              tokens, resized embeddings
    initial:  the folder of the adapter before training, for starts that took their first product out of the base
              (PiSSA, CorDA, OLoRA, LoRA-GA). PiSSA and OLoRA by exact decomposition are recomputed without it
    model:    the model that the adapter was made for; default: built from the base's config, without data

    Scaling goes into each op's `scale`, factors keep their bits; whole tensors take the base's dtype. Errors:
    FormatError for a damaged folder or unknown keys, MismatchError for names, shapes or ranks that do not fit,
    InputError for settings weft has no meaning for.
    """
    adapter = Adapter.read(folder)
    first = None if initial is None else Adapter.read(initial)
    if first is None:
        starts.require_again(adapter)
    live = None if model is None else _known(adapter, _live(base, model))
    if live is None and not _direct(adapter, base):
        live = _fitting(adapter, base)
    return _Reader(adapter, first, base, live).delta()


# --- which names


class _Direct:
    """A checkpoint whose tensors have the names and orientation of the live model, as far as the adapter goes."""

    def __init__(self, base: Base) -> None:
        self.shapes = {name: tensor.shape for name, tensor in base.tensors.items()}

    def matrix(self, module: str, parameter: str = "weight") -> Matrix | str:
        name = f"{module}.{parameter}"
        return Matrix(name, self.shapes[name], "linear" if len(self.shapes[name]) == 2 else "conv")


def _direct(adapter: Adapter, base: Base) -> bool:
    """Whether the names can be taken as they are, without a model: plain matrices that are there and fit, and nothing
    that may be tied to another tensor, transposed, stacked or absent."""
    config = adapter.config
    if isinstance(base, LiveBase) or config.get("target_parameters") or adapter.tokens or base.config.get("model_type") in _TRANSPOSED:
        return False
    vocabulary = None if base.config.get("tie_word_embeddings") is False else base.config.get("vocab_size", -1)
    for part in adapter.parts:
        weight = base.tensors.get(f"{part.module}.weight")
        if weight is None or part.embedding or part.depth or (part.bias is not None and f"{part.module}.bias" not in base.tensors):
            return False
        fits = len(weight.shape) >= 2 and (*part.b.shape[:1], *part.a.shape[1:]) == tuple(weight.shape)
        if not fits or weight.shape[0] == vocabulary:
            return False
    found = [base.tensors.get(name) for name in adapter.values]
    return all(t is not None and t.shape == v.shape and t.shape[:1] != (vocabulary,) for t, v in zip(found, adapter.values.values(), strict=True))


def _live(base: Base, model: nn.Module) -> Live:
    from .live import Live

    return Live(base, model)


def _names(adapter: Adapter) -> dict[str, str]:
    """The live parameter that each key needs, by key; a module that wraps parameters stands for itself."""
    wrapped = bool(adapter.config.get("target_parameters"))
    out = {key: part.module if wrapped else f"{part.module}.weight" for part in adapter.parts for key in part.keys}
    return out | {name: name for name in (*adapter.values, *adapter.tokens)}


def _missing(adapter: Adapter, live: Live) -> list[str]:
    return sorted(key for key, name in _names(adapter).items() if name not in live.shapes and name not in live.modules)


def _known(adapter: Adapter, live: Live) -> Live:
    """The live model, once every key is known to name something in it."""
    if missing := _missing(adapter, live):
        names = _names(adapter)
        what = "none of its names match" if len(missing) == len(names) else f"{len(missing)} of its {len(names)} keys match nothing"
        made_for = adapter.config.get("base_model_name_or_path")
        raise MismatchError(
            f"{adapter.path}: {what} in {type(live.model).__name__}: {some(missing)}{near(names[missing[0]], live.shapes)}",
            hint="check that this is the base the adapter was made for" + (f" ({made_for})" if made_for else ""),
        )
    return live


def _fitting(adapter: Adapter, base: Base) -> Live:
    """The base's own model, or else the class that the adapter was trained on, whichever has all the names."""
    from .live import AUTO, skeleton

    live = _live(base, skeleton(base))
    if not _missing(adapter, live) or isinstance(base, LiveBase):
        return _known(adapter, live)
    mapping = adapter.config.get("auto_mapping") or {}
    kind = AUTO.get(str(adapter.config.get("task_type"))) or (mapping.get("base_model_class") if isinstance(mapping, dict) else None)
    if not isinstance(kind, str):
        return _known(adapter, live)
    try:
        other = _live(base, skeleton(base, kind=kind))
    except UsageError:  # there is no such class, or it has no model of the base's type
        return _known(adapter, live)
    return _known(adapter, min(live, other, key=lambda one: len(_missing(adapter, one))))


# --- what the adapter says


@dataclass
class _Touch:
    """All that an adapter does to one live tensor, in this order."""

    value: Array | None = None
    rows: tuple[Sequence[int], Array] | None = None
    blocks: list[Block] = field(default_factory=list)
    magnitude: Block | None = None
    dense: tuple[Array, float] | None = None

    def said(self) -> list[Any]:
        """The same list for two touches that mean the same, bit for bit."""
        blocks = [block.upright() for block in (*self.blocks, *([self.magnitude] if self.magnitude else []))]
        out = [(_raw(b.b, b.a, b.b0, b.a0), b.box, b.row, b.col, b.scale) for b in blocks]
        return [_raw(self.value), out, self.rows and (list(self.rows[0]), _raw(self.rows[1])), self.dense and (_raw(self.dense[0]), self.dense[1])]


def _raw(*arrays: Array | None) -> list[Any]:
    import numpy as np

    return [x if x is None else (str(x.dtype), x.shape, np.ascontiguousarray(x).tobytes()) for x in arrays]


class _Reader:
    """One import: what the adapter says of each live tensor, then what that is in the checkpoint."""

    def __init__(self, adapter: Adapter, first: Adapter | None, base: Base, live: Live | None) -> None:
        self.adapter, self.first, self.base, self.live = adapter, first, base, live
        self.names: _Direct | Live = live if live is not None else _Direct(base)
        self.touched: dict[str, _Touch] = {}
        self.patch: dict[str, Any] = {}
        self.tied: list[tuple[str, ...]] = []
        self.build = Builder(base)
        self.written: set[str] = set()

    def delta(self) -> Delta:
        adapter = self.adapter
        for name, tensor in adapter.values.items():
            self._value(name, tensor)
        for name, tensor in adapter.tokens.items():
            self._rows(name, tensor)
        for part in adapter.parts:
            self._factors(part)
        for name, touch in self.touched.items():
            spots = self._untied(name, touch)
            if spots is not None:
                self._emit(name, spots, touch)
        if not self.written:
            raise MismatchError(f"{adapter.path}: every tensor of the adapter is what the base has; nothing would change")
        config = {name: adapter.config[name] for name in _SETTINGS if adapter.config.get(name) not in (None, {}, False)}
        recipe = {"verb": "import", "method": "peft", "config": config, "adapter": _sha256(adapter.path / WEIGHTS)}
        if self.first is not None:
            recipe["initial"] = _sha256(self.first.path / WEIGHTS)
        tied = tuple(sorted(group for group in self.tied if self.written & set(group)))
        return self.build.done(recipe=recipe, config=self.patch, tied=tied, notes={"source": adapter.path.name})

    def _spots(self, name: str) -> list[Spot]:
        if self.live is None:
            return [(name, None, None)]
        return [(place.name, place.at, place.part) for place in self.live.stored(name)]

    def _value(self, name: str, tensor: Tensor) -> None:
        """A whole parameter, and the config patch that an added or resized one asks for."""
        value, spots = tensor.read(), self._spots(name)
        if len(spots) == 1 and spots[0][1:] == (None, None) and _is(value, self.base.tensor(spots[0][0])):
            return  # PEFT saves biases and embeddings that did not change with those that did
        self.touched[name] = _Touch(value=value)
        if self.live is None:
            return
        shape, model = self.live.shapes[name], self.live.model
        vocabulary, labels = _size(model, "vocab_size"), _size(model, "num_labels")
        if tensor.shape != shape and (tensor.shape[1:] != shape[1:] or shape[:1] not in ((vocabulary,), (labels,))):
            raise MismatchError(f"{self.adapter.path}: {name} has shape {list(tensor.shape)}, the model's has {list(shape)}")
        if len(shape) == 2 and tensor.shape != shape and shape[0] == vocabulary:
            self.patch["vocab_size"] = tensor.shape[0]
        elif len(shape) == 2 and (not spots or tensor.shape != shape) and shape[0] == labels and self.adapter.config.get("task_type") in _LABELS:
            self.patch |= _label_patch(tensor.shape[0], self.base.config)
        if not spots and self.base.config.get("architectures") != [type(model).__name__]:
            self.patch["architectures"] = [type(model).__name__]

    def _rows(self, name: str, tensor: Tensor) -> None:
        """Trained rows of an embedding; the config says which."""
        chosen = self.adapter.config.get("trainable_token_indices")
        if isinstance(chosen, dict):
            chosen = next((rows for end, rows in chosen.items() if name.removesuffix(".weight").endswith(end)), None)
        count = self.names.shapes.get(name, (0,))[0]
        good = isinstance(chosen, list) and len(set(map(str, chosen))) == len(chosen) and all(type(row) is int and 0 <= row < count for row in chosen)
        if not good or tensor.shape != (len(chosen or ()), *self.names.shapes[name][1:]):
            raise FormatError(
                f"{self.adapter.path / CONFIG}: trainable_token_indices must list the rows of {name} that {list(tensor.shape)} values belong to, "
                f"each once and below {count}; got {str(chosen)[:80]}"
            )
        self.touched.setdefault(name, _Touch()).rows = (chosen or (), tensor.read())

    # --- factors

    def _factors(self, part: Part) -> None:
        """One module's factors, and what goes with them."""
        path = self.adapter.path
        parameter, key = self._parameter(part)
        matrix = self.names.matrix(part.module, parameter)
        if isinstance(matrix, str):
            raise MismatchError(f"{path}: {some(part.keys)}: {matrix}")
        touch = self.touched.setdefault(matrix.name, _Touch())
        if touch.value is not None:
            matrix = replace(matrix, shape=tuple(touch.value.shape))
        touch.blocks += self._pairs(part, matrix, key)
        if part.magnitude is not None:
            touch.magnitude = self._magnitude(part, part.magnitude, matrix)
        if part.bias is not None:
            bias = f"{part.module}.bias"
            if bias not in self.names.shapes:
                raise MismatchError(f"{path}: {part.module} has a LoRA bias, but the module has no bias that it could be added to")
            self.touched.setdefault(bias, _Touch()).dense = (part.bias.read().reshape(-1), self.adapter.scale(key))

    def _parameter(self, part: Part) -> tuple[str, str]:
        """The parameter of its module that a part changes, and the name that rank and alpha patterns are held against:
        the module's, or the parameter's if it has a wrapper of its own."""
        targets = self.adapter.config.get("target_parameters")
        wrapped = self.live.wrapped(part.module, targets) if self.live is not None and isinstance(targets, list) else []
        if not wrapped and not part.depth:
            return "weight", part.module
        if part.depth >= len(wrapped):
            found = f"target_parameters chooses {some(wrapped) or 'none'}"
            raise MismatchError(f"{self.adapter.path}: {part.keys[0]} is for parameter {part.depth + 1} of {part.module}, but {found}")
        parameter = wrapped[len(wrapped) - 1 - part.depth]
        return parameter, f"{part.module}.{parameter}"

    def _pairs(self, part: Part, matrix: Matrix, key: str) -> list[Block]:
        """The factors as blocks of the live tensor, with scale and, if need be, what was taken out of the base."""
        adapter, first = self.adapter, self.first
        rank, scale = adapter.rank(key), adapter.scale(key)
        pairs = [replace(pair, scale=scale) for pair in _blocks(adapter, part, matrix, rank)]
        if first is not None:
            origin = next((p for p in first.parts if (p.module, p.depth) == (part.module, part.depth)), None)
            if origin is None or (first.rank(key), first.scale(key)) != (rank, scale):
                there = f"has rank {first.rank(key)} and scale {first.scale(key):g} there, not {rank} and {scale:g}" if origin else "is not there"
                raise MismatchError(
                    f"{first.path} is not where {adapter.path} started: {part.module} {there}", hint="leave `initial` out if it is converted already"
                )
            frozen = _blocks(first, origin, matrix, rank)
            return [replace(pair, b0=other.b, a0=other.a) for pair, other in zip(pairs, frozen, strict=True)]
        if start := starts.taken(adapter):
            w = self.base.tensor(self.live.whole(matrix.name) if self.live is not None else matrix.name).read()
            out = starts.again(start, matrix.layout, w if matrix.out == 0 else w.T, rank, scale)
            if out is None:
                raise MismatchError(f"{adapter.path}: PEFT has no working {start} start for {matrix.name}, a {matrix.layout} weight")
            return [replace(pair, b0=out[0], a0=out[1]) for pair in pairs]
        return pairs

    def _magnitude(self, part: Part, magnitude: Tensor, matrix: Matrix) -> Block:
        """DoRA's vector as a block with the vector as B, so that it follows the same cuts; its A is only a length."""
        import numpy as np

        m = magnitude.read().reshape(-1)
        if matrix.experts or len(m) != matrix.flat[matrix.out]:
            raise MismatchError(
                f"{self.adapter.path}: {part.module}: lora_magnitude_vector has {len(m)} entries, {matrix.name} of shape {list(matrix.shape)} needs others"
            )
        return Block.whole(m.reshape(-1, 1), np.zeros((1, matrix.flat[matrix.inp]), np.uint8), matrix.flat, matrix.out, matrix.inp)

    # --- into the delta

    def _untied(self, name: str, touch: _Touch) -> list[Spot] | None:
        """Where the change of a live tensor goes in the checkpoint; None if another name of the same tensor has said it.

        Names that are tied and change alike stay tied. If they do not, those without a tensor of their own in the
        checkpoint get one, a copy, and the config says that they are no longer tied: PEFT changes one of two tied
        layers without the other, too.
        """
        live, spots = self.live, self._spots(name)
        group = (name,) if live is None else live.tied(name)
        if live is None or len(group) == 1:
            return spots
        if touch.rows is not None or all(other in self.touched and self.touched[other].said() == touch.said() for other in group):
            stored = tuple(sorted({spot[0] for one in group for spot in self._spots(one)} | {one for one in group if not live.owns(one)}))
            if stored in self.tied:
                return None
            self.tied.append(stored)
            return spots
        self.patch |= _tie_patch(self.base.config)
        if name == next(one for one in group if one in self.touched):  # the first touched name makes the copies for the untouched
            for other in group:
                if other not in self.touched and not live.owns(other):
                    self.build.copy(other, live.whole(other))
        if live.owns(name):
            return spots
        if touch.value is not None:
            return []
        self.build.copy(name, live.whole(name))
        return [(name, None, None)]

    def _emit(self, name: str, spots: list[Spot], touch: _Touch) -> None:
        """Write what happens to a live tensor down as ops on checkpoint tensors."""
        if not spots:
            if touch.value is None:
                raise MismatchError(f"{self.adapter.path}: {name!r} is not in the checkpoint, and the adapter does not bring it whole")
            self.build.add(name, touch.value)
            spots = [(name, None, None)]
        elif touch.value is not None:
            for spot in spots:
                self._assign(spot, touch.value)
        live = self.names.shapes[name] if touch.value is None else tuple(touch.value.shape)
        for spot in spots:
            target, _, part = spot
            stored = self.base.tensors[target].shape if target in self.base.tensors and (touch.value is None or part is not None) else live
            self.written.add(target)
            try:
                self._ops(spot, touch, live, tuple(stored))
            except Unfit as error:
                raise MismatchError(f"{self.adapter.path}: the adapter changes {name!r}, but the checkpoint keeps it in {target!r} as {error}") from None

    def _assign(self, spot: Spot, value: Array) -> None:
        target, at, part = spot
        old = self.base.tensor(target)
        new = xp.cast(value if at is None else at.get(value), str(numpy_dtype(old.dtype)))
        if part is None and tuple(new.shape) != tuple(old.shape):
            self.build.add(target, new, kind="replace")
        else:
            self.build.put(target, "assign", {"values": _held(new)}, at=part)

    def _ops(self, spot: Spot, touch: _Touch, live: tuple[int, ...], stored: tuple[int, ...]) -> None:
        """The ops on one checkpoint tensor: rows, low-rank products, DoRA's norms, an added vector."""
        import numpy as np

        target, at, part = spot
        if touch.rows is not None:
            if at is not None or part is not None:
                raise Unfit("a part of another tensor")
            rows = np.asarray(touch.rows[0], np.int64)
            order = np.argsort(rows)
            index = (rows[order, None] * stored[1] + np.arange(stored[1])).reshape(-1)
            values = xp.cast(touch.rows[1], str(numpy_dtype(self.base.tensor(target).dtype)))
            self.build.put(target, "assign", {"index": index, "values": values[order].reshape(-1)})
        for block in touch.blocks:
            seen = block.seen(at, live)
            if seen is not None:
                made = seen.placed(part, stored).upright()
                t = {"A": made.a, "B": made.b} if made.b0 is None else {"A": made.a, "B": made.b, "A0": made.a0, "B0": made.b0}
                self.build.put(target, "lowrank", {name: _held(x) for name, x in t.items()}, at=made.at(stored), scale=made.scale)
        if touch.magnitude is not None:
            seen = touch.magnitude.seen(at, live)
            if seen is not None:
                if seen.a.shape != touch.magnitude.a.shape:
                    raise Unfit("a part of its inputs, and DoRA needs the norm over all of them")
                made = seen.placed(part, stored)
                self.build.put(target, "magnitude", {"m": _held(made.b.reshape(-1))}, at=made.at(stored), axis=0 if made.row < made.col else 1)
        if touch.dense is not None:
            values = touch.dense[0].reshape(live)
            self.build.put(target, "dense", {"values": _held(values if at is None else at.get(values))}, at=part, scale=touch.dense[1])


def _blocks(adapter: Adapter, part: Part, matrix: Matrix, rank: int) -> list[Block]:
    """The factors of a part as blocks of the live tensor: one, or one for each expert of a stack."""
    a, b = part.a, part.b
    flat, count = matrix.flat, max(matrix.experts, 1)
    want_a, want_b = (count * rank, flat[matrix.inp]), (flat[matrix.out], count * rank)
    if flat_shape(a.shape) != want_a or flat_shape(b.shape) != want_b or part.embedding != (matrix.layout == "embedding"):
        raise MismatchError(
            f"{adapter.path}: {part.module}: A {list(a.shape)} and B {list(b.shape)} do not fit {matrix.name} of shape {list(matrix.shape)} "
            f"({matrix.layout}) at rank {rank}; expected A {list(want_a)} and B {list(want_b)}",
            hint="check the base, and r and rank_pattern in adapter_config.json",
        )
    left, right = b.read().reshape(want_b), a.read().reshape(want_a)
    if not matrix.experts:
        return [Block.whole(left, right, flat, matrix.out, matrix.inp)]
    lefts, rights = left.reshape(-1, rank, count), right.reshape(count, rank, -1)
    full = [(0, size) for size in flat[1:]]
    return [Block(lefts[:, :, e], rights[e], ((e, e + 1), *full), matrix.out, matrix.inp) for e in range(count)]


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _held(x: Array) -> Tensor:
    import numpy as np

    return hold(np.ascontiguousarray(x))


def _is(value: Array, old: Tensor) -> bool:
    """Whether the value, in the dtype of a stored tensor, is that tensor."""
    return tuple(value.shape) == tuple(old.shape) and _raw(xp.cast(value, str(numpy_dtype(old.dtype)))) == _raw(old.read())


def _size(model: nn.Module, name: str) -> int:
    """A size that the live model's config knows; -1 if it does not."""
    value = getattr(getattr(model, "config", None), name, -1)
    return value if isinstance(value, int) else -1


def _label_patch(count: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Label names for a head of `count` outputs, unless the base's config has as many."""
    known, back = config.get("id2label"), config.get("label2id")
    if isinstance(known, dict) and len(known) == count:
        return {}
    stale: dict[str, Any] = dict.fromkeys(known) if isinstance(known, dict) else {}
    old: dict[str, Any] = dict.fromkeys(back) if isinstance(back, dict) else {}
    return {"id2label": stale | {str(i): f"LABEL_{i}" for i in range(count)}, "label2id": old | {f"LABEL_{i}": i for i in range(count)}}


def _tie_patch(config: Mapping[str, Any]) -> dict[str, Any]:
    """The patch that unties word embeddings, wherever the config says it."""
    inner = {k: {"tie_word_embeddings": False} for k, v in config.items() if isinstance(v, dict) and "tie_word_embeddings" in v}
    return {"tie_word_embeddings": False, **inner}
