"""What several gateways on one Redis cost, and whether they keep their promises (SPEC 20), measured at the real thing.

    python bench/scale.py                       everything, some ten minutes, written to bench/SCALE.md
    python bench/scale.py --only news,limits    some of it, printed

Gateways, Redis and fake providers are processes and servers on 127.0.0.1; it needs redis-server and the packages of
requirements-scale.txt. Whatever else the machine does is in the figures, so its load is noted beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent, HERE.parent / "tests", HERE.parent / "tests" / "scale"):
    sys.path.insert(0, str(folder))

from fake_provider import FakeProvider, Request, error, until  # noqa: E402
from harness import compare  # noqa: E402
from run import CATALOG, KEY, MODEL  # noqa: E402
from servers import Member, free_port, gateways, redis_server, sharing  # noqa: E402

ONLY = {"X-Fallback": "none"}
MINUTE_S, LIMIT = 60.0, 100
HANG_S, RATE = 60.0, 200
Lines = list[str]


async def flood(members: Sequence[Member], seconds: float, at_once: int = 4) -> None:
    """Each gateway is asked all the time; a refusal is followed by a short pause."""
    end = time.monotonic() + seconds

    async def ask(member: Member) -> None:
        while time.monotonic() < end:
            if (await member.chat(model="a-model", headers=ONLY)).status != 200:
                await asyncio.sleep(0.05)

    await asyncio.gather(*[ask(member) for member in members for _ in range(at_once)], return_exceptions=True)


def most_in_a_minute(arrivals: Sequence[float]) -> int:
    """In any window of 60 s, wherever it begins."""
    most, first = 0, 0
    for last, at in enumerate(arrivals):
        while at - arrivals[first] >= MINUTE_S:
            first += 1
        most = max(most, last - first + 1)
    return most


async def limits(folder: Path) -> Lines:
    """Four gateways at a provider's 100 a minute, for two minutes and a bit; once more with one killed."""
    lines = []
    for killed in (False, True):
        async with FakeProvider().serving() as fake:
            with redis_server(folder) as redis:
                settings = {"GATEWAY_STATE": redis.url}
                place = folder / f"limits-{killed}"
                place.mkdir()
                async with gateways(4, place, fake, {"a": {"model": {"rpm": LIMIT}}}, settings) as members:
                    await sharing(members)
                    flooding = asyncio.create_task(flood(members, 130))
                    if killed:
                        await asyncio.sleep(random.uniform(20, 70))
                        members[random.randrange(4)].kill(signal.SIGKILL)
                    await flooding
            arrivals = [request.arrived_at for request in fake.requests]
        began = arrivals[0]
        whole = [sum(begin <= at - began < begin + MINUTE_S for at in arrivals) for begin in (0, MINUTE_S)]
        what = "one killed at random" if killed else "all alive"
        lines.append(f"| {what} | {most_in_a_minute(arrivals)} | {whole[0]}, {whole[1]} |")
    return [
        "## A limit of 100 a minute, four gateways, more asked than there is",
        "",
        "| | most in any 60 s (≤ 100) | in the first and the second minute (≥ 95) |",
        "|---|---|---|",
        *lines,
    ]


async def news(folder: Path) -> Lines:
    """How long until a 429 that one gateway has got is known to the other."""
    count = 300
    models = [{"model_id": f"m{n}"} for n in range(count)]
    async with FakeProvider().serving() as fake:
        said: list[float] = []

        def refuse(request: Request) -> Any:
            said.append(time.monotonic())
            return error(429, headers={"retry-after": "600"})

        fake.script("a", refuse)
        with redis_server(folder) as redis:
            async with gateways(2, folder, fake, {"a": {"models": models}}, {"GATEWAY_STATE": redis.url}) as members:
                await sharing(members)
                one, other = members
                spans = []
                for n in range(count):
                    asked = asyncio.create_task(one.chat(model=f"m{n}", headers=ONLY))
                    await until(lambda n=n: len(said) > n)
                    while f"m{n}" not in await other.cooled_keys():
                        pass
                    spans.append((time.monotonic() - said[n]) * 1000)
                    await asked
    spans.sort()
    p50, p99 = median(spans), spans[int(0.99 * count)]
    return [
        "## A 429 that one has got, known to the other",
        "",
        f"From the provider's answer to the first look at the other's /api/protection that shows it, {count} times: "
        f"p50 {p50:.1f} ms, p99 {p99:.1f} ms (≤ 50 ms), longest {spans[-1]:.1f} ms; the look itself is in it.",
    ]


async def moved(folder: Path) -> Lines:
    """Conversations that go on at another gateway."""
    platforms = {name: {"keys": [f"sk-{name}-key-number-{n}-0123456789" for n in range(3)]} for name in "abcd"}
    kept, count = 0, 200
    async with FakeProvider().serving() as fake:
        with redis_server(folder) as redis:
            settings = {"GATEWAY_STATE": redis.url, "THREAD_COOLDOWN_MS": "1"}
            async with gateways(2, folder, fake, platforms, settings) as members:
                await sharing(members)
                for n in range(count):
                    headers = {"X-Session-Id": f"conversation-{n}"}
                    fake.clear()
                    for member in members:
                        await member.chat(model="auto-smart", headers=headers)
                    kept += len({(request.platform, request.key) for request in fake.requests}) == 1
    return [
        "## A conversation whose next request goes to another gateway",
        "",
        f"{kept} of {count} kept model and key; the second request follows the first at once.",
    ]


async def hang(folder: Path) -> Lines:
    """Redis stopped for a minute under 200 requests a second."""
    async with FakeProvider().serving() as fake:
        with redis_server(folder) as redis:
            platforms = {"a": {"model": {"rpm": 1_000_000}}, "b": {}}
            async with gateways(2, folder, fake, platforms, {"GATEWAY_STATE": redis.url}) as members:
                await sharing(members)
                await paced(members, 5)  # everything warm
                before = await paced(members, 20)
                known = [len(member.lines("shared_state")) for member in members]
                redis.signal(signal.SIGSTOP)
                during = await paced(members, HANG_S)
                redis.signal(signal.SIGCONT)
                told = [len(m.lines("shared_state")) - lines for m, lines in zip(members, known, strict=True)]
                for member in members:
                    async with asyncio.timeout(40):
                        while not await member.metric("freeway_shared_state_up"):  # noqa: ASYNC110
                            await asyncio.sleep(0.1)
                after = await paced(members, 10)
                await asyncio.sleep(1)
                (account,) = redis.command("KEYS", "*a-model}:use").split()
                used = sum(int(value.split("|")[2]) for value in redis.command("HVALS", account).split())
                both = [len(m.lines("shared_state")) - lines for m, lines in zip(members, known, strict=True)]
        asked = fake.called.count("a")
    rows = [
        f"| {name} | {len(ms)} | {failed} | {median(ms):.1f} | {ms[int(0.99 * len(ms))]:.1f} | {ms[-1]:.0f} |"
        for name, (ms, failed) in (("before", before), ("stopped, 60 s", during), ("after", after))
    ]
    return [
        f"## Redis stopped (SIGSTOP) for {HANG_S:.0f} s under {RATE} requests/s, on two gateways",
        "",
        "| | requests | errors (0) | p50 ms | p99 ms (≤ 5 more) | longest ms |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Whole requests as the client sees them, on a limited model. Log lines: {told} while it was gone, {both} in "
        f"all (≤ 2 a process). Counted in Redis afterwards: {used} of {asked} requests.",
    ]


async def paced(members: Sequence[Member], seconds: float) -> tuple[list[float], int]:
    """So many requests a second, whether answered or not; their times in ms, sorted, and how many failed."""
    spans: list[float] = []
    failed = 0

    async def ask(member: Member, n: int) -> None:
        nonlocal failed
        began = time.perf_counter()
        model = "auto-smart" if n % 4 == 0 else "a-model"
        got = await member.chat(model=model, headers={"X-Session-Id": f"s{n % 400}"})
        spans.append((time.perf_counter() - began) * 1000)
        failed += got.status != 200

    begin, tasks = time.monotonic(), []
    for n in range(int(seconds * RATE)):
        await asyncio.sleep(max(0.0, begin + n / RATE - time.monotonic()))
        tasks.append(asyncio.create_task(ask(members[n % len(members)], n)))
    await asyncio.gather(*tasks)
    return sorted(spans), failed


NAMES = "floor", "gateway"
ROUNDS, ROUND_S, CONNECTIONS = 9, 2.5, 64
SHARE = 0.5  # of a core, for each server process where the load is to have cores of its own
CPU_GROUPS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))  # the first and the second kind


def children(pid: int) -> list[int]:
    """Of a server that starts its workers as processes; the one that only tracks shared memory is none."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"resource_tracker" not in (stat.parent / "cmdline").read_bytes():
                found.append(int(stat.parent.name))
    return sorted(found)


@contextlib.contextmanager
def held_to(share: float, places: Mapping[int, int]) -> Iterator[None]:
    """Processes, each on its core and to this share of it, through control groups: the machine's own way to give a
    process less than a core. `places`: pid to core. Raises OSError where they are not ours to use."""
    root = next(place for place in CPU_GROUPS if place.is_dir())
    period_us = 100_000
    made = []
    try:
        for pid, core in places.items():
            group = root / f"bench-{pid}"
            group.mkdir()
            made.append(group)
            if root == CPU_GROUPS[0]:
                (group / "cpu.cfs_period_us").write_text(str(period_us))
                (group / "cpu.cfs_quota_us").write_text(str(int(share * period_us)))
            else:
                (group / "cpu.max").write_text(f"{int(share * period_us)} {period_us}")
            (group / "cgroup.procs").write_text(str(pid))
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {core})
        yield
    finally:
        for group in made:
            for pid in (group / "cgroup.procs").read_text().split():
                (root / "cgroup.procs").write_text(pid)
            group.rmdir()


Server = tuple[int, "subprocess.Popen[bytes]"]  # its port, and its first process
Servers = dict[tuple[str, int], Server]  # by name and number of workers


def started(stack: contextlib.ExitStack, folder: Path, build: Path, redis: str) -> Servers:
    """Floor and gateway, each as one process and as two; all of them end with the stack."""
    mock_port = free_port()
    platforms = [{**p, "base_url": f"http://127.0.0.1:{mock_port}/v1"} for p in CATALOG["platforms"]]
    (folder / "catalog.json").write_text(json.dumps({**CATALOG, "platforms": platforms}))

    def start(*command: str, **settings: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        return process

    start(str(build / "mock_upstream"), str(mock_port))
    servers: Servers = {}
    for count in (1, 2):
        port = free_port()
        asgi = f"-m uvicorn --app-dir {HERE}/harness floor:app --loop uvloop --http httptools --no-access-log"
        more = f"--log-level warning --port {port}" + (f" --workers {count}" if count > 1 else "")
        upstream = f"http://127.0.0.1:{mock_port}"
        servers["floor", count] = port, start(sys.executable, *f"{asgi} {more}".split(), UPSTREAM=upstream)
        port = free_port()
        flags = f"--db {folder}/{count}.db --catalog {folder}/catalog.json --port {port}"
        settings = {"GATEWAY_API_KEY": KEY, "GATEWAY_STATE": redis, "GATEWAY_WORKERS": str(count)}
        gateway = start(sys.executable, str(HERE.parent / "gateway.py"), *flags.split(), **settings)
        servers["gateway", count] = port, gateway
    return servers


async def workers(folder: Path) -> Lines:
    """Requests a second of one process and of two, gateway and floor: with whole cores, which the load uses too, and
    with half a core for each server process, so that the load has cores that nobody else needs."""
    build, lines = compare.build(), []
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(redis_server(folder))
        servers = started(stack, folder, build, redis.url)
        for port, _ in servers.values():
            await until_open(port)
        for words, share in (("whole cores", 1.0), ("half a core each", SHARE)):
            with contextlib.ExitStack() as held:
                if share < 1:
                    for (_, count), (_, process) in servers.items():
                        pids = children(process.pid) if count > 1 else [process.pid]
                        held.enter_context(held_to(share, {pid: core for core, pid in enumerate(pids)}))
                speeds: dict[tuple[str, int], list[float]] = {key: [] for key in servers}
                for _ in range(ROUNDS):
                    for key, (port, _) in servers.items():
                        speeds[key].append(await asyncio.to_thread(requests_a_second, build, folder, port))
            lines += [f"| {words} | {name} | {compared(speeds[name, 1], speeds[name, 2])} |" for name in NAMES]
    return [
        "## Two workers",
        "",
        f"Plain requests over {CONNECTIONS} connections, {ROUNDS} interleaved rounds of {ROUND_S} s: medians, and "
        "where the middle half of the rounds lies. On whole cores load generator and provider take their part of the "
        "same two; held to half a core each (control groups, one worker on each core), the server processes leave "
        "them room.",
        "",
        "| each process has | | requests/s, one | two | times (≥ 1.8) |",
        "|---|---|---|---|---|",
        *lines,
    ]


def compared(one: Sequence[float], two: Sequence[float]) -> str:
    times = sorted(b / a for a, b in zip(one, two, strict=True))
    middle = f"({times[len(times) // 4]:.2f} to {times[-1 - len(times) // 4]:.2f})"
    return f"{median(one):.0f} | {median(two):.0f} | {median(two) / median(one):.2f} {middle}"


def requests_a_second(build: Path, folder: Path, port: int) -> float:
    peer = compare.Peer(
        {"name": f"at-{port}", "cmd": "", "port": port, "key": KEY, "model": MODEL},
        {"build": build, "mock_port": 0, "peers_dir": folder, "tmp": folder},
    )
    command = [str(build / "loadgen"), str(port), str(peer.raw()), "-c", str(CONNECTIONS), "-d", str(ROUND_S)]
    done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return float(done["ok"]) / ROUND_S


async def until_open(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return


PARTS: dict[str, Callable[[Path], Awaitable[Lines]]] = {
    "news": news, "moved": moved, "hang": hang, "limits": limits, "workers": workers,
}  # fmt: skip


async def measured(only: Sequence[str]) -> Lines:
    lines: Lines = []
    for name in only:
        with tempfile.TemporaryDirectory() as folder:
            loads = os.getloadavg()[0], 0.0
            lines += ["", *await PARTS[name](Path(folder))]
            loads = loads[0], os.getloadavg()[0]
        lines += ["", f"Load of the machine ({os.cpu_count()} cores): {loads[0]:.1f} before, {loads[1]:.1f} after."]
        print("\n".join(lines[-8:]), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}")
    given = parser.parse_args()
    only = given.only.split(",") if given.only else list(PARTS)
    lines = asyncio.run(measured(only))
    if not given.only:
        (HERE / "SCALE.md").write_text("\n".join(["# Several gateways on one Redis", *lines, ""]))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
