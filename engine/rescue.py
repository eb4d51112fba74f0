"""How another route is asked to go on with an answer that broke (SPEC 14.4).

Three ways. *Prefill*: the delivered text stands last, as the assistant's own words, and the model goes on from there;
only some can. *Re-ask*: a user's message quotes the last words, the anchor, and asks for them again and then the rest;
every model can. *Again*: the request as it was, because too little has been delivered to go on from, or because nothing
but a restart could be checked. In each of them something that the client has is to come back first, and engine/seam.py
joins nothing before it has seen that. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from msgspec.structs import replace

from engine.story import Story
from engine.wording import UNSPACED, letter_start, plain, repeats_itself
from protection import Failure, UpstreamError
from routing.catalog import Model, Prefill
from wire.chat import CHARS_PER_TOKEN, Chat
from wire.jsontext import JSON

ANCHOR_CHARS_MIN = 10  # SPEC 14.4; fewer are found by chance
ANCHOR_CHARS = (40, 80, 120, 160, 200)  # 40 came back exactly in every published run; more where those are not unique
WHOLE_ANCHOR_CHARS = 60  # a text up to here is its own anchor: then to repeat and to start over are the same
WORD_CHARS_MAX = 20  # how far an anchor reaches back for the beginning of its first word
TAIL_CHARS_MAX = 40  # how much is held back of a prefill, to be expected back
UNSPACED_TAIL_CHARS = 4  # two words or three, in scripts without blanks
LONG_WORD_TAIL_CHARS = 8  # of one long word, such as an address
EFFORT_QUIRKS = ("effort_as_thinking", "effort_as_template", "reasoning_efforts", "thinking")
REFUSALS = (400, 422)

# In the user's voice: what looks like a message from a machine is taken for an attempt to trick the model.
REASK = """My connection broke off while your reply was coming in. The last that reached me is the passage between \
the two lines:
--------
{anchor}
--------
Please go on from exactly there. Begin by repeating that passage word for word, without the lines around it, and go \
straight on with what comes next, in the same language, tone and formatting. Do not start over, do not comment on \
this, and do not apologise. Begin a new paragraph only if the passage ends a sentence."""


class Way(StrEnum):
    """How the next route is asked."""

    AGAIN = "again"
    PREFILL = "prefill"
    REASK = "re-ask"


@dataclass(frozen=True, slots=True)
class Continuation:
    """One question for the rest of an answer."""

    chat: Chat
    way: Way
    cue: str  # the end of what was delivered that has to come back first: the tail, the anchor; "": all of it
    is_json: bool  # the whole answer must be JSON


def continuation(chat: Chat, story: Story, model: Model, *, prefill: bool = True) -> Continuation:
    """What to ask this model. `prefill` is false once it has refused one.

    An answer in JSON mode is never re-asked: between other words and JSON there is no seam that could be checked.
    """
    text, _ = story.text_and_half()
    is_json = "response_format" in chat.body
    again = Continuation(chat, Way.AGAIN, "", is_json)
    if not text.strip() or chat.body["messages"][-1]["role"] == "assistant":  # the client's own prefill
        return again
    if prefill and model.prefill is not Prefill.NONE and (at := cut(text)):
        given: list[JSON] = [{"role": "assistant", "content": text[:at]}]
        return Continuation(asked(chat, story, model.quirks, given, text[at:]), Way.PREFILL, text[at:], is_json)
    if not is_json and (cue := anchor(text)):
        given = [
            {"role": "assistant", "content": text},
            {"role": "user", "content": REASK.format(anchor=cue)},
        ]
        return Continuation(asked(chat, story, model.quirks, given, cue), Way.REASK, cue, is_json)
    return again


def asked(chat: Chat, story: Story, quirks: Mapping[str, Any], given: list[JSON], cue: str) -> Chat:
    """The request with these messages behind it, for the rest of the answer and the cue before it.

    The rest is text, so no call is forced; the model has thought already, or somebody has for it.
    """
    body: JSON = {**chat.body, "messages": [*chat.body["messages"], *given]}
    if body.get("tool_choice") not in (None, "auto", "none"):
        del body["tool_choice"]
    if "reasoning_effort" in body or any(quirks.get(name) for name in EFFORT_QUIRKS):
        body["reasoning_effort"] = "none"
    max_tokens, answer_tokens = chat.max_tokens, chat.need.tokens - chat.prompt_tokens
    if max_tokens is not None:
        body["max_tokens"] = max_tokens = answer_tokens = max(1, max_tokens - story.tokens) + tokens(cue)
    prompt_tokens = chat.prompt_tokens + sum(tokens(message["content"]) for message in given)
    need = replace(chat.need, tokens=prompt_tokens + answer_tokens)
    # In chat, whatever it came as: an endpoint for prompts would begin anew.
    return replace(chat, need=need, body=body, max_tokens=max_tokens, prompt_tokens=prompt_tokens, legacy=None)


def tokens(text: str) -> int:
    return -(-len(text) // CHARS_PER_TOKEN)


def refused_prefill(error: UpstreamError, asked: Continuation) -> bool:
    """Whether this failure says no more than that the model takes no prefill: then it is re-asked, and no failure of
    the model."""
    return asked.way is Way.PREFILL and error.failure is Failure.BAD_REQUEST and error.status in REFUSALS


# --- Where a text is taken up again ---------------------------------------------------------------------------------
def cut(text: str) -> int:
    """Where to cut a text for a prefill: the last word is held back, because a model that goes on from half a word
    goes on wrongly, and because the tail that then has to come back proves that it goes on at all. 0: nowhere.

    Nothing of white space is sent at the end: some servers refuse it. No tail is taken that the text also begins with,
    or a restart would look like going on.
    """
    whole = plain(text)
    for place in cuts(text.rstrip()):
        at = len(text[:place].rstrip())
        if at and not whole.startswith(plain(text[at:].rstrip())):
            return at
    return 0


def cuts(text: str) -> Iterator[int]:
    """The places that come into question, the last one first: before a word, then anywhere in a long one."""
    end = len(text)
    for at in range(end - 1, max(end - TAIL_CHARS_MAX, 0), -1):
        if text[at].isspace():
            yield at
        elif end - at >= UNSPACED_TAIL_CHARS and UNSPACED.match(text, at):
            yield letter_start(text, at)
    for length in range(LONG_WORD_TAIL_CHARS, TAIL_CHARS_MAX + 1, LONG_WORD_TAIL_CHARS):
        if length < end:
            yield letter_start(text, end - length)


def anchor(text: str) -> str:
    """The end of a text, as it stands, by which its place can be told; empty where nothing can: what is too short, or
    occurs twice, or repeats itself."""
    whole = plain(text).rstrip()
    for length in ANCHOR_CHARS:
        start = 0 if len(text) <= WHOLE_ANCHOR_CHARS else word_start(text, len(text) - length)
        passage = text[start:].lstrip()
        words = plain(passage).rstrip()
        found = whole.find(words)
        if len(words) >= ANCHOR_CHARS_MIN and found == len(whole) - len(words) and not repeats_itself(words):
            return passage
        if not start:
            break
    return ""


def word_start(text: str, at: int) -> int:
    """The beginning of the word around this place, unless it is far away."""
    if at <= 0:
        return 0
    for start in range(at, max(at - WORD_CHARS_MAX, 0), -1):
        if text[start - 1].isspace():
            return start
    return letter_start(text, at)
