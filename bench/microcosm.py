"""What the microcosm's bases know of their worlds: the share of prompts that a base goes on from with the whole right answer.

    python bench/microcosm.py [FIRST SECOND]     the table of docs/microcosm.md, for the bases in the package or others

An answer counts if each of its tokens, the full stop included, is the most likely one after those before: what greedy generation would write.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import weft
from weft.demo import edition, microcosm
from weft.demo.world import World


def questions(world: World) -> dict[str, list[dict[str, Any]]]:
    """Rows by what they ask for."""
    people = microcosm.personal(world)
    asked = [fact for fact in people if world.half(fact.subject) == 1]
    second, hops = microcosm.second_language(world), microcosm.hops(world)
    return {
        "trained wordings": microcosm.questions(world, lambda words: (words.statements[0], words.questions[0]), world.facts),
        "H1: wordings told of others": microcosm.questions(world, lambda words: words.h1, asked),
        "H2: questions never told": microcosm.questions(world, lambda words: words.h2[1:], people),
        "H2: statements never told": microcosm.questions(world, lambda words: words.h2[:1], people),
        "second language, told": microcosm.in_half(world, second, 0),
        "second language, not told": microcosm.in_half(world, second, 1),
        "two facts at once, told": microcosm.in_half(world, hops, 0),
        "two facts at once, not told": microcosm.in_half(world, hops, 1),
    }


def main() -> None:
    first = World.first()
    bases = [Path(given) for given in sys.argv[1:3]] or [edition("first"), edition("second")]
    print("| asked | rows | first edition | rows | second edition |\n|---|---|---|---|---|")
    sides = [(weft.Base.open(base), questions(world)) for base, world in zip(bases, (first, first.later()), strict=True)]
    for name in sides[0][1]:
        cells = [name]
        for base, asked in sides:
            rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in asked[name]]
            cells += [f"{len(rows):,}", f"{weft.evaluate(base, [], rows, batch_size=256)['metrics']['teacher_forced_exact']:.1%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
