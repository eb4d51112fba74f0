"""Providers with a wire of their own, as strict as the real ones: what they would refuse, they refuse here too.

Each `Wire` has the catalogue's own quirks and plays one platform of the fake provider. `says` makes its answer in its
own shape, whole or streamed as it is asked, and answers 400 in its own shape to what the real server would refuse.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fake_provider import FakeProvider, Reply, Request, body, chunk, chunked, completion, event, sse, usage_chunk

CATALOG = json.loads((Path(__file__).resolve().parent.parent / "catalog.json").read_text())
PLATFORMS = {platform["id"]: platform for platform in CATALOG["platforms"]}


@dataclass(frozen=True)
class Said:
    """One answer, free of any wire."""

    text: str = ""
    calls: list[tuple[str, dict]] = field(default_factory=list)
    finish: str = "stop"
    usage: tuple[int, int] = (11, 7)


class Refused(AssertionError):
    """The real server would answer 400 to this."""


def insist(condition: object, why: str) -> None:
    if not condition:
        raise Refused(why)


class Wire:
    """An OpenAI-compatible platform without a rule of its own."""

    name = "plain"
    keys: tuple[str, ...] = ()

    def options(self, fake: FakeProvider) -> dict:
        """The platform for `start_gateway`."""
        known = PLATFORMS.get(self.name, {})
        options: dict = {"quirks": known.get("quirks", {}), "adapter": known.get("adapter", "openai")}
        options["model"] = {"vision": True, "context_window": 1_000_000, "max_output": 65_536}
        return options | ({"keys": list(self.keys)} if self.keys else {})

    def says(self, said: Said) -> Callable[[Request], Reply]:
        def reply(request: Request) -> Reply:
            try:
                self.check(request)
            except Refused as refused:
                return self.error(400, str(refused))
            return self.streamed(said) if self.asked_to_stream(request) else self.whole(said)

        return reply

    def asked_to_stream(self, request: Request) -> bool:
        return request.streaming

    def check(self, request: Request) -> None:
        asked = request.json
        insist(request.path.endswith("/chat/completions"), request.path)
        insist(re.fullmatch("Bearer .+", request.headers.get("authorization", "")), "no bearer token")
        insist(None not in asked.values(), "a null field")
        insist(len(asked.get("stop", [])) <= 4 or isinstance(asked["stop"], str), "more than four stops")
        insist("tool_choice" not in asked or "tools" in asked, "a choice without tools")
        for tool in asked.get("tools", []):
            insist(tool["type"] == "function", "tools of another type")
            insist(re.fullmatch("[a-zA-Z0-9_-]{1,64}", tool["function"]["name"]), "a tool's name")
        check_pairs(asked["messages"])

    def error(self, status: int, message: str, code: object = None) -> Reply:
        return body({"error": {"message": message, "type": "invalid_request_error", "code": code}}, status=status)

    def whole(self, said: Said) -> Reply:
        calls = [call_of(index, name, args) for index, (name, args) in enumerate(said.calls)]
        message = {"tool_calls": calls} if calls else None
        return completion(said.text or None, finish=said.finish, usage=said.usage, message=message)

    def streamed(self, said: Said) -> Reply:
        parts = [chunk(role="assistant", content="")]
        parts += [chunk(piece) for piece in re.findall(r"\S+\s*", said.text)]
        for index, (name, args) in enumerate(said.calls):
            text = json.dumps(args)
            call = call_of(index, name, {}) | {"index": index, "function": {"name": name, "arguments": text[:4]}}
            parts.append(chunk(tool_calls=[call]))
            parts.append(chunk(tool_calls=[{"index": index, "function": {"arguments": text[4:]}}]))
        return sse(*parts, chunk(finish=said.finish), usage_chunk(*said.usage))


def call_of(index: int, name: str, args: dict) -> dict:
    function = {"name": name, "arguments": json.dumps(args)}
    return {"id": f"call_of_the_provider_{index}", "type": "function", "function": function}


def check_pairs(messages: list[dict]) -> None:
    """Every call has its result right behind it, and no result is without its call."""
    waiting: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            insist(message["tool_call_id"] in waiting, "a result without its call")
            waiting.remove(message["tool_call_id"])
            continue
        insist(not waiting, "a call without its result")
        for call in message.get("tool_calls", []):
            insist(set(call) == {"id", "type", "function"}, f"fields of a call: {sorted(call)}")
            insist(set(call["function"]) == {"name", "arguments"}, "fields of a function")
            insist(len(call["id"]) <= 40, "string too long, maximum length 40")
            insist(isinstance(json.loads(call["function"]["arguments"]), dict), "arguments that are no object")
            waiting.add(call["id"])
    insist(not waiting, "a call without its result")


STANDARD = {
    "model", "messages", "temperature", "max_tokens", "top_p", "stop", "tools", "tool_choice", "stream", "seed",
    "presence_penalty", "frequency_penalty", "response_format", "reasoning_effort",
}  # fmt: skip
BASIC_TOOL = {"name", "description", "parameters", "strict"}
BASIC_MESSAGE = {"role", "content", "tool_calls", "tool_call_id"}


class Cohere(Wire):
    name = "cohere"

    def check(self, request: Request) -> None:
        super().check(request)
        asked = request.json
        insist(set(asked) <= STANDARD, f"unknown field: {sorted(set(asked) - STANDARD)}")
        insist(asked.get("temperature", 0) <= 1, "temperature above 1")
        insist(asked.get("reasoning_effort", "none") in ("none", "high"), "effort")
        insist('"additionalProperties"' not in json.dumps(asked.get("tools", [])), "additionalProperties")
        check_strictly(asked)

    def error(self, status: int, message: str, code: object = None) -> Reply:
        return body({"id": "b2c0", "message": message}, status=status)

    def streamed(self, said: Said) -> Reply:
        """Usage comes only on the last choice's frame."""
        parts = [chunk(role="assistant", content=""), *map(chunk, re.findall(r"\S+\s*", said.text))]
        for index, (name, args) in enumerate(said.calls):
            parts.append(chunk(tool_calls=[call_of(index, name, args) | {"index": index}]))
        usage = usage_chunk(*said.usage)["usage"]
        return sse(*parts, chunk(finish=said.finish, root={"usage": usage}))


def check_strictly(asked: dict) -> None:
    """No field too many; content is text, or parts where there is an image among them."""
    for tool in asked.get("tools", []):
        insist(set(tool) == {"type", "function"}, f"unknown field of a tool {sorted(tool)}")
        insist(set(tool["function"]) <= BASIC_TOOL, f"unknown field of a function {sorted(tool['function'])}")
    for message in asked["messages"]:
        insist(set(message) <= BASIC_MESSAGE | {"name"}, f"unknown message field {sorted(message)}")
        content = message["content"]
        images = isinstance(content, list) and any(part["type"] == "image_url" for part in content)
        insist(isinstance(content, str) or images, "content must be a string")


class Cloudflare(Wire):
    name = "cloudflare"
    keys = ("acc0123:token-0123456789",)

    def options(self, fake: FakeProvider) -> dict:
        base_url = fake.url(self.name) + "/client/v4/accounts/{account_id}/ai/v1"
        return super().options(fake) | {"base_url": base_url, "key_format": "account_id:token"}

    def check(self, request: Request) -> None:
        super().check(request)
        asked = request.json
        insist("/accounts/acc0123/" in request.path, "the account")
        insist(request.key == "token-0123456789", "the token")
        insist("max_tokens" in asked, "without max_tokens the answer ends after 256")
        insist(set(asked) <= STANDARD | {"parallel_tool_calls", "top_k", "repetition_penalty"}, f"{sorted(asked)}")
        check_strictly(asked)

    def error(self, status: int, message: str, code: object = 5004) -> Reply:
        failed = {"success": False, "errors": [{"code": code, "message": message}], "messages": [], "result": None}
        return body(failed, status=status)

    def streamed(self, said: Said) -> Reply:
        """Whole calls without index, a null content, usage on every frame."""
        usage = {"usage": usage_chunk(*said.usage)["usage"]}
        parts = [chunk(piece, root=usage, role="assistant") for piece in re.findall(r"\S+\s*", said.text)]
        calls = [call_of(index, name, args) for index, (name, args) in enumerate(said.calls)]
        parts += [chunk(tool_calls=[call], content=None, root=usage) for call in calls]
        return sse(*parts, chunk(finish=said.finish, root=usage))


class Mistral(Wire):
    name = "mistral"

    def check(self, request: Request) -> None:
        super().check(request)
        asked = request.json
        insist(not {"seed", "logit_bias", "user", "store", "metadata", "reasoning"} & set(asked), sorted(asked))
        previous = ""
        for message in asked["messages"]:
            extra = set(message) - BASIC_MESSAGE - {"name", "prefix"}
            insist(not extra, f"extra inputs are not permitted: {extra}")
            insist(not (previous == "tool" and message["role"] == "user"), "invalid_request_message_order")
            ids = [call["id"] for call in message.get("tool_calls", [])] + [message.get("tool_call_id", "a" * 9)]
            insist(all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in ids), f"tool call id {ids}")
            previous = message["role"]
        insist(previous != "assistant" or asked["messages"][-1].get("prefix"), "Expected last role User or Tool")


class ThoughtsWanted(Wire):
    """Refuses a tool loop in which the model's thoughts are missing."""

    name = "longcat"

    def check(self, request: Request) -> None:
        super().check(request)
        for message in request.json["messages"]:
            insist("tool_calls" not in message or "reasoning_content" in message, "reasoning_content is missing")
            insist("reasoning" not in message, "unknown field reasoning")


FINISHES = {"stop": "STOP", "tool_calls": "STOP", "length": "MAX_TOKENS", "content_filter": "SAFETY"}
SIGNATURE = "c2lnbmF0dXJlLW9m"
SCHEMA_KEYS = {
    "type", "format", "title", "description", "nullable", "enum", "items", "maxItems", "minItems", "properties",
    "required", "minProperties", "maxProperties", "minLength", "maxLength", "pattern", "anyOf", "minimum", "maximum",
    "default",
}  # fmt: skip


class Gemini(Wire):
    name = "google"

    def asked_to_stream(self, request: Request) -> bool:
        return ":streamGenerateContent?alt=sse" in request.path

    def check(self, request: Request) -> None:
        asked = request.json
        insist(re.search(r"/models/[^/:]+:(g|streamG)enerateContent", request.path), request.path)
        insist(request.headers.get("x-goog-api-key"), "no key")
        insist("authorization" not in request.headers and "key=" not in request.path, "the key in the wrong place")
        known = {"contents", "systemInstruction", "tools", "toolConfig", "generationConfig"}
        insist(set(asked) <= known, f"Unknown name {sorted(set(asked) - known)}")
        insist("toolConfig" not in asked or asked.get("tools"), "toolConfig without tools")
        for tool in asked.get("tools", []):
            for declared in tool["functionDeclarations"]:
                check_schema(declared.get("parameters"))
                insist(not {"parameters", "parametersJsonSchema"} <= set(declared), "two schemas")
                insist(declared.get("parameters", {"properties": 1})["properties"], "should be non-empty for OBJECT")
        check_schema(asked.get("generationConfig", {}).get("responseSchema"))
        check_turns(asked["contents"])

    def error(self, status: int, message: str, code: object = None) -> Reply:
        names = {400: "INVALID_ARGUMENT", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED"}
        error = {"code": status, "message": message, "status": names.get(status, "INTERNAL")}
        return body({"error": error}, status=status)

    def whole(self, said: Said) -> Reply:
        return body(gemini_frame(*text_parts(said.text), *call_parts(said.calls), said=said))

    def streamed(self, said: Said) -> Reply:
        frames = [gemini_frame({"text": piece}, said=None) for piece in re.findall(r"\S+\s*", said.text)]
        if said.calls:
            frames.append(gemini_frame(*call_parts(said.calls), said=None))
        return chunked(*map(event, [*frames, gemini_frame(said=said)]))


def text_parts(text: str) -> list[dict]:
    return [{"text": text}] if text else []


def call_parts(calls: list[tuple[str, dict]]) -> list[dict]:
    """Only the first of parallel calls is signed."""
    parts = [{"functionCall": {"name": name, "args": args}} for name, args in calls]
    if parts:
        parts[0]["thoughtSignature"] = SIGNATURE
    return parts


def gemini_frame(*parts: dict, said: Said | None, **more: object) -> dict:
    candidate: dict = {"content": {"role": "model", "parts": list(parts)}, "index": 0}
    frame: dict = {"candidates": [candidate], "modelVersion": "provider-own-name", "responseId": "resp-1"}
    if said is not None:
        candidate["finishReason"] = FINISHES[said.finish]
        prompt, answer = said.usage
        counts = {"promptTokenCount": prompt, "candidatesTokenCount": answer - 2, "thoughtsTokenCount": 2}
        frame["usageMetadata"] = counts | {"totalTokenCount": prompt + answer}
    return frame | more


def check_schema(schema: dict | None) -> None:
    if schema is None:
        return
    insist(set(schema) <= SCHEMA_KEYS, f'Invalid JSON payload received. Unknown name "{set(schema) - SCHEMA_KEYS}"')
    insist(isinstance(schema.get("type", ""), str), "Proto field is not repeating, cannot start list")
    insist(set(schema.get("required", [])) <= set(schema.get("properties", {})), "required")
    insist("enum" not in schema or schema.get("type") == "string", "enum of something else")
    insist(schema.get("type") != "array" or "items" in schema, "array without items")
    children = [*schema.get("properties", {}).values(), *schema.get("anyOf", []), schema.get("items")]
    for child in children:
        check_schema(child)


def check_turns(contents: list[dict]) -> None:
    insist(contents and contents[0]["role"] == "user", "must begin with a user turn")
    previous: dict = {"role": "model", "parts": []}
    for turn in contents:
        insist(turn["parts"], "empty parts")
        insist(turn["role"] != previous["role"], "roles must alternate")
        calls = [part["functionCall"] for part in previous["parts"] if "functionCall" in part]
        results = [part["functionResponse"] for part in turn["parts"] if "functionResponse" in part]
        insist(len(calls) == len(results), "the number of function response parts must be equal to the calls")
        insist([c["name"] for c in calls] == [r["name"] for r in results], "names of results")
        own = [part for part in turn["parts"] if "functionCall" in part]
        insist(not own or own[0].get("thoughtSignature"), "missing a thought_signature")
        previous = turn
    insist(not any("functionCall" in part for part in previous["parts"]), "a call without a result")


WIRES = {wire.name: wire for wire in (Wire(), Gemini(), Cohere(), Cloudflare())}
STRICT_WIRES = WIRES | {wire.name: wire for wire in (Mistral(), ThoughtsWanted())}
