"""/metrics: parsed by the official parser, right about what happened, and silent about what is nobody's business."""

import asyncio
import timeit

import pytest
from fake_provider import DONE, PAUSE, answer, chunk, error, event, sse
from families import FAMILIES
from prometheus_client.parser import text_string_to_metric_families

from records.metrics import Histogram, Metrics
from records.rows import Row

LABELS = (
    "platform",
    "model",
    "kind",
    "direction",
    "status",
    "result",
    "le",
)  # in the order in which the tests name them


async def scrape(gateway) -> dict[tuple, float]:
    """Every sample by name and label values."""
    answered = await gateway.get("/metrics")
    assert answered.status == 200
    assert answered.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(answered.body)


def samples(text: bytes) -> dict[tuple, float]:
    families = list(text_string_to_metric_families(text.decode()))
    assert len({family.name for family in families}) == len(families)
    found = {}
    for family in families:
        assert family.documentation and family.type != "unknown", family.name
        for sample in family.samples:
            key = (sample.name, *(sample.labels[label] for label in LABELS if label in sample.labels))
            assert key not in found, key
            found[key] = sample.value
    return found


async def test_attempts_requests_and_failovers_are_counted(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c"])
    fake.script("a", error(400), error(429), error(503))
    fake.script("b", answer(), answer(), error(404))
    for _ in range(3):
        assert (await gateway.chat()).status == 200
    found = await scrape(gateway)
    assert found["freeway_requests_total", "success"] == 3
    assert found["freeway_attempts_total", "a", "a-model", "bad_request"] == 1
    assert found["freeway_attempts_total", "a", "a-model", "rate_limited"] == 1
    assert found["freeway_attempts_total", "b", "b-model", "success"] >= 2
    assert found["freeway_failovers_total",] == len(fake.requests) - 3
    assert found["all_models_exhausted_total",] == 0
    assert (
        found["freeway_tokens_total", "b", "b-model", "output"]
        == 7 * found["freeway_attempts_total", "b", "b-model", "success"]
    )
    assert found["freeway_key_cooldowns",] == 1


async def test_an_exhausted_request_is_counted_with_its_failovers(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(404))
    fake.script("b", error(404))
    assert (await gateway.chat()).status == 502
    found = await scrape(gateway)
    assert found["all_models_exhausted_total",] == 1
    assert found["freeway_requests_total", "error"] == 1
    assert found["freeway_failovers_total",] == 1


async def test_a_stream_that_breaks_is_no_failover(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", sse(chunk("par"), {"error": {"message": "broke", "code": 500}}))
    await gateway.stream()
    found = await scrape(gateway)
    assert found["freeway_requests_total", "error"] == 1
    assert found["freeway_failovers_total",] == 0


async def test_events_that_are_no_json_are_counted(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(chunk("Hel"), b"data: {broken\n\n", b"data: 5\n\n", chunk("lo"), chunk(finish="stop"), DONE))

    (await gateway.stream()).assert_whole("Hello")

    assert (await scrape(gateway))[("freeway_malformed_events_total",)] == 2


async def test_what_holds_at_the_moment_is_shown(start_gateway, fake):
    gateway = await start_gateway({"a": {"protection": "provider-ban"}, "b": {}, "c": {}})
    fake.script("a", error(503))
    fake.script("b", error(503))
    fake.script("c", sse(chunk("one"), PAUSE))
    asking = asyncio.create_task(gateway.stream("x", model="auto-smart"))
    async with asyncio.timeout(3):
        while "c" not in fake.called:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    found = await scrape(gateway)
    assert found["freeway_active_attempts",] == found["freeway_running_requests",] == 1
    assert found["freeway_transient_cooldowns",] == fake.called.count("a") + fake.called.count("b")
    assert found["freeway_bans",] == fake.called.count("a")
    assert found["freeway_routable_models",] == 3
    assert found["freeway_log_dropped_rows_total",] == 0
    asking.cancel()
    async with asyncio.timeout(3):
        while (await scrape(gateway))["freeway_active_attempts",]:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert (await scrape(gateway))["freeway_requests_total", "cancelled"] == 1


async def test_tokens_of_a_stream_whose_client_left_count_nowhere(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(chunk("half an answer"), PAUSE))
    async with gateway.post(gateway.request(stream=True)) as response:
        await response.content.readany()
        response.close()
    assert (await gateway.row())["output_tokens"] > 0

    found = await scrape(gateway)

    assert found["freeway_attempts_total", "a", "a-model", "cancelled"] == 1
    assert found["freeway_tokens_total", "a", "a-model", "output"] == 0


async def test_times_are_histograms_of_successes(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(400), answer())
    await gateway.chat()
    await gateway.stream()
    found = await scrape(gateway)
    for name in ("freeway_attempt_duration_seconds", "freeway_first_token_seconds"):
        assert found[f"{name}_count", "a", "a-model"] == 1
        assert found[f"{name}_bucket", "a", "a-model", "+Inf"] == 1
        assert found[f"{name}_count", "b", "b-model"] == 1
        assert 0 <= found[f"{name}_sum", "b", "b-model"] < 5


async def test_no_key_prompt_or_answer_is_in_it(start_gateway, fake):
    gateway = await start_gateway({"a": {"keys": ["sk-very-secret-0001"]}, "b": {}})
    fake.script("a", error(401, "bad key sk-very-secret-0001 for secret-prompt"))
    fake.script("b", sse(event(chunk("secret-answer")), event(chunk(finish="stop")), DONE, done=False))
    assert (await gateway.stream("secret-prompt", model="auto-smart")).status == 200
    body = (await gateway.get("/metrics")).body.decode()
    for secret in ("very-secret", "secret-prompt", "secret-answer", gateway.api_key, "sk-"):
        assert secret not in body
    assert 'kind="success"' in body


async def test_every_family_is_there_from_the_start_and_no_client_can_add_a_series(start_gateway, fake):
    gateway = await start_gateway(["a"])
    at_first = (await gateway.get("/metrics")).body.decode()
    assert {family.name: family.type for family in text_string_to_metric_families(at_first)} == FAMILIES

    await gateway.chat(model="a-model")
    known = set(await scrape(gateway))
    for name in ("nobodys-model", "a/a-model", "auto-smart", 'x"y\nz', "sk-key", "a-model\u0000"):
        await gateway.chat(f"say {name}", model=name, headers={"x-session-id": name.encode().hex()})
    assert set(await scrape(gateway)) == known


def test_names_with_quotes_and_line_breaks_stay_one_label():
    metrics = Metrics()
    name = 'a"b\\c\nd{}'
    metrics.attempt(Row("r", 0.0, platform="p", model_id=name, status="success", latency_ms=1, ttfb_ms=1))
    assert samples(metrics.text())["freeway_attempts_total", "p", name, "success"] == 1


@pytest.mark.parametrize(("ms", "bucket"), [(0, 0), (50, 0), (51, 1), (102_400, 11), (102_401, 12), (10**9, 12)])
def test_a_time_falls_into_the_bucket_whose_bound_it_does_not_exceed(ms, bucket):
    histogram = Histogram()
    histogram.observe(ms)
    assert histogram.counts.index(1) == bucket
    assert histogram.buckets()[-1] == ("+Inf", 1.0)


def test_counting_costs_a_few_microseconds_at_most():
    metrics = Metrics()
    row = Row("r", 0.0, platform="p", model_id="m", status="success", latency_ms=900, ttfb_ms=200, output_tokens=9)
    best_s = min(timeit.repeat(lambda: metrics.attempt(row), number=1000, repeat=5)) / 1000
    assert best_s < 10e-6
