"""What a compress method is. Each method is one file beside this one, with a class that derives from `CompressMethod`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ..codes import Coded, Spool, encode, entries
from ..delta import Delta
from ..engine.stream import BLOCK, in_threads
from ..errors import InputError
from ..ops import chain
from ..ops import get as op_named
from ..stored import FLOATS, Tensor

if TYPE_CHECKING:
    import msgspec
    import numpy as np

    from ..base import Base

    Array = np.ndarray[Any, Any]

    C = TypeVar("C", bound=msgspec.Struct)
else:
    C = TypeVar("C")

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Job:
    """What is compressed, and the means to do it.

    delta:   the update; a checkpoint has become one of `dense` increments, and so have new values where the base is at hand
             (see `CompressMethod.exact`); those are computed whenever they are read
    base:    the base, where it was given
    on:      the deltas that it was made over, where they were given
    threads: how many blocks are worked on at a time; nothing may depend on it
    """

    delta: Delta
    base: Base | None = None
    on: tuple[Delta, ...] = ()
    threads: int = 1
    _spool: Spool = field(default_factory=Spool)

    @cached_property
    def fields(self) -> dict[str, Tensor]:
        """The update's own parameters: tensor key to tensor, sorted by key.

        They are the trainable floating-point fields of ops whose increment is zero when these are zero: the values of `dense` and
        `sparse`, the factors of `lowrank`, ... Not among them are positions, the raw values of `assign`, ops that are relative to
        the weight (`magnitude`, `scale_shift`), ops with a frozen pair (`lowrank` with A0 and B0) and ops at run time: whoever rounds
        those changes more than the update.
        """
        yes: set[str] = set()
        no: set[str] = set()
        for entry in self.delta.entries.values():
            for op in (inner for outer in entry.ops for inner in outer.walk()):
                if op.op == chain.SUM:
                    continue
                rule = op_named(op.op)
                own = rule.fields if rule.trainable is None else rule.trainable
                plain = rule.additive and rule.on == "weight" and set(op.t) <= set(rule.fields)
                for name, ref in op.t.items():
                    (yes if plain and name in own and self.delta.tensors[ref.key].dtype in FLOATS else no).add(ref.key)
        return {key: self.delta.tensors[key] for key in sorted(yes - no)}

    def map(self, key: str, function: Callable[[Array], R]) -> Iterator[R]:
        """`function` of every block of a field, in order, computed ahead in threads; blocks are flat, float32 (float64 for F64).

        InputError, with the tensor named, for NaNs and infinities.
        """
        return in_threads((partial(_with, function, key, values) for values in entries(self.delta.tensors[key], BLOCK)), self.threads)

    def encode(self, key: str, code: str, cfg: Mapping[str, Any], *, dtype: str | None = None, each: Callable[[Array], Array] | None = None) -> Coded:
        """A tensor of the delta in coded form (see `codes.encode`), with this job's threads and room for payloads."""

        def run(jobs: Iterable[Callable[[], bytes]]) -> Iterable[bytes]:
            return in_threads(jobs, self.threads)

        try:
            return encode(self.delta.tensors[key], code, cfg, dtype=dtype, each=each, run=run, spool=self._spool)
        except InputError as error:
            raise InputError(f"tensor {key!r}: {error.message}", hint=error.hint) from None


def _with(function: Callable[[Array], R], key: str, values: Array) -> R:
    import numpy as np

    wide = widened(values)
    if not np.isfinite(wide).all():
        raise InputError(f"tensor {key!r}: {int(np.count_nonzero(~np.isfinite(wide))):,} NaN or infinite entries", hint="check the run that made it")
    return function(wide)


def widened(values: Array) -> Array:
    """A block of a field as float32 (float64 for F64)."""
    from .. import xp

    out: Array = values if values.dtype == "float64" else xp.cast(values, "float32")
    return out


class CompressMethod(Generic[C]):
    """An update in, a smaller one out, which means nearly the same (or just the same).

    Most methods give each parameter tensor a new form: they look at everything in `prepare` and make one tensor at a time in
    `field`. A method that changes the ops themselves has its own `compress`. An object has no state of its own.
    """

    exact: ClassVar[bool] = False
    """It keeps every bit: new values (`assign`) stay what they are, and a checkpoint comes as an exact `diff`. For other methods both
    become `dense` increments where the base is given; without it, new values are no increments, and stay as they are."""

    def prepare(self, job: Job, cfg: C) -> Any:
        """Statistics over the whole update, the `state` of `field`: thresholds, scales."""
        return None

    def field(self, key: str, tensor: Tensor, job: Job, cfg: C, state: Any) -> Tensor:
        """The new form of one of `job.fields`: most often `job.encode(key, ...)`; the tensor itself where nothing is to be gained."""
        raise NotImplementedError

    def compress(self, job: Job, cfg: C) -> Delta:
        """The smaller delta. Its recipe, parents and notes are the caller's business; base, over, config and tied stay."""
        state = self.prepare(job, cfg)
        new = {key: self.field(key, tensor, job, cfg, state) for key, tensor in job.fields.items()}
        return replace(job.delta, tensors={**job.delta.tensors, **new})
