"""Answers from memory (SPEC 18): equal requests get the answer that is kept, and those that run at the same time share
one call to a provider.

Wraps the serving of an exchange and knows nothing of how that is done: it listens to the encoder, through which all
that the client gets has to pass. A request for which an equal one is running already waits for its answer; when that
one fails or its client leaves, the next in line is served and the others wait for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum

from adapters.answers import note_completion
from adapters.chunks import as_chunks
from engine.cache import Answer, Cache, key_of, repeatable
from engine.delivery import Delivery
from engine.listener import Listener
from engine.record import Exchange
from records.rows import Row
from routing.catalog import is_demo
from wire.chat import Chat, Completion, Event, Tally, frame
from wire.jsontext import load_lenient

SHARED_S_MAX = 120.0  # for an equal request's answer; what is not there then is asked for anew
SHARED_BYTES_MAX = 8 * 1024 * 1024  # of one answer while it is listened to


class Turn(StrEnum):
    """What a waiting request does where there is no answer for it."""

    LEAD = "lead"  # it is served, and the others wait for its answer
    ALONE = "alone"  # it is served, and so are the others


@dataclass(slots=True)
class Flight:
    """One request that is being served, and the equal ones that wait for its answer, in order of arrival."""

    waiting: deque[asyncio.Future[Answer | Turn]] = field(default_factory=deque)

    def tell_next(self, turn: Turn) -> bool:
        """Wake the first one; False when nobody waits."""
        if not self.waiting:
            return False
        self.waiting.popleft().set_result(turn)
        return True

    def tell_all(self, news: Answer | Turn) -> None:
        while self.waiting:
            self.waiting.popleft().set_result(news)


class Recall:
    """The cache of one gateway and the requests that share calls. `log` takes a row, `count` a result for the metrics:
    `hit`, `shared` or `miss`."""

    def __init__(self, bytes_max: int, ttl_s: float, log: Callable[[Row], None], count: Callable[[str], None]) -> None:
        self.cache = Cache(bytes_max, ttl_s)
        self._answer_bytes_max = min(bytes_max, SHARED_BYTES_MAX)
        self._flights: dict[bytes, Flight] = {}
        self._log = log
        self._count = count

    async def serve(
        self, exchange: Exchange, chat: Chat, delivery: Delivery, work: Callable[[], Awaitable[bytes | None]]
    ) -> bytes | None:
        """What `work` would do, by itself or from memory."""
        if exchange.uncached or not repeatable(chat):
            return await work()
        key = key_of(chat, exchange.client)
        result: Answer | Turn | None = self.cache.get(key, time.monotonic())
        if result is not None:
            self._count("hit")
        elif (flight := self._flights.get(key)) is not None:
            result = await self._follow(exchange, flight, key)
        if isinstance(result, Answer):
            exchange.cache, exchange.made_by = "hit", result.label
            return await self._tell(exchange, chat, delivery, result)
        self._count("miss")
        exchange.cache = "miss"
        if result is Turn.ALONE:
            return await work()
        return await self._lead(exchange, delivery, key, work)

    async def _follow(self, exchange: Exchange, flight: Flight, key: bytes) -> Answer | Turn:
        """Wait for the answer of the equal request that is running, or for this one's own turn."""
        future: asyncio.Future[Answer | Turn] = asyncio.get_running_loop().create_future()
        flight.waiting.append(future)
        # Half of what is left, so that there is time for a call of its own.
        limit_s = min(SHARED_S_MAX, (exchange.deadline - time.monotonic()) / 2)
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.shield(future)
        except TimeoutError:
            if not future.done():
                flight.waiting.remove(future)
                return Turn.ALONE
        except asyncio.CancelledError:
            if not future.done():
                flight.waiting.remove(future)
            elif future.result() is Turn.LEAD:  # its client has left just as its turn came
                self._failed(key, flight)
            raise
        if isinstance(future.result(), Answer):
            self._count("shared")
        return future.result()

    async def _lead(
        self, exchange: Exchange, delivery: Delivery, key: bytes, work: Callable[[], Awaitable[bytes | None]]
    ) -> bytes | None:
        flight = self._flights.setdefault(key, Flight())
        delivery.encoder = listener = Listener(delivery.encoder, self._answer_bytes_max)
        try:
            return await work()
        finally:
            raw = listener.heard(exchange.chat) if exchange.status == "success" else None
            if raw is not None and exchange.route is not None:
                model = exchange.route.model
                answer = Answer(raw, model.platform.id, model.model_id)
                if listener.lasts and exchange.broken is None and not is_demo(model.platform):
                    self.cache.put(key, answer, time.monotonic())
                del self._flights[key]
                flight.tell_all(answer)
            elif exchange.status == "success":  # an answer that only its own client can be given
                del self._flights[key]
                flight.tell_all(Turn.ALONE)
            else:
                self._failed(key, flight)

    def _failed(self, key: bytes, flight: Flight) -> None:
        """The next one is served; without one the flight is over."""
        if not flight.tell_next(Turn.LEAD):
            del self._flights[key]

    async def _tell(self, exchange: Exchange, chat: Chat, delivery: Delivery, answer: Answer) -> bytes:
        """Give this client an answer that was made for another request."""
        body, encoder = load_lenient(answer.raw), delivery.encoder
        if chat.stream:
            delivery.tally = tally = Tally()
            note_completion(body, tally)
            await delivery.begin_stream()
            last = encoder.feed([Event(frame(chunk), chunk) for chunk in as_chunks(body)]) + encoder.end(tally)
        else:
            last = encoder.whole(Completion(answer.raw, body))
            await delivery.begin_whole(len(last))
        exchange.status = "success"
        self._log(row_of(exchange, chat, answer))
        return last


def row_of(exchange: Exchange, chat: Chat, answer: Answer) -> Row:
    """The row of an answer from memory. It has no tokens: none were used."""
    row = Row(request_id=exchange.id, created_at=exchange.utc, platform=answer.platform, model_id=answer.model_id)
    row.requested_model, row.routing_mode, row.streamed = chat.model or "auto", str(chat.need.mode), chat.stream
    row.status, row.http_status, row.cached, row.client = "success", 200, True, exchange.client
    row.latency_ms = round((time.monotonic() - exchange.started) * 1000)
    return row
