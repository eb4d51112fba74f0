"""What other gateways change: heard by LISTEN, and looked up twice a second in case nothing was heard.

The look is also what finds a server away while nobody asks for anything, and there again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import asyncpg

from records.breaker import Breaker
from records.connection import DatabaseAway
from records.postgres_link import AWAY, COMMAND_S, connect, words

CHANNEL = "freeway_changed"
LOOK_S = 0.5  # a change reaches every gateway within a second (SPEC 20.2), also through a pooler that swallows LISTEN
GAP_S = 0.05  # between two reloads: a script that changes a hundred keys costs two of them, not a hundred


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
    async with asyncio.timeout(COMMAND_S):
        await connection.add_listener(CHANNEL, lambda *_: heard.set())
    while True:
        given = breaker.enter(time.monotonic())
        if given is None:
            return seen
        heard.clear()
        try:
            async with asyncio.timeout(COMMAND_S):
                last = await connection.fetchval("SELECT value FROM settings WHERE key = 'changed'")
        except (*AWAY, asyncpg.PostgresError) as error:
            breaker.failed(given, words(error), time.monotonic())
            return seen
        breaker.worked(given)
        if last != seen:
            try:
                await changed()
                seen = last
            except DatabaseAway:
                pass  # the next look tries again
            await asyncio.sleep(GAP_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await heard.wait()
