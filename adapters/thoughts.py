"""Thoughts that models write into their answers between tags, instead of into a field of their own.

Only an answer that opens so counts, because an answer may well talk about such tags. Each family of models has tags of
its own, so names are recognised by what they say (`<think>`, `<seed:think>`, `<antThinking>`), and the few that say it
in brackets or control tokens are listed. No I/O.
"""

from __future__ import annotations

import re

TAG_CHARS_MAX = 48  # of the longest tag; a longer beginning is no tag
NAMED = re.compile(r"<([a-z][\w:.-]*)>", re.IGNORECASE)
NAMED_END = re.compile(r"</([a-z][\w:.-]*)>", re.IGNORECASE)
TOKEN = re.compile(r"<\|((?:start|begin)\w*)\|>", re.IGNORECASE)  # <|START_THINKING|>, <|begin_of_thought|>
PARTIAL = re.compile(r"</?\|?[\w:.-]*\|?", re.ASCII)  # may become one of these
WORDS = ("think", "thought")
LISTED = {
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
    "<|channel>thought": "<channel|>",
    "<|channel|>analysis<|message|>": "<|end|>",
}
# What some write between their thoughts and the answer.
LEADS = ("<|start|>assistant<|channel|>final<|message|>", "<|channel|>final<|message|>", "<|START_RESPONSE|>")
FIRST_CHARS = "<[◁"
# An answer may begin in mid-thought, because the opening tag was part of the prompt.
LONE_END = re.compile(r"</[\w:.-]*(?:think|thought)\w*>[ \t]*(?=\n|$)", re.IGNORECASE)


def opening(start: str) -> tuple[int, str] | None:
    """How long the tag is with which this text opens its thoughts, and the tag that ends them."""
    for tag, end in LISTED.items():
        if start.startswith(tag):
            return len(tag), end
    if (found := NAMED.match(start)) and speaks_of_thoughts(found[1]):
        return found.end(), f"</{found[1]}>"
    if (found := TOKEN.match(start)) and speaks_of_thoughts(found[1]):
        end = re.sub(r"^(?:start|begin)", lambda word: "END" if word[0].isupper() else "end", found[1], flags=re.I)
        return found.end(), f"<|{end}|>"
    return None


def stray_end(start: str) -> int:
    """How long the closing tag is with which this text opens: some servers take the thoughts out and leave it."""
    for end in LISTED.values():
        if end != "<|end|>" and start.startswith(end):
            return len(end)
    found = NAMED_END.match(start)
    return found.end() if found and speaks_of_thoughts(found[1]) else 0


def speaks_of_thoughts(name: str) -> bool:
    return any(word in name.lower() for word in WORDS)


def may_open(start: str) -> bool:
    """Whether this text is the beginning of a tag that would make it thoughts."""
    if len(start) > TAG_CHARS_MAX:
        return False
    known = (*LISTED, *LISTED.values())
    return PARTIAL.fullmatch(start) is not None or any(tag.startswith(start) for tag in known)


def without_lead(rest: str) -> tuple[str, bool]:
    """What follows thoughts, without a lead to the answer; and whether it may still become such a lead."""
    start = rest.lstrip()
    for lead in LEADS:
        if start.startswith(lead):
            return start[len(lead) :], False
    return rest, any(lead.startswith(start) for lead in LEADS)


def split_thoughts(text: str) -> tuple[str | None, str]:
    """The thoughts that open a whole answer, and the rest. Unclosed, all of it is thoughts."""
    start = text.lstrip()
    if begins := opening(start):
        size, end = begins
        thoughts, _, rest = start[size:].partition(end)
        return thoughts.strip(), without_lead(rest)[0].lstrip()
    if size := stray_end(start):
        return "", start[size:].lstrip()
    if "</" in text and (end_at := lone_end(text)):
        return text[: end_at.start()].strip(), text[end_at.end() :].lstrip()
    return None, text


def lone_end(text: str) -> re.Match[str] | None:
    """The end of thoughts that have no beginning: at the end of a line, and neither quoted nor shown in code."""
    if (found := LONE_END.search(text)) is None:
        return None
    before = text[: found.start()]
    quoted = before.endswith(("`", '"', "'")) or before.count("```") % 2
    opened = any(speaks_of_thoughts(tag[1]) for tag in NAMED.finditer(before))
    return None if quoted or opened else found
