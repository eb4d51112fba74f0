"""What is on its way to Redis and nobody waits for: sent in the order in which it came, many commands at once."""

from __future__ import annotations

import asyncio
from collections import deque

from shared.link import Away, Command, Link

COMMANDS_MAX = 2_000  # waiting; a burst of failures of every key of a large catalogue
BATCH_MAX = 200  # commands in one go: some milliseconds for Redis


class Outbox:
    """Never blocks. While Redis is away nothing is kept: whoever sends tells everything anew when it is back."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._commands: deque[Command] = deque(maxlen=COMMANDS_MAX)  # the oldest goes: the newest knows more
        self._filled = asyncio.Event()

    def put(self, command: Command) -> None:
        if self._link.up:
            self._commands.append(command)
            self._filled.set()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await self._filled.wait()
            batch = [self._commands.popleft() for _ in range(min(BATCH_MAX, len(self._commands)))]
            if not self._commands:
                self._filled.clear()
            try:
                await self._link.send_all(batch)
            except Away:
                continue
