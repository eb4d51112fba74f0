"""Server-sent events as bytes: bytes in, complete events out.

Providers do not always keep to the format. A byte-order mark may stand before the first event, and a server that fails
in the middle of a stream often writes its error as a bare JSON object, between events or behind the last one. Such an
object is an event with these data.
"""

from __future__ import annotations

import re

import orjson
from msgspec import field

from wire.jsontext import BOM
from wire.unshown import Unshown

EVENT_BYTES_MAX = 1024 * 1024  # one SSE event from a provider (SPEC 13.3)
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
FIELDS = frozenset({b"data", b"event", b"id", b"retry"})
JSON_STARTS = (b"{", b"[")

Frame = tuple[bytes, bytes, bool]  # an event as it goes out, its data, and whether it is named `error`


class EventTooLarge(Exception):
    """A provider's event passed EVENT_BYTES_MAX."""


END = b"\n\n"  # of an event
BLANK_LINE = re.compile(rb"(\r?\n\r?\n)")


class SSEDecoder(Unshown):
    """Bytes in, frames out. Comments and events without data are dropped, except for an `error` event.

    An event, or one UTF-8 letter, may span reads, and CRLF and LF both occur. Only LF and CRLF end a line here, never
    U+2028 as in `splitlines`; a lone CR as line end is not supported, as no provider is known to send it.
    """

    _held: list[bytes] = field(default_factory=list)  # of the event that is not complete yet
    _held_bytes: int = 0
    _tail: bytes = b""  # its last bytes, where the blank line may have begun

    def feed(self, data: bytes) -> list[Frame]:
        if not self._held and data[:6] == b"data: " and data[-2:] == END and len(data) <= EVENT_BYTES_MAX:
            if data.find(b"\n") == len(data) - 2:
                return [(data, data[6:-2].strip(), False)]
            blocks = data[:-2].split(END)
            lines = [block for block in blocks if block[:6] == b"data: " and b"\n" not in block]
            if len(lines) == len(blocks):  # whole events of one line each
                return [(line + END, line[6:].strip(), False) for line in lines]
        frames: list[Frame] = []
        for block in self._blocks(data):
            frames += frames_of(block)
        return frames

    def flush(self) -> list[Frame]:
        """At the end of the stream: a last event may come without its blank line."""
        block = b"".join(self._held).rstrip(b"\r\n") + b"\n\n"
        self._forget()
        return frames_of(block)

    def _blocks(self, data: bytes) -> list[bytes]:
        """The events that these bytes complete; the rest is held."""
        window = self._tail + data
        if b"\n\n" not in window and b"\n\r\n" not in window:
            self._hold(data)
            self._tail = window[-3:]
            return []
        buffer = b"".join((*self._held, data)) if self._held else data
        self._forget()
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

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > EVENT_BYTES_MAX:
            raise EventTooLarge

    def _forget(self) -> None:
        self._held.clear()
        self._held_bytes = 0
        self._tail = b""


def frames_of(block: bytes) -> list[Frame]:
    """The event that a block of lines is; more than one where bare JSON stands beside it."""
    if len(block) > EVENT_BYTES_MAX:
        raise EventTooLarge
    if block.startswith(b"data:") and block.count(b"\n", 0, -2) == 0:
        return [(block, block[5:].strip(), False)]
    block = block.removeprefix(BOM)
    frames: list[Frame] = []
    data: list[bytes] = []
    bare: list[bytes] = []
    is_error = mixed = False
    for line in (line.rstrip(b"\r") for line in block.split(b"\n")):
        name, _, value = line.partition(b":")
        if name in FIELDS:
            if bare:
                frames, bare, mixed = frames + bare_frames(bare, is_error), [], True
            if name == b"data":
                data.append(value.removeprefix(b" "))
            elif name == b"event":
                is_error = value.strip().lower() == b"error"
        elif bare or line.lstrip()[:1] in JSON_STARTS:
            if data:
                frames, data, mixed = [*frames, event_of(data, is_error)], [], True
            bare.append(line)
    if data or (is_error and not bare):
        frames.append(event_of(data, is_error) if mixed else (block, b"\n".join(data).strip(), is_error))
    return frames + bare_frames(bare, is_error)


def event_of(data: list[bytes], is_error: bool) -> Frame:
    return b"".join(b"data: %b\n" % line for line in data) + b"\n", b"\n".join(data).strip(), is_error


def bare_frames(lines: list[bytes], is_error: bool) -> list[Frame]:
    """Lines outside any field: one JSON value over all of them, or one on each line."""
    whole = b" ".join(lines).strip()  # a line end in JSON is white space
    values = [whole] if is_json(whole) else [line.strip() for line in lines]
    return [event_of([value], is_error) for value in values if value[:1] in JSON_STARTS]


def is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True
