"""A private PostgreSQL for tests: started once on a free port in a folder of its own, with a fresh database each time.

As a pytest plugin (`-p scale.postgres`) it also lets any other test run over PostgreSQL instead of SQLite: with
`--over-postgres` every gateway and store of a test gets a database of that test's own.
"""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import asyncpg
import pytest

USER = "postgres"  # initdb refuses to be root; Debian's package brings this one
PASSWORD = "s3cret-Pa55word"
OPTIONS = {  # a database of tests may lose everything
    "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "unix_socket_directories": "",
    "listen_addresses": "127.0.0.1", "max_connections": "60", "shared_buffers": "32MB", "autovacuum": "off",
}  # fmt: skip
HBA = "host all all 127.0.0.1/32 scram-sha-256\n"
OF_THE_FILE = {  # these lock or break a SQLite file themselves; test_log.py has what corresponds
    "test_a_locked_database_refuses_a_change_and_says_so",
    "test_a_failed_commit_of_a_discovery_changes_nothing_and_later_changes_work",
    "test_a_failed_commit_of_the_operators_change_changes_nothing_and_later_changes_work",
}


@dataclass
class Server:
    """One running server. `pause` stops all of its processes, as `kill -STOP` does."""

    folder: Path
    port: int
    process: subprocess.Popen
    _numbers = count()

    def address(self, database: str) -> str:
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def make_database(self) -> str:
        """The address of a new, empty one."""
        name = f"test_{next(self._numbers)}"
        run(self.address("postgres"), f"CREATE DATABASE {name}")
        return self.address(name)

    def processes(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *map(int, children)]

    def pause(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGCONT)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.resume()
        self.process.send_signal(signal.SIGINT)  # "fast": does not wait for clients
        self.process.wait(20)

    def start(self) -> None:
        self.process = started(self.folder, self.port)


def binary(name: str) -> str:
    """Debian keeps the server's programs out of the path."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = str(places[-1]) if places else shutil.which(name)
    assert found, f"these tests need {name}: apt-get install postgresql"
    return found


def identity() -> dict[str, object]:
    if os.getuid():
        return {}
    entry = pwd.getpwnam(USER)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(folder: Path, port: int) -> subprocess.Popen:
    settings = [word for name, value in OPTIONS.items() for word in ("-c", f"{name}={value}")]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [binary("postgres"), "-D", str(folder / "data"), "-p", str(port), *settings],
            stdout=log, stderr=log, cwd=folder, **identity(),
        )  # fmt: skip
    deadline = time.monotonic() + 20
    while True:
        try:
            run(f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres", "SELECT 1")
            return process
        except (OSError, asyncpg.PostgresError):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="postgres-", dir=place) as name:
        folder = Path(name)
        owner = identity()
        if owner:
            os.chown(folder, owner["user"], owner["group"])
        secret = folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        subprocess.run(
            [binary("initdb"), "-D", str(folder / "data"), "-U", USER, "--pwfile", str(secret), "--no-sync", "-A",
             "scram-sha-256", "-E", "UTF8", "--locale", "C.UTF-8"],
            check=True, stdout=subprocess.DEVNULL, cwd=folder, **owner,
        )  # fmt: skip
        (folder / "data" / "pg_hba.conf").write_text(HBA)
        server = Server(folder, port := free_port(), started(folder, port))
        try:
            yield server
        finally:
            server.stop()


async def query(address: str, sql: str, *values: object) -> list[dict]:
    connection = await asyncpg.connect(address, timeout=5)
    try:
        return [dict(row) for row in await connection.fetch(sql, *values, timeout=10)]
    finally:
        await connection.close(timeout=5)


def run(address: str, sql: str) -> list[dict]:
    """`query` for what is not async."""
    with ThreadPoolExecutor(1) as thread:  # where there is a loop, it is busy with the caller
        return thread.submit(lambda: asyncio.run(query(address, sql))).result()


@dataclass
class Lossy:
    """Stands between a gateway and the server, and breaks a connection right before the answer that is to get lost."""

    target: int
    losses: int = 0
    _word: bytes | None = None
    _tasks: set[asyncio.Task] = field(default_factory=set)

    async def __aenter__(self) -> "Lossy":
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()

    def lose(self, answer: bytes) -> None:
        """The next one that the server gives to a command, by its tag."""
        self._word = answer + b"\0"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        for task in (self._pass(reader, back, writer), self._pass(there, writer, back, answers=True)):
            self._tasks.add(asyncio.create_task(task))

    async def _pass(self, source, sink, other, *, answers: bool = False) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                if answers and self._word is not None and self._word in data:
                    self._word = None
                    self.losses += 1
                    break
                sink.write(data)
                await sink.drain()
        sink.close()
        other.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def database(postgres: Server) -> str:
    """The address of an empty database."""
    return postgres.make_database()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--over-postgres", action="store_true", help="run these tests over PostgreSQL instead of SQLite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--over-postgres", default=False):
        items[:] = [item for item in items if item.originalname not in OF_THE_FILE]


@pytest.fixture(autouse=True)
def over_postgres(request: pytest.FixtureRequest) -> Iterator[None]:
    """See the module's text."""
    if not request.config.getoption("--over-postgres", default=False):
        yield
        return
    settings = sys.modules["conftest"].PLAIN  # pytest loads it after its plugins, and anew
    settings["GATEWAY_LOG"] = request.getfixturevalue("database")
    yield
    del settings["GATEWAY_LOG"]
