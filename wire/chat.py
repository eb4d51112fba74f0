"""What clients and gateway speak: one `Chat` in, events or one completion out.

Every client dialect parses into a `Chat` in OpenAI's chat form, and every adapter answers in OpenAI's chat form, so
neither knows of the other. Routing sees only the `Need` of a request. The client's JSON stays JSON in `Chat.body`:
unknown fields pass through. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Protocol

import orjson
from msgspec import Struct
from msgspec.structs import replace

from wire.errors import GatewayError
from wire.jsontext import dump

CHARS_PER_TOKEN = 4  # SPEC 3.7's estimate
ANSWER_TOKENS_ASSUMED = 1000  # what a request needs room for beside its prompt, however much it wishes for (SPEC 3.7)
PROMPT_NAMES = ("prompt_tokens", "input_tokens", "prompt_eval_count")  # as servers call them
ANSWER_NAMES = ("completion_tokens", "output_tokens", "eval_count")
OTHER_NAMES = frozenset((*PROMPT_NAMES[1:], *ANSWER_NAMES[1:]))
CUT_OFF = ("length", "content_filter")  # finish reasons of an answer that did not end by itself
TOKENS_MAX = 10**9  # of one answer; a provider that reports more has a broken counter


class Mode(StrEnum):
    """How an auto-routed request weighs its candidates."""

    BALANCED = "balanced"
    SMART = "smart"
    FAST = "fast"
    PRIORITY = "priority"


class ModelKind(StrEnum):
    """What a model is asked for. Chat is never routed to embedding models, nor embeddings to chat models."""

    CHAT = "chat"
    EMBEDDING = "embedding"


MODELS_PREFIX = "freellmapi/"  # clients configured for that gateway send it
VENDOR_PREFIX = "openai/"  # so some clients say which API they speak
LATEST = ":latest"  # a tag that some put behind every name
MODES = frozenset(Mode)
VIRTUAL_MODELS = ("auto", *(f"auto-{mode}" for mode in Mode))


@lru_cache(maxsize=1024)  # clients send a few, of 300 characters at most
def parse_model(name: str) -> tuple[Mode, str | None]:
    """The mode that a model name asks for, and the model it pins, if any (SPEC 3.3)."""
    name = name.strip()
    if name[: len(MODELS_PREFIX)].lower() == MODELS_PREFIX:
        name = name[len(MODELS_PREFIX) :]
    plain = plain_name(name).removeprefix(VENDOR_PREFIX)
    if plain in ("", "auto"):
        return Mode.BALANCED, None
    if plain.startswith(("auto-", "auto:")) and plain[5:] in MODES:
        return Mode(plain[5:]), None
    return Mode.BALANCED, name


def plain_name(name: str) -> str:
    """A name without what clients spell differently (SPEC 3.10)."""
    return name.strip().lower().removesuffix(LATEST)


class Need(Struct, frozen=True):
    """All that routing sees of a request: what must be served, and how the client wants it chosen."""

    mode: Mode
    pinned: str | None  # a model by name
    tokens: int  # estimated: prompt and answer together (SPEC 3.7)
    vision: bool = False
    tools: bool = False
    strict: bool = False  # only the pinned model may answer (`X-Fallback: none`)
    kind: ModelKind = ModelKind.CHAT
    unknown_means: Mode | None = None  # what the pinned name asks for where no model has it
    min_rank: int | None = None  # models ranked worse by intelligence may not answer (SPEC 21.3)
    no_train: bool = False  # only routes may answer that are known not to train on prompts (SPEC 21.4)
    allowed: frozenset[str] | None = None  # names of the only models that may answer (SPEC 19.1); None: any


class Chat(Struct, frozen=True):
    """One request, whatever dialect it came in. `body` is OpenAI's chat form without model and stream options; nobody
    changes what is in it."""

    need: Need
    body: Mapping[str, Any]  # a dict, or a `Body` that keeps long fields as text
    model: str  # as the client wrote it
    stream: bool
    include_usage: bool
    prompt_tokens: int  # estimated
    max_tokens: int | None
    first_user_text: str
    conversation: str = ""  # the client's own name for it, where the body has one
    tool_names: Mapping[str, str] = {}  # renamed for strict servers: new name to the client's
    origin: Any = None  # what a dialect wants to see again in its encoder
    legacy: dict[str, Any] | None = None  # the same as a prompt, for endpoints that take one
    answered: bytes | None = None  # the whole response, where no provider is needed

    def __repr__(self) -> str:
        """Without what the client said: this may end up in a traceback."""
        return f"Chat(model={self.model!r}, stream={self.stream})"

    def asking_for(self, model: str) -> Chat:
        """The same with this model's name in place of the body's."""
        mode, pinned = parse_model(model)
        return replace(self, model=model, need=replace(self.need, mode=mode, pinned=pinned))


def token_count(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        value = int(value)
    return int(value) if isinstance(value, (int, float)) and 0 <= value <= TOKENS_MAX else None


class Usage(Struct, frozen=True):
    """Tokens of one answer."""

    input_tokens: int
    output_tokens: int

    @classmethod
    def read(cls, usage: object) -> Usage | None:
        """From OpenAI's `usage` object; None when it does not say."""
        if not isinstance(usage, dict):
            return None
        if (exact := cls.exact(usage)) is not None:  # as nearly always
            return exact
        prompt, answer = (
            next((count for name in names if (count := token_count(usage.get(name))) is not None), None)
            for names in (PROMPT_NAMES, ANSWER_NAMES)
        )
        return None if prompt is None and answer is None else cls(prompt or 0, answer or 0)

    @classmethod
    def exact(cls, usage: Mapping[str, Any]) -> Usage | None:
        """From one that has the three counts that clients read, as whole numbers; None for any other."""
        if not is_exact(usage):
            return None
        taken, made = usage["prompt_tokens"], usage["completion_tokens"]
        return cls(taken, made) if 0 <= taken <= TOKENS_MAX and 0 <= made <= TOKENS_MAX else None


def is_exact(usage: Mapping[str, Any]) -> bool:
    """Whether a `usage` object has the three counts that clients read, as whole numbers."""
    return (
        type(usage.get("prompt_tokens")) is int
        and type(usage.get("completion_tokens")) is int
        and type(usage.get("total_tokens")) is int
    )


def told_usage(usage: dict[str, Any], read: Usage) -> dict[str, Any]:
    """A `usage` object as clients are told it: the very one where that is exact."""
    if is_exact(usage):
        return usage
    kept = {name: value for name, value in usage.items() if value is not None and name not in OTHER_NAMES}
    total = read.input_tokens + read.output_tokens
    return {
        **kept, "prompt_tokens": read.input_tokens, "completion_tokens": read.output_tokens, "total_tokens": total,
    }  # fmt: skip


def read_object(text: bytes) -> dict[str, Any]:
    """What has been recognised before as an object."""
    value: dict[str, Any] = orjson.loads(text)
    return value


class Event(Struct, gc=False):
    """One streamed chunk in OpenAI's chat form: the frame as it goes out, and what it says."""

    raw: bytes
    json: dict[str, Any] | bytes  # as text until somebody looks into it
    text: str | None = None  # where it says nothing else
    ending: str | None = None  # how the answer ended, where it says nothing else

    @property
    def chunk(self) -> dict[str, Any]:
        json = self.json
        if isinstance(json, bytes):
            json = self.json = read_object(json)
        return json

    @property
    def choice(self) -> dict[str, Any]:
        """The first one; empty where there is none."""
        choices = self.chunk.get("choices")
        return choices[0] if choices else {}

    @property
    def delta(self) -> dict[str, Any]:
        """What it says; empty where that is nothing."""
        if self.text is not None:
            return {"content": self.text}
        return {} if self.ending is not None else self.choice.get("delta") or {}

    @property
    def finish(self) -> str | None:
        """Why the answer ended with it."""
        if self.text is not None or self.ending is not None:
            return self.ending
        finish: str | None = self.choice.get("finish_reason")
        return finish


class Completion(Struct, gc=False):
    """One whole answer in OpenAI's chat form: the body as it goes out, and what it says."""

    raw: bytes
    json: dict[str, Any] | bytes  # as text until somebody looks into it

    @property
    def body(self) -> dict[str, Any]:
        json = self.json
        if isinstance(json, bytes):
            json = self.json = read_object(json)
        return json


class Tally(Struct):
    """What an answer has amounted to so far; whoever relays it keeps count here."""

    finish: str | None = None
    usage: Usage | None = None
    usage_object: dict[str, Any] | None = None  # as the provider gave it
    usage_raw: bytes | None = None  # the provider's own event for usage alone
    head: dict[str, Any] = {}  # a chunk to take id, created and model from
    text_chars: int = 0
    has_text: bool = False  # other than white space; reasoning and refusals count
    has_tool_calls: bool = False
    malformed: int = 0  # events that were not JSON and were skipped

    @property
    def empty(self) -> bool:
        """Whether nothing was said, and nothing but itself kept the model from saying it (SPEC 5.2)."""
        return not (self.has_text or self.has_tool_calls or self.finish in CUT_OFF)

    def note_usage(self, usage: object) -> None:
        if (read := Usage.read(usage)) is not None and isinstance(usage, dict):
            self.usage, self.usage_object = read, told_usage(usage, read)

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

    def fail(self, error: GatewayError, tally: Tally) -> bytes | None:
        """The last bytes of a stream that broke: an unfinished answer never ends like a finished one. None where the
        client is told best by closing the connection."""

    def heartbeat(self) -> bytes:
        """What keeps the connection alive while there is nothing to say (SPEC 8.3)."""

    def resumed(self, label: str) -> bytes:
        """That another route, `platform/model`, goes on with the answer (SPEC 14.8); empty where no client reads it."""


@dataclass(frozen=True, slots=True)
class LocalRoute:
    """An endpoint that a dialect answers by itself, without a provider."""

    method: str
    path: str  # with {parameters} as in Starlette's routes
    # Parameters of path and query, body, UTC seconds, and whose key it came with (None: the gateway's own): JSON.
    answer: Callable[[Mapping[str, str], bytes, float, int | None], bytes]
    keyless: bool = False  # open to everyone


class Dialect(Protocol):
    """One API that clients speak."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that requests are POSTed to."""

    @property
    def id_headers(self) -> tuple[bytes, ...]:
        """The headers in which a response tells the request's id."""

    def is_spoken(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request to a path beside `paths` comes from a client of this dialect."""

    def status(self, error: GatewayError) -> int:
        """The status of an error response."""

    def error(self, error: GatewayError, request_id: str) -> bytes:
        """The body of an error response."""

    def extra_routes(self) -> Sequence[LocalRoute]:
        """Endpoints beside `paths`."""

    def parse(self, raw: bytes, now: float, client: int | None = None) -> Chat:
        """`client`: whose key it came with; None is the gateway's own. Raises InvalidRequest naming the field."""

    def encoder(self, chat: Chat, now: float) -> Encoder: ...


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


def flat_text(content: object) -> str:
    """The text of a message's content, parts joined by line ends."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if isinstance(part, dict) and part.get("type") == "text")
    return ""
