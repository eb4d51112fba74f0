"""Whatever bytes or JSON come in, from a client or from a provider: a clear verdict, never a crash."""

from itertools import pairwise

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import World

from adapters import errors as faults
from adapters import waits
from adapters.answers import note_completion
from adapters.chunks import as_chunks
from adapters.openai import OpenAIAdapter
from adapters.stream import Incoming
from dialects.chat import chat_from
from dialects.responses import ResponsesDialect
from protection import Failure, UpstreamError, classify
from wire.chat import Tally
from wire.errors import GatewayError, InvalidRequest
from wire.jsontext import load_object
from wire.sse import EventTooLarge, SSEDecoder

NAMES = st.sampled_from(
    [
        "id", "model", "choices", "index", "delta", "message", "content", "role", "tool_calls", "function", "name",
        "arguments", "finish_reason", "usage", "prompt_tokens", "completion_tokens", "error", "errors", "code",
        "status", "type", "text", "detail", "metadata", "raw", "success", "messages", "tools", "stream", "stop", "n",
        "max_tokens", "response_format", "json_schema", "image_url", "url", "reasoning", "reasoning_content", "x_y",
        "stream_options", "tool_choice", "parameters", "tool_call_id", "function_call", "refusal", "retry_after",
    ]
)  # fmt: skip
WORDS = st.sampled_from(
    ["", " ", "user", "assistant", "tool", "stop", "length", "error", "429", "NaN", "RESOURCE_EXHAUSTED", "{}", '"{}"',
     "text", "image_url", "input_audio", "function", "true", "1e400", "json_schema", "x" * 50, "é", "\u2028", "\x00"]
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | WORDS
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5), max_leaves=25
)
OBJECTS = st.dictionaries(NAMES, JSON, max_size=6)


TOOLS = [{"type": "function", "function": {"name": "text", "parameters": {"type": "object"}}}]
CHAT = chat_from({"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS})
ROUTE = World({}).route(1)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@given(st.lists(OBJECTS, max_size=8), st.lists(st.integers(0, 5000), max_size=12), st.booleans())
def test_a_stream_cut_anywhere_gives_the_same_events(chunks, cuts, crlf):
    end = b"\r\n\r\n" if crlf else b"\n\n"
    stream = b": hello" + end + b"".join(b"data: " + orjson.dumps(chunk) + end for chunk in chunks)
    decoder = SSEDecoder()

    got = [event for piece in pieces(stream, cuts) for event in decoder.feed(piece)] + decoder.flush()

    assert [orjson.loads(data) for _, data, _ in got] == chunks
    assert b"".join(raw for raw, _, _ in got) == stream[len(b": hello" + end) :]


BITS = [
    b"\n\n",
    b"\n",
    b"\r\n",
    b"\r",
    b"data:",
    b"data: ",
    b": c",
    b"x",
    b"event: a",
    b"{}",
    b"\xf0\x9f",
    b"\xe2\x80\xa8",
]


@settings(max_examples=400)
@given(st.lists(st.sampled_from(BITS) | st.binary(max_size=3), max_size=30), st.lists(st.integers(0, 200), max_size=12))
def test_any_bytes_are_the_same_events_however_they_are_cut(bits, cuts):
    stream = b"".join(bits)
    at_once, in_pieces = SSEDecoder(), SSEDecoder()

    expected = at_once.feed(stream) + at_once.flush()

    assert [e for piece in pieces(stream, cuts) for e in in_pieces.feed(piece)] + in_pieces.flush() == expected


BETWEEN = st.sampled_from(
    [b"", b"\n", b"\r\n", b": c\n\n", b": c\r\n\r\n", b"event: ping\n\n", b"id: 1\n\n", b"noise\n\n"]
)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(BETWEEN, OBJECTS, st.sampled_from([b"\n\n", b"\r\n\r\n"])), max_size=8),
    st.lists(st.integers(0, 5000)),
)
def test_what_stands_between_events_and_how_lines_end_changes_nothing(events, cuts):
    stream = b"".join(between + b"data: " + orjson.dumps(chunk) + end for between, chunk, end in events)
    decoder = SSEDecoder()

    got = [event for piece in pieces(stream, cuts) for event in decoder.feed(piece)] + decoder.flush()

    assert [orjson.loads(data) for _, data, _ in got] == [chunk for _, chunk, _ in events]


@given(st.lists(OBJECTS, max_size=6))
def test_any_events_end_in_an_answer_or_in_a_named_failure(chunks):
    tally = Tally()
    incoming = Incoming(OpenAIAdapter().translator(tally, CHAT), tally, ROUTE, 0.0, is_sse=True)

    incoming.feed(b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks))
    error = incoming.error or incoming.ending()

    assert error is None or (isinstance(error, UpstreamError) and error.failure in Failure)


def text_chunk(text: str, **more: object) -> bytes:
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return orjson.dumps({**head, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more})


TEXTS = st.text(max_size=12) | st.sampled_from(['"', "\\", '","x":"', '"content"', "<think>", "{}", "\u2028", "🙂", ""])
ODD_CHUNKS = st.sampled_from(
    [
        b"{", b'{"id":"c1"}', text_chunk("other", id="c2"), text_chunk("and", usage={"completion_tokens": 1}),
        text_chunk("more", error=None), text_chunk("x", choices=[]),
        text_chunk("half").replace(b'"half"', b'"\\ud83d"'),
        text_chunk("no").replace(b'"no"', b"null"), text_chunk("list").replace(b'"list"', b'["a"]'),
        text_chunk("two").replace(b'"two"', b'"a","role":"assistant"'),
        text_chunk("quote").replace(b'"quote"', b'"'),
        text_chunk("none").replace(b'"none"', b'"a","b"'), text_chunk("open").replace(b'"open"', b'"a\\"'),
    ]
)  # fmt: skip
ENDS = st.sampled_from([b"\n\n", b"\r\n\r\n"])
LEADS = st.sampled_from([b"data: ", b"data:", b": ping\ndata: ", b"id: 7\nevent: x\ndata: "])
NO_TOOLS = chat_from({"messages": [{"role": "user", "content": "hi"}]})


@given(st.lists(TEXTS.map(text_chunk) | ODD_CHUNKS, max_size=15), st.lists(st.integers(0, 15)), ENDS, LEADS)
def test_events_that_are_read_together_mean_what_each_means_alone(payloads, cuts, end, lead):
    frames = [lead + payload + end for payload in payloads]
    bounds = sorted({0, len(frames), *(min(cut, len(frames)) for cut in cuts)})
    together = [b"".join(frames[start:stop]) for start, stop in pairwise(bounds)]

    def read(stream: list[bytes]) -> tuple[bytes, str, Tally]:
        tally, events = Tally(), []
        incoming = Incoming(OpenAIAdapter().translator(tally, NO_TOOLS), tally, ROUTE, 0.0, is_sse=True)
        for data in stream:
            events += incoming.feed(data)[0]
        deltas = [event.chunk["choices"][0]["delta"] for event in events if event.chunk.get("choices")]
        return b"".join(event.raw for event in events), "".join(d.get("content") or "" for d in deltas), tally

    assert read(together) == read(frames)


@given(OBJECTS)
def test_any_body_is_an_answer_or_none(body):
    try:
        completion = OpenAIAdapter().completion(orjson.dumps(body), body, CHAT)
    except UpstreamError as error:
        assert error.failure in Failure
        return
    if completion is not None:
        note_completion(completion.body, Tally())
        as_chunks(completion.body)


@given(JSON)
def test_any_error_body_has_a_finite_status_and_words(body):
    fault = faults.read(body)

    assert fault.status is None or (isinstance(fault.status, int) and 100 <= fault.status <= 599)
    assert isinstance(fault.message, str)
    assert classify(fault.status or 200, fault.code, fault.message) in Failure
    retry = waits.retry_after_s(fault, {}, body, 1e9)
    assert retry is None or 0 <= retry <= waits.RETRY_AFTER_MAX_S


@given(OBJECTS)
def test_an_error_inside_a_200_is_found_or_not_but_never_breaks(body):
    faults.wrapped(body)


@settings(max_examples=300)
@given(OBJECTS)
def test_any_request_is_understood_or_refused_with_400(body):
    try:
        chat_from(body)
    except InvalidRequest as error:
        assert error.status == 400


ITEM_KINDS = ["message", "function", "custom", "namespace", "function_call", "reasoning", "function_call_output"]
ITEM_KINDS += ["item_reference", "input_text", "input_image", "json_schema", "allowed_tools", "auto"]
ITEM_NAMES = ["role", "content", "text", "id", "call_id", "name", "arguments", "output", "summary", "tools", "function"]
ITEM_NAMES += ["custom", "format", "schema", "json_schema", "image_url", "file_data", "mode", "effort", "namespace"]
ODD = st.sampled_from([None, True, 1, 1.5, "", "user", "c", [], [1], {}, {"type": [1]}])
PLAIN = st.fixed_dictionaries({"type": st.sampled_from(ITEM_KINDS) | ODD}, optional=dict.fromkeys(ITEM_NAMES[:12], ODD))
ITEM = st.dictionaries(st.sampled_from(ITEM_NAMES), ODD | PLAIN | st.lists(PLAIN, max_size=2), max_size=4)
TYPED = st.builds(lambda item, kind: item | {"type": kind}, ITEM, st.sampled_from(ITEM_KINDS) | ODD)
RESPONSE_FIELDS = st.fixed_dictionaries(
    {"input": st.just("hi") | st.lists(TYPED, min_size=1, max_size=3)},
    optional={
        "tools": st.lists(TYPED, max_size=3),
        **dict.fromkeys(("tool_choice", "text", "reasoning", "instructions", "metadata", "stream"), ODD | TYPED),
    },
)


@settings(max_examples=200)
@given(RESPONSE_FIELDS)
def test_any_response_request_is_answered_or_refused(request):
    dialect = ResponsesDialect(lambda: "0" * 48)
    try:
        chat = dialect.parse(orjson.dumps(request), 1e9)
    except InvalidRequest as error:
        assert error.status in (400, 422)
        return
    orjson.loads(dialect.encoder(chat, 1e9).end(Tally()).split(b"data: ")[-1])


@given(st.binary(max_size=200))
def test_any_request_bytes_are_an_object_or_refused_with_400(raw):
    try:
        load_object(raw)
    except GatewayError as error:
        assert error.status == 400


def test_an_event_without_end_is_refused_at_its_limit():
    decoder = SSEDecoder()
    try:
        for _ in range(2000):
            decoder.feed(b"x" * 1024)
    except EventTooLarge:
        return
    raise AssertionError("took more than 1 MiB for one event")
