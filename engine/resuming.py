"""One streamed answer that another route may go on with, should its own break off (SPEC 14).

engine/story.py knows what the client has, rescue.py how to ask for the rest, seam.py what of a new stream is news.
`Resuming` brings them together for one request: it is told of every event on its way to the client and of every break,
and says whether the answer can go on. Which route is next, and what a break costs whom, is the loop's affair.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from engine.rescue import Continuation, continuation, refused_prefill
from engine.seam import HELD_S, Seam
from engine.story import Continuable, Story, may_be_continued
from protection import Failure, UpstreamError
from routing.catalog import Model
from wire.chat import Chat, Encoder, Event, Need, Tally

CONTINUATIONS_MAX = 2  # that have brought something (SPEC 14.3); each costs the whole prompt once more


@dataclass(eq=False, slots=True)
class Resumption:
    """One attempt to go on with an answer."""

    asked: Continuation
    seam: Seam
    at: int  # characters of text that the client had before
    goes_on: bool = False  # it has brought something, and the client has been told

    def judge(self, error: UpstreamError) -> bool:
        """Whether this failure says no more than that the model takes no prefill. One for which our own patience with
        the seam ran out says nothing of its provider."""
        if self.seam.holding and error.failure is Failure.STALL:
            error.ours = True
        return refused_prefill(error, self.asked)


class Resuming:
    """One answer, from its first event to its last, whoever they come from."""

    __slots__ = ("_chat", "_continuations", "_elsewhere", "_has_others", "_never", "_rescue_after_s", "story")

    def __init__(self, chat: Chat, rescue_after_s: float) -> None:
        self.story = Story()
        self._chat = chat
        self._rescue_after_s = rescue_after_s
        self._continuations = 0  # that have brought something
        self._never = not may_be_continued(chat)
        self._has_others: Callable[[], bool] | None = None
        self._elsewhere = False  # there may be another route than the one that is at work

    @property
    def need(self) -> Need:
        """What the next route must have room for: the request, and what has been answered."""
        need = self._chat.need
        return replace(need, tokens=need.tokens + self.story.tokens)

    @property
    def tokens_min(self) -> int:
        """What any model must hold to be asked at all: where the request may be made again as it was, no more than
        that."""
        as_it_was = not self.story.chars or "response_format" in self._chat.body
        return self._chat.need.tokens if as_it_was else self.need.tokens

    def resumption(self, model: Model, *, prefill: bool) -> Resumption:
        """How to ask this model for the rest."""
        asked = continuation(self._chat, self.story, model, prefill=prefill)
        return Resumption(asked, Seam(self.story, asked), self.story.chars)

    def begun(self, has_others: Callable[[], bool]) -> None:
        """A route has begun to answer, or to go on. `has_others`: whether there may be another one; asked at most once,
        when its stream is waited for."""
        self._has_others = has_others

    def quiet_s(self, resumption: Resumption | None, longest_s: float) -> float:
        """The longest time without a meaningful event that is waited for now: less where another route could go on."""
        if resumption is not None and resumption.seam.holding:
            return min(HELD_S, self._rescue_after_s)
        if self._has_others is not None:
            self._elsewhere, self._has_others = self._has_others(), None
        if self._never or not self._elsewhere or not self.story.open or self._exhausted(resumption):
            return longest_s
        return min(self._rescue_after_s, longest_s)

    def feed(self, resumption: Resumption | None, events: list[Event] | None, encoder: Encoder, model: Model) -> bytes:
        """What the client is sent of these events of `model`'s; None stands for the end of the stream.

        Raises UpstreamError where the two texts do not fit together.
        """
        if resumption is not None:
            step = resumption.seam.end() if events is None else resumption.seam.feed(events, time.monotonic())
            if step.misfit is not None:
                words = f"The answer could not be continued here: {step.misfit}."
                raise UpstreamError(Failure.MALFORMED, words, status=200, ours=True)
            events = step.events
        if not events:
            return b""
        told = b""
        if resumption is not None and not resumption.goes_on:
            resumption.goes_on = True
            told = encoder.resumed(model.label)
        self.story.feed(events)
        return told + encoder.feed(events)

    def goes_on_after(self, resumption: Resumption | None, tally: Tally, error: UpstreamError) -> bool:
        """An attempt on the answer has broken off: whether another may go on with it (SPEC 14.1, 14.3)."""
        if self._exhausted(resumption):
            return False
        self._continuations += resumption is not None and resumption.goes_on
        self.story.attempt_ended(tally)
        return error.failure is not Failure.CONTENT_FILTER and self.story.continuable(self._chat) is not Continuable.NO

    def _exhausted(self, resumption: Resumption | None) -> bool:
        """Whether no continuation is left behind this one."""
        return self._continuations + (resumption is not None and resumption.goes_on) >= CONTINUATIONS_MAX

    def told(self, tally: Tally) -> Tally:
        """What the encoder is told at the end of the answer."""
        return self.story.told(tally, self._chat.prompt_tokens)
