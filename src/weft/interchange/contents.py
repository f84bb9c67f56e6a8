"""What a delta is in terms of a live model's modules: low-rank products, norms, whole values, and what is none of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..base import Base
from ..delta import Delta, Entry
from ..ops import chain
from ..ops.op import flat_shape
from ..ops.spec import OpEntry
from ..stored import FLOATS, numpy_dtype
from .blocks import Block, Matrix, Unfit, joined, truncated

if TYPE_CHECKING:
    from .live import Live

Array = Any


class Contents:
    """All targets of a delta, sorted by what an adapter can say of them.

    blocks:   products by live matrix; empty where there is only a norm
    matrices: these matrices, as LoRA sees them
    norms:    DoRA's magnitudes by live matrix
    values:   tensors to store whole, by live name, as they are after the change
    unfit:    targets that cannot be said, with the reason
    residual: relative error of each target that was approximated
    """

    def __init__(self, delta: Delta, base: Base, live: Live, *, to: str, rank: int | None, energy: float | None) -> None:
        self.delta, self.base, self.live = delta, base, live
        self.to, self.rank, self.energy = to, rank, energy
        self.blocks: dict[str, list[Block]] = {}
        self.matrices: dict[str, Matrix] = {}
        self.norms: dict[str, Array] = {}
        self.values: dict[str, Array] = {}
        self.unfit: dict[str, str] = {}
        self.residual: dict[str, float] = {}
        for target, entry in delta.entries.items():
            try:
                self._read(target, entry)
            except Unfit as error:
                self.unfit[target] = str(error)

    def _read(self, target: str, entry: Entry) -> None:
        """Sort one target in; Unfit if no adapter can hold it."""
        if target.startswith("@"):
            raise Unfit("it acts on activations")
        kind = entry.change.kind if entry.change else None
        if kind == "add":
            self._value(target, entry)
            return
        if kind == "copy" and entry.change and self._untied(target, entry.change.source):
            names = [target]
        elif kind is not None:
            raise Unfit(f"a {kind} entry changes the model's structure")
        else:
            names = self._names(target)
        if not entry.ops:
            return
        last, exact = entry.ops[-1], self.rank is None and self.energy is None
        if len(entry.shape) < 2 or (exact and last.op in ("assign", "xor") and "index" not in last.t and last.at is None):
            self._value(target, entry)
            return
        norm = last if last.op == "magnitude" and last.at is None else None
        try:
            if norm is not None and self.to == "vllm":
                raise Unfit("vLLM has no DoRA")
            blocks = [block for op in entry.ops[: -1 if norm else None] for block in _products(op, self.delta, entry.shape, 1.0)]
            if self.rank is not None and _rank(blocks, entry.shape) > self.rank:
                raise Unfit(f"its rank is larger than {self.rank}")
        except Unfit:
            if exact:
                raise
            norm, blocks = None, self._approximated(target, entry, names)
        for name in names:
            self._put(name, target, entry, blocks, norm)

    def _untied(self, target: str, source: str) -> bool:
        """Whether a copied tensor is one that the base has tied to its source."""
        live = self.live
        return target in live.shapes and source in {place.name for one in live.tied(target) for place in live.stored(one)}

    def _names(self, target: str) -> list[str]:
        """The live tensors that a change of a checkpoint tensor reaches: all that are tied to it, but for those that the
        delta gives a copy of their own."""
        own = {name for name, entry in self.delta.entries.items() if entry.change and entry.change.kind in ("copy", "add")}
        places = self.live.names.live(target)
        names = dict.fromkeys(name for place in places for name in self.live.tied(place.name) if name not in own)
        if not names:
            raise Unfit(self.live.names.why(target) or "the model does not use it")
        return list(names)

    def _value(self, target: str, entry: Entry) -> None:
        """A tensor that is stored as it is after the change."""
        import numpy as np

        places = self.live.names.live(target)
        if not places or any(place.at or place.part for place in places):
            raise Unfit(self.live.names.why(target) or "the model keeps it as a part of another tensor")
        added = entry.change is not None and entry.change.kind == "add"
        old = np.zeros(entry.shape, numpy_dtype(entry.dtype)) if added else self.base.tensor(target).read()
        names = [place.name for place in places] if added else self._names(target)
        value = chain.rewrite(old, entry.ops, self.delta.get)
        if tuple(value.shape) != self.live.shapes[names[0]]:
            raise Unfit(f"its shape {list(value.shape)} is not the model's {list(self.live.shapes[names[0]])}")
        self.values |= dict.fromkeys(names, value)

    def _put(self, name: str, target: str, entry: Entry, blocks: Sequence[Block], norm: OpEntry | None) -> None:
        """Move products from a checkpoint tensor to the live tensor `name`."""
        import numpy as np

        live, (module, _, parameter) = self.live, name.rpartition(".")
        matrix = live.matrix(module, parameter)
        if isinstance(matrix, str):
            raise Unfit(matrix)
        copied = target not in self.base.tensors
        views = [(None, None)] if copied else [(p.at, p.part) for p in live.names.live(target) if p.name in live.tied(name)]
        moved = [seen.placed(at, live.shapes[name]) for at, part in views for block in blocks if (seen := block.seen(part, entry.shape)) is not None]
        if norm is not None:
            if views != [(None, None)] or matrix.experts or int(norm.cfg.get("axis", 0)) % len(entry.shape) != matrix.out:
                raise Unfit("its norms are not those of a module's outputs")
            self.norms[name] = np.asarray(self.delta.get(norm.t["m"].key), np.float32)
        self.blocks.setdefault(name, []).extend(moved)
        self.matrices[name] = matrix

    def _approximated(self, target: str, entry: Entry, names: Sequence[str]) -> list[Block]:
        """The best low-rank part of a target's change: one product, or one for each matrix of a stack."""
        import numpy as np

        old = self.base.tensor(entry.change.source if entry.change else target)
        if old.dtype not in FLOATS:
            raise Unfit(f"its dtype is {old.dtype}")
        w = np.asarray(old.read(), np.float32)
        change = chain.rewrite(w, entry.ops, _single(self.delta)) - w
        seen = self.live.matrix(*names[0].rpartition(".")[::2])
        stacked = change.ndim == 3 and isinstance(seen, Matrix) and seen.experts > 0
        blocks, rest = [], 0.0
        for number, matrix in enumerate(change if stacked else [change.reshape(flat_shape(change.shape))]):
            b, a, residual = truncated(matrix, self.rank, self.energy)
            rest += (residual * float(np.linalg.norm(matrix.astype(np.float64)))) ** 2
            box = ((number, number + 1), (0, matrix.shape[0]), (0, matrix.shape[1]))
            blocks.append(Block(b, a, box, 1, 2) if stacked else Block.whole(b, a, matrix.shape))
        total = float(np.linalg.norm(change.astype(np.float64)))
        self.residual[target] = rest**0.5 / total if total else 0.0
        return blocks


def _products(op: OpEntry, delta: Delta, shape: tuple[int, ...], factor: float) -> list[Block]:
    """An additive op as products on the stored tensor; Unfit if it is none."""
    view = op.at.shape(shape) if op.at is not None else shape
    if op.op == chain.SUM:
        found = [block for term in op.terms for inner in term.ops for block in _products(inner, delta, view, factor * term.scale)]
    else:
        scale = factor * float(op.cfg.get("scale", 1.0))
        found = [Block.whole(*pair[:2], flat_shape(view), scale=scale, b0=pair[2], a0=pair[3]) for pair in _pairs(op, delta)]
    return [block.placed(op.at, shape) for block in found]


def _pairs(op: OpEntry, delta: Delta) -> list[tuple[Array, Array, Array | None, Array | None]]:
    """B, A and, if there are any, the frozen B0, A0 of an op."""
    import numpy as np

    if op.op not in ("lowrank", "svd", "bilinear"):
        raise Unfit(f"{op.op} is not a low-rank product")
    t = chain.resolve(op, delta.get, np.zeros(0, np.float32))
    if op.op == "svd":
        frozen = (t["P0"], t["Q0"] * t["lam0"].reshape(-1, 1)) if "P0" in t else (None, None)
        return [(t["P"], t["Q"] * t["lam"].reshape(-1, 1), *frozen)]
    if op.op == "bilinear":
        return [(t["B"], t["M"] @ t["A"], None, None)]
    if len({delta.tensors[ref.key].dtype for ref in op.t.values()}) == 1 and not any(ref.take for ref in op.t.values()):
        t = {name: delta.get(ref.key) for name, ref in op.t.items()}  # the factors' own dtype
    return [(t["B"], t["A"], t.get("B0"), t.get("A0"))]


def _rank(blocks: Sequence[Block], shape: tuple[int, ...]) -> int:
    """The rank of a sum of products; of one matrix, in a stack."""
    if not blocks:
        return 0
    if all(len(block.box) == 2 for block in blocks):
        return len(joined(blocks, flat_shape(shape))[1])
    return max(sum(len(other.a) for other in blocks if other.box[0] == block.box[0]) for block in blocks)


def _single(delta: Delta) -> Any:
    """Tensors by key with floats as float32: what `rewrite` of a float32 tensor takes, `assign` included."""
    import numpy as np

    def get(key: str) -> Array:
        return np.asarray(delta.get(key), np.float32) if delta.tensors[key].dtype in FLOATS else delta.get(key)

    return get


def whole_modules(contents: Contents, carrying: set[str]) -> tuple[dict[str, Mapping[str, Array]], dict[str, Array]]:
    """The values as modules with all their tensors, because PEFT saves all tensors of a module or none, and the biases of
    modules that are not stored so. `carrying`: modules with LoRA, which PEFT cannot store whole; what is unfit is noted."""
    live = contents.live
    modules = {name.rpartition(".")[0] for name in contents.values if not name.endswith(".bias")}
    saved: dict[str, dict[str, Array]] = {}
    for module in sorted(modules):
        others = [path for path in live.modules if path.endswith(module) and path != module]
        leaves = {name: name.rpartition(".")[2] for name in live.shapes if name.rpartition(".")[0] == module}
        absent = [name for name in leaves if name not in contents.values and not live.is_whole(name)]
        if module in carrying or others or absent:
            why = "LoRA is on the same module" if module in carrying else f"PEFT would take {others[0]} for it" if others else f"{absent[0]} is not at hand"
            contents.unfit |= {name: why for name in leaves if name in contents.values}
        else:
            base = contents.base
            saved[module] = {leaf: contents.values[name] if name in contents.values else base.tensor(live.whole(name)).read() for name, leaf in leaves.items()}
    biases = {name: value for name, value in contents.values.items() if name.rpartition(".")[0] not in modules}
    return _hoisted(saved, live), biases


def _hoisted(saved: dict[str, dict[str, Array]], live: Live) -> dict[str, Mapping[str, Array]]:
    """Modules whose parent is stored in full, under the parent's name: a head of two layers is one head."""
    for module in sorted(saved, key=lambda path: -path.count(".")):
        parent = module.rpartition(".")[0]
        inside = {name for name in live.shapes if parent and name.startswith(f"{parent}.")}
        given = {f"{one}.{leaf}": value for one, leaves in saved.items() if one.startswith(f"{parent}.") for leaf, value in leaves.items()}
        if inside and inside == set(given):
            saved = {one: leaves for one, leaves in saved.items() if not one.startswith(f"{parent}.")}
            saved[parent] = {name[len(parent) + 1 :]: value for name, value in given.items()}
            return _hoisted(saved, live)
    return dict(sorted(saved.items()))
