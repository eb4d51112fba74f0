"""Many requests at once to platforms that fail in all ways at random: every client gets its own whole answer."""

import asyncio
from collections import Counter
from random import Random

from conftest import Answer, Stream
from fake_provider import (
    CUT,
    PAUSE,
    PROMISED,
    RESET,
    ROLE,
    Every,
    Reply,
    Request,
    TooLate,
    answer,
    body,
    chunk,
    chunked,
    completion,
    error,
    raw,
    sse,
)

REQUESTS = 200
AT_ONCE = 50
SEED = 20_261_124
SETTINGS = {
    # Long enough for fifty requests at once on a busy machine, where gateway and providers share one loop.
    "MAX_STREAM_STALL_MS": "1500",
    "FIRST_TOKEN_TIMEOUT_MS": "2500",
    "REQUEST_TIMEOUT_MS": "2500",
    "TRANSIENT_COOLDOWN_MS": "1",  # so that no model rests: they fail until the last request, or until a gate opens
    "RATE_LIMIT_COOLDOWN_MS": "1",
    "TRIAL_SPACING_MS": "1",
}
MODELS = 8  # of each failing platform: a health gate opens for one of them after some failures, never for a platform
NOW = {"retry-after": "0"}

ANY = [
    error(500),
    error(502, "<html>"),
    error(503),
    error(429, headers=NOW),
    error(402, headers=NOW),
    error(403, headers=NOW),
    error(404),
    error(409),
    raw(CUT),
    raw(RESET),
    raw(b"HTTP/1.1 200 OK\r\ncontent-", CUT),
    raw(b"HTTP/1.1 200 OK\r\ncontent-", RESET),
    raw(PAUSE),
    body("<html>hello</html>", headers={"content-type": "text/html"}),
    body({"error": {"message": "wrapped", "code": "503"}}),
    body({"error": "wrapped"}),
    body({"success": False, "errors": [{"message": "wrapped"}]}),
]
WHOLE = [
    completion(""),
    completion(" \n"),
    body('{"choices": ['),
    raw(PROMISED, b'{"id":', CUT),
    raw(PROMISED, b'{"id":', RESET),
    raw(PROMISED, b'{"id":', PAUSE),
]
STREAMED = [
    chunked(PAUSE),
    sse(ROLE, PAUSE),
    sse(ROLE, CUT),
    sse(ROLE, RESET),
    sse(ROLE, done=False),
    sse(ROLE, chunk(finish="stop")),
    sse(Every(0.02, b": working\n\n")),
    sse({"error": {"message": "wrapped", "code": 429}}),
    sse(ROLE, {"error": {"message": "wrapped"}}),
]
# Three platforms in a row that call a request bad end it (SPEC 5.3), so only two of them may.
BAD_REQUESTS = [error(400), error(422)]


class Weather:
    """Decides about every request; the same seed gives each platform the same weather."""

    def __init__(self, platform: str, *, failing: float, bad_requests: bool) -> None:
        self.rng = Random(f"{SEED}{platform}")
        self.failing = failing
        self.bad_requests = bad_requests
        self.failures: dict[tuple[str, str], Reply | None] = {}  # by prompt and model: once in each request

    @property
    def failed(self) -> int:
        return sum(reply is not None for reply in self.failures.values())

    @property
    def silent(self) -> int:
        steps = [reply.steps for reply in self.failures.values() if reply is not None]
        return sum(any(step is PAUSE or isinstance(step, Every) for step in each) for each in steps)

    def __call__(self, request: Request) -> Reply:
        call = request.prompt, request.json["model"]
        self.failures[call] = None  # also where it is resent on a new connection: it has a new fate then
        if self.rng.random() >= self.failing:
            return answer(f"echo of {request.prompt}: größer 🦊")(request)
        failures = ANY + (STREAMED if request.streaming else WHOLE) + (BAD_REQUESTS if self.bad_requests else [])
        self.failures[call] = reply = self.rng.choice(failures)
        return reply


def is_late(got: Answer) -> bool:
    """Whether the client is told of a time limit. The last platform never fails, so it was the machine, or the gateway
    takes whole seconds too long."""
    if isinstance(got, Stream) and got.status == 200:
        return any((chunk.get("error") or {}).get("type") == "stream_timeout" for chunk in got.chunks)
    return got.status == 504


async def test_two_hundred_requests_through_a_storm_are_all_answered(start_gateway, fake):
    models = {name: {"models": [{"model_id": f"{name}-{n}"} for n in range(MODELS)]} for name in "abc"}
    gateway = await start_gateway(models | {"d": {}}, SETTINGS)
    weathers = {
        "a": Weather("a", failing=0.8, bad_requests=True),
        "b": Weather("b", failing=0.6, bad_requests=True),
        "c": Weather("c", failing=0.5, bad_requests=False),
        "d": Weather("d", failing=0, bad_requests=False),
    }
    for name, weather in weathers.items():
        fake.script(name, weather)
    turns = asyncio.Semaphore(AT_ONCE)

    attempted = 0  # as clients are told: a call that is given up at once may never reach its provider

    async def one(number: int) -> None:
        nonlocal attempted
        async with turns:
            got = await gateway.ask(f"request {number}", streaming=bool(number % 2))
        attempted += int(got.headers.get("X-Fallback-Attempts", 0)) + 1
        expected = f"echo of request {number}: größer 🦊"
        if is_late(got):
            raise TooLate(f"request {number}: an answer took longer than its limit of a second or two")
        assert got.text == expected
        if isinstance(got, Stream):
            got.assert_whole(expected)

    async with asyncio.TaskGroup() as group:
        for number in range(REQUESTS):
            group.create_task(one(number))

    rows = await gateway.rows(attempted)
    failures = Counter(row["platform"] for row in rows if row["status"] == "error")
    given_up = Counter(row["platform"] for row in rows if row["error_kind"] in ("timeout", "stall"))
    if any(given_up[name] > weather.silent for name, weather in weathers.items()):
        raise TooLate("a platform that did answer was given up")
    assert failures == {name: weather.failed for name, weather in weathers.items() if weather.failed}
    assert sum(failures.values()) > 200  # it was a storm
    assert Counter(row["status"] for row in rows)["success"] == REQUESTS
    assert all(row["error_kind"] for row in rows if row["status"] == "error")
    by_request = Counter(row["request_id"] for row in rows)
    assert len(by_request) == REQUESTS
    attempts = {row["request_id"]: row["attempt"] for row in rows if row["status"] == "success"}
    assert attempts == dict(by_request)
    assert (await gateway.protection())["active"] == []
