"""The method registry: one file a method, one decorator line, one catalogue.

A method of kind `merge` named `task-arithmetic` is the file `merging/task_arithmetic.py`; files whose names start with
an underscore are helpers. Its function or class carries the decorator:

    @method("merge", config=TaskArithmeticConfig, paper="Ilharco et al., 2022, arXiv:2212.04089", formula="w + s sum_k d_k")
    def task_arithmetic(...): ...

`names` lists files, `catalogue` reads their declarations without importing them, and `get` imports the one file that is
asked for. Other packages register theirs through entry points of the group `weft.methods`, named `kind:name`.

Importing this module imports neither numpy, torch nor msgspec.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .config import Option, options, plain, read_annotation
from .errors import UsageError, WeftError, near

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    import msgspec

F = TypeVar("F", bound=Callable[..., Any])

GROUP = "weft.methods"
"""The entry point group through which other packages register methods."""

OVER_DEPTH = ", or a list over depth"
"""What is said of an option that may differ from layer to layer."""

_ROOT = Path(__file__).parent
_MARK = "weft_method"


class Kind(NamedTuple):
    """What a kind of method belongs to: its verb, how it is chosen on the command line and its package."""

    verb: str
    flag: str
    package: str


KINDS = {
    "space": Kind("tune", "--method", "tuning.space"),
    "objective": Kind("tune", "--objective", "tuning.objective"),
    "optimizer": Kind("tune", "--optimizer", "tuning.optimizer"),
    "schedule": Kind("tune", "--schedule", "tuning.schedule"),
    "guard": Kind("tune", "--guard", "tuning.guard"),
    "edit": Kind("edit", "--method", "editing"),
    "merge": Kind("merge", "--method", "merging"),
    "compress": Kind("compress", "--method", "compressing"),
    "port": Kind("port", "--method", "porting"),
    "select": Kind("select", "--method", "selecting"),
    "search": Kind("search", "METHOD", "searching"),
    "steer": Kind("steer", "--method", "steering"),
    "federate": Kind("federate", "--method", "federating"),
}
"""Every kind of method; packages are inside weft. A package that does not exist has no methods."""


@dataclass(frozen=True)
class Method:
    """A registered method. `run` is the function or class that carries the decorator, `doc` its docstring's first line,
    `varies` the options that may differ from layer to layer."""

    name: str
    kind: str
    config: type[msgspec.Struct]
    run: Callable[..., Any]
    doc: str
    paper: str
    formula: str
    varies: tuple[str, ...] = ()


def method(kind: str, *, config: type[msgspec.Struct], paper: str = "", formula: str = "", varies: Sequence[str] = ()) -> Callable[[F], F]:
    """Decorator: this function or class is the method that its file is named after.

    `config` is a frozen `msgspec.Struct` with `forbid_unknown_fields=True` (see `weft.config`), `paper` the authors, the
    year and the arXiv id, `formula` one line of plain text, `varies` (merge) the options of one number that may be a list
    over depth. Raises UsageError for what doesn't follow this.
    """
    _known(kind)

    def register(run: F) -> F:
        doc = (run.__doc__ or "").strip().split("\n")[0].strip()
        where = f"{run.__module__}.{run.__qualname__}"
        rules = getattr(config, "__struct_config__", None)
        if rules is None or not (rules.frozen and rules.forbid_unknown_fields):
            raise UsageError(f"{where}: its config must be a msgspec.Struct with frozen=True and forbid_unknown_fields=True, got {config!r}")
        odd = [option for option in varies if option not in config.__struct_fields__]
        if odd:
            raise UsageError(f"{where}: {odd[0]!r} is said to vary and is no option of it{near(odd[0], config.__struct_fields__)}")
        if not doc:
            raise UsageError(f"{where}: a method needs a docstring, its first line is shown in the catalogue")
        name = run.__module__.rpartition(".")[2].replace("_", "-")
        setattr(run, _MARK, Method(name, kind, config, run, doc, paper, formula, tuple(varies)))
        return run

    return register


def names(kind: str) -> list[str]:
    """The names of all methods of a kind, sorted, without importing any of them. Raises UsageError for an unknown kind."""
    _known(kind)
    return sorted({*_files(kind), *_plugins(tuple(sys.path)).get(kind, {})})


def get(kind: str, name: str) -> Method:
    """The method, from its own file only.

    Raises UsageError for an unknown kind or name, for a name that two packages claim, and for a method of another
    package that cannot be loaded.
    """
    _known(kind)
    files, plugins = _files(kind), _plugins(tuple(sys.path)).get(kind, {}).get(name, ())
    owners = [*(["weft"] if name in files else []), *map(_owner, plugins)]
    if not owners:
        raise UsageError(f"there is no {kind} method {name!r}{_elsewhere(name) or near(name, names(kind))}", hint=f"weft methods {KINDS[kind].verb}")
    if len(owners) > 1:
        raise UsageError(f"the {kind} method {name!r} is claimed by {' and by '.join(owners)}", hint=f"pip uninstall {owners[-1]}")
    return _load_plugin(kind, name, plugins[0]) if plugins else _load_file(kind, name)


def catalogue(which: str | None = None) -> list[dict[str, Any]]:
    """One record of plain JSON values for each method of a kind or verb (None: all), in the order of `KINDS`, then by name.

    Keys: name, kind, verb, package (whose method it is), summary, paper, formula, varies (the options that may be a list
    over depth), and options (see `Option`). weft's own files are read, not imported; other packages' methods are imported,
    and one that fails says so in its summary.
    """
    kinds = [kind for kind, about in KINDS.items() if which in (None, kind, about.verb)]
    if which is not None and not kinds:
        raise UsageError(f"there is no verb or kind of method {which!r}{near(which, {*KINDS, 'tune'})}", hint="weft methods")
    found = []
    for kind in kinds:
        files, plugins = _files(kind), _plugins(tuple(sys.path)).get(kind, {})
        for name in sorted({*files, *plugins}):
            found.append(_declaration(kind, name, files[name]) if name in files else _plugin_record(kind, name, plugins[name]))
    return found


def _known(kind: str) -> None:
    if kind not in KINDS:
        raise UsageError(f"there is no kind of method {kind!r}{near(kind, KINDS)}", hint="weft methods")


def _elsewhere(name: str) -> str:
    """Where a name that is missing in one kind does exist."""
    found = [f"weft {about.verb} {about.flag}" for kind, about in KINDS.items() if name in names(kind)]
    return f"; it is chosen with {' or '.join(found)}" if found else ""


def _record(kind: str, name: str, package: str, summary: str, paper: str, formula: str, listed: Iterable[Option], varies: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "verb": KINDS[kind].verb,
        "package": package,
        "summary": summary,
        "paper": paper,
        "formula": formula,
        "varies": list(varies),
        "options": [option.as_dict() for option in listed],
    }


# --- weft's own methods -----------------------------------------------------------------------------------------------


def _files(kind: str) -> dict[str, Path]:
    """Method name to file."""
    folder = _ROOT.joinpath(*KINDS[kind].package.split("."))
    if not folder.is_dir():
        return {}
    listed = (Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(".py") and not entry.name.startswith("_"))
    return {path.stem.replace("_", "-"): path for path in listed}


def _load_file(kind: str, name: str) -> Method:
    package = __name__.rpartition(".")[0]
    module = import_module(f"{package}.{KINDS[kind].package}.{name.replace('-', '_')}")
    own = [record for record in map(_mark, vars(module).values()) if record and record.run.__module__ == module.__name__]
    if len(own) != 1 or own[0].kind != kind:
        declared = ", ".join(f"{record.kind}:{record.run.__name__}" for record in own) or "none"
        raise WeftError(f"{module.__name__}: expected one @method({kind!r}, ...), got {declared}")
    return own[0]


def _mark(value: Any) -> Method | None:
    """The record of a decorated object; subclasses of a method are not methods themselves."""
    record = getattr(value, _MARK, None)
    return record if isinstance(record, Method) and record.run is value else None


def _declaration(kind: str, name: str, path: Path) -> dict[str, Any]:
    """The catalogue record of one of weft's methods, from its source, so that listing never costs the import of torch."""
    try:
        return _read(kind, name, path)
    except ValueError:  # something is computed: ask the module itself
        return _imported(kind, name, "weft", _load_file(kind, name))


def _imported(kind: str, name: str, package: str, record: Method) -> dict[str, Any]:
    return _record(kind, name, package, record.doc, record.paper, record.formula, options(record.config), record.varies)


def _read(kind: str, name: str, path: Path) -> dict[str, Any]:
    """As `_declaration`. Raises ValueError when the declaration is not made of literals."""
    tree = _parse(path)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for call in node.decorator_list:
            if not isinstance(call, ast.Call) or ast.unparse(call.func) not in ("method", "methods.method"):
                continue
            said = {keyword.arg: keyword.value for keyword in call.keywords}
            paper, formula = (ast.literal_eval(said[key]) if key in said else "" for key in ("paper", "formula"))
            varies = ast.literal_eval(said["varies"]) if "varies" in said else ()
            config = said.get("config")
            if not isinstance(config, ast.Name):
                raise ValueError("the config is not a plain name")
            doc = (ast.get_docstring(node) or "").split("\n")[0].strip()
            return _record(kind, name, "weft", doc, paper, formula, _fields(config.id, tree, path).values(), varies)
    raise ValueError("no decorator @method")


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _fields(name: str, tree: ast.Module, path: Path) -> dict[str, Option]:
    """The fields of the configuration class `name` as seen in one file: its bases' first, as msgspec orders them."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            source = _imported_file(node, path)
            return _fields(original, _parse(source), source)
        if isinstance(node, ast.ClassDef) and node.name == name:
            found: dict[str, Option] = {}
            for base in node.bases:
                if ast.unparse(base) not in ("msgspec.Struct", "Struct"):
                    if not isinstance(base, ast.Name):
                        raise ValueError(f"the base class is not a plain name: {ast.unparse(base)}")
                    found |= _fields(base.id, tree, path)
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and "ClassVar" not in ast.unparse(line.annotation):
                    text, description, bounds = read_annotation(line.annotation)
                    default = plain(ast.literal_eval(line.value)) if line.value else None
                    found[line.target.id] = Option(line.target.id, text, line.value is None, default, description, bounds)
            return found
    raise ValueError(f"no class {name} in {path}")


def _imported_file(node: ast.ImportFrom, path: Path) -> Path:
    """The file inside weft that `from ... import` reads."""
    parts = (node.module or "").split(".") if node.module else []
    if node.level:
        start = path.parents[node.level - 1]
    elif parts and parts[0] == "weft":
        start, parts = _ROOT, parts[1:]
    else:
        raise ValueError(f"{node.module} is not a module of weft")
    target = start.joinpath(*parts)
    file = target.with_suffix(".py")
    return file if file.is_file() else target / "__init__.py"


# --- methods of other packages ----------------------------------------------------------------------------------------


@cache
def _plugins(search: tuple[str, ...]) -> dict[str, dict[str, tuple[EntryPoint, ...]]]:
    """Kind to name to the entry points that claim it, over the installed packages on `search` (sys.path)."""
    if not any(_mentions(Path(folder)) for folder in search):
        return {}  # importlib.metadata alone costs as much time as the rest of a short command
    from importlib.metadata import entry_points

    found: dict[str, dict[str, tuple[EntryPoint, ...]]] = {}
    for point in entry_points(group=GROUP):
        kind, _, name = re.sub(r"[:.]", ":", point.name, count=1).partition(":")
        if kind not in KINDS or not name:
            warnings.warn(f"the package {_owner(point)} registers {point.name!r} in {GROUP}: expected kind:name", stacklevel=3)
            continue
        claims = found.setdefault(kind, {})
        claims[name] = (*claims.get(name, ()), point)
    return found


def _mentions(folder: Path) -> bool:
    """Whether a package installed in `folder` declares the entry point group."""
    try:
        entries = [entry.path for entry in os.scandir(folder) if entry.name.endswith((".dist-info", ".egg-info"))]
    except OSError:  # sys.path may name folders that don't exist, and zip files
        return False
    for entry in entries:
        try:
            if f"[{GROUP}]" in Path(entry, "entry_points.txt").read_text("utf-8"):
                return True
        except OSError:
            continue
    return False


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.module


def _load_plugin(kind: str, name: str, point: EntryPoint) -> Method:
    where = f"the {kind} method {name!r} of the package {_owner(point)}"
    try:
        value = point.load()
    except Exception as error:
        raise UsageError(f"{where} cannot be loaded: {type(error).__name__}: {error}", hint=f"pip install --upgrade {_owner(point)}") from error
    record = _mark(value)
    if record is None or record.kind != kind:
        raise UsageError(f"{where}: expected an object with the decorator @method({kind!r}, ...), got {point.value}")
    return replace(record, name=name)


def _plugin_record(kind: str, name: str, points: tuple[EntryPoint, ...]) -> dict[str, Any]:
    try:
        return _imported(kind, name, _owner(points[0]), get(kind, name))
    except UsageError as error:
        return _record(kind, name, _owner(points[0]), error.message, "", "", ())


# --- the catalogue as a page ------------------------------------------------------------------------------------------


def render_catalogue() -> str:
    """`docs/methods.md`: weft's own methods, a table for each kind and a section for each method, in markdown."""
    lines = ["# Methods", "", "Generated by `weft methods --format markdown`: change the methods, not this page.", ""]
    records = [record for record in catalogue() if record["package"] == "weft"]
    for kind, about in KINDS.items():
        of_kind = [record for record in records if record["kind"] == kind]
        if not of_kind:
            continue
        lines += [f"## {kind}", "", f"Chosen with `weft {about.verb} {about.flag}`.", ""]
        rows = [(f"[`{record['name']}`](#{kind}-{record['name']})", _cell(record["summary"]), _cell(_linked(record["paper"]))) for record in of_kind]
        lines += _table(("method", "what it does", "paper"), rows)
        for record in of_kind:
            lines += _section(record)
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(record: dict[str, Any]) -> list[str]:
    lines = [f"### {record['kind']}: {record['name']}", "", record["summary"], ""]
    facts = [f"- formula: `{record['formula']}`"] * bool(record["formula"]) + [f"- paper: {_linked(record['paper'])}"] * bool(record["paper"])
    lines += [*facts, ""] if facts else []
    if not record["options"]:
        return [*lines, "No options.", ""]
    rows = []
    for option in (Option(**each) for each in record["options"]):
        default = "required" if option.required else f"`{_cell(typed(option.default))}`"
        kind = option.type + OVER_DEPTH * (option.name in record["varies"])
        rows.append((f"`{option.name}`", _cell(kind), default, _cell(option.limits), _cell(option.description)))
    return lines + _table(("option", "type", "default", "bounds", "meaning"), rows)


def typed(value: Any) -> str:
    """A default as it is typed after `-p option=`."""
    import json

    if value is None:
        return "none"
    return value if isinstance(value, str) and value else json.dumps(value)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)] + [""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _linked(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", paper)
