"""Who is answered when everybody fails? Scripted platforms with seeded faults, and an oracle that knows the draws.

    make chaos                        everything, about a minute and a half, written to bench/CHAOS.md
    python bench/chaos.py outage      the scenarios with these words in their names

Each scenario runs `python gateway.py` over real sockets, in real time; only the limits on silence are shorter than the
defaults. A request ends whole, as an honest error, as one in mid-stream (after its first words), silently wrong, or
hangs. Exit status 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from running import AUTHORIZED, Gateway  # isort: skip  # it finds the next one's folder

from fake_provider import FakeProvider, Reply, Request, error
from health import REQUESTS_LATER, false_alarms, replay
from weather import BEFORE, NOT_COOLING, Crowd, End, Fault, Result, Weather, ends, reply_of, share

HERE = Path(__file__).resolve().parent
SEED = 12
SETTINGS = {
    "MAX_STREAM_STALL_MS": "300", "FIRST_TOKEN_TIMEOUT_MS": "600", "REQUEST_TIMEOUT_MS": "600", "LOG_LEVEL": "warning",
}  # fmt: skip
SIX = ("a", "b", "c", "d", "e", "f")


@dataclass(frozen=True)
class Bound:
    """What was measured, and what it has to be."""

    words: str
    seen: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def kept(self) -> bool:
        if self.at_least is not None and self.seen < self.at_least:
            return False
        return self.at_most is None or self.seen <= self.at_most

    def __str__(self) -> str:
        wanted = f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"
        return f"{'' if self.kept else 'MISSED: '}{self.words} {self.seen:.4g} ({wanted})"


@dataclass(frozen=True)
class Row:
    """One scenario's outcome."""

    name: str
    results: Sequence[Result]
    calls: int
    seconds: float
    bounds: Sequence[Bound]

    @property
    def kept(self) -> bool:
        return all(bound.kept for bound in self.bounds)

    def cells(self) -> list[str]:
        counted = ends(self.results)
        whole, waits = counted[End.WHOLE], sorted(result.seconds for result in self.results)
        per_answer = f"{self.calls / whole:.2f}" if whole else "–"
        slowest = f"{waits[int(len(waits) * 0.99)]:.1f} s" if waits else "–"
        numbers = [str(count) if self.results else "–" for count in counted.values()]
        bounds = "; ".join(map(str, self.bounds))
        return [self.name, *numbers, per_answer, slowest, f"{self.seconds:.0f} s", bounds]


@dataclass
class Day:
    """One gateway, the platforms behind it, and its clients."""

    gateway: Gateway
    fake: FakeProvider
    crowd: Crowd
    began: float = field(default_factory=time.monotonic)

    def row(self, name: str, results: Sequence[Result], *bounds: Bound, calls: int | None = None) -> Row:
        calls = len(self.fake.requests) if calls is None else calls
        return Row(name, results, calls, time.monotonic() - self.began, bounds)

    def calls_per_answer(self, results: Sequence[Result]) -> float:
        return len(self.fake.requests) / max(1, ends(results)[End.WHOLE])

    async def clear_cooldowns(self) -> None:
        url = f"{self.gateway.base_url}/api/protection/cooldowns"
        async with self.crowd.http.delete(url, headers=AUTHORIZED) as got:
            assert got.status == 200


@contextlib.asynccontextmanager
async def a_day(
    platforms: Sequence[str] | Mapping[str, Mapping[str, Any]], settings: Mapping[str, str] | None = None
) -> AsyncIterator[Day]:
    with tempfile.TemporaryDirectory() as folder:
        async with FakeProvider().serving() as fake:
            gateway = await Gateway.start(Path(folder), fake, platforms, SETTINGS | dict(settings or {}))
            gateway.listen()
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as http:
                try:
                    yield Day(gateway, fake, Crowd(gateway.base_url, http, AUTHORIZED))
                finally:
                    gateway.process.terminate()
                    await gateway.ended()


def of_answerable(results: Sequence[Result], weather: Weather) -> float:
    """The share of whole answers among what the oracle could have answered, without those that broke in mid-stream."""
    counted = [r for r in results if r.end is not End.BROKEN and weather.could_answer(r.question)]
    return share(counted, lambda result: result.end is End.WHOLE)


def no_losses(results: Sequence[Result]) -> list[Bound]:
    counted = ends(results)
    return [Bound("silent", counted[End.SILENT], at_most=0), Bound("hang", counted[End.HANG], at_most=0)]


# --- Scenarios ------------------------------------------------------------------------------------------------------

Scenario = Callable[[], Awaitable[Row]]
SCENARIOS: list[Scenario] = []
ALONE: list[Scenario] = []  # they take all that the machine has


def scenario(function: Scenario) -> Scenario:
    SCENARIOS.append(function)
    return function


def alone(function: Scenario) -> Scenario:
    ALONE.append(function)
    return function


@scenario
async def six_platforms_at_46_percent() -> Row:
    weather = Weather(SEED, dict.fromkeys(SIX, 0.46), mid_stream=0.2)
    async with a_day(SIX) as day:
        for platform in SIX:
            day.fake.script(platform, weather.reply)
        results = await day.crowd.at_once(range(300), workers=12)
        return day.row(
            "six platforms, each fails 46 %, 12 clients",
            results,
            Bound("of what could be answered", of_answerable(results, weather), at_least=0.97),
            Bound("calls per answer", day.calls_per_answer(results), at_most=2.5),
            *no_losses(results),
        )


@scenario
async def six_platforms_at_46_percent_one_client() -> Row:
    weather = Weather(SEED + 1, dict.fromkeys(SIX, 0.46), mid_stream=0.2)
    async with a_day(SIX) as day:
        for platform in SIX:
            day.fake.script(platform, weather.reply)
        results = await day.crowd.at_once(range(100), workers=1)
        return day.row(
            "six platforms, each fails 46 %, one client",
            results,
            Bound("of what could be answered", of_answerable(results, weather), at_least=0.97),
            Bound("calls per answer", day.calls_per_answer(results), at_most=2.5),
            *no_losses(results),
        )


async def one_healthy(name: str, faults: Sequence[Fault], rate: float) -> Row:
    weather = Weather(SEED, {**dict.fromkeys(SIX, rate), "d": 0.0}, faults=dict.fromkeys(SIX, faults))
    async with a_day(SIX) as day:
        for platform in SIX:
            day.fake.script(platform, weather.reply)
        results = await day.crowd.at_once(range(600), workers=4)
        return day.row(
            name,
            results,
            Bound("whole", share(results, lambda r: r.end is End.WHOLE), at_least=0.995),
            Bound("calls per answer", day.calls_per_answer(results), at_most=1.1),
            *no_losses(results),
        )


@scenario
async def one_healthy_among_five_sick() -> Row:
    return await one_healthy("one healthy among five that fail 90 %", BEFORE, 0.9)


@scenario
async def one_healthy_among_five_dead_without_cooling() -> Row:
    return await one_healthy("one healthy among five dead ones that never rest", NOT_COOLING, 1.0)


async def outage(models: int, fault: Fault, *, each: int = 1, at_once: int = 0, rate: float = 5.0) -> Row:
    """Ten seconds in which nobody answers; a second of good weather before, six after. `each`: models of a platform."""
    names = [f"p{number}" for number in range(models // each)]
    weather = Weather(SEED, dict.fromkeys(names, 0.0), faults=dict.fromkeys(names, (fault,)))
    async with a_day({name: {"models": [{"model_id": f"{name}-{n}"} for n in range(each)]} for name in names}) as day:
        for name in names:
            day.fake.script(name, weather.reply)
        running = asyncio.create_task(day.crowd.at_rate(rate, 17.0))
        await asyncio.sleep(1.0)
        weather.rates = dict.fromkeys(names, 1.0)
        burst = asyncio.create_task(day.crowd.at_once(range(1000, 1000 + at_once)))
        await asyncio.sleep(10.0)
        weather.rates = dict.fromkeys(names, 0.0)
        recovered = time.monotonic()
        results = await running + await burst
        first = min((r.ended for r in results if r.end is End.WHOLE and r.ended > recovered), default=recovered + 99)
        extra = f", and {at_once} at once" if at_once else ""
        return day.row(
            f"10 s without anybody ({fault}), {models} models, {rate:g} requests/s{extra}",
            results,
            Bound("answered", share(results, lambda r: r.end is End.WHOLE), at_least=1.0),
            *([Bound("calls per answer", day.calls_per_answer(results), at_most=2.5)] if rate >= 5 else []),
            Bound("first answer after s", first - recovered, at_most=1.5 if rate >= 5 else 3.5),
            *no_losses(results),
        )


for models in (1, 2, 6, 12):
    scenario(partial(outage, models, Fault.ERROR_503))
scenario(partial(outage, 27, Fault.ERROR_503, each=3))
scenario(partial(outage, 12, Fault.ERROR_503, rate=0.5))
scenario(partial(outage, 6, Fault.RATE_LIMITED))
scenario(partial(outage, 6, Fault.CUT))
scenario(partial(outage, 6, Fault.ERROR_503, at_once=50))


async def deep(name: str, platforms: Mapping[str, Mapping[str, Any]], script: Callable[[Request], Any]) -> Row:
    """Everything on one platform is dead; the thirteenth model, held back by another conversation, is not."""
    async with a_day({**platforms, "z": {}}, {"MAX_FALLBACK_ATTEMPTS": "20"}) as day:
        day.fake.script("a", script)
        day.fake.script("z", partial(reply_of, None))
        other = {"X-Session-Id": "another conversation"}
        for question in range(2):  # a session of two requests is a conversation, which holds its model back
            assert (await day.crowd.ask(question, model="auto-smart", **other)).end is End.WHOLE
        results, calls = [], 0
        for question in range(10, 14):
            await day.clear_cooldowns()
            await day.crowd.ask(2, model="auto-smart", **other)
            session = {"X-Session-Id": f"conversation {question}"}
            day.fake.clear()
            results.append(await day.crowd.ask(question, model="auto-smart", streaming=question % 2 == 1, **session))
            calls += len(day.fake.requests)
        whole = share(results, lambda result: result.end is End.WHOLE)
        return day.row(name, results, Bound("whole", whole, at_least=1.0), calls=calls)


@scenario
async def twelve_dead_models() -> Row:
    models = [{"model_id": f"dead-{number}"} for number in range(12)]
    dead = partial(reply_of, Fault.ERROR_500)
    return await deep("12 dead models on one platform, the 13th held back", {"a": {"models": models}}, dead)


@scenario
async def twelve_limited_keys() -> Row:
    keys = [f"sk-limited-key-{number:02}" for number in range(12)]
    limited = lambda request: error(429, headers={"retry-after": "30"})  # noqa: E731
    return await deep("12 rate-limited keys of one model, the other held back", {"a": {"keys": keys}}, limited)


@scenario
async def fifty_at_once_at_a_resting_model() -> Row:
    weather = Weather(SEED, {"a": 1.0}, faults={"a": (Fault.ERROR_503,)})
    async with a_day(["a"]) as day:
        day.fake.script("a", weather.reply)
        await day.crowd.ask(0, **{"X-Max-Wait": "0"})
        day.fake.clear()
        running = asyncio.create_task(day.crowd.at_once(range(1, 51)))
        await asyncio.sleep(3.5)
        trials = len(day.fake.requests)
        weather.rates["a"] = 0.0
        results = await running
        return day.row(
            "50 at once at a model that rests",
            results,
            Bound("answered", share(results, lambda r: r.end is End.WHOLE), at_least=1.0),
            Bound("calls in 3.5 s of its rest", trials, at_most=4),
            *no_losses(results),
        )


async def few_at_a_time(name: str, headers: Mapping[str, str]) -> Row:
    """A platform that takes five requests a second and refuses the others; nobody has told the gateway."""
    taken: list[float] = []

    def limited(request: Request) -> Reply:
        now = time.monotonic()
        taken[:] = [at for at in taken if at > now - 1.0]
        if len(taken) >= 5:
            return error(429, headers=dict(headers))
        taken.append(now)
        return reply_of(None, request)

    async with a_day(["a"]) as day:
        day.fake.script("a", limited)
        results = await day.crowd.at_once(range(50))
        return day.row(
            name,
            results,
            Bound("answered", share(results, lambda r: r.end is End.WHOLE), at_least=1.0),
            Bound("calls per answer", day.calls_per_answer(results), at_most=3.0),
            *no_losses(results),
        )


@scenario
async def fifty_at_once_at_a_limit_that_is_not_known() -> Row:
    return await few_at_a_time("50 at once, the platform takes 5 a second and names no time", {})


@scenario
async def fifty_at_once_at_a_limit_that_names_a_time() -> Row:
    return await few_at_a_time("50 at once, the platform takes 5 a second and names 1 s", {"retry-after": "1"})


@alone
async def a_crowd_waits() -> Row:
    """A thousand requests wait for twelve models; the gateway must not drown in its own waking."""
    names = [f"p{number}" for number in range(12)]
    weather = Weather(SEED, dict.fromkeys(names, 1.0), faults=dict.fromkeys(names, (Fault.ERROR_503,)))
    async with a_day(names) as day:
        for name in names:
            day.fake.script(name, weather.reply)
        await day.crowd.ask(5000, **{"X-Max-Wait": "0"})
        running = asyncio.create_task(day.crowd.at_once(range(1000)))
        await asyncio.sleep(3.0)
        cpu_s, began = day.gateway.cpu_s(), time.monotonic()
        await asyncio.sleep(4.0)
        busy = (day.gateway.cpu_s() - cpu_s) / (time.monotonic() - began)
        weather.rates = dict.fromkeys(names, 0.0)
        results = await running
        return day.row(
            "1,000 wait for 12 models",
            results,
            Bound("answered", share(results, lambda r: r.end is End.WHOLE), at_least=1.0),
            Bound("of a core while they wait", busy, at_most=0.5),
            *no_losses(results),
        )


@alone
async def a_model_that_breaks_without_cooling() -> Row:
    began, seeds = time.monotonic(), range(20)
    runs = [replay(seed) for seed in seeds]
    alarms = false_alarms(SEED, 100_000)
    backs = sorted(run.back_s for run in runs)
    bounds = (
        Bound("first attempts of the next 20, worst of 20 runs", max(run.first_20 for run in runs), at_most=6),
        Bound(f"s until half of the last {REQUESTS_LATER} are back, median", backs[len(backs) // 2], at_most=120),
        Bound("false alarms in 100,000", alarms, at_most=60),
    )
    return Row("a model that breaks without cooling (simulated)", (), 0, time.monotonic() - began, bounds)


# --- The report -----------------------------------------------------------------------------------------------------

COLUMNS = ("scenario", *End, "calls per answer", "slowest of 100", "took", "bounds")


def table(rows: Sequence[Row]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def report(rows: Sequence[Row]) -> str:
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""# Chaos: who is answered when everybody fails

`make chaos`, {when}. Seeded faults, real gateway, real sockets, real time; limits on silence shortened to 0.3–0.6 s.
Per scenario: requests by how they ended for their clients (`broken`: an error event after the first words), provider
calls per whole answer, and the bounds with what was seen.

{table(rows)}
"""


async def run(words: Sequence[str], at_once: int) -> list[Row]:
    room = asyncio.Semaphore(at_once)

    async def one(function: Scenario) -> Row:
        async with room:
            row = await function()
            print("ok    " if row.kept else "MISSED", " | ".join(row.cells()), flush=True)
            return row

    def chosen(functions: Sequence[Scenario]) -> list[Scenario]:
        return [function for function in functions if all(word in name_of(function) for word in words)]

    rows = list(await asyncio.gather(*map(one, chosen(SCENARIOS))))
    return rows + [await one(function) for function in chosen(ALONE)]


def name_of(function: Scenario) -> str:
    if isinstance(function, partial):
        return f"{function.func.__name__} {function.args} {function.keywords}"
    return function.__name__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--at-once", type=int, default=4, help="scenarios; most of their time is waiting")
    options = parser.parse_args()
    rows = asyncio.run(run(options.words, options.at_once))
    if not options.words:
        (HERE / "CHAOS.md").write_text(report(rows))
    return 0 if rows and all(row.kept for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
