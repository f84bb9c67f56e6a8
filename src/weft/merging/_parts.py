"""A merge cut into parts for several machines, and the parts put together again: the bytes are those of the merge in one go.

Each part is a delta of its own that changes some of the tensors. Which ones follows from the sizes of all of them alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from ..delta import BLOB, Delta
from ..errors import MismatchError, UsageError
from ..stored import Tensor

Shard = tuple[int, int]
"""The number of a part, from 1, and how many parts there are."""


def require_shard(shard: Shard | None) -> None:
    """UsageError unless a shard is a possible one."""
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise UsageError(f"a shard is i/n with i from 1 to n, got {shard[0]}/{shard[1]}", hint="shard=(1, 4) (--shard 1/4)")


def part(delta: Delta, shard: Shard) -> Delta:
    """Those entries of a delta that belong to one shard; the parts have about the same number of entries of tensors."""
    number, count = shard
    total = sum(prod(entry.shape) for entry in delta.entries.values()) or 1
    entries, before = {}, 0
    for name in sorted(delta.entries):
        size = prod(delta.entries[name].shape)
        if min(count - 1, count * (2 * before + size) // (2 * total)) == number - 1:
            entries[name] = delta.entries[name]
        before += size
    used = {key for entry in entries.values() for op in entry.ops for key in op.tensor_keys()}
    tensors = {key: tensor for key, tensor in delta.tensors.items() if key in used or key.startswith(BLOB)}
    tied = tuple(group for group in delta.tied if entries.keys() & set(group))
    return replace(delta, entries=entries, tensors=tensors, tied=tied, recipe={**delta.recipe, "shard": {"number": number, "of": count}})


def joined(parts: Sequence[Delta]) -> Delta:
    """The merge that `parts` are all the parts of, in any order. MismatchError, with every reason, if they are not."""
    problems = [f"{label(each)} is no part of a merge (it was not made with shard)" for each in parts if "shard" not in each.recipe]
    if not problems:
        problems = [*_strangers(parts), *_missing(parts)]
    if problems:
        raise MismatchError("these are not all the parts of one merge; nothing was written" + "".join(f"\n  - {line}" for line in problems))
    entries = {name: entry for each in parts for name, entry in each.entries.items()}
    tensors: dict[str, Tensor] = {key: tensor for each in parts for key, tensor in each.tensors.items()}
    return replace(
        parts[0],
        entries={name: entries[name] for name in sorted(entries)},
        tensors=tensors,
        tied=tuple(sorted({group for each in parts for group in each.tied})),
        recipe=_common(parts[0]),
        notes={},
        path=None,
    )


def label(delta: Delta) -> str:
    return str(delta.path) if delta.path else f"the part {delta.recipe.get('shard')}"


def _common(delta: Delta) -> dict[str, Any]:
    return {name: value for name, value in delta.recipe.items() if name != "shard"}


def _strangers(parts: Sequence[Delta]) -> list[str]:
    """Parts of another merge than the first's."""

    def same(each: Delta) -> Mapping[str, Any]:
        return {"base": each.base, "recipe": _common(each), "of": each.recipe["shard"]["of"], "over": each.over, "parents": each.parents, "config": each.config}

    first = same(parts[0])
    out = []
    for each in parts[1:]:
        mine = same(each)
        odd = [name for name in first if first[name] != mine[name]]
        if odd:
            out.append(f"{label(each)} is of another merge than {label(parts[0])}: they differ in {', '.join(odd)}")
    return out


def _missing(parts: Sequence[Delta]) -> list[str]:
    numbers = [each.recipe["shard"]["number"] for each in parts]
    count = parts[0].recipe["shard"]["of"]
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    absent = sorted(set(range(1, count + 1)) - set(numbers))
    return [f"part {number} of {count} is given twice" for number in twice] + [f"part {number} of {count} is missing" for number in absent]
