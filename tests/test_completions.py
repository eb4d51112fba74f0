"""SPEC 17.2: legacy completions, through chat models and through platforms' own endpoints."""

import json

import pytest
from conftest import IN_ORDER, Answer, Stream, assert_error, both_ways, case
from fake_provider import (
    CUT,
    DONE,
    ROLE,
    STOP,
    Reply,
    Request,
    body,
    chunk,
    completion,
    error,
    sse,
    usage_chunk,
    usage_of,
)
from strict_models import models

OWN = {"id": "cmpl-fake", "object": "text_completion", "created": 1_700_000_000, "model": "provider-own-name"}


def text_chunk(text: str, finish: str | None = None) -> dict:
    return OWN | {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]}


def own_endpoint(text: str = "hello"):
    """A platform's own endpoint for completions, and only that."""

    def reply(request: Request) -> Reply:
        if not request.path.endswith("/v1/completions"):
            return error(404)
        if not request.streaming:
            return body(text_chunk(text, "stop") | {"usage": usage_of(11, 7)})
        usage = OWN | {"choices": [], "usage": usage_of(11, 7)}
        return sse(*(text_chunk(piece) for piece in text), text_chunk("", "stop"), usage)

    return reply


async def post(gateway, headers=None, **fields) -> Answer:
    request = {"model": IN_ORDER, "prompt": "def f(x):"} | fields
    sent = {name: value for name, value in request.items() if value is not ...}
    return await gateway.send(sent, path="/v1/completions", headers=headers)


def stream_of(got: Answer) -> Stream:
    stream = Stream(got.status, got.headers, got.body)
    stream.assert_done_once()
    for told in stream.chunks:
        if "error" not in told and told["choices"] and told["choices"][0]["finish_reason"] != "error":
            assert_completion(told, streamed=True)
    return stream


def assert_completion(told: dict, *, streamed: bool = False) -> None:
    """By the openai client's own model, which wants an end in every chunk but gets none."""
    choice = told["choices"][0]
    finished = choice | {"finish_reason": choice["finish_reason"] or "stop"} if streamed else choice
    models().Completion.model_validate_json(json.dumps(told | {"choices": [finished]}), strict=True)
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason"}


def text_of(stream: Stream) -> str:
    return "".join(c["text"] for told in stream.chunks for c in told.get("choices", []))


async def test_a_chat_model_continues_the_prompt(start_gateway, fake):
    gateway = await start_gateway()

    got = await post(gateway, max_tokens=50, temperature=0, stop=["\n\n"], user="u")

    assert_completion(got.json)
    assert got.json["object"] == "text_completion"
    assert got.json["choices"] == [{"index": 0, "text": "hello from a", "logprobs": None, "finish_reason": "stop"}]
    assert got.json["usage"] == usage_of(11, 7)
    assert got.headers["X-Routed-Via"] == "a/a-model"
    sent = fake.requests[0].json
    assert fake.requests[0].path.endswith("/chat/completions")
    assert sent["messages"][-1] == {"role": "user", "content": "def f(x):"}
    assert (sent["max_tokens"], sent["temperature"], sent["stop"]) == (50, 0, ["\n\n"])
    assert not {"prompt", "suffix"} & sent.keys()
    row = await gateway.row()
    assert (row["status"], row["requested_model"], row["output_tokens"]) == ("success", IN_ORDER, 7)


async def test_the_openai_client_streams(start_gateway, fake):
    gateway = await start_gateway()
    asked = {"model": IN_ORDER, "prompt": "Once upon", "stream_options": {"include_usage": True}}

    stream = await gateway.openai.completions.create(**asked, stream=True)
    chunks = [told async for told in stream]

    assert "".join(told.choices[0].text for told in chunks if told.choices) == "hello from a"
    assert [told.choices[0].finish_reason for told in chunks if told.choices][-1] == "stop"
    assert chunks[-1].usage.total_tokens == 18
    whole = await gateway.openai.completions.create(model=IN_ORDER, prompt=["Once upon"])
    assert whole.choices[0].text == "hello from a"


async def test_a_stream_is_text_in_chunks_of_one_identity(start_gateway, fake):
    gateway = await start_gateway()
    thoughts = chunk(reasoning_content="Hm.")
    fake.script("a", sse(ROLE, thoughts, chunk("Hel"), chunk("lo"), STOP, usage_chunk()))

    stream = stream_of(await post(gateway, stream=True))

    assert text_of(stream) == "Hello"
    assert {(told["id"], told["model"], told["object"]) for told in stream.chunks} == {
        ("chatcmpl-fake", "provider-own-name", "text_completion")
    }
    assert [told["choices"][0]["finish_reason"] for told in stream.chunks] == [None, None, "stop"]
    assert not any("usage" in told for told in stream.chunks)


@both_ways
async def test_a_suffix_reaches_a_chat_model_as_the_other_side_of_a_gap(start_gateway, fake, streaming):
    gateway = await start_gateway()

    await post(gateway, prompt="def f(", suffix="):\n    pass", stream=streaming)

    assert fake.requests[0].json["messages"][-1]["content"] == "def f(<GAP/>):\n    pass"


@both_ways
@pytest.mark.parametrize("marked", ["platform", "model"])
async def test_a_platform_with_such_an_endpoint_gets_the_prompt_as_it_is(start_gateway, fake, streaming, marked):
    options = {"completions": True} if marked == "platform" else {"model": {"completions": True}}
    gateway = await start_gateway({"a": options, "b": {}})
    fake.script("a", own_endpoint())

    got = await post(gateway, suffix="return x", max_tokens=9, logprobs=1, echo=False, best_of=1, stream=streaming)

    assert fake.requests[0].path.endswith("/a/v1/completions")
    sent = fake.requests[0].json
    assert {name: sent.get(name) for name in ("model", "prompt", "suffix", "max_tokens", "logprobs")} == {
        "model": "a-model", "prompt": "def f(x):", "suffix": "return x", "max_tokens": 9, "logprobs": 1
    }  # fmt: skip
    assert not {"messages", "echo", "best_of"} & sent.keys()
    if streaming:
        stream = stream_of(got)
        assert text_of(stream) == "hello"
        assert stream.chunks[0]["id"] == "cmpl-fake"
    else:
        assert_completion(got.json)
        assert (got.json["choices"][0]["text"], got.json["usage"]) == ("hello", usage_of(11, 7))
    row = await gateway.row()
    assert (row["status"], row["input_tokens"], row["output_tokens"]) == ("success", 11, 7)


async def test_an_endpoint_that_knows_no_suffix_is_asked_in_chat_where_there_is_one(start_gateway, fake):
    gateway = await start_gateway({"a": {"completions": True, "quirks": {"no_suffix": True}}})

    await post(gateway, suffix="return x")
    fake.script("a", own_endpoint())
    await post(gateway)

    paths = [request.path.removeprefix("/a/v1") for request in fake.requests]
    assert paths == ["/chat/completions", "/completions"]


@both_ways
async def test_a_chat_request_never_goes_to_that_endpoint(start_gateway, fake, streaming):
    gateway = await start_gateway({"a": {"completions": True}})

    assert (await gateway.ask(streaming=streaming)).text == "hello from a"

    assert fake.requests[0].path.endswith("/chat/completions")


@both_ways
async def test_the_next_route_answers_whatever_form_it_speaks(start_gateway, fake, streaming):
    gateway = await start_gateway({"a": {"completions": True}, "b": {}, "c": {"completions": True}})
    fake.script("a", error(500))
    fake.script("b", sse(ROLE, CUT) if streaming else error(404))
    fake.script("c", own_endpoint("fine"))

    got = await post(gateway, stream=streaming)

    assert (text_of(stream_of(got)) if streaming else got.json["choices"][0]["text"]) == "fine"
    assert fake.called == ["a", "b", "c"]


async def test_an_answer_that_breaks_ends_with_an_error(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(ROLE, chunk("half"), CUT))

    stream = stream_of(await post(gateway, stream=True))

    assert text_of(stream) == "half"
    *_, told, last = stream.chunks
    assert told.keys() == {"error"}
    assert told["error"]["type"] == "stream_error"
    assert last["choices"][0]["finish_reason"] == "error"


async def test_an_answer_that_breaks_at_an_endpoint_for_prompts_is_continued_in_chat(start_gateway, fake):
    platforms = {"a": {"completions": True}, "b": {"completions": True, "prefill": "plain"}}
    gateway = await start_gateway(platforms, {"RESCUE": "on"})
    words = "The quick brown fox jumps over the lazy dog and runs into the forest."
    fake.script("a", sse(text_chunk(words[:40]), CUT))

    def goes_on(request: Request) -> Reply:
        given = request.json["messages"][-1]
        assert given["role"] == "assistant" and words.startswith(given["content"])
        return sse(ROLE, chunk(words[len(given["content"]) :]), STOP)

    fake.script("b", goes_on)

    stream = stream_of(await post(gateway, prompt="Once upon a time.", stream=True))

    assert text_of(stream) == words
    assert fake.requests[1].path.endswith("/chat/completions")


REFUSED = {
    "no prompt": ({"prompt": ...}, "prompt"),
    "null": ({"prompt": None}, "prompt"),
    "an empty one": ({"prompt": ""}, "prompt"),
    "two": ({"prompt": ["a", "b"]}, "prompt"),
    "an empty list": ({"prompt": []}, "prompt"),
    "tokens": ({"prompt": [1, 2, 3]}, "prompt"),
    "lists of tokens": ({"prompt": [[1, 2]]}, "prompt"),
    "a number": ({"prompt": 7}, "prompt"),
    "two answers": ({"n": 2}, "n"),
    "the best of two": ({"best_of": 2}, "best_of"),
    "an echo": ({"echo": True}, "echo"),
    "a suffix that is none": ({"suffix": 7}, "suffix"),
    "a limit that is none": ({"max_tokens": "many"}, "max_tokens"),
    "no JSON": (b"{", None),
}


async def test_what_is_not_served_is_refused_with_the_name_of_the_field(start_gateway, fake):
    gateway = await start_gateway()
    for name, (fields, param) in REFUSED.items():
        with case(name):
            if isinstance(fields, bytes):
                got = await gateway.send(fields, path="/v1/completions")
            else:
                got = await post(gateway, **fields)
            assert got.status == 400
            assert (got.error["type"], got.error["param"]) == ("invalid_request_error", param)
    assert_error(await post(gateway, model="unknown"), 400, "invalid_request_error", "model_not_found")
    assert fake.called == []


async def test_a_suffix_alone_is_a_prompt_at_the_head_of_a_file(start_gateway, fake):
    gateway = await start_gateway()

    assert (await post(gateway, prompt="", suffix="print(x)")).status == 200


async def test_other_spellings_of_the_address_are_known(start_gateway, fake):
    gateway = await start_gateway()
    for path in ("/completions", "/v1/v1/completions", "/v1/completions/"):
        got = await gateway.send({"model": IN_ORDER, "prompt": "x"}, path=path)
        assert got.status == 200, path
    assert DONE not in got.body
    fake.script("a", completion(None, message={"refusal": "No."}))
    assert (await post(gateway)).json["choices"][0]["text"] == "No."


async def test_a_completion_and_a_chat_of_the_same_words_are_two_requests(start_gateway, fake):
    gateway = await start_gateway({"a": {"completions": True}}, {"CACHE_MB": "1"})
    fake.script("a", own_endpoint("from memory"), error(500))

    answers = [await post(gateway, stream=streaming) for streaming in (False, False, True)]

    assert [got.headers["X-Cache"] for got in answers[1:]] == ["hit", "hit"]
    assert answers[1].json["choices"][0]["text"] == text_of(stream_of(answers[2])) == "from memory"
    assert (await post(gateway, prompt="something else")).status >= 500
