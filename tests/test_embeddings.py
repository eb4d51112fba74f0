"""SPEC 17.1 and 17.3: embeddings, in whatever form they are asked for, and never from another family."""

import json
import math
import struct
from base64 import b64decode, b64encode

import pytest
from conftest import Answer, assert_error, both_ways, case
from fake_provider import CUT, PAUSE, Reply, Request, body, error, raw
from strict_models import models

LENGTH = 4


def embedder(model_id: str = "e", family: str = "f", **more: object) -> dict:
    return {"model_id": model_id, "kind": "embedding", "family": family, "dimensions": LENGTH, **more}


def vector(seed: float) -> list[float]:
    return [seed, 0.5, -0.25, 1.0]


def packed(numbers: list[float]) -> str:
    return b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


def unpacked(text: str) -> list[float]:
    raw = b64decode(text)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def vectors(seed: float = 1.0, *, usage: bool = True, as_base64: bool = False, **root: object):
    """A provider's answer: a vector for each text, the last one first."""

    def reply(request: Request) -> Reply:
        assert request.path.endswith("/embeddings")
        texts = request.json["input"]
        count = len(texts) if isinstance(texts, list) and not isinstance(texts[0], int) else 1
        data = [{"object": "embedding", "index": n, "embedding": vector(seed + n)} for n in range(count)]
        if as_base64:
            data = [entry | {"embedding": packed(entry["embedding"])} for entry in data]
        told = {"object": "list", "data": data[::-1], "model": "own-name", **root}
        return body(told | ({"usage": {"prompt_tokens": 11, "total_tokens": 11}} if usage else {}))

    return reply


def platforms(*names: str, **families: str) -> dict:
    """Platforms with an embedding model each, of one family unless said otherwise, and a chat model."""
    return {n: {"models": [embedder(f"{n}-e", families.get(n, "f")), {"model_id": f"{n}-chat"}]} for n in names}


async def post(gateway, headers=None, **fields) -> Answer:
    request = {"model": "a-e", "input": "hello"} | fields
    sent = {name: value for name, value in request.items() if value is not ...}
    return await gateway.send(sent, path="/v1/embeddings", headers=headers)


def told(got: Answer) -> list[list[float]]:
    """The vectors, in an answer that is right by the openai client's own model."""
    assert got.status == 200, got.body
    models().CreateEmbeddingResponse.model_validate_json(json.dumps(got.json), strict=True)
    assert [entry["index"] for entry in got.json["data"]] == list(range(len(got.json["data"])))
    return [entry["embedding"] for entry in got.json["data"]]


async def test_texts_become_vectors_in_their_order(start_gateway, fake):
    gateway = await start_gateway(platforms("a"))
    fake.script("a", vectors())

    got = await post(gateway, input=["one", "two", "three"], user="u", input_type="passage")

    assert told(got) == [vector(1.0), vector(2.0), vector(3.0)]
    assert (got.json["object"], got.json["model"]) == ("list", "own-name")
    assert got.json["usage"] == {"prompt_tokens": 11, "total_tokens": 11}
    assert got.headers["X-Routed-Via"] == "a/a-e"
    assert fake.requests[0].path == "/a/v1/embeddings"
    assert fake.requests[0].json == {
        "model": "a-e", "input": ["one", "two", "three"], "user": "u", "input_type": "passage"
    }  # fmt: skip
    row = await gateway.row()
    assert (row["status"], row["model_id"], row["requested_model"]) == ("success", "a-e", "a-e")
    assert (row["input_tokens"], row["output_tokens"], row["streamed"]) == (11, 0, 0)


INPUTS = {"a text": "hi", "texts": ["a", "b"], "tokens": [1, 2, 3], "texts in tokens": [[1, 2], [3]]}


async def test_every_form_of_input_goes_out_as_it_came(start_gateway, fake):
    gateway = await start_gateway(platforms("a"))
    fake.script("a", vectors())
    for name, given in INPUTS.items():
        with case(name):
            fake.clear()
            assert len(told(await post(gateway, input=given))) == (2 if name.startswith("texts") else 1)
            assert fake.requests[0].json["input"] == given


@pytest.mark.parametrize("as_base64", [False, True], ids=["numbers", "base64"])
async def test_the_client_gets_the_form_it_asked_for_whatever_the_platform_gave(start_gateway, fake, as_base64):
    gateway = await start_gateway(platforms("a"))
    fake.script("a", vectors(as_base64=as_base64))

    assert told(await post(gateway)) == [vector(1.0)]
    assert told(await post(gateway, encoding_format="float")) == [vector(1.0)]
    coded = (await post(gateway, encoding_format="base64")).json["data"][0]["embedding"]

    assert unpacked(coded) == vector(1.0)
    assert all("encoding_format" not in request.json for request in fake.requests)


async def test_the_openai_client_reads_both(start_gateway, fake):
    gateway = await start_gateway(platforms("a"))
    fake.script("a", vectors())

    for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):  # it asks for base64 by itself
        got = await gateway.openai.embeddings.create(model="a-e", input=["x", "y"], **form)
        found = [entry.embedding for entry in got.data]
        if form.get("encoding_format") == "base64":
            found = [unpacked(text) for text in found]
        assert found == [vector(1.0), vector(2.0)]


async def test_usage_is_estimated_where_the_platform_tells_none(start_gateway, fake):
    gateway = await start_gateway(platforms("a"))
    fake.script("a", vectors(usage=False))

    assert (await post(gateway, input=["x" * 40, "y" * 40])).json["usage"] == {"prompt_tokens": 20, "total_tokens": 20}


# --- Families ---------------------------------------------------------------------------------------------------------

FAULTS = {
    "a 500": error(500),
    "a 429": error(429),
    "a 401": error(401),
    "a 400": error(400),
    "a 404": error(404),
    "a cut": raw(CUT),
    "silence": raw(PAUSE),
    "no JSON": body("<html>"),
    "an error in a 200": body({"error": {"message": "overloaded", "code": 503}}),
    "no vectors": body({"object": "list", "data": []}),
    "no list": body({"object": "list", "data": {}}),
    "a vector of words": body({"data": [{"index": 0, "embedding": ["x"]}]}),
    "half a vector": body({"data": [{"index": 0, "embedding": [0.1]}]}),
    "bad base64": body({"data": [{"index": 0, "embedding": "!!!"}]}),
    "a vector too many": body({"data": [{"index": n, "embedding": vector(1)} for n in range(2)]}),
    "a vector for another text": body({"data": [{"index": 5, "embedding": vector(1)}]}),
    "a chat answer": body({"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}]}),
}
SHORT_TIMES = {"REQUEST_TIMEOUT_MS": "300"}


@pytest.mark.parametrize("model", ["a-e", "a/a-e", "auto", "f"])
async def test_whatever_fails_another_route_of_the_same_family_answers_or_none(start_gateway, fake, model):
    gateway = await start_gateway(platforms("a", "b", "c", c="another"), SHORT_TIMES)
    fake.script("c", vectors(9.0))
    for name, reply in FAULTS.items():
        with case(name):
            await gateway.recovered()
            fake.clear()
            fake.script("a", reply)
            fake.script("b", vectors(2.0))
            assert told(await post(gateway, model=model)) == [vector(2.0)]
            fake.script("b", reply)
            await gateway.recovered()
            assert (await post(gateway, model=model)).status >= 400
            assert "c" not in fake.called


async def test_auto_means_the_same_family_every_time(start_gateway, fake):
    gateway = await start_gateway(platforms("a", "b", b="another"))
    fake.script("a", error(500), error(500), vectors())
    fake.script("b", vectors(9.0))

    statuses = [(await post(gateway, model=model)).status for model in ("auto", "auto-fast", ...)]

    assert all(status >= 500 for status in statuses)
    assert "b" not in fake.called
    await gateway.recovered()
    fake.script("a", vectors())
    got = await post(gateway, model="")
    assert (got.headers["X-Routed-Via"], told(got)) == ("a/a-e", [vector(1.0)])


async def test_auto_means_the_first_family_that_has_a_key(start_gateway, fake):
    gateway = await start_gateway(
        platforms("a", "b", "c", b="g", c="g") | {"a": {"models": [embedder("a-e")], "keys": []}}
    )
    fake.script("b", error(500))
    fake.script("c", vectors(3.0))

    assert told(await post(gateway, model="auto")) == [vector(3.0)]


async def test_the_same_id_in_another_family_is_another_model(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": embedder("e", "f")}, "b": {"model": embedder("e", "g")}})
    fake.script("a", error(500))
    fake.script("b", vectors(9.0))

    assert (await post(gateway, model="e")).status >= 500
    assert fake.called.count("b") == 0
    assert told(await post(gateway, model="b/e")) == [vector(9.0)]


async def test_the_same_family_in_another_length_is_another_model(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": embedder("a-e")}, "b": {"model": embedder("b-e", dimensions=8)}})
    fake.script("a", error(500))

    assert (await post(gateway, model="a-e")).status >= 500
    assert "b" not in fake.called


async def test_without_fallback_only_the_named_model_is_asked(start_gateway, fake):
    gateway = await start_gateway(platforms("a", "b"))
    fake.script("a", error(500))

    assert (await post(gateway, headers={"x-fallback": "none"})).status >= 500
    assert "b" not in fake.called


async def test_a_rate_limited_key_rests_as_for_chat(start_gateway, fake):
    gateway = await start_gateway(platforms("a", "b"))
    fake.script("a", error(429, headers={"retry-after": "60"}))
    fake.script("b", vectors(2.0))

    assert [told(await post(gateway))[0][0] for _ in range(3)] == [2.0] * 3
    assert fake.called == ["a", "b", "b", "b"]
    assert list(await gateway.cooled_keys()) == ["a-e"]


async def test_limits_count_as_for_chat(start_gateway, fake):
    limited = {"a": {"model": embedder("a-e", rpm=2)}, "b": {"model": embedder("b-e")}}
    gateway = await start_gateway(limited)
    fake.script("a", vectors(1.0))
    fake.script("b", vectors(2.0))

    assert [told(await post(gateway))[0][0] for _ in range(4)] == [1.0, 1.0, 2.0, 2.0]


async def test_no_vectors_come_from_memory(start_gateway, fake):
    gateway = await start_gateway(platforms("a"), {"CACHE_MB": "1"})
    fake.script("a", vectors(1.0), vectors(2.0))

    assert [told(await post(gateway))[0][0] for _ in range(2)] == [1.0, 2.0]


async def test_texts_go_only_to_those_who_do_not_train_on_them_where_that_is_asked_for(start_gateway, fake):
    gateway = await start_gateway(
        {
            "a": {"trains_on_prompts": True, "model": embedder("a-e")},
            "b": {"trains_on_prompts": False, "model": embedder("b-e")},
            "c": {"trains_on_prompts": True, "model": embedder("c-e", "g")},
        }
    )
    fake.script("b", vectors(2.0))
    private = {"x-privacy": "no-train"}

    assert told(await post(gateway, headers=private)) == [vector(2.0)]
    assert told(await post(gateway, headers=private, model="auto")) == [vector(2.0)]
    assert_error(await post(gateway, headers=private, model="c-e"), 403, "routing_error", "no_private_route")
    assert fake.called == ["b", "b"]


# --- Lengths ----------------------------------------------------------------------------------------------------------


async def test_a_length_that_is_asked_for_is_the_length_that_comes(start_gateway, fake):
    gateway = await start_gateway(
        {"a": {"model": embedder("a-e", dimensions=8)}, "b": {"model": embedder("b-e", dimensions=8)}}
    )
    fake.script("a", body({"data": [{"index": 0, "embedding": vector(1) * 2}]}))  # it has not listened
    fake.script("b", vectors(2.0))

    assert told(await post(gateway, dimensions=4)) == [vector(2.0)]
    assert [request.json["dimensions"] for request in fake.requests] == [4, 4]


async def test_a_platform_of_one_length_is_not_asked_for_another(start_gateway, fake):
    fixed = embedder("a-e", quirks={"drop": ["dimensions"]})
    gateway = await start_gateway({"a": {"model": fixed}, "b": {"model": embedder("b-e")}})
    fake.script("a", vectors(1.0))
    fake.script("b", body({"data": [{"index": 0, "embedding": [1.0, 0.0]}]}))

    assert told(await post(gateway, dimensions=LENGTH)) == [vector(1.0)]
    assert "dimensions" not in fake.requests[0].json
    assert told(await post(gateway, dimensions=2)) == [[1.0, 0.0]]
    assert fake.called == ["a", "b"]


async def test_more_texts_than_a_platform_takes_go_to_another_of_the_family_or_are_refused_in_words(
    start_gateway, fake
):
    small = embedder("a-e", quirks={"batch_max": 2})
    gateway = await start_gateway(
        {"a": {"model": small}, "b": {"model": embedder("b-e")}, "c": {"model": embedder("c-e", "g")}}
    )
    fake.script("a", vectors(1.0))
    fake.script("b", vectors(2.0))

    assert told(await post(gateway, input=["x"] * 2)) == [vector(1.0), vector(2.0)]
    assert len(told(await post(gateway, input=["x"] * 3))) == 3
    assert fake.called == ["a", "b"]
    got = await post(gateway, headers={"x-fallback": "none"}, input=["x"] * 3)
    assert got.status == 400
    assert "at most 2 texts" in got.error["message"]


async def test_vectors_are_brought_to_length_one_where_the_platform_does_not(start_gateway, fake):
    quirks = {"unit_vectors": True, "embeddings_path": "/openai/embeddings", "default": {"input_type": "query"}}
    gateway = await start_gateway({"a": {"adapter": "google", "model": embedder("a-e", quirks=quirks)}})
    fake.script("a", vectors())

    (found,) = told(await post(gateway))

    assert math.isclose(math.hypot(*found), 1.0)
    assert fake.requests[0].path == "/a/v1/openai/embeddings"
    assert fake.requests[0].key and "x-goog-api-key" not in fake.requests[0].headers
    assert fake.requests[0].json["input_type"] == "query"


async def test_what_a_platform_adds_to_chats_is_no_part_of_an_embedding(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"default": {"max_tokens": 8192}}, "model": embedder("a-e")}})
    fake.script("a", vectors())

    await post(gateway)

    assert fake.requests[0].json == {"model": "a-e", "input": "hello"}


# --- What is refused, and what is listed ------------------------------------------------------------------------------

REFUSED = {
    "nothing": ({"input": ...}, "input"),
    "null": ({"input": None}, "input"),
    "an empty text": ({"input": ""}, "input"),
    "an empty list": ({"input": []}, "input"),
    "an empty text among others": ({"input": ["a", ""]}, "input"),
    "a number": ({"input": 7}, "input"),
    "numbers that are no tokens": ({"input": [0.5]}, "input"),
    "texts and tokens": ({"input": ["a", [1]]}, "input"),
    "an object": ({"input": {"text": "a"}}, "input"),
    "too many": ({"input": ["a"] * 2049}, "input"),
    "a form that is none": ({"encoding_format": "int8"}, "encoding_format"),
    "a length that is none": ({"dimensions": 0}, "dimensions"),
    "half a length": ({"dimensions": 2.5}, "dimensions"),
    "a length beyond all": ({"dimensions": 10**9}, "dimensions"),
    "a model that is none": ({"model": 7}, "model"),
}


async def test_what_cannot_be_served_is_refused_with_the_name_of_the_field(start_gateway, fake):
    gateway = await start_gateway(platforms("a"))
    for name, (fields, param) in REFUSED.items():
        with case(name):
            got = await post(gateway, **fields)
            assert (got.status, got.error["type"], got.error["param"]) == (400, "invalid_request_error", param)
    for name in ("unknown", "a-chat", "a/a-chat"):
        with case(name):
            assert_error(await post(gateway, model=name), 400, "invalid_request_error", "model_not_found")
    assert fake.called == []


@both_ways
async def test_chat_never_goes_to_an_embedding_model(start_gateway, fake, streaming):
    gateway = await start_gateway({"a": {"model": embedder("a-e")}, "b": {}})

    for model in ("auto", "auto-smart", "auto-fast", "auto-priority", "b-model"):
        assert (await gateway.ask(streaming=streaming, model=model)).text == "hello from b"
    got = await gateway.ask(streaming=streaming, model="a-e")

    assert_error(got, 400, "invalid_request_error", "model_not_found")
    assert set(fake.called) == {"b"}


async def test_nobody_to_ask_is_told(start_gateway, fake):
    gateway = await start_gateway({"a": {}})

    assert_error(await post(gateway, model="auto"), 503, "routing_error", "no_providers")


async def test_every_model_is_listed_with_its_kind(start_gateway, fake):
    gateway = await start_gateway(platforms("a"))

    listed = {model["id"]: model for model in (await gateway.get("/v1/models")).json["data"]}

    assert (listed["a-e"]["kind"], listed["a-e"]["family"], listed["a-e"]["dimensions"]) == ("embedding", "f", LENGTH)
    assert {listed[id]["kind"] for id in ("auto", "auto-smart", "a-chat")} == {"chat"}
    assert (await gateway.get("/v1/models/a-e")).json == listed["a-e"]
    version = {"anthropic-version": "2023-06-01"}
    spoken = [model["id"] for model in (await gateway.get("/v1/models", headers=version)).json["data"]]
    assert "a-chat" in spoken and "a-e" not in spoken


# --- The demo ---------------------------------------------------------------------------------------------------------


async def test_the_demo_makes_vectors_without_a_key_and_says_what_it_is(start_gateway, fake):
    gateway = await start_gateway({})

    got = await post(gateway, model="auto", input=["one", "two", "one"])

    one, two, again = told(got)
    assert one == again != two
    assert len(one) == 256 and math.isclose(math.hypot(*one), 1.0, rel_tol=1e-6)
    assert "demo" in got.json["model"]
    assert got.headers["X-Routed-Via"].startswith("demo/")
    assert told(await post(gateway, model="auto", input="one")) == [one]
    assert len(told(await post(gateway, model="demo-embedding", input=[1, 2], dimensions=10))[0]) == 10
    (listed,) = [m for m in (await gateway.get("/v1/models")).json["data"] if m["id"] == "demo-embedding"]
    assert listed["kind"] == "embedding"
    coded = (await post(gateway, encoding_format="base64", model="auto", input="one")).json["data"][0]["embedding"]
    assert all(math.isclose(x, y, abs_tol=1e-6) for x, y in zip(unpacked(coded), one, strict=True))


async def test_the_demo_never_stands_in_for_a_real_model(start_gateway, fake):
    gateway = await start_gateway({"a": {}})

    assert (await post(gateway, model="auto")).status == 503
    assert "demo" in (await post(gateway, model="demo-embedding")).json["model"]


# --- What is asked of every request -----------------------------------------------------------------------------------


async def test_texts_that_nobody_may_train_on_go_to_nobody_who_might(start_gateway, fake):
    trains, safe = (
        {"trains_on_prompts": known, **platforms(name)[name]} for known, name in ((True, "a"), (False, "b"))
    )
    gateway = await start_gateway({"a": trains, "b": safe})
    fake.script("a", vectors(1.0))
    fake.script("b", vectors(2.0))
    private = {"X-Privacy": "no-train"}

    assert told(await post(gateway, private)) == [vector(2.0)]
    assert told(await post(gateway, private, model="auto")) == [vector(2.0)]
    assert_error(await post(gateway, private | {"X-Fallback": "none"}), 403, "routing_error", "no_private_route")
    assert fake.called == ["b", "b"]


async def test_a_request_for_vectors_is_explained_and_never_kept_in_memory(start_gateway, fake):
    gateway = await start_gateway(platforms("a", "b"), {"CACHE_MB": "1"})
    fake.script("a", vectors())
    await post(gateway)
    got = await post(gateway)
    assert (len(fake.requests), "X-Cache" in got.headers) == (2, False)

    explained = (await gateway.get(f"/api/requests/{got.headers['X-Request-Id']}/explain")).json

    asked = [c["model_id"] for c in explained["candidates"] if c["excluded"] is None]
    reasons = {c["model_id"]: c["excluded"] for c in explained["candidates"]}
    assert asked == ["a-e", "b-e"]
    assert reasons["a-chat"] == "serves chat only"
