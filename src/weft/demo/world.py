"""The microcosm's world: invented people, cities and companies, and what is true of them.

    world = World.first()
    world.facts[0]             # Fact(subject='...burg', relation='country', value='...land')
    later = world.later()      # the next edition: some facts have changed, some people are new

Everything is drawn from one seed with `random.Random.random` alone, whose numbers are the same on every machine and in
every version of Python. Words are in `wordings.py`, files in `microcosm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import TypeVar

T = TypeVar("T")

SEED = 20
PEOPLE, NEW_PEOPLE, CITIES, COUNTRIES, COMPANIES = 500, 50, 40, 8, 40
CHANGED = 0.1
"""Share of the people's facts that the next edition changes."""


def words(listed: str) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(listed.split(", "))


JOBS = words(
    "baker, miller, painter, tailor, sailor, doctor, judge, farmer, mason, potter, weaver, singer, writer, teacher, barber, "
    "butcher, carpenter, glazier, gardener, fisher, hunter, jeweller, locksmith, printer, roofer, saddler, surgeon, tanner, usher, "
    "waiter"
)
FOODS = words(
    "apples, beans, bread, cabbage, carrots, cheese, cherries, dumplings, eggs, figs, garlic, honey, lentils, melons, mushrooms, "
    "noodles, olives, onions, pancakes, pears, plums, rice, soup, walnuts"
)
HOBBIES = words(
    "archery, chess, dancing, diving, drumming, fencing, hiking, juggling, knitting, painting, poetry, pottery, riding, rowing, "
    "sailing, singing, skating, sketching, swimming, wrestling"
)
PRODUCTS = words("boats, bricks, candles, carpets, clocks, gloves, lamps, mirrors, pens, ropes, sails, shoes, spoons, stoves, tiles, wagons")


@dataclass(frozen=True)
class Relation:
    """What kind of thing has it, what its values are, and whether other facts follow from it."""

    name: str
    of: str
    values: str
    free: bool = True


RELATIONS = {
    relation.name: relation
    for relation in (
        Relation("born", "person", "city"),
        Relation("home", "person", "city", free=False),  # the country somebody lives in follows from it
        Relation("employer", "person", "company", free=False),  # what somebody's company makes follows from it
        Relation("job", "person", "job"),
        Relation("food", "person", "food"),
        Relation("hobby", "person", "hobby"),
        Relation("country", "city", "country", free=False),
        Relation("product", "company", "product", free=False),
        Relation("seat", "company", "city", free=False),
    )
}
"""Every relation by name. `free`: no other fact of the world follows from one of these."""

HOPS = {"home": ("home_country", "country"), "employer": ("employer_product", "product")}
"""What follows: a person's home and its country, a person's employer and its product."""


@dataclass(frozen=True)
class Fact:
    """`value` is true of `subject`. `relation` names an entry of `RELATIONS`, or a hop."""

    subject: str
    relation: str
    value: str


@dataclass(frozen=True)
class World:
    """One edition. People, cities and companies are in the order they came to be; `truth` maps (subject, relation) to value."""

    edition: int
    people: tuple[str, ...]
    cities: tuple[str, ...]
    countries: tuple[str, ...]
    companies: tuple[str, ...]
    truth: dict[tuple[str, str], str]
    new: frozenset[str] = frozenset()
    """People who are new in this edition."""
    changed: frozenset[tuple[str, str]] = frozenset()
    """(subject, relation) whose value is another one than in the edition before."""

    @classmethod
    def first(cls, seed: int = SEED) -> World:
        """The first edition."""
        rng = Random(seed)
        taken: set[str] = set()
        cities = _names(rng, CITIES, taken, 1, ("burg", "ford", "haven", "mouth", "stad", "ton", "wick"))
        countries = _names(rng, COUNTRIES, taken, 2, ("land", "nia", "stan"))
        companies = tuple(f"{name} {pick(rng, ('Works', 'Mills', 'Brothers', 'Union'))}" for name in _names(rng, COMPANIES, taken, 2, ("x", "m", "c")))
        world = cls(1, (), cities, countries, companies, {})
        truth = {(city, "country"): pick(rng, countries) for city in cities}
        for company in companies:
            truth[company, "product"] = pick(rng, PRODUCTS)
            truth[company, "seat"] = pick(rng, cities)
        people = _people(rng, PEOPLE, taken)
        truth |= {(person, name): pick(rng, world.values(name)) for person in people for name in PERSONAL}
        return replace(world, people=people, truth=truth)

    def later(self) -> World:
        """The next edition: `CHANGED` of the people's facts have another value, and `NEW_PEOPLE` have come."""
        rng = Random(SEED + 1000 * self.edition)
        taken = {word for name in (*self.people, *self.cities, *self.companies, *self.countries) for word in name.split()}
        new = _people(rng, NEW_PEOPLE, taken)
        truth, changed = dict(self.truth), set()
        for person in self.people:
            for name in PERSONAL:
                if rng.random() < CHANGED:
                    truth[person, name] = other(rng, self.values(name), truth[person, name])
                    changed.add((person, name))
        truth |= {(person, name): pick(rng, self.values(name)) for person in new for name in PERSONAL}
        return replace(self, edition=self.edition + 1, people=self.people + new, truth=truth, new=frozenset(new), changed=frozenset(changed))

    def values(self, relation: str) -> tuple[str, ...]:
        """Every value that a relation can have."""
        pools = {"city": self.cities, "company": self.companies, "country": self.countries, "job": JOBS, "food": FOODS, "hobby": HOBBIES, "product": PRODUCTS}
        return pools[RELATIONS[relation].values]

    @cached_property
    def facts(self) -> list[Fact]:
        """What is told of people, cities and companies, in order."""
        return [Fact(subject, relation, value) for (subject, relation), value in self.truth.items()]

    @cached_property
    def hops(self) -> list[Fact]:
        """What follows from two facts: the country that a person lives in, what a person's company makes."""
        found = []
        for person in self.people:
            for first, (name, second) in HOPS.items():
                found.append(Fact(person, name, self.truth[self.truth[person, first], second]))
        return found

    def half(self, person: str) -> int:
        """0 or 1: which half of the people somebody belongs to. Some wordings are only ever told of half 0."""
        return self._numbers[person] % 2

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {person: number for number, person in enumerate(self.people)}


PERSONAL = tuple(relation.name for relation in RELATIONS.values() if relation.of == "person")

# --- drawing


def pick(rng: Random, options: Sequence[T]) -> T:
    """One of `options`."""
    return options[int(rng.random() * len(options))]


def other(rng: Random, options: Sequence[T], but: T) -> T:
    """One of `options` that is not `but`."""
    return pick(rng, [option for option in options if option != but])


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """`items` in another order."""
    keys = [rng.random() for _ in items]
    return [items[k] for k in sorted(range(len(items)), key=keys.__getitem__)]


# --- names

_STARTS = words("b, br, d, dr, f, fl, g, gr, h, j, k, kl, l, m, n, p, pr, r, s, st, t, tr, v, w, z")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_MIDDLES = words("b, d, g, k, l, ld, lm, m, mb, n, nd, nk, r, rd, rk, rt, s, sk, st, t, v, z")
_PERSON_ENDS = ("", "n", "r", "s", "ck", "ld", "th")
_FIRST_NAMES = 60


def _name(rng: Random, syllables: int, ends: Sequence[str]) -> str:
    name = pick(rng, _STARTS) + pick(rng, _VOWELS)
    for _ in range(syllables - 1):
        name += pick(rng, _MIDDLES) + pick(rng, _VOWELS)
    return (name + pick(rng, ends)).capitalize()


def _names(rng: Random, count: int, taken: set[str], syllables: int, ends: Sequence[str]) -> tuple[str, ...]:
    """New names; none of them begins like another one, so that two are never mistaken for each other."""
    found: list[str] = []
    begun = {name[:4] for name in taken}
    while len(found) < count:
        name = _name(rng, syllables, ends)
        if name[:4] not in begun:
            begun.add(name[:4])
            found.append(name)
    taken.update(found)
    return tuple(found)


def _people(rng: Random, count: int, taken: set[str]) -> tuple[str, ...]:
    """First names repeat, last names don't."""
    firsts = [_name(Random(SEED + number), 2, ("", "a", "o")) for number in range(_FIRST_NAMES)]
    lasts: list[str] = []
    while len(lasts) < count:
        name = _name(rng, 2 + (rng.random() < 0.3), _PERSON_ENDS)
        if name not in taken and name not in firsts:
            taken.add(name)
            lasts.append(name)
    return tuple(f"{pick(rng, firsts)} {last}" for last in lasts)
