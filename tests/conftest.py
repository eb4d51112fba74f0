"""The gateway as tests see it: a real server with fake providers behind it, and clients that look at every byte.

`start_gateway` runs it in the test's own loop, `start_process` as `python gateway.py`. Platforms are given by name:
`{"a": {}, "b": {"keys": ["k1", "k2"], "model": {"rpm": 1}}}`. Each has one model `<name>-model` (or those in
`models`), one key (or those in `keys`) and the place in the chain that it has in the dict.
"""

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, TypeVar

import aiohttp
import pytest
import uvicorn
import uvloop
from _pytest.runner import runtestprotocol
from fake_provider import FakeProvider, TooLate, until
from hypothesis import HealthCheck
from hypothesis import settings as property_settings
from processes import Process, end

import gateway
from config.settings import BUILT_IN_CATALOG, load_settings
from records.connection import Connection
from records.database import Store, backend_of
from transport.process import spare_the_collector

# The collector would walk again and again through what imports and collection make, which stays. The process that hands
# out the tests does without it; those that run them have it from the first test on.
gc.disable()
gc.freeze()
pytest.register_assert_rewrite("browsing")  # the browser's tests and their fixtures stand in one folder
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # the loop that the gateway runs on
ROOT = Path(__file__).resolve().parent.parent
FEW_MODELS = ROOT / "tests" / "few_models.json"  # the built-in catalogue of most tests: 190 models take 10 ms a start
SHIPPED = {platform["id"] for platform in json.loads(BUILT_IN_CATALOG.read_text())["platforms"]} - {"demo"}
API_KEY = "fw-test-0123456789abcdef"
# Nothing waits, nothing is mended in mid-stream and nobody joins a race, unless a test asks for it: each has its own.
PLAIN = {"WAIT_FOR_CAPACITY_MS": "0", "RESCUE": "off", "HEDGE_PERCENT": "0"}
IN_ORDER = "auto-priority"  # the mode without sampling: platforms are tried as the test lists them

T = TypeVar("T")
Platforms = Mapping[str, Mapping] | list[str]
both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])

# Tests run in several processes side by side; what hypothesis has found is each process's own.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", f".hypothesis/{os.environ.get('PYTEST_XDIST_WORKER', 'main')}")
# How long an example takes, or making one up, says how busy the machine is: a limit would fail tests for that alone.
property_settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
property_settings.load_profile("any machine")

# Two thousand databases come and go: on a disk each waits three times for it, in memory never.
if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 1 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, for `-n auto`
def pytest_xdist_auto_num_workers() -> int:
    """Tests spend half of their time waiting for limits of milliseconds: two processes keep a core busy."""
    return 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2 * (os.cpu_count() or 1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Five thousand tests lie in memory; the collector need not walk through them again and again."""
    spare_the_collector()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """pytest and Python each look for garbage at the end, and for errors in it: the first look finds them all."""
    gc.collect()
    gc.freeze()


def interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# Python's own handler by another name. In place of its own asyncio sets one for each fixture and each test, and undoes
# it, for a millisecond in all: the `signal` module makes an error message of every handler that is no enum's member.
signal.signal(signal.SIGINT, interrupted)


# --- Tests with limits of milliseconds --------------------------------------------------------------------------------

LATE = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    error = call.excinfo.value if call.excinfo else None
    late = error.subgroup(TooLate) if isinstance(error, BaseExceptionGroup) else isinstance(error, TooLate)
    item.stash[LATE] = item.stash.get(LATE, False) or bool(late)
    return (yield)


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """A test that was too late is tried again from the start, its gateway and its providers too: the best of three."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for tries_left in (2, 1, 0):
        item.stash[LATE] = False
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        if not (item.stash[LATE] and tries_left):
            break
        item._initrequest()  # pytest has no public way to set a test's fixtures up anew
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


# --- The catalogue of a test ----------------------------------------------------------------------------------------


def default_key(platform: str) -> str:
    return f"sk-{platform}-secret-0001"


def catalog_of(platforms: Platforms, fake: FakeProvider) -> dict:
    """A catalogue file in the shape of CONTRACT.md."""
    options = platforms if isinstance(platforms, Mapping) else {name: {} for name in platforms}
    catalog: dict[str, list] = {"platforms": [], "models": [], "keys": []}
    for rank, (name, given) in enumerate(options.items(), start=1):
        own = {k: v for k, v in given.items() if k not in ("keys", "model", "models")}
        catalog["platforms"].append({"id": name, "adapter": "openai", "base_url": fake.url(name)} | own)
        for model in given.get("models", [given.get("model", {})]):
            base = {"platform": name, "model_id": f"{name}-model", "intelligence_rank": rank, "speed_rank": rank}
            catalog["models"].append(base | {"context_window": 100_000 * rank} | model)
        keys = given.get("keys", [] if given.get("keyless") else [default_key(name)])
        for n, key in enumerate(keys):
            entry = key if isinstance(key, Mapping) else {"key": key}
            catalog["keys"].append({"platform": name, "label": f"{name}-{n}", **entry})
    return catalog


@contextlib.contextmanager
def case(name: object) -> Iterator[None]:
    """One row of a table whose rows share a gateway: a failure names it."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the case: {name}")
        raise


# --- What clients get back ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        assert self.status == 200, self.body
        return self.json["choices"][0]["message"]["content"]

    @property
    def error(self) -> dict:
        return self.json["error"]


@dataclass(frozen=True)
class Stream(Answer):
    """A streamed response, read to its end."""

    @property
    def data(self) -> list[str]:
        blocks = self.body.decode().replace("\r\n", "\n").split("\n\n")
        lines = [line for block in blocks for line in block.split("\n")]
        return [line.removeprefix("data:").removeprefix(" ") for line in lines if line.startswith("data:")]

    @property
    def comments(self) -> list[str]:
        return [line for line in self.body.decode().split("\n") if line.startswith(":")]

    @property
    def chunks(self) -> list[dict]:
        return [json.loads(data) for data in self.data if data != "[DONE]"]

    @property
    def deltas(self) -> list[dict]:
        return [choice["delta"] for chunk in self.chunks for choice in chunk.get("choices") or []]

    @property
    def text(self) -> str:
        assert self.status == 200, self.body
        return "".join(delta.get("content") or "" for delta in self.deltas)

    @property
    def calls(self) -> list[dict]:
        """The tool calls, their pieces put together."""
        calls: list[dict] = []
        for piece in (piece for delta in self.deltas for piece in delta.get("tool_calls") or []):
            if piece["index"] == len(calls):
                calls.append({name: value for name, value in piece.items() if name != "index"})
            else:
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
        return calls

    @property
    def finishes(self) -> list[str]:
        choices = [choice for chunk in self.chunks for choice in chunk.get("choices") or []]
        return [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]

    @property
    def error(self) -> dict:
        if self.status != 200:
            return self.json["error"]
        (found,) = [chunk["error"] for chunk in self.chunks if chunk.get("error")]
        return found

    def assert_whole(self, text: str) -> None:
        """Finished as a good answer does: text, one finish reason, no error, one [DONE] at the very end."""
        assert self.text == text
        assert self.finishes == ["stop"]
        assert not any(chunk.get("error") for chunk in self.chunks)
        self.assert_done_once()

    def assert_done_once(self) -> None:
        assert self.data.count("[DONE]") == 1, self.data
        assert self.data[-1] == "[DONE]"
        assert self.body.endswith(b"\n\n")


def assert_error(got: Answer, status: int, kind: str, code: object) -> None:
    """CONTRACT's error shape with these values."""
    assert got.headers["content-type"].startswith("application/json")
    assert got.status == status, got.body
    assert (got.error["type"], got.error["code"]) == (kind, code)
    assert got.error["message"]
    assert "param" in got.error


# --- The gateway ----------------------------------------------------------------------------------------------------


@dataclass
class Client:
    """Calls to one running gateway."""

    base_url: str
    http: aiohttp.ClientSession
    api_key: str = API_KEY

    def request(self, content: str = "hi", **fields: object) -> dict:
        """The usual body of a chat request; a field given as `...` is left out."""
        request = {"model": IN_ORDER, "messages": [{"role": "user", "content": content}]} | fields
        return {name: value for name, value in request.items() if value is not ...}

    def post(self, request: object, *, path: str = "/v1/chat/completions", headers: Mapping[str, str] | None = None):
        """The raw exchange, as a context manager; bytes are sent as they are, everything else as JSON."""
        data = request if isinstance(request, bytes) else json.dumps(request).encode()
        authorized = {"authorization": f"Bearer {self.api_key}", "content-type": "application/json"}
        return self.http.post(self.base_url + path, data=data, headers=authorized | dict(headers or {}))

    async def send(self, request: object, *, path: str = "/v1/chat/completions", headers=None) -> Answer:
        async with self.post(request, path=path, headers=headers) as response:
            return Answer(response.status, response.headers, await response.read())

    async def chat(self, content: str = "hi", *, headers: Mapping[str, str] | None = None, **fields) -> Answer:
        return await self.send(self.request(content, **fields), headers=headers)

    async def stream(self, content: str = "hi", *, headers: Mapping[str, str] | None = None, **fields) -> Stream:
        async with self.post(self.request(content, stream=True, **fields), headers=headers) as response:
            return Stream(response.status, response.headers, await response.read())

    async def ask(self, content: str = "hi", *, streaming: bool, **fields) -> Answer:
        """For what holds in both cases."""
        return await (self.stream if streaming else self.chat)(content, **fields)

    async def get(self, path: str, *, headers: Mapping[str, str] | None = None) -> Answer:
        authorized = {"authorization": f"Bearer {self.api_key}"} | dict(headers or {})
        async with self.http.get(self.base_url + path, headers=authorized) as response:
            return Answer(response.status, response.headers, await response.read())

    async def call(self, method: str, path: str, content: object = None) -> tuple[int, object]:
        """A call of the admin API: its status and its JSON. Bytes are sent as they are."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"authorization": f"Bearer {self.api_key}"}
        async with self.http.request(method, self.base_url + path, data=data, headers=headers) as response:
            return response.status, json.loads(await response.read())

    async def seen(self, path: str) -> object:
        """What the admin API shows there."""
        status, shown = await self.call("GET", path)
        assert status == 200, shown
        return shown

    async def protection(self) -> dict:
        return (await self.get("/api/protection")).json

    async def cooled_models(self) -> dict[str, int]:
        """Milliseconds left of each transient cooldown, by model."""
        return {c["model_id"]: c["ms_left"] for c in (await self.protection())["transient_cooldowns"]}

    async def uncooled(self) -> None:
        """Wait until no model is on a transient cooldown any more."""
        async with asyncio.timeout(3):
            while await self.cooled_models():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def cooled_keys(self) -> dict[str, int]:
        """Milliseconds left of each key cooldown, by model (the longest where several keys cool)."""
        cooldowns = sorted((await self.protection())["key_cooldowns"], key=lambda c: c["ms_left"])
        return {c["model_id"]: c["ms_left"] for c in cooldowns}

    async def recovered(self) -> None:
        """As before any failure: nothing cools, and no key is known to be bad."""
        headers = {"authorization": f"Bearer {self.api_key}"}
        async with self.http.delete(f"{self.base_url}/api/protection/cooldowns", headers=headers) as response:
            assert response.status == 200
        for key in (await self.get("/api/keys")).json:
            if key["status"] in ("invalid", "rate_limited"):
                address = f"{self.base_url}/api/keys/{key['id']}"
                async with self.http.patch(address, json={"status": "unknown"}, headers=headers) as response:
                    assert response.status == 200

    async def rows_of(self, got: Answer, count: int) -> list[dict]:
        """The rows of one answer's request."""
        return await self.rows(count, request_id=got.headers["X-Request-Id"])

    async def rows(self, count: int, **filters: str) -> list[dict]:
        """Exactly that many rows of the log, oldest first; they are written within 100 ms."""
        query = "&".join(f"{name}={value}" for name, value in {"limit": "1000", **filters}.items())
        async with asyncio.timeout(3):
            while len(rows := (await self.get(f"/api/requests?{query}")).json["rows"]) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert len(rows) == count, [(row["platform"], row["status"], row["error_kind"]) for row in rows]
        return rows[::-1]

    async def row(self, **filters: str) -> dict:
        """The only row."""
        return (await self.rows(1, **filters))[0]


@dataclass
class Gateway(Client):
    """A gateway in the test's own loop."""

    db: Path = Path()
    _server: uvicorn.Server | None = None
    _serving: asyncio.Task | None = None

    @cached_property
    def openai(self) -> Any:
        return self._client("openai", "AsyncOpenAI", f"{self.base_url}/v1")

    @cached_property
    def anthropic(self) -> Any:
        return self._client("anthropic", "AsyncAnthropic", self.base_url)

    def _client(self, library: str, name: str, base_url: str) -> Any:
        made = import_module(library)
        http = made.DefaultAsyncHttpxClient(verify=False)  # no TLS here, and its list of authorities takes 20 ms
        return getattr(made, name)(base_url=base_url, api_key=self.api_key, max_retries=0, http_client=http)

    async def stop(self) -> None:
        """As SIGTERM does; a second call does nothing."""
        if self._serving is None:
            return
        for client in {"openai", "anthropic"} & vars(self).keys():
            await getattr(self, client).close()
        await self.http.close()
        self._server.should_exit = True
        await self._serving
        self._serving = None


class PromptServer(uvicorn.Server):
    """uvicorn looks ten times a second whether it may stop and end; a suite of some hundred servers cannot wait."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None is sent to a gateway in the test's own process."""
        yield

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await until(lambda: self.should_exit, within_s=60)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in (*self.servers, *(sockets or [])):
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await until(lambda: not self.server_state.connections and not self.server_state.tasks)
        await self.lifespan.shutdown()


async def run_gateway(settings: dict[str, str], cwd: Path, *, http: type | None = None, **unnamed: object) -> Gateway:
    """`http` stands in for the class of connections; `unnamed` are settings without a name in the environment.

    `built_in_catalog=BUILT_IN_CATALOG` is for tests of what is shipped and names no platform of it.
    """
    loaded = load_settings([], {"GATEWAY_API_KEY": API_KEY, "LOG_LEVEL": "error", **PLAIN, **settings}, cwd)
    loaded = dataclasses.replace(loaded, **{"built_in_catalog": FEW_MODELS, **unnamed})
    listener = socket.socket(proto=socket.IPPROTO_TCP)  # without it asyncio sets no TCP_NODELAY
    listener.bind(("127.0.0.1", 0))
    config = gateway.uvicorn_config(gateway.Gateway(loaded))
    config.http = http or config.http
    server = PromptServer(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started or serving.done())
    if serving.done():
        serving.result()
    base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20), connector=aiohttp.TCPConnector(limit=0))
    api_key = settings.get("GATEWAY_API_KEY", API_KEY)
    return Gateway(base_url, http, api_key, cwd / "gateway.db", server, serving)


@pytest.fixture
def openai() -> ModuleType:
    """The client's library. Read when it is wanted: it takes a second, and all of the suite's processes read all tests,
    as does the one that hands them out with this file."""
    return import_module("openai")


@pytest.fixture
def anthropic() -> ModuleType:
    return import_module("anthropic")


def open_store(path: Path) -> Store:
    """Without a gateway."""
    return Store(path, bytes(32), PLAIN.get("GATEWAY_LOG"))


@pytest.fixture
def world_store(tmp_path: Path) -> Iterator[Store]:
    """An empty database, for what needs no gateway."""
    opened = open_store(tmp_path / "alone.db")
    yield opened
    asyncio.run(opened.close())


@pytest.fixture
async def fake() -> AsyncIterator[FakeProvider]:
    async with FakeProvider().serving() as provider:
        yield provider


@pytest.fixture
async def start_gateway(fake: FakeProvider, tmp_path: Path):
    """Start a gateway over these platforms. A second call uses the same database: a restart, after `stop`.

    The built-in catalogue is there whole where none is given, or one that is named like a platform of it.
    """
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            platforms: Platforms = ("a", "b", "c"), settings: dict[str, str] | None = None, **unnamed: object
        ) -> Gateway:
            catalog = tmp_path / "test-catalog.json"
            catalog.write_text(json.dumps(catalog_of(platforms, fake)))
            built_in = BUILT_IN_CATALOG if not platforms or SHIPPED.intersection(platforms) else FEW_MODELS
            given = {"GATEWAY_CATALOG": str(catalog), **(settings or {})}
            running = await run_gateway(given, tmp_path, **{"built_in_catalog": built_in, **unnamed})
            stack.push_async_callback(running.stop)
            return running

        yield start


# --- The gateway as a process ---------------------------------------------------------------------------------------


@pytest.fixture
async def start_process(fake: FakeProvider, tmp_path: Path):
    """Start `python gateway.py` with these settings only; `platforms=None` leaves the built-in catalogue alone."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            platforms: Platforms | None = None, settings: dict[str, str] | None = None, flags: tuple[str, ...] = ()
        ) -> Process:
            environ = {"PATH": os.environ["PATH"], "GATEWAY_PORT": "0", **PLAIN}
            environ["SSL_CERT_FILE"] = os.devnull  # the system's authorities take 40 ms to read, and nobody meets them
            environ |= settings or {}
            if platforms is not None:
                environ["GATEWAY_CATALOG"] = str(tmp_path / "test-catalog.json")
                (tmp_path / "test-catalog.json").write_text(json.dumps(catalog_of(platforms, fake)))
            pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
            started = await asyncio.create_subprocess_exec(
                sys.executable, str(ROOT / "gateway.py"), *flags, cwd=tmp_path, env=environ, limit=1 << 26, **pipes
            )
            running = Process(started)
            stack.push_async_callback(end, running)
            return running

        yield start


@contextlib.asynccontextmanager
async def client_of(running: Process, api_key: str = API_KEY) -> AsyncIterator[Client]:
    base_url = await running.ready()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
        yield Client(base_url, http, api_key)


def behind(db: Path, work: Callable[[Connection], T]) -> T:
    """Do this to the database of a gateway as another program would, whichever database that is."""

    def there() -> T:
        backend = backend_of(db, None, PLAIN.get("GATEWAY_LOG"))
        backend.open()
        try:
            return backend.write(work)
        finally:
            backend.close()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(there).result()


def logged(db: Path) -> list[dict]:
    """All rows of the log, read from the file itself, oldest first."""
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM requests ORDER BY id")]


def stored_keys(db: Path) -> dict[str, dict]:
    """The rows of `api_keys`, by label."""
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.row_factory = sqlite3.Row
        return {row["label"]: dict(row) for row in connection.execute("SELECT * FROM api_keys")}


def files_of(folder: Path) -> dict[str, bytes]:
    """The database, its companions and its key, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("gateway.db*"))}
