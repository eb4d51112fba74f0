"""SPEC 14.10 and 21.5: an attempt is broken on purpose, the client gets its whole answer, and nothing else changes."""

import asyncio
import json

import pytest
from conftest import assert_error, both_ways, case
from fake_provider import CUT, STOP, answer, chunk, error, sse, usage_chunk
from turns import piece

from engine.drill import CASES, Break, Drill, parse_drill
from wire.errors import InvalidRequest

ADMIN = "admin-0123456789abcdef"
QUICK = {
    "GATEWAY_ADMIN_KEY": ADMIN,
    "RESCUE": "on",
    "RESCUE_AFTER_MS": "60",
    "MAX_STREAM_STALL_MS": "80",
    "TRANSIENT_COOLDOWN_MS": "900",
}
TEXT = "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve and so on until twenty"


def drill(case: str, key: str = ADMIN) -> dict[str, str]:
    return {"X-Drill": case, "X-Admin-Key": key}


def worded(text: str = TEXT):
    """A healthy provider that streams word by word."""

    def reply(request):
        if not request.streaming:
            return answer(text)(request)
        pieces = [word + " " for word in text.split(" ")]
        pieces[-1] = pieces[-1].rstrip()
        return sse(*map(chunk, pieces), STOP, usage_chunk())

    return reply


async def admin_get(gateway, path: str) -> dict:
    return (await gateway.get(path, headers={"authorization": f"Bearer {ADMIN}"})).json


async def rows_of(gateway, got, count: int) -> list[dict]:
    async with asyncio.timeout(3):
        while True:
            rows = (await admin_get(gateway, f"/api/requests?request_id={got.headers['X-Request-Id']}"))["rows"]
            if len(rows) >= count:
                assert len(rows) == count
                return rows[::-1]
            await asyncio.sleep(0.01)


# --- What a drill is --------------------------------------------------------------------------------------------------


def test_every_way_of_failing_is_written_in_one_way():
    assert parse_drill("cut=3") == Drill(Break.CUT, 3)
    assert parse_drill(" Stall = 0 ") == Drill(Break.STALL, 0)
    assert [str(parse_drill(case)) for case in CASES] == list(CASES)
    assert {parse_drill(case).how for case in CASES} == set(Break)
    for text in ("", "cut", "cut=", "cut=-1", "cut=x", "429=1", "500", "empty=2", "cut=1.5", "error"):
        with pytest.raises(InvalidRequest) as refused:
            parse_drill(text)
        assert (refused.value.status, refused.value.param) == (400, "X-Drill")


# --- One drilled request ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, "cut=0", "cut=1", "stall=0", "error=0", "cut=5", "cut=99"])
async def test_the_client_of_a_drilled_stream_gets_its_whole_answer(start_gateway, fake, case):
    gateway = await start_gateway(["a", "b"], QUICK)
    fake.script("a", worded())
    fake.script("b", worded())

    got = await gateway.stream(headers=drill(case))

    assert got.text == TEXT
    got.assert_done_once()
    assert len(got.finishes) == 1
    assert not any(piece.get("error") for piece in got.chunks)
    cut_nothing = case == "cut=99"
    rows = await rows_of(gateway, got, 1 if cut_nothing else 2)
    assert all(row["drill"] for row in rows)
    assert [row["status"] for row in rows] == (["success"] if cut_nothing else ["error", "success"])


@pytest.mark.parametrize("case", ["cut=2", "429", "503", "empty", "error=1"])
async def test_a_drilled_whole_answer_comes_from_elsewhere(start_gateway, fake, case):
    gateway = await start_gateway(["a", "b"], QUICK)

    got = await gateway.chat(headers=drill(case))

    assert got.text == "hello from b"
    assert fake.called == ["b"]
    assert got.headers["X-Fallback-Attempts"] == "1"


async def test_the_break_is_where_it_was_asked_for(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], QUICK | {"RESCUE": "off"})
    fake.script("a", worded())

    got = await gateway.stream(headers=drill("cut=3"))

    assert got.text == "one, two, three, "
    assert got.error["type"] == "stream_error"


@pytest.mark.parametrize("drilled", ["cut=1", "cut=2", "error=2", "stall=2", "cut=3"])
async def test_a_break_within_a_tool_call_leaves_nothing_of_it(start_gateway, fake, drilled):
    gateway = await start_gateway(["a", "b"], QUICK)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = [piece(0, "", id="one", name="f"), piece(0, '{"a": '), piece(0, "1}"), chunk(finish="tool_calls")]
    for before in ((), (chunk("I will look that up for you. "),)):
        fake.script("a", sse(*before, *call))
        fake.script("b", sse(*before, *call))

        got = await gateway.stream(tools=tools, headers=drill(drilled))

        assert [made["function"]["arguments"] for made in got.calls] == ['{"a": 1}']
        assert got.finishes == ["tool_calls"]


@both_ways
@pytest.mark.parametrize("case", CASES)
async def test_a_drill_costs_nobody_anything(start_gateway, fake, case, streaming):
    if not streaming and case.startswith("stall"):
        return  # waits as long as a whole call may take
    gateway = await start_gateway({"a": {"protection": "provider-ban"}, "b": {"protection": "provider-ban"}}, QUICK)
    fake.script("a", worded())
    fake.script("b", worded())
    before = await admin_get(gateway, "/api/protection")

    for _ in range(4):
        got = await gateway.ask(streaming=streaming, headers=drill(case) | {"X-Session-Id": "s"}, model="auto-smart")
        assert got.text == TEXT

    assert await admin_get(gateway, "/api/protection") == before
    assert {key["status"] for key in await admin_get(gateway, "/api/keys")} == {"unknown"}
    chain = await admin_get(gateway, "/api/fallback")
    assert all(entry["penalty"] == 0 for entry in chain)
    totals = (await admin_get(gateway, "/api/analytics?window=24h"))["totals"]
    assert (totals["requests"], totals["output_tokens"]) == (0, 0)
    metrics = (await gateway.get("/metrics", headers={"authorization": f"Bearer {ADMIN}"})).body.decode()
    assert 'freeway_requests_total{status="success"} 0.0' in metrics
    assert "freeway_attempts_total{" not in metrics
    fake.clear()
    assert (await gateway.chat()).status == 200
    assert fake.called == ["a"]


async def test_a_real_failure_during_a_drill_costs_nobody_anything_either(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c"], QUICK)
    fake.script("b", error(503))

    assert (await gateway.chat(headers=drill("429"))).text == "hello from c"

    assert (await admin_get(gateway, "/api/protection"))["transient_cooldowns"] == []


async def test_statistics_leave_drills_out(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], QUICK | {"STATS_REFRESH_MS": "20"})
    await gateway.chat(headers=drill("503"))
    await gateway.chat()
    async with asyncio.timeout(3):
        while not any(entry["total"] for entry in await admin_get(gateway, "/api/fallback")):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    totals = {entry["platform"]: entry["total"] for entry in await admin_get(gateway, "/api/fallback")}

    assert (totals["a"], totals["b"]) == (1, 0)


# --- Who may ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{"X-Drill": "503"}, drill("503", "wrong"), drill("503", "")], ids=str)
async def test_without_the_admin_key_nothing_is_broken(start_gateway, fake, headers):
    gateway = await start_gateway(["a", "b"], QUICK)

    refused = await gateway.chat(headers=headers)

    assert_error(refused, 403, "invalid_request_error", "drill_forbidden")
    assert fake.called == []
    assert (await gateway.chat(headers={"X-Admin-Key": ADMIN})).text == "hello from a"


async def test_a_drill_that_is_none_is_refused(start_gateway, fake):
    gateway = await start_gateway(["a"], QUICK)

    assert_error(await gateway.chat(headers=drill("explode")), 400, "invalid_request_error", "invalid_value")


async def test_a_drill_neither_gives_to_memory_nor_takes_from_it(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], QUICK | {"CACHE_MB": "1"})
    await gateway.chat()
    fake.clear()

    got = await gateway.chat(headers=drill("503"))

    assert (got.text, fake.called, "X-Cache" in got.headers) == ("hello from b", ["b"], False)


# --- A whole drill ----------------------------------------------------------------------------------------------------


async def whole_drill(gateway, body: object = None, status: int = 200) -> dict:
    data = b"" if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {ADMIN}"}
    async with gateway.http.post(f"{gateway.base_url}/api/drill", data=data, headers=headers) as response:
        assert response.status == status, await response.read()
        return await response.json()


async def test_every_case_is_played_and_the_table_says_how_it_went(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], QUICK)
    fake.script("a", worded())
    fake.script("b", worded())

    told = await whole_drill(gateway)

    assert [case["case"] for case in told["cases"]] == list(CASES)
    assert told["passed"] is True
    for each in told["cases"]:
        assert (each["whole"], each["error"]) == (True, None)
        assert each["platform"] in ("a", "b")
        assert each["model_id"] == f"{each['platform']}-model"
        assert 0 < each["calls"] <= 2
        assert each["ms"] >= 0
    assert len(fake.requests) == sum(case["calls"] for case in told["cases"])
    rows = (await admin_get(gateway, "/api/requests"))["rows"]
    assert rows and all(row["drill"] for row in rows)


@pytest.mark.parametrize(("case", "answered"), [("503", 0), ("cut=2", 1)])
async def test_a_chain_that_cannot_do_without_its_first_route_fails_the_drill(start_gateway, fake, case, answered):
    """Whichever route comes first; where the drill breaks it without a call, the first call is the second route's."""
    gateway = await start_gateway(["a", "b"], QUICK)

    def only_the_first(request):
        return worded()(request) if len(fake.requests) <= answered else error(503, "down")

    fake.script("a", only_the_first)
    fake.script("b", only_the_first)

    told = await whole_drill(gateway, {"cases": [case]})

    (played,) = told["cases"]
    assert (told["passed"], played["whole"]) == (False, False)
    assert played["error"]
    assert len(fake.requests) == played["calls"] == answered + 1


SECONDS = {
    "is down": error(503), "is limited": error(429), "says nothing": sse(STOP), "breaks off too": sse(chunk("1"), CUT),
    "is another": sse(*map(chunk, ("Well, ", "that is ", "quite ", "another ", "thing.")), STOP), "is whole": worded(),
}  # fmt: skip


@pytest.mark.parametrize("second", SECONDS.values(), ids=SECONDS)
async def test_the_table_says_of_each_case_what_a_client_got_and_from_whom(start_gateway, fake, second):
    gateway = await start_gateway(["a", "b"], QUICK)
    fake.script("a", worded())
    fake.script("b", second)
    for name in CASES:
        with case(name):
            fake.clear()
            told = await whole_drill(gateway, {"cases": [name]})
            (played,) = told["cases"]
            assert played["calls"] == len(fake.called) <= 2
            assert told["passed"] is played["whole"] is (played["error"] is None)
            asked = fake.called[-1]
            assert (played["platform"], played["model_id"]) == (asked, f"{asked}-model")
            if second is SECONDS["is whole"]:
                assert played["whole"]
            elif asked == "b" and second is not SECONDS["is another"]:  # which is whole where nothing was said before
                assert not played["whole"]


async def test_chosen_cases_and_wrong_ones(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], QUICK)

    assert [case["case"] for case in (await whole_drill(gateway, {"cases": ["429"]}))["cases"]] == ["429"]
    assert (await whole_drill(gateway, {"cases": None}))["passed"]
    for body in ({"cases": []}, {"cases": ["boom"]}, {"cases": "429"}, {"case": 1}, [], {"cases": ["429"] * 21}):
        told = await whole_drill(gateway, body, status=400)
        assert told["error"]["type"] == "invalid_request_error"


async def test_a_chain_of_one_may_wait_for_its_only_route(start_gateway, fake):
    gateway = await start_gateway(
        {"a": {"keys": []}},
        QUICK | {"GATEWAY_PRIVACY": "no-train", "WAIT_FOR_CAPACITY_MS": "2000", "TRIAL_SPACING_MS": "100"},
    )

    told = await whole_drill(gateway, {"cases": ["429"]})

    (case,) = told["cases"]
    assert (case["platform"], case["whole"]) == ("demo", True)  # after a pause, and in this process


async def test_the_clients_key_starts_no_drill(start_gateway):
    gateway = await start_gateway(["a"], QUICK)

    assert (await gateway.send({}, path="/api/drill")).status == 401
