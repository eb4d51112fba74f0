"""SPEC 3.5 and facts 12: what real clients send, and what the provider then receives. One row each."""

import pytest
from conftest import IN_ORDER, case
from fake_provider import completion

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HI = {"role": "user", "content": "hi"}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "c1", "content": "done"}
PARAMETERS = {"type": "object", "properties": {}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
NAMED = {"type": "function", "function": {"name": "f"}}
PNG = "iVBORw0KGgo="
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
GONE = object()  # the provider must not get this field


def said(*parts: object) -> dict:
    return {"role": "user", "content": list(parts)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def with_arguments(arguments: object) -> list[dict]:
    return [HI, ASKED | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": arguments}}]}, TOLD]


MESSAGES = {
    "parts of text only": ([said(text("a"), text("b"))], [said(text("a"), text("b"))]),
    "a part without type": ([said({"text": "a"})], [said(text("a"))]),
    "a bare string as part": ([said("a")], [said(text("a"))]),
    "an input_text part": ([said({"type": "input_text", "text": "a"})], [said(text("a"))]),
    "an output_text part": (
        [HI, {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}, HI],
        [HI, {"role": "assistant", "content": [text("a")]}, HI],
    ),
    "one part that is no list": ([{"role": "user", "content": text("a")}], [said(text("a"))]),
    "user content null": ([HI, {"role": "user", "content": None}], [HI, {"role": "user", "content": ""}]),
    "user content missing": ([HI, {"role": "user"}], [HI, {"role": "user", "content": ""}]),
    "user content an empty list": ([HI, {"role": "user", "content": []}], [HI, {"role": "user", "content": ""}]),
    "an empty assistant turn": ([HI, {"role": "assistant", "content": ""}, HI], [HI, HI]),
    "an assistant turn of null": ([HI, {"role": "assistant", "content": None}, HI], [HI, HI]),
    "an assistant turn of no parts": ([HI, {"role": "assistant", "content": []}, HI], [HI, HI]),
    "an assistant turn of thoughts only": (
        [HI, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]}, HI],
        [HI, HI],
    ),
    "calls beside no parts": ([HI, ASKED | {"content": []}, TOLD], [HI, ASKED | {"content": None}, TOLD]),
    "calls beside thoughts only": (
        [HI, ASKED | {"content": [{"type": "thinking", "thinking": "hm"}]}, TOLD],
        [HI, ASKED | {"content": None}, TOLD],
    ),
    "tool content null": ([HI, ASKED, TOLD | {"content": None}], [HI, ASKED, TOLD | {"content": ""}]),
    "tool content in parts": ([HI, ASKED, TOLD | {"content": [text("done")]}], [HI, ASKED, TOLD]),
    "tool content an object": ([HI, ASKED, TOLD | {"content": {"a": 1}}], [HI, ASKED, TOLD | {"content": '{"a":1}'}]),
    "the developer role": ([{"role": "developer", "content": "a"}, HI], [{"role": "system", "content": "a"}, HI]),
    "the function role": (
        [HI, ASKED, {"role": "function", "name": "f", "content": "done"}],
        [HI, ASKED, TOLD | {"name": "f"}],
    ),
    "a function_call of old": (
        [
            HI,
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "done"},
        ],
        [HI, ASKED | {"tool_calls": [CALL | {"id": "call_1_0"}]}, TOLD | {"name": "f", "tool_call_id": "call_1_0"}],
    ),
    "tool_calls null": (
        [HI, {"role": "assistant", "content": "a", "tool_calls": None}, HI],
        [HI, {"role": "assistant", "content": "a"}, HI],
    ),
    "tool_calls empty": (
        [HI, {"role": "assistant", "content": "a", "tool_calls": []}, HI],
        [HI, {"role": "assistant", "content": "a"}, HI],
    ),
    "calls without id": (
        [HI, ASKED | {"tool_calls": [CALL | {"id": ""}]}, {"role": "tool", "content": "done"}],
        [HI, ASKED | {"tool_calls": [CALL | {"id": "call_1_0"}]}, TOLD | {"tool_call_id": "call_1_0"}],
    ),
    "calls without id or type, two of them": (
        [
            HI,
            ASKED | {"tool_calls": [{"function": CALL["function"]}] * 2},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
        ],
        [
            HI,
            ASKED | {"tool_calls": [CALL | {"id": "call_1_0"}, CALL | {"id": "call_1_1"}]},
            TOLD | {"content": "1", "tool_call_id": "call_1_0"},
            TOLD | {"content": "2", "tool_call_id": "call_1_1"},
        ],
    ),
    "arguments as an object": (with_arguments({"a": 1}), with_arguments('{"a":1}')),
    "arguments empty": (with_arguments(""), with_arguments("{}")),
    "arguments null": (with_arguments(None), with_arguments("{}")),
    "arguments encoded twice": (with_arguments('"{\\"a\\": 1}"'), with_arguments('{"a": 1}')),
    "arguments cut off": (with_arguments('{"a": '), with_arguments('{"value":"{\\"a\\": "}')),
    "arguments that are no object": (with_arguments("[1]"), with_arguments('{"value":[1]}')),
    "results in another order": (
        [HI, ASKED | {"tool_calls": [CALL, CALL | {"id": "c2"}]}, TOLD | {"tool_call_id": "c2"}, TOLD],
        [HI, ASKED | {"tool_calls": [CALL, CALL | {"id": "c2"}]}, TOLD, TOLD | {"tool_call_id": "c2"}],
    ),
    "one id for two calls": (
        [HI, ASKED | {"tool_calls": [CALL, CALL]}, TOLD, TOLD | {"content": "2"}],
        [
            HI,
            ASKED | {"tool_calls": [CALL, CALL | {"id": "call_1_1"}]},
            TOLD,
            TOLD | {"content": "2", "tool_call_id": "call_1_1"},
        ],
    ),
    "a result without id": ([HI, ASKED, {"role": "tool", "content": "done"}], [HI, ASKED, TOLD]),
    "a result too many": ([HI, ASKED, TOLD, {"role": "tool", "content": "x"}, HI], [HI, ASKED, TOLD, HI]),
    "a result without its call": ([HI, TOLD, HI], [HI, HI]),
    "a call without its result": ([HI, ASKED | {"content": "a"}, HI], [HI, {"role": "assistant", "content": "a"}, HI]),
    "thoughts of earlier turns": (
        [HI, {"role": "assistant", "content": "a", "reasoning_content": "x", "reasoning": "x", "annotations": []}, HI],
        [HI, {"role": "assistant", "content": "a"}, HI],
    ),
    "nulls in a message": ([HI | {"name": None}], [HI]),
    "a name with blanks": ([HI | {"name": "Ada Lovelace"}], [HI | {"name": "Ada_Lovelace"}]),
    "a name of nothing but signs": ([HI | {"name": "…"}], [HI]),
    "an image address as text": ([said({"type": "image_url", "image_url": IMAGE["image_url"]["url"]})], [said(IMAGE)]),
    "an input_image": ([said({"type": "input_image", "image_url": IMAGE["image_url"]["url"]})], [said(IMAGE)]),
    "an image with a source": (
        [said({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}})],
        [said(IMAGE)],
    ),
    "an image with a source by address": (
        [said({"type": "image", "source": {"type": "url", "url": "https://x/a.png"}})],
        [said({"type": "image_url", "image_url": {"url": "https://x/a.png"}})],
    ),
    "an image as bare base64": ([said({"type": "image_url", "image_url": {"url": PNG}})], [said(IMAGE)]),
    "an image in a tool's result": (
        [HI, ASKED, TOLD | {"content": [text("done"), IMAGE]}],
        [HI, ASKED, TOLD, said(text("Images from the tool results above:"), IMAGE)],
    ),
    "half an emoji": ([HI | {"content": "a\ud83d"}], [HI | {"content": "a\ufffd"}]),
    "the other half": ([HI | {"content": "\ude00 \ud83d\ude00"}], [HI | {"content": "\ufffd \U0001f600"}]),
    "a NUL": ([HI | {"content": "a\0b"}], [HI | {"content": "a\ufffdb"}]),
    "a backslash that is no escape": ([HI | {"content": "\\ud83d \\u0000"}], [HI | {"content": "\\ud83d \\u0000"}]),
}

FIELDS = {
    "nulls everywhere": (
        {"temperature": None, "tools": None, "stop": None, "seed": None},
        {"temperature": GONE, "tools": GONE, "stop": GONE, "seed": GONE},
    ),
    "numbers as text": ({"temperature": "0.5", "max_tokens": "7"}, {"temperature": 0.5, "max_tokens": 7}),
    "a whole number with a point": ({"max_tokens": 7.0, "seed": 1.0}, {"max_tokens": 7, "seed": 1}),
    "max_tokens 0": ({"max_tokens": 0}, {"max_tokens": GONE}),
    "max_tokens -1": ({"max_tokens": -1}, {"max_tokens": GONE}),
    "max_tokens above the model's": ({"max_tokens": 65536}, {"max_tokens": 8000}),
    "max_completion_tokens": ({"max_completion_tokens": 7}, {"max_tokens": 7, "max_completion_tokens": GONE}),
    "max_output_tokens": ({"max_output_tokens": 7}, {"max_tokens": 7, "max_output_tokens": GONE}),
    "num_predict": ({"num_predict": 7}, {"max_tokens": 7, "num_predict": GONE}),
    "temperature above 2": ({"temperature": 5}, {"temperature": 2}),
    "temperature below 0": ({"temperature": -1}, {"temperature": 0}),
    "top_p 0": ({"top_p": 0}, {"top_p": 0.01}),
    "stop of nothing": ({"stop": ""}, {"stop": GONE}),
    "no stops": ({"stop": []}, {"stop": GONE}),
    "empty stops": ({"stop": ["", "a"]}, {"stop": ["a"]}),
    "many stops": ({"stop": list("abcdefgh")}, {"stop": list("abcd")}),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, {"stream_options": GONE}),
    "n of 1": ({"n": 1}, {"n": 1}),
    "no tools": ({"tools": [], "tool_choice": "auto"}, {"tools": GONE, "tool_choice": GONE}),
    "a choice without tools": (
        {"tool_choice": "auto", "parallel_tool_calls": True},
        {"tool_choice": GONE, "parallel_tool_calls": GONE},
    ),
    "a tool without type": ({"tools": [{"function": {"name": "f", "parameters": PARAMETERS}}]}, {"tools": [TOOL]}),
    "a flat tool": ({"tools": [{"type": "function", "name": "f", "parameters": PARAMETERS}]}, {"tools": [TOOL]}),
    "parameters null": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": None}}]},
        {"tools": [TOOL]},
    ),
    "parameters missing": ({"tools": [NAMED]}, {"tools": [TOOL]}),
    "parameters empty": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"tools": [TOOL]},
    ),
    "functions of old": (
        {"functions": [{"name": "f", "parameters": PARAMETERS}], "function_call": {"name": "f"}},
        {"tools": [TOOL], "tool_choice": NAMED, "functions": GONE, "function_call": GONE},
    ),
    "choice any": ({"tools": [TOOL], "tool_choice": "any"}, {"tool_choice": "required"}),
    "choice {any}": ({"tools": [TOOL], "tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
    "choice {auto}": ({"tools": [TOOL], "tool_choice": {"type": "auto"}}, {"tool_choice": "auto"}),
    "choice {tool}": ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, {"tool_choice": NAMED}),
    "choice {function}": ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, {"tool_choice": NAMED}),
    "response_format text": ({"response_format": {"type": "text"}}, {"response_format": GONE}),
    "response_format of nothing": ({"response_format": {}}, {"response_format": GONE}),
    "response_format left empty": ({"response_format": {"type": "", "json_schema": None}}, {"response_format": GONE}),
    "a schema without type": (
        {"response_format": {"json_schema": {"name": "x", "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    ),
    "a schema without name": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
    ),
    "a schema one level up": (
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
    ),
    "a schema one level down": (
        {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
    ),
    "effort max": ({"reasoning_effort": "max"}, {"reasoning_effort": "high"}),
    "effort XHigh": ({"reasoning_effort": "XHigh"}, {"reasoning_effort": "high"}),
    "effort balanced": ({"reasoning_effort": "balanced"}, {"reasoning_effort": "medium"}),
    "effort min": ({"reasoning_effort": "min"}, {"reasoning_effort": "minimal"}),
    "effort off": ({"reasoning_effort": "off"}, {"reasoning_effort": "none"}),
    "effort auto": ({"reasoning_effort": "auto"}, {"reasoning_effort": GONE}),
    "reasoning as an object": ({"reasoning": {"effort": "low"}}, {"reasoning_effort": "low", "reasoning": GONE}),
    "thinking off": ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none", "thinking": GONE}),
    "thinking with a small budget": (
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"reasoning_effort": "low", "thinking": GONE},
    ),
    "thinking with a large budget": (
        {"thinking": {"type": "enabled", "budget_tokens": 32000}},
        {"reasoning_effort": "high", "thinking": GONE},
    ),
    "enable_thinking": ({"enable_thinking": False}, {"reasoning_effort": "none", "enable_thinking": GONE}),
    "thinking in a template": (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none", "chat_template_kwargs": GONE},
    ),
    "fields nobody knows": (
        {"providerOptions": {"a": 1}, "cache_control": {}},
        {"providerOptions": {"a": 1}, "cache_control": {}},
    ),
}


@pytest.fixture
async def gateway(start_gateway):
    return await start_gateway({"a": {"model": {"vision": True, "max_output": 8000}}})


async def test_messages_arrive_as_every_server_takes_them(gateway, fake):
    for name, (sent, received) in MESSAGES.items():
        with case(name):
            assert (await gateway.chat(messages=sent)).text == "hello from a"

            assert fake.requests[-1].json["messages"] == received


async def test_fields_arrive_as_every_server_takes_them(gateway, fake):
    fake.script("a", completion("{}"))  # which is fine where JSON is asked for, too
    for name, (sent, received) in FIELDS.items():
        with case(name):
            assert (await gateway.chat(**sent)).text == "{}"

            got = fake.requests[-1].json
            assert {field: got.get(field, GONE) for field in received} == received


STRICT = {
    "drop": ["logprobs"],
    "standard_fields_only": True,
    "max": {"temperature": 1},
    "drop_message_fields": ["name"],
    "reasoning_efforts": ["none", "high"],
}
EXTRA = {
    "cache_control": {}, "providerOptions": {}, "metadata": {}, "store": True, "user": "me", "service_tier": "auto",
    "prediction": {}, "safety_identifier": "x", "prompt_cache_key": "x", "verbosity": "low", "web_search_options": {},
}  # fmt: skip


async def test_a_strict_platform_gets_only_what_it_knows(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": STRICT}})
    mark = {"cache_control": {"type": "ephemeral"}}
    message = {"role": "user", "name": "Ada", "id": "m1", "content": [text("hi") | mark]} | mark
    tools = [TOOL | mark | {"function": TOOL["function"] | {"returns": {}}}]

    await gateway.chat(messages=[message], tools=tools, logprobs=True, temperature=1.5, reasoning_effort="low", **EXTRA)

    assert fake.requests[0].json == {
        "model": "a-model",
        "messages": [said(text("hi"))],
        "tools": [TOOL],
        "temperature": 1,
        "reasoning_effort": "high",
    }


async def test_a_part_that_a_platform_would_lose_is_not_lost_in_silence(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"flatten_content": True}}, "b": {}})
    file = {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}}

    assert (await gateway.chat(messages=[said(text("sum it up"), file)])).text == "hello from b"

    assert fake.called == ["b"]


async def test_an_effort_where_there_is_only_on_and_off(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"reasoning_efforts": ["none", "default"]}}})

    for effort in ("low", "high", "none"):
        await gateway.chat(reasoning_effort=effort)

    assert [request.json["reasoning_effort"] for request in fake.requests] == ["default", "default", "none"]


async def test_an_effort_as_a_switch_of_the_chat_template(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"effort_as_template": "enable_thinking"}}})

    await gateway.chat(chat_template_kwargs={"enable_thinking": False, "more": 1})
    await gateway.chat(reasoning_effort="low")

    fields = ("chat_template_kwargs", "reasoning_effort")
    assert [{name: sent.json.get(name) for name in fields} for sent in fake.requests] == [
        {"chat_template_kwargs": {"enable_thinking": False, "more": 1}, "reasoning_effort": None},
        {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "low"},
    ]


async def test_a_default_is_no_more_than_the_model_can_give(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"default": {"max_tokens": 8192}}, "model": {"max_output": 4096}}})

    await gateway.chat()

    assert fake.requests[0].json["max_tokens"] == 4096


TOOL_NAMES = ["a.b", "server/tool", "with blank", "x" * 65, "x" * 66, "1st", "öl", "a_b"]


async def test_tool_names_are_made_safe_and_stay_apart(gateway, fake):
    tools = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in TOOL_NAMES]
    calls = [CALL | {"id": f"c{n}", "function": {"name": name, "arguments": "{}"}} for n, name in enumerate(TOOL_NAMES)]
    results = [TOLD | {"tool_call_id": call["id"]} for call in calls]
    fake.script("a", lambda request: completion(None, finish="tool_calls", message={"tool_calls": [
        CALL | {"id": f"c{n}", "function": {"name": tool["function"]["name"], "arguments": "{}"}}
        for n, tool in enumerate(request.json["tools"])
    ]}))  # fmt: skip

    got = await gateway.chat(messages=[HI, ASKED | {"tool_calls": calls}, *results], tools=tools)

    sent = fake.requests[0].json
    safe = [tool["function"]["name"] for tool in sent["tools"]]
    assert len(set(safe)) == len(TOOL_NAMES)
    assert all(
        name.isascii() and name.replace("_", "a").replace("-", "a").isalnum() and len(name) <= 64 for name in safe
    )
    assert [call["function"]["name"] for call in sent["messages"][1]["tool_calls"]] == safe
    answered = got.json["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in answered] == TOOL_NAMES


# --- What arrives otherwise than as plain JSON -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"]
)
async def test_the_content_type_does_not_matter(gateway, content_type):
    assert (await gateway.send(gateway.request(), headers={"content-type": content_type})).text == "hello from a"


@pytest.mark.parametrize("stream", ["true", "True", True])
async def test_stream_may_be_spelled_as_text(gateway, stream):
    async with gateway.post(gateway.request(stream=stream)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("model", ["", None, "auto", "freellmapi/auto", ...])
async def test_a_missing_model_is_any_model(gateway, model):
    request = {"messages": [HI]} | ({} if model is ... else {"model": model})

    assert (await gateway.send(request)).text == "hello from a"


UNSERVED = [
    ("n", {"n": 2}),
    ("n", {"n": "3"}),
    ("audio", {"audio": {"voice": "x"}}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("modalities", {"modalities": ["image"]}),
    ("messages", {"messages": [said({"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}})]}),
]


async def test_what_nobody_serves_is_refused_in_words(gateway, fake):
    for param, fields in UNSERVED:
        got = await gateway.chat(**fields)

        assert got.status == 400, fields
        assert got.error["param"].split("[")[0] == param, fields
        assert len(got.error["message"]) > 20, fields

    assert fake.called == []
    assert (await gateway.chat(modalities=["text"])).text == "hello from a"


async def test_an_answer_of_thoughts_only_is_the_answer(gateway, fake):
    fake.script("a", completion(None, message={"reasoning_content": "the answer"}))

    got = await gateway.openai.chat.completions.create(model=IN_ORDER, messages=[HI])

    assert got.choices[0].message.content == "the answer"
