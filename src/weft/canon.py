"""Canonical JSON (RFC 8785): one byte sequence for one value, so that hashes of JSON mean something."""

from __future__ import annotations

from json.encoder import encode_basestring
from math import isfinite
from typing import Any

MAX_INTEGER = 2**53
"""Integers beyond this do not survive readers that keep numbers as doubles; they are refused."""


def integer(digits: str) -> int | float:
    """A number that stands in canonical JSON without a fraction: an int up to 2^53, beyond it the double that it was written from."""
    return int(digits) if len(digits) <= 17 and abs(int(digits)) <= MAX_INTEGER else float(digits)


class Encoded(str):
    """Text that is canonical JSON already: `dumps` writes it as it is, so a large part of several values is put into words once."""


def encoded(value: Any) -> Encoded:
    """A value as text that `dumps` need not write again. Raises ValueError as `dumps` does."""
    parts: list[str] = []
    _emit(value, parts.append)
    return Encoded("".join(parts))


def dumps(value: Any) -> bytes:
    """`value` (dict, list, tuple, str, int, float, bool, None, `Encoded`) as canonical UTF-8 JSON.

    Raises ValueError for NaN, infinities, integers beyond 2^53, lone surrogates and other types.
    """
    return encoded(value).encode("utf-8")


def _emit(value: Any, out: Any) -> None:
    if isinstance(value, str):
        out(value if isinstance(value, Encoded) else encode_basestring(value))
    elif value is None:
        out("null")
    elif value is True:
        out("true")
    elif value is False:
        out("false")
    elif isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise ValueError(f"the integer {value} is beyond 2^53; store it as text")
        out(str(int(value)))
    elif isinstance(value, float):
        out(number(value))
    elif isinstance(value, dict):
        out("{")
        try:
            keys = sorted(value) if all(map(str.isascii, value)) else sorted(value, key=lambda k: k.encode("utf-16-be"))
        except (TypeError, AttributeError):
            raise ValueError(f"JSON keys must be text, got {[k for k in value if not isinstance(k, str)][:3]}") from None
        for position, key in enumerate(keys):
            out("," if position else "")
            out(encode_basestring(key))
            out(":")
            _emit(value[key], out)
        out("}")
    elif isinstance(value, list | tuple):
        out("[")
        for position, item in enumerate(value):
            out("," if position else "")
            _emit(item, out)
        out("]")
    else:
        raise ValueError(f"{type(value).__name__} is not a JSON value")


def number(x: float) -> str:
    """A float as ECMAScript's Number::toString writes it (the shortest digits that read back as x)."""
    if not isfinite(x):
        raise ValueError(f"{x} is not a JSON number")
    if x == 0:
        return "0"
    sign, x = ("-", -x) if x < 0 else ("", x)
    mantissa, _, exponent = repr(x).partition("e")
    whole, _, fraction = mantissa.partition(".")
    point = len(whole) + int(exponent or 0)
    digits = (whole + fraction).lstrip("0")
    point -= len(whole + fraction) - len(digits)
    digits = digits.rstrip("0")
    count = len(digits)
    if count <= point <= 21:
        text = digits + "0" * (point - count)
    elif 0 < point <= 21:
        text = digits[:point] + "." + digits[point:]
    elif -6 < point <= 0:
        text = "0." + "0" * -point + digits
    else:
        power = point - 1
        text = digits[0] + ("." + digits[1:] if count > 1 else "") + f"e{'+' if power > 0 else '-'}{abs(power)}"
    return sign + text
