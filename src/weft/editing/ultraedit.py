"""ultraedit: one gradient, normalised over all edits so far, and one ridge solve. No training, no subjects, no statistics of text.

At each token that predicts a token of an answer, each edited matrix has an input h and a gradient g of the loss with respect to its
output. With z = [h; g], and z^ = (z - mean) / (std + eps) over all rows seen so far,

    v = -lr ||h^||^2 g^            dW = V^T (H H^T + ridge I)^-1 H        H: rows h (raw), V: rows v

(Gu et al. 2025, arXiv 2505.14679). One mean and std for each shape of matrix is shared by all matrices of that shape; a turn's rows are
taken in before the turn is normalised, and later turns go on from there ("lifelong"). The variance is the unbiased one.

The loss is the SUM of cross entropies over a turn's answer tokens, so a row's gradient depends on its own edit alone, not on what shares its
batch or how large its turn is (a mean over batches, as in the authors' code, makes both matter). The scale of g cancels in g^, up to eps.

A turn needs some dozens of rows before its statistics mean anything: a single row, normalised, is zero.

||h^||^2 is about d_in, and how large a change of an output is large differs between models, so each model wants its own lr: the authors take
1e-6 for 7 billion parameters, the microcosm wants 3e-2. Without one it is found on the first turn, which is ours and not in the paper: the
smallest on a grid of quarter decades with which `ENOUGH` of the turn's edits succeed (teacher-forced), or else that with which most do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from torch import nn

from ..engine.capture import capture
from ..engine.solve import Factors, ridge
from ..engine.spans import Spans, rows
from ..engine.statistics import Moments
from ..errors import InputError, UsageError
from ..methods import method
from ._method import EditMethod, Fact, Job, Matrix
from ._run import measured

if TYPE_CHECKING:
    Rows = dict[str, torch.Tensor]

LEAST, MOST, ENOUGH = -28, 0, 0.9
"""The grid on which lr is found, as powers of 10^(1/4), and the share of edits that are to succeed."""


class UltraEditConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of UltraEdit."""

    sites: Annotated[tuple[str, ...], msgspec.Meta(description="matrices to edit; none: those into the MLPs of the later half of the layers")] = ()
    lr: (
        Annotated[float, msgspec.Meta(description="wanted change of an output, for each squared unit of its input; none: found on the first turn", gt=0)] | None
    ) = None
    ridge: Annotated[float, msgspec.Meta(description="how much a change costs; the larger, the less is changed", gt=0)] = 1.0
    token: Annotated[Literal["answer", "all"], msgspec.Meta(description="rows: the tokens that predict the answer, or all before its end")] = "answer"
    normaliser: Annotated[Literal["lifelong", "turn"], msgspec.Meta(description="statistics over all turns so far, or of each turn alone")] = "lifelong"
    eps: Annotated[float, msgspec.Meta(description="added to each standard deviation", gt=0)] = 1e-7


@method("edit", config=UltraEditConfig, paper="Gu et al., 2025, arXiv:2505.14679", formula="dW = V^T (H H^T + ridge I)^-1 H,  v = -lr ||h^||^2 g^")
class UltraEdit(EditMethod[UltraEditConfig]):
    """Training-free lifelong editing: normalised inputs and output gradients, and one ridge solve for a whole turn."""

    def __init__(self, cfg: UltraEditConfig, job: Job) -> None:
        super().__init__(cfg, job)
        self._matrices = job.matrices(cfg.sites or _default(job))
        self._moments: dict[str, Moments] = {}
        self._lr = cfg.lr

    @property
    def matrices(self) -> Sequence[Matrix]:
        return self._matrices

    def rows(self, fact: Fact) -> int:
        return len(self._tokens(fact.spans))

    def turn(self, facts: Sequence[Fact]) -> Iterator[tuple[Matrix, Factors]]:
        keys, grads = self._captured(facts)
        if self.cfg.normaliser == "turn":
            self._moments = {}
        for matrix in self._matrices:
            z = torch.cat([keys[matrix.name], grads[matrix.name]], 1)
            self._moments.setdefault(_shape(matrix), Moments(z.shape[1])).add(z)
        factors = []
        for matrix in self._matrices:
            seen = self._moments[_shape(matrix)]
            if seen.count < 2:
                raise InputError(
                    f"{matrix.target}: one token of one edit cannot be normalised: it takes two rows to have a spread",
                    hint="more edits at once (some dozens), more matrices (-p sites=...), or --method memit",
                )
            z = torch.cat([keys[matrix.name], grads[matrix.name]], 1).to(torch.float64).cpu()
            z = (z - seen.mean) / (seen.std + self.cfg.eps)
            h, g = z[:, : matrix.d_in], z[:, matrix.d_in :]
            values = -h.square().sum(1, keepdim=True) * g
            factors.append((matrix, ridge(keys[matrix.name], values.to(keys[matrix.name].device), self.cfg.ridge)))
        lr = self._lr = self._found(facts, factors) if self._lr is None else self._lr
        yield from ((matrix, Factors(unit.A, lr * unit.B)) for matrix, unit in factors)

    def _found(self, facts: Sequence[Fact], units: Sequence[tuple[Matrix, Factors]]) -> float:
        """The lr for changes that are `units` at lr = 1: the decade first, then its quarters."""

        def tried(quarters: int) -> tuple[float, float]:
            with self.job.weights.tried(units, 10 ** (quarters / 4)):
                found = measured(self.job, facts)
            return min(found["success"], ENOUGH), -found["loss"] if isfinite(found["loss"]) else -inf

        best, reached = LEAST, (-1.0, -inf)
        for quarters in range(LEAST, MOST + 1, 4):
            result = tried(quarters)
            if result > reached:
                best, reached = quarters, result
            if reached[0] >= ENOUGH:
                break
        finer = {quarters: tried(quarters) for quarters in range(best - 3, best + 4) if quarters != best and quarters >= LEAST} | {best: reached}
        return 10 ** (min(finer, key=lambda quarters: (-finer[quarters][0], quarters)) / 4)

    def _captured(self, facts: Sequence[Fact]) -> tuple[Rows, Rows]:
        """Inputs and output gradients of each matrix, float32, rows in the order of the facts."""
        modules = {matrix.name: matrix.module for matrix in self._matrices}
        items = [fact.spans for fact in facts]
        parts: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {name: [] for name in modules}
        for numbers, inputs in self.job.batches(items):
            chosen = [items[k] for k in numbers]
            answers = rows(chosen, lambda s: s.predicts, self.job.device)

            def loss(logits: torch.Tensor, answers: torch.Tensor = answers, ids: torch.Tensor = inputs["input_ids"]) -> torch.Tensor:
                return nn.functional.cross_entropy(logits[answers].float(), ids[:, 1:][answers[:, :-1]], reduction="sum")

            lengths = [len(self._tokens(item)) for item in chosen]
            for name, captured in capture(self.job.model, inputs, modules, rows(chosen, self._tokens, self.job.device), loss=loss).items():
                if captured.grads is not None:  # there is a loss
                    parts[name] += zip(numbers, torch.split(captured.inputs, lengths), torch.split(captured.grads, lengths), strict=True)
        ordered = {name: sorted(pieces, key=lambda piece: piece[0]) for name, pieces in parts.items()}
        keys = {name: torch.cat([x for _, x, _ in pieces]) for name, pieces in ordered.items()}
        return keys, {name: torch.cat([g for _, _, g in pieces]) for name, pieces in ordered.items()}

    def _tokens(self, spans: Spans) -> range:
        return spans.predicts if self.cfg.token == "answer" else range(len(spans.ids) - 1)

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        if self.cfg.normaliser == "turn":
            return {}
        kept = {f"{shape}/{part}": value for shape, moments in self._moments.items() for part, value in moments.state().items()}
        return kept if self._lr is None else kept | {"lr": np.float64(self._lr).reshape(1)}

    def notes(self) -> dict[str, Any]:
        return {"lr": self._lr}

    def load(self, state: Mapping[str, np.ndarray[Any, Any]]) -> bool:
        if self.cfg.normaliser == "turn":
            return False
        kept: dict[str, dict[str, Any]] = {}
        if self._lr is None and "lr" in state:
            self._lr = float(state["lr"][0])
        for name, value in state.items():
            if name == "lr":
                continue
            shape, _, part = name.partition("/")
            kept.setdefault(shape, {})[part] = value
        self._moments = {shape: Moments.from_state(parts) for shape, parts in kept.items()}
        wrong = [shape for shape, moments in self._moments.items() if moments.size != sum(map(int, shape.split("x")))]
        if wrong:
            raise InputError(f"the state of the normaliser does not fit its own shapes: {', '.join(wrong)}")
        return True


def _shape(matrix: Matrix) -> str:
    return f"{matrix.d_in}x{matrix.d_out}"


def _default(job: Job) -> list[str]:
    half = job.layers() // 2
    roles = job.roles(("mlp.gate", "mlp.up", "mlp.gate_up"))
    if not roles:
        raise UsageError(f"{type(job.model).__name__} has no MLPs that are known as such", hint="say which matrices to edit: -p sites=NAME")
    return [f"{role}@{half}-" for role in roles]
