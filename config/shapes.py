"""What a JSON value from the operator must be: in words for the error message, and as a test.

Used for catalogue files and for the bodies of the admin API.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """`words` complete the sentence "expected …"."""

    words: str
    fits: Callable[[object], bool]

    def or_null(self) -> Shape:
        return Shape(f"{self.words} or null", lambda value: value is None or self.fits(value))


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def at_least(low: int, high: int = 10**18) -> Shape:
    """`high`: SQLite holds 64 bits."""
    words = f"a whole number ≥ {low}" if high == 10**18 else f"a whole number from {low} to {high}"
    return Shape(words, lambda value: isinstance(value, int) and is_whole(value) and low <= value <= high)


def one_of(*accepted: str) -> Shape:
    return Shape(f"one of {', '.join(accepted)}", lambda value: isinstance(value, str) and value in accepted)


TEXT = Shape("text", lambda value: isinstance(value, str))
FLAG = Shape("true or false", lambda value: isinstance(value, bool))
WHOLE = Shape("a whole number", is_whole)
COUNT = at_least(1).or_null()
NUMBER = Shape("a number", lambda value: is_whole(value) or isinstance(value, float))
OBJECT = Shape("an object", lambda value: isinstance(value, dict))
TEXTS = Shape("a list of texts", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value))
