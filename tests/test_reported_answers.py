"""What servers were reported to send (SPEC 3.11, 6.5, 6.6, 8.9), each of which was lost, doubled or misread once.

Streams are played from the first event on and from the tenth; what has a whole form is played whole too.
"""

import json

import pytest
from conftest import case
from fake_provider import IDENTITY, ROLE, body, chunk, event, sse, usage_of

TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
    }
    for name in ("f", "g")
]
STOP = chunk(finish="stop")
CALLED = chunk(finish="tool_calls")
HI, THERE = chunk("hi"), chunk(" there")
NINE = [chunk(f"w{n} ") for n in range(9)]
NINE_TEXT = "".join(f"w{n} " for n in range(9))


def piece(index: object = ..., arguments: object = ..., *, name: object = ..., **fields: object) -> dict:
    """One piece of a tool call; what is `...` is left out."""
    function = {"name": name, "arguments": arguments}
    told = {key: value for key, value in function.items() if value is not ...}
    return ({} if index is ... else {"index": index}) | fields | ({"function": told} if told else {})


def calling(*pieces: dict) -> dict:
    return chunk(tool_calls=list(pieces))


def plain(chunk_: dict) -> bytes:
    return json.dumps(chunk_).encode()


def with_raw(content: bytes) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"' + content + b'"}}]}\n\n'


# --- Tool calls in pieces -------------------------------------------------------------------------------------------

ONE, TWO = ("f", {"n": 1}), ("g", {"n": 2})
PIECES = {
    "an empty name and id on later pieces": (
        [calling(piece(0, '{"n"', id="c1", name="f")), calling(piece(0, ":1}", id="", name=""))],
        [ONE],
    ),
    "nulls on later pieces": (
        [calling(piece(0, '{"n"', id="c1", name="f")), calling(piece(0, ":1}", id=None, name=None))],
        [ONE],
    ),
    "the head of the second call under the first one's index": (
        [
            calling(piece(0, '{"n":1}', id="c1", name="f")),
            calling(piece(0, "", id="c2", name="g")),
            calling(piece(1, '{"n":2}')),
        ],
        [ONE, TWO],
    ),
    "a new id for each piece": (
        [calling(piece(0, part, id=f"c{n}", name="f")) for n, part in enumerate(['{"n"', ":1", "}"])],
        [ONE],
    ),
    "a new id for each piece, the name once": (
        [calling(piece(0, '{"n"', id="c1", name="f")), calling(piece(0, ":1}", id="c2"))],
        [ONE],
    ),
    "an empty call before it": (
        [calling(piece(0, "", id="", name="")), calling(piece(0, '{"n":1}', id="c1", name="f"))],
        [ONE],
    ),
    "arguments before the name": (
        [calling(piece(0, '{"n":1}', id="c1")), calling(piece(0, "", name="f"))],
        [ONE],
    ),
    "the type at the end": (
        [calling(piece(0, '{"n":', id="c1", name="f")), calling(piece(0, "1}", type="function"))],
        [ONE],
    ),
    "every call under index 0": (
        [calling(piece(0, '{"n":1}', id="c1", name="f")), calling(piece(0, '{"n":2}', id="c2", name="g"))],
        [ONE, TWO],
    ),
    "no indexes": (
        [
            calling(piece(..., '{"n"', id="c1", name="f")),
            calling(piece(..., ":1}")),
            calling(piece(..., '{"n":2}', id="c2", name="g")),
        ],
        [ONE, TWO],
    ),
    "the arguments once more at the end": (
        [calling(piece(0, '{"n":1}', id="c1", name="f")), calling(piece(0, '{"n":1}'))],
        [ONE],
    ),
    "an empty object first": (
        [calling(piece(0, "{}", id="c1", name="f")), calling(piece(0, '{"n":1}'))],
        [ONE],
    ),
    "null for no arguments": ([calling(piece(0, "null", id="c1", name="f"))], [("f", {})]),
    "the older API's call": (
        [chunk(function_call={"name": "f", "arguments": '{"n"'}), chunk(function_call={"arguments": ":1}"})],
        [ONE],
    ),
}


@pytest.mark.parametrize("mode", ["whole", "stream"])
async def test_a_call_in_any_pieces_is_the_call_that_was_meant(start_gateway, fake, mode):
    gateway = await start_gateway(["a"], {"TOOL_CALLS": mode})
    needs_the_whole = {
        "the arguments once more at the end", "an empty object first", "null for no arguments",
        "an empty call before it", "arguments before the name",
    }  # fmt: skip
    for name, (parts, calls) in PIECES.items():
        if mode == "stream" and name in needs_the_whole:
            continue
        for before in ([ROLE], [ROLE, chunk("I look.")]):
            with case((name, len(before))):
                fake.script("a", sse(*before, *parts, CALLED))
                got = await gateway.stream(tools=TOOLS)
                made = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in got.calls]
                assert (made, got.finishes) == (calls, ["tool_calls"])
                assert len({c["id"] for c in got.calls}) == len(calls)


# What is said of a call in a whole answer, and the call that it is; None: nobody can know.
SPELLED = {
    "an empty object before": (("f", '{}{"n":1}'), ONE),
    "twice": (("f", '{"n":1}{"n":1}'), ONE),
    "two different ones": (("f", '{"n":1}{"n":2}'), None),
    "null": (("f", "null"), ("f", {})),
    "None": (("f", "None"), ("f", {})),
    "the model's mark behind": (("f", '{"n":1}<|call|>'), ONE),
    "a closing tag behind": (("f", '{"n":1}</tool_call>'), ONE),
    "words behind": (("f", '{"n":1} and so on'), None),
    "a list": (("f", "[1]"), None),
    "a namespace": (("functions.f", '{"n":1}'), ONE),
    "another namespace": (("default_api:f", '{"n":1}'), ONE),
    "a channel behind the name": (("f<|channel|>commentary", '{"n":1}'), ONE),
    "blanks around the name": ((" f\n", '{"n":1}'), ONE),
    "brackets behind the name": (("f()", '{"n":1}'), ONE),
    "a tool that nobody declared": (("zzz", '{"n":1}'), ("zzz", {"n": 1})),
}


async def test_a_call_of_any_spelling_is_the_call_that_was_meant_or_none(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    for name, ((called, arguments), meant) in SPELLED.items():
        function = {"name": called, "arguments": arguments}
        message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        }
        whole = body({**IDENTITY, "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})
        for streaming, reply in (
            (False, whole),
            (True, whole),
            (True, sse(calling(piece(0, arguments, id="c1", name=called)), CALLED)),
        ):
            with case((name, streaming)):
                fake.script("a", reply)
                got = await gateway.ask(streaming=streaming, model="a-model", tools=TOOLS)
                if meant is None:
                    assert got.text == "hello from b"
                    continue
                calls = got.calls if streaming else got.json["choices"][0]["message"]["tool_calls"]
                made = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]
                assert made == [meant]


# --- Text -----------------------------------------------------------------------------------------------------------

SUMMARY = {**IDENTITY, "object": "chat.completion"}
TEXTS = {
    "events on lines of their own": b"data: " + plain(HI) + b"\ndata: " + plain(THERE) + b"\n\n",
    "a second data: within": b"data: data: " + plain(HI) + b"\n\n" + event(THERE),
    "NaN beside the text": event(HI).replace(b'"finish_reason"', b'"score":NaN,"finish_reason"') + event(THERE),
    "an infinite number": event(HI).replace(b'"finish_reason"', b'"score":-Infinity,"finish_reason"') + event(THERE),
    "a byte that is no UTF-8": with_raw(b"h\xffi") + event(THERE),
    "a code beside every chunk": event({**HI, "code": 0, "message": "Success"}) + event({**THERE, "code": 0}),
    "a report of success between": event(HI) + event({"code": 0, "message": "Success", "sid": "x"}) + event(THERE),
    "an account of success": event({**HI, "base_resp": {"status_code": 0, "status_msg": ""}}) + event(THERE),
    "in an object of their own": event({"result": HI, "success": True}) + event({"data": THERE}),
    "an error that is none": event({**HI, "error": None}) + event({**THERE, "error": False}),
    "heartbeats of any form": event(HI) + b"data: null\n\ndata: {}\n\ndata: ping\n\ndata: true\n\n" + event(THERE),
    "a report without choices": event({**HI, "choices": [], "prompt_filter_results": []}) + event(HI) + event(THERE),
}  # fmt: skip


@pytest.mark.parametrize("before", [[], NINE], ids=["first", "tenth"])
async def test_no_text_is_lost_or_doubled(start_gateway, fake, before):
    gateway = await start_gateway(["a"])
    said = NINE_TEXT if before else ""
    for name, stream in TEXTS.items():
        with case(name):
            fake.script("a", sse(*before, stream, STOP))
            got = await gateway.stream()
            got.assert_whole(f"{said}hi there")
            assert all(type(c["choices"][0]["delta"]) is dict for c in got.chunks)
    with case("the whole message once more at the end"):
        message = {"role": "assistant", "content": f"{said}hi there"}
        again = {**SUMMARY, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        fake.script("a", sse(*before, HI, THERE, again))
        (await gateway.stream()).assert_whole(f"{said}hi there")


BODIES = {
    "NaN": '{"choices":[{"message":{"content":"hi"},"logprobs":{"x":NaN}}]}',
    "a line end within": '{"choices":[{"message":{"content":"h\ni"}}]}',
    "a byte that is no UTF-8": b'{"choices":[{"message":{"content":"h\xffi"}}]}',
    "within result": {"result": {"choices": [{"message": {"content": "hi"}}]}, "success": True, "errors": []},
    "within data": {"code": 200, "msg": "ok", "data": {"choices": [{"message": {"content": "hi"}}]}},
    "in a list": [
        {
            **SUMMARY,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
        }
    ],
}


async def test_a_whole_answer_in_any_wrapping_is_one_answer(start_gateway, fake):
    gateway = await start_gateway(["a"])
    for name, content in BODIES.items():
        for streaming in (False, True):
            with case((name, streaming)):
                fake.script("a", body(content))
                got = await gateway.ask(streaming=streaming)
                assert got.text.replace("\n", "") == "hi"
                assert streaming or type(got.json) is dict


# --- Errors ---------------------------------------------------------------------------------------------------------

NO_MONEY = {"status_code": 1008, "status_msg": "insufficient balance"}
ACCOUNTS = {
    "an account beside null choices": ({"choices": None, "base_resp": NO_MONEY}, "out_of_credit"),
    "an account alone": ({"base_resp": {"status_code": 1000, "status_msg": "unknown"}}, "wrapped"),
    "an error's code and words": ({"error_code": 17, "error_msg": "daily request limit reached"}, None),
    "a code beside empty choices": ({"code": 11200, "message": "no licence", "choices": []}, "wrapped"),
    "in a header": ({"header": {"code": 10013, "message": "refused", "sid": "x"}}, "wrapped"),
    "a list of details": ({"detail": [{"loc": ["body"], "msg": "field required"}]}, "wrapped"),
    "a code in words": ({"code": "Throttling.RateQuota", "message": "Requests rate limit exceeded"}, None),
}  # fmt: skip


async def test_an_error_accounted_for_in_a_vendors_own_form_is_one(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    for name, (told, kind) in ACCOUNTS.items():
        for streaming, reply in ((False, body(told)), (True, body(told)), (True, sse(told))):
            with case((name, streaming)):
                fake.script("a", reply)
                got = await gateway.ask(streaming=streaming)
                assert got.text == "hello from b"
                assert kind is None or got.headers["X-Fallback-Trail"] == f"a/a-model={kind}"
                await gateway.recovered()
        with case((name, "tenth")):
            fake.script("a", sse(*NINE, told))
            got = await gateway.stream()
            assert (got.text, got.finishes) == (NINE_TEXT, ["error"])
            await gateway.recovered()


async def test_a_chunk_in_another_language_than_json_is_a_failure_and_not_passed_over(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    odd = b"data: {'choices': [{'index': 0, 'delta': {'content': 'hi'}}]}\n\n"
    fake.script("a", sse(odd, THERE, STOP))
    assert (await gateway.stream()).text == "hello from b"
    await gateway.recovered()
    fake.script("a", sse(HI, odd, THERE, STOP))
    assert (await gateway.stream()).finishes == ["error"]


# --- Endings, counts, heads -----------------------------------------------------------------------------------------

ENDINGS = {
    "max_output_tokens": "length", "MAX_TOKENS": "length", "function_call": "stop", "tool-calls": "stop",
    "content_filter: RECITATION": "content_filter", "PROHIBITED_CONTENT": "content_filter", "refusal": "content_filter",
    "function_call_filter: UNEXPECTED_TOOL_CALL": "stop", "malformed_function_call": "stop",
}  # fmt: skip


async def test_an_ending_by_any_name_is_one_that_clients_know(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    for told, finish in ENDINGS.items():
        with case(told):
            fake.script("a", sse(HI, chunk(finish=told)))
            assert (await gateway.stream()).finishes == [finish]
    fake.script("a", sse(ROLE, chunk(finish="function_call_filter: MALFORMED_FUNCTION_CALL")))
    assert (await gateway.stream(tools=TOOLS)).text == "hello from b"


COUNTS = {
    "fractions": {"prompt_tokens": 3.0, "completion_tokens": 2.0, "total_tokens": 5.0},
    "texts": {"prompt_tokens": "3", "completion_tokens": "2"},
    "other names": {"input_tokens": 3, "output_tokens": 2},
    "no total": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": None},
}


async def test_tokens_are_told_as_whole_numbers_under_the_names_that_clients_read(start_gateway, fake):
    gateway = await start_gateway(["a"])
    message = {"role": "assistant", "content": "hi"}
    for name, usage in COUNTS.items():
        with case(name):
            whole = {"index": 0, "message": message, "finish_reason": "stop"}
            fake.script("a", body({**SUMMARY, "choices": [whole], "usage": usage}))
            assert (await gateway.chat()).json["usage"] == usage_of(3, 2)
            fake.script("a", sse(HI, STOP, {**IDENTITY, "choices": [], "usage": usage}))
            got = await gateway.stream(stream_options={"include_usage": True})
            assert [c["usage"] for c in got.chunks if c.get("usage")] == [usage_of(3, 2)]
            rows = await gateway.rows_of(got, 1)
            assert (rows[0]["input_tokens"], rows[0]["output_tokens"]) == (3, 2)


async def test_every_chunk_tells_its_moment_and_its_id_in_the_type_that_strict_clients_read(start_gateway, fake):
    gateway = await start_gateway(["a"])
    heads = ({"created": 1_700_000_000.25}, {"created": "1700000000"}, {"id": 7}, {"model": None}, {"created": None})
    for head in heads:
        for tools in (..., TOOLS):
            with case((head, tools is ...)):
                fake.script("a", sse(*({**c, **head} for c in (ROLE, HI, THERE, STOP))))
                got = await gateway.stream(tools=tools)
                got.assert_whole("hi there")
                for told in got.chunks:
                    assert type(told.get("created", 0)) is int and told.get("created", 1_700_000_000) == 1_700_000_000
                    assert type(told.get("id", "")) is str and type(told.get("model", "")) is str
