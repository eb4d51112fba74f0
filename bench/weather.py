"""Bad weather with a memory: providers that fail by seeded draws, an oracle that knows them, and clients that judge.

Every call is a draw of its own, by platform, question and how often that platform has been asked that question before.
So it does not matter in which order a gateway asks: the oracle can say of each question whether asking every platform
once could have answered it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random

import aiohttp

from running import AUTHORIZED  # isort: skip  # it finds the next one's folder

from fake_provider import (
    CUT,
    PAUSE,
    PROMISED,
    RESET,
    ROLE,
    STOP,
    Reply,
    Request,
    answer,
    body,
    chunk,
    completion,
    error,
    event,
    head,
    raw,
    sse,
)

WRAPPED = {"error": {"message": "scripted failure", "type": "scripted"}}
SHOWN_BYTES = 1_000  # of an answer that is not the answer
HTML = b"<html><body>Bad gateway</body></html>"


class Fault(StrEnum):
    """The ways in which a call fails."""

    RATE_LIMITED = "429"
    RATE_LIMITED_HINT = "429 with Retry-After: 1"
    ERROR_500 = "500"
    ERROR_503 = "503"
    WRAPPED = "wrapped in a 200"
    STALL = "stall"
    CUT = "cut"
    EMPTY = "empty"
    MALFORMED = "malformed"
    MID_STREAM = "cut in mid-stream"


BEFORE = tuple(fault for fault in Fault if fault is not Fault.MID_STREAM)
NOT_COOLING = (Fault.WRAPPED, Fault.EMPTY, Fault.MALFORMED)  # these rest nothing: only the health gate hears of them


def question_of(request: Request) -> int:
    """The first message's: whoever goes on with a broken answer is asked with more of them."""
    return int(request.json["messages"][0]["content"].split()[1])


def answer_to(question: int) -> str:
    return f"The answer to question {question} is {question * 7919}, whoever is asked."


def reply_of(fault: Fault | None, request: Request) -> Reply:
    """How a provider in that state answers: streamed to those who asked for a stream."""
    text, streaming = answer_to(question_of(request)), request.streaming
    match fault:
        case None:
            return answer(text)(request)
        case Fault.RATE_LIMITED:
            return error(429)
        case Fault.RATE_LIMITED_HINT:
            return error(429, headers={"retry-after": "1"})
        case Fault.ERROR_500 | Fault.ERROR_503:
            return error(int(fault))
        case Fault.WRAPPED:
            return sse(event(WRAPPED)) if streaming else body(WRAPPED)
        case Fault.STALL:
            return raw(head(200, {"content-type": "text/event-stream"}), PAUSE) if streaming else raw(PAUSE)
        case Fault.CUT:
            return sse(ROLE, RESET) if streaming else raw(PROMISED, CUT)
        case Fault.EMPTY:
            return sse(ROLE, STOP) if streaming else completion("")
        case Fault.MALFORMED:
            return body(HTML.decode(), headers={"content-type": "text/html"})
        case Fault.MID_STREAM:
            return sse(ROLE, chunk(text[:20]), CUT) if streaming else raw(PROMISED, b'{"id": "chatcmpl', CUT)


@dataclass
class Weather:
    """The failure rate of each platform, which a scenario may change while it runs, and what the failures are."""

    seed: int
    rates: dict[str, float]
    faults: Mapping[str, Sequence[Fault]] = field(default_factory=dict)  # all but in mid-stream, unless told otherwise
    mid_stream: float = 0.0  # this part of all failures
    asked: Counter[tuple[str, int]] = field(default_factory=Counter)

    def draw(self, platform: str, question: int, nth: int) -> Fault | None:
        rng = Random(f"{self.seed}/{platform}/{question}/{nth}")
        if rng.random() >= self.rates[platform]:
            return None
        if rng.random() < self.mid_stream:
            return Fault.MID_STREAM
        return rng.choice(self.faults.get(platform, BEFORE))

    def could_answer(self, question: int) -> bool:
        """The oracle: whether asking each platform once could have answered, at the present rates."""
        return any(self.draw(platform, question, 0) is None for platform in self.rates)

    def reply(self, request: Request) -> Reply:
        asked = request.platform, question_of(request)
        self.asked[asked] += 1
        return reply_of(self.draw(*asked, self.asked[asked] - 1), request)


class End(StrEnum):
    """What a client got."""

    WHOLE = "whole"
    HONEST = "honest"  # an error, and said so
    BROKEN = "broken"  # the same in mid-stream
    SILENT = "silent"  # something that looks like an answer and is not the answer
    HANG = "hang"


@dataclass(frozen=True)
class Result:
    """One request as its client saw it."""

    question: int
    end: End
    began: float
    ended: float
    code: str = ""  # the error's
    via: str = ""
    waited_ms: int = 0

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def judged(status: int, raw_body: bytes, question: int, *, streaming: bool) -> tuple[End, str]:
    """What this response is worth to its client, and an error's code."""
    try:
        if status != 200:
            return End.HONEST, str(json.loads(raw_body)["error"]["code"])
        if not streaming:
            choice = json.loads(raw_body)["choices"][0]
            whole = choice["message"]["content"] == answer_to(question) and choice["finish_reason"] == "stop"
            return (End.WHOLE if whole else End.SILENT), ""
        return judged_stream(raw_body, question)
    except (ValueError, KeyError, TypeError, IndexError):
        return End.SILENT, "unreadable"


def judged_stream(raw_body: bytes, question: int) -> tuple[End, str]:
    lines = [line.removeprefix("data: ") for line in raw_body.decode().split("\n") if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    if errors := [part["error"] for part in chunks if part.get("error")]:
        return End.BROKEN, str(errors[0]["type"])
    choices = [choice for part in chunks for choice in part.get("choices") or []]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    finishes = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    whole = text == answer_to(question) and finishes == ["stop"] and lines[-1:] == ["[DONE]"]
    return (End.WHOLE if whole else End.SILENT), ""


@dataclass
class Crowd:
    """Clients of one gateway; each question is asked once."""

    base_url: str
    http: aiohttp.ClientSession
    patience_s: float = 30.0  # longer than any wait that the gateway may take: who is not served then hangs
    headers: Mapping[str, str] = field(default_factory=lambda: AUTHORIZED)

    async def ask(self, question: int, *, streaming: bool = False, model: str = "auto", **more: str) -> Result:
        sent = {"model": model, "stream": streaming, "messages": [{"role": "user", "content": f"question {question}"}]}
        url, began = f"{self.base_url}/v1/chat/completions", time.monotonic()
        end, code, via, waited_ms = End.HANG, "", "", 0
        try:
            async with asyncio.timeout(self.patience_s):
                async with self.http.post(url, json=sent, headers={**self.headers, **more}) as got:
                    raw_body = await got.read()
                    end, code = judged(got.status, raw_body, question, streaming=streaming)
                    if end is End.SILENT:
                        code = f"{code} {raw_body[-SHOWN_BYTES:]!r}"
                    via = got.headers.get("X-Routed-Via", "")
                    waited_ms = int(got.headers.get("X-Waited-Ms", 0))
        except TimeoutError:
            pass
        except aiohttp.ClientPayloadError:  # the connection broke off, which no client takes for an end
            end, code = End.BROKEN, "cut"
        except aiohttp.ClientError as broken:
            end, code = End.SILENT, type(broken).__name__
        return Result(question, end, began, time.monotonic(), code, via, waited_ms)

    async def at_once(self, questions: Iterable[int], *, workers: int = 1_000, **options: object) -> list[Result]:
        """All of them, so many at a time; every second one streams."""
        room = asyncio.Semaphore(workers)

        async def one(question: int) -> Result:
            async with room:
                return await self.ask(question, streaming=question % 2 == 1, **options)

        return list(await asyncio.gather(*map(one, questions)))

    async def at_rate(self, per_s: float, seconds: float, *, first: int = 0, **options: object) -> list[Result]:
        """That many a second, whatever becomes of them."""
        began, running = time.monotonic(), []
        for number in range(round(per_s * seconds)):
            await asyncio.sleep(max(0.0, began + number / per_s - time.monotonic()))
            question = first + number
            running.append(asyncio.create_task(self.ask(question, streaming=question % 2 == 1, **options)))
        return list(await asyncio.gather(*running))


def ends(results: Collection[Result]) -> dict[End, int]:
    counted = Counter(result.end for result in results)
    return {end: counted[end] for end in End}


def share(results: Collection[Result], wanted: Callable[[Result], bool]) -> float:
    return sum(map(wanted, results)) / len(results) if results else 1.0
