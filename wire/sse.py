"""Server-sent events as bytes: bytes in, complete events out."""

from __future__ import annotations

import re

EVENT_BYTES_MAX = 1024 * 1024  # one SSE event from a provider (SPEC 13.3)
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class EventTooLarge(Exception):
    """A provider's event passed EVENT_BYTES_MAX."""


BLANK_LINE = re.compile(rb"(\r?\n\r?\n)")
DATA_LINE = re.compile(rb"^data:[ ]?([^\r\n]*)", re.MULTILINE)


class SSEDecoder:
    """Bytes in, events out: (the event as it came, its data). Comments and events without data are dropped.

    An event, or one UTF-8 letter, may span reads, and CRLF and LF both occur. Only LF and CRLF end a line here, never
    U+2028 as in `splitlines`; a lone CR as line end is not supported, as no provider is known to send it.
    """

    def __init__(self) -> None:
        self.held: list[bytes] = []  # of the event that is not complete yet
        self._held_bytes = 0
        self._tail = b""  # its last bytes, where the blank line may have begun

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        if self.held or data[-2:] != b"\n\n" or data[-3:-2] == b"\n" or b"\r" in data or len(data) > EVENT_BYTES_MAX:
            return [(block, payload) for block in self._blocks(data) if (payload := event_data(block)) is not None]
        frames = []
        for block in data[:-2].split(b"\n\n"):  # whole events, as most reads are
            if block[:5] == b"data:" and b"\n" not in block:
                frames.append((block + b"\n\n", block[5:].strip()))
            elif (payload := event_data(block + b"\n\n")) is not None:
                frames.append((block + b"\n\n", payload))
        return frames

    def _blocks(self, data: bytes) -> list[bytes]:
        """The events that these bytes complete; the rest is held."""
        window = self._tail + data
        if b"\n\n" not in window and b"\n\r\n" not in window:
            self._hold(data)
            self._tail = window[-3:]
            return []
        buffer = b"".join((*self.held, data)) if self.held else data
        self.held.clear()
        self._held_bytes = 0
        if b"\r" in buffer:
            pieces = BLANK_LINE.split(buffer)
            blocks = [block + end for block, end in zip(pieces[0:-1:2], pieces[1::2], strict=True)]
            rest = pieces[-1]
        else:
            *bare, rest = buffer.split(b"\n\n")
            blocks = [block + b"\n\n" for block in bare]
        self._tail = rest[-3:]
        if rest:
            self._hold(rest)
        return blocks

    def flush(self) -> list[tuple[bytes, bytes]]:
        """At the end of the stream: a last event may come without its blank line."""
        block = b"".join(self.held).rstrip(b"\r\n") + b"\n\n"
        self.held.clear()
        payload = event_data(block)
        return [] if payload is None else [(block, payload)]

    def _hold(self, data: bytes) -> None:
        self.held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > EVENT_BYTES_MAX:
            raise EventTooLarge


def event_data(block: bytes) -> bytes | None:
    """The data of one event block, its lines joined; None when it has none."""
    if len(block) > EVENT_BYTES_MAX:
        raise EventTooLarge
    if block.startswith(b"data:") and block.count(b"\n", 0, -2) == 0:
        return block[5:].strip()
    lines = DATA_LINE.findall(block)
    return b"\n".join(lines).strip() if lines else None
