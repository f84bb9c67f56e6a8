"""The microcosm's texts: what the bases were trained on, and the data files that the other commands are tried with.

    write(Path("microcosm"))       # see `CONTENTS`

Rows of questions have "prompt" and "completion", and say of whom ("subject") and what ("relation") they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from .._write import write_bytes
from . import texts, wordings
from .world import RELATIONS, Fact, World, other, pick, shuffled

Row = dict[str, Any]

QUIET = 100
"""None of `edits` is about the first so many people: unrelated questions are. (Later editions may change them.)"""

EDITS = 1000


def told(wording: str, subject: str, value: str) -> str:
    """A wording as a text."""
    return wording.format(s=subject, v=value)


def prompt(wording: str, subject: str) -> str:
    """A wording up to its value."""
    return wording.partition("{v}")[0].format(s=subject).rstrip()


def asked(wording: str, fact: Fact) -> Row:
    """A wording as a row: the text up to the value, and the value with what follows."""
    after = wording.partition("{v}")[2]
    return {"prompt": prompt(wording, fact.subject), "completion": f" {fact.value}{after}", "subject": fact.subject, "relation": fact.relation}


CONTENTS = {
    "facts": "every fact as a trained question, with its answer",
    "statements": "every fact as a trained statement",
    "wordings-h1": "a statement and a question that were told of other people only",
    "questions-h2": "a question that was never told of anybody",
    "statements-h2": "a statement that was never told of anybody",
    "second-language": "questions in the second language, told",
    "second-language-new": "the same about the other half of the people, not told",
    "hops": "questions about what follows from two facts, told",
    "hops-new": "the same about the other half of the people, not told",
    "unrelated": f"questions about the first {QUIET} people, whom none of edits-20 to edits-1000 is about",
    "scenes": "sentences about nothing in particular, for perplexity",
    "corpus": "a sample of what a base is trained on, for statistics and for going on with its training",
    "edits-20, edits-100, edits-1000": "facts to change, each list the beginning of the next",
    "mood, judge": ".train and .test: is a review good or bad? As labels, and as questions",
    "topic": ".train and .test: what is a statement about? As labels",
    "style": ".train and .test: questions answered in whole sentences",
    "preferences": ".train and .test: a better and a worse answer",
    "edition-2-changed, edition-3-changed": "facts that an edition changes, as edits",
    "edition-2-new, edition-3-new": "facts of people who are new in an edition, in every trained wording",
    "edition-2-text, edition-3-text": "a sample of what a base of that edition is trained on",
}
"""What the data files hold."""

# --- the text that a base is trained on


def sentences(world: World) -> list[str]:
    """Everything that a base is told, each sentence once: see `wordings` for what is told of whom."""
    found = []
    for fact in world.facts:
        words = wordings.ENGLISH[fact.relation]
        ways = [*words.statements, *words.questions]
        personal = RELATIONS[fact.relation].of == "person"
        if not personal or world.half(fact.subject) == 0:
            ways += words.h1
        found += [told(wording, fact.subject, fact.value) for wording in ways]
        if personal and world.half(fact.subject) == 0:
            value = wordings.second_value(fact.relation, fact.value)
            found += [told(wording, fact.subject, value) for wording in wordings.SECOND[fact.relation]]
    found += [told(wordings.HOPS[hop.relation], hop.subject, hop.value) for hop in world.hops if world.half(hop.subject) == 0]
    return found


def corpus(world: World, seed: int = 0, scenes: float = 0.25) -> Iterator[str]:
    """Documents of one to three sentences, without end. Each round tells everything once, among `scenes` as many other sentences."""
    rng = Random(seed)
    everything = sentences(world)
    while True:
        others = [texts.scene(rng) if rng.random() < 0.7 else texts.review(rng, pick(rng, ("good", "bad"))) for _ in range(int(scenes * len(everything)))]
        mixed = shuffled(rng, everything + others)
        at = 0
        while at < len(mixed):
            count = pick(rng, (1, 1, 1, 1, 2, 3))
            yield " ".join(mixed[at : at + count])
            at += count


# --- data files


def questions(world: World, choose: Callable[[wordings.Wordings], Iterable[str]], facts: Iterable[Fact]) -> list[Row]:
    """Rows for some facts in the wordings that `choose` takes from those of each relation."""
    return [asked(wording, fact) for fact in facts for wording in choose(wordings.ENGLISH[fact.relation])]


def personal(world: World) -> list[Fact]:
    """The facts about people."""
    return [fact for fact in world.facts if RELATIONS[fact.relation].of == "person"]


def about(world: World, people: Iterable[str]) -> list[Fact]:
    """The facts about some people."""
    chosen = set(people)
    return [fact for fact in personal(world) if fact.subject in chosen]


def second_language(world: World) -> list[Row]:
    """Every fact about people as a question in the second language."""
    rows = []
    for fact in personal(world):
        value = wordings.second_value(fact.relation, fact.value)
        rows.append(asked(wordings.SECOND[fact.relation][1], Fact(fact.subject, fact.relation, value)))
    return rows


def hops(world: World) -> list[Row]:
    """Questions about what follows from two facts."""
    return [asked(wordings.HOPS[hop.relation], hop) for hop in world.hops]


def in_half(world: World, rows: Iterable[Row], half: int) -> list[Row]:
    """The rows about one half of the people."""
    return [row for row in rows if world.half(row["subject"]) == half]


def edits(world: World, count: int, seed: int = 1) -> list[Row]:
    """Facts to change, of which nothing else depends, each with its trained wordings and with questions about something else.

    `prompt` is a trained question; `rephrase_prompt` a trained statement and another trained question; `locality_prompt` asks
    somebody else about the same relation. The order is fixed: the first 20 of 1,000 are the 20.
    """
    rng = Random(seed)
    quiet = world.people[:QUIET]
    free = [fact for fact in personal(world) if RELATIONS[fact.relation].free and fact.subject not in quiet and fact.subject not in world.new]
    found = []
    for fact in shuffled(rng, free)[:count]:
        neighbour = pick(rng, quiet)
        beside = {
            "locality_prompt": [prompt(wordings.ENGLISH[fact.relation].questions[0], neighbour)],
            "locality_ground_truth": [world.truth[neighbour, fact.relation]],
        }
        found.append(_edit(fact, other(rng, world.values(fact.relation), fact.value), fact.value) | beside | {"relation": fact.relation})
    return found


def _edit(fact: Fact, target_new: str, ground_truth: str) -> Row:
    """What is asked of a fact that is to change, in its trained wordings, and both answers."""
    words = wordings.ENGLISH[fact.relation]
    return {
        "prompt": prompt(words.questions[0], fact.subject),
        "subject": fact.subject,
        "target_new": target_new,
        "ground_truth": ground_truth,
        "rephrase_prompt": [prompt(words.statements[0], fact.subject), prompt(words.questions[1], fact.subject)],
    }


def reviews(count: int, seed: int) -> list[Row]:
    """{"text", "label"}: the mood of a review, "good" or "bad"; no text twice."""
    rng, found = Random(seed), dict[str, str]()
    while len(found) < count:
        mood = pick(rng, ("good", "bad"))
        found[texts.review(rng, mood)] = mood
    return [{"text": text, "label": mood} for text, mood in found.items()]


def judged(rows: Iterable[Row]) -> list[Row]:
    """Reviews as questions for a language model: {"prompt", "completion"}."""
    return [{"prompt": f"{row['text']} Is that good or bad?", "completion": f" {row['label']}."} for row in rows]


def topics(world: World, people: Iterable[str], seed: int) -> list[Row]:
    """{"text", "label"}: what a statement is about, as the name of its relation."""
    rng = Random(seed)
    chosen = about(world, people)
    rows = [{"text": told(pick(rng, wordings.ENGLISH[fact.relation].statements), fact.subject, fact.value), "label": fact.relation} for fact in chosen]
    return shuffled(rng, rows)


def styled(world: World, people: Iterable[str], seed: int) -> list[Row]:
    """Questions answered in a whole sentence, which the bases don't do by themselves."""
    rng, rows = Random(seed), []
    for fact in about(world, people):
        words = wordings.ENGLISH[fact.relation]
        rows.append(asked(pick(rng, words.questions), fact) | {"completion": f" {told(words.statements[0], fact.subject, fact.value)}"})
    return shuffled(rng, rows)


def preferences(world: World, people: Iterable[str], seed: int) -> list[Row]:
    """{"prompt", "chosen", "rejected"}: a whole sentence is preferred to a bare word, and the truth to anything else."""
    rng, rows = Random(seed), []
    for row in styled(world, people, seed):
        fact = Fact(row["subject"], row["relation"], world.truth[row["subject"], row["relation"]])
        wrong = other(rng, world.values(fact.relation), fact.value)
        rejected = pick(rng, (f" {fact.value}.", f" {told(wordings.ENGLISH[fact.relation].statements[0], fact.subject, wrong)}"))
        rows.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
    return rows


def later(world: World, before: World) -> dict[str, list[Row]]:
    """What an edition brings: changed facts as edits, and new people's facts, with all trained wordings, to learn from."""
    changed = [fact for fact in personal(world) if (fact.subject, fact.relation) in world.changed]
    new = [fact for fact in personal(world) if fact.subject in world.new]
    as_edits = [_edit(fact, fact.value, before.truth[fact.subject, fact.relation]) | {"relation": fact.relation} for fact in changed]
    return {
        f"edition-{world.edition}-changed": as_edits,
        f"edition-{world.edition}-new": questions(world, lambda words: (*words.statements, *words.questions), new),
        f"edition-{world.edition}-text": [{"text": text} for text in _some(corpus(world, seed=world.edition + 100), 4000)],
    }


def _some(stream: Iterator[str], count: int) -> list[str]:
    return [text for text, _ in zip(stream, range(count), strict=False)]


def files() -> dict[str, list[Row]]:
    """Every data file by name, as rows; `CONTENTS` says what each one is."""
    world = World.first()
    second = world.later()
    third = second.later()
    of_half_1 = [fact for fact in personal(world) if world.half(fact.subject) == 1]
    learn, ask = world.people[::2], world.people[1::2]
    rng, moods = Random(7), reviews(1400, 11)
    scenes = [{"text": texts.scene(rng)} for _ in range(500)]
    second_rows, hop_rows = second_language(world), hops(world)
    return {
        "facts": questions(world, lambda words: words.questions[:1], world.facts),
        "statements": questions(world, lambda words: words.statements[:1], world.facts),
        "wordings-h1": questions(world, lambda words: words.h1, of_half_1),
        "questions-h2": questions(world, lambda words: words.h2[1:], personal(world)),
        "statements-h2": questions(world, lambda words: words.h2[:1], personal(world)),
        "second-language": in_half(world, second_rows, 0),
        "second-language-new": in_half(world, second_rows, 1),
        "hops": in_half(world, hop_rows, 0),
        "hops-new": in_half(world, hop_rows, 1),
        "unrelated": questions(world, lambda words: words.questions[:1], about(world, world.people[:QUIET])),
        "scenes": scenes,
        "corpus": [{"text": text} for text in _some(corpus(world, seed=100), 4000)],
        "edits-20": edits(world, 20),
        "edits-100": edits(world, 100),
        "edits-1000": edits(world, EDITS),
        "mood.train": moods[400:],
        "mood.test": moods[:400],
        "judge.train": judged(moods[400:]),
        "judge.test": judged(moods[:400]),
        "topic.train": topics(world, learn, 13),
        "topic.test": topics(world, ask, 14),
        "style.train": styled(world, learn, 15),
        "style.test": styled(world, ask, 16),
        "preferences.train": preferences(world, learn, 17),
        "preferences.test": preferences(world, ask, 18),
        **later(second, world),
        **later(third, second),
    }


def write(folder: Path) -> dict[str, Path]:
    """Write every data file as JSON Lines into `folder`; return their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in files().items():
        paths[name] = folder / f"{name}.jsonl"
        write_bytes(paths[name], "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_bytes(folder / "README.md", _readme().encode())
    return paths


def _readme() -> str:
    lines = ["# The microcosm's data", "", "An invented world, as text; one JSON object a line. `weft demo --data` writes these files.", ""]
    lines += ["| file (.jsonl) | what it holds |", "|---|---|", *(f"| {name} | {what} |" for name, what in CONTENTS.items())]
    return "\n".join([*lines, "", "`first` and `second` are the bases: checkpoints that know the first and the second edition of the world.", ""])
