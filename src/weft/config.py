"""Configurations: typed, bounded values made from what people write.

A configuration is a frozen `msgspec.Struct` (`kw_only=True, frozen=True, forbid_unknown_fields=True`) whose fields are
`Annotated[type, msgspec.Meta(description=..., ge=..., le=...)]`. From it come the command-line options, the JSON
schema, the catalogue and the errors. `make` builds one from text or typed values and reports every problem at once;
`assign` shares `-p key=value` pairs out over several; `read_yaml` reads a recipe or a gate file.

Importing this module imports neither msgspec nor yaml.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UsageError, near

if TYPE_CHECKING:
    import msgspec
    import yaml

    C = TypeVar("C", bound=msgspec.Struct)

_LIMITS = {
    "gt": "> {}",
    "ge": ">= {}",
    "lt": "< {}",
    "le": "<= {}",
    "multiple_of": "in steps of {}",
    "min_length": "of length >= {}",
    "max_length": "of length <= {}",
    "pattern": "matching {}",
}
_LISTS = {"list", "List", "set", "Set", "frozenset", "FrozenSet", "Sequence", "Collection", "Iterable"}
_MAPS = {"dict", "Dict", "Mapping"}
_OR_NONE = " or none"


@dataclass(frozen=True)
class Option:
    """One field of a configuration, as a person sees it.

    `type` is text ("int", "float or none", "linear | cosine", "list of str"); `default` is a plain JSON value, None when
    the option is `required`; `bounds` maps the names of `msgspec.Meta` (gt, ge, lt, le, multiple_of, min_length,
    max_length, pattern) to their values.
    """

    name: str
    type: str
    required: bool = False
    default: Any = None
    description: str = ""
    bounds: dict[str, Any] = field(default_factory=dict)

    @property
    def limits(self) -> str:
        """The bounds as text: `">= 1 and <= 64"`, or `""`."""
        return limits(self.bounds)

    @property
    def expected(self) -> str:
        """Type and bounds in one phrase: `"int >= 1 or none"`."""
        plain = self.type.removesuffix(_OR_NONE)
        return " ".join(filter(None, (plain, self.limits))) + self.type[len(plain) :]

    @property
    def numeric(self) -> bool:
        """Whether it is one number."""
        return self.type.removesuffix(_OR_NONE) in ("int", "float")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the catalogue."""
        return asdict(self)


def limits(bounds: Mapping[str, Any]) -> str:
    """Bounds as text: `{"ge": 1, "le": 64}` is `">= 1 and <= 64"`."""
    return " and ".join(text.format(bounds[name]) for name, text in _LIMITS.items() if name in bounds)


def _last(node: ast.expr) -> str:
    """The last component of a dotted name."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError(f"not a name: {ast.unparse(node)}")


def _parts(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _element(node: ast.expr) -> str:
    """Text of a type inside a container, with its own bounds."""
    text, _, bounds = read_annotation(node)
    return Option("", text, bounds=bounds).expected


def read_annotation(node: ast.expr) -> tuple[str, str, dict[str, Any]]:
    """(type text, description, bounds) of an annotation's syntax tree.

    Works on source as well as on the `repr` of a type, so that a catalogue read from files and one made from imported
    classes cannot differ. Raises ValueError for an annotation that is not written out.
    """
    if isinstance(node, ast.Constant) and node.value is None:
        return "none", "", {}
    if isinstance(node, ast.Name | ast.Attribute):
        name = _last(node)
        return ("none" if name == "NoneType" else name), "", {}
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([node.left, node.right])
    if not isinstance(node, ast.Subscript):
        raise ValueError(f"not a type: {ast.unparse(node)}")
    outer, inner = _last(node.value), _parts(node.slice)
    if outer == "Annotated":
        return _annotated(inner)
    if outer in ("Union", "Optional"):
        return _union(inner if outer == "Union" else [*inner, ast.Constant(None)])
    if outer == "Literal":
        return " | ".join(str(ast.literal_eval(choice)) for choice in inner), "", {}
    if outer in _LISTS:
        return f"list of {_element(inner[0])}", "", {}
    if outer in ("tuple", "Tuple"):
        if len(inner) == 2 and isinstance(inner[1], ast.Constant) and inner[1].value is ...:
            return f"list of {_element(inner[0])}", "", {}
        return f"({', '.join(map(_element, inner))})", "", {}
    if outer in _MAPS:
        return f"map of {_element(inner[0])} to {_element(inner[1])}", "", {}
    raise ValueError(f"not a type that is known here: {ast.unparse(node)}")


def _annotated(parts: list[ast.expr]) -> tuple[str, str, dict[str, Any]]:
    text, description, bounds = read_annotation(parts[0])
    for meta in parts[1:]:
        if not isinstance(meta, ast.Call) or _last(meta.func) != "Meta":
            continue
        for keyword in meta.keywords:
            if keyword.arg == "description":
                description = ast.literal_eval(keyword.value)
            elif keyword.arg in _LIMITS:
                bounds = {**bounds, keyword.arg: ast.literal_eval(keyword.value)}
    return text, description, bounds


def _union(nodes: list[ast.expr]) -> tuple[str, str, dict[str, Any]]:
    texts: list[str] = []
    description = ""
    bounds: dict[str, Any] = {}
    optional = False
    for node in nodes:
        text, said, limited = read_annotation(node)
        optional = optional or text == "none" or text.endswith(_OR_NONE)
        if text != "none":
            texts.append(text.removesuffix(_OR_NONE))
        description, bounds = description or said, bounds | limited
    return " or ".join(texts) + (_OR_NONE if optional else ""), description, bounds


def _source(annotation: Any) -> str:
    """Source text that names a type object."""
    text = annotation.__qualname__ if isinstance(annotation, type) else repr(annotation)
    return text.replace("<locals>.", "")


@cache
def _described(config_type: type[msgspec.Struct]) -> tuple[tuple[Option, Any], ...]:
    """Each field of a configuration with its type object."""
    import msgspec

    found = []
    for each in msgspec.structs.fields(config_type):
        try:
            text, description, bounds = read_annotation(ast.parse(_source(each.type), mode="eval").body)
        except (ValueError, SyntaxError) as error:
            raise UsageError(f"{config_type.__qualname__}.{each.name}: options cannot have the type {each.type!r}") from error
        default = None
        if each.default is not msgspec.NODEFAULT:
            default = each.default
        elif each.default_factory is not msgspec.NODEFAULT:
            default = each.default_factory()
        found.append((Option(each.name, text, each.required, plain(default), description, bounds), each.type))
    return tuple(found)


def plain(value: Any) -> Any:
    """`value` as plain JSON values: tuples become lists, sets become sorted lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value))
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    import msgspec

    return msgspec.to_builtins(value, str_keys=True, order="deterministic")


def options(config_type: type[msgspec.Struct]) -> list[Option]:
    """The options of a configuration, in the order of its fields."""
    return [option for option, _ in _described(config_type)]


def schema(config_type: type[msgspec.Struct]) -> dict[str, Any]:
    """JSON schema of a configuration."""
    import msgspec

    return msgspec.json.schema(config_type)


def as_dict(config: msgspec.Struct) -> dict[str, Any]:
    """Every field of a configuration as plain JSON values; `make` takes them back."""
    return {name: plain(getattr(config, name)) for name in config.__struct_fields__}


def make(config_type: type[C], values: Mapping[str, Any], where: str) -> C:
    """A configuration of `config_type` from `values`.

    Text is read as it is typed on a command line: `16`, `1e-3`, `true`, `none`, `a,b` or JSON for lists, JSON for maps.
    Other values must have the field's type (an int will do for a float). Hyphens in names are underscores. `where` names the place in errors ("--method lora").

    A configuration may define `problems(self) -> list[str]` for rules over several fields; it is asked once every field
    is right by itself. Raises one UsageError with all problems.
    """
    return _made(config_type, values, where, None)


def make_lists(config_type: type[C], values: Mapping[str, Any], where: str) -> tuple[C, dict[str, list[float]]]:
    """As `make`, but an option of one number may be a list of numbers, each within the option's bounds (text: `0.2,0.5` or JSON).

    Returns the configuration with the first number of each list, and the lists by option.
    """
    lists: dict[str, list[float]] = {}
    return _made(config_type, values, where, lists), lists


def _made(config_type: type[C], values: Mapping[str, Any], where: str, lists: dict[str, list[float]] | None) -> C:
    """`make`; lists of numbers go into `lists`, if there is one."""
    described = _described(config_type)
    types = {option.name: kind for option, kind in described}
    known = {option.name: option for option, _ in described}
    given: dict[str, Any] = {}
    wrong: list[str] = []
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            wrong.append(_unknown(key, known))
        elif name in given:
            wrong.append(f"{name}: given twice ({_got(given[name])} and {_got(value)})")
        else:
            given[name] = value
    ready: dict[str, Any] = {}
    for name, value in given.items():
        try:
            ready[name] = _convert(value, types[name])
        except ValueError:
            several = _several(value, types[name]) if lists is not None and known[name].numeric else None
            if lists is None or not several:
                wrong.append(f"{name}: expected {known[name].expected}{' (each)' if several is not None else ''}, got {_got(value)}")
            else:
                lists[name], ready[name] = several, several[0]
    wrong += [f"{name}: missing, expected {option.expected}" for name, option in known.items() if option.required and name not in given]
    if not wrong:
        config = config_type(**ready)
        rules = getattr(config, "problems", None)
        wrong = list(rules()) if rules else []
        if not wrong:
            return config
    raise _all(where, wrong)


def _all(where: str, wrong: Sequence[str]) -> UsageError:
    return UsageError(f"{where}: {len(wrong)} problem{'s' * (len(wrong) != 1)}", problems=wrong)


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    if not known:
        return f"{key}: no such option; there are none"
    return f"{key}: no such option{near(key.replace('-', '_'), known, 'the options are')}"


def _got(value: Any) -> str:
    """`value` in an error: numbers bare, even those typed as text; anything long is cut."""
    numbers = list(_numbers(value)) if isinstance(value, str) else []
    text = value.strip() if numbers else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _numbers(text: str) -> list[int | float]:
    """The numbers that `text` may stand for, the int first; none when it is no number."""
    found: list[int | float] = []
    for kind in (int, float):
        try:
            found.append(kind(text))
        except ValueError:  # also an int of more than 4300 digits
            continue
    return found


def _readings(text: str) -> list[tuple[Any, bool]]:
    """What `text` may stand for, best first, and whether its parts must have their types already."""
    import json

    found: list[tuple[Any, bool]] = [(number, True) for number in _numbers(text)]
    word = text.strip().lower()
    if word in ("none", "null"):
        found.append((None, True))
    if word in ("true", "false"):
        found.append((word == "true", True))
    found.append((text, False))
    if word[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            found.append((json.loads(text), True))
    else:
        found.append(([part.strip() for part in text.split(",")] if word else [], False))
    return found


def _convert(value: Any, kind: Any) -> Any:
    """`value` as type `kind`, bounds checked. Raises ValueError (msgspec's ValidationError is one)."""
    import msgspec

    for reading, strict in _readings(value) if isinstance(value, str) else [(value, True)]:
        try:
            result = msgspec.convert(reading, kind, strict=strict)
        except msgspec.ValidationError:
            continue
        if _finite(result):
            return result
    raise ValueError("no reading fits")


def _several(value: Any, kind: Any) -> list[float] | None:
    """The numbers that a list for an option of type `kind` means: none if one of them is wrong, None if it is no list."""
    from types import GenericAlias

    if not (isinstance(value, list | tuple) or (isinstance(value, str) and ("," in value or value.lstrip()[:1] == "["))):
        return None
    try:
        found: list[float] = _convert(value, GenericAlias(list, (kind,)))
    except ValueError:
        return []
    return [] if None in found else found


def _finite(value: Any) -> bool:
    """Whether every float inside is finite: canonical JSON has no others."""
    if isinstance(value, float):
        return isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, list | tuple | set | frozenset) else True


def assign(pairs: Sequence[str], configs: Mapping[str, type[msgspec.Struct]]) -> dict[str, dict[str, str]]:
    """Shares `key=value` pairs out over several named configurations.

    A key that exactly one configuration has goes there; `optimizer.lr=1e-3` names it. Returns one dict of text values
    for each configuration, for `make`. Raises one UsageError with every pair that is malformed, unknown, ambiguous or
    given twice.
    """
    shared, wrong = share(pairs, configs)
    if wrong:
        raise _all("-p", wrong)
    return shared


def share(pairs: Sequence[str], configs: Mapping[str, type[msgspec.Struct]]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """As `assign`, but what is wrong is returned beside the shares, to be told together with other problems."""
    fields = {part: {option.name: None for option in options(kind)} for part, kind in configs.items()}
    everything = {name: None for names in fields.values() for name in names}
    shared: dict[str, dict[str, str]] = {part: {} for part in configs}
    wrong: list[str] = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        part, dot, name = key.rpartition(".")
        name = name.replace("-", "_")
        if not equals or not name:
            wrong.append(f"{pair!r}: expected key=value")
            continue
        if dot and part not in fields:
            wrong.append(f"{key}: no such part{near(part, fields, 'the parts are')}")
            continue
        owners = [part] if dot else [each for each, names in fields.items() if name in names]
        if len(owners) > 1:
            wrong.append(f"{key}: several parts have it; write {' or '.join(f'{owner}.{name}' for owner in owners)}")
        elif not owners or name not in fields[owners[0]]:
            wrong.append(_unknown(key, everything) if not dot else f"{part}.{_unknown(name, fields[part])}")
        elif name in shared[owners[0]]:
            wrong.append(f"{key}: given twice ({_got(shared[owners[0]][name])} and {_got(value)})")
        else:
            shared[owners[0]][name] = value
    return shared, wrong


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file: plain JSON values only.

    Scalars are those of YAML 1.2's core schema without infinities (`no` and `2024-01-01` are text, `1e-3` is a number).
    Duplicate keys, keys that are not text, tags, anchors and aliases are refused. Raises UsageError with the line.
    """
    import yaml

    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise UsageError(f"{path}: it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: it is not UTF-8 text (byte {error.start})") from error
    loader = None
    try:
        loader = _loader()(text)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UsageError(f"{path}, line {line}: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UsageError(f"{path}, line {line}: the character U+{ord(text[error.position]):04X} is not allowed") from error
    except RecursionError as error:
        raise UsageError(f"{path}: it is nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(value, dict):
        raise UsageError(f"{path}, line 1: expected key: value pairs, got {_got(value)}")
    return value


@cache
def _loader() -> type[yaml.SafeLoader]:
    """PyYAML's safe loader, narrowed to plain JSON values."""
    import re

    import yaml

    class Plain(yaml.SafeLoader):
        """Safe, without what JSON lacks."""

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            # An alias can name its own parent, or double the value at each level.
            if getattr(event, "anchor", None) is not None:
                raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=event.start_mark)
            if getattr(event, "tag", None) is not None:
                raise yaml.MarkedYAMLError(problem="tags are not allowed", problem_mark=event.start_mark)
            return super().compose_node(parent, index)

        def number(self, node: yaml.ScalarNode) -> int | float:
            numbers = [each for each in _numbers(node.value) if isfinite(each)]
            if not numbers:
                raise yaml.MarkedYAMLError(problem="the number is too large", problem_mark=node.start_mark)
            return numbers[0]

        def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    raise yaml.MarkedYAMLError(problem=f"a key must be text, got {_got(key)}", problem_mark=key_node.start_mark)
                if key in found:
                    raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
                found[key] = self.construct_object(value_node, deep=True)
            return found

        def sequence(self, node: yaml.SequenceNode) -> list[Any]:
            return [self.construct_object(each, deep=True) for each in node.value]

    tag = "tag:yaml.org,2002:"
    safe = yaml.SafeLoader.yaml_constructors
    Plain.yaml_constructors = {tag + name: safe[tag + name] for name in ("null", "str", "bool")}
    Plain.yaml_constructors |= {tag + "int": Plain.number, tag + "float": Plain.number, tag + "map": Plain.mapping, tag + "seq": Plain.sequence}
    Plain.yaml_implicit_resolvers = {}
    for name, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]+", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ):
        Plain.add_implicit_resolver(tag + name, re.compile(f"(?:{pattern})$"), first)
    return Plain
