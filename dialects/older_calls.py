"""Functions as chat had them before tools: who declares `functions` reads `function_call` in the answer, one at
most (SPEC 3.5). No I/O.
"""

from __future__ import annotations

from typing import Any

from wire.chat import Completion, Event, frame
from wire.jsontext import JSON, dump


class OlderCalls:
    """One chat answer whose first call is told in the older form. There is no form for a second one: a model that needs
    it calls again."""

    def whole(self, completion: Completion) -> bytes:
        choice = completion.body["choices"][0]
        message = choice.get("message") or {}
        if not message.get("tool_calls"):
            return completion.raw
        told = with_older_calls(message, message["tool_calls"][0])
        choices = [{**choice, "message": told, "finish_reason": older_finish(choice.get("finish_reason"))}]
        return dump({**completion.body, "choices": choices})

    def feed(self, event: Event) -> bytes:
        choice = event.choice
        delta, finish = choice.get("delta") or {}, choice.get("finish_reason")
        pieces = delta.get("tool_calls")
        if not pieces and older_finish(finish) == finish:
            return event.raw
        delta = with_older_calls(delta, next((piece for piece in pieces or () if piece.get("index", 0) == 0), None))
        if not delta and not finish:  # of a call that cannot be told
            return b""
        return frame({**event.chunk, "choices": [{**choice, "delta": delta, "finish_reason": older_finish(finish)}]})

    def end(self) -> bytes:
        return b""


def with_older_calls(message: JSON, call: JSON | None) -> JSON:
    told = {name: value for name, value in message.items() if name != "tool_calls"}
    return told if call is None else {**told, "function_call": call.get("function") or {}}


def older_finish(finish: Any) -> Any:
    return "function_call" if finish == "tool_calls" else finish
