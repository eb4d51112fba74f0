"""The first words of a stream: what they turn out to be decides in which field they go out. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterator

from msgspec import field

from adapters import thoughts
from adapters.text_rescue import CALL_CHARS_MAX, DIALECTS, FIRST_CHARS, Calls, Tools, calls_in
from wire.unshown import Unshown

UNDECIDED_CHARS_MAX = 256  # held back while they may still become a marker; the longest is a fifth of it


class TextGate(Unshown):
    """Holds back no more of an answer's text than it must to tell thoughts and calls from text.

    `feed` gives (field, text) pieces; nothing while it cannot tell. `open` once the rest is plain text and need not
    come here any more; `untouched` when all of it was, so that the provider's own bytes can go out.
    """

    _tools: Tools
    open: bool = False
    untouched: bool = True
    _held: str = ""
    _end_tag: str = ""  # while thoughts run
    _after_thoughts: bool = False
    _calling: list[str] = field(default_factory=list)  # the pieces of a call, once it has begun
    _calling_chars: int = 0

    @property
    def begun(self) -> bool:
        """Whether it has seen anything, or taken anything away."""
        return bool(self._held) or not self.untouched

    @property
    def calling(self) -> bool:
        """Whether a call has begun, which more text would complete."""
        return bool(self._calling)

    @property
    def taken_chars(self) -> int:
        return self._calling_chars

    def feed(self, text: str) -> list[tuple[str, str]]:
        if self._calling:
            self._calling.append(text)
            self._calling_chars += len(text)
            if self._calling_chars <= CALL_CHARS_MAX:
                return []
            text, self._held = "".join(self._calling), ""
        self._held += text
        pieces: list[tuple[str, str]] = []
        if self._end_tag and not self._think(pieces):
            return pieces
        if self.untouched and self._begins_thought() and not self._think(pieces):
            return pieces
        if not self._undecided():
            self.open = True
            pieces.append(("content", self._held if self.untouched else self._held.lstrip()))
        return pieces

    def finish(self) -> tuple[list[tuple[str, str]], Calls]:
        """What is left at the end. Raises Unreadable."""
        self.open = True
        if self._calling:
            self._held = "".join(self._calling)
        calls = calls_in(self._held, self._tools) if self._tools and self._held else None
        if calls:
            self.untouched = False
            return [], calls
        field = "reasoning_content" if self._end_tag else "content"
        left = self._held if self.untouched else self._held.strip()
        return ([(field, left)] if left else []), []

    def _begins_thought(self) -> bool:
        """Whether thoughts begin here; a closing tag alone is dropped, since the thoughts came by another way."""
        start = self._held.lstrip()
        if begins := thoughts.opening(start):
            size, self._end_tag = begins
        elif not (size := thoughts.stray_end(start)):
            return False
        self._held, self.untouched = start[size:], False
        return True

    def _think(self, pieces: list[tuple[str, str]]) -> bool:
        """Pass thoughts on; True when they have ended."""
        if not self._end_tag:
            return True
        said, end, rest = self._held.partition(self._end_tag)
        if not end:  # its last characters may be the beginning of the end tag
            kept = next(n for n in range(len(self._end_tag) - 1, -1, -1) if said.endswith(self._end_tag[:n]))
            said, rest = said[: len(said) - kept], said[len(said) - kept :]
        self._held = rest
        if said:
            pieces.append(("reasoning_content", said))
        if end:
            self._end_tag, self._after_thoughts = "", True
        return bool(end)

    def _undecided(self) -> bool:
        if self._calling:
            return False  # no call is that long
        leading = False
        if self._after_thoughts:
            self._held, leading = thoughts.without_lead(self._held)
            self._after_thoughts = leading
        start = self._held.lstrip()
        if not start:
            return len(self._held) <= UNDECIDED_CHARS_MAX
        if leading:
            return True
        if self._tools and self._is_call(start):
            self._calling, self._calling_chars = [self._held], len(self._held)
            return True
        if len(start) > UNDECIDED_CHARS_MAX:
            return False
        if self.untouched and start[0] in thoughts.FIRST_CHARS and thoughts.may_open(start):
            return True
        return bool(self._tools) and start[0] in FIRST_CHARS and self._may_become_call(start)

    def _is_call(self, start: str) -> bool:
        if any(start.startswith(marker) for marker, _, _ in DIALECTS if marker != "<function="):
            return True
        squeezed = re.sub(r"\s+", "", start)
        return any(squeezed.startswith(opening) for opening in self._openings())

    def _may_become_call(self, start: str) -> bool:
        squeezed = re.sub(r"\s+", "", start)
        return any(marker.startswith(start) for marker, _, _ in DIALECTS) or any(
            opening.startswith(squeezed) for opening in self._openings()
        )

    def _openings(self) -> Iterator[str]:
        """How a call of a declared tool begins, without its white space."""
        for name in self._tools:
            yield f"<function={name}"
            yield f'{{"name":"{name}"'
            yield f'```json{{"name":"{name}"'
            yield f'```{{"name":"{name}"'
