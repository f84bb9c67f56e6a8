"""The permutation symmetries of a checkpoint, from the names and shapes of its tensors and its config.

    symmetries(base)                                   # known architectures: see FAMILIES in _layouts.py
    symmetries(base, "chain")                          # linear and convolution layers that follow each other, with batch norms
    symmetries(base, {"fc1.weight": "h -", "fc1.bias": "h", "fc2.weight": "- h"})

A *layout* says for each tensor, with one word an axis, which units the axis counts: `-` for an axis that stays, else the name of a group.
`h*16` is a group whose units are 16 consecutive entries each (a flattened channel, a head); `h/4*16` one whose units have 4 parts of 16
entries, where other places say `h*16`; `a+b` are two runs one after the other. Tensors that are not named stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, near
from ._layouts import FAMILIES, IGNORED, TRANSPOSED, WIDTHS
from .permutations import Group, Place

if TYPE_CHECKING:
    from ..base import Base

Layout = Mapping[str, str]

RESIDUAL, CHAIN = "residual", "chain"

_OUTSIDE = ("residual", "pooled", "transformed")
"""Groups that can be seen from outside when no head is on top."""

_HINT = 'give a layout, such as {"fc1.weight": "h -", "fc1.bias": "h", "fc2.weight": "- h"}, or "chain" if its layers follow each other'


def symmetries(base: Base, layout: Layout | str | None = None) -> list[Group]:
    """The groups of units of `base` that can be reordered without changing what it computes, in the order of its tensors.

    layout: None for a known architecture, "chain" for layers that follow each other in the order of their names (biases, batch norms and
    element-wise activations between them, a flattening before the first linear one), else what each axis counts (see above). It is
    taken at its word: what it leaves out stays, and nothing checks that the function does.

    Known architectures: heads (with grouped queries, key/value heads and the query heads inside each; rotary embeddings allow no more),
    hidden units of MLPs, and, where a head is on top that hides it, the residual stream. A bare encoder's stream is its output: it stays.

    UsageError for an architecture that is not known, a tensor of a known one that is in no table, and a layout that does not fit.
    """
    if layout is None:
        found = _known(base)
    elif isinstance(layout, str):
        if layout != CHAIN:
            raise UsageError(f"there is no layout {layout!r}; the only one with a name is {CHAIN!r}", hint=_HINT)
        found = _chain(base)
    else:
        found = dict(layout)
    return _groups(base, found)


def hidden(base: Base, groups: Iterable[Group]) -> tuple[str, list[Group]]:
    """Of a known architecture, the config's key for the width of its MLPs, and the groups of their hidden units, all of that width."""
    found = [group for group in groups if re.fullmatch(r"layers\.\d+\.mlp", group.name)]
    return WIDTHS.get(str(base.config.get("model_type")), "intermediate_size"), found


# --- layouts as groups


@dataclass(frozen=True)
class _Run:
    """One word of a layout: units of a group, of `parts` parts (0: it does not count parts) of `width` entries."""

    group: str
    parts: int
    width: int

    @property
    def entries(self) -> int:
        """Entries of one unit."""
        return max(1, self.parts) * self.width


_WORD = re.compile(r"([^\s*/+-][^\s*/+]*)(?:/([1-9]\d*))?(?:\*([1-9]\d*))?")


def _groups(base: Base, layout: Layout) -> list[Group]:
    problems: list[str] = []
    axes = list(_runs(base, layout, problems))
    sizes: dict[str, int] = {}
    parts: dict[str, int] = {}
    for tensor, axis, runs in axes:
        for run in runs:
            if run.parts and parts.setdefault(run.group, run.parts) != run.parts:
                problems.append(f"{tensor}: the units of {run.group} have {run.parts} parts here and {parts[run.group]} elsewhere")
        if len({run.group for run in runs}) == 1:
            here, left = divmod(base.tensor(tensor).shape[axis], sum(run.entries for run in runs))
            if left or sizes.setdefault(runs[0].group, here) != here:
                whole = "no whole number of" if left else str(here)
                problems.append(f"{tensor}: axis {axis} has {whole} units of {runs[0].group}, elsewhere {sizes.get(runs[0].group, 'unknown')}")
    places: dict[str, list[Place]] = {name: [] for name in sizes}
    for tensor, axis, runs in axes:
        start, end = 0, base.tensor(tensor).shape[axis]
        for run in runs:
            if run.group not in sizes:
                problems.append(f"{tensor}: the size of {run.group} is not known; name it on an axis of its own")
                continue
            if start % run.width or end % run.width:
                problems.append(f"{tensor}: axis {axis}: {run.group} starts at {start} of {end}, which is no multiple of its width {run.width}")
            places[run.group].append(Place(tensor, axis, start, run.width, bool(run.parts) and parts[run.group] > 1))
            start += sizes[run.group] * run.entries
        if start != end and not problems:
            problems.append(f"{tensor}: axis {axis} has {end} entries, its groups have {start}")
    if problems:
        raise UsageError(f"the layout does not fit {base.source}", problems=list(dict.fromkeys(problems)), hint=_HINT)
    return [Group(name, sizes[name], tuple(places[name]), parts.get(name, 1)) for name in places if sizes[name] * parts.get(name, 1) > 1]


def _runs(base: Base, layout: Layout, problems: list[str]) -> Iterator[tuple[str, int, list[_Run]]]:
    """Each axis that is not `-`: tensor, axis and its runs."""
    for tensor, text in layout.items():
        words = text.split()
        if tensor not in base.tensors:
            problems.append(f"there is no tensor {tensor!r}{near(tensor, base.tensors)}")
        elif len(words) != len(base.tensor(tensor).shape):
            problems.append(f"{tensor}: {text!r} names {len(words)} axes, the tensor has the shape {list(base.tensor(tensor).shape)}")
        else:
            for axis, word in enumerate(words):
                if word == "-":
                    continue
                matches = [_WORD.fullmatch(run) for run in word.split("+")]
                runs = [_Run(found[1], int(found[2] or 0), int(found[3] or 1)) for found in matches if found]
                if len(runs) < len(matches):
                    problems.append(f"{tensor}: {word!r} is no group; expected NAME, NAME*WIDTH or NAME/PARTS*WIDTH, or several with +")
                else:
                    yield tensor, axis, runs


# --- known architectures


def _known(base: Base) -> dict[str, str]:
    config = base.config
    kind = config.get("model_type")
    rows = next((rows for kinds, rows in FAMILIES.items() if kind in kinds.split()), None)
    if rows is None:
        what = f"models of type {kind!r} are" if kind else "it has no model_type, and models without one are"
        raise UsageError(
            f"the symmetries of {base.source} are not known: {what} in no table (there are {', '.join(sorted(' '.join(FAMILIES).split()))})", hint=_HINT
        )
    heads = _number(config, "num_attention_heads", "n_head", "n_heads")
    width = _number(config, "head_dim", default=_number(config, "hidden_size", "n_embd", "dim") // heads)
    pairs = _number(config, "num_key_value_heads", default=heads)
    words = {"query": f"{{}}heads/{heads // pairs}*{width}", "key": f"{{}}heads*{width}", "fused": f"{{}}heads*{3 * width}", "mlp": "{}mlp"}
    head = any(re.search(r"For[A-Z]|Head", str(name)) for name in config.get("architectures") or ())
    same = _aliases(base)
    out: dict[str, str] = {}
    for name in base.names:
        found = _row(rows, name)
        if found is None:
            if not name.endswith(IGNORED):
                raise UsageError(f"{base.source}: tensor {name!r} is in no table for models of type {kind!r}", hint=_HINT)
            continue
        axes, layer = found
        if name.endswith(".bias"):
            axes = axes[-1:] if kind in TRANSPOSED else axes[:1]
        wanted = ["+".join(words.get(same.get(w, w), same.get(w, w)).format(f"layers.{layer}.") for w in axis.split("+")) for axis in axes]
        out[name] = " ".join("-" if not head and word in _OUTSIDE else word for word in wanted)
    return out


def _row(rows: Mapping[str, str], name: str) -> tuple[list[str], str] | None:
    """The axes of the row for a tensor, the longest that fits, and the number of its layer."""
    module = re.sub(r"\.(weight|bias)$", "", name)
    best, layer = "", ""
    for pattern in rows:
        found = re.search(r"(?:^|\.)" + re.escape(pattern).replace(r"\.N\.", r"\.(\d+)\.") + "$", module)
        if found and len(pattern) > len(best):
            best, layer = pattern, found[1] if found.groups() else ""
    return (rows[best].split(), layer) if best else None


def _aliases(base: Base) -> dict[str, str]:
    """Groups that are the same one in this checkpoint."""
    architecture = str((base.config.get("architectures") or [""])[0])
    pooled = any(name.endswith(("pooler.dense.weight", "pre_classifier.weight")) for name in base.names) and "TokenClassification" not in architecture
    same = {} if pooled else {"pooled": RESIDUAL}
    if base.config.get("tie_word_embeddings", True):  # the output layer is the embedding: what it is given has the stream's channels
        same["transformed"] = RESIDUAL
    return same


def _number(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        if isinstance(config.get(name), int) and config[name] > 0:
            return int(config[name])
    if default is None:
        raise UsageError(f"the config has no {' or '.join(names)}", hint=_HINT)
    return default


# --- layers that follow each other


def _chain(base: Base) -> dict[str, str]:
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in sorted(base.names, key=_natural):
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module, {})[parameter] = base.tensor(name).shape
    maps = [module for module, shapes in modules.items() if len(shapes.get("weight", ())) > 1]
    out: dict[str, str] = {}
    units, width = "-", 0
    for module, shapes in modules.items():
        shape = shapes.get("weight", ())
        if len(shape) > 1:
            times, left = divmod(shape[1], width) if width else (1, 0)
            if left or not times or (times > 1 and len(shape) > 2):
                raise UsageError(
                    f"{base.source} is no chain in the order of its names: {module} takes {shape[1]} inputs and the layer before it gives {width}", hint=_HINT
                )
            taken = units if times == 1 or units == "-" else f"{units}*{times}"
            units, width = "-" if module == maps[-1] else module, shape[0]
            out[f"{module}.weight"] = " ".join([units, taken, *["-"] * (len(shape) - 2)])
        elif not {"running_mean", "running_var"} <= set(shapes):
            raise UsageError(f"{base.source}: {module or 'a tensor'} is neither a linear, a convolution nor a batch norm; a chain has no others", hint=_HINT)
        for parameter, size in shapes.items():
            if size == (width,):
                out[f"{module}.{parameter}"] = units
    return out


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts 2 before 10."""
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", name) if piece]
