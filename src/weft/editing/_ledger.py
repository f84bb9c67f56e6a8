"""The ledger of a delta: which rows of its factors belong to which edit, and taking edits out again.

Every target of an edited delta has one `lowrank` op a part, w' = w + B A; row i of A and column i of B belong to one edit. The
ledger, canonical JSON in the blob "ledger", is the list of edits in order, each with `prompt`, `subject`, `target_new`, `id` (see
`weft.engine.edits.Edit.id`), `turn` (from 0) and `rows`, the range [lo, hi) that is its own in every op.

Reading it imports neither numpy nor torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import canon
from ..delta import BLOB, Delta
from ..errors import FormatError, InputError, UsageError, near
from ..ops.spec import OpEntry
from ..stored import Tensor, hold, strict_json

Record = dict[str, Any]

LEDGER, STATE = "ledger", "state"
_FIELDS: dict[str, type | tuple[type, ...]] = {"prompt": str, "subject": (str, type(None)), "target_new": str, "id": str, "turn": int, "rows": list}
_DIGITS = 8
"""A text of this many digits or more is the start of an id, one of fewer a number."""


def ledger(delta: Delta | str | os.PathLike[str]) -> list[Record]:
    """The edits that a delta holds, in the order of their rows; [] if it holds none. FormatError if its ledger is damaged."""
    delta = delta if isinstance(delta, Delta) else Delta.load(Path(delta))
    key = BLOB + LEDGER
    if key not in delta.tensors:
        return []
    where = f"the ledger of {delta.path or 'the delta'}"
    records = strict_json(b"".join(bytes(block) for block in delta.tensors[key].blocks()), where)
    end = 0
    for number, record in enumerate(records if isinstance(records, list) else [None]):
        if not isinstance(record, dict) or record.keys() != _FIELDS.keys() or not all(isinstance(record[name], kind) for name, kind in _FIELDS.items()):
            raise FormatError(f"{where}: edit {number} is not an object with {', '.join(_FIELDS)}")
        lo, hi = record["rows"] if len(record["rows"]) == 2 else (None, None)
        if type(lo) is not int or type(hi) is not int or lo != end or hi <= lo:
            raise FormatError(f"{where}: the rows of edit {number} must begin at {end}, got {record['rows']}")
        end = hi
    return list(records)


def written(records: Sequence[Record]) -> bytes:
    """The bytes of a ledger."""
    return canon.dumps(list(records))


def undo(delta: Delta | str | os.PathLike[str], which: int | str | Sequence[int | str], *, out: str | Path | None = None) -> Delta:
    """The delta without some of its edits: their rows and columns are dropped, all others keep their bits.

    which: an edit's number in the ledger (from 0; also as text of up to 7 digits), its id or the beginning of it, or its subject,
           which takes every edit of that subject; or several of these
    out:   a .safetensors file to write the result to

    What a method keeps for later turns stays as it is: the statistics have seen the edit. The recipe names what was dropped, the
    parent is the delta. The result is another delta: what was made over the first (`on=`) does not go on top of it.

    UsageError for what is not in the ledger, and for all edits at once; InputError for a delta without edits.
    """
    delta = delta if isinstance(delta, Delta) else Delta.load(Path(delta))
    if out is not None and Path(out).suffix != ".safetensors":
        raise UsageError(f"{out}: a delta is one .safetensors file", hint=f"out={Path(out).with_suffix('.safetensors')}")
    records = ledger(delta)
    if not records:
        raise InputError(f"{delta.path or 'the delta'} holds no edits that could be undone", hint="weft show DELTA says how it was made")
    gone = _chosen(records, [which] if isinstance(which, int | str) else list(which))
    if len(gone) == len(records):
        raise UsageError(f"these are all {len(records)} edits of the delta; nothing would be left", hint="leave the delta out: that undoes all of it")
    tensors = dict(delta.tensors)
    for target, entry in delta.entries.items():
        for op in entry.ops:
            tensors |= _without(tensors, target, op, records, gone)
    kept, end = [], 0
    for number, record in enumerate(records):
        if number not in gone:
            lo, hi = record["rows"]
            kept.append({**record, "rows": [end, end + hi - lo]})
            end += hi - lo
    tensors[BLOB + LEDGER] = _bytes(written(kept))
    recipe = {"verb": "undo", "method": delta.recipe.get("method"), "config": {"edits": [records[number]["id"] for number in sorted(gone)]}}
    left = replace(delta, tensors=tensors, parents=(delta.id,), recipe=recipe, notes={}, path=None)
    left.validate()
    if out is not None:
        left.save(out)
        left = replace(left, path=Path(out))
    return left


def _chosen(records: Sequence[Record], which: Sequence[int | str]) -> set[int]:
    """The numbers that `which` speaks of; UsageError with everything that fits nothing, or several ids."""
    found: set[int] = set()
    wrong = [] if which else ["nothing was chosen"]
    for each in which:
        hits, why = _hits(records, each)
        found.update(hits)
        if why:
            wrong.append(why)
    if wrong:
        raise UsageError("undo: no such edit", problems=wrong, hint="its number in the ledger, the beginning of its id, or its subject")
    return found


def _hits(records: Sequence[Record], each: int | str) -> tuple[list[int], str]:
    text = str(each)
    by_subject = [number for number, record in enumerate(records) if record["subject"] == each]
    if by_subject:
        return by_subject, ""
    if isinstance(each, int) or (re.fullmatch(r"-?[0-9]+", text) and len(text) < _DIGITS):
        number = int(text)
        return ([number], "") if 0 <= number < len(records) else ([], f"{text}: the ledger has edits 0 to {len(records) - 1}")
    by_id = [number for number, record in enumerate(records) if len(text) >= 4 and record["id"].startswith(text)]
    if len(by_id) > 1:
        return [], f"{text!r} is the beginning of {len(by_id)} ids"
    subjects = {record["subject"] for record in records} - {None}
    return by_id, "" if by_id else f"{text!r} is neither an id nor a subject{near(text, subjects, 'the subjects are')}"


def _without(tensors: dict[str, Tensor], target: str, op: OpEntry, records: Sequence[Record], gone: set[int]) -> dict[str, Tensor]:
    """The two factors of an op without the rows of some edits."""
    import numpy as np

    refs = {name: op.t[name] for name in ("A", "B") if name in op.t}
    rank = records[-1]["rows"][1]
    if op.op != "lowrank" or set(op.t) != {"A", "B"} or any(r.take or r.shape for r in refs.values()) or tensors[refs["A"].key].shape[0] != rank:
        raise InputError(
            f"{target}: the op {op.op} does not hold the {rank} rows that the ledger speaks of",
            hint="undo the edit in the delta that `weft edit` made, before adding or merging",
        )
    keep = np.concatenate([np.arange(*record["rows"]) for number, record in enumerate(records) if number not in gone])
    take: dict[str, Callable[[Any], Any]] = {"A": lambda a: a[keep], "B": lambda b: b[:, keep]}
    return {ref.key: hold(np.ascontiguousarray(take[name](tensors[ref.key].read()))) for name, ref in refs.items()}


def _bytes(data: bytes) -> Tensor:
    import numpy as np

    return hold(np.frombuffer(data, np.uint8))
