"""The connection to Redis or Valkey, and the only module that knows its library.

Nothing waits here without a limit: each command has one that includes the wait for a free connection. A breaker spares
requests a server that does not answer; `keep` tries it again, and says once when it is gone and once when it is back.
Whoever waits for a command may be cancelled at any moment: the library then drops that connection, since the answer
that is still to come on it would be taken for the next command's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha1
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from shared.breaker import Breaker

LIMIT_S = 0.05  # of one command (SPEC 20.3)
CONNECT_S = 0.2  # of what no request waits for: a new connection, and the question whether it is there at all
CONNECTIONS_MAX = 8  # a command takes less than a millisecond
LISTEN_S = 0.5  # how soon the one that listens notices that the breaker has opened
OWN_DELAY_S = 0.02  # a limit that is noticed so late says that this process was busy, not that Redis is
RETRY_S = 0.2  # before it listens again, where only its own connection has broken
T = TypeVar("T")
Command = Sequence[str | bytes | int]


class Away(Exception):
    """Redis has not answered in time, or not as it should."""


class Link:
    """Commands within limits. `told` hears every message on the channel, `changed` when Redis has gone or is back."""

    def __init__(self, address: str, channel: str, scripts: Sequence[str]) -> None:
        quiet = Retry(NoBackoff(), 0)  # the breaker decides when to try again
        self._pool = BlockingConnectionPool.from_url(
            address, max_connections=CONNECTIONS_MAX, timeout=LIMIT_S, socket_timeout=None,
            socket_connect_timeout=CONNECT_S, retry=quiet, client_name="freeway",
        )  # fmt: skip
        self._redis: Any = Redis(connection_pool=self._pool)
        self._channel = channel
        self._scripts = {script: sha1(script.encode(), usedforsecurity=False).hexdigest() for script in scripts}
        self._breaker = Breaker()
        self._breaker.closed = False  # until `start`
        self._asking: asyncio.Task[None] | None = None
        self.why = ""

    @property
    def up(self) -> bool:
        return self._breaker.closed

    async def start(self) -> bool:
        """Whether it is there."""
        if await self._tried():
            self._breaker.succeeded()
            return True
        self._breaker.open(time.monotonic())
        return False

    async def send(self, *command: str | bytes | int, limit_s: float = LIMIT_S) -> Any:
        """One command's answer. Raises Away."""
        return await self._within(limit_s, lambda: self._redis.execute_command(*command))

    async def run(self, script: str, key: str, *args: str | bytes | int) -> Any:
        """One script's answer. Raises Away."""

        async def asked() -> Any:
            try:
                return await self._redis.execute_command("EVALSHA", self._scripts[script], 1, key, *args)
            except NoScriptError:  # Redis has been started anew
                return await self._redis.execute_command("EVAL", script, 1, key, *args)

        return await self._within(LIMIT_S, asked)

    async def send_all(self, commands: Sequence[Command]) -> list[Any]:
        """Many commands in one go. Raises Away."""

        async def asked() -> list[Any]:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                answers: list[Any] = await pipeline.execute()
                return answers

        async def loaded() -> list[Any]:
            try:
                return await asked()
            except NoScriptError:
                await self._load()
                return await asked()

        return await self._within(LIMIT_S, loaded)

    def script(self, script: str, key: str, *args: str | bytes | int) -> Command:
        """For `send_all`."""
        return ("EVALSHA", self._scripts[script], 1, key, *args)

    async def keep(self, told: Callable[[bytes], None], changed: Callable[[bool], Awaitable[None]]) -> None:
        """Listen while Redis is there, and find out when it is there again. `changed` hears of each time that it has
        gone, and that listening has begun. Runs until it is cancelled."""
        while True:
            if not self.up:
                await changed(False)
                await self._return()
            try:
                await self._listen(told, changed)
            except (RedisError, OSError, TimeoutError) as error:
                self.why = said(error)
                self._ask_again()
                await asyncio.sleep(RETRY_S)
            except Away:
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        await self._redis.aclose()
        await self._pool.disconnect()

    async def _listen(self, told: Callable[[bytes], None], changed: Callable[[bool], Awaitable[None]]) -> None:
        async with self._redis.pubsub(ignore_subscribe_messages=True) as listener:
            async with asyncio.timeout(CONNECT_S):
                await listener.subscribe(self._channel)
            await changed(True)  # what is told meanwhile waits in the connection
            while self.up:
                message = await listener.get_message(timeout=LISTEN_S)
                if message is not None and message["type"] == "message":
                    told(message["data"])

    async def _return(self) -> None:
        """Wait until it is there again."""
        while True:
            await asyncio.sleep(max(0.0, self._breaker.trial_at - time.monotonic()))
            await self._pool.disconnect(inuse_connections=False)  # a server that was started anew knows none of them
            if await self._tried():
                self._breaker.succeeded()
                return
            self._breaker.trial_failed(time.monotonic())

    async def _tried(self) -> bool:
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._redis.execute_command("PING")
                await self._load()
        except (RedisError, OSError, TimeoutError) as error:
            self.why = said(error)
            return False
        return True

    async def _load(self) -> None:
        for script in self._scripts:
            await self._redis.execute_command("SCRIPT LOAD", script)

    async def _within(self, limit_s: float, asked: Callable[[], Awaitable[T]]) -> T:
        if not self.up:
            raise Away
        began = time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                answer = await asked()
        except (RedisError, OSError, TimeoutError) as error:
            now = time.monotonic()
            if now < began + limit_s + OWN_DELAY_S:
                self.why = said(error)
                self._ask_again()
                if limit_s >= LIMIT_S or not isinstance(error, TimeoutError):
                    self._breaker.failed(began, now)
            raise Away from None
        if self.up:
            self._breaker.succeeded()
        return answer

    def _ask_again(self) -> None:
        """Find out, off the requests' path, whether it is slow or hangs: five requests would have to find out."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._asked_again())

    async def _asked_again(self) -> None:
        began = time.monotonic()
        answered = await self._tried()
        late = time.monotonic() > began + CONNECT_S + OWN_DELAY_S
        if not self.up or late:
            return
        if answered:
            self._breaker.succeeded()
        else:
            self._breaker.open(time.monotonic())


def said(error: Exception) -> str:
    """An error in a word: its text may hold the address."""
    return type(error).__name__
