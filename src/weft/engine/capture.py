"""Capture: what linear modules are given and the gradients of what they give, at chosen tokens, with as little graph as that takes.

    found = capture(model, batch, {"up": model.model.layers[3].mlp.up_proj}, rows, loss=lambda logits: ...)
    found["up"].inputs, found["up"].grads            # (N, d_in), (N, d_out)

No gradient of a weight is made, and no graph below the lowest of the modules: nothing requires a gradient but their outputs.
Without a loss there is no graph at all, and the forward ends where the last module has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError, UsageError, WeftError


@dataclass(frozen=True)
class Captured:
    """Of one module: its inputs (N x d_in) and, with a loss, the loss's gradient with respect to its outputs (N x d_out).

    float32 and without a graph, on the module's device; row k belongs to the k-th true entry of `rows`, row by row.
    """

    inputs: torch.Tensor
    grads: torch.Tensor | None


class _Enough(Exception):
    """Ends a forward of which nothing more is wanted."""


def capture(
    model: nn.Module,
    batch: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    rows: torch.Tensor,
    *,
    loss: Callable[[torch.Tensor], torch.Tensor] | None = None,
    whole: bool = False,
) -> dict[str, Captured]:
    """What each of `modules` is given at `rows` when the model runs on `batch`, and what its outputs mean for `loss`.

    batch:   the model's keyword inputs, as `weft.engine.spans.batch` makes them
    modules: modules that turn (B, L, d_in) into (B, L, d_out), or the same with B and L in one axis; each must run exactly once
    rows:    (B, L) booleans: the tokens that are wanted
    loss:    makes one number of the model's logits. Gradients are of that number, so a sum over answers does not depend on
             how they are put into batches, a mean does
    whole:   without a loss, run the forward to its end all the same, so that a module that runs again further up is noticed

    The model stays as it is: in train or eval mode, `requires_grad` of its parameters, their `.grad`. Deltas on it take part.

    UsageError without modules or rows that are booleans (B, L); InputError if a module does not run, runs twice, or is given something
    else; WeftError if the loss is not one finite number that depends on every module.
    """
    if not modules:
        raise UsageError("no modules to capture")
    if rows.dtype != torch.bool or rows.ndim != 2:
        raise UsageError(f"rows must be booleans (batch x tokens), got {rows.dtype} {list(rows.shape)}")
    given: dict[str, torch.Tensor] = {}
    gave: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
            if name in given:
                raise InputError(f"{name} ran twice in one forward; it is not clear which of its inputs is meant", hint="choose modules that are not shared")
            x = args[0] if args else next(iter(kwargs.values()), None)
            given[name] = _picked(x, rows, f"{name} was given")
            if loss is None:
                if len(given) == len(modules) and not whole:
                    raise _Enough
                return None
            _require_tokens(y, rows, f"{name} gave")
            gave[name] = y if y.requires_grad else y.detach().requires_grad_()
            return gave[name].clone()  # what follows may write into it

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_hook(watch(name), with_kwargs=True))
        if loss is None:
            _forward(model, batch)
            value = None
        else:
            stack.enter_context(_frozen(model))
            stack.enter_context(torch.enable_grad())
            made = model(**batch)
            value = loss(made if isinstance(made, torch.Tensor) else made.logits)
    missing = [name for name in modules if name not in given]
    if missing:
        raise InputError(f"{len(missing)} of {len(modules)} modules did not run: {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}")
    if value is None:
        return {name: Captured(given[name], None) for name in modules}
    grads = _gradients(value, gave)
    return {name: Captured(given[name], _picked(grads[name], rows, f"the gradient of {name} is")) for name in modules}


def outputs(model: nn.Module, batch: Mapping[str, Any], module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """What `module` gives at `rows` when the model runs on `batch`: (N, d), float32, without a graph.

    The first of several, for a block that gives a tuple. The forward ends there. InputError if the module does not run, or does not give
    one row for each token.
    """
    found: list[torch.Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        if isinstance(y, Mapping):
            y = next(iter(y.values()), None)
        elif isinstance(y, tuple | list) and y:
            y = y[0]
        found.append(_picked(y, rows, f"{type(module).__name__} gave"))
        raise _Enough

    with module.register_forward_hook(hook):
        _forward(model, batch)
    if not found:
        raise InputError(f"{type(module).__name__} did not run in the model's forward", hint="give a module of this very model")
    return found[0]


def _forward(model: nn.Module, batch: Mapping[str, Any]) -> None:
    with torch.no_grad(), suppress(_Enough):
        model(**batch)


def _gradients(value: torch.Tensor, of: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if value.numel() != 1 or not bool(value.isfinite().all()):
        got = f"the shape {list(value.shape)}" if value.numel() != 1 else str(value.item())
        raise WeftError(f"the loss must be one finite number, got {got}", hint="float32 or bfloat16 if the model runs in float16")
    found = torch.autograd.grad(value, list(of.values()), allow_unused=True) if value.requires_grad else [None] * len(of)
    grads = {name: grad for name, grad in zip(of, found, strict=True) if grad is not None}
    unused = [name for name in of if name not in grads]
    if unused:
        raise WeftError(f"the loss does not depend on {', '.join(unused[:8])}{', ...' if len(unused) > 8 else ''}")
    return grads


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient and no block is run again for its own: both as before afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Checkpointed blocks would run once more in the backward pass, hooks included.
    repeated = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for module in repeated:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in repeated:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _require_tokens(x: Any, rows: torch.Tensor, what: str) -> None:
    batch, length = rows.shape
    if not isinstance(x, torch.Tensor) or tuple(x.shape[:-1]) not in ((batch, length), (batch * length,)):
        got = f"{list(x.shape)}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        raise InputError(f"{what} {got}; expected [{batch}, {length}, d], one row for each token of the batch")


def _picked(x: Any, rows: torch.Tensor, what: str) -> torch.Tensor:
    """The rows of activations (B, L, d) or (B L, d), in float32."""
    _require_tokens(x, rows, what)
    picked: torch.Tensor = x.detach().reshape(-1, x.shape[-1])[rows.reshape(-1).to(x.device)]
    return picked.float()
