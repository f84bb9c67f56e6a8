"""Vocabularies: which row of one base's token tensors is which row of another's.

Rows are matched by the token's text as the tokenizer keeps it, read from tokenizer.json; a tokenizer of another kind is asked
through transformers. Tokenizers of different families write one word in different ways ("Ġhello", "▁hello"): those do not match.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._roles import BY_TYPE, COMMON
from ..base import Base
from ..errors import InputError
from ..stored import strict_json

if TYPE_CHECKING:
    import numpy as np

_PATTERNS = tuple(f".{pattern}" for table in (COMMON, *BY_TYPE.values()) for role in ("embedding.token", "head.lm") for pattern in table.get(role, "").split())

_OTHERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files by which a folder is known to have a tokenizer that transformers may read."""


def by_token(name: str) -> bool:
    """Whether a checkpoint tensor has a row for each token, by its name: token embeddings, output heads and their biases."""
    return f".{name}".removesuffix(".weight").removesuffix(".bias").endswith(_PATTERNS)


class Vocabulary:
    """The tokens of two bases. Nothing is read before it is asked for."""

    def __init__(self, source: Base, target: Base) -> None:
        self._source, self._target = source, target

    @cached_property
    def _both(self) -> tuple[dict[str, int], dict[str, int]] | None:
        old, new = tokens(self._source), tokens(self._target)
        return None if old is None or new is None else (old, new)

    @property
    def known(self) -> bool:
        """Whether both bases have a tokenizer."""
        return self._both is not None

    @property
    def same(self) -> bool:
        """Whether each token has the same number in both. Without tokenizers nothing is known, and True is all that can be assumed."""
        return self._both is None or self._both[0] == self._both[1]

    def rows(self, old: int, new: int) -> np.ndarray[Any, Any]:
        """For each of `new` rows of the target its row in the source, of `old`; -1 where the source does not know the token."""
        import numpy as np

        found = np.full(new, -1, np.int64)
        for token, row in (self._both or ({}, {}))[1].items():
            there = (self._both or ({}, {}))[0].get(token, -1)
            if row < new and there < old:
                found[row] = there
        return found


def tokens(base: Base) -> dict[str, int] | None:
    """Every token of a base's tokenizer and its number; None if the base has no tokenizer."""
    if base.path is None:
        return None
    folder = base.path if base.path.is_dir() else base.path.parent
    file = folder / "tokenizer.json"
    listed = _listed(file) if file.is_file() else None
    if listed is None and any((folder / name).is_file() for name in _OTHERS):
        with suppress(InputError):
            listed = base.tokenizer().get_vocab()
    return listed


def _listed(file: Path) -> dict[str, int] | None:
    """The tokens in a tokenizer.json; None if its model keeps them in a way that is not known here."""
    value = strict_json(file.read_bytes(), str(file))
    model = value.get("model") if isinstance(value, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: pairs of a token and its score
        vocab = {pair[0]: number for number, pair in enumerate(vocab) if isinstance(pair, list) and pair}
    if not isinstance(vocab, dict):
        return None
    found = dict(vocab)
    for token in value.get("added_tokens") or []:
        found[token["content"]] = token["id"]
    return found if all(isinstance(number, int) for number in found.values()) else None
