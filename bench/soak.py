"""Minutes of bad weather: random faults, clients that leave, clients that read slowly, a hundred streams at once.

    make soak                              five minutes, written to bench/SOAK.md
    python bench/soak.py --seconds 20      a look

The gateway runs as its own process, the fake providers of the tests beside the clients. It fails when memory, file
descriptors or tasks grow, when a row is missing, or when something stays active that has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import aiohttp

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from fake_provider import CUT, PAUSE, RESET, FakeProvider, Reply, Request, answer, chunk, error, raw, sse  # noqa: E402

KEY = "fw-soak-0123456789abcdef"
AT_ONCE = 100
LONG_CHUNKS = 60  # per stream
MEMORY_GROWTH_MB_MAX = 12.0  # after the first quarter, in which caches and pools fill
DESCRIPTORS_AT_REST_MAX = 40
SETTINGS = {
    "GATEWAY_API_KEY": KEY, "LOG_LEVEL": "warning", "MAX_STREAM_STALL_MS": "300", "FIRST_TOKEN_TIMEOUT_MS": "500",
    "REQUEST_TIMEOUT_MS": "800", "TRANSIENT_COOLDOWN_MS": "20", "RATE_LIMIT_COOLDOWN_MS": "20",
    "STATS_REFRESH_MS": "1000", "KEEPALIVE_INTERVAL_MS": "100",
}  # fmt: skip
ROLE = chunk(role="assistant", content="")
LONG = sse(ROLE, *(chunk(f"word {number} ") for number in range(LONG_CHUNKS)), chunk(finish="stop"))
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


class Gateway:
    """The process under load, and what the system says of it."""

    def __init__(self, process: asyncio.subprocess.Process, base_url: str, db: Path) -> None:
        self.process, self.base_url, self.db = process, base_url, db

    @classmethod
    async def start(cls, folder: Path, fake: FakeProvider) -> Gateway:
        names = ["a", "b", "c", "d"]
        catalog = {
            "platforms": [{"id": name, "adapter": "openai", "base_url": fake.url(name)} for name in names],
            "models": [{"platform": name, "model_id": f"{name}-model"} for name in names],
            "keys": [{"platform": name, "key": f"sk-{name}-0123456789"} for name in names],
        }
        (folder / "catalog.json").write_text(json.dumps(catalog))
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(HERE.parent / "gateway.py"), "--port", "0", "--db", str(folder / "soak.db"),
            "--catalog", str(folder / "catalog.json"),
            env={**os.environ, **SETTINGS}, stdout=asyncio.subprocess.PIPE, limit=2**24,
        )  # fmt: skip
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        return cls(process, line.split()[-1].removesuffix("/v1"), folder / "soak.db")

    def memory_mb(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


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
        content = f"conversation {self.rng.randrange(5000)}"
        body = {"model": mode, "messages": [{"role": "user", "content": content}], "stream": temper != "whole"}
        headers = {"Authorization": f"Bearer {KEY}"}
        async with self.http.post(f"{self.gateway.base_url}/v1/chat/completions", json=body, headers=headers) as got:
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


async def settle(gateway: Gateway, http: aiohttp.ClientSession) -> int:
    """The descriptors of the gateway when all pools have let go of their idle connections (15 s)."""
    assert http.connector is not None
    await http.connector.close()
    deadline = time.monotonic() + 20
    while gateway.descriptors() > DESCRIPTORS_AT_REST_MAX and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.2)
    return gateway.descriptors()


async def protection(gateway: Gateway, http: aiohttp.ClientSession) -> dict[str, object]:
    async with http.get(f"{gateway.base_url}/api/protection", headers={"Authorization": f"Bearer {KEY}"}) as got:
        answered: dict[str, object] = await got.json()
        return answered


async def soak(seconds: float, folder: Path) -> tuple[list[str], list[str]]:
    """Lines of the report, and what went wrong."""
    rng = random.Random(1)
    async with FakeProvider().serving() as fake, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        for name, failing in {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.02}.items():
            fake.script(name, weather(rng, failing))
        gateway = await Gateway.start(folder, fake)
        load = Load(gateway, http, rng)
        started = time.monotonic()
        samples = []
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(load.client(started + seconds))
            while (elapsed := time.monotonic() - started) < seconds:
                await asyncio.sleep(min(5.0, seconds / 12))
                samples.append((elapsed, gateway.memory_mb(), gateway.descriptors()))
                fake.clear()
        at_rest = await settle(gateway, http)
        async with aiohttp.ClientSession() as fresh:
            left = (await protection(gateway, fresh))["active"]
        gateway.process.terminate()
        code = await gateway.process.wait()
    return judge(samples, load, at_rest, left, code, gateway.db)


def judge(
    samples: list[tuple[float, float, int]], load: Load, at_rest: int, left: object, code: int, db: Path
) -> tuple[list[str], list[str]]:
    rows = sqlite3.connect(db).execute("SELECT COUNT(*), COUNT(DISTINCT request_id) FROM requests").fetchone()
    known = {row[0] for row in sqlite3.connect(db).execute("SELECT DISTINCT request_id FROM requests")}
    settled = samples[len(samples) // 4 :]
    growth = settled[-1][1] - settled[0][1]
    lines = [f"| {at:.0f} s | {memory:.1f} MB | {descriptors} |" for at, memory, descriptors in samples]
    outcomes = ", ".join(f"{count} {name}" for name, count in load.seen.most_common())
    lines += ["", f"Requests: {load.seen.total()}; {outcomes}. Streamed events read: {load.chunks}."]
    lines += [f"Log: {rows[0]} rows of {rows[1]} requests. At rest: {at_rest} descriptors. Exit code {code}."]
    wrong = [f"{name}: {load.seen[name]}" for name in ("hung", "JUST STOPPED") if load.seen[name]]
    wrong += [f"memory grew by {growth:.1f} MB"] if growth > MEMORY_GROWTH_MB_MAX else []
    wrong += [f"{len(load.ids - known)} requests have no row"] if load.ids - known else []
    wrong += [f"still active: {left}"] if left else []
    wrong += [f"{at_rest} descriptors at rest"] if at_rest > DESCRIPTORS_AT_REST_MAX else []
    wrong += [f"exit code {code}"] if code else []
    return lines, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        lines, wrong = asyncio.run(soak(seconds, Path(folder)))
    verdict = "Nothing grew, nothing was lost." if not wrong else "WRONG: " + "; ".join(wrong)
    head = [f"# {seconds:.0f} seconds of bad weather, {datetime.now(UTC):%Y-%m-%d}", ""]
    text = "\n".join([*head, "| at | memory | descriptors |", "|---|---:|---:|", *lines, "", verdict]) + "\n"
    print(text)
    if seconds >= 60:
        (HERE / "SOAK.md").write_text(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
