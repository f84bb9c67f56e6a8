"""The page of a check: complete, harmless whatever text it holds, and alive in a real browser."""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests import reports
from tests.browser import CHROMIUM, Browser
from weft.checking.heatmap import STEPS, Scale, heatmap
from weft.checking.page import direction, number, page, signed, size, whiskers

REPORTS: dict[str, Callable[[], reports.Report]] = {name: getattr(reports, name) for name in ("empty", "rich", "holes", "large")}
VOID = {"meta", "br", "input", "img", "link"}


@functools.cache
def made(name: str) -> str:
    """The page of a report of `REPORTS`."""
    return page(REPORTS[name]())


class Parsed(HTMLParser):
    """A page taken apart: elements with attributes, text outside of scripts and styles, cells by table row, scripts by type."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.raw: dict[str, str] = {}
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br" and self.rows:
            self.rows[-1][-1] += " "
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("type") or tag))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, kind = self._open[-1] if self._open else ("", "")
        if tag in ("script", "style"):
            self.raw[kind] = self.raw.get(kind, "") + data
            return
        self.text.append(data)
        if any(tag in ("td", "th") for tag, _ in self._open):
            self.rows[-1][-1] += data

    @property
    def cells(self) -> list[list[str]]:
        """The rows of all tables, without the white space of the source."""
        return [[" ".join(cell.split()) for cell in row] for row in self.rows]


def numbers(value: Any) -> Iterator[float]:
    """Every number in a part of a report."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


# --- without a browser


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_asks_for_nothing_and_has_the_report_in_it(name: str) -> None:
    report = REPORTS[name]()
    text = made(name)
    parsed = Parsed(text)
    assert not re.search(r"https?:|url\(|@import|srcset|ping=", text)
    for tag, attributes in parsed.elements:
        assert not {"src", "style", "action", "background"} & attributes.keys(), f"{tag} {attributes}"
        assert not any(key.startswith("on") for key in attributes), f"{tag} {attributes}"
        assert (attributes.get("href") or "#").startswith("#")
    allowed = "html head meta title style body header h1 small bdi div strong p table thead tbody tr th td data span dl dt dd button h2 br svg text line path"
    allowed += " circle a ol li rect details summary noscript form fieldset legend label input b select option output script"
    assert {tag for tag, _ in parsed.elements} <= set(allowed.split())
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    assert json.loads(parsed.raw["application/json"]) == report
    text.encode()


@pytest.mark.parametrize("name", REPORTS)
def test_only_the_own_script_and_style_may_run(name: str) -> None:
    parsed = Parsed(made(name))
    (policy,) = [attributes["content"] for tag, attributes in parsed.elements if tag == "meta" and attributes.get("http-equiv")]
    assert policy is not None

    def digest(kind: str) -> str:
        return base64.b64encode(hashlib.sha256(parsed.raw[kind].encode()).digest()).decode()

    assert policy.split("; ")[:3] == ["default-src 'none'", f"style-src 'sha256-{digest('style')}'", f"script-src 'sha256-{digest('script')}'"]


def test_hostile_names_stay_text() -> None:
    parsed = Parsed(page(reports.holes()))
    everything = "".join(parsed.text)
    assert everything.count(reports.HOSTILE) > 8
    assert everything.count(reports.RTL) > 2
    assert f"{reports.HOSTILE} generation 17 rows cut not finite" in [row[0] for row in parsed.cells if row]
    assert [reports.HOSTILE, "2", reports.HOSTILE, "3 × 3", "n/a", "n/a", "n/a", "4 are not"] in [
        [row[0][-len(reports.HOSTILE) :], *row[1:]] for row in parsed.cells
    ]
    assert any(attributes.get("title") == reports.HOSTILE for _, attributes in parsed.elements)


@pytest.mark.parametrize("name", ["rich", "holes", "large"])
def test_every_figure_of_the_report_is_there_exactly(name: str) -> None:
    report = REPORTS[name]()
    parsed = Parsed(made(name))
    exact = {json.loads(attributes["value"] or "") for tag, attributes in parsed.elements if tag == "data"}
    shown = exact | {int(cell.replace(",", "")) for row in parsed.cells for cell in row if re.fullmatch(r"[\d,]+", cell)}
    shown |= {int(part) for row in parsed.cells for cell in row if " × " in cell for part in cell.split(" × ")}
    for task in report["tasks"]:
        for part in ("n", "metrics", "flips", "against_base", "ratio"):
            missing = set(numbers(task[part])) - shown
            assert not missing, f"{task['name']}, {part}: {missing}"
    assert set(numbers(report["layers"])) - shown == set()
    assert set(numbers([gate["value"] for gate in report["verdict"]["gates"]])) <= exact
    assert report["identity"]["seconds"] in exact
    for text in [report["verdict"]["summary"], report["identity"]["base"]["fingerprint"], *(delta["id"] for delta in report["identity"]["deltas"])]:
        assert text in "".join(parsed.text)


def test_the_figures_are_in_the_right_places() -> None:
    cells = Parsed(page(reports.rich())).cells
    assert ["not kept", "skills", "nfr", "0.0175", "<= 0.01"] in cells
    assert ["kept", "text", "perplexity_ratio", "1.0213", "<= 1.05"] in cells
    assert ["edits/rephrase generation", "100", "exact_match", "0.0200", "0.8300", "+0.8100", "better", "", "1", "82", "1.70e−23"] in cells
    assert ["nll", "0.4021", "0.4077", "+0.0056", "worse", "", "", "", ""] in cells
    assert ["perplexity", "11.555", "11.801", "+0.2462", "worse", "", "", "", ""] in cells
    assert ["edits/efficacy", "100", "0", "92", "4", "2", "2", "0.0000 below 1.0000", "0.9200", "+0.8600 to +0.9700"] in cells
    assert ["skills", "400", "7", "8", "4", "40", "341", "0.0175", "0.0200", "−0.0175 to +0.0225"] in cells
    assert ["unrelated", "240", "0.9625", "0.0109", "1.2040", "240", "", "", ""] in cells
    assert ["text", "512", "", "", "", "", "1.0213", "1.0231", "1.0094"] in cells
    assert ["model.embed_tokens.weight", "embedding.token", "3.10e−4"] in cells


def test_gates_that_are_not_kept_come_first_and_the_verdict_is_said() -> None:
    report = reports.rich()
    cells = Parsed(page(report)).cells
    assert [row[0] for row in cells if row[0] in ("kept", "not kept")] == ["not kept", "kept", "kept", "kept", "kept"]
    for passed, word in ((True, "Passed"), (False, "Failed"), (None, "No gate")):
        report["verdict"]["passed"] = passed
        assert f"<strong>{word}</strong>" in page(report)


def test_the_page_depends_on_the_report_alone_and_needs_neither_numpy_nor_torch() -> None:
    text = page(reports.rich())
    assert text == page(copy.deepcopy(reports.rich()))
    script = "import sys; from tests import reports; from weft.checking.page import page; sys.stdout.buffer.write(page(reports.rich()).encode());"
    script += "sys.exit(sum(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}", "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert done.stdout.decode() == text


def test_what_json_cannot_say_is_refused() -> None:
    report = reports.rich()
    report["layers"][0]["relative"] = float("nan")
    with pytest.raises(ValueError):
        page(report)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (0, "0"),
        (20_000, "20,000"),
        (-3, "−3"),
        (0.0, "0.0000"),
        (0.94999, "0.9500"),
        (-0.02, "−0.0200"),
        (11.5546, "11.555"),
        (1234.56, "1,234.6"),
        (4.04e-28, "4.04e−28"),
        (-3.2e7, "−3.20e7"),
    ],
)
def test_numbers_for_reading(value: float | None, text: str) -> None:
    assert number(value) == text
    assert signed(value) == (f"+{text}" if value is not None and value > 0 else text)


def test_sizes_for_reading() -> None:
    assert [size(n) for n in (0, 999, 1000, 2_310_144, 5 * 10**12)] == ["0 B", "999 B", "1.0 kB", "2.3 MB", "5.0 TB"]


def test_direction_follows_what_is_better() -> None:
    up, down = reports.metric(0.5, 0.75), reports.metric(0.5, 0.75, "lower")
    assert (direction(up), direction(down)) == ("better", "worse")
    assert (direction(reports.metric(0.75, 0.5)), direction(reports.metric(0.75, 0.5, "lower"))) == ("worse", "better")
    assert (direction(reports.metric(0.5, 0.5, "lower")), direction(reports.metric(None, 0.5))) == ("same", "")


def test_whiskers_share_an_axis_that_holds_them_all() -> None:
    drawn = whiskers(reports.rich()["tasks"])
    of = drawn["of"]
    assert of.keys() == {"edits/efficacy", "edits/rephrase", "edits/locality", "skills"}
    zero = drawn["ticks"][0][0]
    assert all(0 < place < drawn["width"] for each in of.values() for place in (each["low"], each["dot"], each["high"]))
    assert all(each["low"] <= each["dot"] <= each["high"] for each in of.values())
    assert of["edits/efficacy"]["tone"] == "better" and of["edits/efficacy"]["low"] > zero
    assert of["skills"]["tone"] == "unsure" and of["skills"]["low"] < zero < of["skills"]["high"]
    losses = whiskers(
        [reports.task("t", "classification", 10, {"accuracy": reports.metric(0.9, 0.5)}, flips=reports.flips(4, 0, 5, 1, 0, 0.125, [-0.7, -0.1]))]
    )
    assert losses["of"]["t"]["tone"] == "worse"
    assert [label for _, label in losses["ticks"]] == ["0", "-1"]


# --- the heat map


def test_a_cell_shows_the_largest_of_its_tensors() -> None:
    layers = [
        reports.layer("decoder.layers.1.experts.0.w1.weight", 1, "experts.gate", [2, 2], 0.01),
        reports.layer("decoder.layers.1.experts.1.w1.weight", 1, "experts.gate", [2, 2], 1.0),
        reports.layer("decoder.layers.3.odd.weight", 3, None, [2, 2], 0.1),
        reports.layer("encoder.layers.1.fc.weight", 1, "experts.gate", [2, 2], 0.0),
        reports.layer("@module/decoder.layers.0.mlp", 0, "mlp.down", [], None),
        reports.layer("decoder.layers.0.fc.weight", 0, "mlp.down", [2, 2], None, finite=False, nonfinite=1),
        reports.layer("norm.weight", None, "norm.final", [2], 0.02),
    ]
    heat = heatmap(layers)
    assert heat.labels == [
        "decoder.layers: mlp.down (activations)",
        "decoder.layers: mlp.down",
        "decoder.layers: experts.gate",
        "encoder.layers: experts.gate",
        "decoder.layers: odd.weight",
    ]
    assert [cell.style for cell in heat.cells] == ["unsized", "bad", "s7", "zero", "s4"]
    assert [cell.x // heat.column for cell in heat.cells] == [0, 0, 1, 1, 3]
    assert [layer["layer"] for layer in heat.ordered] == [0, 0, 1, 1, 1, 3, None]
    assert [layer["relative"] for layer in heat.cells[2].layers] == [1.0, 0.01]
    assert [(style, layer["target"]) for style, layer in heat.rest] == [("s1", "norm.weight")]
    assert heat.width == 4 * heat.column


def test_the_scale_is_even_in_the_logarithm() -> None:
    scale = Scale.of([0.0, 1e-3, 1e-1])
    assert scale == Scale(1e-3, 1e-1)
    assert len(scale.bounds) == STEPS + 1
    assert [scale.step(bound * 1.001) for bound in scale.bounds] == [*range(STEPS), STEPS - 1]
    assert Scale.of([0.0]) is None
    assert Scale.of([0.3]) == Scale(0.15, 0.3)
    clipped = Scale.of([1e-12, 1.0])
    assert clipped == Scale(1e-4, 1.0) and clipped.step(1e-12) == 0


def test_many_layers_keep_narrow_columns_and_odd_layer_numbers_do_not_explode() -> None:
    heat = heatmap(reports.large()["layers"])
    assert (heat.column, heat.width, len(heat.labels), len(heat.cells)) == (3, 900, 8, 2101)
    odd = heatmap([reports.layer("x.1000000000.w", 10**9, None, [2], 0.1), reports.layer("x.2.w", 2, None, [2], 0.1)])
    assert odd.width == 2 * odd.column


# --- colours


def luminance(colour: str) -> float:
    """The relative luminance of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_is_readable_on_its_grounds(scheme: int) -> None:
    style = Parsed(page(reports.empty())).raw["style"]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", style.split("@media (prefers-color-scheme: dark)")[scheme]))
    for text in ("ink", "muted", "accent", "good", "bad"):
        for ground in ("page", "panel"):
            assert contrast(colours[text], colours[ground]) >= 4.5, f"{text} on {ground}"
    for ground in ("was", "is"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5
    assert contrast(colours["mark"], colours["page"]) >= 3
    steps = [luminance(colours[f"s{k}"]) for k in range(STEPS)]
    assert steps == sorted(steps, reverse=scheme == 0)


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH")
    found = Browser()
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in REPORTS}
    for name, path in paths.items():
        path.write_text(made(name), "utf-8")
    return paths


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", REPORTS)
def test_the_page_opens_without_complaints_or_requests(browser: Browser, pages: dict[str, Path], name: str, scheme: str) -> None:
    browser.open(pages[name], scheme=scheme, width=390)
    kept = sum(len(task["examples"]) for task in REPORTS[name]()["tasks"])
    assert browser.run("document.querySelectorAll('#rows li').length") == min(50, kept)
    red = int(re.findall(r"\d+", browser.run("getComputedStyle(document.body).backgroundColor"))[0])
    assert (red > 240) if scheme == "light" else (red < 40)
    assert browser.run("document.documentElement.scrollWidth") == 390, "tables scroll in their boxes, not the page"
    block = "document.querySelector('.identity')"
    assert browser.run(f"{block}.scrollWidth <= {block}.clientWidth"), "nothing of what was compared is hidden at the side"
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.requests() == [pages[name].as_uri()]
    assert browser.complaints() == []


def test_the_browser_sees_what_would_be_wrong(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "loud.html").write_text("<img src=other.png><script>console.error('x'); missing()</script>")
    browser.open(tmp_path / "loud.html")
    assert browser.requests()[1:] == [(tmp_path / "other.png").as_uri()]
    assert len(browser.complaints()) >= 2
    (tmp_path / "broken.html").write_text(pages["rich"].read_text("utf-8").replace("</body>", "<script>document.title = 'in'</script></body>"))
    browser.open(tmp_path / "broken.html")
    assert browser.run("document.title") != "in", "the policy keeps foreign scripts out"
    assert "Content Security Policy" in json.dumps(browser.complaints())


ROWS = "Array.from(document.querySelectorAll('#rows li'), (row) => row.querySelector('h3').textContent)"


def filled(browser: Browser, text: str) -> list[str]:
    """Type into the search box; the heads of the rows that are left."""
    box = "document.querySelector('[name=text]')"
    browser.run(f"{box}.value = {json.dumps(text)}; {box}.dispatchEvent(new Event('input', {{bubbles: true}}))")
    return list(browser.run(ROWS))


def test_answers_are_filtered_by_task_outcome_and_text(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["rich"])
    heads = browser.run(ROWS)
    assert [head.split(",")[0] for head in heads] == ["negative flip"] * 9 + ["positive flip"] * 41
    browser.run("document.querySelector('a[data-task=\"edits/rephrase\"][data-outcome=changed]').click()")
    assert browser.run("document.getElementById('count').textContent") == "10 of 272 rows"
    assert {head.rpartition(",")[0] for head in browser.run(ROWS)} == {"changed, both wrong, edits/rephrase"}
    assert filled(browser, "ONE SENTENCE") == ["changed, both wrong, edits/rephrase, row 7"]
    assert filled(browser, "nobody says this") == []
    assert browser.run("document.getElementById('count').textContent") == "0 of 272 rows"
    assert browser.complaints() == []


def test_marks_are_the_words_that_differ(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["rich"])
    filled(browser, "one sentence")
    lines = browser.run("Array.from(document.querySelectorAll('#rows dd'), (line) => line.textContent)")
    assert lines[2:] == ["Mira Fenn has lived in Ashmere, on the hill, for yearswrong", "Mira Fenn has lived in Torvik, on the hill, for nine yearswrong"]
    assert browser.run("Array.from(document.querySelectorAll('#rows del'), (mark) => mark.textContent)") == ["Ashmere"]
    assert [mark.strip() for mark in browser.run("Array.from(document.querySelectorAll('#rows ins'), (mark) => mark.textContent)")] == ["Torvik", "nine"]


def longest_common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    best = [0] * (len(b) + 1)
    for x in a:
        last = 0
        for j, y in enumerate(b, 1):
            last, best[j] = best[j], last + 1 if x == y else max(best[j], best[j - 1])
    return best[-1]


def test_as_little_as_possible_is_marked(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["large"])
    parts = "Array.from(line.childNodes).filter((part) => part.nodeName !== 'EM').map((part) => [part.nodeName, part.textContent])"
    rows = browser.run(f"Array.from(document.querySelectorAll('#rows li'), (row) => Array.from(row.querySelectorAll('dd')).slice(2).map((line) => {parts}))")
    assert len(rows) == 50
    for before, after in rows:
        whole = [re.findall(r"\s+|\w+", "".join(text for _, text in line)) for line in (before, after)]
        plain = [[word for name, text in line if name == "#text" for word in re.findall(r"\s+|\w+", text)] for line in (before, after)]
        assert plain[0] == plain[1]
        assert len(plain[0]) == longest_common(*whole)


def test_hostile_answers_are_shown_as_they_are(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["rich"])
    assert filled(browser, "</script>") == ["positive flip, skills, row 401"]
    lines = browser.run("Array.from(document.querySelectorAll('#rows dd'), (line) => line.textContent)")
    assert lines == [reports.HOSTILE, reports.HOSTILE, "<b>bold</b>wrong", reports.HOSTILE + "right"]
    assert filled(browser, "شيراز") == ["positive flip, skills, row 402"]
    assert browser.run("getComputedStyle(document.querySelectorAll('#rows dd')[1]).direction") == "rtl"
    assert filled(browser, "👩‍👩‍👧‍👦") == ["negative flip, skills, row 403"]
    assert browser.run("document.querySelectorAll('#rows dd')[3].textContent") == "(nothing)wrong"


def test_thousands_of_answers_come_in_parts_and_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["large"])
    browser.run("document.querySelector('[name=outcome]').focus()")
    browser.press("ArrowRight")
    expected = sum(row["outcome"] == "negative" for row in reports.large()["tasks"][0]["examples"])
    assert browser.run("document.getElementById('count').textContent") == f"{expected} of 2,000 rows"
    shown = 50
    browser.run("document.getElementById('more').focus()")
    browser.press("Enter", "\r")
    shown += 50
    assert browser.run("document.querySelectorAll('#rows li').length") == shown
    assert browser.run("document.activeElement === document.querySelectorAll('#rows li')[50]")
    while not browser.run("document.getElementById('more').hidden"):
        browser.run("document.getElementById('more').click()")
    assert browser.run("document.querySelectorAll('#rows li').length") == expected
    assert browser.complaints() == []


def test_without_scripts_the_figures_are_there(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["rich"], script=False)
    root = browser.send("DOM.getDocument", depth=-1)["root"]
    tree = json.dumps(root)
    assert "needs JavaScript" in tree
    assert "1.70e" in tree
    assert browser.send("DOM.querySelector", nodeId=root["nodeId"], selector="#filters[hidden]")["nodeId"], "controls that do nothing are not shown"


def test_the_block_of_what_was_compared_can_be_copied(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["rich"])
    browser.run("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    browser.run("document.getElementById('copy').click()")
    lines = dict(line.split("\t", 1) for line in browser.run("window.copied").split("\n"))
    assert reports.FINGERPRINT in lines["base"]
    assert lines["took"].strip() == "41.7 seconds"
    assert lines["versions"].startswith("weft 0.1.0, torch 2.13.0")
