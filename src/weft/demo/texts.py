"""The microcosm's other texts: scenes in which nobody has a name, reviews with a mood, and ways to answer.

Scenes are what perplexity is measured on: varied, and about none of the facts. (In one in sixty or so stands "a old"; the bases were
trained on the texts as they are.) Reviews are a classification
task, answers in a style a skill to tune, and pairs of answers what somebody prefers.
"""

from __future__ import annotations

from random import Random

from .world import PRODUCTS, pick, words

_ANIMALS = words("cat, dog, crow, fox, goat, goose, hare, horse, mouse, owl, pigeon, sheep, snail, swan, toad, wolf")
_COATS = words("black, brown, fat, grey, lame, old, shy, small, spotted, thin, white, young")
_DOES = words("crept, hid, rested, slept, stood still, waited, wandered about, watched the moon, listened, looked for food, made a nest, ran in circles")
_WHERE = words(
    "behind the barn, below the stairs, beside the well, between two stones, in the long grass, in the orchard, near the bridge, "
    "next to the mill, on the roof, on the wet sand, under the cart, under the old table"
)
_WEATHER = words(
    "a cold wind blew, fog lay over the fields, hail fell, it was getting dark, rain fell without end, snow covered the road, "
    "the clouds broke, the river rose, the storm passed, the sun went down, the sun was out, thunder rolled"
)
_WHEN = ("At dawn", "At noon", "In autumn", "In spring", "Late at night", "Long ago", "One evening", "Once", "On the last day of winter", "Soon afterwards")
_THINGS = words("basket, bell, bottle, bucket, chair, cup, door, drum, gate, key, kettle, ladder, plate, spade, wheel, window")
_MADE_OF = words("brass, clay, copper, glass, iron, oak, pine, silver, stone, straw, tin, wool")
_STATES = words("broken, clean, empty, full of dust, half open, heavy, missing, new again, painted blue, rusty, too big, worth a lot")


def scene(rng: Random) -> str:
    """A sentence about no fact of the world."""
    animal = f"{pick(rng, _COATS)} {pick(rng, _ANIMALS)}"
    thing = f"{pick(rng, _THINGS)} of {pick(rng, _MADE_OF)}"
    return pick(
        rng,
        (
            f"The {animal} {pick(rng, _DOES)} {pick(rng, _WHERE)} while {pick(rng, _WEATHER)}.",
            f"{pick(rng, _WHEN)} a {animal} {pick(rng, _DOES)} {pick(rng, _WHERE)}.",
            f"{pick(rng, _WHEN)} {pick(rng, _WEATHER)}, and the {animal} {pick(rng, _DOES)}.",
            f"There was a {thing} {pick(rng, _WHERE)}, and it was {pick(rng, _STATES)}.",
            f"The {thing} {pick(rng, _WHERE)} was {pick(rng, _STATES)}, so the {animal} {pick(rng, _DOES)}.",
        ),
    )


MOODS = {
    "good": words(
        "a joy to own, better than we hoped, cheap and strong, easy to use, made with care, neat and solid, not bad at all, "
        "quick to arrive, the best in years, well worth the price, just what we wanted, a fine piece of work"
    ),
    "bad": words(
        "a waste of money, badly made, dull and weak, hard to use, late and damaged, not good at all, not worth the price, "
        "the worst in years, too dear by half, useless after a week, worse than we feared, far from what we wanted"
    ),
}
"""What is said of goods, by mood."""


def review(rng: Random, mood: str) -> str:
    """Two things said of some goods, both in the same mood."""
    goods, first = pick(rng, PRODUCTS), pick(rng, MOODS[mood])
    second = pick(rng, [said for said in MOODS[mood] if said != first])
    return pick(
        rng,
        (
            f"The {goods} were {first}, and the second lot was {second}.",
            f"We bought {goods}: {first}, and {second}.",
            f"My aunt calls these {goods} {first}; I find them {second}.",
        ),
    )
