"""The demo: its data, its plot, and the story itself on a small part of the text."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest

from weft.demo import bits, docstrings, minilm, story
from weft.errors import InputError


def test_the_text_set_is_the_same_every_time_and_does_not_name_the_answer() -> None:
    rows = docstrings.rows()
    assert rows == docstrings.rows() and len({row["text"] for row in rows}) == len(rows)
    labels = {row["label"] for row in rows}
    assert len(labels) == 6
    assert all(docstrings.MINIMUM <= len(row["text"]) <= docstrings.MAXIMUM for row in rows)
    assert not any(row["label"] in row["text"].lower().split() for row in rows)
    train, test = docstrings.split(rows)
    assert len(train) + len(test) == len(rows) and {row["label"] for row in test} == labels
    assert not {row["text"] for row in train} & {row["text"] for row in test}


def test_the_plot_is_an_svg_with_a_bar_for_each_score() -> None:
    root = ET.fromstring(story.bars({"before <&>": 0.25, "after": 1.0}))
    widths = [float(bar.attrib["width"]) for bar in root.iter("{http://www.w3.org/2000/svg}rect") if bar.attrib.get("class") == "bar"]
    assert widths == [140.0, 560.0]
    texts = "".join(root.itertext())
    assert "before <&>" in texts and "25.0%" in texts and "100.0%" in texts


def test_bits_are_counted() -> None:
    assert bits.differing_bits(b"\x00\xff", b"\x01\x0f") == 5 and bits.differing_bits(b"\x00", b"") == 8


@pytest.mark.slow
def test_the_story_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "rows", partial(docstrings.rows, packages=2, most=60))
    said: list[str] = []
    figures = story.run(tmp_path / "out", said.append)
    accuracy = figures["accuracy"]
    assert figures["differing_bits"] == 0 and figures["folded"] == accuracy["merged"]
    before = next(value for name, value in accuracy.items() if name.startswith("before"))
    assert accuracy["merged"] > before
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == figures
    assert {"scores.svg", "first.safetensors", "second.safetensors", "merged.safetensors", "folded"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert any(line.startswith("open") for line in said) and any(line.startswith("next") for line in said)
    story.run(tmp_path / "out", said.append)  # a second run in the same folder starts over


def test_the_model_comes_with_its_package() -> None:
    assert (minilm() / "model.safetensors").is_file()


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folded").mkdir()
    (tmp_path / "folded" / "mine").touch()
    with pytest.raises(InputError, match="folded is there already"):
        story.run(tmp_path)
    assert (tmp_path / "folded" / "mine").exists() and [path.name for path in tmp_path.iterdir()] == ["folded"]
    (tmp_path / "merged.safetensors").touch()
    assert not story.fresh(tmp_path / "folded").exists()
