"""An LLM provider that does exactly what a test tells it, on a real socket.

One `FakeProvider` plays any number of platforms, told apart by the first part of the path: the platform `a` lives at
`fake.url("a")`. What it does with a request is a `Reply`: a list of steps, each either bytes to write as they stand or
something to do between two writes (pause, cut, reset). The constructors below build the usual replies; a test that
wants a particular byte on the wire writes its own steps with `raw`.

    fake.script("a", error(429, headers={"retry-after": "7"}), answer("second try"))  # the last one repeats
    fake.script("b", sse(chunk(role="assistant"), chunk("Hel"), CUT))

A script entry may also be a function from the request to its reply; `answer` is one: it streams when asked to. Every
request is recorded in the order of arrival with all its bytes, and so is the moment at which its connection ended.
"""

import asyncio
import contextlib
import json
import socket
import ssl
import struct
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

DEADLINE_S = 5.0  # for everything that a test waits for; a healthy run needs a few ms of it
POLL_S = 0.002
CLOSE_WITHIN_S = 0.1  # a provider's connection, once nobody waits for its answer any more (SPEC 8.6, 15.1)


async def until(condition: Callable[[], object], within_s: float = DEADLINE_S) -> None:
    """Wait for a condition to hold; fail the test when it does not in time."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  (conditions come from other processes and files too)
            await asyncio.sleep(POLL_S)


class TooLate(AssertionError):
    """A limit of milliseconds was missed. It may have been the machine, which had something else to do just then: a
    test that fails with this is tried up to three times (conftest), and what is too slow for its limit fails them all.
    """


def assert_in_time(took_s: float, limit_s: float = CLOSE_WITHIN_S) -> None:
    if took_s >= limit_s:
        raise TooLate(f"took {took_s * 1000:.0f} ms of the {limit_s * 1000:.0f} ms that it may take")


@contextlib.asynccontextmanager
async def in_time(limit_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError:
        raise TooLate(f"took more than the {limit_s * 1000:.0f} ms that it may take") from None


# --- What a reply is made of --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wait:
    """Write nothing until the event is set."""

    event: asyncio.Event


@dataclass(frozen=True)
class Every:
    """Write these bytes again and again, for as long as the other side listens."""

    seconds: float
    data: bytes
    times: int | None = None


class Act:
    """A step without data. There is one object for each."""


PAUSE = Act()  # write nothing more, keep the connection open until the other side closes it
CUT = Act()  # close the connection in an orderly way (FIN), whatever was promised
RESET = Act()  # close it with a reset (RST)
NO_HTTP = Act()  # write what no HTTP parser takes for the next piece of a chunked body

Step = bytes | Wait | Every | Act


@dataclass(frozen=True)
class Reply:
    """Steps to perform. Whoever does not end in CUT or RESET leaves the connection usable for the next request."""

    steps: tuple[Step, ...]


@dataclass
class Request:
    """One request as it arrived, and what became of its connection."""

    platform: str
    method: str
    path: str
    headers: dict[str, str]
    raw: bytes
    arrived_at: float
    finished: bool = False  # every step of the reply was performed
    closed_at: float | None = None  # when the gateway was seen to close the connection
    written: int = 0
    paused: bool = False  # a PAUSE was reached: all that comes before it is on its way

    @property
    def json(self) -> dict:
        return json.loads(self.raw)

    @property
    def key(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    @property
    def streaming(self) -> bool:
        return bool(self.json.get("stream"))

    @property
    def prompt(self) -> str:
        return self.json["messages"][-1]["content"]


ReplyTo = Callable[[Request], Reply]


# --- Constructors: HTTP -------------------------------------------------------------------------------------------


def raw(*steps: Step) -> Reply:
    """Exactly these steps, with no HTTP added."""
    return Reply(steps)


def head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Scripted", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


PROMISED = head(200, {"content-type": "application/json", "content-length": "99"})  # 99 bytes that never come


def body(content: bytes | str | dict | list, *, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    """A whole response; anything but bytes and text is sent as JSON."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content))} | (headers or {})
    return raw(head(status, headers), content)


def chunked(*steps: Step, headers: dict[str, str] | None = None) -> Reply:
    """A streamed response: each piece of bytes is one HTTP chunk and one write."""
    headers = {"content-type": "text/event-stream", "transfer-encoding": "chunked"} | (headers or {})
    return raw(head(200, headers), *(in_chunk(step) for step in steps), b"0\r\n\r\n")


def in_chunk(step: Step) -> Step:
    if isinstance(step, Every):
        return replace(step, data=b"%x\r\n%b\r\n" % (len(step.data), step.data))
    return b"%x\r\n%b\r\n" % (len(step), step) if isinstance(step, bytes) else step


def error(
    status: int, message: str = "scripted failure", *, code: object = None, headers: dict[str, str] | None = None
) -> Reply:
    """A failure in OpenAI's shape."""
    return body({"error": {"message": message, "type": "scripted", "code": code}}, status=status, headers=headers)


# --- Constructors: OpenAI chat ------------------------------------------------------------------------------------

DONE = b"data: [DONE]\n\n"
IDENTITY = {"id": "chatcmpl-fake", "created": 1_700_000_000, "model": "provider-own-name"}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def completion(
    text: str | None = "hello",
    *,
    finish: str | None = "stop",
    usage: tuple[int, int] | None = (11, 7),
    message: dict | None = None,
    **more: object,
) -> Reply:
    """A whole chat completion; `message` adds fields to the assistant's message, `more` to the root."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text} | (message or {}), "finish_reason": finish}
    content = {**IDENTITY, "object": "chat.completion", "choices": [choice], **more}
    return body(content | ({"usage": usage_of(*usage)} if usage else {}))


def chunk(text: str | None = None, *, finish: str | None = None, root: dict | None = None, **delta: object) -> dict:
    """One `chat.completion.chunk`."""
    if text is not None:
        delta = {"content": text, **delta}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {**IDENTITY, "object": "chat.completion.chunk", "choices": [choice], **(root or {})}


ROLE = chunk(role="assistant", content="")  # how most streams begin
STOP = chunk(finish="stop")


def usage_chunk(prompt_tokens: int = 11, completion_tokens: int = 7) -> dict:
    whole = {**IDENTITY, "object": "chat.completion.chunk", "choices": []}
    return whole | {"usage": usage_of(prompt_tokens, completion_tokens)}


def event(data: dict | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def sse(*parts: dict | Step, done: bool = True, headers: dict[str, str] | None = None) -> Reply:
    """A stream of these events and steps, ended by `[DONE]` unless told otherwise."""
    steps = [event(part) if isinstance(part, dict) else part for part in parts]
    return chunked(*steps, *([DONE] if done else []), headers=headers)


def pieces_of(text: str, *, count: int = 3) -> list[str]:
    size = max(1, -(-len(text) // count))
    return [text[i : i + size] for i in range(0, len(text), size)]


def answer(text: str = "hello", *, usage: tuple[int, int] = (11, 7)) -> ReplyTo:
    """A healthy provider's answer: streamed to those who asked for a stream, with usage for those who asked for it."""

    def reply(request: Request) -> Reply:
        if not request.streaming:
            return completion(text, usage=usage)
        chunks = [ROLE, *map(chunk, pieces_of(text)), STOP]
        if (request.json.get("stream_options") or {}).get("include_usage"):
            chunks.append(usage_chunk(*usage))
        return sse(*chunks)

    return reply


# --- Addresses at which nobody answers -----------------------------------------------------------------------------


@contextlib.contextmanager
def refusing_url():
    """A URL whose port is taken but refuses every connection."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{closed.getsockname()[1]}/v1"


@contextlib.contextmanager
def silent_url():
    """A URL to which a connection can never be made: the accept queue is full and nobody accepts."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # Linux admits one more than the backlog; the rest are left hanging
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@contextlib.asynccontextmanager
async def not_tls_url() -> AsyncIterator[str]:
    """An https URL whose server does not speak TLS."""

    async def blurt(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"this is not TLS\r\n")
        writer.close()

    async with await asyncio.start_server(blurt, "127.0.0.1", 0) as server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


# --- The server ----------------------------------------------------------------------------------------------------


@dataclass
class FakeProvider:
    """All platforms of one test behind one port."""

    requests: list[Request] = field(default_factory=list)
    connections: int = 0  # accepted so far
    open_connections: int = 0
    faults: list[BaseException] = field(default_factory=list)  # mistakes in the scripts themselves
    _scripts: dict[str, deque[Reply | ReplyTo]] = field(default_factory=lambda: defaultdict(deque))
    _tasks: set[asyncio.Task] = field(default_factory=set)
    _server: asyncio.Server | None = None
    _scheme: str = "http"

    @contextlib.asynccontextmanager
    async def serving(self, tls: ssl.SSLContext | None = None) -> AsyncIterator["FakeProvider"]:
        self._scheme = "https" if tls else "http"
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 26, ssl=tls)
        try:
            yield self
        finally:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self.faults:
                raise self.faults[0]

    def url(self, platform: str) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/{platform}/v1"

    def script(self, platform: str, *replies: Reply | ReplyTo) -> None:
        """What the platform does with its next requests, in this order; the last one repeats."""
        self._scripts[platform] = deque(replies)

    @property
    def called(self) -> list[str]:
        return [request.platform for request in self.requests]

    def clear(self) -> None:
        """Forget the requests so far, not the scripts."""
        self.requests.clear()

    async def arrived(self, count: int = 1) -> Request:
        """Wait for that many requests; returns the last of them."""
        await until(lambda: len(self.requests) >= count)
        return self.requests[count - 1]

    async def closed(self, index: int = 0) -> float:
        """Wait until the gateway closes the connection of a request; returns when it did (`time.monotonic()`)."""
        request = self.requests[index]
        await until(lambda: request.closed_at is not None)
        return request.closed_at

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        self.connections += 1
        self.open_connections += 1
        served: list[Request] = []
        begun = b""
        try:
            while (request := await read_request(reader, begun)) is not None:
                served.append(request)
                self.requests.append(request)
                if (begun := await self._serve(request, reader, writer)) is None:
                    return
        except (ConnectionError, asyncio.CancelledError):
            pass  # the gateway left, or the test is over
        except Exception as fault:
            self.faults.append(fault)
        finally:
            self.open_connections -= 1
            self._tasks.discard(task)
            for request in served:
                request.closed_at = request.closed_at or time.monotonic()
            writer.close()

    async def _serve(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes | None:
        """Perform the reply, but stop when the gateway leaves. None when the connection is over, else what has been
        read of the next request."""
        performing = asyncio.create_task(perform(self._next_reply(request), request, writer))
        leaving = asyncio.create_task(left(reader))
        try:
            await asyncio.wait({performing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if performing.done():
                goes_on = performing.result()
                return (leaving.result() if leaving.done() else b"") if goes_on else None
            request.closed_at = time.monotonic()
            assert not leaving.result(), "the gateway sent something while its request was being answered"
            return None
        finally:
            for task in (performing, leaving):
                task.cancel()
            await asyncio.gather(performing, leaving, return_exceptions=True)

    def _next_reply(self, request: Request) -> Reply:
        queue = self._scripts[request.platform]
        if not queue:
            entry = answer(f"hello from {request.platform}") if request.raw else error(404)  # no lists, no checks
        else:
            entry = queue.popleft() if len(queue) > 1 else queue[0]
        return entry if isinstance(entry, Reply) else entry(request)


async def read_request(reader: asyncio.StreamReader, begun: bytes = b"") -> Request | None:
    """The next request of this connection, of which this much has been read; None when there is none."""
    try:
        head_lines = (begun + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    method, path, _ = head_lines[0].split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head_lines[1:])}
    assert "transfer-encoding" not in headers, "the fake provider reads bodies with a content-length only"
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(path.split("/")[1], method, path, headers, content, time.monotonic())


async def left(reader: asyncio.StreamReader) -> bytes:
    """Return when the other side has closed, or with the first byte of its next request, which may overtake the end of
    the reply."""
    with contextlib.suppress(ConnectionError):
        return await reader.read(1)
    return b""


async def perform(reply: Reply, request: Request, writer: asyncio.StreamWriter) -> bool:
    """Carry out the steps; False when they ended the connection."""
    for step in reply.steps:
        if isinstance(step, Wait):
            await step.event.wait()
        elif isinstance(step, Every):
            await write_every(step, request, writer)
        elif step is PAUSE:
            request.paused = True
            await asyncio.Event().wait()
        elif step is NO_HTTP:
            await write(b"no chunk\r\n", request, writer)
        elif step is CUT or step is RESET:
            request.finished = True
            close(writer, reset=step is RESET)
            return False
        else:
            await write(step, request, writer)
    request.finished = True
    return True


async def write(data: bytes, request: Request, writer: asyncio.StreamWriter) -> None:
    if writer.is_closing():
        raise ConnectionResetError
    writer.write(data)
    await writer.drain()
    request.written += len(data)
    await asyncio.sleep(0)  # the gateway runs in this loop: let it read each write on its own
    await asyncio.sleep(0)


async def write_every(step: Every, request: Request, writer: asyncio.StreamWriter) -> None:
    count = 0
    while step.times is None or count < step.times:
        await write(step.data, request, writer)
        await asyncio.sleep(step.seconds)
        count += 1


def close(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if not reset:
        writer.close()
        return
    if (connection := writer.get_extra_info("socket")) is not None:  # else the other side was quicker
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
