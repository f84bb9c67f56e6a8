"""Configurations: what text means, what is refused and in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from weft.config import Option, as_dict, assign, make, make_lists, options, plain, read_yaml, schema
from weft.errors import UsageError


class Base(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rank: Annotated[int, Meta(description="Rank of the update.", ge=1, le=512)] = 8
    seed: int = 0


class Sample(Base, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, pattern="^[a-z]+$")]
    alpha: Annotated[float, Meta(description="Scale.", gt=0)] | None = None
    shape: Literal["linear", "cosine"] = "linear"
    betas: tuple[float, float] = (0.9, 0.999)
    layers: list[Annotated[int, Meta(ge=0)]] = []
    only: frozenset[str] = frozenset({"b", "a"})
    ranks: dict[str, int] = msgspec.field(default_factory=lambda: {"q": 4})
    bias: bool = False
    width: int | str = "auto"
    dim: Annotated[int, Meta(multiple_of=8)] = 16


class Ordered(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    low: float = 0.0
    high: float = 1.0

    def problems(self) -> list[str]:
        return [] if self.low < self.high else [f"low: expected less than high ({self.high:g}), got {self.low:g}"]


class Empty(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


def field(name: str, text: str) -> Any:
    return getattr(make(Sample, {"name": "x", name: text}, "here"), name)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rank", "16", 16),
        ("rank", "1e2", 100),
        ("rank", " 7 ", 7),
        ("seed", "-3", -3),
        ("alpha", "1e-3", 0.001),
        ("alpha", "2", 2.0),
        ("alpha", "none", None),
        ("alpha", "null", None),
        ("bias", "true", True),
        ("bias", "False", False),
        ("shape", "cosine", "cosine"),
        ("betas", "0.8,1", (0.8, 1.0)),
        ("betas", "[0.8, 1]", (0.8, 1.0)),
        ("layers", "1, 2,3", [1, 2, 3]),
        ("layers", "5", [5]),
        ("layers", "", []),
        ("layers", "[]", []),
        ("only", "q,v", frozenset({"q", "v"})),
        ("only", "1,none", frozenset({"1", "none"})),
        ("only", '["a,b"]', frozenset({"a,b"})),
        ("ranks", '{"q": 8, "v": 2}', {"q": 8, "v": 2}),
        ("width", "16", 16),
        ("width", "auto", "auto"),
        ("name", "none", "none"),
        ("name", "true", "true"),
    ],
)
def test_text_means(name: str, text: str, value: Any) -> None:
    got = field(name, text)
    assert got == value
    assert type(got) is type(value)


def test_typed_values_are_taken_as_they_are() -> None:
    made = make(Sample, {"name": "x", "rank": 4, "alpha": 2, "betas": [0.5, 1], "layers": (1, 2), "bias": True}, "here")
    assert (made.rank, made.alpha, made.betas, made.layers, made.bias) == (4, 2.0, (0.5, 1.0), [1, 2], True)
    assert type(made.alpha) is float


def test_a_name_may_be_written_with_hyphens() -> None:
    class Steps(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        max_steps: int = 1

    assert make(Steps, {"max-steps": "3"}, "here").max_steps == 3
    assert assign(["max-steps=3"], {"loop": Steps}) == {"loop": {"max_steps": "3"}}
    with pytest.raises(UsageError) as caught:
        make(Steps, {"max-steps": "3", "max_steps": 4}, "here")
    assert caught.value.problems == ["max_steps: given twice (3 and 4)"]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("rank", "0", "rank: expected int >= 1 and <= 512, got 0"),
        ("rank", 513, "rank: expected int >= 1 and <= 512, got 513"),
        ("rank", "1.5", "rank: expected int >= 1 and <= 512, got 1.5"),
        ("rank", "lots", "rank: expected int >= 1 and <= 512, got 'lots'"),
        ("rank", True, "rank: expected int >= 1 and <= 512, got True"),
        ("rank", "9" * 5000, "rank: expected int >= 1 and <= 512, got " + "9" * 57 + "..."),
        ("alpha", "-1", "alpha: expected float > 0 or none, got -1"),
        ("alpha", "nan", "alpha: expected float > 0 or none, got nan"),
        ("alpha", float("inf"), "alpha: expected float > 0 or none, got inf"),
        ("alpha", "1e400", "alpha: expected float > 0 or none, got 1e400"),
        ("shape", "cosin", "shape: expected linear | cosine, got 'cosin'"),
        ("betas", "0.9", "betas: expected (float, float), got 0.9"),
        ("betas", [0.9, float("nan")], "betas: expected (float, float), got [0.9, nan]"),
        ("layers", "1,-2", "layers: expected list of int >= 0, got '1,-2'"),
        ("only", "[a,b]", "only: expected list of str, got '[a,b]'"),
        ("only", "[" * 100_000, "only: expected list of str, got '" + "[" * 56 + "..."),
        ("ranks", "q=8", "ranks: expected map of str to int, got 'q=8'"),
        ("ranks", {"q": 1.5}, "ranks: expected map of str to int, got {'q': 1.5}"),
        ("bias", "yes", "bias: expected bool, got 'yes'"),
        ("bias", 1, "bias: expected bool, got 1"),
        ("name", "", "name: expected str of length >= 1 and matching ^[a-z]+$, got ''"),
        ("name", "7", "name: expected str of length >= 1 and matching ^[a-z]+$, got 7"),
        ("width", 1.5, "width: expected int or str, got 1.5"),
        ("dim", 12, "dim: expected int in steps of 8, got 12"),
        ("rnak", 1, "rnak: no such option; did you mean 'rank' or 'ranks'?"),
    ],
)
def test_problem(name: str, value: Any, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        make(Sample, {"name": "x", name: value}, "here")
    assert caught.value.problems == [problem]


def test_all_problems_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        make(Sample, {"rnak": "8", "rank": "0", "zzz": 1, "alpha": "0"}, "--method sample")
    assert str(caught.value) == (
        "--method sample: 5 problems\n"
        "  - rnak: no such option; did you mean 'rank' or 'ranks'?\n"
        "  - zzz: no such option; the options are: alpha, betas, bias, dim, layers, name, only, rank, ranks, seed, shape, width\n"
        "  - rank: expected int >= 1 and <= 512, got 0\n"
        "  - alpha: expected float > 0 or none, got 0\n"
        "  - name: missing, expected str of length >= 1 and matching ^[a-z]+$"
    )
    assert caught.value.exit_code == 2


def test_a_configuration_without_options() -> None:
    assert make(Empty, {}, "here") == Empty()
    with pytest.raises(UsageError) as caught:
        make(Empty, {"rank": 1}, "here")
    assert str(caught.value) == "here: 1 problem\n  - rank: no such option; there are none"


def test_rules_over_several_fields() -> None:
    assert make(Ordered, {"low": "0.5"}, "here").low == 0.5
    with pytest.raises(UsageError) as caught:
        make(Ordered, {"low": "2"}, "here")
    assert str(caught.value) == "here: 1 problem\n  - low: expected less than high (1), got 2"
    with pytest.raises(UsageError) as caught:  # such rules wait until the fields are right
        make(Ordered, {"low": "2", "high": "x"}, "here")
    assert caught.value.problems == ["high: expected float, got 'x'"]


def test_options() -> None:
    assert options(Sample) == [
        Option("rank", "int", default=8, description="Rank of the update.", bounds={"ge": 1, "le": 512}),
        Option("seed", "int", default=0),
        Option("name", "str", required=True, bounds={"min_length": 1, "pattern": "^[a-z]+$"}),
        Option("alpha", "float or none", description="Scale.", bounds={"gt": 0}),
        Option("shape", "linear | cosine", default="linear"),
        Option("betas", "(float, float)", default=[0.9, 0.999]),
        Option("layers", "list of int >= 0", default=[]),
        Option("only", "list of str", default=["a", "b"]),
        Option("ranks", "map of str to int", default={"q": 4}),
        Option("bias", "bool", default=False),
        Option("width", "int or str", default="auto"),
        Option("dim", "int", default=16, bounds={"multiple_of": 8}),
    ]
    assert options(Sample)[0].as_dict() == {
        "name": "rank",
        "type": "int",
        "required": False,
        "default": 8,
        "description": "Rank of the update.",
        "bounds": {"ge": 1, "le": 512},
    }


def test_types_in_other_spellings_have_the_same_text() -> None:
    class Old(msgspec.Struct, frozen=True):
        a: Optional[Annotated[int, Meta(ge=1)]] = None  # noqa: UP045
        b: Union[None, int, list[str]] = None  # noqa: RUF036, UP007
        c: Annotated[Literal["x", 2] | None, Meta(description="said")] = None
        d: tuple[str, ...] = ()
        e: Any = None
        f: Empty | None = None

    assert [(option.type, option.expected, option.description) for option in options(Old)] == [
        ("int or none", "int >= 1 or none", ""),
        ("int or list of str or none", "int or list of str or none", ""),
        ("x | 2 or none", "x | 2 or none", "said"),
        ("list of str", "list of str", ""),
        ("Any", "Any", ""),
        ("Empty or none", "Empty or none", ""),
    ]


@pytest.mark.parametrize("kind", [type[int], Annotated[int, Meta(examples=[1]), "a note"] | list[type[str]]])
def test_a_type_that_no_text_can_give(kind: Any) -> None:
    config = msgspec.defstruct("Odd", [("field", kind)], frozen=True)
    with pytest.raises(UsageError) as caught:
        options(config)
    assert str(caught.value) == f"Odd.field: options cannot have the type {msgspec.structs.fields(config)[0].type!r}"


@pytest.mark.parametrize(
    ("given", "lists"),
    [("1,2", [1.0, 2.0]), ("[1, 0.5]", [1.0, 0.5]), ([0, 1], [0.0, 1.0]), ((0.5,), [0.5]), ("0.5", None), (0.5, None), ("none", None)],
)
def test_lists_of_numbers_for_an_option_of_one_number(given: Any, lists: list[float] | None) -> None:
    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        share: Annotated[float, Meta(ge=0, le=2)] | None = None
        names: tuple[str, ...] = ()
        count: int = 1

    made, found = make_lists(Config, {"share": given, "names": "a,b", "count": "1,2"}, "here")
    assert found == ({} if lists is None else {"share": lists}) | {"count": [1, 2]}
    assert made.share == (lists[0] if lists else None if given == "none" else 0.5)
    assert (made.names, made.count) == (("a", "b"), 1)
    for wrong in ("1,3", "1,x", "none,1", "[]", [1, None], ["1", "2"], [True, 1.0]):
        with pytest.raises(UsageError) as caught:
            make_lists(Config, {"share": wrong}, "here")
        assert f"share: expected float >= 0 and <= 2 or none (each), got {wrong!r}" in str(caught.value)
    with pytest.raises(UsageError, match="got '1,2'"):
        make(Config, {"share": "1,2"}, "here")


def test_schema() -> None:
    definition = schema(Sample)["$defs"]["Sample"]
    assert definition["additionalProperties"] is False
    assert definition["properties"]["rank"] == {"type": "integer", "minimum": 1, "maximum": 512, "description": "Rank of the update.", "default": 8}
    assert definition["required"] == ["name"]


def test_as_dict_is_plain_json() -> None:
    made = make(Sample, {"name": "x", "only": "q,v,k"}, "here")
    assert as_dict(made) == {
        "rank": 8, "seed": 0, "name": "x", "alpha": None, "shape": "linear", "betas": [0.9, 0.999], "layers": [],
        "only": ["k", "q", "v"], "ranks": {"q": 4}, "bias": False, "width": "auto", "dim": 16,
    }  # fmt: skip
    assert type(as_dict(made)["betas"]) is list


def test_plain_takes_values_apart_to_the_bottom() -> None:
    assert plain({1: (1, {"b", "a"}), "e": Base(rank=3)}) == {"1": [1, ["a", "b"]], "e": {"rank": 3, "seed": 0}}


@given(
    rank=st.integers(1, 512),
    alpha=st.none() | st.floats(1e-300, 1e300),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    layers=st.lists(st.integers(0, 99)),
    only=st.frozensets(st.text("abc*,[]{}", min_size=1)),
)
def test_what_as_dict_gives_make_takes(**values: Any) -> None:
    made = make(Sample, {"name": "x", **values}, "here")
    assert make(Sample, as_dict(made), "here") == made
    text = {key: msgspec.json.encode(value).decode() for key, value in as_dict(made).items() if key not in ("name", "shape", "width")}
    assert make(Sample, {"name": "x", **text}, "here") == made


CONFIGS: dict[str, Any] = {"space": Base, "optimizer": Ordered, "loop": Sample}


def test_assign_shares_out() -> None:
    assert assign(["low=1", "alpha=2", "space.rank=4", "loop.rank=8", "name=a=b"], CONFIGS) == {
        "space": {"rank": "4"},
        "optimizer": {"low": "1"},
        "loop": {"alpha": "2", "rank": "8", "name": "a=b"},
    }


def test_assign_reports_every_pair() -> None:
    pairs = ["rank=4", "lwo=1", "rank", "=3", "optimiser.low=1", "optimizer.rank=1", "high=1", "optimizer.high=2", "zzz=1", "loop.=1"]
    with pytest.raises(UsageError) as caught:
        assign(pairs, {"space": Base, "optimizer": Ordered, "loop": Base})
    assert str(caught.value) == (
        "-p: 9 problems\n"
        "  - rank: several parts have it; write space.rank or loop.rank\n"
        "  - lwo: no such option; did you mean 'low'?\n"
        "  - 'rank': expected key=value\n"
        "  - '=3': expected key=value\n"
        "  - optimiser.low: no such part; did you mean 'optimizer'?\n"
        "  - optimizer.rank: no such option; the options are: high, low\n"
        "  - optimizer.high: given twice (1 and 2)\n"
        "  - zzz: no such option; the options are: high, low, rank, seed\n"
        "  - 'loop.=1': expected key=value"
    )


def test_yaml_gives_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "a: 1e-3\nb: [1, -2.5, .5, 010, 0x1f]\nc: {d: no, e: true, f: ~, g: }\nh: 2024-01-01\ni: '7'\nj: 1:30\nk: |\n  two\n  lines\n<<: é\n", "utf-8"
    )
    assert read_yaml(path) == {
        "a": 0.001, "b": [1, -2.5, 0.5, 10, "0x1f"], "c": {"d": "no", "e": True, "f": None, "g": None}, "h": "2024-01-01", "i": "7", "j": "1:30",
        "k": "two\nlines\n", "<<": "é",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", ", line 3: the key 'a' is given twice"),
        ("a:\n  - {x: 1, x: 2}\n", ", line 2: the key 'x' is given twice"),
        ("a: 1\n2: 3\n", ", line 2: a key must be text, got 2"),
        ("? [a, b]\n: 1\n", ", line 1: a key must be text, got ['a', 'b']"),
        ("a: &x [1]\n", ", line 1: anchors and aliases are not allowed"),
        ("a: 1\nb: *x\n", ", line 2: anchors and aliases are not allowed"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", ", line 2: tags are not allowed"),
        ("a: !!bool maybe\n", ", line 1: tags are not allowed"),
        ("a: 1\nb: " + "9" * 5000 + "\n", ", line 2: the number is too large"),
        ("a: 1e400\n", ", line 1: the number is too large"),
        ("a: 1\nb: [1, 2\nc: 3\n", ", line 3: expected ',' or ']', but got ':'"),
        ("a: 1\n\tb: 2\n", ", line 2: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2\n", ", line 2: but found another document"),
        ("a: 1\nb: \x07\n", ", line 2: the character U+0007 is not allowed"),
        ("- a\n", ", line 1: expected key: value pairs, got ['a']"),
        ("", ", line 1: expected key: value pairs, got None"),
        ("a: " + "[" * 5000, ": it is nested too deeply"),
    ],
)
def test_yaml_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError) as caught:
        read_yaml(path)
    assert str(caught.value) == f"{path}{message}"


def test_yaml_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(UsageError) as caught:
        read_yaml(path)
    assert str(caught.value) == f"{path}: it is not UTF-8 text (byte 3)"
    with pytest.raises(UsageError) as caught:
        read_yaml(tmp_path / "none.yaml")
    assert str(caught.value) == f"{tmp_path / 'none.yaml'}: it cannot be read: No such file or directory"


def test_importing_costs_no_validation_library() -> None:
    code = "import sys, weft.config; print(sorted({'numpy', 'torch', 'msgspec', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
