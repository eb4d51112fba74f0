"""Issue 4, must-show 1: one script with the real openai client, unchanged over every wire."""

import json

import pytest
from conftest import IN_ORDER, both_ways
from wires import WIRES, Said

from adapters.gemini import UNSIGNED

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "degrees": {"type": ["number", "null"]}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
MESSAGES = [{"role": "user", "content": "hi"}]
every_wire = pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)


class Client:
    """The real client, its streams put together again as its users do."""

    def __init__(self, gateway) -> None:
        self._create = gateway.openai.chat.completions.create

    async def ask(self, *, streaming: bool, messages=MESSAGES, **fields) -> dict:
        if not streaming:
            whole = await self._create(model=IN_ORDER, messages=messages, **fields)
            return {
                "text": whole.choices[0].message.content or "",
                "calls": [call.model_dump() for call in whole.choices[0].message.tool_calls or []],
                "finish": whole.choices[0].finish_reason,
                "usage": (whole.usage.prompt_tokens, whole.usage.completion_tokens),
            }
        got: dict = {"text": "", "calls": [], "finish": None, "usage": None}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        async for part in await self._create(model=IN_ORDER, messages=messages, **options, **fields):
            if part.usage:
                got["usage"] = (part.usage.prompt_tokens, part.usage.completion_tokens)
            for choice in part.choices:
                got["text"] += choice.delta.content or ""
                got["finish"] = choice.finish_reason or got["finish"]
                for piece in choice.delta.tool_calls or []:
                    if piece.index == len(got["calls"]):
                        got["calls"].append(piece.model_dump(exclude_none=True))
                    else:
                        got["calls"][piece.index]["function"]["arguments"] += piece.function.arguments
        return got


@pytest.fixture
async def serve(start_gateway, fake):
    """A gateway over one platform of this wire that gives these answers in turn."""

    async def start(wire, *answers: Said) -> Client:
        gateway = await start_gateway({wire.name: wire.options(fake)})
        fake.script(wire.name, *map(wire.says, answers))
        return Client(gateway)

    return start


@every_wire
@both_ways
async def test_text_its_ending_and_its_usage_arrive(serve, wire, streaming):
    client = await serve(wire, Said("The sky is blue."))

    got = await client.ask(streaming=streaming)

    assert got == {"text": "The sky is blue.", "calls": [], "finish": "stop", "usage": (11, 7)}


@every_wire
@both_ways
async def test_two_parallel_calls_are_made_and_their_results_sent_back(serve, fake, wire, streaming):
    asked = [("weather", {"city": "Köln"}), ("weather", {"city": "Rom", "unit": "C"})]
    client = await serve(wire, Said(calls=asked, finish="tool_calls"), Said("Rain here, sun there."))

    got = await client.ask(streaming=streaming, tools=[TOOL], tool_choice="auto")

    assert got["finish"] == "tool_calls"
    told = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in got["calls"]]
    assert told == asked
    ids = [call["id"] for call in got["calls"]]
    assert len(set(ids)) == 2
    assert all(ids)

    calls = [{name: call[name] for name in ("id", "type", "function")} for call in got["calls"]]
    results = [{"role": "tool", "tool_call_id": ids[0], "content": "rain"}]
    results.append({"role": "tool", "tool_call_id": ids[1], "content": '{"sun": 1}'})
    history = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    got = await client.ask(streaming=streaming, messages=history, tools=[TOOL])

    assert got["text"] == "Rain here, sun there."
    assert fake.called == [wire.name] * 2


@every_wire
@both_ways
async def test_an_answer_after_a_json_schema_is_passed_on_as_it_is(serve, fake, wire, streaming):
    text = '{"city": "Köln", "degrees": 12}'
    client = await serve(wire, Said(text))
    wanted = {"type": "json_schema", "json_schema": {"name": "report", "schema": SCHEMA, "strict": True}}

    got = await client.ask(streaming=streaming, response_format=wanted)

    assert json.loads(got["text"]) == json.loads(text)
    sent = fake.requests[0].json
    assert "city" in json.dumps(sent.get("response_format") or sent["generationConfig"]["responseJsonSchema"])


@every_wire
@both_ways
async def test_an_image_reaches_the_model(serve, fake, wire, streaming):
    client = await serve(wire, Said("One pixel."))
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]

    assert (await client.ask(streaming=streaming, messages=messages))["text"] == "One pixel."

    assert PNG in fake.requests[0].raw.decode()


@every_wire
@both_ways
async def test_a_long_system_prompt_arrives_whole(serve, fake, wire, streaming):
    client = await serve(wire, Said("Understood."))
    rules = "".join(f"Rule {n}: be brief. " for n in range(10_000))
    messages = [{"role": "system", "content": rules}, *MESSAGES]

    assert (await client.ask(streaming=streaming, messages=messages))["text"] == "Understood."

    assert rules in fake.requests[0].raw.decode()


@every_wire
@both_ways
async def test_a_stop_sequence_and_sampling_are_passed_on(serve, fake, wire, streaming):
    client = await serve(wire, Said("One, two"))
    fields = {"stop": ["three"], "temperature": 0.5, "top_p": 0.9, "max_tokens": 100, "seed": 7}

    assert (await client.ask(streaming=streaming, **fields))["text"] == "One, two"

    sent = fake.requests[0].json
    sent = sent.get("generationConfig", sent)
    assert sent.get("stop", sent.get("stopSequences")) == ["three"]
    assert (sent["temperature"], sent.get("top_p", sent.get("topP")), sent["seed"]) == (0.5, 0.9, 7)
    assert sent.get("max_tokens", sent.get("maxOutputTokens")) == 100


@every_wire
@both_ways
@pytest.mark.parametrize("finish", ["length", "content_filter"])
async def test_an_answer_cut_by_length_or_filter_says_so(serve, wire, streaming, finish):
    client = await serve(wire, Said("Once upon a", finish=finish))

    got = await client.ask(streaming=streaming, max_tokens=8)

    assert (got["text"], got["finish"]) == ("Once upon a", finish)


SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}},
            {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    {"role": "tool", "tool_call_id": "c2", "content": '{"rain": 1}'},
]
ASKED = {
    "temperature": 0.5, "top_p": 0.9, "max_tokens": 100, "stop": ["three"], "seed": 7, "presence_penalty": 0.1,
    "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True, "reasoning_effort": "low",
}  # fmt: skip
EXTRA = {"top_k": 4, "min_p": 0.1, "metadata": {"a": "b"}}
WITHOUT_PARTS = [SAID[0], {"role": "user", "content": "Weather?"}, SAID[2] | {"content": ""}, *SAID[3:]]
PROPERTIES = {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}}
LOOSE = {"type": "object", "properties": PROPERTIES, "required": ["city"]}
ARRIVES = {
    "plain": {"messages": SAID, **ASKED, **EXTRA},
    "cohere": {
        "messages": WITHOUT_PARTS,
        **{name: value for name, value in ASKED.items() if name != "parallel_tool_calls"},
        "reasoning_effort": "high",
        "tools": [{"type": "function", "function": TOOL["function"] | {"parameters": LOOSE}}],
    },
    "cloudflare": {
        "messages": WITHOUT_PARTS,
        **{name: value for name, value in ASKED.items() if name != "reasoning_effort"},
        "top_k": 4,
    },
    "google": {
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "Weather?"}]},
            {
                "role": "model",
                "parts": [
                    {
                        "functionCall": {"id": "c1", "name": "weather", "args": {"city": "Rom"}},
                        "thoughtSignature": UNSIGNED,
                    },
                    {"functionCall": {"id": "c2", "name": "weather", "args": {"city": "Ulm"}}},
                ],
            },
            {
                "role": "user",
                "parts": [
                    {"functionResponse": {"id": "c1", "name": "weather", "response": {"output": "sun"}}},
                    {"functionResponse": {"id": "c2", "name": "weather", "response": {"rain": 1}}},
                ],
            },
        ],
        "tools": [
            {
                "functionDeclarations": [
                    {
                        "name": "weather",
                        "description": "Tells the weather",
                        "parametersJsonSchema": TOOL["function"]["parameters"],
                    }
                ]
            }
        ],
        "toolConfig": {"functionCallingConfig": {"mode": "AUTO"}},
        "generationConfig": {
            "temperature": 0.5,
            "topP": 0.9,
            "topK": 4,
            "seed": 7,
            "presencePenalty": 0.1,
            "maxOutputTokens": 100,
            "stopSequences": ["three"],
            "thinkingConfig": {"thinkingLevel": "LOW", "includeThoughts": True},
        },
    },
}
STREAMED = {
    "plain": {"stream": True, "stream_options": {"include_usage": True}},
    "cohere": {"stream": True},
    "cloudflare": {"stream": True},
    "google": {},
}


@every_wire
@both_ways
async def test_one_request_arrives_at_each_platform_in_its_own_words(serve, fake, wire, streaming):
    client = await serve(wire, Said("Sun, rain."))

    got = await client.ask(streaming=streaming, messages=SAID, extra_body=EXTRA, **ASKED)

    assert got["text"] == "Sun, rain."
    model = {} if wire.name == "google" else {"model": f"{wire.name}-model"}
    assert fake.requests[0].json == ARRIVES[wire.name] | model | (STREAMED[wire.name] if streaming else {})


@every_wire
async def test_what_only_some_servers_know_does_not_reach_the_strict_ones(serve, wire):
    client = await serve(wire, Said("ok"))
    extra = {"metadata": {"a": "b"}, "store": False, "user": "me", "service_tier": "auto", "parallel_tool_calls": True}
    marked = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]

    got = await client.ask(
        streaming=False, messages=[{"role": "user", "content": marked}], tools=[TOOL], reasoning_effort="low", **extra
    )

    assert got["text"] == "ok"
