"""Issue 5, must-show 2: what a failure costs does not depend on the dialect in which the client asked.

Every fault of chat's own tables, and those in mid-stream, is met by the same requests in all dialects, and everything
that they leave behind is compared. One gateway serves a whole table, so each fault gets a clean slate first. What a
client of the Messages API is told of each is judged by that API's own models.
"""

import asyncio
from collections import Counter

import aiohttp
import pytest
from conftest import Answer, Stream, both_ways
from fake_provider import PAUSE, ROLE, Every, TooLate, Wait, chunk, completion, error, event, raw, sse
from faults import BREAKS, EITHER, STREAMED, TWO_KEYS, WHOLE, Failure, of_status
from strict_messages import assert_error, assert_in_order, assert_message, events_of

FILTERED = Failure(error(400, code="content_filter"), "content_filter", 400)
WRAPPED = {"error": {"message": "overloaded", "code": 503}}
WHOLE_FAULTS = {
    **EITHER,
    **WHOLE,
    "a filter": FILTERED,
    "an unlimited wait": of_status(429, "rate_limited"),
    "an error in a 200": Failure(completion(**WRAPPED), "server_error", 503),
    "an answer cut far too early": Failure(completion("h", finish="length", usage=(11, 1)), "success", 200),
}
STREAMED_FAULTS = {
    **EITHER,
    **STREAMED,
    "a filter": FILTERED,
    "an error in a 200": Failure(sse(ROLE, WRAPPED), "server_error", 503),
    "an error in the first event": Failure(sse(event(WRAPPED)), "server_error", 503),
    "an answer cut far too early": Failure(sse(chunk("h"), chunk(finish="length")), "success", 200),
    **{
        f"{name} in mid-stream": Failure(sse(ROLE, chunk("half"), breaking, done=False), kind, None)
        for name, (breaking, _, kind) in BREAKS.items()
    },
}
REQUESTS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4000},
    "/v1/responses": {"input": "hi", "max_output_tokens": 4000},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4000},
}
MESSAGES_STATUS = {400: "invalid_request_error", 429: "rate_limit_error", 529: "overloaded_error"}
LOGGED = ("platform", "model_id", "requested_model", "routing_mode", "status", "error_kind", "http_status")
LOGGED += ("error", "input_tokens", "output_tokens", "attempt", "streamed", "skipped_models")
ROUTED = ("X-Routed-Via", "X-Fallback-Attempts", "X-Fallback-Trail")
MODEL = {"max_output": 4000, "prefer_in": ["smart"]}
PLATFORMS = {"a": {"protection": "provider-ban", "model": MODEL, **TWO_KEYS}, "b": {}}
TIMES = {"THREAD_COOLDOWN_MS": "1", "TRIAL_SPACING_MS": "60000"}  # no trial is due, however long a row takes
SHORT_TIMES = {"REQUEST_TIMEOUT_MS": "100", "MAX_STREAM_STALL_MS": "100", "FIRST_TOKEN_TIMEOUT_MS": "200"}


def is_silence(fault: Failure) -> bool:
    """Whether only a limit of time ends it; a flood ends by its size."""
    return any(step is PAUSE or (isinstance(step, Every) and step.seconds > 0) for step in fault.reply.steps)


@pytest.mark.parametrize("silent", [False, True], ids=["errors", "silence"])
@both_ways
async def test_a_fault_costs_the_same_in_every_dialect(start_gateway, fake, streaming, silent):
    gateway = await start_gateway(PLATFORMS, TIMES | (SHORT_TIMES if silent else {}))
    faults = {n: f for n, f in (STREAMED_FAULTS if streaming else WHOLE_FAULTS).items() if is_silence(f) is silent}
    assert faults

    for name, fault in faults.items():
        as_chat, as_response, as_message = [
            await traces(gateway, fake, fault, path, {"model": "auto-smart", "stream": streaming} | request)
            for path, request in REQUESTS.items()
        ]

        for part, as_told in as_chat.items():
            assert as_told == as_response[part], (name, part)
            assert part == "told" or as_told == as_message[part], (name, part)
        assert [status_in_messages(told) for told in as_chat["told"]] == [
            told["status"] for told in as_message["told"]
        ], name
        first = as_chat["rows"][0]
        assert first["platform"] == "a", name
        assert fault.kind in (None, first["error_kind"] or first["status"]), name


async def traces(gateway, fake, fault: Failure, path: str, request: dict) -> dict:
    """What is left behind by two requests of one session, by a stranger's, and by one that no platform answers."""
    await gateway.recovered()
    fake.clear()
    fake.script("a", fault.reply)
    fake.script("b", completion("fine") if not request["stream"] else sse(ROLE, chunk("fine"), chunk(finish="stop")))
    before = await gateway.protection()
    (latest,) = (await gateway.get("/api/requests?limit=1")).json["rows"] or [{"id": 0}]
    answers = [await ask(gateway, path, request, session=f"{path} {latest['id']}") for _ in range(2)]
    left = await gateway.protection()
    await asyncio.sleep(0.003)  # the thread cooldown, so that what others used is free again
    answers.append(await ask(gateway, path, request, session=f"stranger {path} {latest['id']}"))
    seen = (await gateway.get("/api/requests?limit=30")).json["rows"]
    given_up = {
        row["platform"] for row in seen if row["id"] > latest["id"] and row["error_kind"] in ("stall", "timeout")
    }
    if "b" in given_up:
        raise TooLate("the machine took so long that a provider which answers at once was given up")
    fake.script("b", fault.reply)
    await asyncio.sleep(0.003)
    answers.append(await ask(gateway, path, request, session=f"unlucky {path} {latest['id']}"))
    rows = (await gateway.get("/api/requests?limit=30")).json["rows"]
    keys = (await gateway.get("/api/keys")).json
    return {
        "called": fake.called,
        "sent": [sent.json for sent in fake.requests],
        "answers": [{header: told[header] for header in ROUTED} for told in answers],
        "told": answers,
        "rows": [{name: row[name] for name in LOGGED} for row in reversed(rows) if row["id"] > latest["id"]],
        "cooling": [c["model_id"] for c in left["transient_cooldowns"]],
        "cooling keys": [c["model_id"] for c in left["key_cooldowns"]],
        "bans": bans_of(left) - bans_of(before),
        "bad keys": sorted((key["platform"], key["status"], key["last_error"] or "") for key in bad(keys)),
    }


async def ask(gateway, path: str, request: dict, session: str) -> dict:
    """How one request was answered, but for its text."""
    pieces, cut = [], False
    async with gateway.post(request, path=path, headers={"x-session-id": session}) as response:
        try:
            async for data in response.content.iter_any():
                pieces.append(data)
        except aiohttp.ClientPayloadError:
            cut = True
    got = Stream(response.status, response.headers, b"".join(pieces))
    if path == "/v1/messages":
        assert_in_its_own_form(got, request, cut=cut)
    else:
        assert not cut
    told = {name: got.headers.get(name) for name in ROUTED}
    told |= {"status": got.status, "says when": "Retry-After" in got.headers}
    if got.status != 200 and path != "/v1/messages":
        told["error"] = error = got.error
        for attempt in error.get("attempts", ()):
            del attempt["ms"]
    return told


def assert_in_its_own_form(got: Answer, request: dict, *, cut: bool) -> None:
    if got.status != 200:
        assert_error(got, got.status, MESSAGES_STATUS[got.status])
    elif not request["stream"]:
        assert_message(got.json, request["model"])
    else:
        events = events_of(got)
        assert_in_order(events, request["model"])
        assert cut is (events[-1]["type"] not in ("message_stop", "error"))


def status_in_messages(told: dict) -> int:
    """What a client of the Messages API is told where one of chat is told this (SPEC 16.4)."""
    return 529 if told["status"] > 500 else 400 if told["status"] == 422 else told["status"]


def bans_of(protection: dict) -> Counter:
    """Which platforms are banned for how many sessions, and why."""
    return Counter((b["platform"], b["reason"]) for session in protection["bans"] for b in session["platforms"])


def bad(keys: list[dict]) -> list[dict]:
    return [key for key in keys if key["status"] in ("invalid", "rate_limited")]


async def test_a_prompt_too_long_is_called_so_also_in_a_stream_that_only_heartbeats_have_begun(start_gateway, fake):
    """The client alone can mend it, and knows it by its name; it is not asked to send the same again."""
    gateway = await start_gateway(["a"], {"FIRST_HEARTBEAT_MS": "10", "KEEPALIVE_INTERVAL_MS": "10"})
    last = {}
    for path, request in REQUESTS.items():
        heard = asyncio.Event()
        fake.script("a", raw(Wait(heard), *error(400, code="context_length_exceeded").steps))
        async with gateway.post({"model": "auto", "stream": True, **request}, path=path) as response:
            begun = await response.content.readany()
            heard.set()
            last[path] = Stream(200, response.headers, begun + await response.read())

    (told,) = [part["error"] for part in last["/v1/chat/completions"].chunks if "error" in part]
    assert (told["type"], told["code"]) == ("invalid_request_error", "context_length_exceeded")
    assert last["/v1/chat/completions"].finishes == ["error"]
    assert last["/v1/responses"].chunks[-1]["type"] == "response.failed"
    assert last["/v1/responses"].chunks[-1]["response"]["error"]["code"] == "context_length_exceeded"
    assert last["/v1/messages"].chunks[-1]["error"]["type"] == "invalid_request_error"
    assert "prompt is too long" in last["/v1/messages"].chunks[-1]["error"]["message"]
