"""What the workers of one port ask each other, so that each can speak for all: over sockets in a folder that only they
can enter, one question and one answer per connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

from transport.workers import Place

ASK_S = 1.0  # for all answers; a worker that is busy or dying is left out
QUESTION_BYTES_MAX = 1_000
ANSWER_BYTES_MAX = 16 * 1024 * 1024  # of metrics and sessions there is less
Answers = Mapping[str, Callable[[str], bytes]]  # by the question's first word; given what follows it


class Siblings:
    """`answers` is filled in by whoever can answer, before the first question."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.answers: dict[str, Callable[[str], bytes]] = {}

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Answer until the block ends."""
        server = await asyncio.start_unix_server(self._answer, self.place.address, limit=QUESTION_BYTES_MAX)
        try:
            yield
        finally:
            server.close()
            self.place.address.unlink(missing_ok=True)

    async def ask(self, question: str, about: str = "") -> list[bytes]:
        """What each of the others says, as far as it says it in time."""
        addresses = sorted(path for path in self.place.folder.glob("worker-*") if path != self.place.address)
        asked = (self._ask_one(str(path), f"{question} {about}\n".encode()) for path in addresses)
        return [answer for answer in await asyncio.gather(*asked) if answer is not None]

    async def _ask_one(self, address: str, question: bytes) -> bytes | None:
        try:
            async with asyncio.timeout(ASK_S):
                reader, writer = await asyncio.open_unix_connection(address, limit=ANSWER_BYTES_MAX)
                try:
                    writer.write(question)
                    answer = await reader.read(-1)
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return None
        return answer or None

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(ASK_S):
                word, _, about = (await reader.readline()).decode().strip().partition(" ")
                if word in self.answers:
                    writer.write(self.answers[word](about))
                    await writer.drain()
        except (OSError, ValueError, TimeoutError):
            return
        finally:
            writer.close()
