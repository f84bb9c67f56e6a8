"""Data for training: reading rows, their hash, the order of batches, padding and packing.

A row is a JSON object (`{"text": ..., "label": ...}`, ...). An example is what an objective makes of it: token ids and
labels as lists. Everything that is random is a function of a seed and a position, never of a generator's state, so a
run can be continued anywhere: the batches of epoch 3 are `batches(..., seed, 3)`, whatever was asked for before.

Importing this module imports neither numpy nor torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import canon
from ..errors import FormatError, InputError, MissingExtra, near
from ..stored import strict_json

if TYPE_CHECKING:
    import torch

Row = Mapping[str, Any]
Example = dict[str, Any]
"""`input_ids` (a list), and `labels` (a list of the same length, or one label); packed ones have `position_ids`.
Those of rows that name one have a `task`."""

IGNORE = -100
"""The label of a token that no loss is taken from (transformers' own)."""

_MEGABATCH = 50
"""Batches that are sorted by length together: enough to leave hardly any padding, few enough to stay random."""


# --- reading


def read_rows(source: Any) -> list[Row]:
    """The rows of a JSON Lines file, a JSON file with one list, a Parquet file, a `datasets` dataset or any iterable of mappings.

    Several paths in a list are read one after the other. Raises InputError (nothing there, no rows) or FormatError (with
    file and line); MissingExtra for Parquet without pyarrow.
    """
    rows: list[Row] = []
    if isinstance(source, str | Path):
        rows = _read_file(Path(source))
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        for number, item in enumerate(source):
            if isinstance(item, str | Path):
                rows += _read_file(Path(item))
            elif isinstance(item, Mapping):
                rows.append(item)
            else:
                raise InputError(f"row {number} of the data is a {type(item).__name__}; expected a mapping such as {{'text': ...}}")
    else:
        raise InputError(f"data must be a path or rows, got a {type(source).__name__}", hint="train.jsonl, or a list of {'text': ...}")
    if not rows:
        raise InputError(f"{source if isinstance(source, str | Path) else 'the data'}: no rows")
    return rows


def _read_file(path: Path) -> list[Row]:
    if path.is_dir() or not path.exists():
        raise InputError(f"{path}: {'it is a folder; expected a file' if path.is_dir() else 'there is no such file'}")
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError:
            raise MissingExtra("pyarrow", "data", "reading Parquet") from None
        try:
            return list(parquet.read_table(path).to_pylist())
        except (OSError, ValueError) as error:
            raise FormatError(f"{path}: not a Parquet file that can be read: {error}") from error
    if path.suffix not in (".jsonl", ".ndjson", ".json"):
        raise InputError(f"{path}: expected a .jsonl, .json or .parquet file", hint="one JSON object a line")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if path.suffix == ".json" and data.lstrip()[:1] == b"[":
        listed = [(f"{path}, item {k}", value) for k, value in enumerate(strict_json(data, str(path)))]
    else:  # only \n ends a line: text may hold other line separators
        lines = ((f"{path}, line {k}", line) for k, line in enumerate(data.split(b"\n"), 1) if line.strip())
        listed = [(where, strict_json(line, where)) for where, line in lines]
    for where, value in listed:
        if not isinstance(value, dict):
            raise FormatError(f"{where}: expected a JSON object, got {json.dumps(value)[:60]}")
    return [value for _, value in listed]


def shuffled(count: int, seed: int) -> list[int]:
    """0..count-1 in an order that the seed alone decides: for keeping some rows out of a training."""
    from .. import xp

    return sorted(range(count), key=lambda k: (xp.key(seed, k), k))


def data_hash(rows: Iterable[Row]) -> str:
    """sha256 (hex) of the rows: the canonical JSON of each and a newline, in order."""
    digest = hashlib.sha256()
    for number, row in enumerate(rows):
        try:
            digest.update(canon.dumps(dict(row)) + b"\n")
        except ValueError as error:
            raise InputError(f"row {number} of the data is not plain JSON: {error}") from None
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 (hex) of what a tokenizer does: its vocabulary and rules, special tokens and chat template, not its call settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if backend is not None:
        rules = json.loads(backend.to_str())
        for setting in ("truncation", "padding"):  # left there by the last call
            rules.pop(setting, None)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    text = json.dumps([rules, special, getattr(tokenizer, "chat_template", None)], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def field(row: Row, name: str, number: int, kind: type | tuple[type, ...] = str) -> Any:
    """One field of a row; InputError that names the row if it is missing or of another type."""
    if name not in row:
        raise InputError(f"row {number} of the data has no {name!r}{near(name, map(str, row), 'it has')}")
    if not isinstance(row[name], kind):
        wanted = "text" if kind is str else "a list" if kind is list else "text or an integer"
        raise InputError(f"row {number} of the data: {name!r} must be {wanted}, got {str(row[name])[:60]!r}")
    return row[name]


# --- order


def batches(lengths: Sequence[int], size: int, seed: int, epoch: int, *, bucket: bool = True) -> list[list[int]]:
    """The batches of one epoch: positions of examples, each once, `size` to a batch (the last of them may be smaller).

    Shuffled by (seed, epoch). With `bucket`, examples of like length share a batch: 50 batches' worth of shuffled examples are
    sorted at a time, and then the batches are shuffled.
    """
    from .. import xp
    from ..ops import Generator

    gen = Generator(xp.key(seed, epoch))
    order: list[int] = gen.permutation(len(lengths)).tolist()
    if bucket:
        span = _MEGABATCH * size
        order = [k for start in range(0, len(order), span) for k in sorted(order[start : start + span], key=lengths.__getitem__)]
    cut = [order[start : start + size] for start in range(0, len(order), size)]
    return [cut[k] for k in gen.permutation(len(cut))] if bucket else cut


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions grouped so that no group's lengths exceed `capacity` in sum: first fit, longest first. Each position once."""
    room: list[int] = []
    groups: list[list[int]] = []
    first: dict[int, int] = {}  # for each length, the first group that may still have room for it: keeps the search short
    for k in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        need = lengths[k]
        if need > capacity:
            raise ValueError(f"an example of {need} tokens does not fit into {capacity}")
        at = next((g for g in range(first.get(need, 0), len(room)) if room[g] >= need), len(room))
        if at == len(room):
            room.append(capacity)
            groups.append([])
        first[need] = at
        room[at] -= need
        groups[at].append(k)
    return groups


def packed(examples: Sequence[Example]) -> Example:
    """Several examples as one: joined, with positions that begin anew, and no loss across the seams."""
    out: Example = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        out["input_ids"] += example["input_ids"]
        out["labels"] += [IGNORE, *example["labels"][1:]]  # the first token of one would be predicted from the last of another
        out["position_ids"] += range(len(example["input_ids"]))
    return out


# --- what a tokenizer and a model allow


def most_tokens(tokenizer: Any, config: Mapping[str, Any], asked: int) -> int:
    """The most tokens an example may have: what was asked for (0: 512), or less if the tokenizer or the model take fewer."""
    known = [asked or 512, int(min(getattr(tokenizer, "model_max_length", 1 << 40), 1 << 40))]
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(positions, int):
        known.append(positions - (2 if config.get("model_type") in ("roberta", "xlm-roberta", "camembert") else 0))
    return min(known)


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's own, else its end of text, else 0. Padding is masked, so any will do."""
    for value in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if isinstance(value, int):
            return value
    return 0


def opened(tokenizer: Any, text: str) -> list[int]:
    """A text's token ids, with what the tokenizer puts in front and without the end token that some append."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == getattr(tokenizer, "eos_token_id", None) else ids


# --- batches as tensors


def task_of(row: Row) -> Example:
    """The field "task" of a row, for its example; nothing if it has none."""
    return {"task": row["task"]} if "task" in row else {}


def task_name(example: Example) -> str:
    """The task of an example; InputError if its row named none."""
    name = example.get("task")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"each row must say which task it belongs to; one has {'no field' if name is None else repr(name)[:60] + ' as'} 'task'",
            hint="{..., 'task': 'qa'}",
        )
    return name


def tasks_of(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """The input `task` of a batch: the examples' tasks as UTF-8 (batch x longest name, U8), filled up with zeros."""
    import torch

    names = [task_name(example).encode() for example in examples]
    longest = max(map(len, names))
    return {"task": torch.tensor([list(name.ljust(longest, b"\0")) for name in names], dtype=torch.uint8)}


def padded(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """A batch: `input_ids`, `attention_mask` and `labels` (batch x longest), padded on the right; single labels as a vector.

    Packed examples get `position_ids` in the mask's place: from them transformers derives that examples do not see each other.
    """
    import torch

    longest = max(len(example["input_ids"]) for example in examples)

    def rows(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([[*example[name], *[fill] * (longest - len(example[name]))] for example in examples])

    batch = {"input_ids": rows("input_ids", pad)}
    if "position_ids" in examples[0]:
        # Padding starts a sequence of its own, which nothing looks at.
        batch["position_ids"] = torch.tensor([[*e["position_ids"], *range(longest - len(e["position_ids"]))] for e in examples])
    else:
        batch["attention_mask"] = torch.tensor([[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples])
    if isinstance(examples[0]["labels"], list):
        batch["labels"] = rows("labels", IGNORE)
    else:
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
    return batch
