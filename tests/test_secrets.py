"""No key is ever seen: not in the files, not in the output, not in anything a client gets (SPEC 2.3)."""

import base64
import signal

from conftest import API_KEY, client_of, files_of
from fake_provider import CUT, Request, answer, body, chunk, error, raw, sse

SECRETS = {
    "a": "sk-aaaa-0123456789-THE-SECRET-A",
    "b": "gsk_bbbb0123456789THESECRETB",
    "c": "plain words secret".replace(" ", "~") + "c0123456789",
    "from-environment": "sk-env-0123456789-THE-SECRET-E",
    "client": API_KEY,
    "encryption": "5e" * 32,
}
ENVIRONMENT = {
    "GATEWAY_API_KEY": API_KEY,
    "ENCRYPTION_KEY": SECRETS["encryption"],
    "PLATFORM_E_API_KEY": SECRETS["from-environment"],
    "LOG_LEVEL": "debug",
    "TRANSIENT_COOLDOWN_MS": "1",
    "RATE_LIMIT_COOLDOWN_MS": "1",
}
PLATFORMS = {
    **{name: {"keys": [SECRETS[name]]} for name in "abc"},
    "e": {"keys": [], "env": ["PLATFORM_E_API_KEY"]},
}


def telling(status: int):
    """A platform that repeats the credentials it was given, as some do."""
    return lambda request: error(
        status,
        f"Incorrect key {request.key} in Authorization: Bearer {request.key}, see https://x.example/?key={request.key}",
        code="bad_key",
    )


def telling_in_200(request: Request):
    told = {"error": {"message": f"wrong key {request.key}", "code": 500, "metadata": {"raw": request.key}}}
    return sse(told) if request.streaming else body(told)


def telling_in_mid_stream(request: Request):
    return (
        sse(chunk("begun"), {"error": {"message": f"lost {request.key}", "code": 503}})
        if request.streaming
        else (telling(500)(request))
    )


def telling_in_html(request: Request):
    return body(f"<html>{request.key}</html>", status=502, headers={"content-type": "text/html", "x-key": request.key})


def telling_in_reason(request: Request):
    return raw(f"HTTP/1.1 500 {request.key}\r\ncontent-length: 0\r\nx-k: {request.key}\r\n\r\n".encode())


WAYS = [dict.fromkeys("abce", telling(status)) for status in (500, 400, 404, 403, 429, 409, 422)]
WAYS += [dict.fromkeys("abce", way) for way in (telling_in_200, telling_in_mid_stream, telling_in_html)]
WAYS += [dict.fromkeys("abce", way) for way in (telling_in_reason, raw(CUT), answer())]
WAYS += [{"a": telling(402), "b": telling(402), "c": telling(401), "e": telling(401)}]  # no key works after these


def spellings(secret: str) -> list[bytes]:
    """The secret as it is and encoded, and its telling half."""
    plain = secret.encode()
    return [plain, plain.hex().encode(), base64.b64encode(plain).rstrip(b"="), plain[len(plain) // 2 :]]


async def test_no_key_is_seen_anywhere(start_process, fake, tmp_path):
    running = await start_process(PLATFORMS, ENVIRONMENT)
    seen: dict[str, bytes] = {}

    async with client_of(running) as client:
        for number, ways in enumerate(WAYS):
            called_before = len(fake.requests)
            for name, way in ways.items():
                fake.script(name, way)
            for streaming in (False, True):
                for model in ("auto-priority", "a-model", "unknown"):
                    got = await client.ask(streaming=streaming, model=model)
                    seen[f"answer {number} {streaming} {model}"] = got.body + str(got.headers).encode()
                asked = {"input": "hi", "model": "auto-priority", "stream": streaming}
                got = await client.send(asked, path="/v1/responses")
                seen[f"response {number} {streaming}"] = got.body + str(got.headers).encode()
            assert len(fake.requests) > called_before
        wrong = await client.send({}, headers={"authorization": f"Bearer {API_KEY}x"})
        seen["refusal"] = wrong.body + str(wrong.headers).encode()
        for path in ("/api/requests?limit=1000", "/api/protection", "/api/keys", "/api/platforms", "/api/status"):
            seen[path] = (await client.get(path)).body
        for path in ("/metrics", "/healthz", "/v1/models", "/"):
            seen[path] = (await client.get(path)).body
        seen |= {f"{name} while running": data for name, data in files_of(tmp_path).items()}
    running.signal(signal.SIGTERM)
    assert await running.ended() == 0
    seen |= files_of(tmp_path)
    seen["output"] = running.text.encode()

    used = {request.key for request in fake.requests}
    assert used == {SECRETS[name] for name in ("a", "b", "c", "from-environment")}
    found = [
        (place, name) for place, data in seen.items() for name in SECRETS for s in spellings(SECRETS[name]) if s in data
    ]
    assert found == []


async def test_prompts_and_answers_are_in_no_file_and_no_log(start_process, fake, tmp_path):
    running = await start_process(PLATFORMS, ENVIRONMENT)
    fake.script("a", error(500), answer("an answer of great privacy"))
    fake.script("b", answer("an answer of great privacy"))
    async with client_of(running) as client:
        for streaming in (False, True):
            await client.ask("a question of great privacy", streaming=streaming)
            asked = {"input": "a question of great privacy", "model": "auto-priority", "stream": streaming}
            assert b"great privacy" in (await client.send(asked, path="/v1/responses")).body
    running.signal(signal.SIGTERM)
    await running.ended()

    written = running.text.encode() + b"".join(files_of(tmp_path).values())
    assert b"great privacy" not in written
