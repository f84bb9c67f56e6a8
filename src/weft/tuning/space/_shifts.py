"""What spaces have in common that train the model's own tensors in shifts: some are awake, the others asleep, and that changes.

A tensor that sleeps takes no gradient, and what the optimizer kept for it is dropped, so that memory falls. Which ones are awake
depends on the run's seed and step alone, so a run that goes on needs nothing to be kept.
"""

from __future__ import annotations

from ... import xp
from ...engine.loop import Run
from ...errors import UsageError
from ...ops import Generator
from . import Job
from .full import Full, FullConfig


class Shifts(Full):
    """Full tuning of the tensors that `awake` names, for `period` steps each time (0: the whole run)."""

    def __init__(self, cfg: FullConfig, job: Job, period: int) -> None:
        super().__init__(cfg, job)
        self.period = period
        self.shift = -1

    def awake(self, gen: Generator) -> set[str]:
        """The live names of the tensors that are trained in a shift. `gen` is new for each."""
        raise NotImplementedError

    def start(self, run: Run) -> None:
        if run.accelerator.num_processes > 1:
            raise UsageError("what is trained changes from step to step here, which several processes cannot agree on yet", hint="train in one process")
        self._change(run)

    def after_step(self, run: Run) -> None:
        self._change(run)

    def _change(self, run: Run) -> None:
        shift = run.step // self.period if self.period else 0
        if shift == self.shift:
            return
        self.shift = shift
        names = self.awake(Generator(xp.key(self.job.gen.seed, shift)))
        for name, value in self._tensors.items():
            value.requires_grad_(name in names)
            if name not in names:
                value.grad = None
                run.optimizer.state.pop(value, None)
