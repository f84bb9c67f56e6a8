"""What a port method is. Each method is one file beside this one: a function of a `Job` and its options that returns a delta.

    @method("port", config=..., paper=...)
    def portllm(job: Job, cfg: PortLLMConfig) -> Delta: ...

The delta it returns belongs to the target; `weft.port` adds the recipe and the parents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Base
from ..delta import Delta

if TYPE_CHECKING:
    from ..engine.data import Row


@dataclass(frozen=True)
class Job:
    """A port.

    update:  what is to be carried over: a delta made for `source`, or a checkpoint that was tuned from it
    source:  the base that the update belongs to
    target:  the base that gets it
    rows:    data, for methods that need some
    seed:    of whatever is random
    device:  where a model runs, for methods that run one (None: an accelerator if there is one)
    threads: blocks computed at a time; no result depends on it
    """

    update: Delta | Base
    source: Base
    target: Base
    rows: Sequence[Row] | None = None
    seed: int = 0
    device: str | None = None
    threads: int = 1
