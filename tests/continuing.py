"""Models that are asked to go on with another's answer, and each way in which they take it.

A model here is a function from the body of a request, in OpenAI's chat form, to what it writes: `repeats_anchor(TEXT)`
and so on. None stands for a 400 to a prefill. `TEXTS` are what is written. `served` puts a model behind a real socket,
where it may also break off: at a character, in one of the ways of `BREAKS`.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace

from conftest import Stream
from fake_provider import (
    CUT,
    PAUSE,
    RESET,
    ROLE,
    STOP,
    Reply,
    ReplyTo,
    Request,
    Wait,
    chunk,
    error,
    event,
    raw,
    sse,
    usage_chunk,
)

from routing import catalog as catalogue

# Models as routing knows them: one that takes no prefill, and one that does.
NONE = catalogue.Model(
    1, catalogue.Platform("p", "P", "openai", "http://127.0.0.1:1/v1"), "m", "M", 1, 1, 100_000, None, None, None, None,
    None, True, True, frozenset(), frozenset(), True, 1, True,
)  # fmt: skip
PLAIN = replace(NONE, prefill=catalogue.Prefill.PLAIN)

Model = Callable[[dict], str | None]

TEXTS = {
    "prose": "The ship left at dawn.  Nobody on the quay said a word; “let them go,” the pilot's wife had told us, and "
    "so we did.\n\nThree weeks later, on a Tuesday, a letter came.",
    "code": "Use a guard:\n\n```python\ndef half(n):\n    if n % 2:\n        raise ValueError(f\"odd: {n}\")\n\n"
    "    return n // 2\n```\n\nThen call `half(10)`; it gives 5.",
    "list": "What to pack:\n\n1. **Boots**, waxed\n   - spare laces\n   - wool socks (2 pairs)\n2. A map\n3. Rope, "
    "20 m\n\n* * *\n\nLeave the rest.",
    "table": "| City   | Inhabitants | Since |\n|--------|------------:|-------|\n| Bergen |     291,189 | 1070  |\n"
    "| Molde  |      32,816 | 1742  |\n| Narvik |      21,580 | 1902  |\n\nAs of 2024.",
    "chinese": "人工智能正在改变我们的生活。从医疗到教育，“机器学习”已经无处不在；不过，它也带来了新的问题：谁来"
    "负责？\n\n第一，数据必须可靠。第二，模型要能够解释自己的决定。",
    "arabic": "كانَ يا ما كان، في قديم الزمان، تاجرٌ يسافر من بغداد إلى دمشق. قال له صديقه: «لا تنسَ الماء»، فضحك "
    "التاجر ومضى.\n\nوفي الطريق، عند البئر الثالثة، وجد ما لم يكن يتوقعه.",
    "json in prose": "Here is the record you asked for:\n\n{\"id\": 17, \"name\": \"O'Neil\", \"tags\": [\"a\", "
    "\"b\"],\n \"nested\": {\"on\": true, \"ratio\": -0.25e3}}\n\nIt has two tags.",
    "maths": "For $a > 0$ the roots are $$x_{1,2} = \\frac{-b \\pm \\sqrt{b^2 - 4ac}}{2a}$$ and so\n\\[\n  x_1 + x_2 = "
    "-\\frac{b}{a}, \\qquad x_1 x_2 = \\frac{c}{a}.\n\\]\nQ.E.D. ∎",
    "emoji": "Family day 👨‍👩‍👧‍👦 was great 🎉🎉! We flew 🇳🇴→🇯🇵, ate 🍣 (so good 👍🏽), saw e\u0301toiles "
    "✨ and a 🏳️‍🌈 flag… 𝔉𝔦𝔫 — see you 🔜 ❤️‍🔥.",
    "long word": "RindfleischetikettierungsüberwachungsaufgabenübertragungsgesetzundDonaudampfschifffahrtselektrizi"
    "tätenhauptbetriebswerkbauunterbeamtengesellschaftspräsident",
}  # fmt: skip
# Begins like none of these, and has nothing of them.
OTHER = "Quite frankly, jovial zebras vex: my quip, whichever way you put it, would keep a big fjord dwarf busy."
PREAMBLE = "Certainly! Below you find how it goes on from where your connection dropped:\n\n"


def prefilled(body: dict) -> str | None:
    """The text that the model is to go on from, as its own."""
    last = body["messages"][-1]
    return last["content"] if last["role"] == "assistant" else None


def reasked(body: dict) -> tuple[str, str] | None:
    """What has been delivered, and the passage of it that the user quotes."""
    *_, before, last = [{"role": ""}, *body["messages"]]
    if before["role"] != "assistant" or last["role"] != "user":
        return None
    delivered: str = before["content"]
    quoted = re.search(r"-{8}\n(.*)\n-{8}", last["content"], re.DOTALL)
    assert quoted is not None, last["content"]
    assert len(quoted[1]) >= 10, "an anchor too short to be told from chance"
    assert delivered.endswith(quoted[1]), "the anchor is not the end of what was delivered"
    return delivered, quoted[1]


def echoing(text: str, rewrite: Callable[[str], str]) -> Model:
    """Repeats the anchor in its own way, and goes on; starts over where it is not re-asked."""

    def model(body: dict) -> str:
        if (asked := reasked(body)) is None:
            return text
        delivered, anchor = asked
        assert text.startswith(delivered), "not what was delivered"
        return rewrite(anchor) + text[len(delivered) :]

    return model


def repeats_anchor(text: str) -> Model:
    return echoing(text, lambda anchor: anchor)


def repeats_less(text: str) -> Model:
    """Only the last words of the anchor."""
    return echoing(text, lambda anchor: re.sub(r"^.{1,12}\s", "", anchor, count=1) if len(anchor) > 30 else anchor)


def changes_white_space(text: str) -> Model:
    return echoing(text, lambda anchor: re.sub(r"\s+", " ", anchor))


def doubles_blanks(text: str) -> Model:
    return echoing(text, lambda anchor: anchor.replace(" ", "  "))


def curls_quotes(text: str) -> Model:
    return echoing(text, lambda anchor: anchor.replace('"', "“").replace("'", "’"))


def straightens_quotes(text: str) -> Model:
    return echoing(text, lambda anchor: re.sub("[“”]", '"', anchor))


def repeats_anchor_twice(text: str) -> Model:
    return echoing(text, lambda anchor: f"{anchor}\n\n{anchor}")


def has_preamble(text: str) -> Model:
    """Comments on what it was asked, then does it."""
    return lambda body: PREAMBLE + (repeats_anchor(text)(body) or "")


def goes_on_without_echo(text: str) -> Model:
    """Does not repeat the anchor."""
    return echoing(text, lambda anchor: "")


def continues_prefill(text: str) -> Model:
    """Starts over where it is asked in another way."""

    def model(body: dict) -> str:
        begun = prefilled(body) or ""
        assert begun == begun.rstrip(), "some servers refuse white space at the end of a prefill"
        assert text.startswith(begun), "not what was delivered"
        return text[len(begun) :]

    return model


def trims_its_answer(text: str) -> Model:
    """Continues a prefill, and its server strips the white space at both ends."""
    return lambda body: (continues_prefill(text)(body) or "").strip()


def starts_over(text: str) -> Model:
    """Answers anew, always in the same words; to a prefill that is an answer with the prefill in front."""
    return lambda body: text


def starts_over_differently(text: str) -> Model:
    return lambda body: OTHER


def diverged(text: str) -> str:
    """The same first words, then another answer."""
    return text[: len(text) // 3] + "; " + OTHER


def diverges(text: str) -> Model:
    """Starts over, but not for long."""
    return lambda body: diverged(text)


def refuses_prefill(model: Model) -> Model:
    """A 400 to a prefill, and this model for everything else."""
    return lambda body: None if prefilled(body) is not None else model(body)


# --- Behind a socket ------------------------------------------------------------------------------------------------
REFUSED = error(400, "The conversation must end with a user message; assistant message prefill is not supported.")
BROKEN = event({"error": {"message": "overloaded", "type": "server_error", "code": 503}})
# How a stream may break: the last step, and whether the end marker comes. A break is not an end: no finish is said.
BREAKS: dict[str, tuple] = {
    "fin": (CUT,),
    "reset": (RESET,),
    "clean end": (),
    "stall": (PAUSE,),
    "error event": (b"event: error\n" + BROKEN,),
    "wrapped error": (BROKEN,),
}


def pieces(text: str, size: int = 5) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def served(model: Model, *, break_at: int | None = None, how: str = "fin", usage: tuple[int, int] = (11, 7)) -> ReplyTo:
    """The model's streamed answer; broken behind so many characters where `break_at` says so."""

    def reply(request: Request) -> Reply:
        said = model(request.json)
        if said is None:
            return REFUSED
        if break_at is not None:
            return sse(ROLE, *map(chunk, pieces(said[:break_at])), *BREAKS[how], done=False)
        return sse(ROLE, *map(chunk, pieces(said)), STOP, usage_chunk(*usage))

    return reply


# --- What a client makes of it --------------------------------------------------------------------------------------
PROSE = TEXTS["prose"]
HALF = len(PROSE) // 2
ON = {"RESCUE": "on"}
STALLS = {"RESCUE_AFTER_MS": "150"}  # only where a stall is meant: a busy machine pauses too
NO_RESTS = {"TRANSIENT_COOLDOWN_MS": "1"}


def on(how: str) -> dict[str, str]:
    """The settings of a gateway that mends an answer which breaks in this way."""
    return ON | (STALLS if how == "stall" else {})


def broken(text: str = PROSE, at: int = HALF, how: str = "fin"):
    """A provider whose answer breaks behind so many characters."""
    return served(starts_over(text), break_at=at, how=how)


def later(reply_to, go_on: asyncio.Event):
    """The same answer, after a while."""

    def reply(request):
        steps = reply_to(request).steps
        return raw(steps[0], Wait(go_on), *steps[1:])

    return reply


def assert_one_answer(got: Stream, text: str) -> None:
    """Nobody who reads it can tell that it came from several providers."""
    got.assert_whole(text)
    assert len({(part["id"], part["created"], part["model"]) for part in got.chunks}) == 1
    assert [delta["role"] for delta in got.deltas if "role" in delta] == ["assistant"]


def assert_lost(got: Stream, text: str, kind: str = "stream_error") -> None:
    """The client has been told so much, and that it is not all."""
    assert got.text == text
    assert got.error["type"] == kind
    assert got.finishes == ["error"]
    got.assert_done_once()


async def counted(gateway, name: str) -> dict[str, float]:
    """One of the metrics that are counted by result."""
    lines = (await gateway.get("/metrics")).body.decode().splitlines()
    found = [line.removeprefix(f'freeway_{name}{{result="').split('"} ') for line in lines if name + "{result=" in line]
    return {result: float(count) for result, count in found}
