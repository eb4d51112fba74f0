"""SPEC 6: errors inside a 200, in a body, in the first and in the tenth event of a stream."""

import json
from dataclasses import dataclass

import pytest
from conftest import case
from fake_provider import answer, body, chunk, completion, event, sse

RATE_LIMITED = (429, "rate_limited", "key")
BROKEN = (503, "server_error", "model")
UNSTATED = (200, "wrapped", None)  # retryable, nothing cools
BAD_REQUEST = (400, "bad_request", None)


@dataclass(frozen=True)
class Wrapped:
    """A wrapped error, what it means (status, kind, what cools) and the message that must be found in it."""

    content: dict
    means: tuple[int, str, str | None]
    message: str | None = "no luck"


def coded(code: object, means: tuple, **more: object) -> Wrapped:
    return Wrapped({"error": {"message": "no luck", "code": code, **more}}, means)


FORMS = {
    "text": Wrapped({"error": "no luck"}, UNSTATED),
    "an object": Wrapped({"error": {"message": "no luck"}}, UNSTATED),
    "an object without message": Wrapped({"error": {"type": "odd"}}, UNSTATED, None),
    "beside choices": Wrapped(chunk("not to be seen") | {"error": {"message": "no luck"}}, UNSTATED),
    "success false": Wrapped({"success": False, "errors": [{"code": 7009, "message": "no luck"}]}, UNSTATED),
    "success false beside a result": Wrapped(
        {"success": False, "errors": [{"message": "no luck"}], "messages": [], "result": None}, UNSTATED
    ),
    "errors without choices": Wrapped({"errors": [{"message": "no luck"}]}, UNSTATED),
    "errors inside error": Wrapped({"error": {"errors": [{"message": "no luck"}]}}, UNSTATED),
    "detail": Wrapped({"error": {"type": "odd"}, "detail": "no luck"}, UNSTATED),
    "code 429": coded(429, RATE_LIMITED),
    "code '429'": coded("429", RATE_LIMITED),
    "code 429.0": coded(429.0, RATE_LIMITED),
    "status 429": coded(None, RATE_LIMITED, status=429),
    "code 503": coded(503, BROKEN),
    "code '503'": coded("503", BROKEN),
    "code 401": coded(401, (401, "auth", "invalid")),
    "code 402": coded(402, (402, "out_of_credit", "key")),
    "code 403": coded(403, (403, "forbidden", "key")),
    "code 400": coded(400, BAD_REQUEST),
    "code 404": coded(404, (404, "not_found", None)),
    "code 500": coded(500, (500, "server_error", "model")),
    "RESOURCE_EXHAUSTED": coded(None, RATE_LIMITED, status="RESOURCE_EXHAUSTED"),
    "rate_limit_exceeded": coded("rate_limit_exceeded", RATE_LIMITED),
    "UNAVAILABLE": coded(None, BROKEN, status="UNAVAILABLE"),
    "INVALID_ARGUMENT": coded("INVALID_ARGUMENT", BAD_REQUEST),
    "context length": coded("context_length_exceeded", (..., "context_length", None)),
    "code of another numbering": coded("1302", UNSTATED),
    "code 99": coded(99, UNSTATED),
    "code 600": coded(600, UNSTATED),
    "code -503": coded(-503, UNSTATED),
    "code 503.5": coded(503.5, UNSTATED),
    "code 'NaN'": coded("NaN", UNSTATED),
    "code 'Infinity'": coded("Infinity", UNSTATED),
    "code 1e308": coded(1e308, UNSTATED),
    "code ''": coded("", UNSTATED),
    "code true": coded(True, UNSTATED),
    "code of a list": coded([503], UNSTATED),
    "code of an object": coded({"code": 503}, UNSTATED),
    "an unknown name": coded("something_odd", UNSTATED),
}
PLACES = {
    "body": lambda form: body(form.content),
    "first event": lambda form: sse(form.content),
    "second event": lambda form: sse(chunk(role="assistant", content=""), form.content, chunk("not to be seen")),
    "JSON body of a stream": lambda form: body(form.content),
}


def assert_row(row: dict, form: Wrapped) -> None:
    status, kind, _ = form.means
    assert (row["platform"], row["status"], row["error_kind"]) == ("a", "error", kind)
    assert isinstance(row["http_status"], int)
    assert status in (..., row["http_status"])
    assert form.message is None or form.message in row["error"]


async def assert_cooled(gateway, form: Wrapped) -> None:
    cools = form.means[2]
    assert set(await gateway.cooled_models()) == ({"a-model"} if cools == "model" else set())
    assert set(await gateway.cooled_keys()) == ({"a-model"} if cools == "key" else set())


@pytest.mark.parametrize("place", PLACES)
async def test_an_error_inside_a_200_moves_on_to_the_next_route(start_gateway, fake, place):
    gateway = await start_gateway(["a", "b"])
    for name, form in FORMS.items():
        with case(name):
            fake.clear()
            fake.script("a", PLACES[place](form))

            got = await gateway.ask(streaming=place != "body")

            assert got.text == "hello from b"
            assert fake.called == ["a", "b"]
            assert got.headers["X-Fallback-Trail"] == f"a/a-model={form.means[1]}"
            failed, _ = await gateway.rows_of(got, 2)
            assert_row(failed, form)
            await assert_cooled(gateway, form)
            await gateway.recovered()


async def test_an_error_in_the_tenth_event_ends_the_stream_as_failed(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    words = [chunk(f"word{n} ") for n in range(9)]
    for name, form in FORMS.items():
        with case(name):
            fake.clear()
            fake.script("a", sse(*words, form.content, chunk("not to be seen"), chunk(finish="stop")))

            got = await gateway.stream()

            assert got.text == "".join(f"word{n} " for n in range(9))
            assert got.error["type"] == "stream_error"
            assert got.finishes == ["error"]
            got.assert_done_once()
            assert fake.called == ["a"]
            (failed,) = await gateway.rows_of(got, 1)
            assert_row(failed, form)
            await assert_cooled(gateway, form)
            await gateway.recovered()


async def test_a_wrapped_401_makes_the_key_invalid(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", body({"error": {"message": "bad key", "code": 401}}))
    await gateway.chat()

    assert (await gateway.chat()).text == "hello from b"

    assert fake.called == ["a", "b", "b"]


HARMLESS = {"null": None, "empty text": "", "empty object": {}, "empty list": []}


@pytest.mark.parametrize("nothing", HARMLESS.values(), ids=HARMLESS)
async def test_an_empty_error_field_is_no_error(start_gateway, fake, nothing):
    gateway = await start_gateway(["a", "b"])
    fields = {"error": nothing, "errors": [], "success": True}
    chunks = [chunk("all ", root=fields), chunk("well", root=fields), chunk(finish="stop", root=fields)]
    fake.script("a", completion("all well", **fields), sse(*chunks))

    assert (await gateway.chat()).text == "all well"
    (await gateway.stream()).assert_whole("all well")

    assert fake.called == ["a", "a"]


async def test_errors_beside_choices_are_no_error(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", completion("all well", errors=[{"message": "a warning"}]))

    assert (await gateway.chat()).text == "all well"


async def test_an_answer_that_talks_about_errors_is_an_answer(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    text = json.dumps({"error": {"code": 503, "message": "as an example"}})
    fake.script("a", answer(text))

    assert (await gateway.chat()).text == text
    (await gateway.stream()).assert_whole(text)


MALFORMED = {
    "half an object": b'data: {"id": "x", "choices": [{"del\n\n',
    "plain text": b"data: hello there\n\n",
    "nothing": b"data: \n\n",
    "NaN": b'data: {"error": NaN}\n\n',
    "a broken error": b'data: {"error": {"code": 503\n\n',
    "not UTF-8": b'data: {"choices": [{"index": 0, "delta": {"content": "\xff\xfe"}}]}\n\n',
    "a number": b"data: 42\n\n",
    "a list": b"data: [1, 2]\n\n",
    "null": b"data: null\n\n",
}


async def test_a_malformed_event_is_skipped_and_the_stream_goes_on(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    first, last = chunk(role="assistant", content=""), chunk(finish="stop")
    for name, malformed in MALFORMED.items():
        with case(name):
            fake.script("a", sse(malformed, first, malformed, chunk("all "), malformed, chunk("well"), last))

            got = await gateway.stream()

            got.assert_whole("all well")
            assert malformed not in got.body
            (row,) = await gateway.rows_of(got, 1)
            assert row["status"] == "success"


async def test_an_error_after_a_malformed_event_is_not_swallowed(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", sse(MALFORMED["half an object"], {"error": {"message": "no luck", "code": 503}}))

    assert (await gateway.stream()).text == "hello from b"

    assert (await gateway.rows(2))[0]["error_kind"] == "server_error"


async def test_a_stream_of_malformed_events_only_is_a_failure(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", sse(*[event("{broken")] * 5))

    assert (await gateway.stream()).text == "hello from b"


@pytest.mark.parametrize(
    "finish", ["error", "network_error"], ids=["OpenRouter's finish reason", "Z.ai's finish reason"]
)
async def test_an_error_finish_beside_an_error_is_one_failure(start_gateway, fake, finish):
    gateway = await start_gateway(["a", "b"])
    last = chunk(finish=finish, root={"error": {"message": "backend gone", "code": 502}})
    fake.script("a", sse(chunk("half an "), last))

    got = await gateway.stream()

    assert got.text == "half an "
    assert got.finishes == ["error"]
    got.assert_done_once()
    assert (await gateway.row())["error_kind"] == "server_error"
