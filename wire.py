"""What clients and gateway speak: one `Chat` in, events or one completion out, and the errors a client may see.

Every client dialect (chat.py, responses.py) parses into a `Chat` in OpenAI's chat form, and every adapter answers in
OpenAI's chat form, so neither knows of the other. The client's JSON stays a dict in `Chat.body`: unknown fields pass
through. Owns SSE as bytes too. No I/O.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import orjson

CHARS_PER_TOKEN = 4  # SPEC 3.7's estimate
TOKENS_MAX = 10**9  # of one answer; a provider that reports more has a broken counter
EVENT_BYTES_MAX = 1024 * 1024  # one SSE event from a provider (SPEC 13.3)
DEPTH_MAX = 200  # of JSON from either side: orjson reads 1024 levels but writes only 254, and some are put around it
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class GatewayError(Exception):
    """What a client may see. One class for each meaning that code asks for; the rest are built where they arise."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 500,
        type: str = "api_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        attempts: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.attempts = attempts

    def body(self) -> bytes:
        error: dict[str, Any] = {"message": self.message, "type": self.type, "code": self.code, "param": self.param}
        if self.attempts:
            error["attempts"] = self.attempts
        return orjson.dumps({"error": error})


class InvalidRequest(GatewayError):
    """The client's request cannot be understood or served as it is; `param` names the offending field."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message, status=status, type="invalid_request_error", code=code, param=param)


class ModelNotFound(InvalidRequest):
    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message, status=status, code="model_not_found", param="model")


class Unauthorized(GatewayError):
    def __init__(self) -> None:
        message = "Missing or wrong API key. Send it as 'Authorization: Bearer <key>'."
        super().__init__(message, status=401, type="authentication_error", code="invalid_api_key")


class NoProviders(GatewayError):
    def __init__(self) -> None:
        message = (
            "No enabled model has a usable key. Set a provider's key in the environment and restart, "
            "or add or repair one with POST /api/keys."
        )
        super().__init__(message, status=503, type="routing_error", code="no_providers")


class Mode(StrEnum):
    """How an auto-routed request weighs its candidates."""

    BALANCED = "balanced"
    SMART = "smart"
    FAST = "fast"
    PRIORITY = "priority"


MODELS_PREFIX = "freellmapi/"  # clients configured for that gateway send it
MODES = frozenset(Mode)
VIRTUAL_MODELS = ("auto", *(f"auto-{mode}" for mode in Mode))


def parse_model(name: str) -> tuple[Mode, str | None]:
    """The mode that a model name asks for, and the model it pins, if any (SPEC 3.3)."""
    name = name.strip().removeprefix(MODELS_PREFIX)
    if name in ("", "auto"):
        return Mode.BALANCED, None
    if name.startswith(("auto-", "auto:")) and name[5:] in MODES:
        return Mode(name[5:]), None
    return Mode.BALANCED, name


@dataclass(frozen=True, slots=True)
class Chat:
    """One request, whatever dialect it came in. `body` is OpenAI's chat form without model and stream options."""

    body: dict[str, Any]
    model: str  # as the client wrote it
    mode: Mode
    pinned: str | None
    stream: bool
    include_usage: bool
    has_images: bool
    has_tools: bool
    tokens: int  # estimated: prompt and answer together (SPEC 3.7)
    prompt_tokens: int  # estimated
    max_tokens: int | None
    first_user_text: str = field(repr=False)
    tool_names: Mapping[str, str] = field(default_factory=dict)  # renamed for strict servers: new name to the client's
    origin: Any = field(default=None, repr=False)  # what a dialect wants to see again in its encoder


def token_count(value: object) -> int | None:
    return int(value) if isinstance(value, (int, float)) and 0 <= value <= TOKENS_MAX else None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer."""

    input_tokens: int
    output_tokens: int

    @classmethod
    def read(cls, usage: object) -> Usage | None:
        """From OpenAI's `usage` object; None when it does not say."""
        if not isinstance(usage, dict):
            return None
        prompt, answer = token_count(usage.get("prompt_tokens")), token_count(usage.get("completion_tokens"))
        return None if prompt is None and answer is None else cls(prompt or 0, answer or 0)


@dataclass(slots=True)
class Event:
    """One streamed chunk in OpenAI's chat form: the frame as it goes out, and what it says."""

    raw: bytes
    chunk: dict[str, Any]


@dataclass(slots=True)
class Completion:
    """One whole answer in OpenAI's chat form: the body as it goes out, and what it says."""

    raw: bytes
    body: dict[str, Any]


@dataclass(slots=True)
class Tally:
    """What an answer has amounted to so far; whoever relays it keeps count here."""

    finish: str | None = None
    usage: Usage | None = None
    usage_object: dict[str, Any] | None = None  # as the provider gave it
    usage_raw: bytes | None = None  # the provider's own event for usage alone
    head: dict[str, Any] = field(default_factory=dict)  # a chunk to take id, created and model from
    text_chars: int = 0
    has_text: bool = False  # other than white space; reasoning and refusals count
    has_tool_calls: bool = False
    malformed: int = 0  # events that were not JSON and were skipped

    @property
    def empty(self) -> bool:
        """Whether nothing was said, and nothing but itself kept the model from saying it (SPEC 5.2)."""
        return not (self.has_text or self.has_tool_calls or self.finish in ("length", "content_filter"))

    def note_usage(self, usage: object) -> None:
        if (read := Usage.read(usage)) is not None and isinstance(usage, dict):
            self.usage, self.usage_object = read, usage

    def output_tokens(self) -> int:
        """As told, else estimated."""
        return self.usage.output_tokens if self.usage else -(-self.text_chars // CHARS_PER_TOKEN)


class Encoder(Protocol):
    """Turns one answer into what one dialect's client reads. One per request."""

    def whole(self, completion: Completion) -> bytes:
        """The body of a non-streaming answer."""

    def feed(self, events: list[Event]) -> bytes:
        """The next bytes of a stream."""

    def end(self, tally: Tally) -> bytes:
        """The last bytes of a finished stream."""

    def fail(self, message: str, type: str, code: int, tally: Tally) -> bytes:
        """The last bytes of a stream that broke: an unfinished answer never ends like a finished one."""


class Dialect(Protocol):
    """One API that clients speak."""

    def parse(self, raw: bytes, now: float) -> Chat:
        """Raises InvalidRequest naming the field."""

    def encoder(self, chat: Chat, now: float) -> Encoder: ...


ESCAPE = re.compile(rb"\\(?:u(?:[dD][89abAB]..\\u[dD][c-fC-F]..|([dD][89a-fA-F]..|0000))|.)", re.DOTALL)


def mended_escapes(raw: bytes) -> bytes:
    """Half an emoji (some editors cut them) and NUL become U+FFFD: they are not text, and servers refuse them."""
    return ESCAPE.sub(lambda found: b"\\ufffd" if found[1] else found[0], raw)


def looked_over(value: Any) -> tuple[bool, bool]:
    """Whether this nests deeper than DEPTH_MAX, which is more than could be written again or walked by a function that
    calls itself; and whether NUL is in one of its texts."""
    layer, has_nul = [value], False
    for _ in range(DEPTH_MAX):
        deeper = []
        for item in layer:
            for inner in item.values() if type(item) is dict else item:
                kind = type(inner)
                if kind is str:
                    has_nul = has_nul or "\0" in inner
                elif kind is dict or kind is list:
                    deeper.append(inner)
        if not deeper:
            return False, has_nul
        layer = deeper
    return True, has_nul


def nests_too_deeply(value: Any, brackets: int) -> bool:
    """The first of these; `brackets` is how many open in its JSON, which nearly always says it already."""
    return brackets > DEPTH_MAX and looked_over(value)[0]


def load_object(raw: bytes) -> dict[str, Any]:
    """The client's JSON object, strictly: orjson takes no NaN."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        try:
            body = orjson.loads(mended_escapes(raw))
        except orjson.JSONDecodeError:
            raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    too_deep, has_nul = looked_over(body)
    if too_deep:
        raise InvalidRequest(f"The body nests deeper than {DEPTH_MAX} levels.", code="invalid_json")
    return orjson.loads(mended_escapes(raw)) if has_nul else body


def no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def finite(text: str) -> float | None:
    """orjson, too, writes an infinite number as null."""
    value = float(text)
    return value if math.isfinite(value) else None


def load_lenient(raw: bytes) -> Any:
    """A provider's JSON. Python's own parser also takes half an emoji, which some put into each of two chunks.

    Raises ValueError for what is no JSON.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(raw, parse_constant=no_number, parse_float=finite)
        except RecursionError:
            raise ValueError("nested too deeply") from None
    if len(raw) > 2 * DEPTH_MAX and nests_too_deeply(value, raw.count(b"{") + raw.count(b"[")):
        raise ValueError("nested too deeply")
    return value


def load_inner(text: str) -> Any:
    """JSON that stands as text in other JSON, such as a call's arguments; None for what is none."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return None if nests_too_deeply(value, text.count("{") + text.count("[")) else value


def dump(value: Any) -> bytes:
    """JSON of whatever `load_lenient` may have let in."""
    try:
        return orjson.dumps(value)
    except TypeError:  # lone surrogates
        return json.dumps(value, separators=(",", ":")).encode()


def frame(chunk: dict[str, Any]) -> bytes:
    """One SSE event carrying this chunk."""
    return b"data: " + dump(chunk) + b"\n\n"


def chunk_head(like: Mapping[str, Any]) -> dict[str, Any]:
    """A chunk without its choices, of the answer that another of its chunks, or the whole of it, belongs to."""
    return {
        "object": "chat.completion.chunk",
        **{name: like[name] for name in ("id", "created", "model") if name in like},
    }


def chunk_of(like: Mapping[str, Any], delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {**chunk_head(like), "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


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
