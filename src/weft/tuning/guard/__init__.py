"""Guards: what must not be lost.

A guard is a subclass of `Hooks`, made from its config and the job, registered as a method of kind "guard". Guards combine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...engine.loop import Hooks

if TYPE_CHECKING:
    import msgspec

    from ..space import Job, Space


class Guard(Hooks):
    """Base of all guards: `job` and `space` are those of the run."""

    def __init__(self, cfg: msgspec.Struct, job: Job, space: Space) -> None:
        self.job, self.space = job, space
