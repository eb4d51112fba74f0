"""OpenAI's legacy Completions, which editors use for the grey text behind the cursor: a prompt goes in, what comes next
comes out.

Platforms that still have such an endpoint get the request as it came (`Chat.legacy`, SPEC 17.2); all other models are
asked in chat for the continuation and nothing else. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec.structs import replace

from dialects.chat import chat_from
from dialects.values import boolean, number, wrong_type
from wire.chat import Chat, Completion, Event, LocalRoute, Tally, frame
from wire.errors import GatewayError, InvalidRequest
from wire.jsontext import JSON, dump, load_object
from wire.sse import DONE, KEEP_ALIVE

CONTINUE = (
    "You are a text completion engine. The user's message is the beginning of a text. Answer with the text that comes "
    "directly after it and with nothing else: do not repeat its end, do not comment, put nothing around it."
)
FILL = (
    "You are a text completion engine. The user's message is a text with a gap, marked <GAP/>. Answer with the text "
    "that belongs into the gap and with nothing else: do not repeat what stands around it, do not comment, put nothing "
    "around it."
)
GAP = "<GAP/>"
PASSED_ON = (
    "model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "n", "stop", "presence_penalty",
    "frequency_penalty", "seed", "user", "top_k", "min_p", "repetition_penalty",
)  # fmt: skip
OWN_FIELDS = ("model", "stream", "stream_options", "echo", "best_of")  # that are not for a platform's own endpoint


class CompletionsDialect:
    """POST /v1/completions. `new_token` gives a random text for ids."""

    paths = ("/v1/completions",)
    id_headers = (b"x-request-id",)

    def __init__(self, new_token: Callable[[], str]) -> None:
        self._new_token = new_token

    def is_spoken(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        return False

    def status(self, error: GatewayError) -> int:
        return error.status

    def error(self, error: GatewayError, request_id: str) -> bytes:
        return error.body()

    def extra_routes(self) -> tuple[LocalRoute, ...]:
        return ()

    def parse(self, raw: bytes, now: float, client: int | None = None) -> Chat:
        request = {name: value for name, value in load_object(raw).items() if value is not None}
        prompt, suffix = prompt_of(request), suffix_of(request)
        if not prompt and not suffix:
            raise InvalidRequest("'prompt' must not be empty.", param="prompt")
        refuse_unserved(request)
        body = {name: request[name] for name in PASSED_ON if name in request}
        system, text = (FILL, f"{prompt}{GAP}{suffix}") if suffix else (CONTINUE, prompt)
        body["messages"] = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        chat = chat_from(body)
        given = {name: value for name, value in request.items() if name not in PASSED_ON and name not in OWN_FIELDS}
        mended = {name: value for name, value in chat.body.items() if name != "messages"}
        return replace(chat, legacy={**given, **mended, "prompt": prompt})

    def encoder(self, chat: Chat, now: float) -> CompletionsEncoder:
        head = {"id": f"cmpl-{self._new_token()[:24]}", "created": int(now), "model": chat.model or "auto"}
        return CompletionsEncoder(head, chat.include_usage)


def prompt_of(request: JSON) -> str:
    """The prompt, alone or as the only one of a list."""
    prompt = request.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and len(prompt) > 1 and all(isinstance(each, str) for each in prompt):
        raise InvalidRequest("Only one prompt is served: send a request for each.", param="prompt")
    if prompt is None:
        raise InvalidRequest("'prompt' is missing.", param="prompt")
    raise InvalidRequest("'prompt' must be a text; tokens mean something else to each model.", param="prompt")


def suffix_of(request: JSON) -> str:
    suffix = request.get("suffix", "")
    if not isinstance(suffix, str):
        raise wrong_type("suffix", "a string")
    return suffix


def refuse_unserved(request: JSON) -> None:
    if "echo" in request and boolean(request["echo"], "echo"):
        raise InvalidRequest("'echo' is not served: put the prompt before the answer yourself.", param="echo")
    if "best_of" in request and number(request["best_of"], "best_of", whole=True) != 1:
        raise InvalidRequest("Only best_of = 1 is supported.", param="best_of")


class CompletionsEncoder:
    """Text in `text_completion` form. Thoughts are no part of a text."""

    def __init__(self, head: JSON, include_usage: bool) -> None:
        self._head = head  # where the provider gives none
        self._include_usage = include_usage

    def whole(self, completion: Completion) -> bytes:
        body = completion.body
        choice = body["choices"][0]
        message = choice.get("message") or {}
        told = self._chunk(
            body, message.get("content") or message.get("refusal"), choice.get("finish_reason") or "stop"
        )
        return dump({**told, "usage": body["usage"]} if body.get("usage") else told)

    def feed(self, events: list[Event]) -> bytes:
        frames = []
        for event in events:
            delta, finish = event.delta, event.finish
            text = delta.get("content") or delta.get("refusal")
            if text or finish:
                frames.append(frame(self._chunk(event.chunk, text, finish)))
        return b"".join(frames)

    def end(self, tally: Tally) -> bytes:
        if not self._include_usage or tally.usage_object is None:
            return DONE
        return frame({**self._told(tally.head), "choices": [], "usage": tally.usage_object}) + DONE

    def fail(self, error: GatewayError, tally: Tally) -> bytes:
        return frame({"error": error.in_stream()}) + frame(self._chunk(tally.head, "", "error")) + DONE

    def heartbeat(self) -> bytes:
        return KEEP_ALIVE

    def resumed(self, label: str) -> bytes:
        return f": resumed on {label}\n\n".encode()

    def _told(self, like: Mapping[str, object]) -> JSON:
        """Identity as the provider gives it, and the same in all of a stream's chunks."""
        self._head |= {name: like[name] for name in self._head if like.get(name)}
        return {**self._head, "object": "text_completion"}

    def _chunk(self, like: Mapping[str, object], text: str | None, finish: str | None) -> JSON:
        choice = {"index": 0, "text": text or "", "logprobs": None, "finish_reason": finish}
        return {**self._told(like), "choices": [choice]}
