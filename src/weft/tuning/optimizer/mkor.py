"""mkor: momentum on gradients that are preconditioned by a Kronecker product, whose factors' inverses follow by rank-1 updates.

Mozaffari, Li, Zhang and Mehri Dehnavi 2023, arXiv 2306.01685. For a linear layer y = W x (x with a 1 at its end where the bias is trained too), with
a the mean of its inputs over a batch and g the mean gradient of its outputs, each counted per example, L and R the factors:

    L <- gamma L + (1 - gamma) g g^T,    R <- gamma R + (1 - gamma) a a^T          both from the identity, every `every` steps
    D = L^-1 G R^-1,    G' = D ||G|| / ||D||,    then SGD with momentum on G'

L and R are not formed: with M = L^-1 and s = M g, Sherman and Morrison's formula gives in quadratic time

    M <- (M - (1 - gamma) s s^T / (gamma + (1 - gamma) g^T s)) / gamma

Stabiliser: where an entry of M is above `limit`, M <- (1 - blend) M + blend I instead, for this time.

Of low-rank factors, whose layer adds scale B A x, A has the inputs x and the gradients scale B^T dy, B has A x and scale dy: all from the same two
means of the layer (with dropout: those without it). So it is for the three factors of `svd`, but for the vector in the middle, and for whole
increments and new weights. All else (embeddings, norms, convolutions, transposed layers, several ops on one weight, as DoRA's) learns by
plain momentum; a warning says so if nothing else is left. Rows without a gradient, which are padding, are in no mean.

The authors' code does not decay in that way: it takes 0.95 M + 0.05 I and adds v v^T to its inverse undecayed, which bounds M by I. Here M is the inverse of
the decayed mean to rounding, and the stabiliser, theirs, bounds it. Not followed of the code: half-precision inverses (they have the dtype of the
tensor), clamping of activations and gradients at 100, padding in the means, and Adam as an alternative to SGD on G'.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import msgspec
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...attaching.live import Tensors
from ...attaching.swap import hub_of
from ...engine.loop import Part, Run, Stages
from ...methods import method
from ...ops import OpEntry
from . import Rates, groups


class MKORConfig(Rates, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of MKOR."""

    lr: Annotated[float, msgspec.Meta(description="peak learning rate, as SGD's: steps are as long as gradients", gt=0)] = 0.1
    momentum: Annotated[float, msgspec.Meta(description="how much of the last step is kept", ge=0, lt=1)] = 0.9
    gamma: Annotated[float, msgspec.Meta(description="decay of the factors", gt=0, lt=1)] = 0.95
    every: Annotated[int, msgspec.Meta(description="steps from one update of the factors to the next", ge=1)] = 10
    limit: Annotated[float, msgspec.Meta(description="largest entry of an inverse before it is drawn to the identity", gt=1)] = 2.0
    blend: Annotated[float, msgspec.Meta(description="how far it is drawn", gt=0, le=1)] = 0.1
    weight_decay: Annotated[float, msgspec.Meta(description="decay added to the gradient; vectors have none", ge=0)] = 0.0


@method(
    "optimizer",
    config=MKORConfig,
    paper="Mozaffari et al., 2023, arXiv:2306.01685",
    formula="m <- mu m + L^-1 g R^-1 ||g|| / ||L^-1 g R^-1||; p <- p - lr m",
)
def mkor(tensors: Mapping[str, nn.Parameter], cfg: MKORConfig) -> torch.optim.Optimizer:
    """Momentum with a Kronecker-factored preconditioner whose inverses are kept by rank-1 updates."""
    return MKOR(groups(tensors, cfg, decay=cfg.weight_decay), cfg)


@dataclass(eq=False)
class Layer:
    """A matrix that is trained inside a linear module: its inputs and output gradients from those of the module.

    weight: out x in. bias: the module's, if it is trained with the weight
    inputs, grads: from the module's mean input and mean output gradient to the matrix's
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    inputs: Callable[[torch.Tensor], torch.Tensor]
    grads: Callable[[torch.Tensor], torch.Tensor]


class MKOR(Stages, torch.optim.SGD):
    """See the head of this file."""

    def __init__(self, params: Sequence[dict[str, Any]], cfg: MKORConfig) -> None:
        super().__init__(params, lr=cfg.lr, momentum=cfg.momentum)
        self.cfg = cfg
        self._layers: list[tuple[nn.Module, list[Layer]]] = []
        self._means: dict[nn.Module, list[torch.Tensor]] = {}
        self._listening: list[RemovableHandle] = []
        self._parts: Sequence[Part] = ()
        self._at = -1

    def start(self, run: Run) -> None:
        self._layers = [(module, layers) for module in run.model.modules() if (layers := _layers(module, run))]
        if not self._layers:
            warnings.warn("mkor: no matrix of a linear layer is trained, so this is momentum alone", stacklevel=2)

    def batches(self, run: Run, parts: Sequence[Part]) -> None:
        """Listen to the layers, where an update is due."""
        if run.step % self.cfg.every == 0:
            self._parts, self._at, self._means = parts, -1, {}
            self._listening = [module.register_forward_hook(self._heard) for module, _ in self._layers]

    def loss(self, run: Run, batch: Any) -> None:
        """The next micro-batch begins."""
        self._at += 1

    def _heard(self, module: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> None:
        if y.requires_grad:
            y.register_hook(partial(self._came, module, args[0].detach()))  # type: ignore[no-untyped-call]

    def _came(self, module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Inputs count by their number, gradients have their part's weight already: their sum is the mean of the examples' own."""
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).float()
        rows = dy.ne(0).any(-1)
        x = x[rows].float()
        found = [x.sum(0), dy.sum(0), torch.tensor([float(len(x))], device=x.device)]
        before = self._means.get(module)
        self._means[module] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]

    def gradients(self, run: Run) -> None:
        """Update the inverses."""
        if not self._listening:
            return
        self.close(run)
        for module, layers in self._layers:
            if module not in self._means:  # an expert that saw no token
                continue
            x, dy, count = (run.summed(value) for value in self._means[module])
            x, dy = x / count.clamp_min(1), dy / run.accelerator.num_processes
            for layer in layers:
                a, g = layer.inputs(x), layer.grads(dy)
                state = self.state[layer.weight]
                state["left"] = self._follow(state.get("left"), g, layer.weight)
                state["right"] = self._follow(state.get("right"), a if layer.bias is None else torch.cat([a, a.new_ones(1)]), layer.weight)
        self._means = {}

    def _follow(self, inverse: torch.Tensor | None, v: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        eye = torch.eye(len(v), device=v.device)
        m = eye if inverse is None else inverse.float()
        if float(m.abs().max()) > self.cfg.limit:
            m = torch.lerp(m, eye, self.cfg.blend)
        else:
            m = sherman_morrison(m, v, self.cfg.gamma)
        return m.to(like.dtype)

    def close(self, run: Run) -> None:
        while self._listening:
            self._listening.pop().remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Precondition the gradients in place, then SGD's step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for _, layers in self._layers:
            for layer in layers:
                self._precondition(layer)
        super().step()
        return loss

    def _precondition(self, layer: Layer) -> None:
        state, g = self.state[layer.weight], layer.weight.grad
        if g is None or "left" not in state:
            return
        joint = g.float()
        if layer.bias is not None and layer.bias.grad is not None:
            joint = torch.cat([joint, layer.bias.grad.float()[:, None]], 1)
        right = state["right"].float()[: joint.shape[1], : joint.shape[1]]
        new = state["left"].float() @ joint @ right
        length = float(new.norm())
        if length > 0:
            new = new * (joint.norm() / length)
        g.copy_(new[:, : g.shape[1]])
        if layer.bias is not None and layer.bias.grad is not None:
            layer.bias.grad.copy_(new[:, -1])


def sherman_morrison(inverse: torch.Tensor, v: torch.Tensor, gamma: float) -> torch.Tensor:
    """(gamma F + (1 - gamma) v v^T)^-1 from F^-1, which is symmetric; quadratic in its size."""
    s = inverse @ v
    return (inverse - torch.outer(s, s) * ((1 - gamma) / (gamma + (1 - gamma) * float(v @ s)))) / gamma


def _layers(module: nn.Module, run: Run) -> list[Layer]:
    """The matrices that are trained in a linear module: its own weight, and those of ops that each stand alone on its weight."""
    if not isinstance(module, nn.Linear):
        return []
    trained = {id(p) for p in run.tensors.values()}
    bias = module.bias if module.bias is not None and id(module.bias) in trained else None
    made = [Layer(_parameter(module.weight), bias, _same, _same)]
    for entry, tensors in _ops(module):
        scale = float(entry.cfg.get("scale", 1.0))
        fields = {name: _parameter(tensors.get(ref.key)) for name, ref in entry.t.items() if ref.take is None}
        if entry.op in ("lowrank", "svd") and len(fields) == len(entry.t):
            b, a = (fields[name] for name in ("BA" if entry.op == "lowrank" else "PQ"))
            made += _product(b, a, fields.get("lam"), scale)
        elif entry.op in ("dense", "assign") and "values" in fields and fields["values"].shape == module.weight.shape:
            made.append(Layer(fields["values"], None, _same, partial(torch.mul, torch.tensor(scale, device=module.weight.device))))
    return [layer for layer in made if id(layer.weight) in trained]


def _ops(module: nn.Module) -> Iterator[tuple[OpEntry, Tensors]]:
    """The ops on a module's weight through which gradients pass as through a sum."""
    found = hub_of(module)
    if found is None:
        return
    for step in found[1].plan.steps:
        if step.context.param == "weight":
            yield step.entry, step.tensors
    for piece in found[1].plan.weights.get("weight", ()):
        if piece.at is None and piece.part is None and not piece.peers and len(piece.stages) == 1 and len(piece.stages[0][0]) == 1:
            yield piece.stages[0][0][0], piece.stages[0][1]


def _product(b: nn.Parameter, a: nn.Parameter, lam: nn.Parameter | None, scale: float) -> list[Layer]:
    """The factors of scale b diag(lam) a."""

    def between(value: torch.Tensor) -> torch.Tensor:
        return value if lam is None else lam.detach().float() * value

    def up(dy: torch.Tensor) -> torch.Tensor:
        return scale * between(b.detach().float().T @ dy)

    def through(x: torch.Tensor) -> torch.Tensor:
        return between(a.detach().float() @ x)

    return [Layer(a, None, _same, up), Layer(b, None, through, partial(torch.mul, torch.tensor(scale, device=b.device)))]


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _parameter(value: Any) -> nn.Parameter:
    return value  # type: ignore[no-any-return]
