"""SPEC 9.5: a conversation becomes one item that only this gateway reads back; its input listed, its length told."""

import json

import pytest
from conftest import IN_ORDER, assert_error, both_ways, case
from fake_provider import CUT, answer, chunk, completion, error, sse
from strict_models import assert_event, assert_response

from dialects.compaction import ASKED_FOR, INTRODUCED, UNREADABLE

TALK = [
    {"role": "user", "content": [{"type": "input_text", "text": "build it"}]},
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "done"},
    {"role": "assistant", "content": [{"type": "output_text", "text": "It is built."}]},
]
TRIGGER = {"type": "compaction_trigger"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}


async def respond(gateway, *, path: str = "/v1/responses", **fields) -> dict:
    got = await gateway.send({"model": IN_ORDER, "input": TALK} | fields, path=path)
    assert got.status == 200, got.body
    return got.json


async def events_of(gateway, **fields) -> list[dict]:
    request = {"model": IN_ORDER, "input": TALK, "stream": True} | fields
    got = await gateway.send(request, path="/v1/responses")
    events = [json.loads(block.split("data: ", 1)[1]) for block in got.body.decode().strip().split("\n\n")]
    for event in events:
        assert_event(event)
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    return events


def compacted(output: list[dict]) -> dict:
    (item,) = output
    assert item.keys() == {"id", "type", "encrypted_content"}
    assert item["type"] == "compaction"
    return item


@pytest.fixture
async def gateway(start_gateway, fake):
    fake.script("a", answer("The secret summary."))
    return await start_gateway(["a", "b"])


@both_ways
@pytest.mark.parametrize("place", [4, 2, 0], ids=["last", "amid", "first"])
async def test_a_trigger_in_the_input_gives_one_compaction_item(gateway, fake, streaming, place):
    input = [*TALK[:place], TRIGGER, *TALK[place:]]
    fields = {"input": input, "tools": [TOOL], "tool_choice": "auto", "instructions": "s", "store": False}

    if streaming:
        events = await events_of(gateway, **fields)
        response = events[-1]["response"]
        assert [event["type"].removeprefix("response.") for event in events] == [
            "created", "in_progress", "output_item.added", "output_item.done", "completed",
        ]  # fmt: skip
        assert events[3]["item"] == response["output"][0]
    else:
        response = await respond(gateway, **fields)

    assert_response(response)
    assert (response["object"], response["status"]) == ("response", "completed")
    item = compacted(response["output"])
    assert "secret" not in json.dumps(response)
    assert bytes.fromhex(item["encrypted_content"].replace(".", ""))
    assert response["usage"]["output_tokens"] > 0
    sent = fake.requests[0].json
    assert sent["messages"][0] == {"role": "system", "content": "s"}
    assert sent["messages"][1]["content"] == [{"type": "text", "text": "build it"}]
    assert sent["messages"][-1] == {"role": "user", "content": ASKED_FOR}
    assert sent.keys().isdisjoint({"tools", "tool_choice"})


@both_ways
async def test_in_later_input_it_is_the_summary_again(gateway, fake, streaming):
    made = await respond(gateway, input=[*TALK, TRIGGER])
    input = [*made["output"], {"role": "user", "content": "go on"}]

    got = await gateway.send({"model": IN_ORDER, "input": input, "stream": streaming}, path="/v1/responses")

    assert got.status == 200
    assert fake.requests[-1].json["messages"] == [
        {"role": "user", "content": INTRODUCED + "The secret summary."},
        {"role": "user", "content": "go on"},
    ]


async def test_a_response_that_was_a_compaction_is_built_on_by_its_summary_alone(gateway, fake):
    first = await respond(gateway, input="build it")
    made = await respond(gateway, input=[TRIGGER], previous_response_id=first["id"])
    await respond(gateway, input="go on", previous_response_id=made["id"])

    assert [message["content"] for message in fake.requests[1].json["messages"]] == [
        "build it", "The secret summary.", ASKED_FOR,
    ]  # fmt: skip
    assert [message["content"] for message in fake.requests[2].json["messages"]] == [
        INTRODUCED + "The secret summary.",
        "go on",
    ]


async def test_the_item_outlives_a_restart_and_no_other_gateway_reads_it(start_gateway, fake, tmp_path):
    fake.script("a", answer("The secret summary."))
    gateway = await start_gateway(["a"])
    item = compacted((await respond(gateway, input=[*TALK, TRIGGER]))["output"])
    await gateway.stop()
    gateway = await start_gateway(["a"])

    await respond(gateway, input=[item])
    assert fake.requests[-1].json["messages"][0]["content"] == INTRODUCED + "The secret summary."
    await gateway.stop()

    for file in tmp_path.glob("gateway.db*"):
        file.unlink()
    other = await start_gateway(["a"])
    await respond(other, input=[item, {"role": "user", "content": "go on"}])
    assert fake.requests[-1].json["messages"][0] == {"role": "user", "content": UNREADABLE}


FOREIGN = ["gAAAAABpM0Yj-abc=", "", "00.00.00", None, 5, "zz.zz.zz", "ab" * 40]


async def test_what_was_not_sealed_here_ends_no_session(gateway, fake):
    for sealed in FOREIGN:
        with case(sealed):
            item = {"type": "compaction", "id": "cmp_1", "encrypted_content": sealed}
            await respond(gateway, input=[item, {"role": "user", "content": "go on"}])
            assert fake.requests[-1].json["messages"] == [
                {"role": "user", "content": UNREADABLE},
                {"role": "user", "content": "go on"},
            ]


async def test_the_endpoint_gives_the_item_alone(gateway, fake):
    got = await respond(gateway, path="/v1/responses/compact", instructions="s", stream=True)

    assert got.keys() == {"id", "object", "created_at", "output", "usage"}
    assert got["object"] == "response.compaction"
    item = compacted(got["output"])
    assert fake.requests[0].json["messages"][-1] == {"role": "user", "content": ASKED_FOR}
    assert "stream" not in fake.requests[0].json
    await respond(gateway, input=[item])
    assert fake.requests[-1].json["messages"] == [{"role": "user", "content": INTRODUCED + "The secret summary."}]


async def test_openais_client_compacts(gateway):
    got = await gateway.openai.responses.compact(model=IN_ORDER, input=TALK)

    assert [item.type for item in got.output] == ["compaction"]


@both_ways
async def test_a_summary_is_made_by_the_next_provider_where_one_fails(gateway, fake, streaming):
    fake.script("a", error(500))
    fake.script("b", answer("By b."))
    fields = {"input": [*TALK, TRIGGER]}

    output = (
        (await events_of(gateway, **fields))[-1]["response"]["output"]
        if streaming
        else (await respond(gateway, **fields))["output"]
    )

    compacted(output)
    assert fake.called == ["a", "b"]


async def test_a_summary_that_a_limit_cut_is_better_than_none(gateway, fake):
    fake.script("a", sse(chunk("Half a summ"), chunk(finish="length")))
    assert (await events_of(gateway, input=[*TALK, TRIGGER]))[-1]["type"] == "response.completed"
    fake.script("a", completion("Half a summ", finish="length"))
    assert (await respond(gateway, input=[*TALK, TRIGGER]))["status"] == "completed"


async def test_half_a_summary_of_a_broken_stream_is_no_item(start_gateway, fake):
    gateway = await start_gateway(["a"], {"RESCUE": "off"})
    fake.script("a", sse(chunk("half a"), CUT))

    events = await events_of(gateway, input=[*TALK, TRIGGER])

    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["output"] == []


async def test_errors_are_those_of_any_other_request(gateway, fake):
    for path in ("/v1/responses", "/v1/responses/compact"):
        with case(path):
            got = await gateway.send({"model": "nothing", "input": [*TALK, TRIGGER]}, path=path)
            assert_error(got, 400, "invalid_request_error", "model_not_found")
            got = await gateway.send({"input": [TRIGGER]}, path=path)
            assert (got.status, got.error["param"]) == (400, "input")
            got = await gateway.send({"input": [{"role": "x"}, TRIGGER]}, path=path)
            assert (got.status, got.error["param"]) == (400, "input[0].role")
    assert fake.called == []


# --- What was asked, and how long it is -----------------------------------------------------------------------------


async def test_the_input_of_a_kept_response_is_listed(gateway):
    made = await respond(gateway, input=[*TALK, {"role": "user", "content": "plain"}])
    path = f"/v1/responses/{made['id']}/input_items"

    got = (await gateway.get(path)).json
    assert (got["object"], got["has_more"], len(got["data"])) == ("list", False, 5)
    assert (got["first_id"], got["last_id"]) == (got["data"][0]["id"], got["data"][-1]["id"])
    assert [item["type"] for item in got["data"]] == [
        "message", "message", "function_call_output", "function_call", "message",
    ]  # fmt: skip
    assert got["data"][0]["content"] == [{"type": "input_text", "text": "plain"}]
    assert len({item["id"] for item in got["data"]}) == 5

    forward = (await gateway.get(f"{path}?order=asc&limit=2")).json
    assert forward["data"] == got["data"][:2:-1]
    assert forward["has_more"] is True
    rest = (await gateway.get(f"{path}?order=asc&after={forward['last_id']}")).json
    assert rest["data"] == got["data"][2::-1]
    assert (await gateway.get(f"{path}?limit=9999999999")).json["data"] == got["data"]


async def test_openais_client_lists_the_input(gateway):
    made = await gateway.openai.responses.create(model=IN_ORDER, input="hi")

    items = [item async for item in gateway.openai.responses.input_items.list(made.id)]

    assert [(item.type, item.content[0].text) for item in items] == [("message", "hi")]


async def test_the_input_of_an_unknown_response_is_a_404(gateway):
    assert_error(
        await gateway.get("/v1/responses/resp_x/input_items"), 404, "invalid_request_error", "response_not_found"
    )


async def test_the_length_of_an_input_is_told_without_a_provider(gateway, fake):
    async def length(**fields) -> int:
        got = await respond(gateway, path="/v1/responses/input_tokens", **fields)
        assert got.keys() == {"object", "input_tokens"}
        assert got["object"] == "response.input_tokens"
        return got["input_tokens"]

    short = await length(input="x" * 40)
    assert short == 10
    assert await length(input="x" * 40, tools=[TOOL]) > short
    assert await length(input="x" * 40, instructions="y" * 40) > short
    counted = await gateway.openai.responses.input_tokens.count(model=IN_ORDER, input="x" * 40)
    assert counted.input_tokens == short
    assert fake.called == []
    got = await gateway.send({"input": 5}, path="/v1/responses/input_tokens")
    assert (got.status, got.error["param"]) == (400, "input")
