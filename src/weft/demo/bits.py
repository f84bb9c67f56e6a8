"""Whether a model is what it was, counted in bits."""

from __future__ import annotations

from typing import Any

from ..errors import WeftError


def back_and_forth(base: Any, first: Any, second: Any) -> int:
    """Attach two deltas, run the model, detach the lower one first; count the bits that differ from before."""
    import torch

    import weft

    model = base.model([first, second])
    before = state(model)
    tokens = torch.arange(1000, 1016).reshape(1, -1)
    weft.attach(model, [first, second], base=base)
    with torch.no_grad():
        model(input_ids=tokens)
    weft.detach(model, first)
    weft.detach(model, second)
    after = state(model)
    if before.keys() != after.keys():
        raise WeftError("detaching changed the names of the model's tensors")
    return sum(differing_bits(before[name], after[name]) for name in before if before[name] != after[name])


def state(model: Any) -> dict[str, bytes]:
    """The raw bytes of every tensor of a model."""
    from .. import xp

    return {name: xp.to_numpy(tensor).tobytes() for name, tensor in model.state_dict().items()}


def differing_bits(a: bytes, b: bytes) -> int:
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).bit_count() if len(a) == len(b) else 8 * max(len(a), len(b))
