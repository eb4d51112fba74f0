"""What the client has been given of one answer so far: all that a rescue has to know of it (SPEC 14).

A story is fed with every batch of events on its way to the client, whichever provider they come from, so that it also
covers an answer that has changed providers before. Nearly every chunk is plain text and costs one write to a buffer;
everything else is worked out when a stream breaks. No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from io import StringIO
from typing import Any

from msgspec.structs import replace

from engine.wording import is_first_half, whole_letters
from wire.chat import CHARS_PER_TOKEN, Chat, Event, Tally, Usage
from wire.jsontext import JSON

TEXT_CHARS_MAX = 1024 * 1024  # a longer text is not kept and so not continued: no model takes it as a prompt
HEAD = ("id", "created", "model")


class Continuable(StrEnum):
    """What can be done about an answer that has broken."""

    NO = "no"
    CONTINUE = "continue"  # from its last character on
    RESTART = "restart"  # from the beginning: the client has no text yet


def may_be_continued(chat: Chat) -> bool:
    """Not where the client wants numbers of each token: those of repeated ones would be lost or doubled."""
    return not (chat.body.get("logprobs") or chat.body.get("top_logprobs"))


class Story:
    """One answer as its client knows it."""

    __slots__ = (
        "_attempts",
        "_completion_tokens",
        "_first",
        "_kept",
        "_prompt_tokens",
        "_thought_chars",
        "_usage_details",
        "_write",
        "calls",
        "chars",
        "finish",
        "reasoning",
        "refusal",
        "spoilt",
    )  # fmt: skip

    def __init__(self) -> None:
        self._first: Event | None = None
        self.chars = 0  # of text
        self.reasoning = False  # some has been shown
        self.refusal = False
        self.calls = False  # a tool call has been begun
        self.finish: str | None = None
        self.spoilt = False  # it cannot become a right answer any more
        self._kept = StringIO(newline="")
        self._write = self._kept.write
        self._thought_chars = 0
        self._attempts = 0  # that have ended
        self._prompt_tokens: int | None = None  # as the first provider counted
        self._completion_tokens = 0  # of all these
        self._usage_details: JSON = {}

    def feed(self, events: list[Event]) -> None:
        """Take note of events that go out to the client."""
        if self._first is None and events:
            self._first = events[0]
        for event in events:
            if (text := event.text) is None:
                if event.ending is not None:
                    self.finish = event.ending
                    continue
                text = event.delta.get("content")
                self._note(event)
            if text:
                self.chars += self._write(text)
                if self.chars > TEXT_CHARS_MAX:
                    self._forget()

    def _note(self, event: Event) -> None:
        """What a chunk says beside its text."""
        delta = event.delta
        if thoughts := delta.get("reasoning_content"):
            self.reasoning = True
            self._thought_chars += len(thoughts)
        self.refusal = self.refusal or bool(delta.get("refusal"))
        self.calls = self.calls or bool(delta.get("tool_calls") or delta.get("function_call"))
        self.finish = event.finish or self.finish

    def _forget(self) -> None:
        self.spoilt = True
        self._kept = StringIO(newline="")
        self._write = len

    @property
    def head(self) -> JSON:
        """Id, created and model of its first chunk."""
        return {} if self._first is None else {name: v for name, v in self._first.chunk.items() if name in HEAD}

    @property
    def open(self) -> bool:
        """Whether more text may follow what there is, whoever writes it."""
        return not (self.finish or self.calls or self.refusal or self.spoilt)

    @property
    def delivered(self) -> str:
        """The text that the client has."""
        return whole_letters(self._kept.getvalue())

    def text_and_half(self) -> tuple[str, str]:
        """The text in whole characters, and the first half of one more where the cut went through an emoji."""
        text = self.delivered
        return (text[:-1], text[-1]) if text and is_first_half(text[-1]) else (text, "")

    def continuable(self, chat: Chat) -> Continuable:
        """What can be done if the stream has broken here (SPEC 14.1, 14.6)."""
        if not self.open or not may_be_continued(chat):
            return Continuable.NO
        return Continuable.CONTINUE if self.chars and self.delivered.strip() else Continuable.RESTART

    # --- Tokens -----------------------------------------------------------------------------------------------------
    @property
    def tokens(self) -> int:
        """Of what the client has, estimated."""
        return -(-(self.chars + self._thought_chars) // CHARS_PER_TOKEN)

    def attempt_ended(self, tally: Tally) -> None:
        """Count the tokens of an attempt that has given the client something, or was to go on with it. The first is
        the one whose prompt the client pays for."""
        if not self._attempts and tally.usage is not None:
            self._prompt_tokens = tally.usage.input_tokens
            self._usage_details = details(tally.usage_object, "prompt_tokens_details")
        self._attempts += 1
        self._completion_tokens += tally.output_tokens()

    def told(self, tally: Tally, prompt_tokens: int) -> Tally:
        """What the encoder is told of an answer that ends with this attempt: one head, and one usage for all of it: the
        prompt of the first attempt, the completion tokens of all (SPEC 14.2). `prompt_tokens` is the estimate, for
        where the first broke before it could say. Its own tally, where there has been no other attempt."""
        if not self._attempts:
            return tally
        prompt = prompt_tokens if self._prompt_tokens is None else self._prompt_tokens
        usage = Usage(prompt, self._completion_tokens + tally.output_tokens())
        told = {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.input_tokens + usage.output_tokens,
            **self._usage_details,
        }
        return replace(tally, usage=usage, usage_object=told, usage_raw=None, head=self.head)


def details(usage: Mapping[str, Any] | None, name: str) -> JSON:
    found = usage.get(name) if usage else None
    return {name: found} if isinstance(found, dict) else {}
