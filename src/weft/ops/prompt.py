"""prompt: a soft prompt, n trained vectors in front of the embedded tokens.

Lester et al. 2021, arXiv 2104.08691. Its target is `@input/embeddings`; it cannot be folded. The op runs the model on
embeddings that are n longer, with mask, labels, token types and positions to match, and trims what comes out, so that
callers see the lengths they sent. While generating, the n vectors are prefilled once and stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import MismatchError
from .op import Config, Generator, Info, Op, Shape, Tensors, expect

_PADDING = {"attention_mask": 1, "token_type_ids": 0, "labels": -100}
"""What the n positions get in inputs that have one value for each token."""
_LONG = ("logits", "last_hidden_state")


class Prompt(Op):
    """rows (n x d): the vectors, d the width of the model's embeddings.

    Token classification and causal models see the tokens' own positions; a model that pools its first position sees the
    first vector there. Attention maps and caches keep their n extra positions.
    """

    kind = "prompt"
    fields = ("rows",)
    on = "input"
    identity_at_init = False

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        expect(t, "rows", [None, None])

    def init(self, shape: Shape, gen: Generator, *, count: int = 20) -> dict[str, Any]:
        """`shape` is (d,) or that of the embedding matrix. Normal with standard deviation 0.02."""
        return {"rows": gen.normal((count, shape[-1]), 0.02)}

    def forward(self, m: Any, x: dict[str, Any], y: Callable[..., Any], t: Tensors, cfg: Config, ctx: Any) -> Any:
        """x: the model's inputs by name; y: the function that runs the model on such inputs."""
        n = t["rows"].shape[0]
        inputs = {name: value for name, value in x.items() if value is not None}
        if ctx.phase == "decode":
            return y(**_decoding(inputs, n))
        inputs, length = _lengthened(m, inputs, t["rows"])
        as_tuple = not inputs.pop("return_dict", getattr(m.config, "return_dict", True))
        out = _trimmed(y(**inputs, return_dict=True), n, length)
        return out.to_tuple() if as_tuple else out


def _lengthened(m: Any, inputs: dict[str, Any], rows: Any) -> tuple[dict[str, Any], int]:
    """The inputs with the rows in front, and how many tokens there were."""
    import torch

    inputs = dict(inputs)
    ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
    if embeds is None:
        if ids is None:
            raise MismatchError("a soft prompt needs input_ids or inputs_embeds", hint="pass one of them by name")
        embeds = m.get_input_embeddings()(ids)
    batch, length, width = embeds.shape
    n = rows.shape[0]
    if rows.shape[1] != width:
        raise MismatchError(f"the soft prompt's rows are {rows.shape[1]} wide, the model's embeddings {width}")
    inputs["inputs_embeds"] = torch.cat([rows.to(embeds).expand(batch, n, width), embeds], 1)
    for name, value in _PADDING.items():
        old = inputs.get(name)
        if old is None or (name == "labels" and (old.is_floating_point() or old.shape[:2] != (batch, length))):
            continue  # labels of whole sequences stay as they are
        if old.dim() != 2:
            raise MismatchError(f"a soft prompt takes a 2-d {name} (batch, tokens), got {list(old.shape)}")
        inputs[name] = torch.cat([old.new_full((batch, n), value), old], 1)
    positions = inputs.get("position_ids")
    if positions is not None:
        first = torch.arange(n, dtype=positions.dtype, device=positions.device).expand(*positions.shape[:-1], n)
        inputs["position_ids"] = torch.cat([first, positions + n], -1)
    return inputs, length


def _decoding(inputs: dict[str, Any], n: int) -> dict[str, Any]:
    """The inputs of a later step: the cache holds n positions more than the caller counts."""
    import torch

    inputs = dict(inputs)
    mask = inputs.get("attention_mask")
    if mask is not None:
        if mask.dim() != 2:
            raise MismatchError(f"a soft prompt takes a 2-d attention_mask (batch, tokens), got {list(mask.shape)}", hint="use a dynamic cache")
        inputs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], n), mask], 1)
    for name in ("position_ids", "cache_position"):
        if inputs.get(name) is not None:
            inputs[name] = inputs[name] + n
    return inputs


def _trimmed(out: Any, n: int, length: int) -> Any:
    """The output without the n first positions of whatever is as long as the input."""
    for name in _LONG:
        value = out.get(name)
        if value is not None and value.dim() == 3 and value.shape[1] == n + length:
            out[name] = value[:, n:]
    if out.get("hidden_states") is not None:
        out["hidden_states"] = tuple(h[:, n:] for h in out["hidden_states"])
    return out


OP = Prompt()
