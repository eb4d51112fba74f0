"""Every way in which a provider fails, as a reply and what it is called: the tables that several test modules play."""

from dataclasses import dataclass

from fake_provider import (
    CUT,
    NO_HTTP,
    PAUSE,
    PROMISED,
    RESET,
    ROLE,
    Every,
    Reply,
    body,
    chunk,
    chunked,
    completion,
    error,
    event,
    head,
    raw,
    sse,
)  # fmt: skip

TWO_KEYS = {"keys": ["sk-a-secret-0001", "sk-a-secret-0002"]}


UNSAID = -1


@dataclass(frozen=True)
class Failure:
    """A reply and its row of the table. A kind of None: the spec names none, any of the list will do."""

    reply: Reply
    kind: str | None
    http_status: int | None  # UNSAID: the spec says nothing about it
    cools: str | None = None  # "model", "key" or nothing
    next_key: bool = False  # the model's other key is tried before another model


def of_status(status: int, kind: str | None, cools: str | None = None, *, next_key: bool = False) -> Failure:
    return Failure(error(status), kind, status, cools, next_key)


HTML = {"content-type": "text/html"}
EITHER = {
    "500": of_status(500, "server_error", "model"),
    "502": of_status(502, "server_error", "model"),
    "503": of_status(503, "server_error", "model"),
    "504": of_status(504, "server_error", "model"),
    "529": of_status(529, "server_error", "model"),
    "a 500 that is HTML": Failure(body("<h1>oops</h1>", status=500, headers=HTML), "server_error", 500, "model"),
    "a 500 that talks of truncation": Failure(error(500, "output truncated"), "server_error", 500, "model"),
    "cut before any byte": Failure(raw(CUT), "connection", None, "model"),
    "reset before any byte": Failure(raw(RESET), "connection", None, "model"),
    "cut in the headers": Failure(raw(b"HTTP/1.1 200 OK\r\ncontent-ty", CUT), "connection", None, "model"),
    "reset in the headers": Failure(raw(b"HTTP/1.1 200 OK\r\ncontent-ty", RESET), "connection", None, "model"),
    "not HTTP at all": Failure(raw(b"220 mail.example ESMTP\r\n\r\n", CUT), None, None, "model"),
    "429": of_status(429, "rate_limited", "key", next_key=True),
    "401": of_status(401, "auth", None, next_key=True),
    "402": of_status(402, "out_of_credit", "key", next_key=True),
    "403": of_status(403, "forbidden", "key", next_key=True),
    "400": of_status(400, "bad_request"),
    "404": of_status(404, "not_found"),
    "409": of_status(409, None),
    "413": of_status(413, None),
    "422": of_status(422, "bad_request"),
    "418": of_status(418, None),
    "301": Failure(error(301, headers={"location": "/c/v1/chat/completions"}), None, 301),
    "307": Failure(error(307, headers={"location": "/c/v1/chat/completions"}), None, 307),
    "a 200 that is HTML": Failure(body("<html>hello</html>", headers=HTML), "malformed", 200),
    "a 200 that is an empty body": Failure(body(""), "malformed", 200),
    "a 400 that says truncated": Failure(error(400, "the response was truncated"), "truncated", 400),
    "context length exceeded": Failure(error(400, code="context_length_exceeded"), "context_length", 400),
}
CHUNKED = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
MIB = 1 << 20
WHOLE = {
    "no answer": Failure(raw(PAUSE), "timeout", UNSAID, "model"),
    "no end of the headers": Failure(raw(b"HTTP/1.1 200 OK\r\n", PAUSE), "timeout", UNSAID, "model"),
    "no end of the body": Failure(raw(PROMISED, b'{"id":', PAUSE), "timeout", UNSAID, "model"),
    "cut in the body": Failure(raw(PROMISED, b'{"id":', CUT), "connection", None, "model"),
    "reset in the body": Failure(raw(PROMISED, b'{"id":', RESET), "connection", None, "model"),
    "a body that stops being HTTP": Failure(raw(CHUNKED, NO_HTTP, PAUSE), "connection", None, "model"),
    "half a JSON object": Failure(body('{"id": "x", "choices": ['), "malformed", 200),
    "JSON nested too deeply": Failure(body('{"choices": ' + "[" * 100_000 + "]" * 100_000 + "}"), "malformed", 200),
    "JSON that is a list": Failure(body([1, 2]), None, 200),
    "JSON without choices": Failure(body({"id": "x"}), None, 200),
    "no choices": Failure(body({"choices": []}), "empty", 200),
    "choices of null": Failure(body({"choices": None}), "empty", 200),
    "an empty answer": Failure(completion(""), "empty", 200),
    "an answer of null": Failure(completion(None), "empty", 200),
    "an answer of white space": Failure(completion(" \n\t"), "empty", 200),
    "an answer with an empty list of tool calls": Failure(completion("", message={"tool_calls": []}), "empty", 200),
}
STREAMED = {
    "no answer": Failure(raw(PAUSE), "stall", UNSAID, "model"),
    "nothing after the headers": Failure(chunked(PAUSE), "stall", UNSAID, "model"),
    "nothing after the role": Failure(sse(ROLE, PAUSE), "stall", UNSAID, "model"),
    "nothing but comments": Failure(sse(Every(0.01, b": still working\n\n")), "timeout", UNSAID, "model"),
    "an event larger than 1 MiB": Failure(sse(chunk("x" * MIB)), "malformed", UNSAID),
    "a line without end": Failure(chunked(b"data: ", Every(0, bytes([120]) * MIB)), "malformed", UNSAID),
    "cut after the headers": Failure(chunked(CUT), "connection", None, "model"),
    "cut after the role": Failure(sse(ROLE, CUT), "connection", None, "model"),
    "reset after the role": Failure(sse(ROLE, RESET), "connection", None, "model"),
    "no HTTP after the role": Failure(sse(ROLE, NO_HTTP, PAUSE), "connection", None, "model"),
    "ended without an event": Failure(chunked(), "truncated", UNSAID),
    "ended after the role": Failure(sse(ROLE, done=False), "truncated", UNSAID),
    "only [DONE]": Failure(sse(), "empty", 200),
    "only a role and [DONE]": Failure(sse(ROLE), "empty", 200),
    "finished without text": Failure(sse(ROLE, chunk(finish="stop")), "empty", 200),
    "only white space": Failure(sse(ROLE, chunk(" \n"), chunk(finish="stop")), "empty", 200),
}

# What breaks a stream after its first token: its last step, what the client is told, and the kind in the log.
BREAKS = {
    "a cut": (CUT, "stream_error", "connection"),
    "a reset": (RESET, "stream_error", "connection"),
    "an error": (event({"error": {"message": "no luck", "code": 503}}), "stream_error", "server_error"),
    "an end without an end": (b": bye\n\n", "stream_error", "truncated"),
    "a stall": (PAUSE, "stream_timeout", "stall"),
}
