"""SPEC 14.4: how another route is asked to go on with an answer, down to the body that reaches its provider."""

import json
import time
from dataclasses import replace

import pytest
from conftest import default_key
from continuing import NONE, PLAIN

from adapters.registry import ADAPTERS
from config.catalog_files import load_catalog
from config.settings import load_settings
from dialects.chat import chat_from
from engine.rescue import Way, anchor, continuation, cut, refused_prefill
from engine.story import Story
from protection import Failure, UpstreamError
from routing.catalog import Key, Model, Prefill
from wire.chat import Event, chunk_of

TEXT = "The harbour was quiet that night, and the lamps along the quay had been put out; only the do"
USER = {"role": "user", "content": "Tell me a story."}
LOCAL = {"VLLM_BASE_URL": "http://127.0.0.1:1/v1", "LLAMACPP_BASE_URL": "http://127.0.0.1:2/v1"}


def chat_of(**fields: object):
    return chat_from({"messages": [USER], "stream": True, **fields})


def told(text: str, **delta: object) -> Story:
    story = Story()
    story.feed([Event(b"", chunk_of({"id": "c"}, {"content": text, **delta}))])
    return story


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    return load_catalog(load_settings([], LOCAL, tmp_path_factory.mktemp("none")), ADAPTERS)


def model_named(catalogue, label: str) -> Model:
    """A model of the built-in catalogue; of a platform that lists its own, any."""
    for model in catalogue.models:
        if model.label == label:
            return model
    platform = catalogue.platforms[label]
    return replace(catalogue.models[0], platform=platform, quirks=platform.quirks, prefill=platform.prefill)


def sent(model: Model, chat) -> dict:
    adapter = ADAPTERS[model.platform.adapter](time.time)
    return json.loads(adapter.request(model, Key(1, model.platform.id, default_key("x")), chat).body)


PREFIX = TEXT.removesuffix(" do")
PREFILLED = {
    "groq/qwen/qwen3.8-27b": {"role": "assistant", "content": PREFIX},
    "mistral/mistral-small-latest": {"role": "assistant", "content": PREFIX, "prefix": True},
    "llamacpp": {"role": "assistant", "content": PREFIX},
    "vllm": {"role": "assistant", "content": PREFIX},
}


@pytest.mark.parametrize(("label", "last"), PREFILLED.items(), ids=PREFILLED)
def test_a_prefill_stands_last_cut_at_a_word_in_the_platforms_own_form(catalogue, label, last):
    model = model_named(catalogue, label)
    asked = continuation(chat_of(), told(TEXT), model)

    body = sent(model, asked.chat)

    assert (asked.way, asked.cue) == (Way.PREFILL, " do")
    assert body["messages"] == [USER, last]
    flags = {name: body.get(name) for name in ("continue_final_message", "add_generation_prompt")}
    vllm = label == "vllm"
    assert flags == {"continue_final_message": True if vllm else None, "add_generation_prompt": False if vllm else None}


def test_a_prefill_is_the_last_turn_of_the_model_on_the_wire_that_has_turns(catalogue):
    model = model_named(catalogue, "google/gemini-3.5-flash")
    asked = continuation(chat_of(reasoning_effort="high"), told(TEXT), model)

    body = sent(model, asked.chat)

    assert body["contents"][-1] == {"role": "model", "parts": [{"text": PREFIX}]}
    assert body["generationConfig"]["thinkingConfig"]["thinkingLevel"] == "MINIMAL"


@pytest.mark.parametrize("label", ["google/gemini-3.8-flash", "groq/openai/gpt-oss-120b", "cerebras/gpt-oss-120b"])
def test_models_that_take_no_prefill_are_reasked_by_the_anchor(catalogue, label):
    model = model_named(catalogue, label)
    asked = continuation(chat_of(), told(TEXT + "g\n"), model)

    assert asked.way is Way.REASK
    *_, before, last = asked.chat.body["messages"]
    assert before == {"role": "assistant", "content": TEXT + "g\n"}
    assert last["role"] == "user"
    assert asked.cue in last["content"]
    assert (TEXT + "g\n").endswith(asked.cue)
    assert len(asked.cue) >= 40
    assert sent(model, asked.chat)


@pytest.mark.parametrize("form", ["plain", "prefix", "partial", "continue_final_message"])
def test_a_clients_own_prefill_is_marked_like_one_of_ours(catalogue, form):
    model = model_named(catalogue, "vllm")
    model = replace(model, prefill=Prefill(form))

    body = sent(model, chat_of(messages=[USER, {"role": "assistant", "content": "Once "}]))

    marks = {form: True} if form in ("prefix", "partial") else {}
    content = "Once" if form == "continue_final_message" else "Once "
    assert body["messages"][-1] == {"role": "assistant", "content": content} | marks
    assert body.get("continue_final_message") == (True if form == "continue_final_message" else None)


def test_the_rest_is_asked_for_without_forced_calls_without_new_thoughts_and_within_the_limit(catalogue):
    tools = [{"type": "function", "function": {"name": "f"}}]
    chat = chat_of(max_tokens=1000, tools=tools, tool_choice="required", seed=7, stop=["END"], temperature=0.5)
    story = told(TEXT, reasoning_content="x" * 400)

    asked = continuation(chat, story, replace(NONE, quirks={"reasoning_efforts": ["none", "high"]}))

    body = asked.chat.body
    assert "tool_choice" not in body
    kept = ("tools", "seed", "stop", "temperature")
    assert {name: body[name] for name in kept} == {name: chat.body[name] for name in kept}
    assert body["reasoning_effort"] == "none"
    assert body["max_tokens"] == asked.chat.max_tokens == 1000 - story.tokens + -(-len(asked.cue) // 4)
    assert story.tokens == -(-(len(TEXT) + 400) // 4)
    assert not any("reasoning_content" in message for message in body["messages"])
    assert asked.chat.prompt_tokens > chat.prompt_tokens + len(TEXT) // 4
    assert asked.chat.need.tokens == asked.chat.prompt_tokens + body["max_tokens"]
    assert chat.body["tool_choice"] == "required"  # the client's own request is as it was


def test_effort_is_not_told_to_models_that_may_not_know_the_word():
    assert "reasoning_effort" not in continuation(chat_of(), told(TEXT), NONE).chat.body
    assert continuation(chat_of(reasoning_effort="low"), told(TEXT), NONE).chat.body["reasoning_effort"] == "none"
    chat = chat_of(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none")
    assert continuation(chat, told(TEXT), NONE).chat.body["tool_choice"] == "none"


def test_a_limit_that_is_used_up_still_leaves_room_for_the_anchor_and_a_token():
    asked = continuation(chat_of(max_tokens=5), told(TEXT), NONE)
    assert asked.chat.max_tokens == 1 + -(-len(asked.cue) // 4)


@pytest.mark.parametrize(
    ("text", "model", "fields"),
    [
        ("", PLAIN, {}),  # thoughts alone
        (" \n", PLAIN, {}),
        ("Hello", PLAIN, {}),  # no word stands before the last
        ("Hello wo", NONE, {}),  # too short for an anchor
        (TEXT, NONE, {"response_format": {"type": "json_object"}}),
        (TEXT, PLAIN, {"messages": [USER, {"role": "assistant", "content": "Once"}]}),
    ],
)
def test_where_nothing_can_be_gone_on_from_the_request_is_made_again_as_it_was(text, model, fields):
    chat = chat_of(**fields)
    asked = continuation(chat, told(text), model)
    assert (asked.way, asked.cue, asked.chat) == (Way.AGAIN, "", chat)


@pytest.mark.parametrize(
    ("failure", "status", "way", "refused"),
    [
        (Failure.BAD_REQUEST, 400, Way.PREFILL, True),
        (Failure.BAD_REQUEST, 422, Way.PREFILL, True),
        (Failure.BAD_REQUEST, 413, Way.PREFILL, False),
        (Failure.CONTEXT_LENGTH, 400, Way.PREFILL, False),
        (Failure.CONTENT_FILTER, 400, Way.PREFILL, False),
        (Failure.AUTH, 400, Way.PREFILL, False),
        (Failure.SERVER_ERROR, 500, Way.PREFILL, False),
        (Failure.BAD_REQUEST, 400, Way.REASK, False),
    ],
)
def test_a_400_to_a_prefill_says_nothing_of_the_model(failure, status, way, refused):
    asked = continuation(chat_of(), told(TEXT), PLAIN if way is Way.PREFILL else NONE)
    assert asked.way is way
    assert refused_prefill(UpstreamError(failure, "no", status=status), asked) is refused


def test_after_a_refused_prefill_the_model_is_reasked():
    asked = continuation(chat_of(), told(TEXT), PLAIN, prefill=False)
    assert asked.way is Way.REASK


# --- Where a text is taken up again ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "sent", "tail"),
    [
        ("The quick bro", "The quick", " bro"),
        ("The quick brown", "The quick", " brown"),  # it may be half of a longer word
        ("The quick. ", "The", " quick. "),
        ("One.\n\n  Two", "One.", "\n\n  Two"),
        ("One", "", "One"),
        ("The way. The", "The way.", " The"),
        ("今天天气很好，我们去公园散步", "今天天气很好，我们去", "公园散步"),
        ("Hallo 今天天气很好", "Hallo 今天", "天气很好"),
        ("See https://example.org/" + "a" * 60, "See https://example.org/" + "a" * 52, "a" * 8),
        ("😀🎉👨‍👩‍👧ab", "😀🎉", "👨‍👩‍👧ab"),  # no picture is torn
        ("The The", "The", " The"),
        (" a b a", " a", " b a"),  # a tail that the text also begins with would not tell going on from a restart
    ],
)
def test_a_prefill_is_cut_before_the_last_word(text, sent, tail):
    at = cut(text)
    assert (text[:at], text[at:]) == (sent, tail) or (not sent and not at)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("too short", ""),
        ("just long enough", "just long enough"),
        ("a" * 500, ""),  # by which no place is told
        ("|---" * 100, ""),
        (TEXT, "the quay had been put out; only the do"),
        ("x. " + "the same words over and over again here. " * 20, ""),
    ],
)
def test_an_anchor_is_the_end_of_the_text_by_which_its_place_is_told(text, found):
    assert anchor(text).endswith(found) if found else anchor(text) == ""


def test_an_anchor_reaches_back_until_it_is_found_only_once():
    line = "and the lamps along the quay had been put out;\n"
    text = "It was night, " + line * 2 + "It was late, " + line
    assert line.strip() in anchor(text)
    assert "late" in anchor(text)
    assert text.count(anchor(text)) == 1
