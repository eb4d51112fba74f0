"""Chunks and answers that are nothing but text go out without a closer look: what the client gets, and what is
counted, is what a closer look would have made of them."""

import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import World

from adapters.openai import ChunkMender, OpenAIAdapter
from adapters.plain import plain_answer, plain_chunk
from adapters.stream import Incoming, whole_reply
from dialects.chat import chat_from
from protection import UpstreamError
from wire.chat import Tally, chunk_head

ROUTE = World({}).route(1)
ASKED = {"messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHATS = [chat_from(ASKED), chat_from({**ASKED, "tools": [TOOL]})]

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
USAGES = st.sampled_from(
    [
        None, {}, USAGE, {**USAGE, "prompt_tokens_details": {"cached_tokens": 1}}, {**USAGE, "cost": 0.5},
        {"input_tokens": 3, "output_tokens": 2}, {**USAGE, "completion_tokens": -1}, {**USAGE, "prompt_tokens": 10**12},
        {**USAGE, "prompt_tokens": -1, "completion_tokens": -1},
        {**USAGE, "total_tokens": "5"}, {**USAGE, "deep": [[1]]}, {**USAGE, "prompt_tokens": None}, 5,
    ]
)  # fmt: skip
TEXTS = st.sampled_from(
    [
        "", " ", "word", " a\n", "<think>", "<", "</think>", "a</think>b", "[", "日本", "\ud83d\ude00", "\0", "{",
        '{"name": "f", "arguments": {}}', None, 5, ["a"],
    ]
)  # fmt: skip
FINISHES = st.sampled_from([None, "stop", "length", "tool_calls", "content_filter", "error", "eos", "", 5])
HEAD = {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "m"}
HEADS = st.sampled_from([HEAD, {}, {**HEAD, "id": 5}, {**HEAD, "created": 7.5}, {**HEAD, "id": None}, {"model": "m"}])
BESIDE = st.sampled_from(
    [{}, {"system_fingerprint": None}, {"provider": "p"}, {"obfuscation": "x"}, {"error": {"message": "no"}}, {"x": 1}]
)
DELTAS = st.fixed_dictionaries(
    {},
    optional={
        "content": TEXTS, "role": st.sampled_from(["assistant", None, ""]), "refusal": st.sampled_from([None, "no"]),
        "reasoning_content": st.sampled_from(["because", None, ""]), "function_call": st.sampled_from([None, {}]),
        "tool_calls": st.sampled_from(
            [None, [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}], []]
        ),
    },
)  # fmt: skip
CHOICES = st.fixed_dictionaries(
    {"index": st.sampled_from([0, 1])},
    optional={"delta": DELTAS | st.none(), "finish_reason": FINISHES, "logprobs": st.sampled_from([None, {}])},
)
PLAIN_CHOICES = st.builds(
    lambda delta, finish: {"index": 0, "delta": delta, "finish_reason": finish},
    st.fixed_dictionaries(
        {}, optional={"content": TEXTS, "role": st.just("assistant"), "tool_calls": st.none(), "refusal": st.none()}
    ),
    st.sampled_from([None, None, None, "stop", "length"]),
)
CHUNKS = st.builds(
    lambda head, beside, choices, usage: {**head, **beside, "choices": choices, "usage": usage},
    st.just(HEAD) | HEADS, st.just({}) | BESIDE, st.lists(PLAIN_CHOICES | CHOICES, max_size=2), st.none() | USAGES,
)  # fmt: skip


class Thorough(ChunkMender):
    """Looks closely at every chunk."""

    def recognised(self, raw: bytes, payload: bytes) -> None:
        return None


class ThoroughAdapter(OpenAIAdapter):
    """Looks closely at every answer."""

    def plain_answer(self, raw, chat):
        return None


def read(mender: type[ChunkMender], chat, whole_calls: bool, reads: list[bytes]) -> object:
    """All that a stream amounts to."""
    tally = Tally()
    incoming = Incoming(mender(tally, chat, whole_calls=whole_calls), tally, ROUTE, 0.0, is_sse=True)
    told = []
    for data in reads:
        events, meaningful = incoming.feed(data)
        told.append(([(e.raw, e.chunk, e.delta.get("content"), e.finish) for e in events], meaningful))
        told.append((incoming.finishing, incoming.holding, incoming.done, incoming.progressed))
    events, meaningful = incoming.flush()
    told.append(([(e.raw, e.chunk) for e in events], meaningful))
    return told, counted(tally), wrong(incoming.error), wrong(incoming.ending())


def counted(tally: Tally) -> object:
    return (
        tally.finish, tally.usage, tally.usage_object, tally.usage_raw, chunk_head(tally.head), tally.text_chars,
        tally.has_text, tally.has_tool_calls, tally.malformed,
    )  # fmt: skip


def wrong(error: UpstreamError | None) -> object:
    return None if error is None else (error.failure, error.message)


@settings(max_examples=1500)
@given(st.lists(CHUNKS, min_size=1, max_size=6), st.booleans(), st.sampled_from(CHATS), st.booleans(), st.booleans())
def test_a_stream_is_the_same_whether_its_chunks_were_recognised_or_looked_at(chunks, done, chat, whole_calls, at_once):
    frames = [b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks]
    reads = [*frames, b"data: [DONE]\n\n"] if done else frames
    reads = [b"".join(reads)] if at_once else reads

    assert read(ChunkMender, chat, whole_calls, reads) == read(Thorough, chat, whole_calls, reads)


ANSWERS = st.builds(
    lambda head, beside, message, finish, index, usage: {
        **head, **beside, "usage": usage,
        "choices": [{"index": index, "message": message, "finish_reason": finish, "logprobs": None}],
    },
    st.just({**HEAD, "object": "chat.completion"}) | HEADS, st.just({}) | BESIDE,
    st.fixed_dictionaries(
        {"role": st.sampled_from(["assistant", None]), "content": TEXTS},
        optional={
            "annotations": st.sampled_from([[], None, [{}]]), "refusal": st.sampled_from([None, "no"]),
            "reasoning_content": st.sampled_from([None, "because"]), "function_call": st.none(),
            "tool_calls": st.sampled_from([None, []]),
        },
    ),
    st.just("stop") | FINISHES, st.sampled_from([0, None]), st.just(USAGE) | USAGES,
)  # fmt: skip


def whole(adapter: OpenAIAdapter, raw: bytes) -> object:
    try:
        reply = whole_reply(raw, adapter, CHATS[0], ROUTE, 0.0)
    except UpstreamError as error:
        return wrong(error)
    assert reply.completion is not None
    return reply.completion.raw, reply.completion.body, counted(reply.tally)


@settings(max_examples=1000)
@given(ANSWERS)
def test_an_answer_is_the_same_whether_it_was_recognised_or_looked_at(answer):
    raw = json.dumps(answer).encode()

    assert whole(OpenAIAdapter(), raw) == whole(ThoroughAdapter(), raw)


PLAIN_CHUNK = {**HEAD, "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}], "usage": None}
PLAIN_ANSWER = {
    **HEAD, "object": "chat.completion", "usage": USAGE,
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}],
}  # fmt: skip


def test_what_most_platforms_send_is_recognised():
    assert plain_chunk(orjson.dumps(PLAIN_CHUNK)) is not None
    assert plain_chunk(orjson.dumps({**PLAIN_CHUNK, "choices": [], "usage": USAGE})) is not None
    told_all = {"role": "assistant", "content": "a", "reasoning_content": None, "tool_calls": None}
    assert plain_chunk(orjson.dumps({**PLAIN_CHUNK, "choices": [{"index": 0, "delta": told_all}]})) is not None
    assert plain_answer(orjson.dumps(PLAIN_ANSWER)) is not None


@pytest.mark.parametrize("text", [b"\xff", b"\\ud83d", b"\x00", b"a\nb", b'"'])
def test_bytes_that_are_no_json_are_looked_at(text):
    for read_plain, like in ((plain_chunk, PLAIN_CHUNK), (plain_answer, PLAIN_ANSWER)):
        raw = orjson.dumps(like).replace(b'"a"', b'"%b"' % text)

        assert read_plain(raw) is None
