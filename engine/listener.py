"""An encoder that passes everything on to another and hears what answer that amounts to."""

from __future__ import annotations

from typing import Any

from wire.chat import Chat, Completion, Encoder, Event, Tally, chunk_head
from wire.errors import GatewayError
from wire.jsontext import JSON, dump

TEXTS = ("content", "reasoning_content", "refusal")
PLAIN_DELTA = frozenset({"role", "tool_calls", *TEXTS})
PLAIN_CHOICE = frozenset({"index", "delta", "finish_reason"})


class Listener:
    """Gives up on an answer that it could not give back as it came: one with parts that it does not know, or larger
    than `bytes_max`."""

    def __init__(self, encoder: Encoder, bytes_max: int) -> None:
        self._encoder = encoder
        self._bytes_max = bytes_max
        self._completion: Completion | None = None
        self._texts: dict[str, list[str]] = {}
        self._calls: list[JSON] = []
        self._size = 0
        self._lost = False
        self._tally: Tally | None = None  # of a stream that has ended well
        self.lasts = False  # it ended by itself and calls no tool, so it may be kept

    def whole(self, completion: Completion) -> bytes:
        self._completion = completion
        return self._encoder.whole(completion)

    def feed(self, events: list[Event]) -> bytes:
        if not self._lost:
            for event in events:
                self._hear(event.chunk)
        return self._encoder.feed(events)

    def end(self, tally: Tally) -> bytes:
        self._tally = tally
        return self._encoder.end(tally)

    def fail(self, error: GatewayError, tally: Tally) -> bytes | None:
        self._lost = True
        return self._encoder.fail(error, tally)

    def heartbeat(self) -> bytes:
        return self._encoder.heartbeat()

    def resumed(self, label: str) -> bytes:
        return self._encoder.resumed(label)

    def heard(self, chat: Chat | None) -> bytes | None:
        """The answer as JSON in OpenAI's chat form; None where it cannot be given to others."""
        if self._completion is not None:
            self.lasts = ends_well(self._completion.body)
            raw = dump(with_usage(self._completion.body, chat, None))
            return raw if len(raw) <= self._bytes_max else None
        if self._lost or self._tally is None:
            return None
        body = self._assembled(self._tally)
        self.lasts = ends_well(body)
        return dump(with_usage(body, chat, self._tally))

    def _hear(self, chunk: JSON) -> None:
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            known = (choice.get("index") or 0) == 0 and all(
                value is None or name in PLAIN_CHOICE for name, value in choice.items()
            )
            if not known or not all(value is None or name in PLAIN_DELTA for name, value in delta.items()):
                self._lost = True
                return
            for name in TEXTS:
                if text := delta.get(name):
                    self._size += len(text.encode(errors="replace"))
                    self._texts.setdefault(name, []).append(text)
            for call in delta.get("tool_calls") or ():
                self._hear_call(call)
        self._lost = self._lost or self._size > self._bytes_max

    def _hear_call(self, piece: JSON) -> None:
        index, function = piece.get("index") or 0, piece.get("function") or {}
        if index > len(self._calls):
            self._lost = True
            return
        if index == len(self._calls):
            self._calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call = self._calls[index]
        call["id"] = call["id"] or piece.get("id") or ""
        call["function"]["name"] = call["function"]["name"] or function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""
        self._size += len(function.get("arguments") or "")

    def _assembled(self, tally: Tally) -> JSON:
        head = tally.head
        texts = {name: "".join(pieces) for name, pieces in self._texts.items()}
        message: JSON = {"role": "assistant", "content": None, **texts}
        if self._calls:
            message["tool_calls"] = self._calls
        choice = {"index": 0, "message": message, "finish_reason": tally.finish or "stop"}
        return {**chunk_head(head), "object": "chat.completion", "choices": [choice]}


def ends_well(body: JSON) -> bool:
    choices: list[JSON] = body["choices"]
    return len(choices) == 1 and choices[0].get("finish_reason") == "stop" and not calls_tools(choices[0])


def calls_tools(choice: JSON) -> bool:
    message = choice.get("message") or {}
    return bool(message.get("tool_calls") or message.get("function_call"))


def with_usage(body: JSON, chat: Chat | None, tally: Tally | None) -> JSON:
    """The answer with its usage: the provider's, else our estimate."""
    if body.get("usage"):
        return body
    usage: dict[str, Any] | None = tally.usage_object if tally is not None else None
    if usage is None:
        prompt, answer = chat.prompt_tokens if chat is not None else 0, tally.output_tokens() if tally else 0
        usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return {**body, "usage": usage}
