"""Providers over TLS, as nearly all real ones are, from a gateway that trusts the test's own authority."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from certificates import certificate
from conftest import API_KEY, both_ways, client_of
from fake_provider import CUT, PAUSE, FakeProvider, answer, assert_in_time, chunk, event, raw, sse

FIRST = event(chunk("begun "))


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    return certificate(tmp_path)


@pytest.fixture
async def secure(pem: Path) -> AsyncIterator[FakeProvider]:
    """A provider over TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    async with FakeProvider().serving(tls=context) as provider:
        yield provider


@pytest.fixture
async def client(start_process, secure, pem):
    """Of a gateway with `a` and `b` behind TLS."""
    platforms = {name: {"base_url": secure.url(name), "model": {"context_window": 10_000_000}} for name in ("a", "b")}
    running = await start_process(platforms, {"GATEWAY_API_KEY": API_KEY, "SSL_CERT_FILE": str(pem)})
    async with client_of(running) as client:
        yield client


async def test_answers_come_over_one_connection_and_long_prompts_arrive_whole(client, secure):
    prompt = "Grüße, " * 300_000
    secure.script("a", answer("one"))
    for streaming in (False, True, False):
        assert (await client.ask(prompt, streaming=streaming)).text == "one"
    assert [request.prompt == prompt for request in secure.requests] == [True] * 3
    assert secure.connections == 1


@both_ways
async def test_a_connection_that_is_cut_moves_to_the_next_route(client, secure, streaming):
    secure.script("a", raw(CUT))
    secure.script("b", answer("from b"))
    got = await client.ask("hi", streaming=streaming)
    assert (got.text, got.headers["X-Fallback-Trail"]) == ("from b", "a/a-model=connection")


async def test_a_clients_leaving_reaches_the_provider_at_once(client, secure):
    secure.script("a", sse(chunk("begun "), PAUSE))
    async with client.post(client.request("hi", stream=True)) as response:
        assert await response.content.readexactly(len(FIRST)) == FIRST
        response.close()
        left_at = time.monotonic()
    async with asyncio.timeout(5):
        assert_in_time(await secure.closed() - left_at)


@both_ways
async def test_a_certificate_that_nobody_vouches_for_is_a_failure_like_others(start_process, secure, fake, streaming):
    fake.script("b", answer("from b"))
    platforms = {"a": {"base_url": secure.url("a")}, "b": {}}
    running = await start_process(platforms, {"GATEWAY_API_KEY": API_KEY})
    async with client_of(running) as client:
        got = await client.ask("hi", streaming=streaming)
    assert (got.text, got.headers["X-Fallback-Trail"]) == ("from b", "a/a-model=connection")
    assert secure.requests == []
