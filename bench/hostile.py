"""A hostile day against `python gateway.py`: what the client saw, what the log says, and that the next one is served.

    make hostile                           everything, about two minutes, written to bench/HOSTILE.md
    python bench/hostile.py bomb database  the cases with these words in their names

What is fast and needs no process of its own is in tests/test_hostile.py and tests/test_odd_values.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import resource
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from glob import glob
from pathlib import Path

import aiohttp

from running import AUTHORIZED, KEY, Gateway  # isort: skip  # it finds the next one's folder

from fake_provider import STOP, Every, FakeProvider, answer, body, chunk, chunked, event, raw, sse

HERE = Path(__file__).resolve().parent
MB = 1 << 20
FAKETIME = next(iter(glob("/usr/lib/*/faketime/libfaketimeMT.so.1")), None)  # Debian's package faketime
SETTINGS = {
    "MAX_STREAM_STALL_MS": "4000", "FIRST_TOKEN_TIMEOUT_MS": "5000", "REQUEST_TIMEOUT_MS": "5000",
    "TRANSIENT_COOLDOWN_MS": "20", "RATE_LIMIT_COOLDOWN_MS": "20", "KEEPALIVE_INTERVAL_MS": "200",
}  # fmt: skip
BIG_STREAM = sse(*[chunk("x" * 65_536)] * 640, STOP)  # 40 MB: more than all socket buffers on the way, 20 on Linux
HEAD = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n".encode()


@dataclass
class Day:
    """One gateway, two platforms behind it (`a` misbehaves, `b` does not), and its clients."""

    gateway: Gateway
    fake: FakeProvider
    http: aiohttp.ClientSession

    async def ask(self, content: str = "hi", **fields: object) -> tuple[int, bytes]:
        sent = {"model": "auto-priority", "messages": [{"role": "user", "content": content}], **fields}
        return await self.send(json.dumps(sent).encode())

    async def send(self, data: object, **headers: str) -> tuple[int, bytes]:
        url = f"{self.gateway.base_url}/v1/chat/completions"
        async with self.http.post(url, data=data, headers={**AUTHORIZED, **headers}) as got:
            return got.status, await got.read()

    async def many(self, count: int, **fields: object) -> str:
        """That many at once; what became of them."""
        got = await asyncio.gather(*(self.ask(f"request {n}", **fields) for n in range(count)), return_exceptions=True)
        return counted(str(g[0]) if isinstance(g, tuple) else type(g).__name__ for g in got)

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.gateway.base_url.rsplit(":", 1)[1]))
        try:
            yield reader, writer
        finally:
            writer.close()

    async def flood(self, *pieces: bytes) -> str:
        """Send it all and give the answer's first line; whoever hangs up in between has answered before."""
        async with self.connection() as (reader, writer):
            reading = asyncio.create_task(reader.readline())
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
            with contextlib.suppress(ConnectionError):
                return (await asyncio.wait_for(reading, 10)).decode().strip() or "closed"
            return "closed"


def counted(outcomes: object) -> str:
    return ", ".join(f"{count} × {outcome}" for outcome, count in Counter(outcomes).most_common()) or "nothing"


CASES: list[Callable[[Day], Awaitable[str]]] = []
OWN: list[Callable[[Path, FakeProvider], Awaitable[tuple[str, Gateway]]]] = []  # with a gateway of their own


def case(function: Callable[[Day], Awaitable[str]]) -> Callable[[Day], Awaitable[str]]:
    CASES.append(function)
    return function


# --- Clients --------------------------------------------------------------------------------------------------------


@case
async def five_hundred_requests_at_once(day: Day) -> str:
    return f"{await day.many(250)}; streams: {await day.many(250, stream=True)}"


@case
async def a_hundred_slow_readers(day: Day) -> str:
    day.fake.script("a", BIG_STREAM)
    day.fake.clear()
    body_of = json.dumps({"model": "a-model", "stream": True, "messages": [{"role": "user", "content": "x"}]}).encode()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(100):
            _, writer = await stack.enter_async_context(day.connection())
            writer.transport.pause_reading()
            writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(body_of) + body_of)
        written, before = [-1], [0]
        while written != before:
            await asyncio.sleep(0.5)
            before, written = written, [request.written for request in day.fake.requests]
        day.fake.script("a", answer())
        times = []
        for _ in range(50):
            started = time.monotonic()
            assert (await day.ask())[0] == 200
            times.append(time.monotonic() - started)
        grown = day.gateway.memory_mb()
    return (
        f"providers paused after {max(written) / MB:.1f} MB each, socket buffers included; {grown:.0f} MB in all; "
        f"50 other requests took {sorted(times)[25] * 1000:.0f} ms, the slowest {max(times) * 1000:.0f} ms"
    )


@case
async def floods_of_headers(day: Day) -> str:
    many = await day.flood(HEAD, *[b"x-a: b\r\n" * 8000] * 100)
    large = await day.flood(HEAD, b"x-a: ", *[b"x" * 65_536] * 100)
    long = await day.flood(b"GET /", *[b"x" * 65_536] * 100)
    return f"many: {many}; one of 6 MB: {large}; an address of 6 MB: {long}"


@case
async def connections_that_say_nothing_or_never_finish(day: Day) -> str:
    """500 without a word, 50 with half a head and a letter now and then, 50 with half a body."""
    async with contextlib.AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(day.connection()) for _ in range(600)]
        for _, writer in opened[500:550]:
            writer.write(HEAD[:40])
        for _, writer in opened[550:]:
            writer.write(HEAD + b"content-length: 100\r\n\r\n{")
        ends = [asyncio.create_task(reader.read(200)) for reader, _ in opened]
        writers = [writer for _, writer in opened[500:]]
        slowly = asyncio.create_task(drip(writers))
        started = time.monotonic()
        meanwhile = await day.many(50)
        said: list[list[str]] = []
        took = []
        for group in (ends[:500], ends[500:550], ends[550:]):
            got = await asyncio.gather(*group, return_exceptions=True)
            took.append(time.monotonic() - started)
            said.append([g.decode()[9:12] or "closed" if isinstance(g, bytes) else type(g).__name__ for g in got])
        slowly.cancel()
    groups = zip(("silent", "slow heads", "slow bodies"), said, took, strict=True)
    return (
        "; ".join(f"{name}: {counted(what)} within {s:.0f} s" for name, what, s in groups) + f"; meanwhile {meanwhile}"
    )


async def drip(writers: list[asyncio.StreamWriter]) -> None:
    while True:
        for writer in writers:
            if not writer.is_closing():
                writer.write(b"x")
        await asyncio.sleep(1)


@case
async def bodies_of_32_mb_eight_at_once(day: Day) -> str:
    content = json.dumps(
        {"model": "a-model", "messages": [{"role": "user", "content": "x" * (32 * MB - 200)}]}
    ).encode()
    small = json.dumps({"messages": [], "x": "y" * (32 * MB - 200)}).encode()
    got = await asyncio.gather(*(day.send(data) for data in [content, small] * 4))
    return counted(str(status) for status, _ in got)


@case
async def bodies_beyond_the_limit(day: Day) -> str:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * MB

    async def sent(data: object, **headers: str) -> str:
        try:
            return str((await day.send(data, **headers))[0])
        except aiohttp.ClientError as error:
            return type(error).__name__

    packed = gzip.compress(b" " * (500 * MB), compresslevel=1)
    return (
        f"declared: {await sent(b'x' * (33 * MB))}; without a length: {await sent(endless())}; "
        f"500 MB gzipped into {len(packed) / MB:.1f}: {await sent(packed, **{'Content-Encoding': 'gzip'})}"
    )


@case
async def json_that_is_deep_or_all_brackets(day: Day) -> str:
    deep = b'{"messages": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"
    within = b'{"messages": [{"role": "user", "content": "x"}], "x": ' + b"[" * 500 + b"]" * 500 + b"}"
    brackets = b'{"messages": [' + b"[]," * (4 * MB) + b"[]]}"
    got = [await day.send(data) for data in (deep, within, brackets)]
    return ", ".join(f"{status} {json.loads(text)['error']['message'][:60]}" for status, text in got)


@case
async def twenty_thousand_conversations_and_model_names(day: Day) -> str:
    before = len((await day.gateway.ask("/metrics")).splitlines())
    seen: Counter[int] = Counter()
    for start in range(0, 20_000, 200):
        for model in ("auto-smart", f"no-such-model-{start}"):
            batch = (
                day.ask(f"conversation {n}", model=model) for n in range(start, start + 100 + 100 * (model[0] == "a"))
            )
            seen.update(status for status, _ in await asyncio.gather(*batch))
    sessions = (await day.gateway.metrics())["freeway_sessions"]
    after = len((await day.gateway.ask("/metrics")).splitlines())
    return f"{counted(seen.elements())}; {sessions:.0f} sessions kept, lines of /metrics {before} → {after}"


# --- Providers ------------------------------------------------------------------------------------------------------


@case
async def a_provider_that_sends_a_byte_at_a_time(day: Day) -> str:
    stream = event(chunk("slow ")) + event(chunk("but sure")) + event(STOP)
    steps = [Every(0.01, stream[at : at + 1], times=1) for at in range(len(stream))]
    day.fake.script("a", chunked(*steps))
    started = time.monotonic()
    status, text = await day.ask(stream=True)
    seconds = time.monotonic() - started
    whole = raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n", Every(0.01, b" "))
    day.fake.script("a", whole)
    other, _ = await day.ask()
    assert text.endswith(b"data: [DONE]\n\n") and b'"finish_reason":"error"' not in text
    whose = "its own" if b"but sure" in text else "the next's, which joined when it was late"
    return f"the stream: {status} after {seconds:.1f} s, whole, {whose}; a whole answer: {other} from the next"


@case
async def a_provider_that_never_ends(day: Day) -> str:
    """A stream of words without end, to a client that reads it all."""
    day.fake.script("a", chunked(Every(0, event(chunk("x" * 200_000)))))
    started, size, last = time.monotonic(), 0, b""
    url = f"{day.gateway.base_url}/v1/chat/completions"
    sent = {"model": "auto-priority", "stream": True, "messages": [{"role": "user", "content": "x"}]}
    async with day.http.post(url, json=sent, headers=AUTHORIZED) as got:
        while piece := await got.content.readany():
            size, last = size + len(piece), (last + piece)[-2000:]
    assert last.endswith(b"data: [DONE]\n\n") and b'"finish_reason":"error"' in last
    return f"{size / MB:.0f} MB in {time.monotonic() - started:.1f} s, then the error event and [DONE]"


@case
async def a_provider_with_a_gzip_bomb(day: Day) -> str:
    bomb = gzip.compress(b" " * (1000 * MB), compresslevel=1)
    seen = []
    for status in (200, 500):
        day.fake.script("a", body(bomb, status=status, headers={"content-encoding": "gzip"}))
        seen += [(await day.ask())[0], (await day.ask(stream=True))[0]]
    return f"1000 MB in {len(bomb) / MB:.1f}: {counted(seen)}, all from the next platform"


# --- The machine ----------------------------------------------------------------------------------------------------


async def load_while(day: Day, seconds: float) -> tuple[Counter[int], float]:
    """Twenty clients; the statuses they got, and the slowest answer."""
    until, statuses, slowest = time.monotonic() + seconds, Counter[int](), 0.0

    async def client() -> None:
        nonlocal slowest
        while time.monotonic() < until:
            started = time.monotonic()
            statuses[(await day.ask(stream=random.random() < 0.5))[0]] += 1
            slowest = max(slowest, time.monotonic() - started)

    await asyncio.gather(*(client() for _ in range(20)))
    return statuses, slowest


@case
async def a_database_that_is_locked_during_load(day: Day) -> str:
    with contextlib.closing(sqlite3.connect(day.gateway.db, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        statuses, slowest = await load_while(day, 2)
        waiting = (await day.gateway.metrics())["freeway_log_queue_rows"]
        other.execute("ROLLBACK")
    return f"{counted(statuses.elements())}, the slowest {slowest * 1000:.0f} ms; {waiting:.0f} rows waited"


@case
async def a_disk_that_is_full_during_load(day: Day) -> str:
    """No file may grow (RLIMIT_FSIZE), and then it may again."""
    pid, free = day.gateway.process.pid, resource.prlimit(day.gateway.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, free[1]))
    statuses, slowest = await load_while(day, 2)
    waiting = (await day.gateway.metrics())["freeway_log_queue_rows"]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, free)
    return f"{counted(statuses.elements())}, the slowest {slowest * 1000:.0f} ms; {waiting:.0f} rows waited"


# --- With a gateway of their own ------------------------------------------------------------------------------------


def own(function: Callable[..., Awaitable[tuple[str, Gateway]]]) -> Callable[..., Awaitable[tuple[str, Gateway]]]:
    OWN.append(function)
    return function


@contextlib.asynccontextmanager
async def day_of(gateway: Gateway, fake: FakeProvider) -> AsyncIterator[Day]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as http:
        yield Day(gateway, fake, http)


@own
async def no_descriptor_left(folder: Path, fake: FakeProvider) -> tuple[str, Gateway]:
    few = 128
    limit = (few, few)
    gateway = await Gateway.start(
        folder, fake, ["a", "b"], SETTINGS, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    )
    gateway.listen()
    async with day_of(gateway, fake) as day:
        await day.ask()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2 * few):
                await stack.enter_async_context(day.connection())
            await asyncio.sleep(0.5)
            used, started = gateway.descriptors(), gateway.cpu_s()
            await asyncio.sleep(1)
            busy = gateway.cpu_s() - started
        await asyncio.sleep(0.5)
        after = (await day.ask())[0]
    return f"{used} of {few} open, {busy:.2f} s of CPU in a second of it; then {after}", gateway


@own
async def an_event_log_that_nobody_reads(folder: Path, fake: FakeProvider) -> tuple[str, Gateway]:
    gateway = await Gateway.start(folder, fake, ["a", "b"], SETTINGS)
    async with day_of(gateway, fake) as day:
        seen = [await day.many(100) for _ in range(20)]
        started = time.monotonic()
        assert (await day.ask())[0] == 200
    took, stopping = time.monotonic() - started, time.monotonic()
    gateway.process.terminate()
    while not gateway.gone():  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    stopped = time.monotonic() - stopping
    gateway.listen()
    await gateway.ended()
    return f"20 times {seen[-1]}; the next in {took * 1000:.0f} ms; a stop takes {stopped:.1f} s", gateway


@own
async def a_clock_that_jumps(folder: Path, fake: FakeProvider) -> tuple[str, Gateway]:
    """A year ahead, then two years back, under load, while a model rests and a conversation goes on."""
    if FAKETIME is None:
        return "not tried: the package faketime is not installed", await Gateway.start(folder, fake, ["a"], SETTINGS)
    clock = folder / "clock"
    clock.write_text("+0")
    faked = {"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_CACHE_DURATION": "1"}
    settings = {**SETTINGS, **faked, "DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    gateway = await Gateway.start(folder, fake, ["a", "b"], settings)
    gateway.listen()
    seen: list[str] = []
    async with day_of(gateway, fake) as day:
        for offset in ("+0", "+365d", "-365d", "+0"):
            clock.write_text(offset)
            statuses, slowest = await load_while(day, 2)
            seen.append(f"{offset}: {counted(statuses.elements())}, the slowest {slowest * 1000:.0f} ms")
    return "; ".join(seen), gateway


@own
async def a_stop_under_load(folder: Path, fake: FakeProvider) -> tuple[str, Gateway]:
    """Streams that would go on for a minute: SIGTERM lets them run for 10 s, then tells their clients."""
    gateway = await Gateway.start(folder, fake, ["a"], {**SETTINGS, "LOG_LEVEL": "warning"})
    fake.script("a", sse(Every(0.05, event(chunk("on and on ")), times=1200), STOP))
    async with day_of(gateway, fake) as day:
        streams = [asyncio.create_task(day.ask(stream=True)) for _ in range(100)]
        while len(fake.requests) < 100:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        started = time.monotonic()
        gateway.process.send_signal(signal.SIGTERM)
        got = [text for _, text in await asyncio.gather(*streams)]
        told = sum(text.endswith(b"data: [DONE]\n\n") and b'"finish_reason":"error"' in text for text in got)
        await gateway.process.wait()
    return f"{told} of 100 streams told so and ended after {time.monotonic() - started:.1f} s", gateway


# --- The report -----------------------------------------------------------------------------------------------------


def since(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def logged(gateway: Gateway, last_id: int, events_before: int) -> str:
    """Rows by what became of them, and lines by event, since then."""
    kinds = gateway.rows(
        f"SELECT COALESCE(error_kind, CASE WHEN platform IS NULL THEN 'refused' ELSE status END), COUNT(*) "
        f"FROM requests WHERE id > {last_id} GROUP BY 1"
    )
    rows = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
    for line in gateway.events[events_before:]:
        if line["event"] in ("defect", "library"):
            print(line, file=sys.stderr)
    lines = Counter(line["event"] for line in gateway.events[events_before:])
    return f"rows: {rows}" + (f"; lines: {', '.join(f'{n} {event}' for event, n in lines.items())}" if lines else "")


async def settled(gateway: Gateway) -> None:
    """All rows and lines written, nothing running."""
    async with asyncio.timeout(20):
        while True:
            now = await gateway.metrics()
            if not (now["freeway_log_queue_rows"] or now["freeway_active_attempts"] or now["freeway_running_requests"]):
                break
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)  # the event log's lines come a moment later


async def shared_day(folder: Path, wanted: Callable[[str], bool]) -> list[str]:
    """The cases that one gateway goes through, one after another."""
    lines = []
    async with FakeProvider().serving() as fake:
        gateway = await Gateway.start(folder, fake, ["a", "b"], SETTINGS)
        gateway.listen()
        async with day_of(gateway, fake) as day:
            await day.many(50)
            for function in filter(lambda f: wanted(f.__name__), CASES):
                await settled(gateway)
                last_id = gateway.rows("SELECT 1, COALESCE(MAX(id), 0) FROM requests")[1]
                events, before = len(gateway.events), gateway.memory_mb()
                gateway.forget_peak()
                saw = await function(day)
                peak = gateway.status("VmHWM") / 1024
                fake.script("a", answer())
                fake.clear()
                await asyncio.sleep(0.1)
                following = (await day.ask())[0]
                await settled(gateway)
                log = await logged(gateway, last_id, events)
                memory = f"{before:.0f} → {peak:.0f} → {gateway.memory_mb():.0f} MB"
                lines.append(f"| {words(function)} | {saw} | {log} | {following} | {memory} |")
                print(lines[-1], flush=True)
        gateway.process.terminate()
        assert await gateway.ended() == 0
    return lines


async def own_day(folder: Path, function: Callable[..., Awaitable[tuple[str, Gateway]]]) -> str:
    async with FakeProvider().serving() as fake:
        saw, gateway = await function(folder, fake)
        alive = gateway.process.returncode is None
        memory = f"{gateway.memory_mb():.0f} MB" if alive else "–"
        if alive:
            await settled(gateway)
            async with day_of(gateway, fake) as day:
                following = str((await day.ask())[0])
            gateway.process.terminate()
        else:
            following = "–"
        code = await gateway.ended()
        log = await logged(gateway, 0, 0)
    line = f"| {words(function)} | {saw} | {log}; exit {code} | {following} | {memory} |"
    print(line, flush=True)
    return line


def words(function: Callable[..., object]) -> str:
    return function.__name__.replace("_", " ").replace("json", "JSON").replace(" mb", " MB")


async def hostile_day(wanted: Callable[[str], bool]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        lines = await shared_day(Path(folder), wanted) if any(wanted(f.__name__) for f in CASES) else []
    for function in filter(lambda f: wanted(f.__name__), OWN):
        with tempfile.TemporaryDirectory() as folder:
            lines.append(await own_day(Path(folder), function))
    return lines


def main() -> int:
    names = sys.argv[1:]
    lines = asyncio.run(hostile_day(lambda name: not names or any(part in name for part in names)))
    head = [
        f"# A hostile day, {datetime.now(UTC):%Y-%m-%d}", "",
        "Each line is a case: what its client saw, what request and event log say (with the next request's row",
        "and line), what the next request got, and the gateway's memory before, at its peak, and after.", "",
        "| case | the client saw | the log says | next request | memory |", "|---|---|---|---|---|",
    ]  # fmt: skip
    if not names:
        (HERE / "HOSTILE.md").write_text("\n".join([*head, *lines]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
