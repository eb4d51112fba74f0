"""SPEC 14.5: where a second stream joins what the client has. Exactly the original, or nothing; never a wrong word."""

import re

import pytest
from continuing import (
    NONE,
    PLAIN,
    TEXTS,
    changes_white_space,
    continues_prefill,
    curls_quotes,
    diverged,
    diverges,
    doubles_blanks,
    goes_on_without_echo,
    has_preamble,
    refuses_prefill,
    repeats_anchor,
    repeats_anchor_twice,
    repeats_less,
    starts_over,
    starts_over_differently,
    straightens_quotes,
    trims_its_answer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dialects.chat import chat_from
from engine.place import Misfit
from engine.rescue import Continuation, Way, continuation
from engine.seam import HELD_CHARS_MAX, HELD_S, Seam
from engine.story import Story
from engine.wording import plain
from routing.catalog import Model
from wire.chat import Event, chunk_of

CHAT = chat_from({"messages": [{"role": "user", "content": "hi"}], "stream": True})
FIRST = {"id": "chatcmpl-first", "created": 1, "model": "first-model"}
SECOND = {"id": "chatcmpl-second", "created": 2, "model": "second-model"}
EITHER = [NONE, PLAIN]


def event(text: str | None = None, *, finish: str | None = None, head: dict = SECOND, **delta: object) -> Event:
    return Event(b"", chunk_of(head, delta if text is None else {"content": text, **delta}, finish))


def told(text: str) -> Story:
    story = Story()
    story.feed([event("", head=FIRST, role="assistant"), event(text, head=FIRST)])
    return story


def asked_for(story: Story, model, to: Model, chat=CHAT) -> tuple[Continuation, str]:
    """What the model was asked, and what it says; asked once more, where it takes no prefill."""
    asked = continuation(chat, story, to)
    said = model(asked.chat.body)
    if said is None:
        asked = continuation(chat, story, to, prefill=False)
        said = model(asked.chat.body)
    return asked, said


def text_of(events: list[Event]) -> str:
    return "".join(given.chunk["choices"][0]["delta"].get("content", "") for given in events)


def joined(story: Story, asked: Continuation, said: list[str]) -> str | Misfit:
    """The rest of the answer, or why there is none; the stream ends as it should."""
    seam, given = Seam(story, asked), []
    for number, piece in enumerate(said):
        if seam.joined:  # what comes behind the seam is only passed on: all at once is quicker
            given += seam.feed([event("".join(said[number:]))], 0.0).events
            break
        step = seam.feed([event(piece)], 0.0)
        given += step.events
        if step.misfit:
            assert not given, "something was sent of a stream that was given up"
            return step.misfit
    last = seam.feed([event(finish="stop")], 0.0)
    given += last.events
    if last.misfit:
        assert not given
        return last.misfit
    assert [g.chunk["choices"][0]["finish_reason"] for g in given if g.chunk["choices"][0]["finish_reason"]] == ["stop"]
    return text_of(given)


def in_pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def cut_everywhere(text: str, model, to: Model) -> list[tuple[int, str | Misfit]]:
    """The whole answer, or why there is none, for each character behind which the first provider may break off."""
    results: list[tuple[int, str | Misfit]] = []
    for cut in range(1, len(text) + 1):
        story = told(text[:cut])
        asked, said = asked_for(story, model, to)
        rest = joined(story, asked, in_pieces(said, (1, 5, 23, 100, 10_000)[cut % 5]))
        results.append((cut, rest if isinstance(rest, Misfit) else text[:cut] + rest))
    return results


ten_texts = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


@ten_texts
@pytest.mark.parametrize(
    ("model", "to"),
    [
        (continues_prefill, PLAIN),
        (starts_over, PLAIN),
        (starts_over, NONE),
        (repeats_anchor, NONE),
        (repeats_less, NONE),
        (changes_white_space, NONE),
        (doubles_blanks, NONE),
        (curls_quotes, NONE),
        (straightens_quotes, NONE),
        (lambda text: refuses_prefill(repeats_anchor(text)), PLAIN),
        (lambda text: refuses_prefill(starts_over(text)), PLAIN),
    ],
)
def test_an_answer_cut_behind_any_character_is_completed_to_the_letter(text, model, to):
    for cut, whole in cut_everywhere(text, model(text), to):
        assert whole == text, f"cut behind {cut}: {text[:cut]!r}"


@ten_texts
@pytest.mark.parametrize(
    ("model", "to"),
    [
        (starts_over_differently, NONE),
        (starts_over_differently, PLAIN),
        (has_preamble, NONE),
        (has_preamble, PLAIN),
    ],
)
def test_what_is_no_continuation_is_given_up_wherever_the_answer_was_cut(text, model, to):
    for cut, whole in cut_everywhere(text, model(text), to):
        assert isinstance(whole, Misfit), f"cut behind {cut}: {whole!r}"


@ten_texts
@pytest.mark.parametrize(
    ("model", "to"), [(goes_on_without_echo, NONE), (repeats_anchor_twice, NONE), (trims_its_answer, PLAIN)]
)
def test_what_cannot_be_joined_with_certainty_is_joined_exactly_or_given_up(text, model, to):
    for cut, whole in cut_everywhere(text, model(text), to):
        assert isinstance(whole, Misfit) or whole.rstrip() == text.rstrip(), f"cut behind {cut}: {whole!r}"


@ten_texts
@pytest.mark.parametrize("to", EITHER)
def test_a_restart_that_diverges_is_given_up_unless_the_client_has_nothing_that_it_lacks(text, to):
    other = diverged(text)
    for cut, whole in cut_everywhere(text, diverges(text), to):
        if other.startswith(text[:cut]):
            assert whole == other
        else:
            assert isinstance(whole, Misfit), f"cut behind {cut}: {whole!r}"


# --- Whatever the texts are -----------------------------------------------------------------------------------------
# Few letters and much white space: everything repeats, and seams fall everywhere.
NASTY = st.text(alphabet=[*"ab.", " ", "\n", "“", '"', "我", "😀", "\u0301", "\u200d"], max_size=120)


@st.composite
def cut_texts(draw):
    text = draw(NASTY.filter(lambda text: text.strip()))
    return text, draw(st.integers(1, len(text)))


@given(cut_texts(), st.integers(1, 30), st.sampled_from(EITHER))
@settings(max_examples=400)
def test_honest_models_complete_any_text_exactly(cut_text, size, to):
    text, cut = cut_text
    for model in (repeats_anchor, starts_over, continues_prefill):
        story = told(text[:cut])
        asked, said = asked_for(story, model(text), to)

        rest = joined(story, asked, in_pieces(said, size))

        assert rest == text[cut:] or (not text[:cut].strip() and rest == text[cut:].lstrip())


@given(NASTY.filter(lambda text: text.strip()), NASTY, st.integers(1, 30), st.sampled_from(EITHER))
@settings(max_examples=600)
def test_nothing_is_joined_but_what_the_new_stream_says_from_a_place_at_which_both_agree(delivered, said, size, to):
    """Whatever a model says: what the client has in the end closes with all of it, word for word."""
    story = told(delivered)
    asked = continuation(CHAT, story, to)

    rest = joined(story, asked, in_pieces(said, size))

    if not isinstance(rest, Misfit):
        assert plain(delivered + rest).rstrip().endswith(plain(said).strip())
    if asked.way is Way.PREFILL and not isinstance(rest, Misfit):
        before = asked.chat.body["messages"][-1]["content"]
        went_on = plain(before + said).rstrip() == plain(delivered + rest).rstrip()
        assert went_on or len(plain(said).strip()) >= 10 or plain(said).strip().startswith(plain(delivered).strip())


@given(cut_texts(), st.lists(st.integers(1, 40), max_size=10))
def test_how_the_new_stream_is_cut_into_chunks_makes_no_difference(cut_text, sizes):
    text, cut = cut_text
    for model in (repeats_anchor, starts_over, starts_over_differently, goes_on_without_echo):
        story = told(text[:cut])
        asked, said = asked_for(story, model(text), NONE)
        pieces, at = [], 0
        for size in sizes:
            pieces.append(said[at : at + size])
            at += size
        pieces = [piece for piece in (*pieces, said[at:]) if piece]

        in_one, in_many = (joined(story, asked, way) for way in ([said] if said else [], pieces))

        assert in_one == in_many or (isinstance(in_one, Misfit) and isinstance(in_many, Misfit))


# --- Single seams ---------------------------------------------------------------------------------------------------
LONG = "The harbour was quiet that night, and the lamps along the quay had been put out one by one; "
BEFORE = LONG + "only the dog"


@pytest.mark.parametrize(
    ("delivered", "said", "rest"),
    [
        (LONG + "one line\n", "{anchor}\nnext", "\nnext"),  # a paragraph's break, cut in the middle
        (LONG + "one line\n\n", "{anchor}next", "next"),
        (LONG + "one line\n\n", "{stripped}\n\nnext", "next"),
        (LONG + "one line\n\n", "{stripped}\nnext", "next"),
        (LONG + "one line\n\n", "{stripped} next", "next"),
        (LONG + "one line", "{anchor}\n\nnext", "\n\nnext"),
        (LONG + "one line ", "{stripped}\nnext", "\nnext"),
        (LONG + "if x:\n  ", "{stripped}\n    return", "  return"),
        (LONG + "if x:\n  ", "{stripped}\n\n    return", "\n    return"),
        (LONG + "if x:\n    ", "{stripped}\n  return", Misfit.WHITE_SPACE),  # indented less than it already is
        (LONG + "quick ", "{stripped}ly", Misfit.WHITE_SPACE),  # another word
        (LONG + "quick", "{anchor}ly", "ly"),
        (LONG + "one line\r", "{stripped}\r\nnext", "\nnext"),
        (LONG + "thus: ```py\nx = 1\ny =", "```python\n{anchor} 2\n```", " 2\n```"),  # opens the block again
        (LONG + "thus: x = 1 and y =", "```python\n{anchor} 2\n```", Misfit.OTHER_WORDS),  # there is no block
        (BEFORE, "…{anchor} barked", Misfit.OTHER_WORDS),
        (BEFORE, "«{anchor}» barked", Misfit.OTHER_WORDS),  # who knows what it means to quote
        (BEFORE, "\n {anchor} barked", " barked"),
        (BEFORE, "only the dog barked", " barked"),  # less than the anchor, yet enough
        (BEFORE, "the dog barked", Misfit.OTHER_WORDS),  # too little
        (BEFORE, " barked", Misfit.OTHER_WORDS),  # nothing to join it by
        (BEFORE, "", Misfit.ENDED),
        (BEFORE, "{anchor}", ""),  # it had been at its end
        (BEFORE, "put out one by one; only the d", Misfit.ENDED),
        (BEFORE, LONG + "only the dog barked", " barked"),
        (BEFORE, LONG + "only the cat", Misfit.DIVERGED),
    ],
)
def test_a_reasked_model_is_joined_at_its_echo(delivered, said, rest):
    story = told(delivered)
    asked = continuation(CHAT, story, NONE)
    said = said.format(anchor=asked.cue, stripped=asked.cue.rstrip()) if "{" in said else said
    for size in (1, 3, 1000):
        assert joined(story, asked, in_pieces(said, size)) == rest


@pytest.mark.parametrize(
    ("delivered", "said", "rest"),
    [
        ("The quick bro", " brown fox", "wn fox"),
        ("The quick bro", " red fox", Misfit.OTHER_WORDS),  # goes on, but not with what the client has
        ("The quick bro", "brown fox", Misfit.OTHER_WORDS),  # or is it a new answer that begins so
        ("The quick bro", "wn fox", Misfit.OTHER_WORDS),  # of which word?
        ("The quick bro", "The quick brown fox", "wn fox"),  # some repeat the prefill
        ("The quick ", " quick brown", "brown"),
        ("The quick ", " quickly", Misfit.WHITE_SPACE),
        ("The quick.", " quick. Then", " Then"),
        ("See https://example.org/a", " https://example.org/abc", "bc"),
        ("See https://example.org/a", "https://example.org/abc", "bc"),  # trimmed, but long enough to be sure
        ("今天天气很好，我们去公园散", "去公园散步吧", "步吧"),
        ("今天天气很好，我们去公园散", "今天天气很好，我们去公园散步", "步"),
        ("今天天气很好，我们去公园散", "步吧", Misfit.OTHER_WORDS),
        ("if x:\n    return", "\n    return 1", " 1"),
    ],
)
def test_a_prefilled_model_is_joined_at_the_tail_that_was_held_back(delivered, said, rest):
    story = told(delivered)
    asked = continuation(CHAT, story, PLAIN)
    assert asked.way is Way.PREFILL
    for size in (1, 3, 1000):
        assert joined(story, asked, in_pieces(said, size)) == rest


@pytest.mark.parametrize(
    ("delivered", "said", "rest"),
    [
        ("H", "Hello", "ello"),
        ("Hello ", "Hello there", "there"),
        ("Hello ", "Hellooo", Misfit.WHITE_SPACE),
        ("Hello", "Hi there", Misfit.OTHER_WORDS),
        ("Hello", "Hell", Misfit.ENDED),
        ("\n\n", "\n\nHello", "Hello"),  # white space alone is no text yet
        ("ha ha ha ha ha ha ha ha ha ha ha ", "ha ha ha ha ha ha ha ha ha ha ha ha", "ha"),  # by which no place is told
        ("=" * 300, "=" * 400 + "\nend", "=" * 100 + "\nend"),
        ("=" * 300, "=" * 200 + "\nend", Misfit.DIVERGED),
    ],
)
def test_a_model_that_is_asked_again_has_to_say_what_the_client_has(delivered, said, rest):
    story = told(delivered)
    asked = continuation(CHAT, story, NONE)
    assert asked.way is Way.AGAIN
    for size in (1, 3, 1000):
        assert joined(story, asked, in_pieces(said, size)) == rest


@pytest.mark.parametrize("to", EITHER)
@pytest.mark.parametrize("size", [1, 2, 1000])
def test_an_emoji_whose_halves_come_from_two_providers_is_one(to, size):
    text = LONG + "and the moon 🌙🌙 rose"
    moon = text.index("🌙")
    story = told(text[:moon] + "\ud83c")
    for model in (repeats_anchor, starts_over, continues_prefill):
        asked, said = asked_for(story, model(text), to)
        units = said.encode("utf-16-le", "surrogatepass")
        pieces = [
            units[at : at + 2 * size].decode("utf-16-le", "surrogatepass") for at in range(0, len(units), 2 * size)
        ]

        rest = joined(story, asked, pieces)

        assert not isinstance(rest, Misfit)
        whole = (story.delivered + rest).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        assert whole == text
    other = text.replace("🌙", "😀")
    asked, said = asked_for(story, starts_over(other), to)
    assert isinstance(joined(story, asked, in_pieces(said, size)), Misfit)


# --- What else a stream brings --------------------------------------------------------------------------------------
def test_the_rest_is_in_the_first_streams_name_and_says_no_role_and_no_thoughts():
    story = told(BEFORE)
    asked = continuation(CHAT, story, NONE)
    seam = Seam(story, asked)
    thoughts = event(role="assistant", reasoning_content="Where was I?")
    events = [thoughts, event(asked.cue, role="assistant"), event(" barked"), event(".", finish="length")]

    given = [g for e in events for g in seam.feed([e], 0.0).events]

    assert [g.chunk["choices"][0]["delta"] for g in given] == [{"content": " barked"}, {"content": "."}, {}]
    assert [g.chunk["choices"][0]["finish_reason"] for g in given] == [None, None, "length"]
    for g in given:
        assert {name: g.chunk[name] for name in FIRST} == FIRST
        assert g.raw.startswith(b"data: {") and b"second" not in g.raw


def test_a_call_behind_the_seam_goes_on_and_one_before_it_is_given_up():
    story = told(BEFORE)
    asked = continuation(CHAT, story, NONE)
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    step = Seam(story, asked).feed([event(asked.cue), event(tool_calls=[call]), event(finish="tool_calls")], 0.0)
    assert [g.chunk["choices"][0]["delta"] for g in step.events] == [{"tool_calls": [call]}, {}]

    step = Seam(story, asked).feed([event(tool_calls=[call])], 0.0)
    assert step.misfit and not step.events


def test_an_answer_that_had_only_thoughts_starts_again_without_the_second_ones():
    story = Story()
    story.feed([event(head=FIRST, role="assistant", reasoning_content="Hm.")])
    asked = continuation(CHAT, story, PLAIN)
    assert asked == Continuation(CHAT, Way.AGAIN, "", False)

    step = Seam(story, asked).feed([event(reasoning_content="Let me see."), event("Any"), event("thing")], 0.0)

    assert text_of(step.events) == "Anything"


@pytest.mark.parametrize(
    ("said", "misfit"),
    [("only", Misfit.TOO_LATE), (LONG[:39], Misfit.TOO_LATE), (LONG[:60], None), ("only the dog barked", None)],
)
def test_three_seconds_from_the_first_word_a_match_must_have_been_found(said, misfit):
    story = told(BEFORE)
    seam = Seam(story, continuation(CHAT, story, NONE))
    assert seam.feed([event(" ", reasoning_content="a long thought")], 0.0).misfit is None
    assert seam.feed([], 60.0).misfit is None  # thinking is no text

    assert seam.feed([event(said)], 60.0).misfit is None
    assert seam.feed([], 60.0 + HELD_S).misfit is None
    assert seam.feed([], 60.1 + HELD_S).misfit is misfit


def test_no_more_than_240_characters_are_held_back_without_a_match():
    story = told(BEFORE)
    seam = Seam(story, continuation(CHAT, story, NONE))
    assert seam.feed([event(" " * HELD_CHARS_MAX)], 0.0).misfit is None
    assert seam.feed([event(" ")], 0.0).misfit is Misfit.TOO_LONG


def test_a_restart_of_a_long_answer_is_followed_for_as_long_as_it_takes():
    words = " ".join(f"word{number}" for number in range(20_000))
    cut = len(words) // 2
    story = told(words[:cut])
    asked = continuation(CHAT, story, NONE)
    assert joined(story, asked, in_pieces(re.sub(r"(9\d*) ", r"\1\n", words), 5_000)) == re.sub(
        r"(9\d*) ", r"\1\n", words[cut:]
    )
    assert joined(story, asked, in_pieces(words.replace("word7000", "word"), 5_000)) is Misfit.DIVERGED


@pytest.mark.parametrize("finish", ["stop", None])
@pytest.mark.parametrize(
    ("to", "said", "whole"),
    [
        (NONE, '{"a": 1, "b": 2}', True),  # asked again
        (NONE, '{"a": 1, "c": 2}', True),  # another answer, but all the client has fits
        (NONE, '{"b": 1}', False),
        (PLAIN, ' 1, "b": 2}', True),
        (PLAIN, ' 1, "b": 2', False),  # is no JSON as a whole
        (NONE, '{"a": 1, "b": 2} and that is all', False),
        (NONE, '{"a": 1, "b": 2}\n', True),
        (PLAIN, '{"a": 1, "b": 2}', True),
    ],
)
def test_a_json_answer_goes_on_by_prefill_or_by_an_equal_restart_and_must_parse(to, said, whole, finish):
    body = {"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_object"}}
    story = told('{"a": 1')
    asked = continuation(chat_from(body), story, to)
    assert asked.way is (Way.PREFILL if to is PLAIN else Way.AGAIN)

    seam = Seam(story, asked)
    steps = [seam.feed([event(piece)], 0.0) for piece in said]
    last = seam.feed([event(finish=finish)], 0.0) if finish else seam.end()

    assert (last.misfit is None and not any(step.misfit for step in steps)) is whole
    assert story.spoilt is (last.misfit is Misfit.NOT_JSON)


@pytest.mark.parametrize(
    ("delivered", "more", "whole"),
    [
        ("Use a guard, like this:\n\n```python\ndef half(n):\n    return n", "", False),
        ("Use a guard, like this:\n\n```python\ndef half(n):\n    return n", "\n", False),
        ("Use a guard, like this:\n\n```python\ndef half(n):\n    return n", "\n```", True),
        ("Of all the towns we saw in those three weeks,", "", False),
        ("Of all the towns we saw in those three weeks,", " one.", True),
        ("All that has come is the whole answer, but not how it ended.", "", True),
        ("The last word of a heading may be the end of it", "", True),  # nobody can tell
    ],
)
@pytest.mark.parametrize("finish", ["stop", None])
def test_a_model_that_repeats_the_anchor_and_stops_where_no_answer_ends_is_given_up(delivered, more, whole, finish):
    story = told(delivered)
    asked = continuation(CHAT, story, NONE)
    seam = Seam(story, asked)
    step = seam.feed([event(asked.cue + more)], 0.0)
    last = seam.feed([event(finish=finish)], 0.0) if finish else seam.end()

    assert step.misfit is None
    assert last.misfit is (None if whole else Misfit.ENDED)


def test_a_stream_that_ends_without_a_word_of_how_is_given_up_unless_it_had_joined():
    story = told(BEFORE)
    asked = continuation(CHAT, story, NONE)
    seam = Seam(story, asked)
    seam.feed([event("only")], 0.0)
    assert seam.end().misfit is Misfit.ENDED
    seam = Seam(story, asked)
    assert seam.feed([event(asked.cue + " barked")], 0.0).events
    assert seam.end().misfit is None


def test_an_answer_that_changed_providers_twice_is_one(text=LONG + BEFORE + " barked, twice, and was silent."):
    story = told(text[:100])
    for cut in (150, 200, len(text)):
        asked, said = asked_for(story, repeats_anchor(text), NONE)
        until = len(said) - (len(text) - cut)
        step = Seam(story, asked).feed([event(said[:until])], 0.0)
        story.feed(step.events)
    assert story.delivered == text
