"""Structs that hold what must never reach a log: keys, prompts, answers. No I/O."""

from __future__ import annotations

from msgspec import Struct


class Unshown(Struct, eq=False):
    """Mutable state that is told apart by identity, and of which a message that shows it says no more than its kind."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"
