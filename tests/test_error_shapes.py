"""Issue 4, must-show 2: every error shape of the native platforms ends in the right row of SPEC 5.2.

The platforms have the quirks of the real catalogue. A row says what a failure is called, with which status, and what
rests for how long: "model" is the transient cooldown, "invalid" the key for good; a number is the key's seconds.
"""

import json
import time
from dataclasses import dataclass, field, replace
from itertools import product

import pytest
from conftest import case
from fake_provider import answer, body, chunk, chunked, event, head, raw, sse
from wires import PLATFORMS, WIRES, Gemini, Said, gemini_frame

from adapters import errors as faults
from protection import classify
from routing.day import until_reset_s

DAY = "until the platform's day ends"
FORBIDDEN_S = 120  # the setting's default
HINTLESS_S = 7.5  # the first rest after a 429 that names no time: a sixteenth of the setting (SPEC 7.9)


@dataclass(frozen=True)
class Shape:
    platform: str
    status: int
    content: object
    kind: str
    http_status: int  # as it is logged
    rests: object = None  # None, "model", "invalid", DAY or seconds
    headers: dict = field(default_factory=dict)

    @property
    def daily_reset(self) -> str:
        return PLATFORMS[self.platform].get("daily_reset", "UTC")

    @property
    def quirks(self) -> dict:
        return PLATFORMS[self.platform].get("quirks", {})


def google(status: int, name: str, *details: dict, message: str = "no luck") -> dict:
    return {"error": {"code": status, "message": message, "status": name, "details": list(details)}}


def reason(name: str) -> dict:
    return {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": name, "domain": "googleapis.com"}


def violated(quota_id: str, value: str = "20") -> dict:
    violation = {"quotaMetric": "generate_requests", "quotaId": quota_id, "quotaValue": value}
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [violation]}


def retry(delay: str) -> dict:
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}


def enveloped(code: int, message: str = "no luck") -> dict:
    return {"success": False, "errors": [{"code": code, "message": message}], "messages": [], "result": None}


PER_DAY, PER_MINUTE = "GenerateRequestsPerDayPerProjectPerModel-FreeTier", "GenerateRequestsPerMinutePerProject"
SHAPES = {
    "Gemini: bad key at 400": Shape(
        "google", 400, google(400, "INVALID_ARGUMENT", reason("API_KEY_INVALID")), "auth", 401, "invalid"
    ),
    "Gemini: bad key in words": Shape(
        "google",
        400,
        google(400, "INVALID_ARGUMENT", message="API key not valid. Please pass one."),
        "auth",
        401,
        "invalid",
    ),
    "Gemini: suspended": Shape(
        "google", 403, google(403, "PERMISSION_DENIED", reason("CONSUMER_SUSPENDED")), "auth", 401, "invalid"
    ),
    "Gemini: service disabled": Shape(
        "google", 403, google(403, "PERMISSION_DENIED", reason("SERVICE_DISABLED")), "forbidden", 403, FORBIDDEN_S
    ),
    "Gemini: location": Shape(
        "google",
        400,
        google(400, "FAILED_PRECONDITION", message="User location is not supported"),
        "forbidden",
        403,
        FORBIDDEN_S,
    ),
    "Gemini: day used up": Shape(
        "google", 429, google(429, "RESOURCE_EXHAUSTED", violated(PER_DAY), retry("38.2s")), "rate_limited", 429, DAY
    ),
    "Gemini: minute used up": Shape(
        "google",
        429,
        google(429, "RESOURCE_EXHAUSTED", violated(PER_MINUTE), retry("38.2s")),
        "rate_limited",
        429,
        38.2,
    ),
    "Gemini: in prose": Shape(
        "google", 429, google(429, "RESOURCE_EXHAUSTED", message="Please retry in 14.19s."), "rate_limited", 429, 14.19
    ),
    "Gemini: not in the plan": Shape(
        "google", 429, google(429, "RESOURCE_EXHAUSTED", violated(PER_DAY, "0")), "forbidden", 403, DAY
    ),
    "Gemini: not in the plan, in words": Shape(
        "google",
        429,
        google(429, "RESOURCE_EXHAUSTED", violated(PER_DAY, ""), message="Quota exceeded for metric: x, limit: 0"),
        "forbidden",
        403,
        DAY,
    ),
    "Gemini: in a list": Shape(
        "google", 503, [google(503, "UNAVAILABLE", message="The model is overloaded")], "server_error", 503, "model"
    ),
    "Gemini: internal": Shape("google", 500, google(500, "INTERNAL"), "server_error", 500, "model"),
    "Gemini: deadline": Shape("google", 504, google(504, "DEADLINE_EXCEEDED"), "server_error", 504, "model"),
    "Gemini: gone": Shape(
        "google", 404, google(404, "NOT_FOUND", message="models/x is not found for API version"), "not_found", 404
    ),
    "Gemini: too long": Shape(
        "google",
        400,
        google(
            400,
            "INVALID_ARGUMENT",
            message="The input token count (1200000) exceeds the maximum number of tokens allowed",
        ),
        "context_length",
        400,
    ),
    "Gemini: bad request": Shape("google", 400, google(400, "INVALID_ARGUMENT"), "bad_request", 400),
    "Cohere: bad key": Shape("cohere", 401, {"id": "1", "message": "invalid api token"}, "auth", 401, "invalid"),
    "Cohere: bad request": Shape("cohere", 400, {"message": "invalid request: unknown field"}, "bad_request", 400),
    "Cohere: month used up": Shape(
        "cohere",
        429,
        {"message": "You are using a Trial key, which is limited to 1000 API calls / month"},
        "rate_limited",
        429,
        86_400,
    ),
    "Cohere: minute used up": Shape(
        "cohere", 429, {"message": "trial key, limited to 20 calls/minute"}, "rate_limited", 429, HINTLESS_S
    ),
    "Cohere: gone": Shape(
        "cohere", 404, {"message": "model 'x' not found, make sure the correct model ID was used"}, "not_found", 404
    ),
    "Cohere: billing cap": Shape("cohere", 402, {"message": "cap reached"}, "out_of_credit", 402, 3600),
    "Cohere: blocked": Shape("cohere", 498, {"message": "blocked"}, "server_error", 498, "model"),
    "Cohere: broken": Shape("cohere", 503, {"message": "try later"}, "server_error", 503, "model"),
    "Cloudflare: day used up": Shape("cloudflare", 429, enveloped(3036), "rate_limited", 429, DAY),
    "Cloudflare: day used up, as observed": Shape(
        "cloudflare",
        429,
        enveloped(4006, "you have used up your daily free allocation of 10,000 neurons"),
        "rate_limited",
        429,
        DAY,
    ),
    "Cloudflare: no capacity": Shape("cloudflare", 429, enveloped(3040), "server_error", 503, "model"),
    "Cloudflare: no such model": Shape("cloudflare", 400, enveloped(5007), "not_found", 404),
    "Cloudflare: bad data": Shape("cloudflare", 400, enveloped(5004), "bad_request", 400),
    "Cloudflare: bad token": Shape("cloudflare", 403, enveloped(10000), "auth", 401, "invalid"),
    "Cloudflare: paid plan": Shape("cloudflare", 403, enveloped(5035), "forbidden", 403, FORBIDDEN_S),
    "Cloudflare: timeout": Shape("cloudflare", 408, enveloped(3007), "server_error", 504, "model"),
    "Cloudflare: too large": Shape("cloudflare", 413, enveloped(3006), "bad_request", 413),
    "Groq: tokens a minute": Shape(
        "groq",
        429,
        {
            "error": {
                "message": "Rate limit reached on tokens per minute (TPM): Limit 6000. Please try again in 7m12.5s",
                "type": "tokens",
                "code": "rate_limit_exceeded",
            }
        },
        "rate_limited",
        429,
        432.5,
    ),
    "Groq: with a header": Shape(
        "groq",
        429,
        {"error": {"message": "Please try again in 9s", "code": "rate_limit_exceeded"}},
        "rate_limited",
        429,
        3,
        {"retry-after": "3"},
    ),
    "Groq: counters only": Shape(
        "groq",
        429,
        {"error": {"message": "slow down"}},
        "rate_limited",
        429,
        179.56,
        {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "2m59.56s"},
    ),
    "Groq: too large": Shape(
        "groq",
        413,
        {
            "error": {
                "message": "Request too large for model x: Limit 6000, Requested 9000",
                "code": "rate_limit_exceeded",
            }
        },
        "context_length",
        413,
    ),
    "Groq: account dead": Shape(
        "groq", 400, {"error": {"message": "restricted", "code": "organization_restricted"}}, "auth", 401, "invalid"
    ),
    "Groq: decommissioned": Shape(
        "groq", 400, {"error": {"message": "gone", "code": "model_decommissioned"}}, "not_found", 400
    ),
    "llama.cpp: too long": Shape(
        "llamacpp",
        400,
        {
            "error": {
                "code": 400,
                "message": "the request exceeds the available context size, try increasing it",
                "type": "exceed_context_size_error",
            }
        },
        "context_length",
        400,
    ),
    "Cerebras: queue": Shape(
        "cerebras",
        429,
        {"message": "high traffic", "type": "too_many_requests_error", "code": "queue_exceeded"},
        "server_error",
        503,
        "model",
    ),
    "Cerebras: flat": Shape(
        "cerebras",
        429,
        {
            "message": "Tokens per minute limit exceeded",
            "type": "too_many_requests_error",
            "code": "token_quota_exceeded",
        },
        "rate_limited",
        429,
        HINTLESS_S,
    ),
    "Mistral: capacity": Shape(
        "mistral",
        429,
        {"object": "error", "message": "Service tier capacity exceeded for this model.", "code": "3505"},
        "server_error",
        503,
        "model",
    ),
    "Mistral: nested message": Shape(
        "mistral",
        422,
        {"object": "error", "message": {"detail": [{"loc": ["body"], "msg": "Extra inputs are not permitted"}]}},
        "bad_request",
        422,
    ),
    "Nvidia: degraded": Shape(
        "nvidia",
        400,
        {"status": 400, "title": "Bad Request", "detail": "DEGRADED function cannot be invoked"},
        "server_error",
        503,
        "model",
    ),
    "Nvidia: problem details": Shape(
        "nvidia", 429, {"status": 429, "title": "Too Many Requests"}, "rate_limited", 429, HINTLESS_S
    ),
    "OpenRouter: the backend's limit": Shape(
        "openrouter",
        429,
        {
            "error": {
                "message": "Provider returned error",
                "code": 429,
                "metadata": {"raw": "x is temporarily rate-limited upstream", "provider_name": "x"},
            }
        },
        "server_error",
        503,
        "model",
    ),
    "OpenRouter: moderation": Shape(
        "openrouter",
        403,
        {"error": {"message": "flagged", "code": 403, "metadata": {"reasons": ["violence"], "flagged_input": "…"}}},
        "content_filter",
        400,
    ),
    "Zhipu: no balance at 429": Shape(
        "zhipu", 429, {"error": {"code": "1113", "message": "余额不足"}}, "out_of_credit", 402, 3600
    ),
    "Zhipu: concurrency": Shape(
        "zhipu", 429, {"error": {"code": "1302", "message": "并发"}}, "rate_limited", 429, HINTLESS_S
    ),
    "Zhipu: overloaded": Shape(
        "zhipu", 429, {"error": {"code": "1305", "message": "busy"}}, "server_error", 503, "model"
    ),
    "Zhipu: day used up": Shape(
        "zhipu", 429, {"error": {"code": "1304", "message": "daily"}}, "rate_limited", 429, DAY
    ),
    "Zhipu: filtered": Shape("zhipu", 400, {"error": {"code": "1301", "message": "sensitive"}}, "content_filter", 400),
    "OpenCode: a model dressed as a key": Shape(
        "opencode",
        401,
        {"type": "error", "error": {"type": "ModelError", "message": "Model x is not supported"}},
        "not_found",
        404,
    ),
    "LongCat: the day's tokens": Shape(
        "longcat", 402, {"error": {"message": "quota used up", "code": "insufficient"}}, "out_of_credit", 402, DAY
    ),
    "LongCat: in the body": Shape(
        "longcat",
        429,
        {"error": {"code": "rate_limit_exceeded", "message": "slow", "retry_after": 60}},
        "rate_limited",
        429,
        60,
    ),
    "ModelScope: the day's counter": Shape(
        "modelscope",
        429,
        {"errors": {"message": "limit", "request_id": "1"}},
        "rate_limited",
        429,
        DAY,
        {"modelscope-ratelimit-requests-remaining": "0"},
    ),
    "SiliconFlow: flat code": Shape(
        "siliconflow", 400, {"code": 20012, "message": "Model does not exist", "data": None}, "not_found", 404
    ),
    "OpenRouter: the backend's error as text": Shape(
        "openrouter",
        429,
        {
            "error": {
                "message": "Provider returned error",
                "code": 429,
                "metadata": {"raw": json.dumps(google(429, "RESOURCE_EXHAUSTED", retry("38.2s"), message="spent"))},
            }
        },
        "rate_limited",
        429,
        38.2,
    ),
    "plain text": Shape("nvidia", 404, "404 page not found", "not_found", 404),
}
SHAPES_OF = {
    platform: {name: shape for name, shape in SHAPES.items() if shape.platform == platform}
    for platform in sorted({shape.platform for shape in SHAPES.values()})
}


def seconds_of_rest(shape: Shape) -> float:
    if shape.rests == DAY:
        return until_reset_s(shape.daily_reset, time.time())
    return float(shape.rests)


async def assert_rest(gateway, shape: Shape) -> None:
    assert set(await gateway.cooled_models()) == ({"native-model"} if shape.rests == "model" else set())
    cooled = await gateway.cooled_keys()
    if shape.rests in (None, "model", "invalid"):
        assert cooled == {}
    else:
        assert cooled["native-model"] / 1000 == pytest.approx(seconds_of_rest(shape), abs=3)
    statuses = {key["platform"]: key["status"] for key in (await gateway.get("/api/keys")).json}
    assert (statuses["native"] == "invalid") is (shape.rests == "invalid")


def platforms_for(shape: Shape) -> dict:
    adapter = PLATFORMS[shape.platform]["adapter"]
    return {"native": {"quirks": shape.quirks, "daily_reset": shape.daily_reset, "adapter": adapter}, "b": {}}


def scripted(shape: Shape):
    if isinstance(shape.content, str):
        text = shape.content.encode()
        return raw(head(shape.status, {"content-type": "text/plain", "content-length": str(len(text))}), text)
    return body(shape.content, status=shape.status, headers=shape.headers)


@pytest.mark.parametrize("platform", SHAPES_OF)
async def test_an_error_means_what_the_platform_means_by_it(start_gateway, fake, platform):
    gateway = None
    for (name, shape), streaming in product(SHAPES_OF[platform].items(), (False, True)):
        gateway = gateway or await start_gateway(platforms_for(shape))
        with case((name, streaming)):
            fake.clear()
            fake.script("native", scripted(shape))

            got = await gateway.ask(streaming=streaming)

            if shape.kind == "content_filter":
                assert (got.status, fake.called) == (400, ["native"])
                (failed,) = await gateway.rows_of(got, 1)
            else:
                assert got.text == "hello from b"
                failed, _ = await gateway.rows_of(got, 2)
            assert (failed["error_kind"], failed["http_status"]) == (shape.kind, shape.http_status)
            assert failed["error"]
            await assert_rest(gateway, shape)
            await gateway.recovered()


def begun(shape: Shape) -> list[bytes]:
    if PLATFORMS[shape.platform]["adapter"] == "google":
        return [event(gemini_frame({"text": "Once upon "}, said=None))]
    return [event(chunk("Once upon "))]


# What the body alone tells, without the HTTP status it used to come with.
IN_A_STREAM = {
    "Gemini: bad key at 400": "auth",
    "Gemini: day used up": "rate_limited",
    "Gemini: minute used up": "rate_limited",
    "Gemini: location": "forbidden",
    "Gemini: internal": "server_error",
    "Gemini: gone": "not_found",
    "Gemini: bad request": "bad_request",
    "Gemini: too long": "context_length",
    "Cohere: broken": "wrapped",
    "Cloudflare: day used up": "rate_limited",
    "Cloudflare: no capacity": "server_error",
    "Cloudflare: bad token": "auth",
    "Cloudflare: bad data": "wrapped",
    "Groq: tokens a minute": "rate_limited",
    "Cerebras: flat": "rate_limited",
    "Mistral: capacity": "server_error",
    "Zhipu: no balance at 429": "out_of_credit",
    "Zhipu: overloaded": "server_error",
    "OpenCode: a model dressed as a key": "not_found",
    "SiliconFlow: flat code": "not_found",
}


@pytest.mark.parametrize(("name", "kind"), IN_A_STREAM.items(), ids=IN_A_STREAM)
async def test_an_error_in_the_middle_of_a_native_stream_ends_it_and_has_its_effects(start_gateway, fake, name, kind):
    shape = SHAPES[name]
    gateway = await start_gateway(platforms_for(shape))
    fake.script("native", chunked(*begun(shape), event(json.dumps(shape.content))))

    got = await gateway.stream()

    assert got.text == "Once upon "
    assert got.finishes == ["error"]
    got.assert_done_once()
    assert (await gateway.row())["error_kind"] == kind
    await assert_rest(gateway, replace(shape, rests=None) if kind == "wrapped" else shape)


@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
async def test_three_platforms_that_refuse_the_request_are_believed(start_gateway, fake, wire):
    options = wire.options(fake)
    gateway = await start_gateway({wire.name: options})
    fake.script(wire.name, wire.error(400, "this cannot be"))

    got = await gateway.chat()

    assert got.status == 400
    assert got.error["type"] == "invalid_request_error"
    assert "this cannot be" in got.error["attempts"][0]["message"]


def test_a_message_that_is_packed_json_is_read():
    packed = json.dumps({"error": {"message": "inner words", "code": 429}})
    assert faults.read({"error": {"message": packed}}).message == "inner words"
    assert faults.read({"error": {"message": "{not json"}}).message == "{not json"


async def test_a_key_in_an_error_is_not_passed_on(start_gateway, fake):
    gateway = await start_gateway({"google": Gemini().options(fake) | {"keys": ["AIzaSyA-secret-secret-secret-0001"]}})
    words = "Consumer 'api_key:AIzaSyA-secret-secret-secret-0001' has been suspended."
    fake.script(
        "google", body(google(403, "PERMISSION_DENIED", reason("CONSUMER_SUSPENDED"), message=words), status=403)
    )

    got = await gateway.chat()

    assert b"secret-secret" not in got.body
    assert "secret-secret" not in (await gateway.row())["error"]


async def test_the_day_of_a_platform_ends_where_the_platform_is(start_gateway, fake):
    gateway = await start_gateway({"a": {"daily_reset": "Asia/Shanghai"}, "b": {}})
    fake.script("a", body({"error": {"message": "daily limit reached"}}, status=429))

    await gateway.chat()

    left = (await gateway.cooled_keys())["a-model"] / 1000
    assert left == pytest.approx(until_reset_s("Asia/Shanghai", time.time()), abs=3)


async def test_a_stream_that_begins_well_after_an_error_elsewhere_is_whole(start_gateway, fake):
    gateway = await start_gateway({"google": Gemini().options(fake), "b": {}})
    fake.script("google", Gemini().error(503, "overloaded"), Gemini().says(Said("never")))
    fake.script("b", sse(chunk("all "), chunk("well"), chunk(finish="stop")), answer())

    (await gateway.stream()).assert_whole("all well")


def test_every_name_in_the_catalogue_is_one_that_means_something():
    for platform in PLATFORMS.values():
        quirks = platform.get("quirks", {})
        for name in [*quirks.get("error_codes", {}).values(), *quirks.get("error_texts", {}).values()]:
            assert name in faults.STATUS_BY_NAME, (platform["id"], name)
            assert classify(faults.STATUS_BY_NAME[name], name, "")
