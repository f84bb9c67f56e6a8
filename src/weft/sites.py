"""Sites: the places in a live model that can be changed, and how to point at them. The only module that knows architectures.

    all_sites(model)                                       every parameter, with its role, layer and shape
    sites(model, "attention.query@0-3")                    some of them
    sites(model, ["attention", "mlp.down"], exclude="@0")  several at once, without the first layer

A *role* says what a parameter is for, whatever the architecture calls it: `attention.query`, `.key`, `.value`, `.output`, `.qkv`
(fused), the same under `cross_attention`; `mlp.gate`, `.up`, `.down`, `.gate_up` (fused), `.router`; `experts.gate_up`, `experts.down`
(stacked in three dimensions, or `.gate` and `.up` where they live apart); `embedding.token`, `.position`, `.type`, `.patch`,
`.special`; `norm.attention`, `.mlp`, `.final`, `.embedding` ...; `head.lm`, `.classifier`, `.pooler` ... A bias has its module's role.
What no table knows has its module's kind as its role (`linear`, `conv`, `norm`, ...), so plain modules work too.

A new architecture is a few rows in `_roles.py`, whose docstring says how; often it needs none.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache

from torch import nn

from ._roles import BY_TYPE, COMMON, CROSS_ATTENTION, LAYER_LISTS, STACKS
from .errors import UsageError, near

KINDS = ("linear", "conv1d", "conv", "embedding", "norm", "bias", "parameter")
"""What a parameter is to its module. `conv1d` is the transposed linear of transformers (stored in x out), `conv` a real convolution,
`parameter` anything whose module is of no known class (stacked experts, routers, class tokens)."""


@dataclass(frozen=True)
class Site:
    """One parameter of a live model.

    name: its live name, `model.layers.0.self_attn.q_proj.weight`; the first one when it is tied.
    module: path of the module that holds it (`""` is the root); param: its name there (`weight`, `bias`, `gate_up_proj`).
    role: what it is for, see the module's docstring. layer: index in its stack, None outside the layers.
    shape: as stored. kind: one of `KINDS`.
    stack: `encoder`, `decoder`, `vision`, `text` or `audio` where the model has several stacks of layers, else `""`.
    tied: the other live names of the same tensor.
    """

    name: str
    module: str
    param: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    kind: str
    stack: str = ""
    tied: tuple[str, ...] = ()


def all_sites(model: nn.Module) -> list[Site]:
    """Every parameter of `model` that its state dict shows, in model order; tied ones once, under their first name.

    What hides from the state dict (the tensors of an attached delta) is no site.
    """
    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    shown = model.state_dict(keep_vars=True).keys()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in shown:
            tied.setdefault(first.setdefault(id(parameter), name), []).append(name)
    reader = _Reader(model)
    found = [replace(reader.site(names[0]), tied=tuple(names[1:])) for names in tied.values()]
    if len({s.stack for s in found if s.layer is not None}) < 2:
        found = [replace(s, stack="") for s in found]
    return found


def sites(model: nn.Module, select: str | Sequence[str] = "all-linear", exclude: str | Sequence[str] = (), *, kinds: Sequence[str] = ()) -> list[Site]:
    """The sites of `model` that any token of `select` points at and none of `exclude` does, in model order.

    A token is the first of these that fits:

    - `all`: everything; `all-linear`: every weight of a linear or Conv1D module and every stacked expert weight inside the layers.
      Left out are embeddings, output heads, classifiers, poolers, routers that are no linear modules, and linear modules outside
      the layers (PEFT's word of the same name takes poolers, projections and transforms outside the layers, and no stacked experts).
      In a model without layers, every linear weight that is no head;
    - a glob (with `*`, `?` or `[`) on the live name or the module path: `*.q_proj.weight`, `*.q_proj`;
    - a role or the beginning of one: `attention.query`, `attention`, `mlp`, `norm`;
    - a stack: `decoder`, `vision`;
    - the last components of a module path or a live name, as in PEFT's target modules: `q_proj`, `self_attn.q_proj`.

    `@` and a layer range may follow a token, or stand alone for all of those layers: `@5`, `@2-5` (both included), `@3-` (to the last),
    `@-1` (the last), `@-2-` (the last two). Negative numbers count from the end of each stack; sites outside the layers have no number.

    A role or module takes biases along; `kinds` keeps only sites of these kinds (of `KINDS`), as in `kinds=("linear", "conv1d")`.

    Raises UsageError when a token of `select` points at nothing, a token of `exclude` at nothing and is no role either, or nothing is
    left; all such tokens are named at once, with near misses, and the roles that exist.
    """
    model_name = type(model).__name__
    wanted, unwanted = _tokens(select, "select"), _tokens(exclude, "exclude")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UsageError(f"unknown kinds of site: {', '.join(unknown)}", hint=f"use some of {', '.join(KINDS)}")
    found = all_sites(model)
    pool = [s for s in found if not kinds or s.kind in kinds]
    search = _Search(pool, depths=_depths(found))
    hint = f"a role, a module name such as 'q_proj', a glob or 'all-linear'; roles{' of kind ' + ', '.join(kinds) if kinds else ''} here: {_inventory(pool)}"

    problems: list[str] = [] if wanted else ["select is empty"]
    chosen: set[str] = set()
    dropped: set[str] = set()
    for token in wanted:
        hits, why = search(token)
        chosen.update(s.name for s in hits)
        if not hits:
            problems.append(f"{token!r}: {why or _missing(model, token, pool)}")
    for token in unwanted:
        hits, why = search(token)
        dropped.update(s.name for s in hits)
        if why or not (hits or _is_role(token.partition("@")[0])):
            problems.append(f"exclude {token!r}: {why or _missing(model, token, pool)}")
    if problems:
        raise UsageError(f"cannot select sites of {model_name}", problems=problems, hint=hint)
    if not chosen - dropped:
        raise UsageError(f"no site of {model_name} is selected: exclude takes away all {len(chosen)} that select points at", hint=hint)
    return [s for s in pool if s.name in chosen and s.name not in dropped]


class _Reader:
    """Reads the role, kind, layer and stack of a parameter from its name and the classes along its path."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        # The nearest configuration counts: in a composite model each part has its own.
        self.types: dict[str, str] = {}
        for path, module in self.modules.items():
            own = getattr(getattr(module, "config", None), "model_type", None)
            self.types[path] = own if isinstance(own, str) else self.types.get(path.rpartition(".")[0], "")

    def site(self, name: str) -> Site:
        path, _, param = name.rpartition(".")
        module = self.modules[path]
        shape = tuple(getattr(module, param).shape)
        parts = path.split(".") if path else []
        kind = _module_kind(module, param, len(shape))
        layer = self._layer(parts, kind)
        role = _role([*parts, *_own_part(param)], self.types[path], kind, layer) or kind
        if "bias" in param.split("_"):
            kind = "bias"
        stack = next((STACKS[p] for p in parts if p in STACKS), "")
        return Site(name=name, module=path, param=param, role=role, layer=layer, shape=shape, kind=kind, stack=stack)

    def _layer(self, parts: list[str], kind: str) -> int | None:
        # A layer is a block: in a list of single modules (`layers.0` is a Linear) nothing is numbered.
        blocks = len(parts) if kind == "parameter" else len(parts) - 1
        for i in range(1, blocks):
            if parts[i].isdecimal() and parts[i - 1] in LAYER_LISTS and isinstance(self.modules[".".join(parts[:i])], (nn.ModuleList, nn.Sequential)):
                return int(parts[i])
        return None


def _own_part(param: str) -> list[str]:
    """What a parameter's name adds to its module's path: nothing for `weight` and `bias`, `in_proj` for `in_proj_bias`."""
    return [] if param in ("weight", "bias") else [param.removesuffix("_weight").removesuffix("_bias")]


def _module_kind(module: nn.Module, param: str, ndim: int) -> str:
    """The kind of a module's parameter, were it no bias."""
    transformers = sys.modules.get("transformers.pytorch_utils")  # a Conv1D exists only once that is imported
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)):
        return "norm"
    if ndim == 1 and any("Norm" in c.__name__ for c in type(module).__mro__):
        return "norm"  # each family of transformers has an RMSNorm class of its own
    if param in ("weight", "bias"):
        if isinstance(module, nn.Linear):
            return "linear"
        if transformers is not None and isinstance(module, transformers.Conv1D):
            return "conv1d"
        if isinstance(module, nn.modules.conv._ConvNd):
            return "conv"
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return "embedding"
    return "parameter"


Rows = dict[str, list[tuple[list[str], str]]]


@cache
def _rows(model_type: str) -> Sequence[Rows]:
    """The tables for a model type in the order they are asked: last component -> (pattern, role), longest pattern first."""
    tables = [rows for types, rows in BY_TYPE.items() if model_type in types.split()] + [COMMON]
    result = []
    for table in tables:
        rows: Rows = {}
        for role, patterns in table.items():
            for pattern in patterns.split():
                parts = pattern.split(".")
                rows.setdefault(parts[-1], []).append((parts, role))
        for entries in rows.values():
            entries.sort(key=lambda entry: -len(entry[0]))
        result.append(rows)
    return result


def _role(parts: list[str], model_type: str, kind: str, layer: int | None) -> str:
    """The role of a path, or `""` if no row fits it."""
    if not parts:
        return ""
    for rows in _rows(model_type):
        for pattern, role in rows.get(parts[-1], ()):
            tail = parts[-len(pattern) :]
            same = len(tail) == len(pattern) and all(p == t or (p == "*" and t.isdecimal()) for p, t in zip(pattern, tail, strict=True))
            if same and _fits(role, kind, layer):
                cross = role.startswith("attention.") and not CROSS_ATTENTION.isdisjoint(parts)
                return f"cross_{role}" if cross else role
    return ""


def _fits(role: str, kind: str, layer: int | None) -> bool:
    """Whether a module of this kind, at this place, can play the role: norms are norms, and heads lie outside the layers."""
    group = role.partition(".")[0]
    if layer is not None and (group == "head" or role == "norm.final"):
        return False
    return (group == "norm") == (kind == "norm") and (group == "embedding" or kind != "embedding")


@cache
def _is_role(token: str) -> bool:
    roles = {role for table in (COMMON, *BY_TYPE.values()) for role in table}
    roles |= {f"cross_{role}" for role in roles if role.startswith("attention.")}
    return any(f"{role}.".startswith(f"{token}.") for role in roles)


def _tokens(given: str | Sequence[str], what: str) -> list[str]:
    tokens = [given] if isinstance(given, str) else list(given)
    wrong = [t for t in tokens if not isinstance(t, str) or not t.strip()]
    if wrong:
        raise UsageError(f"{what} takes roles, module names or globs, got {', '.join(map(repr, wrong))}", hint=f"{what}=['attention.query', 'mlp.down@0-3']")
    return [t.strip() for t in tokens]


class _Search:
    """Finds what a token points at among `pool`; `depths` is the number of layers of each stack."""

    def __init__(self, pool: list[Site], depths: dict[str, int]) -> None:
        self.pool = pool
        self.depths = depths

    def __call__(self, token: str) -> tuple[list[Site], str]:
        """The sites, and if there are none because of the layer range, why."""
        word, at, span = token.partition("@")
        hits = _named(word, self.pool) if word else list(self.pool)
        if not at:
            return hits, ""
        bounds = re.fullmatch(r"(-?\d+)(-(-?\d+)?)?", span)
        if not bounds:
            return [], f"{span!r} is no layer range; expected '@5', '@2-5', '@3-', '@-1' or '@-2-'"
        first = int(bounds[1])
        last = first if bounds[2] is None else -1 if bounds[3] is None else int(bounds[3])
        deepest = max(self.depths.values(), default=0)
        if not all(-deepest <= n < deepest for n in (first, last)):
            return [], f"there are layers 0 to {deepest - 1}" if deepest else "this model has no numbered layers"
        if first % deepest > last % deepest:
            return [], f"the range is empty: layer {first} comes after layer {last}"
        kept = []
        for site in hits:
            if site.layer is not None:
                depth = self.depths[site.stack]
                low, high = (n + depth if n < 0 else n for n in (first, last))
                if low <= site.layer <= high:
                    kept.append(site)
        return kept, f"none of its {len(hits)} sites is in these layers" if hits and not kept else ""


def _depths(found: Iterable[Site]) -> dict[str, int]:
    depths: dict[str, int] = {}
    for site in found:
        if site.layer is not None:
            depths[site.stack] = max(depths.get(site.stack, 0), site.layer + 1)
    return depths


def _named(word: str, pool: list[Site]) -> list[Site]:
    """The sites of one token without its layer range: the first reading that finds any."""
    if word == "all":
        return list(pool)
    if word == "all-linear":
        return _all_linear(pool)
    if any(c in word for c in "*?["):
        return [s for s in pool if any(fnmatchcase(path, word) for path in _paths(s))]
    return (
        [s for s in pool if f"{s.role}.".startswith(f"{word}.")]
        or [s for s in pool if s.stack == word]
        or [s for s in pool if any(f".{path}".endswith(f".{word}") for path in _paths(s))]
    )


def _all_linear(pool: list[Site]) -> list[Site]:
    weights = [s for s in pool if s.kind in ("linear", "conv1d") or (s.role.startswith("experts.") and s.kind != "bias" and len(s.shape) == 3)]
    if any(s.layer is not None for s in pool):
        return [s for s in weights if s.layer is not None]
    return [s for s in weights if s.role.partition(".")[0] not in ("head", "embedding")]


def _paths(site: Site) -> Iterator[str]:
    """Every live name of a site, and the path of the module that each is in."""
    for name in (site.name, *site.tied):
        yield name
        module = name.rpartition(".")[0]
        if module:
            yield module


def _missing(model: nn.Module, token: str, pool: list[Site]) -> str:
    """Why a token points at nothing: a role whose tensor is listed under another, or a word close to one that exists."""
    word = token.partition("@")[0]
    if word in ("", "all", "all-linear"):
        return "there is none"
    reader = _Reader(model)
    for site in pool:
        for name in site.tied:
            if f"{reader.site(name).role}.".startswith(f"{word}."):
                return f"{name} is the same tensor as {site.name}, which is listed as {site.role}"
    if any(c in word for c in "*?["):
        return "no live name or module path is like that"
    roles = {s.role for s in pool}
    ends = sorted(role for role in roles if word in role.split("."))
    if ends:
        return f"no such role or module; did you mean {' or '.join(map(repr, ends))}?"
    names = {path.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2] for s in pool for path in _paths(s)}
    return "no such role or module" + near(word, roles | {r.partition(".")[0] for r in roles} | names, "names here")


def _inventory(pool: Iterable[Site]) -> str:
    counts = Counter(s.role for s in pool)
    return ", ".join(f"{role} ({n})" for role, n in counts.items()) or "none"
