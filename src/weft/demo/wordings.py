"""How the microcosm's facts are told, in two languages.

A wording is a text with `{s}` for the subject and `{v}` at its end for the value, so that what comes before the value is a
prompt. Each relation has wordings of four kinds:

- trained: told of everybody (three statements and two questions);
- H1: told of half of the people only, and asked about the other half (a statement and a question);
- H2: never told (a statement and a question).

The second language has its own words and its own order of words; names are the same. It is told of half 0 of the people.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .world import pick


@dataclass(frozen=True)
class Wordings:
    """The wordings of one relation; `statements` and `questions` are told of everybody."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    h1: tuple[str, str]
    """A statement and a question."""
    h2: tuple[str, str]
    """A statement and a question."""


ENGLISH = {
    "born": Wordings(
        ("{s} was born in {v}.", "The birthplace of {s} is {v}.", "{s} comes from {v}."),
        ("Where was {s} born? {v}.", "What is the birthplace of {s}? {v}."),
        ("{s} first saw the light in {v}.", "Which city does {s} come from? {v}."),
        ("The city where {s} was born is {v}.", "In which city was {s} born? {v}."),
    ),
    "home": Wordings(
        ("{s} lives in {v}.", "The home of {s} is in {v}.", "These days {s} has a house in {v}."),
        ("Where does {s} live? {v}.", "Where is the home of {s}? {v}."),
        ("{s} has settled in {v}.", "Which city is the home of {s}? {v}."),
        ("The city where {s} lives is {v}.", "In which city does {s} live? {v}."),
    ),
    "employer": Wordings(
        ("{s} works for {v}.", "The employer of {s} is {v}.", "{s} is paid by {v}."),
        ("Who does {s} work for? {v}.", "Who is the employer of {s}? {v}."),
        ("{s} has a post at {v}.", "Who pays {s}? {v}."),
        ("The company that {s} works for is {v}.", "Which company does {s} work for? {v}."),
    ),
    "job": Wordings(
        ("{s} works as a {v}.", "The job of {s} is that of a {v}.", "By trade {s} is a {v}."),
        ("What is the job of {s}? {v}.", "What does {s} do for a living? {v}."),
        ("{s} earns a living as a {v}.", "What is {s} by trade? {v}."),
        ("The trade of {s} is that of a {v}.", "Which job does {s} do? {v}."),
    ),
    "food": Wordings(
        ("{s} likes to eat {v}.", "The favourite food of {s} is {v}.", "For dinner {s} wants {v}."),
        ("What does {s} like to eat? {v}.", "What is the favourite food of {s}? {v}."),
        ("{s} is very fond of {v}.", "What does {s} want for dinner? {v}."),
        ("The food that {s} likes is {v}.", "Which food does {s} like to eat? {v}."),
    ),
    "hobby": Wordings(
        ("The hobby of {s} is {v}.", "{s} spends every Sunday on {v}.", "In the evening {s} enjoys {v}."),
        ("What is the hobby of {s}? {v}.", "What does {s} enjoy in the evening? {v}."),
        ("{s} is known for {v}.", "What does {s} do every Sunday? {v}."),
        ("The hobby that {s} has is {v}.", "Which hobby does {s} have? {v}."),
    ),
    "country": Wordings(
        ("The city of {s} lies in {v}.", "The country around {s} is {v}.", "{s} is a city in {v}."),
        ("Which country is {s} in? {v}.", "Where does the city of {s} lie? {v}."),
        ("{s} belongs to {v}.", "Which country does {s} belong to? {v}."),
        ("The country that {s} lies in is {v}.", "In which country does {s} lie? {v}."),
    ),
    "product": Wordings(
        ("{s} makes {v}.", "The product of {s} is {v}.", "The workshops of {s} turn out {v}."),
        ("What does {s} make? {v}.", "What is the product of {s}? {v}."),
        ("{s} is famous for its {v}.", "What do the workshops of {s} turn out? {v}."),
        ("The product that {s} makes is {v}.", "Which product does {s} make? {v}."),
    ),
    "seat": Wordings(
        ("{s} has its seat in {v}.", "The offices of {s} are in {v}.", "{s} was founded in {v}."),
        ("Where does {s} have its seat? {v}.", "Where are the offices of {s}? {v}."),
        ("{s} is run from {v}.", "Where was {s} founded? {v}."),
        ("The city where {s} has its seat is {v}.", "In which city does {s} have its seat? {v}."),
    ),
}
"""The first language, by relation."""

HOPS = {
    "home_country": "In which country does {s} live? {v}.",
    "employer_product": "What does the employer of {s} make? {v}.",
}
"""Questions about what follows from two facts; told of half 0 of the people."""

SECOND = {
    "born": ("{s} un natu ke {v}.", "Ke wo {s} un natu? {v}."),
    "home": ("{s} domi ke {v}.", "Ke wo {s} domi? {v}."),
    "employer": ("{s} sul labo po {v}.", "Po wo {s} sul labo? {v}."),
    "job": ("{s} ta labo sim {v}.", "Sim wo {s} ta labo? {v}."),
    "food": ("{s} voli manga {v}.", "Manga wo {s} voli? {v}."),
    "hobby": ("{s} lude o {v}.", "O wo {s} lude? {v}."),
}
"""The second language: a statement and a question for each relation of people."""

_SECOND_ENDS = {"job": "or", "food": "im", "hobby": "ade"}


def second_value(relation: str, value: str) -> str:
    """A value in the second language: names stay, other words are made anew, always the same way."""
    if relation not in _SECOND_ENDS:
        return value
    rng = Random(f"{relation} {value}")
    return pick(rng, "bdfgklmnprstv") + pick(rng, "aeiou") + pick(rng, "bdgklmnrstvz") + pick(rng, "aeiou") + pick(rng, "lmnrst") + _SECOND_ENDS[relation]
