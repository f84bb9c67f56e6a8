"""Options and weights that vary over depth: lists of numbers, spread over the layers of a model.

The first number of a list is that of the first layer, the last that of the last layer; the others lie evenly between them, and between
two of them the way is straight. With numbers v_0..v_m and layers 0..n - 1, layer l has the number at place l m / (n - 1). Each stack of layers
(an encoder, a decoder) is counted by itself; a single layer is the first. Of the tensors outside the layers, those before them
(embeddings and their norms) have the first number and all others (final norm, head) the last. Stored copies of one tied matrix
have one number: the first, if any of them is an embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from math import isfinite
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from .._roles import BY_TYPE, COMMON, LAYER_LISTS
from ..config import as_dict, make, make_lists
from ..errors import UsageError

if TYPE_CHECKING:
    import msgspec

    from ..engine.increments import Increments, Target
    from ..methods import Method
    from ._method import MergeMethod

    C = TypeVar("C", bound=msgspec.Struct)
else:
    C = TypeVar("C")

Weight = float | list[float] | tuple[float, ...]
"""What one model counts: a number, or numbers over depth."""

_BEFORE = tuple(
    f".{pattern}"
    for table in (COMMON, *BY_TYPE.values())
    for role, patterns in table.items()
    if role.startswith("embedding.") or role == "norm.embedding"
    for pattern in patterns.split()
)


def layer(name: str) -> tuple[str, int] | None:
    """The stack of layers that a checkpoint tensor belongs to and its layer there, by its name; None outside of layers.

    As in `weft.sites` a layer is a block: in a list of single modules (`layers.0.weight`) nothing is numbered.
    """
    parts = name.split(".")
    for k in range(1, len(parts) - 1):
        if parts[k].isdecimal() and parts[k - 1] in LAYER_LISTS and (len(parts) - k > 2 or parts[-1] not in ("weight", "bias")):
            return ".".join(parts[:k]), int(parts[k])
    return None


def before_layers(name: str) -> bool:
    """Whether a tensor outside the layers comes before them: what the tables of roles have as embeddings, and all that "embedd..." is said of."""
    return "embedd" in name or f".{name}".removesuffix(".weight").removesuffix(".bias").endswith(_BEFORE)


class Depth:
    """Where the tensors of a model lie between its first layer (0) and its last (1).

    names: all its tensors; tied: groups of names that are stored copies of one
    """

    def __init__(self, names: Iterable[str], tied: Iterable[Sequence[str]] = ()) -> None:
        self._last: dict[str, int] = {}
        for stack, number in filter(None, map(layer, names)):
            self._last[stack] = max(number, self._last.get(stack, 0))
        self._first = {name for group in tied if any(map(before_layers, group)) for name in group}

    @classmethod
    def of(cls, models: Increments) -> Depth:
        """That of the base. UsageError without a base, or if its names tell of no layers."""
        if models.base is None:
            raise UsageError("how many layers there are, for numbers that vary over depth, is for the base to say", hint="base=PATH (--base PATH)")
        copies: dict[str, list[str]] = {}
        for name, first in models.twins().items():
            if len(models.targets[name].shape) > 1:  # vectors of two norms may well be the same
                copies.setdefault(first, [first]).append(name)
        depth = cls([*models.base.tensors, *models.targets], [*models.tied, *copies.values()])
        if not depth._last:
            raise UsageError(
                "nothing can vary over depth: the names of the base's tensors tell of no layers (as `model.layers.0.mlp.down_proj.weight` does)",
                hint="one number for each option and weight",
            )
        return depth

    def place(self, name: str) -> Fraction:
        """The place of a tensor, from 0 to 1."""
        found = layer(name)
        if found is None:
            return Fraction(not (name in self._first or before_layers(name)))
        stack, number = found
        return Fraction(number, self._last[stack] or 1)

    def places(self) -> Iterator[Fraction]:
        """All places there are, in order, some more than once."""
        yield Fraction(0)
        for last in self._last.values():
            yield from (Fraction(number, last or 1) for number in range(last + 1))
        yield Fraction(1)


class Setting(NamedTuple, Generic[C]):
    """What a method goes by: one weight for each model, and its options."""

    weights: Sequence[float]
    cfg: C


class Settings(Generic[C]):
    """What a method goes by on each tensor.

    weights: one for each model; cfg: the options; lists: of those that vary over depth, the numbers
    depth:   of the model; without it, `at` cannot be asked if anything varies

    `whole` is for what belongs to the whole model (seeds, all that does not vary); where something varies it has the first number.
    """

    def __init__(self, weights: Sequence[Weight], cfg: C, lists: Mapping[str, list[float]] | None = None, depth: Depth | None = None) -> None:
        self._weights, self._lists, self._depth = [_read(w) for w in weights], lists or {}, depth
        self.whole = Setting([_between(w, Fraction(0)) for w in self._weights], cfg)
        self._known: dict[Fraction, Setting[C]] = {}
        self._found: dict[str, Setting[C]] = {}

    @property
    def varies(self) -> bool:
        """Whether anything is a list."""
        return bool(self._lists) or any(isinstance(weight, list) for weight in self._weights)

    def over(self, depth: Depth) -> Settings[C]:
        """The same for a model of this depth."""
        return Settings(self._weights, self.whole.cfg, self._lists, depth)

    def at(self, target: Target) -> Setting[C]:
        """The weights and options of one tensor."""
        if self._depth is None:
            return self.whole
        if target.name not in self._found:
            self._found[target.name] = self._at(self._depth.place(target.name))
        return self._found[target.name]

    def _at(self, place: Fraction) -> Setting[C]:
        if place not in self._known:
            cfg = self.whole.cfg
            if self._lists:
                here = {name: _between(numbers, place) for name, numbers in self._lists.items()}
                cfg = make(type(cfg), as_dict(cfg) | here, f"the options at {float(place):.0%} of the depth")
            self._known[place] = Setting([_between(weight, place) for weight in self._weights], cfg)
        return self._known[place]

    def require(self, method: str, rule: MergeMethod[C]) -> None:
        """UsageError if a method has anything against these weights, at any depth that is known."""
        every = [self.whole] if self._depth is None else map(self._at, self._depth.places())
        _refuse(method, list(dict.fromkeys(problem for setting in every for problem in rule.problems(*setting))))

    def recipe(self) -> dict[str, Any]:
        """What a recipe records of them: `config` and `weights`, lists as they were given."""
        return {"config": {**as_dict(self.whole.cfg), **self._lists}, "weights": self._weights}


def asked(method: str, record: Method, rule: MergeMethod[Any], weights: Sequence[Weight] | None, count: int, params: Mapping[str, Any]) -> Settings[Any]:
    """The settings that somebody asked for, for `count` models. UsageError with all that is wrong with the options, or with the weights."""
    where = f"merge method {method!r}"
    cfg, lists = make_lists(record.config, params, where)
    fixed = rule.fixed(cfg)
    can = [name for name in record.varies if name not in fixed]
    whole = [name for name in lists if name not in can]
    if whole:
        problems = [f"{name}: it belongs to the whole model, so it is one number" + (f" ({fixed[name]})" if name in fixed else "") for name in whole]
        raise UsageError(
            f"{where}: not every option varies over depth", problems=problems, hint=f"what may be a list here: {', '.join(can)}" if can else "one number"
        )
    used = [_read(w) for w in ([rule.default_weight(count)] * count if weights is None else weights)]
    every = [(number, w if isinstance(w, list) else [w]) for number, w in enumerate(used, 1)]
    problems = [f"weight {number} is {w}" for number, several in every for w in several if not isfinite(w)]
    problems += [f"weight {number} is an empty list" for number, several in every if not several]
    if len(used) != count:
        problems.append(f"expected one weight for each of {count} inputs, got {len(used)}")
    _refuse(method, problems)
    settings: Settings[Any] = Settings(used, cfg, lists)
    settings.require(method, rule)
    return settings


def _refuse(method: str, problems: Sequence[str]) -> None:
    if problems:
        raise UsageError(f"the weights do not suit the merge method {method!r}", problems=problems)


def _read(weight: Weight) -> float | list[float]:
    return [float(each) for each in weight] if isinstance(weight, list | tuple) else float(weight)


def _between(numbers: float | list[float], place: Fraction) -> float:
    """The number at a place from 0 to 1; a single number is the same everywhere, and one of a list is met exactly."""
    if not isinstance(numbers, list):
        return numbers
    k, rest = divmod(place * (len(numbers) - 1), 1)
    low, high = numbers[k], numbers[min(k + 1, len(numbers) - 1)]
    return min(max(low + float(rest) * (high - low), min(low, high)), max(low, high))
