"""The error tree: every error weft raises on purpose, and the exit code of each.

An error says what is wrong, where, what was expected and what was found; `hint` is the next thing to try.

    WeftError             4   the run itself failed
      UsageError          2   wrong usage or configuration (all problems at once)
        MissingExtra      2   an optional dependency is not installed
      InputError          3   input that does not fit or is damaged
        FormatError       3   a file breaks its own format
        MismatchError     3   a delta, base or model that do not belong together
      GateFailed          1   a check ran and its limits were exceeded
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class WeftError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line returns."""

    exit_code = 4

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.hint}" if self.hint else self.message


class UsageError(WeftError):
    """Wrong usage or configuration. `problems` lists every one found, not only the first."""

    exit_code = 2

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str = "") -> None:
        self.problems = list(problems)
        if self.problems:
            message = message + "".join(f"\n  - {p}" for p in self.problems)
        super().__init__(message, hint=hint)


class MissingExtra(UsageError):
    """A feature needs a package that is not installed."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(f"{what} needs the package {package!r}, which is not installed", hint=f"pip install 'weft[{extra}]'")


class InputError(WeftError):
    """Input that does not fit or is damaged."""

    exit_code = 3


class FormatError(InputError):
    """A file breaks the format it claims to have."""


class MismatchError(InputError):
    """A delta, a base and a model that do not belong together."""


class GateFailed(WeftError):
    """A check ran to its end and a limit was exceeded."""

    exit_code = 1


def near(name: str, options: Iterable[str], what: str = "") -> str:
    """`"; did you mean 'lora'?"` when an option is close to `name`, else a list of what exists."""
    from difflib import get_close_matches

    known = sorted(set(options))
    close = get_close_matches(name, known, n=2, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    if not known:
        return ""
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"; {what or 'there are'}: {shown}"
