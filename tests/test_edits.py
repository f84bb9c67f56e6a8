"""Reading edits: every layout gives the same edits, and everything that is wrong is said at once."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from weft.engine.edits import Edit, distinct, read_edits
from weft.errors import InputError

OWN = {
    "prompt": "The capital of {} is",
    "subject": "France",
    "target_new": " Lyon ",
    "ground_truth": "Paris",
    "rephrase_prompt": ["{}'s capital is", "People govern {} from"],
    "locality_prompt": "The capital of Spain is",
    "locality_ground_truth": "Madrid",
    "portability_prompt": ["The Louvre is in the capital of {}, called"],
    "portability_ground_truth": ["Lyon"],
}
EDIT = Edit(
    "The capital of France is",
    "Lyon",
    "France",
    "Paris",
    ("France's capital is", "People govern France from"),
    (("The capital of Spain is", "Madrid"),),
    (("The Louvre is in the capital of France, called", "Lyon"),),
)


def test_weft_s_own_layout_with_texts_and_lists() -> None:
    assert read_edits([OWN]) == [EDIT]
    plain = {"prompt": "Who wrote it? ", "target_new": "Ada", "locality_prompt": ["a", "b"]}
    assert read_edits([plain]) == [Edit("Who wrote it?", "Ada", locality=(("a", None), ("b", None)))]


def test_zsre_and_counterfact_as_they_are() -> None:
    zsre = {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "pred": "Trinity College",
        "rephrase": "What university did Watts Humphrey take part in?",
        "alt": "University of Michigan",
        "answers": ["Illinois Institute of Technology"],
        "loc": "nq question: who played desmond doss father in hacksaw ridge",
        "loc_ans": "Hugo Weaving",
        "cond": "Trinity College >> University of Michigan",
    }
    counterfact = {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": "Danielle Darrieux",
        },
        "paraphrase_prompts": ["Shayna does this. Danielle Darrieux, a native"],
        "neighborhood_prompts": ["The mother tongue of Léon Blum is", "Montesquieu spoke"],
        "generation_prompts": ["Danielle Darrieux's mother tongue is"],
    }
    assert read_edits([zsre, counterfact]) == [
        Edit(
            zsre["src"],  # type: ignore[arg-type]
            "University of Michigan",
            "Watts Humphrey",
            "Illinois Institute of Technology",
            ("What university did Watts Humphrey take part in?",),
            (("nq question: who played desmond doss father in hacksaw ridge", "Hugo Weaving"),),
        ),
        Edit(
            "The mother tongue of Danielle Darrieux is",
            "English",
            "Danielle Darrieux",
            "French",
            ("Shayna does this. Danielle Darrieux, a native",),
            (("The mother tongue of Léon Blum is", "French"), ("Montesquieu spoke", "French")),
        ),
    ]


def test_files_give_what_rows_give_and_the_id_is_that_of_the_edit_not_the_layout(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(OWN) + "\n")
    (tmp_path / "a.json").write_text(json.dumps([OWN]))
    assert read_edits(tmp_path / "a.jsonl") == read_edits(tmp_path / "a.json") == read_edits([EDIT]) == [EDIT]
    filled = {**OWN, "prompt": "The capital of France is", "rephrase_prompt": list(EDIT.rephrase), "source": "an atlas"}
    assert read_edits([filled])[0].id == EDIT.id
    assert read_edits([{**OWN, "target_new": "Nice"}])[0].id != EDIT.id


def test_all_that_is_wrong_is_said_at_once() -> None:
    rows = [
        OWN,
        {"prompt": "The capital is", "target": "Lyon"},
        {"prompt": "The capital of {} is", "target_new": "Lyon"},
        {"prompt": "The capital of Spain is", "subject": "France", "target_new": "Lyon"},
        {"prompt": 3, "target_new": " "},
        {**OWN, "locality_prompt": ["a", "b"]},
        {**OWN, "portability_ground_truth": []},
        {"requested_rewrite": {"prompt": "{} is", "subject": "It", "target_new": "Lyon"}},
        {"requested_rewrite": "no"},
    ]
    with pytest.raises(InputError) as caught:
        read_edits(rows)
    said = str(caught.value)
    assert said.startswith("8 of the edits cannot be read") and "row 0:" not in said
    for number, part in (
        (1, "no 'target_new'; did you mean 'target'?"),
        (2, "there is no 'subject'"),
        (3, "'France' is not in the prompt"),
        (4, "'prompt' must be text that is not empty, got '3'; 'target_new' must be"),
        (5, "'locality_prompt' has 2 texts and 'locality_ground_truth' 1"),
        (6, "no 'portability_ground_truth'"),
        (7, "no 'str'"),
        (8, "must be an object"),
    ):
        assert any(f"row {number}:" in line and part in line for line in said.splitlines()), (number, part, said)


def test_contradictions_are_refused_and_repeats_are_told() -> None:
    lyon, nice = EDIT, Edit(EDIT.prompt, "Nice")
    other = Edit("The capital of Spain is", "Bilbao")
    with pytest.raises(InputError, match=r"rows 0 and 2: .* both 'Lyon' and 'Nice'"):
        distinct([lyon, other, nice])
    with pytest.warns(UserWarning, match="row 2 is row 0"):
        assert distinct([lyon, other, lyon]) == [lyon, other]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distinct([lyon, other]) == [lyon, other]
