"""Thoughts in tags of every family, and closing tags that were left behind (facts 3.2)."""

import pytest
from conftest import case
from fake_provider import body, chunk, chunked, completion, event, sse
from wires import Gemini, gemini_frame

from adapters.thoughts import split_thoughts

STOP = chunk(finish="stop")
ASKED_FOR = "<reasoning>a</reasoning><answer>b</answer>"  # many prompts ask for this form
# Text, thoughts, answer.
TAGGED = {
    "think": ("<think>hm</think>Yes.", "hm", "Yes."),
    "a family's own": ("<seed:think>hm</seed:think>Yes.", "hm", "Yes."),
    "another's": ("<mm:think>hm</mm:think>\n\nYes.", "hm", "Yes."),
    "with an underscore": ("<big_think>hm</big_think>Yes.", "hm", "Yes."),
    "in capitals": ("<THINKING>hm</THINKING>Yes.", "hm", "Yes."),
    "thoughts": ("<thoughts>hm</thoughts>Yes.", "hm", "Yes."),
    "square brackets": ("[THINK]hm[/THINK]Yes.", "hm", "Yes."),
    "triangles": ("◁think▷hm◁/think▷Yes.", "hm", "Yes."),
    "control tokens": ("<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>Yes.", "hm", "Yes."),
    "control tokens in words": ("<|begin_of_thought|>hm<|end_of_thought|>Yes.", "hm", "Yes."),
    "control tokens in other words": ("<|start_think|>hm<|end_think|>Yes.", "hm", "Yes."),
    "a channel": ("<|channel>thought\nhm<channel|>Yes.", "hm", "Yes."),
    "channels": (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.", "hm", "Yes.",
    ),
    "channels alone": ("<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>Yes.", "hm", "Yes."),
    "white space around": ("\n <seed:think>\nhm\n</seed:think>\n\n Yes.", "hm", "Yes."),
    "a closing tag left behind": ("</think>Yes.", "", "Yes."),
    "and white space": ("\n</think>\n\nYes.", "", "Yes."),
    "a closing tag of a family": ("</seed:think>Yes.", "", "Yes."),
    "a closing bracket": ("[/THINK]Yes.", "", "Yes."),
    "a closing channel": ("<channel|>Yes.", "", "Yes."),
    "a tag of something else": ("<answer>Yes.</answer>", "", "<answer>Yes.</answer>"),
    "a tag that was asked for": (ASKED_FOR, "", ASKED_FOR),
    "a link": ("[THINKPAD](x)", "", "[THINKPAD](x)"),
    "a tag with attributes": ('<think about="x">y', "", '<think about="x">y'),
    "a comparison": ("<3 and </3", "", "<3 and </3"),
    "a tag in the answer": ("Use <think> and </think> so.", "", "Use <think> and </think> so."),
    "a tag at a line's end in code": ("So:\n```\nx</think>\n```", "", "So:\n```\nx</think>\n```"),
}  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 3, 10_000])
async def test_thoughts_in_any_tags_are_reasoning_and_the_rest_is_the_answer(start_gateway, fake, size):
    gateway = await start_gateway(["a"])
    for name, (text, thoughts, answer) in TAGGED.items():
        with case(name):
            pieces = [chunk(text[at : at + size]) for at in range(0, len(text), size or 1)]
            fake.script("a", sse(*pieces, STOP) if size else completion(text))

            got = await gateway.ask(streaming=bool(size))

            assert got.text == answer
            told = got.deltas if size else [got.json["choices"][0]["message"]]
            assert "".join(delta.get("reasoning_content", "") for delta in told).strip() == thoughts


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
async def test_a_closing_tag_behind_thoughts_of_their_own_field_is_dropped(start_gateway, fake, field):
    gateway = await start_gateway(["a"])
    for text in ("</think>\n\nYes.", "\n</think>Yes.", "</seed:think>Yes."):
        with case(text):
            parts = [chunk(**{field: "hm"}), *map(chunk, text), STOP]
            fake.script("a", sse(*parts), completion(text, message={field: "hm"}))

            got = await gateway.stream()
            message = (await gateway.chat()).json["choices"][0]["message"]

            assert (got.text, message["content"]) == ("Yes.", "Yes.")
            assert "".join(delta.get("reasoning_content", "") for delta in got.deltas) == "hm"
            assert message["reasoning_content"] == "hm"


async def test_thoughts_of_both_kinds_are_kept(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", completion("<think>so</think>Yes.", message={"reasoning": "hm"}))

    message = (await gateway.chat()).json["choices"][0]["message"]

    assert (message["content"], message["reasoning_content"]) == ("Yes.", "hm\nso")


async def test_what_comes_beside_the_first_words_is_kept(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(chunk("<think>hm</think>Yes", reasoning_content="first "), chunk("."), STOP))

    got = await gateway.stream()

    assert got.text == "Yes."
    assert "".join(delta.get("reasoning_content", "") for delta in got.deltas) == "first hm"


async def test_thoughts_that_stand_only_in_details_are_reasoning(start_gateway, fake):
    gateway = await start_gateway(["a"])
    details = [{"type": "reasoning.text", "text": "hm "}, {"type": "reasoning.summary", "summary": "so"}]
    encrypted = [{"type": "reasoning.encrypted", "data": "xyz"}]
    fake.script("a", sse(chunk(reasoning_details=details), chunk(reasoning_details=encrypted), chunk("Yes."), STOP))

    got = await gateway.stream()

    assert "".join(delta.get("reasoning_content", "") for delta in got.deltas) == "hm so"
    assert [delta["reasoning_details"] for delta in got.deltas if "reasoning_details" in delta] == [details, encrypted]


async def test_thoughts_in_tags_of_the_other_wire_are_reasoning(start_gateway, fake):
    gateway = await start_gateway({"google": Gemini().options(fake)})
    said = gemini_frame({"text": "<|channel>thought\nhm<channel|>Yes."}, said=None)
    said["candidates"][0]["finishReason"] = "STOP"
    for streaming in (False, True):
        fake.script("google", chunked(event(said)) if streaming else body(said))
        assert (await gateway.ask(streaming=streaming)).text == "Yes."


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("hm, so\n</think>\n\nYes.", "hm, so", "Yes."),
        ("hm, so</think>\n\nYes.", "hm, so", "Yes."),
        ("hm</seed:think>\nYes.", "hm", "Yes."),
        ("Write `</think>`\nat the end.", None, "Write `</think>`\nat the end."),
        ('Write "</think>\n" there.', None, 'Write "</think>\n" there.'),
        ("It says <think>so</think>\nhere.", None, "It says <think>so</think>\nhere."),
        ("a</think>b", None, "a</think>b"),
    ],
)
def test_an_answer_that_begins_in_mid_thought_is_parted_at_the_end_of_a_line(text, thoughts, answer):
    assert split_thoughts(text) == (thoughts, answer)
