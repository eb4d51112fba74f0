"""Issue 4, must-show 3: a conversation that began on one wire goes on at any other, whatever its history carries.

The servers of wires.py refuse what the real ones refuse, so an answer is the proof.
"""

import json

import pytest
from conftest import IN_ORDER, both_ways, case
from fake_provider import answer, completion, error
from wires import SIGNATURE, STRICT_WIRES, Said, insist

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "type": "object",
                "properties": {"city": {"type": ["string", "null"], "minLength": 1}},
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "mcp.time/now here")
]
TOOLS[1]["cache_control"] = {"type": "ephemeral"}  # some clients mark the last tool
every_start = pytest.mark.parametrize("first", STRICT_WIRES.values(), ids=STRICT_WIRES)
every_end = pytest.mark.parametrize("then", STRICT_WIRES.values(), ids=lambda wire: f"to {wire.name}")


async def asked(gateway, streaming: bool, **fields) -> dict:
    """The assistant's message as clients put it back into the history: with all its fields."""
    if not streaming:
        return (await gateway.chat(tools=TOOLS, **fields)).json["choices"][0]["message"]
    message: dict = {"role": "assistant", "content": ""}
    calls: list[dict] = []
    for delta in (await gateway.stream(tools=TOOLS, **fields)).deltas:
        for name in ("content", "reasoning_content"):
            if delta.get(name):
                message[name] = message.get(name, "") + delta[name]
        for piece in delta.get("tool_calls", []):
            if piece["index"] == len(calls):
                calls.append(piece)
            else:
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return message | ({"tool_calls": calls} if calls else {})


@every_start
@every_end
async def test_a_tool_loop_goes_on_at_another_platform(start_gateway, fake, first, then):
    gateway = await start_gateway({wire.name: wire.options(fake) for wire in (first, then)})
    for streaming in (False, True):
        with case("streamed" if streaming else "whole"):
            fake.clear()
            await assert_handed_over(gateway, fake, first, then, streaming)
            await gateway.recovered()


async def assert_handed_over(gateway, fake, first, then, streaming: bool) -> None:
    calls = [("weather", {"city": "Köln"}), ("weather", {"city": "Rom"})]
    asks, done = first.says(Said("Let me look.", calls, "tool_calls")), then.says(Said("Done."))
    if first is then:
        fake.script(first.name, asks, done)
    else:
        fake.script(first.name, asks, error(500))
        fake.script(then.name, done)
    question = {"role": "user", "content": "weather?"}

    told = await asked(gateway, streaming, messages=[question])
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": f"result {n}"}
        for n, call in enumerate(told["tool_calls"])
    ]
    history = [{"role": "system", "content": "be brief"}, question, told, *results]
    got = await asked(gateway, streaming, messages=history)

    assert got["content"] == "Done."
    sent = fake.requests[-1]
    assert sent.platform == then.name
    for text in ("result 0", "result 1", "Let me look.", "Rom"):
        assert text in json.dumps(sent.json)


# A history as it piles up: every wire's own fields, marks and mistakes.
CALL = {"id": "call_" + "x" * 60, "type": "function", "index": 0}
CALL |= {"function": {"name": "weather", "arguments": '{"city": "Rom"}', "thought_signature": SIGNATURE}}
CALL |= {"extra_content": {"google": {"thought_signature": SIGNATURE}}}
OLD = {
    "role": "assistant",
    "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "I look.", "cache_control": {}}],
    "reasoning": "hm",
    "reasoning_content": "hm",
    "reasoning_details": [{"type": "reasoning.text", "text": "hm"}],
    "annotations": [],
    "refusal": None,
    "audio": None,
    "tool_calls": [CALL],
}
RESULT = {"role": "tool", "tool_call_id": CALL["id"], "name": "weather", "content": [{"type": "text", "text": "sun"}]}
USER = {"role": "user", "content": [{"type": "text", "text": "and now?", "cache_control": {"type": "ephemeral"}}]}
HISTORIES = {
    "fields of every wire": [{"role": "user", "content": "hi"}, OLD, RESULT, USER],
    "system messages in between": [
        {"role": "user", "content": "hi"}, {"role": "system", "content": "a"}, OLD, RESULT,
        {"role": "developer", "content": "b"}, USER,
    ],
    "a call without its result": [{"role": "user", "content": "hi"}, OLD, USER],
    "a result without its call": [{"role": "user", "content": "hi"}, RESULT, USER],
    "a call at the very end": [USER, OLD],
    "a result twice": [{"role": "user", "content": "hi"}, OLD, RESULT, RESULT, USER],
    "a result behind a user's word": [{"role": "user", "content": "hi"}, OLD, USER, RESULT],
    "a beginning that was cut off": [OLD, RESULT, USER],
    "one of two calls answered": [
        {"role": "user", "content": "hi"},
        OLD | {"tool_calls": [CALL, CALL | {"id": "unanswered"}]},
        RESULT,
        USER,
    ],
    "a tool name that strict servers refuse": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "mcp.time/now here", "arguments": ""}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": None},
        USER,
    ],
    "a last word to be continued": [USER, {"role": "assistant", "content": "Once upon"}],
    "empty turns": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}, USER],
    "a call that was cut off": [
        {"role": "user", "content": "hi"},
        OLD | {"tool_calls": [CALL | {"function": {"name": "weather", "arguments": '{"city": "Ro'}}]},
        RESULT,
        USER,
    ],
    "results in another order": [
        {"role": "user", "content": "hi"},
        OLD | {"tool_calls": [CALL, {"id": "2", "type": "function", "function": {"name": "other", "arguments": "{}"}}]},
        RESULT | {"tool_call_id": "2"},
        RESULT,
        USER,
    ],
    "fields that clients add": [
        {"role": "user", "content": "hi", "id": "m1", "timestamp": 5, "cache_control": {"type": "ephemeral"}},
        OLD | {"thinking_blocks": [], "provider_specific_fields": {"x": 1}},
        RESULT | {"providerOptions": {}},
        USER | {"experimental_attachments": []},
    ],
    "two steps": [{"role": "user", "content": "hi"}, OLD, RESULT, OLD, RESULT, USER],
}  # fmt: skip


@every_end
async def test_any_history_is_accepted_by_every_wire(start_gateway, fake, then):
    gateway = await start_gateway({then.name: then.options(fake)})
    fake.script(then.name, then.says(Said("Done.")))

    for name, history in HISTORIES.items():
        for streaming in (False, True):
            with case((name, streaming)):
                assert (await asked(gateway, streaming, messages=history))["content"] == "Done."


async def test_a_platform_that_wants_its_thoughts_back_gets_them(start_gateway, fake):
    then = STRICT_WIRES["longcat"]
    gateway = await start_gateway({"longcat": then.options(fake)})
    fake.script("longcat", then.says(Said("Done.")))

    await gateway.chat(messages=HISTORIES["fields of every wire"], tools=TOOLS)

    sent = fake.requests[0].json["messages"][1]
    assert sent["reasoning_content"] == "hm"
    assert not {"reasoning", "reasoning_details", "annotations"} & set(sent)


async def test_system_messages_come_first_where_templates_want_it(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"system_first": True}}})

    await gateway.chat(messages=HISTORIES["system messages in between"], tools=TOOLS)

    sent = fake.requests[0].json["messages"]
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "tool", "user"]
    assert sent[0]["content"] == "a\n\nb"


@both_ways
async def test_a_renamed_tool_is_called_by_the_clients_own_name(start_gateway, fake, streaming):
    gateway = await start_gateway(["a"])
    seen: list[str] = []

    def call_it(request):
        name = request.json["tools"][1]["function"]["name"]
        insist(request.json["tool_choice"] == {"type": "function", "function": {"name": name}}, "the choice")
        seen.append(name)
        return STRICT_WIRES["plain"].says(Said(calls=[(name, {})], finish="tool_calls"))(request)

    fake.script("a", call_it)
    choice = {"type": "function", "function": {"name": "mcp.time/now here"}}

    got = await asked(gateway, streaming, tool_choice=choice)

    assert got["tool_calls"][0]["function"]["name"] == "mcp.time/now here"
    assert seen[0] != "mcp.time/now here"


async def test_ids_of_calls_stay_the_clients_own(start_gateway, fake):
    gateway = await start_gateway({"mistral": STRICT_WIRES["mistral"].options(fake)})
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    fake.script("mistral", completion(None, finish="tool_calls", message={"tool_calls": [call]}), answer("Done."))
    create = gateway.openai.chat.completions.create

    got = await create(model=IN_ORDER, messages=[{"role": "user", "content": "hi"}], tools=TOOLS)

    assert got.choices[0].message.tool_calls[0].id == "call_1"
