"""Facts 2 and 3.3: the odd forms in which streams carry tool calls and their ends, and what clients then read."""

import json

from conftest import IN_ORDER
from fake_provider import chunk, completion, sse, usage_chunk, usage_of

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("f", "g")
]


def piece(name: str | None = None, arguments: object = None, **call: object) -> dict:
    function = {"name": name, "arguments": arguments}
    return call | {"function": {field: value for field, value in function.items() if value is not None}}


def calls(*pieces: dict) -> dict:
    return chunk(tool_calls=list(pieces))


TWICE = json.dumps('{"a": "é"}')
ENDED = chunk(finish="tool_calls")
# What the stream holds, and the calls that it amounts to: names and arguments.
PIECES = {
    "every call claims index 0": (
        [
            calls(piece("f", "", index=0, id="1")),
            calls(piece(None, '{"a":1}', index=0)),
            calls(piece("g", "", index=0, id="2")),
            calls(piece(None, '{"a":', index=0)),
            calls(piece(None, "2}", index=0)),
            ENDED,
        ],
        [("f", {"a": 1}), ("g", {"a": 2})],
    ),
    "indexes from 1": (
        [calls(piece("f", "{}", index=1, id="1")), calls(piece("g", "{}", index=2, id="2")), ENDED],
        [("f", {}), ("g", {})],
    ),
    "a new id with every piece": (
        [calls(piece("f", '{"a":', index=0, id="1")), calls(piece(None, "1}", index=0, id="2")), ENDED],
        [("f", {"a": 1})],
    ),
    "id, type and name with every piece": (
        [
            calls(piece("f", '{"a":', index=0, id="1", type="function")),
            calls(piece("f", "1}", index=0, id="1", type="function")),
            ENDED,
        ],
        [("f", {"a": 1})],
    ),
    "the name after the id": (
        [calls({"index": 0, "id": "1", "function": None}), calls(piece("f", "{}", index=0)), ENDED],
        [("f", {})],
    ),
    "neither ids nor indexes": (
        [calls(piece("f", '{"a":'), piece(None, "1}")), calls(piece("g", "{}")), chunk(finish="stop")],
        [("f", {"a": 1}), ("g", {})],
    ),
    "one after the other, and back": (
        [
            calls(piece("f", '{"a":', index=0, id="1"), piece("g", '{"a":', index=1, id="2")),
            calls(piece(None, "1}", index=0)),
            calls(piece(None, "2}", index=1)),
            ENDED,
        ],
        [("f", {"a": 1}), ("g", {"a": 2})],
    ),
    "no arguments": (
        [calls(piece("f", "", index=0, id="1")), chunk(finish="tool_calls", tool_calls=[piece("g", index=1, id="2")])],
        [("f", {}), ("g", {})],
    ),
    "no arguments and no ending": ([calls(piece("f", index=0, id="1"))], [("f", {})]),
    "arguments encoded twice, in pieces": (
        [calls(piece("f", TWICE[:6], index=0, id="1")), calls(piece(None, TWICE[6:], index=0)), ENDED],
        [("f", {"a": "é"})],
    ),
    "behind thoughts in the same chunk": (
        [chunk("<think>hm</think>", tool_calls=[piece("f", "{}", index=0, id="1")]), chunk(finish="stop")],
        [("f", {})],
    ),
    "behind what might become thoughts": (
        [chunk("<th", tool_calls=[piece("f", "{}", index=0, id="1")]), chunk(finish="stop")],
        [("f", {})],
    ),
}


async def read(gateway, **fields: object) -> tuple[list[dict], dict]:
    """A stream as the real client gives it: the calls with all their pieces joined, and what else there was."""
    joined: dict[int, dict] = {}
    seen: dict = {"text": "", "finishes": [], "usage": []}
    messages = [{"role": "user", "content": "hi"}]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async for part in await gateway.openai.chat.completions.create(
        model=IN_ORDER, messages=messages, **options, **fields
    ):
        seen["usage"] += [part.usage.completion_tokens] if part.usage else []
        for choice in part.choices:
            seen["text"] += choice.delta.content or ""
            seen["finishes"] += [choice.finish_reason] if choice.finish_reason else []
            for given in choice.delta.tool_calls or []:
                call = joined.setdefault(given.index, {"id": "", "type": "", "name": "", "arguments": ""})
                call["id"] += given.id or ""
                call["type"] += given.type or ""
                call["name"] += given.function.name or "" if given.function else ""
                call["arguments"] += given.function.arguments or "" if given.function else ""
    assert list(joined) == list(range(len(joined)))
    return list(joined.values()), seen


async def test_calls_in_any_pieces_are_the_calls_that_were_meant(start_gateway, fake):
    gateway = await start_gateway(["a"])
    for name, (parts, expected) in PIECES.items():
        fake.script("a", sse(*parts))

        joined, seen = await read(gateway, tools=TOOLS)

        assert [(call["name"], json.loads(call["arguments"])) for call in joined] == expected, name
        assert {call["type"] for call in joined} == {"function"}, name
        assert len({call["id"] for call in joined}) == len(expected), name
        assert seen["finishes"] == ["tool_calls"], name


async def test_made_ids_differ_from_answer_to_answer(start_gateway, fake):
    gateway = await start_gateway(["a"])
    ids = set()
    for answer in ("chatcmpl-1", "chatcmpl-2"):
        fake.script("a", completion(None, message={"tool_calls": [piece("f", "{}")]}, id=answer))
        (call,) = (await gateway.chat(tools=TOOLS)).json["choices"][0]["message"]["tool_calls"]
        ids.add(call["id"])
        fake.script("a", sse(calls(piece("f", "{}")) | {"id": answer}, ENDED))
        (call,), _ = await read(gateway, tools=TOOLS)
        assert call["id"] in ids  # the same answer, the same id

    assert len(ids) == 2


BARE = {"id": "x", "choices": [{"index": 0, "delta": {"content": "hi"}}]}
ENDINGS = {
    "told twice": [chunk("hi"), chunk(finish="stop"), chunk(finish="stop")],
    "empty until the end": [chunk("h", finish=""), chunk("i", finish=""), chunk(finish="stop")],
    "absent until the end": [BARE, chunk(finish="stop")],
    "without a delta": [chunk("hi"), {"id": "x", "choices": [{"index": 0, "finish_reason": "stop"}]}],
    "with a null for a delta": [
        chunk("hi"),
        {"id": "x", "choices": [{"index": 0, "delta": None, "finish_reason": "eos"}]},
    ],
    "usage beside null choices": [chunk("hi"), chunk(finish="stop"), usage_chunk(1, 2) | {"choices": None}],
    "usage on every frame": [
        chunk("hi", root={"usage": usage_of(1, 1)}),
        {"id": "x", "choices": None},
        chunk(finish="stop", root={"usage": usage_of(1, 2)}),
    ],
}


async def test_an_ending_in_any_form_is_one_ending(start_gateway, fake):
    gateway = await start_gateway(["a"])
    for name, parts in ENDINGS.items():
        fake.script("a", sse(*parts))

        _, seen = await read(gateway)

        assert (seen["text"], seen["finishes"]) == ("hi", ["stop"]), name
        assert seen["usage"] == ([2] if "usage" in name else []), name


async def test_words_that_may_become_thoughts_end_with_their_chunk_once(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(chunk("<th", finish="stop")))

    (await gateway.stream()).assert_whole("<th")


async def test_a_whole_answer_always_says_how_it_ended(start_gateway, fake):
    gateway = await start_gateway(["a"])
    for finish in (None, ""):
        fake.script("a", completion("hi", finish=finish))
        assert (await gateway.chat()).json["choices"][0]["finish_reason"] == "stop"
