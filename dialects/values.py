"""Single values as clients spell them. Each reader raises InvalidRequest naming the field. No I/O."""

from __future__ import annotations

import math

from wire.errors import InvalidRequest


def wrong_type(param: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"'{param}' must be {expected}.", param=param, code="invalid_type")


def boolean(value: object, param: str) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value not in (True, False):  # 1 and 0 are as good
        raise wrong_type(param, "true or false")
    return bool(value)


def number(value: object, param: str, *, whole: bool = False) -> float | int:
    """A number, also spelled as text; a whole one also spelled 1024.0."""
    if type(value) is int:
        return value
    expected = "a whole number" if whole else "a number"
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise wrong_type(param, expected) from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise wrong_type(param, expected)
    if whole:
        if value != int(value):
            raise wrong_type(param, expected)
        return int(value)
    return value


def whole_number(value: object, param: str) -> float | int:
    return number(value, param, whole=True)
