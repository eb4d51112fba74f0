"""A defect of ours is nobody's failure: the client gets a 500, the operator its place, and no provider pays for it.

The defect sits where one would: in an adapter, which reads whatever a provider has sent.
"""

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator

import pytest
from conftest import assert_error, both_ways
from fake_provider import ROLE, answer, chunk, sse

from adapters.openai import OpenAIAdapter
from adapters.registry import ADAPTERS
from records.request_log import model_stats

SMART = {"protection": "provider-ban", "adapter": "defective", "model": {"prefer_in": ["smart"]}}
PLATFORMS = {"a": SMART, "b": {}}


class Defective(OpenAIAdapter):
    """Like OpenAI's, but for one function that fails as only a mistake of ours can."""

    def __init__(self, place: str, defect: BaseException) -> None:
        self._place, self._defect = place, defect

    def _fails(self, place: str) -> None:
        if place == self._place:
            raise self._defect

    def request(self, *args, **more):
        self._fails("request")
        return super().request(*args, **more)

    def plain_answer(self, raw, chat):
        self._fails("a whole answer")
        return super().plain_answer(raw, chat)

    def translator(self, tally, chat, **more):
        self._fails("the head of a stream")
        translator = super().translator(tally, chat, **more)
        fails, feed, end = self._fails, translator.feed, translator.end

        class Translator(type(translator)):
            def __init__(self) -> None:
                vars(self).update(vars(translator))

            def recognised(self, raw, payload):
                return None  # so that every chunk is fed

            def feed(self, raw, payload, said):
                fails("an event")
                if "second" in str(said):
                    fails("a later event")
                return feed(raw, payload, said)

            def end(self):
                fails("the end of a stream")
                return end()

        return Translator()


@pytest.fixture
def defective() -> Iterator:
    """Put one into the list of adapters, in this place."""

    def put(place: str, defect: BaseException) -> None:
        ADAPTERS["defective"] = lambda utc: Defective(place, defect)

    yield put
    ADAPTERS.pop("defective", None)


async def assert_nobody_paid(gateway, capfd, kind: str) -> None:
    """Nothing rests, is banned or blamed, and the log says whose fault it was and where."""
    shown = await gateway.protection()
    for what in ("transient_cooldowns", "key_cooldowns", "bans", "gates", "trials", "active", "waiting"):
        assert shown[what] == [], what
    assert {key["status"] for key in (await gateway.get("/api/keys")).json} <= {"unknown", "healthy"}
    rows = (await gateway.get("/api/requests?limit=100")).json["rows"]
    for row in rows:  # they say whose fault it was, and routing learns nothing from them
        assert (row["status"], row["error_kind"], row["http_status"], row["uncounted"]) == ("error", None, 500, 1)
        assert row["error"].startswith(f"The gateway itself failed ({kind})")
    with contextlib.closing(sqlite3.connect(gateway.db)) as db:
        assert model_stats(db, 7) == {}
    metrics = (await gateway.get("/metrics")).body.decode()
    assert re.search(r'freeway_requests_total\{status="error"\} [1-9]', metrics)
    assert not re.search(r'freeway_requests_total\{status="(success|cancelled)"\} [1-9]', metrics)
    await gateway.stop()
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    defects = [line for line in lines if line["event"] == "defect"]
    assert {line["type"] for line in defects} == {kind}
    assert all(line["request_id"].startswith("req_") for line in defects)
    assert any("test_defects.py" in place for line in defects for place in line["traceback"])


WHOLE = [("request", RecursionError("too deep")), ("a whole answer", KeyError("choices"))]
STREAMED = [
    ("request", KeyError("model")),
    ("the head of a stream", IndexError("0")),
    ("an event", RecursionError("too deep")),
]
PLACES = [(False, *case) for case in WHOLE] + [(True, *case) for case in STREAMED]


@pytest.mark.parametrize(("streaming", "place", "defect"), PLACES, ids=str)
async def test_a_defect_is_a_500_and_costs_no_provider_anything(
    start_gateway, fake, defective, capfd, streaming, place, defect
):
    defective(place, defect)
    gateway = await start_gateway(PLATFORMS)

    for _ in range(6):  # more than a health gate bears of failures
        got = await gateway.ask("hi", streaming=streaming, model="auto-smart")
        assert_error(got, 500, "api_error", "internal_error")

    assert set(fake.called) <= {"a"}
    await assert_nobody_paid(gateway, capfd, type(defect).__name__)


@pytest.mark.parametrize(
    ("place", "stream"),
    [
        ("a later event", sse(ROLE, chunk("the first"), chunk(" the second"), chunk(finish="stop"))),
        ("the end of a stream", answer("all there")),
    ],
)
async def test_a_defect_in_mid_stream_ends_it_so_that_it_cannot_look_finished(
    start_gateway, fake, defective, capfd, place, stream
):
    defective(place, ZeroDivisionError("ours"))
    gateway = await start_gateway(PLATFORMS)
    fake.script("a", stream)

    async with gateway.post(gateway.request("hi", model="auto-smart", stream=True)) as response:
        assert response.status == 200
        received = b""
        with pytest.raises(Exception, match=r"payload|Connection"):
            while data := await response.content.readany():
                received += data
            raise AssertionError("it ended like a finished one")

    assert b"[DONE]" not in received
    await assert_nobody_paid(gateway, capfd, "ZeroDivisionError")


@both_ways
async def test_after_a_defect_the_next_request_is_served_as_ever(start_gateway, fake, defective, streaming):
    defective("request", KeyError("x"))
    gateway = await start_gateway(PLATFORMS)
    assert (await gateway.ask(streaming=streaming, model="a-model")).status == 500

    assert (await gateway.ask(streaming=streaming, model="b-model")).text == "hello from b"
