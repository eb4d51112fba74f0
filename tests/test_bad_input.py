"""SPEC 3.1, 3.6, 3.7 and 13.3: what is refused, with which words, and that no provider hears of it."""

import asyncio
import json

import aiohttp
import pytest
from conftest import assert_error, both_ways, case

INVALID = "invalid_request_error"
MESSAGES = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user"}


# --- Bodies -----------------------------------------------------------------------------------------------------

NOT_JSON = {
    "nothing": b"",
    "text": b"hello",
    "half an object": b'{"messages": [',
    "two objects": b"{}{}",
    "single quotes": b"{'messages': []}",
    "NaN": b'{"temperature": NaN, "messages": [{"role": "user", "content": "hi"}]}',
    "Infinity": b'{"temperature": -Infinity, "messages": [{"role": "user", "content": "hi"}]}',
    "a comment": b'{"messages": [] /* none */}',
    "a trailing comma": b'{"messages": [{"role": "user", "content": "hi"}],}',
    "not UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "a control character": b'{"messages": [{"role": "user", "content": "a\x01b"}]}',
    "a list": b'[{"role": "user", "content": "hi"}]',
    "a string": b'"hi"',
    "null": b"null",
    "a number": b"1",
    "deep nesting": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


async def test_a_body_that_is_no_json_object_is_refused(start_gateway, fake):
    gateway = await start_gateway()
    for name, content in NOT_JSON.items():
        with case(name):
            got = await gateway.send(content)

            assert got.status == 400
            assert got.error["type"] == INVALID
            assert got.error["message"]
    assert fake.called == []


BAD_FIELDS = {
    "no messages": ("messages", {"messages": ...}),
    "messages null": ("messages", {"messages": None}),
    "no message": ("messages", {"messages": []}),
    "messages as text": ("messages", {"messages": "hi"}),
    "messages as an object": ("messages", {"messages": {"role": "user", "content": "hi"}}),
    "a message that is text": ("messages[0]", {"messages": ["hi"]}),
    "a message that is null": ("messages[1]", {"messages": [*MESSAGES, None]}),
    "no role": ("messages[0].role", {"messages": [{"content": "hi"}]}),
    "role null": ("messages[0].role", {"messages": [{"role": None, "content": "hi"}]}),
    "role of a number": ("messages[1].role", {"messages": [*MESSAGES, {"role": 1, "content": "hi"}]}),
    "content of a number": ("messages[0].content", {"messages": [USER | {"content": 7}]}),
    "content of an object": ("messages[0].content", {"messages": [USER | {"content": {"odd": 1}}]}),
    "content true": ("messages[0].content", {"messages": [USER | {"content": True}]}),
    "a part of a number": ("messages[0].content", {"messages": [USER | {"content": [7]}]}),
    "text of a number": ("messages[0].content", {"messages": [USER | {"content": [{"type": "text", "text": 7}]}]}),
    "tool calls as text": ("messages[0].tool_calls", {"messages": [{"role": "assistant", "tool_calls": "x"}]}),
    "a model of a number": ("model", {"model": 7}),
    "a model of a list": ("model", {"model": ["auto"]}),
    "stream as a word": ("stream", {"stream": "maybe"}),
    "stream as a list": ("stream", {"stream": []}),
    "max_tokens as a word": ("max_tokens", {"max_tokens": "many"}),
    "max_tokens as a list": ("max_tokens", {"max_tokens": [1]}),
    "tools as text": ("tools", {"tools": "hammer"}),
    "tools as an object": ("tools", {"tools": {"x": 1}}),
    "a tool as text": ("tools", {"tools": ["hammer"]}),
    "functions as text": ("functions", {"functions": "hammer"}),
    "stream_options as text": ("stream_options", {"stream": True, "stream_options": "usage"}),
    "temperature as a list": ("temperature", {"temperature": [1]}),
}


async def test_a_wrong_field_is_refused_by_name(start_gateway, fake):
    gateway = await start_gateway()
    for name, (param, fields) in BAD_FIELDS.items():
        with case(name):
            got = await gateway.chat(**fields)

            assert got.status == 400
            assert got.error["type"] == INVALID
            # Some clients know the field only, others its place in it.
            assert got.error["param"].split("[")[0] == param.split("[")[0]
    assert fake.called == []


@both_ways
async def test_a_refusal_looks_the_same_for_a_stream(start_gateway, fake, streaming):
    gateway = await start_gateway()

    got = await gateway.ask(streaming=streaming, messages=[])

    assert got.headers["content-type"].startswith("application/json")
    assert set(got.error) == {"message", "type", "code", "param"}
    assert (got.status, got.error["type"], got.error["param"]) == (400, INVALID, "messages")
    assert got.headers["X-Request-Id"]


# --- Keys -------------------------------------------------------------------------------------------------------

WRONG_KEYS = {
    "none": None,
    "empty": "",
    "another": "Bearer fw-test-0123456789abcdeF",
    "a part": "Bearer fw-test-0123456789abcde",
    "too long": "Bearer fw-test-0123456789abcdef0",
    "another scheme": "Basic fw-test-0123456789abcdef",
    "not ASCII": "Bearer fw-tést-0123456789abcdef",
    "only the scheme": "Bearer ",
}
PATHS = ["/v1/chat/completions", "/v1/models", "/v1/models/a-model", "/api/requests", "/api/protection"]


@pytest.mark.parametrize("authorization", WRONG_KEYS.values(), ids=WRONG_KEYS)
async def test_a_wrong_key_is_refused_everywhere(start_gateway, fake, authorization):
    gateway = await start_gateway()
    headers = {} if authorization is None else {"authorization": authorization}

    for path in PATHS:
        method = "POST" if "chat" in path else "GET"
        data = json.dumps(gateway.request()).encode() if method == "POST" else None
        async with gateway.http.request(method, gateway.base_url + path, data=data, headers=headers) as response:
            assert response.status == 401, path
            assert (await response.json())["error"] == {
                "message": (await response.json())["error"]["message"],
                "type": "authentication_error",
                "code": "invalid_api_key",
                "param": None,
            }
    assert fake.called == []


async def test_a_wrong_key_is_refused_before_the_body_is_looked_at(start_gateway, fake):
    gateway = await start_gateway()

    got = await gateway.send(b"not even JSON", headers={"authorization": "Bearer wrong"})

    assert got.status == 401


async def test_health_needs_no_key(start_gateway, fake):
    gateway = await start_gateway()

    async with gateway.http.get(f"{gateway.base_url}/healthz") as response:
        assert response.status == 200


async def test_the_admin_key_is_for_the_admin_and_the_api_key_for_clients(start_gateway, fake):
    gateway = await start_gateway(settings={"GATEWAY_ADMIN_KEY": "fw-admin-0123456789abcdef"})
    admin = {"authorization": "Bearer fw-admin-0123456789abcdef"}

    assert (await gateway.get("/api/requests")).status == 401
    assert (await gateway.get("/api/requests", headers=admin)).status == 200
    assert (await gateway.get("/v1/models", headers=admin)).status == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil.example"]
)
async def test_a_foreign_host_is_refused_on_loopback(start_gateway, fake, host):
    gateway = await start_gateway()

    got = await gateway.send(gateway.request(), headers={"host": host})

    assert 400 <= got.status < 500
    assert fake.called == []


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "127.0.0.1", "[::1]:80", "LOCALHOST:80"])
async def test_every_name_of_this_machine_is_welcome(start_gateway, fake, host):
    gateway = await start_gateway()

    assert (await gateway.send(gateway.request(), headers={"host": host})).status == 200


# --- Size -------------------------------------------------------------------------------------------------------


async def test_a_body_larger_than_allowed_is_refused(start_gateway, fake):
    gateway = await start_gateway(settings={"MAX_BODY_BYTES": "2000"})

    assert (await gateway.chat("x" * 1_500)).status == 200
    got = await gateway.chat("x" * 2_001)

    assert got.status == 413
    assert got.error["type"] == INVALID
    assert fake.called == ["a"]


async def test_a_body_of_unknown_length_is_refused_while_it_is_read(start_gateway, fake):
    gateway = await start_gateway(settings={"MAX_BODY_BYTES": "2000"})
    endless = asyncio.Event()

    async def pieces():
        while not endless.is_set():
            yield b"x" * 500
            await asyncio.sleep(0)

    url = f"{gateway.base_url}/v1/chat/completions"
    headers = {"authorization": f"Bearer {gateway.api_key}"}
    try:
        async with gateway.http.post(url, data=pieces(), headers=headers) as response:
            assert response.status == 413
    except aiohttp.ClientConnectionError:
        pass  # the gateway may close before it has read everything; hanging is what it may not do
    endless.set()
    assert fake.called == []
    assert (await gateway.chat()).status == 200


async def test_a_large_body_within_the_limit_is_served(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"context_window": 10_000_000}}})

    assert (await gateway.chat("x" * (20 << 20))).text == "hello from a"


# --- Models and needs -------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("name", ["unknown", "a/unknown", "unknown/a-model", "auto-unknown", "auto:unknown"])
async def test_an_unknown_model_is_refused_by_name(start_gateway, fake, name, streaming):
    gateway = await start_gateway()

    got = await gateway.ask(streaming=streaming, model=name)

    assert_error(got, 400, INVALID, "model_not_found")
    assert name in got.error["message"]
    assert got.error["param"] == "model"
    assert fake.called == []


async def test_a_model_without_key_is_known_but_leads_elsewhere(start_gateway, fake):
    gateway = await start_gateway({"a": {"keys": []}, "b": {}})

    assert (await gateway.chat(model="a-model")).text == "hello from b"


@both_ways
async def test_an_image_that_no_model_can_see_is_refused(start_gateway, fake, streaming):
    gateway = await start_gateway()

    got = await gateway.ask(streaming=streaming, messages=[{"role": "user", "content": [IMAGE]}])

    assert (got.status, got.error["code"]) == (422, "no_vision_model")
    assert fake.called == []
    assert (await gateway.row())["status"] == "error"


async def test_tools_that_no_model_knows_are_refused(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"tools": False}}})

    got = await gateway.chat(tools=[TOOL])

    assert (got.status, got.error["code"]) == (422, "no_tool_model")
    assert fake.called == []


async def test_a_request_longer_than_every_window_is_refused(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"context_window": 2_000}}})

    got = await gateway.chat("x" * 6_000)

    assert_error(got, 400, "invalid_request_error", "context_length_exceeded")
    assert (
        "maximum context length is 2000 tokens. However, your messages resulted in 2500 tokens" in got.error["message"]
    )
    assert fake.called == []


# --- HTTP -------------------------------------------------------------------------------------------------------


WRONG_PATHS = [
    ("GET", "/v1/unknown"),
    ("GET", "/v1/chat/completions"),
    ("DELETE", "/v1/models"),
    ("POST", "/v1/chat"),
    ("GET", "/v1/../etc/passwd"),
]


@pytest.mark.parametrize(("method", "path"), WRONG_PATHS)
async def test_an_unknown_path_or_method_is_refused_in_the_same_shape(start_gateway, fake, method, path):
    gateway = await start_gateway()
    headers = {"authorization": f"Bearer {gateway.api_key}"}

    async with gateway.http.request(method, gateway.base_url + path, headers=headers) as response:
        assert response.status in (404, 405)
        assert set((await response.json())["error"]) == {"message", "type", "code", "param"}


async def test_a_gateway_fed_with_noise_goes_on_serving(start_gateway, fake):
    gateway = await start_gateway()
    port = int(gateway.base_url.rsplit(":", 1)[1])
    for noise in (b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(noise)
        await reader.read(1000)
        writer.close()

    assert (await gateway.chat()).status == 200
