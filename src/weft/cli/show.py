"""`weft show`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import click

from ..delta import BLOB, Delta, Entry
from ..editing import ledger
from ..ops.spec import OpEntry
from ..stored import Tensor
from .app import argument, declare
from .output import Output, amount, table

_SHOWN = 20
"""Edits that are listed for people."""

_RANKS = (("A", 0), ("lam", -1))
"""Fields, and the axis of each, that say an op's rank."""


@declare("show")
@argument("delta", metavar="DELTA", type=click.Path(path_type=Path))
def command(out: Output, delta: Path) -> None:
    """What a delta is: its id, base, recipe, parents, size, and what it changes.

    \b
    Example:
      weft show trec.safetensors
      weft show trec.safetensors --format json
    """
    found = Delta.load(delta)
    manifest = found.manifest()
    size = delta.stat().st_size
    edits = ledger(found)
    record = {"path": str(delta), "id": found.id, "bytes": size, **manifest, "notes": dict(found.notes), **({"edits": edits} if edits else {})}
    out.result(record, _page(found, size, edits), found.id)
    out.next("weft verify {} --base BASE", delta)


def _page(delta: Delta, size: int, edits: Sequence[Mapping[str, Any]]) -> str:
    recipe = dict(delta.recipe)
    made = " ".join(str(recipe.pop(key)) for key in ("verb", "method") if key in recipe) or "unknown"
    entries = delta.entries
    facts = [
        ("id", delta.id),
        ("base", delta.base or "none; it is known by its tensors"),
        ("made by", made),
        *((f"  {key}", _short(value)) for key, value in sorted(recipe.items())),
        ("parents", ", ".join(delta.parents) or "none"),
        ("over", ", ".join(delta.over) or "nothing: it stands on the base"),
        *([("edits", f"{len(edits)}, made {_turns(edits)}; weft undo takes single ones out")] if edits else []),
        ("size", f"{amount(size)} in {len(delta.tensors)} tensors"),
        *_coded(delta),
        *((("tied", ", ".join(group))) for group in delta.tied),
        *((("config", _short({key: value}))) for key, value in sorted(delta.config.items())),
        *((("blob", f"{key.removeprefix(BLOB)}, {amount(tensor.storage.nbytes)}")) for key, tensor in delta.tensors.items() if key.startswith(BLOB)),
        *((("note", _short({key: value}))) for key, value in sorted(delta.notes.items())),
        ("targets", f"{len(entries)}, {sum(_stored(delta, entry) for entry in entries.values()):,} numbers"),
    ]
    listed = f"\n  edits\n{table(_edits(edits), indent='    ')}" if edits else ""
    return f"{delta.path}\n{table(facts)}\n{table(_targets(delta), indent='    ')}{listed}"


def _coded(delta: Delta) -> list[tuple[str, str]]:
    """How many tensors are stored in each code, and what that saves."""
    found: dict[str, list[Tensor]] = {}
    for tensor in delta.tensors.values():
        if tensor.coding is not None:
            found.setdefault(tensor.coding["code"], []).append(tensor)
    sizes = {code: [sum(each) for each in zip(*((tensor.storage.nbytes, tensor.nbytes) for tensor in those), strict=True)] for code, those in found.items()}
    return [("coded", f"{len(found[code])} tensors as {code}: {amount(now)} for {amount(whole)}") for code, (now, whole) in sorted(sizes.items())]


def _edits(edits: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Number, beginning of the id, subject and what was wanted of each: what `weft undo` knows an edit by."""
    rows: list[tuple[str, ...]] = []
    for number, edit in enumerate(edits[:_SHOWN]):
        rows.append((str(number), edit["id"][:8], edit["subject"] or "", _short(f"{edit['prompt']} {edit['target_new']}")))
    if len(edits) > _SHOWN:
        rows.append(("...", "", "", f"and {len(edits) - _SHOWN:,} more (--format json)"))
    return rows


def _turns(edits: Sequence[Mapping[str, Any]]) -> str:
    turns = len({edit["turn"] for edit in edits})
    return "all at once" if turns == 1 else f"in {turns} turns"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."


def _targets(delta: Delta) -> list[tuple[str, ...]]:
    """One row for all targets whose names differ only in numbers and to which the same is done."""
    groups: dict[tuple[tuple[str, ...], str, str], list[str]] = {}
    for target, entry in delta.entries.items():
        what = "; ".join(filter(None, (_change(entry), ", ".join(_described(delta, op) for op in entry.ops))))
        alike = tuple("" if _number(part) else part for part in target.split("."))
        groups.setdefault((alike, _shape(entry), what), []).append(target)
    rows: list[tuple[str, ...]] = []
    for (_, shape, what), targets in groups.items():
        for name, members in collapsed(targets):
            numbers = sum(_stored(delta, delta.entries[target]) for target in members)
            rows.append((name, shape, what, f"x{len(members)}" if len(members) > 1 else "", f"{numbers:,}"))
    return rows


def _shape(entry: Entry) -> str:
    return f"{list(entry.shape)} {entry.dtype}" if entry.dtype else ""


def _change(entry: Entry) -> str:
    if entry.change is None:
        return ""
    return f"copy of {entry.change.source}" if entry.change.kind == "copy" else entry.change.kind


def _described(delta: Delta, op: OpEntry) -> str:
    """An op in a few words: kind, rank, config, and the part of the target that it works on."""
    if op.terms:
        return f"{op.op}({' + '.join(f'{term.scale:g} ' + ', '.join(_described(delta, inner) for inner in term.ops) for term in op.terms)})"
    words = [op.op]
    for field, axis in _RANKS:
        if field in op.t:
            ref = op.t[field]
            words.append(f"r={(ref.shape or delta.tensors[ref.key].shape)[axis]}")
            break
    words += [f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in sorted(op.cfg.items())]
    codes = {field: coding["code"] for field, ref in sorted(op.t.items()) if (coding := delta.tensors[ref.key].coding) is not None}
    if codes:
        same = len(set(codes.values())) == 1 and len(codes) == len(op.t)
        words.append("as " + (codes.popitem()[1] if same else ", ".join(f"{code} ({field})" for field, code in codes.items())))
    if op.at is not None:
        words.append(f"at {json.dumps(op.at.json())}")
    if op.group is not None:
        words.append(f"group {op.group}")
    return " ".join(words)


def _stored(delta: Delta, entry: Entry) -> int:
    """Numbers in the file that belong to this target (shared ones count where they are used)."""
    return sum(prod(delta.tensors[key].shape) for key in {key for op in entry.ops for key in op.tensor_keys()})


def collapsed(targets: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Names for sets of targets that differ only in numbers: `layer.{0..5}.weight`, and the targets that it stands for.

    A name stands for every combination of its numbers, so targets that are no full grid are split along the first.
    """
    numbers = {target: tuple(int(part) for part in target.split(".") if _number(part)) for target in targets}
    found: list[tuple[str, list[str]]] = []
    for group in _grids(sorted(targets, key=numbers.__getitem__), numbers):
        ranges = iter([_range(sorted(set(column))) for column in zip(*(numbers[target] for target in group), strict=True)])
        found.append((".".join(next(ranges) if _number(part) else part for part in group[0].split(".")), group))
    return found


def _number(part: str) -> bool:
    return part.isascii() and part.isdigit() and str(int(part)) == part


def _grids(targets: list[str], numbers: dict[str, tuple[int, ...]]) -> Iterable[list[str]]:
    columns = list(zip(*(numbers[target] for target in targets), strict=True))
    if prod(len(set(column)) for column in columns) == len(targets):
        return [targets]
    apart: dict[tuple[int, ...], list[str]] = {}
    for target in targets:
        apart.setdefault(numbers[target][1:], []).append(target)
    return apart.values()


def _range(numbers: Sequence[int]) -> str:
    """Numbers as text: `3`, `{0..5}`, `{0..2,7}`."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs) + "}"
