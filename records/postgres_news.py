"""What other gateways change: heard by LISTEN, and looked up twice a second in case nothing was heard.

The look is also what finds a server away while nobody asks for anything, and there again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import asyncpg

from records.breaker import Breaker
from records.connection import DatabaseAway, DatabaseRefused
from records.postgres_link import AWAY, COMMAND_S, connect, in_time, words

CHANNEL = "freeway_changed"
LOOK_S = 0.5  # a change reaches every gateway within a second (SPEC 20.2), also through a pooler that swallows LISTEN
GAP_S = 0.05  # between two reloads: a script that changes a hundred keys costs two of them, not a hundred


async def followed(address: str, breaker: Breaker, changed: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """`follow` on a thread of its own: requests that keep the event loop busy make no server look slow."""
    ours, its = asyncio.get_running_loop(), asyncio.new_event_loop()

    async def in_ours() -> object:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(changed(), ours))

    following = its.create_task(follow(address, breaker, in_ours))

    def run() -> None:
        with suppress(asyncio.CancelledError):
            its.run_until_complete(following)
        its.run_until_complete(its.shutdown_asyncgens())
        its.close()

    with ThreadPoolExecutor(1, thread_name_prefix="store-news") as thread:
        ended = asyncio.wrap_future(thread.submit(run))
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            its.call_soon_threadsafe(following.cancel)
            await ended
            raise


async def follow(address: str, breaker: Breaker, changed: Callable[[], Awaitable[Any]]) -> None:
    """Call `changed` at first and after each change. Runs until it is cancelled."""
    seen = ""
    while True:
        given = breaker.enter(time.monotonic())
        if given is not None:
            try:
                connection = await connect(address)
                breaker.worked(given)
                try:
                    seen = await listen(connection, breaker, changed, seen)
                finally:
                    connection.terminate()
            except (*AWAY, asyncpg.PostgresError, ValueError) as error:
                breaker.failed(given, words(error), time.monotonic())
        await asyncio.sleep(LOOK_S)


async def listen(
    connection: asyncpg.Connection, breaker: Breaker, changed: Callable[[], Awaitable[Any]], seen: str
) -> str:
    """Until the server is away; gives the last change that was taken over."""
    heard = asyncio.Event()
    await in_time(connection.add_listener(CHANNEL, lambda *_: heard.set()), COMMAND_S)
    while True:
        given = breaker.enter(time.monotonic())
        if given is None:
            return seen
        heard.clear()
        try:
            last = await in_time(connection.fetchval("SELECT value FROM settings WHERE key = 'changed'"), COMMAND_S)
        except (*AWAY, asyncpg.PostgresError) as error:
            breaker.failed(given, words(error), time.monotonic())
            return seen
        breaker.worked(given)
        if last != seen:
            try:
                await changed()
                seen = last
            except (DatabaseAway, DatabaseRefused):
                pass  # the next look tries again
            await asyncio.sleep(GAP_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await heard.wait()
