"""What a platform gave out for itself goes back to it, and once more without when it refuses that (issue 13)."""

import pytest
from conftest import both_ways
from fake_provider import answer, chunk, completion, error, sse
from wires import SIGNATURE, Gemini, Said

from adapters.gemini import UNSIGNED

DETAILS = [{"type": "reasoning.encrypted", "data": "c2VjcmV0", "index": 0}]
EXTRA = {"vendor": {"thought_signature": "c2ln"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WANTED = {"replay_fields": ["reasoning_details", "extra_content"]}


def history(**fields: object) -> list[dict]:
    return [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL | {"extra_content": EXTRA}], **fields},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]


def sent(request) -> tuple[object, object]:
    """What of it stands in the request: in the message, in its call."""
    message = request.json["messages"][1]
    return message.get("reasoning_details"), message["tool_calls"][0].get("extra_content")


QUIRKS = {
    "wanted": (WANTED, (DETAILS, EXTRA)),
    "wanted by a strict server": (WANTED | {"standard_fields_only": True}, (DETAILS, EXTRA)),
    "one of them wanted": ({"replay_fields": ["extra_content"]}, (None, EXTRA)),
    "not wanted": ({}, (None, None)),
}


@both_ways
@pytest.mark.parametrize(("quirks", "expected"), QUIRKS.values(), ids=QUIRKS)
async def test_a_platform_gets_back_what_it_wants_back(start_gateway, fake, quirks, expected, streaming):
    gateway = await start_gateway({"a": {"quirks": quirks}})

    got = await gateway.ask(streaming=streaming, messages=history(reasoning_details=DETAILS), tools=[TOOL])

    assert got.text == "hello from a"
    assert sent(fake.requests[0]) == expected


@both_ways
@pytest.mark.parametrize("status", [400, 422])
async def test_when_it_refuses_them_it_is_asked_once_more_without(start_gateway, fake, status, streaming):
    gateway = await start_gateway({"a": {"quirks": WANTED}, "b": {}})
    fake.script("a", error(status, "reasoning_details: invalid signature"), answer("understood"))

    got = await gateway.ask(streaming=streaming, messages=history(reasoning_details=DETAILS), tools=[TOOL])

    assert got.text == "understood"
    assert [sent(request) for request in fake.requests] == [(DETAILS, EXTRA), (None, None)]
    assert "X-Fallback-Attempts" not in got.headers
    assert len(await gateway.rows_of(got, 1)) == 1


async def test_a_second_refusal_is_believed(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": WANTED}, "b": {}})
    fake.script("a", error(400, "no"))

    got = await gateway.chat(messages=history(reasoning_details=DETAILS), tools=[TOOL])

    assert got.text == "hello from b"
    assert fake.called == ["a", "a", "b"]


@pytest.mark.parametrize("status", [401, 429, 500])
async def test_other_failures_are_not_asked_again(start_gateway, fake, status):
    gateway = await start_gateway({"a": {"quirks": WANTED}, "b": {}})
    fake.script("a", error(status, "no"))

    await gateway.chat(messages=history(reasoning_details=DETAILS), tools=[TOOL])

    assert fake.called == ["a", "b"]


async def test_a_request_without_them_is_not_asked_again(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": WANTED}, "b": {}})
    fake.script("a", error(400, "no"))

    await gateway.chat()

    assert fake.called == ["a", "b"]


@both_ways
async def test_what_a_platform_gives_out_reaches_the_client(start_gateway, fake, streaming):
    gateway = await start_gateway({"a": {"quirks": WANTED}})
    call = {"index": 0, **CALL, "extra_content": EXTRA}
    whole = completion(None, message={"reasoning_details": DETAILS, "tool_calls": [call]}, finish="tool_calls")
    stream = sse(chunk(reasoning_details=DETAILS), chunk(tool_calls=[call]), chunk(finish="tool_calls"))
    late = {"index": 0, "extra_content": EXTRA}
    later = sse(
        chunk(reasoning_details=DETAILS), chunk(tool_calls=[{"index": 0, **CALL}]), chunk(tool_calls=[late]),
        chunk(finish="tool_calls"),
    )  # fmt: skip
    for reply in (stream, later) if streaming else (whole,):
        fake.script("a", reply)
        got = await gateway.ask(streaming=streaming, tools=[TOOL])
        told = got.deltas if streaming else [got.json["choices"][0]["message"]]
        assert [delta["reasoning_details"] for delta in told if "reasoning_details" in delta] == [DETAILS]
        (made,) = got.calls if streaming else told[0]["tool_calls"]
        assert made["extra_content"] == EXTRA


@both_ways
async def test_a_refused_signature_of_the_other_wire_is_left_out(start_gateway, fake, streaming):
    gateway = await start_gateway({"google": Gemini().options(fake), "b": {}})
    fake.script("google", Gemini().error(400, "Corrupted thought signature."), Gemini().says(Said("understood")))
    call = CALL | {"extra_content": {"google": {"thought_signature": SIGNATURE}}}
    messages = history()
    messages[1]["tool_calls"] = [call]

    got = await gateway.ask(streaming=streaming, messages=messages, tools=[TOOL])

    assert got.text == "understood"
    parts = [request.json["contents"][1]["parts"][0]["thoughtSignature"] for request in fake.requests]
    assert parts == [SIGNATURE, UNSIGNED]
