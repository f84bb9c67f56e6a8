"""What the configs of spaces that change matrices share."""

from __future__ import annotations

from typing import Annotated

import msgspec


class MatricesConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Which matrices to change."""

    targets: Annotated[tuple[str, ...], msgspec.Meta(description="what to change: roles, module names, globs, all-linear")] = ("all-linear",)
    exclude: Annotated[tuple[str, ...], msgspec.Meta(description="what to leave out of the targets")] = ()
