"""The registry: methods are files, listed without importing them, and the catalogue says what they say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import weft
from weft import methods
from weft.config import as_dict, make, options, schema
from weft.errors import UsageError, WeftError
from weft.methods import KINDS, Kind, catalogue, get, method, names, render_catalogue

HEAD = """
from __future__ import annotations
import msgspec
from typing import Annotated, ClassVar, Literal
from msgspec import Meta
from weft.methods import method
"""

SHARED = (
    HEAD
    + """
class Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    scale: Annotated[float, msgspec.Meta(description="Scale "
        "of the sum.", ge=0.0, lt=2)] = 1.0
    seed: int = 0
"""
)

PLAIN_SUM = (
    HEAD
    + '''
from ._shared import Common as Base

class PlainSumConfig(Base, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be chosen."""
    unit: ClassVar[str] = "w"
    sign: Literal["keep", "drop"] = "keep"
    only: Annotated[tuple[str, ...] | None, Meta(description="a | b")] = None
    ratio: Annotated[float, Meta(gt=-1)] | None
    pair: tuple[float, float] = (0.5, -1.5)
    scale: Annotated[float, Meta(ge=0.5)] = 0.5

@method("weave", config=PlainSumConfig, paper="A and B, 2024, "
    "arXiv:2401.01234", formula="w + s d")
def plain_sum(x):
    """Adds what is | given.

    More about it.
    """
    return x
'''
)

COMPUTED = (
    HEAD
    + '''
LIMIT = 2**4

class ComputedConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rank: Annotated[int, Meta(le=LIMIT)] = LIMIT

@method("weave", config=ComputedConfig)
class Computed:
    """Declared with a name that only Python can look up."""

class Heir(Computed):
    """Not a method by itself."""
'''
)


@pytest.fixture
def weave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A kind `weave` of its own, with its folder of methods."""
    folder = tmp_path / "weaving"
    folder.mkdir()
    for name, text in {"__init__": "", "_shared": SHARED, "plain_sum": PLAIN_SUM, "computed": COMPUTED}.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "notes.txt").write_text("")
    monkeypatch.setitem(KINDS, "weave", Kind("weave", "--method", "weaving"))
    monkeypatch.setattr(methods, "_ROOT", tmp_path)
    monkeypatch.setattr(weft, "__path__", [*weft.__path__, str(tmp_path)])
    yield folder
    for loaded in [each for each in sys.modules if each.startswith("weft.weaving")]:
        del sys.modules[loaded]
    vars(weft).pop("weaving", None)


@pytest.fixture
def plugin(weave: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs another package that registers entry points."""
    count = 0

    def install(package: str, points: dict[str, str], modules: dict[str, str]) -> None:
        nonlocal count
        count += 1
        site = tmp_path / f"site{count}"
        info = site / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[weft.methods]\n" + "".join(f"{key} = {value}\n" for key, value in points.items()))
        for name, text in modules.items():
            (site / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(site))

    return install


OTHER = (
    HEAD
    + '''
class OtherConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rank: int = 4

@method("weave", config=OtherConfig, paper="C, 2025", formula="w")
def anything(x):
    """Comes from elsewhere."""

def undecorated(x):
    """Is no method."""
'''
)


def test_names_are_files(weave: Path) -> None:
    assert names("weave") == ["computed", "plain-sum"]
    assert not [each for each in sys.modules if each.startswith("weft.weaving")]


def test_a_package_that_does_not_exist_has_no_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "weave", Kind("weave", "--method", "nowhere"))
    assert names("weave") == []
    assert catalogue("weave") == []


def test_get_imports_one_file(weave: Path) -> None:
    found = get("weave", "plain-sum")
    assert (found.name, found.kind, found.doc) == ("plain-sum", "weave", "Adds what is | given.")
    assert (found.paper, found.formula) == ("A and B, 2024, arXiv:2401.01234", "w + s d")
    assert found.run(3) == 3
    assert make(found.config, {"ratio": "0"}, "here").ratio == 0.0  # type: ignore[attr-defined]
    assert "weft.weaving.computed" not in sys.modules
    assert get("weave", "computed").run.__name__ == "Computed"  # its heir does not count


def test_unknown_names(weave: Path) -> None:
    with pytest.raises(UsageError) as caught:
        get("weave", "plain_sum")
    assert str(caught.value) == "there is no weave method 'plain_sum'; did you mean 'plain-sum'?\n  try: weft methods weave"
    with pytest.raises(UsageError) as caught:
        get("weave", "../zzz")
    assert str(caught.value) == "there is no weave method '../zzz'; there are: computed, plain-sum\n  try: weft methods weave"
    with pytest.raises(UsageError) as caught:
        get("guard", "plain-sum")
    assert str(caught.value) == "there is no guard method 'plain-sum'; it is chosen with weft weave --method\n  try: weft methods tune"
    with pytest.raises(UsageError) as caught:
        names("gaurd")
    assert str(caught.value) == "there is no kind of method 'gaurd'; did you mean 'guard'?\n  try: weft methods"
    with pytest.raises(UsageError) as caught:
        catalogue("tuen")
    assert str(caught.value) == "there is no verb or kind of method 'tuen'; did you mean 'tune'?\n  try: weft methods"


def test_catalogue_reads_without_importing(weave: Path) -> None:
    (weave / "computed.py").unlink()
    (record,) = catalogue("weave")
    assert not [each for each in sys.modules if each.startswith("weft.weaving")]
    assert {key: value for key, value in record.items() if key != "options"} == {
        "name": "plain-sum",
        "kind": "weave",
        "verb": "weave",
        "package": "weft",
        "summary": "Adds what is | given.",
        "paper": "A and B, 2024, arXiv:2401.01234",
        "formula": "w + s d",
        "varies": [],
    }
    assert record["options"][0] == {"name": "scale", "type": "float", "required": False, "default": 0.5, "description": "", "bounds": {"ge": 0.5}}
    assert record["options"] == [option.as_dict() for option in options(get("weave", "plain-sum").config)]


def test_catalogue_imports_what_is_computed(weave: Path) -> None:
    record = catalogue("weave")[0]
    assert record["name"] == "computed"
    assert record["options"] == [{"name": "rank", "type": "int", "required": False, "default": 16, "description": "", "bounds": {"le": 16}}]
    assert "weft.weaving.plain_sum" not in sys.modules


SEVERAL = [
    ("from ._shared import Common as Base\n", "from . import _shared\n", "Config(Base,", "Config(_shared.Common,"),
    ("class PlainSumConfig(", "class _Inner(", "@method(", "PlainSumConfig = _Inner\n\n@method("),
    ("from ._shared import Common as Base\n", "from elsewhere import Common as Base\n"),
    ("config=PlainSumConfig", "config=(PlainSumConfig)[0]", "@method(", "PlainSumConfig = (PlainSumConfig,)\n\n@method("),
    ("import method\n", "import method as weft_method\n", "@method(", "@weft_method("),
]


@pytest.mark.parametrize("changes", SEVERAL)
def test_catalogue_imports_what_it_cannot_read(weave: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]) -> None:
    outside = weave.parent / "outside"
    outside.mkdir()
    (outside / "elsewhere.py").write_text(SHARED)
    monkeypatch.syspath_prepend(str(outside))
    text = PLAIN_SUM
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert text.count(old) == 1
        text = text.replace(old, new)
    read = next(record for record in catalogue("weave") if record["name"] == "plain-sum")
    assert "weft.weaving.plain_sum" not in sys.modules
    (weave / "plain_sum.py").write_text(text)
    listed = [record for record in catalogue("weave") if record["name"] == "plain-sum"]
    assert "weft.weaving.plain_sum" in sys.modules
    assert listed == [read]


def test_catalogue_of_a_verb(weave: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "pattern", Kind("weave", "--pattern", "patterns"))
    (weave.parent / "patterns").mkdir()
    (weave.parent / "patterns" / "twill.py").write_text(PLAIN_SUM.replace("from ._shared", "from weft.weaving._shared").replace('"weave"', '"pattern"'))
    assert [(record["kind"], record["name"]) for record in catalogue("weave")] == [("weave", "computed"), ("weave", "plain-sum"), ("pattern", "twill")]
    assert [record["name"] for record in catalogue("pattern")] == ["twill"]


def test_a_file_must_hold_one_method(weave: Path) -> None:
    (weave / "two.py").write_text(PLAIN_SUM + PLAIN_SUM.removeprefix(HEAD).replace("def plain_sum", "def second"))
    (weave / "none.py").write_text("from .plain_sum import plain_sum\n")
    (weave / "wrong.py").write_text(PLAIN_SUM.replace('"weave"', '"edit"'))
    for name, got in {"two": "weave:plain_sum, weave:second", "none": "none", "wrong": "edit:plain_sum"}.items():
        with pytest.raises(WeftError) as caught:
            get("weave", name)
        assert str(caught.value) == f"weft.weaving.{name}: expected one @method('weave', ...), got {got}"
        assert caught.value.exit_code == 4


def test_the_decorator_refuses() -> None:
    class Loose(msgspec.Struct, frozen=True):
        rank: int = 1

    class Open(msgspec.Struct, forbid_unknown_fields=True):
        rank: int = 1

    class Right(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        rank: int = 1

    def run() -> None:
        """Runs."""

    def silent() -> None: ...

    here = f"{__name__}.test_the_decorator_refuses.<locals>."
    with pytest.raises(UsageError) as caught:
        method("merge", config=get("merge", "ties").config, varies=("scale", "densty"))(run)
    assert str(caught.value) == f"{here}run: 'densty' is said to vary and is no option of it; did you mean 'density'?"
    for config in (Loose, Open, dict):
        with pytest.raises(UsageError) as caught:
            method("merge", config=config)(run)  # type: ignore[arg-type]
        assert str(caught.value) == f"{here}run: its config must be a msgspec.Struct with frozen=True and forbid_unknown_fields=True, got {config!r}"
    with pytest.raises(UsageError) as caught:
        method("merge", config=Right)(silent)
    assert str(caught.value) == f"{here}silent: a method needs a docstring, its first line is shown in the catalogue"
    with pytest.raises(UsageError) as caught:
        method("merg", config=Right)
    assert str(caught.value) == "there is no kind of method 'merg'; did you mean 'merge'?\n  try: weft methods"
    assert method("merge", config=Right)(run) is run


def test_other_packages_register_by_entry_point(plugin: Any) -> None:
    plugin("other-weaver", {"weave:satin": "other_weaver:anything", "weave.crepe": "other_weaver:anything"}, {"other_weaver": OTHER})
    assert names("weave") == ["computed", "crepe", "plain-sum", "satin"]
    assert "other_weaver" not in sys.modules
    found = get("weave", "satin")
    assert (found.name, found.doc, found.config().rank) == ("satin", "Comes from elsewhere.", 4)  # type: ignore[attr-defined]
    record = next(record for record in catalogue("weave") if record["name"] == "crepe")
    assert (record["package"], record["paper"], [option["name"] for option in record["options"]]) == ("other-weaver", "C, 2025", ["rank"])
    assert "crepe" not in render_catalogue()


def test_a_name_claimed_twice(plugin: Any) -> None:
    plugin("first-weaver", {"weave:satin": "first_weaver:anything", "weave:plain-sum": "first_weaver:anything"}, {"first_weaver": OTHER})
    with pytest.raises(UsageError) as caught:
        get("weave", "plain-sum")
    assert str(caught.value) == "the weave method 'plain-sum' is claimed by weft and by first-weaver\n  try: pip uninstall first-weaver"
    assert [record["package"] for record in catalogue("weave") if record["name"] == "plain-sum"] == ["weft"]
    assert get("weave", "computed").name == "computed"
    plugin("second-weaver", {"weave:satin": "second_weaver:anything"}, {"second_weaver": OTHER})
    with pytest.raises(UsageError) as caught:
        get("weave", "satin")
    assert str(caught.value).startswith("the weave method 'satin' is claimed by second-weaver and by first-weaver")


def test_other_packages_that_are_broken(plugin: Any) -> None:
    points = {"weave:absent": "no_such_module:x", "weave:bare": "third_weaver:undecorated", "guard:strange": "third_weaver:anything"}
    plugin("third-weaver", points, {"third_weaver": OTHER})
    with pytest.raises(UsageError) as caught:
        get("weave", "absent")
    assert str(caught.value) == (
        "the weave method 'absent' of the package third-weaver cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'\n"
        "  try: pip install --upgrade third-weaver"
    )
    with pytest.raises(UsageError) as caught:
        get("weave", "bare")
    expected = "the weave method 'bare' of the package third-weaver: expected an object with the decorator @method('weave', ...), got third_weaver:undecorated"
    assert str(caught.value) == expected
    with pytest.raises(UsageError, match=r"expected an object with the decorator @method\('guard', ...\), got third_weaver:anything"):
        get("guard", "strange")
    listed = {record["name"]: record["summary"] for record in catalogue("weave")}
    assert listed["bare"] == expected
    assert listed["plain-sum"] == "Adds what is | given."


@pytest.mark.parametrize("point", ["satin", "wave:satin", "weave:"])
def test_entry_points_without_a_kind_are_named_in_a_warning(plugin: Any, point: str) -> None:
    plugin("fourth-weaver", {point: "fourth_weaver:anything"}, {"fourth_weaver": OTHER})
    with pytest.warns(UserWarning, match=f"the package fourth-weaver registers '{point}' in weft.methods: expected kind:name"):
        assert names("weave") == ["computed", "plain-sum"]


def test_the_page_of_a_method_without_options(weave: Path) -> None:
    text = HEAD + "class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):\n    pass\n"
    text += '@method("weave", config=Config)\nclass Bare:\n    """Bare."""\n\n@staticmethod\ndef helper(): ...\n'
    (weave / "plain_sum.py").unlink()
    (weave / "computed.py").unlink()
    (weave / "bare.py").write_text(text)
    assert render_catalogue().endswith("### weave: bare\n\nBare.\n\nNo options.\n")


def test_the_page(weave: Path) -> None:
    assert render_catalogue() == (
        "# Methods\n\n"
        "Generated by `weft methods --format markdown`: change the methods, not this page.\n\n"
        "## weave\n\n"
        "Chosen with `weft weave --method`.\n\n"
        "| method | what it does | paper |\n"
        "| --- | --- | --- |\n"
        "| [`computed`](#weave-computed) | Declared with a name that only Python can look up. |  |\n"
        "| [`plain-sum`](#weave-plain-sum) | Adds what is \\| given. | A and B, 2024, [arXiv:2401.01234](https://arxiv.org/abs/2401.01234) |\n\n"
        "### weave: computed\n\n"
        "Declared with a name that only Python can look up.\n\n"
        "| option | type | default | bounds | meaning |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| `rank` | int | `16` | <= 16 |  |\n\n"
        "### weave: plain-sum\n\n"
        "Adds what is | given.\n\n"
        "- formula: `w + s d`\n"
        "- paper: A and B, 2024, [arXiv:2401.01234](https://arxiv.org/abs/2401.01234)\n\n"
        "| option | type | default | bounds | meaning |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| `scale` | float | `0.5` | >= 0.5 |  |\n"
        "| `seed` | int | `0` |  |  |\n"
        "| `sign` | keep \\| drop | `keep` |  |  |\n"
        "| `only` | list of str or none | `none` |  | a \\| b |\n"
        "| `ratio` | float or none | required | > -1 |  |\n"
        "| `pair` | (float, float) | `[0.5, -1.5]` |  |  |\n"
    )


def test_listing_costs_no_heavy_import() -> None:
    """Every method of weft itself declares its options in literals: nothing has to be imported to list them."""
    code = (
        "import sys, weft.methods as m; m.catalogue(); m.render_catalogue(); [m.names(k) for k in m.KINDS]\n"
        "print(sorted({'numpy', 'torch', 'msgspec', 'importlib.metadata'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


BUILT_IN = [(record["kind"], record["name"]) for record in catalogue() if record["package"] == "weft"]


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_every_method_is_as_listed(kind: str, name: str) -> None:
    """The contract of a method's declaration: what is listed is what runs, every option is described and its default allowed."""
    record = next(record for record in catalogue(kind) if record["name"] == name)
    found = get(kind, name)
    assert (found.name, found.doc, found.paper, found.formula) == (name, record["summary"], record["paper"], record["formula"])
    assert list(found.varies) == record["varies"]
    listed = options(found.config)
    assert all(option.numeric for option in listed if option.name in found.varies)
    assert record["options"] == [option.as_dict() for option in listed]
    assert [option.name for option in listed if not option.description] == []
    assert record["formula"]
    assert schema(found.config)
    defaults = {option.name: option.default for option in listed if not option.required}
    if len(defaults) == len(listed):
        assert as_dict(make(found.config, defaults, name)) == as_dict(found.config())
