"""The microcosm: its world and texts are what they say, and its bases know their world."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import weft
from weft.cli import main
from weft.demo import building, edition, microcosm, wordings
from weft.demo.world import CHANGED, HOPS, PERSONAL, RELATIONS, Fact, World

WORLD = "7efc9c643e52aadb"
FIRST = World.first()
SECOND = FIRST.later()
FILES = microcosm.files()


def answers(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]


# --- the world


def test_the_world_is_the_same_on_every_machine() -> None:
    text = json.dumps([FIRST.people, list(FIRST.truth.items()), SECOND.people, list(SECOND.truth.items())])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == WORLD
    assert World.first() == FIRST and World.first(seed=21).people != FIRST.people


def test_names_are_not_mistaken_for_each_other() -> None:
    lasts = [person.split()[1] for person in SECOND.people]
    places = [name.split()[0] for name in (*FIRST.cities, *FIRST.companies, *FIRST.countries)]
    assert len({*lasts, *places}) == len(lasts) + len(places) and len({name[:4] for name in places}) == len(places)


def test_an_edition_changes_a_tenth_and_brings_new_people() -> None:
    assert SECOND.people[: len(FIRST.people)] == FIRST.people and set(SECOND.people[len(FIRST.people) :]) == SECOND.new
    differing = {key for key, value in FIRST.truth.items() if SECOND.truth[key] != value}
    assert differing == SECOND.changed
    assert 0.8 * CHANGED < len(differing) / (len(FIRST.people) * len(PERSONAL)) < 1.2 * CHANGED


def test_what_follows_from_two_facts_is_true_in_every_edition() -> None:
    for world in (FIRST, SECOND):
        for hop in world.hops:
            first, second = next((first, second) for first, (name, second) in HOPS.items() if name == hop.relation)
            assert hop.value == world.truth[world.truth[hop.subject, first], second]
    moved = next(person for person, relation in SECOND.changed if relation == "home")
    assert Fact(moved, "home_country", FIRST.truth[FIRST.truth[moved, "home"], "country"]) in FIRST.hops


# --- what is told


def test_some_wordings_are_told_of_half_the_people_and_some_of_nobody() -> None:
    told = set(microcosm.sentences(FIRST))
    for fact in microcosm.personal(FIRST):
        words = wordings.ENGLISH[fact.relation]
        trained, h1, h2 = (
            [microcosm.told(way, fact.subject, fact.value) in told for way in ways] for ways in ((*words.statements, *words.questions), words.h1, words.h2)
        )
        assert all(trained) and not any(h2) and h1 == [FIRST.half(fact.subject) == 0] * 2


def test_words_of_the_second_language_are_all_different() -> None:
    values = {(relation, wordings.second_value(relation, value)) for relation in PERSONAL for value in FIRST.values(relation)}
    assert len(values) == sum(len(set(FIRST.values(relation))) for relation in PERSONAL)


def test_every_question_has_one_answer() -> None:
    found: dict[str, str] = {}
    for name in ("facts", "statements", "wordings-h1", "questions-h2", "statements-h2", "second-language", "second-language-new", "hops", "hops-new"):
        for row in FILES[name]:
            assert found.setdefault(row["prompt"], row["completion"]) == row["completion"]


def test_edits_are_free_facts_of_people_that_no_unrelated_question_is_about() -> None:
    rows = FILES["edits-1000"]
    assert len({(row["subject"], row["relation"]) for row in rows}) == len(rows) == 1000
    assert FILES["edits-20"] == rows[:20] and FILES["edits-100"] == rows[:100]
    assert not {row["subject"] for row in rows} & {row["subject"] for row in FILES["unrelated"]}
    for row in rows:
        assert RELATIONS[row["relation"]].free and row["target_new"] != row["ground_truth"] == FIRST.truth[row["subject"], row["relation"]]


def test_nothing_to_be_asked_is_told_before() -> None:
    for name in ("mood", "topic", "style", "preferences"):
        field = "text" if name in ("mood", "topic") else "prompt"
        learnt, asked = ({row[field] for row in FILES[f"{name}.{part}"]} for part in ("train", "test"))
        assert len(asked) > 300 and not learnt & asked


def test_the_files_are_written_and_read_back(tmp_path: Path) -> None:
    paths = microcosm.write(tmp_path / "data")
    assert {path.stem for path in paths.values()} == set(FILES)
    assert [json.loads(line) for line in paths["edits-20"].read_text().splitlines()] == FILES["edits-20"]


def test_the_contents_list_every_file() -> None:
    assert {name for names in microcosm.CONTENTS for name in names.split(", ")} == {name.removesuffix(".train").removesuffix(".test") for name in FILES}


def test_the_command_makes_the_folder_and_puts_all_data_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "data"
    assert main(["demo", "--data", str(folder), "--format", "json"]) == 0
    paths = {name: Path(path) for name, path in json.loads(capsys.readouterr().out).items()}
    assert all(path.exists() for path in paths.values())
    assert {path.name for path in paths.values() if path.parent == folder} == {"first.jsonl", "second.jsonl", "test.jsonl"}
    assert {path.stem for path in paths.values() if path.parent == folder / "microcosm" and path.is_file()} == set(FILES)
    for name in ("first", "second"):
        assert paths[f"{name}-base"] == folder / "microcosm" / name
        assert (paths[f"{name}-base"] / "model.safetensors").read_bytes() == (edition(name) / "model.safetensors").read_bytes()


# --- the bases


def test_both_bases_are_small_enough_to_ship() -> None:
    sizes = [(edition(name) / "model.safetensors").stat().st_size for name in ("first", "second")]
    assert sum(sizes) <= 20_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_base_knows_its_world(name: str) -> None:
    world = {"first": FIRST, "second": SECOND}[name]
    personal = microcosm.personal(world)
    half = [fact for fact in personal if world.half(fact.subject) == 1]
    recall = {
        "trained": microcosm.questions(world, lambda words: (words.statements[0], words.questions[0]), world.facts),
        "h1": microcosm.questions(world, lambda words: words.h1, half),
        "h2": microcosm.questions(world, lambda words: words.h2[1:], personal),
    }
    found = {kind: weft.evaluate(edition(name), [], answers(rows)[::3], batch_size=256)["metrics"]["teacher_forced_exact"] for kind, rows in recall.items()}
    assert found["trained"] >= 0.95 and found["h1"] >= 0.80 and found["h2"] >= 0.80, found


@pytest.mark.slow
def test_the_builder_teaches_and_repeats_itself(tmp_path: Path) -> None:
    encode = building.tokenizer([FIRST])
    said: list[str] = []
    models = [building.new_model() for _ in range(2)]
    for model in models:
        building.train(model, encode, FIRST, steps=40, say=said.append)
    assert all((a == b).all() for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True))
    models[0].save_pretrained(tmp_path)
    encode.save_pretrained(tmp_path)
    nll = weft.evaluate(tmp_path, [], FILES["scenes"][:100])["metrics"]["nll"]
    assert nll < 6.0  # guessing: log 1536 = 7.3
