"""Minutes of bad weather: random faults, clients that leave, clients that read slowly, a hundred streams at once.

    make soak                              five minutes, written to bench/SOAK.md
    python bench/soak.py --seconds 20      a look

The gateway runs as its own process, the fake providers of the tests beside the clients. It fails when memory, file
descriptors, threads or tasks grow, when a row is missing, when the counters of /metrics and the rows tell different
stories, or when something stays active that has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import aiohttp

from running import AUTHORIZED, Gateway  # isort: skip  # it finds the next one's folder

from fake_provider import (
    CUT,
    PAUSE,
    RESET,
    ROLE,
    Every,
    FakeProvider,
    Reply,
    Request,
    answer,
    chunk,
    error,
    event,
    raw,
    sse,
)

HERE = Path(__file__).resolve().parent

FAILING = {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.02}  # how often each platform does
AT_ONCE = 100
MEMORY_GROWTH_MB_MAX = 6.0  # after the first quarter, in which caches and pools fill
MEMORY_CREEP_MB_MAX = 1.5  # from the third quarter to the last, in which nothing is left to fill
DESCRIPTORS_AT_REST_MAX = 40
POOL_S = 32.0  # idle provider connections are closed after 15 s, looked for every 15 s
SETTINGS = {
    "LOG_LEVEL": "warning", "MAX_STREAM_STALL_MS": "300", "FIRST_TOKEN_TIMEOUT_MS": "500",
    "REQUEST_TIMEOUT_MS": "800", "TRANSIENT_COOLDOWN_MS": "20", "RATE_LIMIT_COOLDOWN_MS": "20",
    "STATS_REFRESH_MS": "1000", "KEEPALIVE_INTERVAL_MS": "100",
}  # fmt: skip
BURST = [chunk(f"word {number} ") for number in range(20)]
PACED = Every(0.005, event(chunk("more ")), times=20)  # long enough for a client to leave in the middle of it
LONG = sse(ROLE, *BURST, PACED, *BURST, chunk(finish="stop"))
FAULTS = [
    error(500), error(503), error(429, headers={"retry-after": "0"}), error(404), raw(CUT), raw(RESET), raw(PAUSE),
    raw(b"HTTP/1.1 200 OK\r\ncontent-", CUT), sse(ROLE, PAUSE), sse(ROLE, CUT), sse(ROLE, {"error": {"message": "no"}}),
    sse(ROLE, chunk("half an "), CUT), sse(ROLE, chunk("half an "), PAUSE), sse(ROLE, chunk("half an "), RESET),
]  # fmt: skip


def weather(rng: random.Random, failing: float) -> object:
    def reply(request: Request) -> Reply:
        if rng.random() < failing:
            return rng.choice(FAULTS)
        return LONG if request.streaming else answer("a whole answer")(request)

    return reply


@dataclass(frozen=True)
class Sample:
    """The gateway at one moment."""

    at_s: float
    memory_mb: float
    descriptors: int
    threads: int
    tasks: int


@dataclass(frozen=True)
class Rest:
    """The gateway when the load is over."""

    descriptors: int
    threads: int
    metrics: dict[str, float]
    active: object
    exit_code: int


class Load:
    """Clients of every temper. Each request ends in one of the outcomes that `seen` counts."""

    def __init__(self, gateway: Gateway, http: aiohttp.ClientSession, rng: random.Random) -> None:
        self.gateway, self.http, self.rng = gateway, http, rng
        self.seen: Counter[str] = Counter()
        self.chunks = 0
        self.ids: set[str] = set()

    async def client(self, until: float) -> None:
        while time.monotonic() < until:
            temper = self.rng.choices(["stream", "whole", "leaver", "slow"], [6, 2, 2, 1])[0]
            try:
                async with asyncio.timeout(30):
                    await self.request(temper)
            except TimeoutError:
                self.seen["hung"] += 1
            except aiohttp.ClientError as error:
                self.seen[f"broken {type(error).__name__}"] += 1

    async def request(self, temper: str) -> None:
        mode = self.rng.choice(["auto-priority", "auto", "auto-smart", "auto-fast"])
        content = f"conversation {self.rng.randrange(1000)}"
        body = {"model": mode, "messages": [{"role": "user", "content": content}], "stream": temper != "whole"}
        async with self.http.post(f"{self.gateway.base_url}/v1/chat/completions", json=body, headers=AUTHORIZED) as got:
            self.ids.add(got.headers["x-request-id"])
            if got.status != 200:
                await got.read()
                self.seen[f"error {got.status}"] += 1
                return
            if temper == "leaver":
                await got.content.readany()
                got.close()
                self.seen["left"] += 1
                return
            received = b""
            while piece := await got.content.readany():
                received += piece
                if temper == "slow":
                    await asyncio.sleep(self.rng.random() * 0.05)
            self.chunks += received.count(b"data: ")
            whole = temper == "whole" or (b'"finish_reason": "stop"' in received and received.endswith(b"[DONE]\n\n"))
            told = b'"finish_reason":"error"' in received and received.endswith(b"[DONE]\n\n")
            self.seen["answered" if whole else "told in mid-stream" if told else "JUST STOPPED"] += 1


async def sample(gateway: Gateway, since: float) -> Sample:
    tasks = round((await gateway.metrics())["freeway_tasks"])
    at_s = time.monotonic() - since
    return Sample(at_s, gateway.memory_mb(), gateway.descriptors(), gateway.status("Threads"), tasks)


async def at_rest(gateway: Gateway, http: aiohttp.ClientSession) -> Rest:
    """What is left when everybody has gone and all pools have let go of their idle connections; then a stop."""
    assert http.connector is not None
    await http.connector.close()
    deadline = time.monotonic() + POOL_S
    while gateway.descriptors() > DESCRIPTORS_AT_REST_MAX and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.2)
    descriptors, threads = gateway.descriptors(), gateway.status("Threads")
    metrics = await gateway.metrics()
    active = json.loads(await gateway.ask("/api/protection"))["active"]
    gateway.process.terminate()
    return Rest(descriptors, threads, metrics, active, await gateway.process.wait())


async def soak(seconds: float, folder: Path) -> tuple[list[str], list[str]]:
    """Lines of the report, and what went wrong."""
    rng = random.Random(1)
    async with FakeProvider().serving() as fake, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        for name, failing in FAILING.items():
            fake.script(name, weather(rng, failing))
        gateway = await Gateway.start(folder, fake, list(FAILING), SETTINGS)
        gateway.listen()  # a pipe that nobody reads would keep its end from being seen
        load = Load(gateway, http, rng)
        started = time.monotonic()
        samples = [await sample(gateway, started)]
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(load.client(started + seconds))
            while time.monotonic() - started < seconds:
                await asyncio.sleep(min(15.0, seconds / 12))
                samples.append(await sample(gateway, started))
                fake.clear()
        rest = await at_rest(gateway, http)
    return report(samples, load, rest, gateway), judge(samples, load, rest, gateway)


def report(samples: list[Sample], load: Load, rest: Rest, gateway: Gateway) -> list[str]:
    table = [f"| {s.at_s:.0f} s | {s.memory_mb:.1f} MB | {s.descriptors} | {s.threads} | {s.tasks} |" for s in samples]
    outcomes = ", ".join(f"{count} {name}" for name, count in load.seen.most_common())
    statuses = gateway.rows("SELECT status, COUNT(*) FROM requests GROUP BY status")
    told = rest.metrics
    return [
        "| at | memory | descriptors | threads | tasks |", "|---|---:|---:|---:|---:|", *table, "",
        f"- {load.chunks} streamed chunks read by {AT_ONCE} clients at once; {load.seen['left']} clients left in "
        "mid-stream.",
        f"- {load.seen.total()} requests: {outcomes}.",
        f"- Log: {sum(statuses.values())} rows ({', '.join(f'{n} {status}' for status, n in statuses.items())}) of "
        f"{len(load.ids)} requests.",
        f"- At rest: {rest.descriptors} descriptors, {rest.threads} threads, {told['freeway_tasks']:.0f} tasks, "
        f"{told['freeway_running_requests']:.0f} running requests, "
        f"{told['freeway_active_attempts']:.0f} active attempts. Exit code {rest.exit_code}.",
    ]  # fmt: skip


def judge(samples: list[Sample], load: Load, rest: Rest, gateway: Gateway) -> list[str]:
    """What is not as it should be."""
    quarter = len(samples) // 4
    memory = [median(s.memory_mb for s in samples[n * quarter : (n + 1) * quarter]) for n in (1, 2, 3)]
    by_request = gateway.rows("SELECT request_id, MAX(attempt) FROM requests GROUP BY request_id")
    attempts = gateway.rows("SELECT 'all', COUNT(*) FROM requests WHERE platform IS NOT NULL")["all"]
    by_left = "SELECT COUNT(DISTINCT request_id) FROM requests WHERE status = 'cancelled' AND error_kind IS NULL"
    cancelled = gateway.rows(f"SELECT 'all', ({by_left})")["all"]
    by_answer = "SELECT request_id FROM requests GROUP BY request_id HAVING SUM(status = 'success') = 0"
    unanswered = gateway.rows(f"SELECT 'all', COUNT(*) FROM ({by_answer})")["all"]
    told = rest.metrics
    counted = sum(value for name, value in told.items() if name.startswith("freeway_requests_total"))
    counted_cancelled = told['freeway_requests_total{status="cancelled"}']
    failed = counted_cancelled + told['freeway_requests_total{status="error"}']
    checks = {
        f"{load.seen['hung']} requests hung": not load.seen["hung"],
        f"{load.seen['JUST STOPPED']} streams just stopped": not load.seen["JUST STOPPED"],
        f"memory by quarters: {memory}": memory[-1] - memory[0] <= MEMORY_GROWTH_MB_MAX
        and memory[-1] - memory[-2] <= MEMORY_CREEP_MB_MAX,
        f"{len(load.ids - by_request.keys())} requests have no row": load.ids <= by_request.keys(),
        f"{counted} requests counted, {len(by_request)} logged": counted == len(by_request),
        f"{told['freeway_attempts_total']} attempts counted, {attempts} logged": told["freeway_attempts_total"]
        == attempts,
        f"{failed} failed or left, {unanswered} logged without an answer": failed == unanswered,
        # Some leave between two attempts, of which the last has failed: then no row is left for their leaving.
        f"{counted_cancelled} cancelled counted, {cancelled} logged": 0.99 * counted_cancelled <= cancelled
        and cancelled <= counted_cancelled,
        f"{load.seen['left']} left, {cancelled} rows say so": 0.9 * load.seen["left"] <= cancelled
        or not load.seen["left"],
        f"{told['freeway_log_dropped_rows_total']} rows dropped": not told["freeway_log_dropped_rows_total"],
        f"still active: {rest.active}": not rest.active and not told["freeway_active_attempts"],
        f"{told['freeway_running_requests']} requests still running": not told["freeway_running_requests"],
        f"{rest.descriptors} descriptors at rest": rest.descriptors <= DESCRIPTORS_AT_REST_MAX,
        f"{told['freeway_tasks']} tasks at rest, {samples[0].tasks} at first": told["freeway_tasks"]
        <= samples[0].tasks,
        f"{rest.threads} threads at rest, {samples[1].threads} under load": rest.threads <= samples[1].threads,
        f"exit code {rest.exit_code}": rest.exit_code == 0,
    }
    return [words for words, holds in checks.items() if not holds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        lines, wrong = asyncio.run(soak(seconds, Path(folder)))
    verdict = "Nothing grew, nothing was lost." if not wrong else "WRONG: " + "; ".join(wrong)
    head = [f"# {seconds:.0f} seconds of bad weather, {datetime.now(UTC):%Y-%m-%d}", ""]
    text = "\n".join([*head, *lines, "", verdict]) + "\n"
    print(text)
    if seconds >= 60:
        (HERE / "SOAK.md").write_text(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
