"""What has happened since the start, in Prometheus' words.

Counting is on every request's path, so it is plain integers that the event loop alone touches; metric families are
made of them when somebody scrapes. What can be read elsewhere (cooldowns, sessions, the log's queue) is not counted
here but asked for at that moment. Labels are platforms, models and kinds: never keys, prompts or answers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from records.rows import Row

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
# Each twice the one before: from a cached answer on fast hardware to a reasoning model's long silence.
BOUNDS_MS = (50, 100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 51_200, 102_400)
WAIT_RESULTS = {"success": "served", "error": "in_vain", "cancelled": "left"}
BOUNDS_S = [*(str(ms / 1000) for ms in BOUNDS_MS), "+Inf"]


class Histogram:
    """How often each span of time occurred."""

    __slots__ = ("counts", "sum_ms")

    def __init__(self) -> None:
        self.counts = [0] * len(BOUNDS_S)
        self.sum_ms = 0

    def observe(self, ms: int) -> None:
        self.counts[bisect_left(BOUNDS_MS, ms)] += 1
        self.sum_ms += ms

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        total, cumulative = 0, []
        for bound, count in zip(BOUNDS_S, self.counts, strict=True):
            total += count
            cumulative.append((bound, float(total)))
        return cumulative


class Totals:
    """What the attempts on one model came to."""

    __slots__ = ("first_token", "input_tokens", "kinds", "latency", "output_tokens")

    def __init__(self) -> None:
        self.kinds: dict[str, int] = {}  # `success`, `cancelled`, or the failure's name
        self.input_tokens = 0
        self.output_tokens = 0
        self.latency = Histogram()
        self.first_token = Histogram()


class Metrics:
    """One gateway's numbers. They begin at zero with the process."""

    def __init__(self) -> None:
        self._models: dict[tuple[str | None, str | None], Totals] = {}
        self._requests = {"success": 0, "error": 0, "cancelled": 0}
        self._failovers = 0
        self._exhausted = 0
        self._malformed = 0
        self._waits: dict[str, int] = {}
        self._trials: dict[str, int] = {}
        self._rescues: dict[str, int] = {}
        self._hedges: dict[str, int] = {}
        self._cache: dict[str, int] = {}
        self._gauges: list[tuple[str, str, Callable[[], float]]] = []
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def attempt(self, row: Row) -> None:
        """Count one attempt, when it has ended."""
        name = row.platform, row.model_id
        totals = self._models.get(name)
        if totals is None:
            totals = self._models[name] = Totals()
        kind = row.error_kind or row.status
        totals.kinds[kind] = totals.kinds.get(kind, 0) + 1
        if row.status == "cancelled":  # counts in nothing else (SPEC 8.6)
            return
        if row.input_tokens:
            totals.input_tokens += row.input_tokens
        if row.output_tokens:
            totals.output_tokens += row.output_tokens
        if row.status == "success":
            totals.latency.observe(row.latency_ms or 0)
            totals.first_token.observe(row.ttfb_ms or 0)

    def request(self, status: str, failovers: int) -> None:
        """Count one request, when it has ended; `failovers` is how often it went on to a further route."""
        self._requests[status] += 1
        self._failovers += failovers

    def malformed(self, events: int) -> None:
        """Count events of providers' streams that were not JSON and were skipped (SPEC 6.3)."""
        self._malformed += events

    def waited(self, status: str) -> None:
        """Count a request that waited for a route, when it has ended: `served`, `in_vain`, or `left` by its client."""
        result = WAIT_RESULTS[status]
        self._waits[result] = self._waits.get(result, 0) + 1

    def trial(self, result: str) -> None:
        """Count a trial of something that rests: `success`, `error` or `cancelled`."""
        self._trials[result] = self._trials.get(result, 0) + 1

    def rescued(self, result: str) -> None:
        """Count an answer that broke after its first token: `whole` in the end, or `lost`."""
        self._rescues[result] = self._rescues.get(result, 0) + 1

    def hedged(self, result: str) -> None:
        """Count a second route that joined a late one: it `won`, `lost`, or both `failed`."""
        self._hedges[result] = self._hedges.get(result, 0) + 1

    def looked_up(self, result: str) -> None:
        """Count a request that might be answered from memory: `hit`, `miss`, or `shared` with one that was running."""
        self._cache[result] = self._cache.get(result, 0) + 1

    def exhausted(self) -> None:
        """Count a request for which nothing was left to try (SPEC 5.4)."""
        self._exhausted += 1

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """A number that is asked for at every scrape; one whose name ends in `_total` only ever grows."""
        self._gauges.append((name, help, read))

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for at a scrape."""
        yield from self._request_families()
        yield from self._attempt_families()
        for name, help, read in self._gauges:
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name, help, value=read())

    def describe(self) -> list[Metric]:
        """Nothing beforehand: the registry would scrape once to learn the names."""
        return []

    def _request_families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("freeway_requests_total", "Requests that have ended.", labels=["status"])
        for status, count in self._requests.items():
            requests.add_metric([status], count)
        yield requests
        help = "Times that a request went on to a further route after a failure."
        yield CounterMetricFamily("freeway_failovers_total", help, value=self._failovers)
        help = "Requests for which no route was left to try."
        yield CounterMetricFamily("all_models_exhausted_total", help, value=self._exhausted)
        yield by_result("freeway_waits_total", "Requests that waited for a route to come back.", self._waits)
        yield by_result("freeway_rescues_total", "Answers that broke after their first token.", self._rescues)
        yield by_result("freeway_hedges_total", "Second routes that joined a late one.", self._hedges)
        yield by_result("freeway_cache_total", "Requests that might be answered from memory.", self._cache)
        yield by_result("freeway_trials_total", "Trials of models and keys that rest.", self._trials)
        help = "Events in providers' streams that were not JSON and were skipped."
        yield CounterMetricFamily("freeway_malformed_events_total", help, value=self._malformed)

    def _attempt_families(self) -> Iterator[Metric]:
        names = ["platform", "model"]
        attempts = CounterMetricFamily("freeway_attempts_total", "Calls to providers.", labels=[*names, "kind"])
        tokens = CounterMetricFamily("freeway_tokens_total", "Tokens used.", labels=[*names, "direction"])
        latency = HistogramMetricFamily(
            "freeway_attempt_duration_seconds", "Successful calls from start to end.", labels=names
        )
        first = HistogramMetricFamily(
            "freeway_first_token_seconds", "Successful calls from start to the first token.", labels=names
        )
        for (platform, model), totals in self._models.items():
            labels = [platform or "", model or ""]
            for kind, count in totals.kinds.items():
                attempts.add_metric([*labels, kind], count)
            tokens.add_metric([*labels, "input"], totals.input_tokens)
            tokens.add_metric([*labels, "output"], totals.output_tokens)
            for family, histogram in ((latency, totals.latency), (first, totals.first_token)):
                family.add_metric(labels, histogram.buckets(), histogram.sum_ms / 1000)
        yield from (attempts, tokens, latency, first)


def by_result(name: str, help: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, help, labels=["result"])
    for result, count in counts.items():
        family.add_metric([result], count)
    return family
