"""spiel: sparse increments whose positions move to where gradients are.

    w'.flat[index] = w.flat[index] + values

Every `period` steps, in each tensor the share p of its entries with the smallest |values| is dropped (they are the base's again) and as
many others take their place, with value zero. p is 1 the first time, then rate (1 - progress). As many entries as at the start are
trained at every step. Ansell et al. 2024, arXiv 2401.16405. Which others:

ag   accumulated gradients: the first `gather` steps of each period sum the gradients of candidates, as many as there are entries: those
     with the largest gradient at the first of these steps. The candidates with the largest sum come in. The dense gradient of one
     tensor at a time is seen in these steps, and not kept.
ma   momenta: of SM3, which keeps a number for each row and column, v = min(row, column) + g^2 for each active entry, and from these
     row = max v, column = max v. The entries with the largest row x column come in. No dense gradient is ever made.

The first positions are random. Moments of entries that come in are zero, whatever the optimizer is; those of the others stay.

Not followed: the code starts an incoming entry's moments with what was gathered, in an Adam that knows how old each entry is; here the
optimizer is one of weft's, and `ma` keeps SM3's numbers beside it. Where an entry that is dropped would come in again, it stays.

Size: 12 bytes an entry (its position and its value).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from torch import nn

from ...engine.loop import Run
from ...errors import UsageError
from ...methods import method
from ...ops import OpEntry
from ...ops.op import flat_shape
from .._positions import Budget, Positions, carry, chances, largest, moved, top
from . import Job, Part
from ._masked import Masked


class SpIELConfig(Budget, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of SpIEL."""

    across: Annotated[Literal["model", "tensor"], msgspec.Meta(description="one budget for all targets, or the same share of each")] = "tensor"
    grow: Annotated[Literal["ag", "ma"], msgspec.Meta(description="by accumulated gradients or by SM3's momenta")] = "ag"
    period: Annotated[int, msgspec.Meta(description="steps between two changes of positions", ge=1)] = 20
    gather: Annotated[int, msgspec.Meta(description="steps of each period before the change, in which gradients are gathered", ge=1)] = 5
    rate: Annotated[float, msgspec.Meta(description="share of the entries that change, falling to zero over the run", ge=0, le=1)] = 0.2


@method("space", config=SpIELConfig, paper="Ansell et al., 2024, arXiv:2401.16405", formula="w' = w + values at positions that are dropped and grown")
class SpIEL(Masked):
    """Sparse increments that drop their smallest entries and grow where gradients are large."""

    def __init__(self, cfg: SpIELConfig, job: Job) -> None:
        super().__init__(cfg, job)
        if cfg.gather > cfg.period:
            raise UsageError(f"gather = {cfg.gather} is more than period = {cfg.period}", hint="gather at most as many steps as a period has")
        self.cfg = cfg
        self.kept: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def choose(self, parts: Sequence[Part]) -> list[Positions]:
        return largest(chances(parts, self.job.gen), self.cfg)

    def state(self) -> dict[str, torch.Tensor]:
        return {**super().state(), **self.kept}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.kept = {name: value for name, value in state.items() if not name.startswith("index/")}

    def start(self, run: Run) -> None:
        super().start(run)
        if self.cfg.grow == "ag":
            if run.accelerator.num_processes > 1:
                raise UsageError("gradients are gathered in one process only", hint="grow=ma, or train in one process")
            self._listen(run.step)

    def close(self, run: Run) -> None:
        self._deafen()

    def gradients(self, run: Run) -> None:
        """SM3's numbers of this step."""
        if self.cfg.grow == "ma":
            for number, _, values in self.trained():
                if values.grad is not None:
                    self._momenta(number, values.grad.detach().float())

    def after_step(self, run: Run) -> None:
        if run.step % self.cfg.period == self.cfg.gather % self.cfg.period:
            share = 1.0 if run.step == self.cfg.gather else self.cfg.rate * (1 - run.place / run.total)
            for number, op, values in self.trained():
                self._change(run, number, op, values, int(share * values.numel()))
            if self.cfg.grow == "ag":
                self.kept = {}
        if self.cfg.grow == "ag":
            self._listen(run.step)

    # --- what is known of entries that are not trained

    def _listen(self, step: int) -> None:
        """Hooks on the base's weights in the steps that gather, none in the others."""
        wanted = step % self.cfg.period < self.cfg.gather
        if not wanted:
            self._deafen()
        elif not self._hooks:
            live = self.job.model.state_dict(keep_vars=True)
            for name, numbers in self._places().items():
                live[name].requires_grad_(True)
                self._hooks.append((live[name], live[name].register_post_accumulate_grad_hook(partial(self._hear, numbers))))

    def _deafen(self) -> None:
        for parameter, hook in self._hooks:
            hook.remove()
            parameter.requires_grad_(False)
            parameter.grad = None
        self._hooks = []

    def _places(self) -> dict[str, list[int]]:
        """The parts of each live tensor."""
        found: dict[str, list[int]] = {}
        for number, _, _ in self.trained():
            target = self.parts[number].target
            places = self.job.names.live(target)
            if len(places) != 1 or places[0].part is not None:
                raise UsageError(f"{target} is split in the model, so that its gradient is not seen whole", hint=f"grow=ma, or exclude={target}")
            found.setdefault(places[0].name, []).append(number)
        return found

    @torch.no_grad()
    def _hear(self, numbers: Sequence[int], parameter: torch.Tensor) -> None:
        """Sum the candidates' gradients; the first time, choose them."""
        assert parameter.grad is not None
        for number in numbers:
            part = self.parts[number]
            at = self.job.names.live(part.target)[0].at
            grad = at.get(parameter.grad) if at else parameter.grad
            grad = (part.at.get(grad) if part.at else grad).float().reshape(-1)
            if f"candidates/{number}" not in self.kept:
                (found,) = top([grad], self.positions[number].size)
                self.kept[f"candidates/{number}"] = torch.from_numpy(found).to(grad.device)
                self.kept[f"sums/{number}"] = grad.new_zeros(found.size)
            self.kept[f"sums/{number}"] += grad[self.kept[f"candidates/{number}"]]
        parameter.grad = None

    def _momenta(self, number: int, grad: torch.Tensor) -> None:
        rows, columns = flat_shape(self.parts[number].shape)
        if f"rows/{number}" not in self.kept:
            self.kept |= {f"rows/{number}": grad.new_zeros(rows), f"columns/{number}": grad.new_zeros(columns)}
        row, column = self.kept[f"rows/{number}"], self.kept[f"columns/{number}"]
        index = torch.from_numpy(self.positions[number]).to(grad.device)
        r, c = index // columns, index % columns
        now = torch.minimum(row[r], column[c]) + grad.square()
        row.scatter_reduce_(0, r, now, "amax")
        column.scatter_reduce_(0, c, now, "amax")

    # --- dropping and growing

    @torch.no_grad()
    def _change(self, run: Run, number: int, op: OpEntry, values: nn.Parameter, share: int) -> None:
        index = self.positions[number]
        order = values.detach().abs().argsort(stable=True).cpu().numpy()
        going, staying = order[:share], index[order[share:]]
        coming = self._grown(number, index, staying, share)
        again = np.isin(index[going], coming)
        coming = coming[~np.isin(coming, index[going])]
        going = going[~again][: coming.size]
        new, source = index.copy(), np.arange(index.size)
        new[going], source[going] = coming[: going.size], -1
        sorting = np.argsort(new, kind="stable")
        self.positions[number] = new[sorting]
        places = torch.from_numpy(source[sorting]).to(values.device)
        values.copy_(moved(values, places))
        carry(run.optimizer, values, places)
        self.job.attached[1].tensors()[op.t["index"].key].copy_(torch.from_numpy(self.positions[number]))

    def _grown(self, number: int, index: Positions, staying: Positions, share: int) -> Positions:
        """The best positions that are not staying, the best first; at most `share`."""
        if f"{'rows' if self.cfg.grow == 'ma' else 'candidates'}/{number}" not in self.kept:  # a tensor that no example has reached
            return index[:0]
        if self.cfg.grow == "ma":
            score = torch.outer(self.kept[f"rows/{number}"], self.kept[f"columns/{number}"]).reshape(-1)
            score[torch.from_numpy(index).to(score.device)] = -1.0
            candidates, scores = np.arange(score.numel()), score.cpu().numpy()
        else:
            candidates, scores = self.kept[f"candidates/{number}"].cpu().numpy(), self.kept[f"sums/{number}"].abs().cpu().numpy()
        free = ~np.isin(candidates, staying) & (scores >= 0)
        order = np.argsort(-scores[free], kind="stable")[:share]
        found: Positions = candidates[free][order].astype(np.int64)
        return found
