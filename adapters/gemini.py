"""Gemini's wire: a `Chat` out as generateContent, its answers back in OpenAI's chat form.

Pure translation, with one memory: thought signatures. Newer models sign the first function call of each step and
refuse a conversation in which that signature is missing, but OpenAI clients drop fields they do not know. So it is
handed out on the tool call, taken back from there, and remembered in case the client lost it. No I/O; the clock is
an argument.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from adapters.base import Request, base_url, call_headers
from adapters.embeddings import embedding_request
from adapters.json_schema import gemini_schema
from adapters.openai import ChunkMender, mend_completion
from adapters.quirks import cannot_carry, clamp_effort
from adapters.shapes import as_spelled, text_of, under, unreadable
from protection import Failure, UpstreamError
from routing.catalog import Key, Model
from wire.chat import Chat, Completion, Event, ModelKind, Tally, frame
from wire.http import ENDPOINTS_MAX, Endpoint
from wire.jsontext import JSON, dump, load_inner

SIGNATURES_MAX = 5_000  # about 10 MB at the 2 KB that signatures have
SIGNATURE_TTL_S = 1_800.0  # as long as a session lasts; a tool loop is far shorter
UNSIGNED = "skip_thought_signature_validator"  # the documented stand-in for calls that another model made
VENDOR = "google"  # where this wire's own OpenAI surface keeps what OpenAI has no field for: extra_content.<vendor>
STOPS_MAX = 5
SAMPLING = {
    "temperature": "temperature", "top_p": "topP", "top_k": "topK", "seed": "seed",
    "presence_penalty": "presencePenalty", "frequency_penalty": "frequencyPenalty",
}  # fmt: skip
THINKING_BUDGETS = {"none": 0, "minimal": 0, "low": 1024, "medium": 8192, "high": 24576}
LEVELS = ("minimal", "low", "medium", "high")
MODES = {"auto": "AUTO", "none": "NONE", "required": "ANY"}
FILTERED = frozenset({"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"})
DEAD = frozenset(
    {
        "LANGUAGE", "OTHER", "ESCALATION", "MALFORMED_FUNCTION_CALL", "MALFORMED_RESPONSE", "UNEXPECTED_TOOL_CALL",
        "TOO_MANY_TOOL_CALLS", "MISSING_THOUGHT_SIGNATURE",
    }
)  # fmt: skip


class Signatures:
    """Thought signatures by call id, and by what was called with which arguments, for clients that remake ids."""

    def __init__(self, entries_max: int = SIGNATURES_MAX, ttl_s: float = SIGNATURE_TTL_S) -> None:
        self._entries_max = entries_max
        self._ttl_s = ttl_s
        self._held: OrderedDict[str, tuple[str, float]] = OrderedDict()  # oldest first

    def put(self, call_id: str, name: str, args: object, signature: str, now: float) -> None:
        for key in (call_id, canonical(name, args)):
            self._held[key] = (signature, now + self._ttl_s)
            self._held.move_to_end(key)
        while len(self._held) > self._entries_max:
            self._held.popitem(last=False)

    def get(self, call_id: str, now: float) -> str | None:
        held = self._held.get(call_id)
        return held[0] if held is not None and held[1] > now else None

    def like(self, name: str, args: object, now: float) -> str | None:
        """The signature of the last call with this name and these arguments."""
        return self.get(canonical(name, args), now)

    def __len__(self) -> int:
        return len(self._held)


def canonical(name: str, args: object) -> str:
    return f"{name}\0{blake2b(json.dumps(args, sort_keys=True).encode(), digest_size=16).hexdigest()}"


def api_key_headers(secret: str, quirks: Mapping[str, Any]) -> dict[str, str]:
    return call_headers({"x-goog-api-key": secret} if secret else {}, quirks)


@lru_cache(maxsize=ENDPOINTS_MAX)
def endpoint(model: Model, key: Key, stream: bool) -> Endpoint:
    url, secret = base_url(model.platform, key)
    action = "streamGenerateContent?alt=sse" if stream else "generateContent"
    url = f"{url}/models/{model.model_id.removeprefix('models/')}:{action}"
    return Endpoint(url, api_key_headers(secret, model.quirks))


class GeminiAdapter:
    """POST {base_url}/models/{model_id}:generateContent."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock  # seconds since 1970
        self._signatures = Signatures()

    def reply_here(self, chat: Chat) -> None:
        return None

    def request(self, model: Model, key: Key, chat: Chat, *, bare: bool = False) -> Request:
        if chat.need.kind is ModelKind.EMBEDDING:  # in OpenAI's form here too
            return embedding_request(model, key, chat)
        asked = GeminiRequest(model, chat, None if bare else self._signatures, self._clock())
        body = dump(asked.body())
        return Request(endpoint(model, key, chat.stream), body, gives_back=asked.gives_back)

    def headers(self, secret: str, quirks: Mapping[str, Any]) -> dict[str, str]:
        return api_key_headers(secret, quirks)

    def plain_answer(self, raw: bytes, chat: Chat) -> None:
        return None  # every answer on this wire has to be translated

    def completion(self, raw: bytes, body: JSON, chat: Chat) -> Completion | None:
        reader = GeminiReader(Tally(), chat, self._signatures, self._clock())
        reader.read(body, raw)
        finish = reader.finish or "stop"
        message: JSON = {"role": "assistant", "content": "".join(reader.text) or None}
        if reader.thoughts:
            message["reasoning_content"] = "".join(reader.thoughts)
        if reader.calls:
            message["tool_calls"] = reader.calls
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        whole = {**reader.head, "object": "chat.completion", "choices": [choice]}
        if reader.usage:
            whole["usage"] = reader.usage
        mend_completion(whole, chat)  # the open models on this platform write thoughts and calls as text, too
        return Completion(dump(whole), whole)

    def translator(self, tally: Tally, chat: Chat, *, whole_calls: bool = True) -> ChunkTranslator:
        reader = GeminiReader(tally, chat, self._signatures, self._clock())
        return ChunkTranslator(reader, ChunkMender(tally, chat, whole_calls=whole_calls))


# --- The request ----------------------------------------------------------------------------------------------------
class GeminiRequest:
    """One request on its way to this wire: `contents` must alternate, and every result must follow its call. Without
    `signatures` no call keeps the one that it has."""

    def __init__(self, model: Model, chat: Chat, signatures: Signatures | None, now: float) -> None:
        self.gives_back = False  # a signature that was given out
        self._model = model
        self._chat = chat
        self._signatures = signatures
        self._now = now
        self._system: list[str] = []
        self._turns: list[JSON] = []
        self._call_names: dict[str, str] = {}

    def body(self) -> JSON:
        chat, quirks = self._chat.body, self._model.quirks
        for message in chat["messages"]:
            self._add(message)
        system = "\n\n".join(filter(None, self._system))
        body: JSON = {"contents": self._contents(system if quirks.get("system_as_user") else "")}
        if system and not quirks.get("system_as_user"):
            body["systemInstruction"] = {"parts": [{"text": system}]}
        declared = [declaration(tool, quirks) for tool in chat.get("tools", ())]
        if declared:
            body["tools"] = [{"functionDeclarations": declared}]
            if config := calling_config(chat.get("tool_choice")):
                body["toolConfig"] = {"functionCallingConfig": config}
        if config := generation_config(self._chat, self._model, has_tools=bool(declared)):
            body["generationConfig"] = config
        return body

    def _contents(self, system: str) -> list[JSON]:
        turns = self._turns
        if not turns or turns[0]["role"] == "model":  # a history must not begin with the model
            turns.insert(0, {"role": "user", "parts": [] if system else [{"text": "(the conversation goes on)"}]})
        if system:
            turns[0]["parts"].insert(0, {"text": system})
        return turns

    def _add(self, message: JSON) -> None:
        role, content = message["role"], message.get("content")
        if role == "system":
            self._system.append(self._plain(content))
        elif role == "tool":
            self._turn("user", [self._result(message)])
        elif role == "user":
            self._turn("user", self._parts(content))
        else:
            self._turn("model", [*self._parts(content), *self._calls(message.get("tool_calls") or ())])

    def _turn(self, role: str, parts: list[JSON]) -> None:
        """Neighbouring turns of one role become one: so all results of a step stand in one turn, as they must."""
        if not parts:
            return
        if self._turns and self._turns[-1]["role"] == role:
            self._turns[-1]["parts"] += parts
        else:
            self._turns.append({"role": role, "parts": parts})

    def _plain(self, content: object) -> str:
        return "\n".join(part["text"] for part in self._parts(content) if "text" in part)

    def _parts(self, content: object) -> list[JSON]:
        if isinstance(content, str):
            return [{"text": content}] if content else []
        parts: list[JSON] = []
        for part in content if isinstance(content, list) else ():
            if part.get("type") == "text":
                parts += [{"text": part["text"]}] if part["text"] else []
            elif part.get("type") == "image_url":
                parts.append(inline_data(part["image_url"]["url"]))
            elif isinstance(part.get("file"), dict) and isinstance(part["file"].get("file_data"), str):
                parts.append(inline_data(part["file"]["file_data"]))
            else:
                raise cannot_carry(f"a part of type {part.get('type')!r}")
        return parts

    def _result(self, message: JSON) -> JSON:
        call_id, text = message["tool_call_id"], self._plain(message.get("content"))
        response = load_inner(text)
        if not isinstance(response, dict):
            response = {"output": text}
        name = self._call_names.get(call_id) or message.get("name") or "unknown"
        return {"functionResponse": {"id": call_id, "name": name, "response": response}}

    def _calls(self, calls: Iterable[JSON]) -> list[JSON]:
        """The step's calls; where signatures are wanted the first one carries one, made up if need be. The others
        have none, unless they came with one."""
        parts: list[JSON] = []
        wanted = self._model.quirks.get("call_signatures")
        for call in calls:
            function = call.get("function")
            if not isinstance(function, dict):
                continue
            args = arguments_object(function.get("arguments"))
            self._call_names[call["id"]] = function["name"]
            part: JSON = {"functionCall": {"id": call["id"], "name": function["name"], "args": args}}
            if wanted and (signature := self._signature(call, args, first=not parts)):
                part["thoughtSignature"] = signature
            parts.append(part)
        return parts

    def _signature(self, call: JSON, args: JSON, *, first: bool) -> str | None:
        found = None
        if self._signatures is not None:
            found = given_signature(call) or self._signatures.get(call["id"], self._now)
            if found is None and first:
                found = self._signatures.like(call["function"]["name"], args, self._now)
        self.gives_back = self.gives_back or found is not None
        return found or (UNSIGNED if first else None)


def inline_data(url: str) -> JSON:
    """A data URL as this wire takes it. Other addresses are not fetched for the client: whatever a gateway can reach,
    its clients could read."""
    if url[:5].lower() != "data:":
        raise cannot_carry("an image by its address; send it as a data: URL")
    head, comma, data = url[5:].partition(",")
    kind, *rest = head.split(";")
    if not comma or "base64" not in map(str.lower, rest):
        raise cannot_carry("a data: URL that is not base64")
    return {"inlineData": {"mimeType": kind or "application/octet-stream", "data": data}}


def arguments_object(arguments: object) -> JSON:
    value = load_inner(arguments or "{}") if isinstance(arguments, str) else arguments
    return value if isinstance(value, dict) else {"value": arguments if value is None else value}


def given_signature(call: JSON) -> str | None:
    """The signature that a client brought back on a tool call."""
    extra = call.get("extra_content")
    vendor = extra.get(VENDOR) if isinstance(extra, dict) else None
    for place in (vendor, call, call["function"]):
        signature = place.get("thought_signature") if isinstance(place, dict) else None
        if isinstance(signature, str) and signature:
            return signature
    return None


def declaration(tool: JSON, quirks: Mapping[str, Any]) -> JSON:
    if not isinstance(function := tool.get("function"), dict):
        raise cannot_carry(f"a tool of type {tool.get('type')!r}")
    declared: JSON = {"name": function["name"]}
    if isinstance(function.get("description"), str) and function["description"]:
        declared["description"] = function["description"]
    schema = function.get("parameters") or {}
    if quirks.get("schema_subset"):
        parameters = gemini_schema(schema)
        if parameters.get("properties"):  # an object without properties is refused
            declared["parameters"] = {**parameters, "type": "object"}
    elif schema.get("properties") or schema.keys() & {"$ref", "anyOf", "oneOf", "allOf"}:
        declared["parametersJsonSchema"] = schema
    return declared


def calling_config(choice: object) -> JSON | None:
    if isinstance(choice, str):
        return {"mode": MODES[choice]} if choice in MODES else None
    if isinstance(choice, dict) and isinstance(choice.get("function"), dict):
        return {"mode": "ANY", "allowedFunctionNames": [choice["function"].get("name")]}
    return None


def generation_config(chat: Chat, model: Model, *, has_tools: bool) -> JSON:
    body, quirks = chat.body, model.quirks
    config: JSON = {theirs: body[ours] for ours, theirs in SAMPLING.items() if ours in body}
    if chat.max_tokens is not None:
        config["maxOutputTokens"] = min(chat.max_tokens, model.answer_max(chat.prompt_tokens))
    if stop := body.get("stop"):
        config["stopSequences"] = ([stop] if isinstance(stop, str) else stop)[:STOPS_MAX]
    wanted = body.get("response_format") or {}
    if wanted.get("type") in ("json_object", "json_schema") and not has_tools:  # together they are a 400
        config["responseMimeType"] = "application/json"
        schema = (wanted.get("json_schema") or {}).get("schema")
        if isinstance(schema, dict) and quirks.get("schema_subset"):
            config["responseSchema"] = gemini_schema(schema)
        elif isinstance(schema, dict):
            config["responseJsonSchema"] = schema
    if thinking := thinking_config(body.get("reasoning_effort"), quirks):
        config["thinkingConfig"] = thinking
    return config


def thinking_config(effort: str | None, quirks: Mapping[str, Any]) -> JSON | None:
    """The client's effort as this model takes it: by level, by budget, or not at all."""
    if effort is None or quirks.get("thinking") not in ("level", "budget"):
        return None
    if quirks["thinking"] == "budget":
        known = clamp_effort(effort, list(THINKING_BUDGETS))
        return {"thinkingBudget": THINKING_BUDGETS[known], "includeThoughts": known != "none"} if known else None
    level = clamp_effort(effort, quirks.get("reasoning_efforts", LEVELS))
    return {"thinkingLevel": level.upper(), "includeThoughts": effort != "none"} if level else None


# --- The answer -----------------------------------------------------------------------------------------------------
class GeminiReader:
    """Reads one answer, whole or frame by frame: each frame is a response of its own with the new parts only."""

    def __init__(self, tally: Tally, chat: Chat, signatures: Signatures, now: float) -> None:
        self.head: JSON = {}
        self.text: list[str] = []  # of the last frame; of all, where there is only one
        self.thoughts: list[str] = []
        self.calls: list[JSON] = []
        self.finish: str | None = None  # in OpenAI's word
        self.usage: JSON | None = None
        self._said = False  # text or a call
        self._thought = False
        self._calls_total = 0
        self._tally = tally
        self._names = chat.tool_names
        self._model = chat.model
        self._signatures = signatures
        self._now = now

    def read(self, body: JSON, raw: bytes) -> None:
        """One frame; `raw` is its JSON. Raises UpstreamError for a failure that this wire tells in a 200."""
        self.text, self.thoughts, self.calls = [], [], []
        if not self.head:
            seed = str(body.get("responseId") or self._now)
            model = body.get("modelVersion") or self._model
            self.head = {"id": f"chatcmpl-{seed}", "created": int(self._now), "model": model}
        self._note_usage(body.get("usageMetadata"))
        candidate, parts = said_parts(body)
        if candidate is None:
            self._without_candidate(body)
            return
        spelled: Any = parts
        if any(not isinstance(part, dict) or not isinstance(part.get("text", ""), str) for part in parts):
            exact = as_spelled(raw)
            spelled = said_parts(exact)[1] if isinstance(exact, dict) else None
        for place, part in enumerate(parts):
            if isinstance(part, dict):
                self._part(part, text_of(part.get("text"), under(under(spelled, place), "text")))
            else:
                self._part({}, text_of(part, under(spelled, place)))
        reason = candidate.get("finishReason")
        if isinstance(reason, str) and reason not in ("", "CONTINUATION", "FINISH_REASON_UNSPECIFIED"):
            self._finish(reason, str(candidate.get("finishMessage") or ""))

    def _finish(self, reason: str, words: str) -> None:
        """What an ending means; what ended before it said anything is a failure, not an answer."""
        if reason in FILTERED or reason.startswith("IMAGE_"):
            if not self._shown:
                raise filtered(reason, words)
            self.finish = "content_filter"
        elif reason == "MAX_TOKENS":
            if not self._shown:  # the same would happen with another key
                message = "The model used up max_tokens on thinking before its first word; allow more."
                raise UpstreamError(Failure.TRUNCATED, message, status=200)
            self.finish = "length"
        elif reason == "PUP_LIMITED_DISABLED":
            raise UpstreamError(Failure.FORBIDDEN, f"The account is limited: {words or reason}", status=403)
        elif reason in DEAD and not self._said:
            raise UpstreamError(Failure.EMPTY, f"The model gave up: {words or reason}", status=200, code=reason)
        else:
            self.finish = "tool_calls" if self._calls_total else "stop"

    @property
    def _shown(self) -> bool:
        """Whether the client has, or can get, something of this answer, if only thoughts."""
        return self._said or self._thought or self._tally.has_text

    def _without_candidate(self, body: JSON) -> None:
        feedback = body.get("promptFeedback")
        if isinstance(feedback, dict) and feedback.get("blockReason"):
            raise filtered(str(feedback["blockReason"]), str(feedback.get("blockReasonMessage") or ""))

    def _part(self, part: JSON, text: str | None) -> None:
        """One part; its text is given apart. Other kinds of parts mean nothing to chat clients and are left out."""
        call = part.get("functionCall")
        if isinstance(call, dict):
            self.calls.append(self._call(call, part.get("thoughtSignature")))
        elif text:
            (self.thoughts if part.get("thought") else self.text).append(text)
            if part.get("thought"):
                self._thought = True
            else:
                self._said = True

    def _call(self, call: JSON, signature: object) -> JSON:
        """A call under an id of our own where it has none: two equal calls in one turn are two calls."""
        name, args = str(call.get("name", "")), arguments_object(call.get("args") or {})
        origin = f"{self.head['id']}\0{self._now}\0{self._calls_total}".encode(errors="replace")
        made = blake2b(origin, digest_size=9).hexdigest()
        given = call.get("id")
        told: JSON = {
            "id": text_of(given, None) or f"call_{made}",
            "type": "function",
            "function": {"name": self._names.get(name, name), "arguments": dump(args).decode()},
        }
        if isinstance(signature, str) and signature:
            self._signatures.put(told["id"], name, args, signature, self._now)
            told["extra_content"] = {VENDOR: {"thought_signature": signature}}
        self._calls_total += 1
        self._said = True
        return told

    def _note_usage(self, usage: object) -> None:
        if not isinstance(usage, dict):
            return
        prompt, answer, thoughts, cached = (
            count(usage.get(name))
            for name in ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount", "cachedContentTokenCount")
        )
        told: JSON = {
            "prompt_tokens": prompt,
            "completion_tokens": answer + thoughts,
            "total_tokens": prompt + answer + thoughts,
        }
        if cached:
            told["prompt_tokens_details"] = {"cached_tokens": cached}
        if thoughts:
            told["completion_tokens_details"] = {"reasoning_tokens": thoughts}
        self.usage = told
        self._tally.note_usage(told)

    @property
    def calls_before(self) -> int:
        """How many calls earlier frames held."""
        return self._calls_total - len(self.calls)


def said_parts(body: JSON) -> tuple[JSON | None, list[Any]]:
    """The first candidate of a frame and the parts of its content, in whatever nesting they come. Raises UpstreamError
    where something stands in their place that cannot be read."""
    candidates = body.get("candidates")
    candidate = candidates[0] if isinstance(candidates, list) and candidates else candidates
    if not candidate:
        return None, []
    if not isinstance(candidate, dict):
        raise unreadable()
    content = candidate.get("content") or {}
    parts = content.get("parts") or [] if isinstance(content, dict) else content
    if isinstance(parts, bool):
        raise unreadable()
    return candidate, parts if isinstance(parts, list) else [parts]


def count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def filtered(reason: str, words: str) -> UpstreamError:
    message = f"The provider's content filter refused: {words or reason}"
    return UpstreamError(Failure.CONTENT_FILTER, message, status=400, code="content_filter")


class ChunkTranslator:
    """One stream's frames as chunks in OpenAI's form: at most one with what is new and one with how it ended."""

    def __init__(self, reader: GeminiReader, mender: ChunkMender) -> None:
        self._reader = reader
        self._mender = mender  # of what the models write, whatever wire it comes by
        self._begun = False

    def recognised(self, raw: bytes, payload: bytes) -> None:
        return None  # every frame has to be translated

    @property
    def finishing(self) -> bool:
        return self._mender.finishing

    @property
    def holding(self) -> bool:
        return self._mender.holding

    @property
    def expects_calls(self) -> bool:
        return self._mender.holding  # on this wire a finish is the end

    @property
    def held_chars(self) -> int:
        return self._mender.held_chars

    def feed(self, raw: bytes, payload: bytes, chunk: JSON) -> list[Event]:
        reader = self._reader
        reader.read(chunk, payload)
        delta: JSON = {}
        if reader.thoughts:
            delta["reasoning_content"] = "".join(reader.thoughts)
        if reader.text:
            delta["content"] = "".join(reader.text)
        if reader.calls:
            first = reader.calls_before
            delta["tool_calls"] = [{"index": first + place, **call} for place, call in enumerate(reader.calls)]
        events = []
        if delta:
            if not self._begun:
                delta, self._begun = {"role": "assistant", **delta}, True
            events += self._events(delta, None)
        if reader.finish is not None:
            events += self._events({}, reader.finish)
        return events

    def end(self) -> list[Event]:
        return self._mender.end()

    def _events(self, delta: JSON, finish: str | None) -> list[Event]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        chunk = {**self._reader.head, "object": "chat.completion.chunk", "choices": [choice]}
        return self._mender.feed(frame(chunk), b"", chunk)
