"""A private Redis for one test run, and gateways as processes that share it."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from conftest import API_KEY, PLAIN, ROOT, Client, Platforms, Process, catalog_of, end
from fake_provider import FakeProvider


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@dataclass
class RedisServer:
    """redis-server on a port of its own; what it holds is gone with it."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        flags = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(
            ["redis-server", *flags, "--dir", str(self.folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.1):
                return
            time.sleep(0.01)
        raise RuntimeError("redis-server does not answer")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def command(self, *words: str) -> str:
        """Through redis-cli, for a look from outside."""
        return subprocess.run(
            ["redis-cli", "-p", str(self.port), *words], capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    assert shutil.which("redis-server"), "make test-scale installs redis-server; here it is missing"
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Member(Client):
    """One of several gateways: a process of its own, with a database of its own."""

    running: Process | None = None
    folder: Path = Path()

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.running.signal(number)

    async def stopped(self) -> int:
        self.running.signal(signal.SIGTERM)
        return await self.running.ended()

    async def metric(self, name: str) -> float:
        """The sum over all its labels."""
        lines = (await self.get("/metrics")).body.decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].split(" ")[0] == name)

    def lines(self, event: str) -> list[dict]:
        """What it has logged of this."""
        found = [json.loads(line) for line in self.running.output if line.startswith("{")]
        return [line for line in found if line["event"] == event]


@contextlib.asynccontextmanager
async def gateways(
    count: int, folder: Path, fake: FakeProvider, platforms: Platforms, settings: dict[str, str]
) -> AsyncIterator[list[Member]]:
    """As many gateways, started together, and ready."""
    async with contextlib.AsyncExitStack() as stack:
        members = []
        for number in range(count):
            place = folder / f"gateway-{number}"
            place.mkdir(exist_ok=True)
            members.append(await member(stack, place, fake, platforms, settings))
        for one in members:
            one.base_url = await one.running.ready()
        yield members


async def member(
    stack: contextlib.AsyncExitStack, place: Path, fake: FakeProvider, platforms: Platforms, settings: dict[str, str]
) -> Member:
    (place / "catalog.json").write_text(json.dumps(catalog_of(platforms, fake)))
    environ = {
        "PATH": os.environ["PATH"], "GATEWAY_PORT": "0", "GATEWAY_API_KEY": API_KEY,
        "GATEWAY_CATALOG": str(place / "catalog.json"), **PLAIN, **settings,
    }  # fmt: skip
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "gateway.py"), cwd=place, env=environ, limit=1 << 26, **pipes
    )
    running = Process(process)
    stack.push_async_callback(end, running)
    timeout, connector = aiohttp.ClientTimeout(total=30), aiohttp.TCPConnector(limit=0)
    http = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout, connector=connector))
    return Member("", http, API_KEY, running, place)


async def sharing(members: list[Member]) -> None:
    """Wait until each knows of all."""
    for one in members:
        async with asyncio.timeout(10):
            while await one.metric("freeway_gateways") < len(members):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


# --- Fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def one_redis(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(one_redis: RedisServer) -> RedisServer:
    """Empty, and shared by all tests that do it no harm."""
    one_redis.command("FLUSHALL")
    return one_redis


@pytest.fixture
def own_redis(tmp_path: Path):
    """For tests that stop it."""
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
async def start_gateways(fake, tmp_path: Path):
    """Start gateways that share a Redis; they know of each other when this returns."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(count, server, platforms=("a", "b", "c"), settings=None, *, folder="one", alone=False):
            place = tmp_path / folder
            place.mkdir(exist_ok=True)
            given = {"GATEWAY_STATE": server.url, **(settings or {})}
            members = await stack.enter_async_context(gateways(count, place, fake, platforms, given))
            if not alone:
                await sharing(members)
            return members

        yield start
