"""SPEC 14.1 and 14.2: what the client has been given, what can be done about it, and what it amounts to."""

import pytest

from dialects.chat import chat_from
from engine.story import TEXT_CHARS_MAX, Continuable, Story
from wire.chat import Event, Tally, Usage, chunk_of

HEAD = {"id": "chatcmpl-1", "created": 1, "model": "m"}
CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}


def event(finish: str | None = None, head: dict = HEAD, **delta: object) -> Event:
    return Event(b"", chunk_of(head, delta, finish))


def story_of(*events: Event) -> Story:
    story = Story()
    story.feed(list(events))
    return story


def chat_of(**fields: object):
    return chat_from({"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields})


@pytest.mark.parametrize(
    ("events", "fields", "continuable"),
    [
        ([event(role="assistant", content="")], {}, Continuable.RESTART),
        ([event(content="Hel"), event(content="lo")], {}, Continuable.CONTINUE),
        ([event(reasoning_content="Hm")], {}, Continuable.RESTART),
        ([event(reasoning_content="Hm"), event(content="\n\n")], {}, Continuable.RESTART),
        ([event(reasoning_content="Hm"), event(content="Hel")], {}, Continuable.CONTINUE),
        ([event(content="Hel"), event(tool_calls=[CALL])], {}, Continuable.NO),
        ([event(tool_calls=[CALL])], {}, Continuable.NO),
        ([event(content="Hel"), event(refusal="I cannot")], {}, Continuable.NO),
        ([event(content="Hello"), event("stop")], {}, Continuable.NO),  # it is complete
        ([event("length", content="Hello")], {}, Continuable.NO),
        ([event(content="Hel"), event("content_filter")], {}, Continuable.NO),
        ([event(content="Hel")], {"logprobs": True}, Continuable.NO),
        ([event(content="Hel")], {"logprobs": False}, Continuable.CONTINUE),
        ([event(content='{"a"')], {"response_format": {"type": "json_object"}}, Continuable.CONTINUE),
        ([event(content="a" * TEXT_CHARS_MAX)], {}, Continuable.CONTINUE),
        ([event(content="a" * TEXT_CHARS_MAX), event(content="a")], {}, Continuable.NO),
    ],
)
def test_plain_text_is_continued_thoughts_alone_start_again_and_anything_else_is_let_be(events, fields, continuable):
    assert story_of(*events).continuable(chat_of(**fields)) is continuable


def test_a_story_knows_the_text_and_the_first_chunks_name():
    story = story_of(
        event(role="assistant", content="One"),
        Event(b"", {"choices": [{"index": 0, "delta": {"content": "\r\ntwo"}, "finish_reason": None}]}),
        Event(b"", {"choices": []}),
        event(content=" three\u2028", head={**HEAD, "id": "chatcmpl-2"}),
    )
    assert (story.delivered, story.chars) == ("One\r\ntwo three\u2028", 15)
    assert story.head == HEAD


def test_a_text_too_long_to_be_continued_is_not_kept():
    story = story_of(event(content="a" * TEXT_CHARS_MAX), event(content="b"), event(content="c"))
    assert (story.delivered, story.chars) == ("", TEXT_CHARS_MAX + 2)


def test_usage_is_the_prompt_of_the_first_and_the_completion_tokens_of_all():
    story = story_of(event(content="some text"))
    told = {"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}
    first = Tally(usage=Usage(11, 3), usage_object=told)
    second = Tally(text_chars=10)  # broke before it could say: three tokens, estimated
    last = Tally(usage=Usage(99, 7), finish="stop", usage_raw=b"data: its own", head={"id": "another"}, has_text=True)
    assert story.told(last, 5) is last  # there has been no other

    story.attempt_ended(first)
    story.attempt_ended(second)
    tally = story.told(last, 5)

    assert tally.usage_object == {
        "prompt_tokens": 11,
        "completion_tokens": 13,
        "total_tokens": 24,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    assert (tally.usage, tally.usage_raw, tally.head, tally.finish) == (Usage(11, 13), None, HEAD, "stop")


def test_a_prompt_that_nobody_counted_is_estimated():
    story = story_of(event(content="some text"))
    story.attempt_ended(Tally(text_chars=9))

    tally = story.told(Tally(usage=Usage(99, 7)), prompt_tokens=5)

    assert tally.usage == Usage(5, 10)
