"""Starts of LoRA that take their first product out of the base before training: w - s B0 A0 + s B A is what was trained.

PEFT stores only A and B. The adapter fits the original base once the product that was taken out is known: from the
adapter as it was before training, or computed again where that gives the same product.
"""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from .folder import Adapter

Array = Any

_ALL = ("pissa", "olora", "corda", "lora_ga", "loftq")
_AGAIN = {"pissa": ("linear", "conv1d"), "olora": ("linear",)}
"""Starts whose product does not depend on chance or data, and the layouts for which PEFT's own code works."""


def taken(adapter: Adapter) -> str:
    """The start (`init_lora_weights`) that took its first product out of the base, "" if none did."""
    start = str(adapter.config.get("init_lora_weights", True)).lower()
    return start if start.startswith(_ALL) else ""


def require_again(adapter: Adapter) -> None:
    """InputError, with what to do, if the adapter's start took something out that cannot be computed again."""
    start = taken(adapter)
    if not start or start in _AGAIN:
        return
    other = "give the adapter as it was before training (initial=FOLDER), or convert it where it was trained: "
    raise InputError(
        f"{adapter.path}: init_lora_weights = {start!r} changed the base before training in a way that cannot be computed again, "
        "so the adapter does not fit the original base",
        hint="save the model with the base that it was trained on, and use that as base"
        if start.startswith("loftq")
        else other + "peft_model.save_pretrained(OUT, path_initial_model_for_weight_conversion=INITIAL)",
    )


def again(start: str, layout: str, w: Array, rank: int, scale: float) -> tuple[Array, Array] | None:
    """B0 and A0 that a start took out of w (outputs x inputs); None if PEFT has no such start for the layout.

    PiSSA (Meng et al. 2024, arXiv 2404.02948): scale B0 A0 is the best rank-r part of w. OLoRA (Büyükakyüz 2024, arXiv
    2406.01775): B0 A0 is the first r columns of Q by rows of R. Either product is unique, so it does not matter whose
    decomposition it is.
    """
    import numpy as np

    if layout not in _AGAIN[start]:
        return None
    w = np.asarray(w, np.float64)
    if start == "pissa":
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        root = np.sqrt(s[:rank] / scale)
        b0, a0 = u[:, :rank] * root, root[:, None] * vt[:rank]
    else:
        q, r = np.linalg.qr(w)
        b0, a0 = q[:, :rank], r[:rank]
    return b0.astype(np.float32), a0.astype(np.float32)
