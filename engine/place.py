"""The place in a new stream where the client's text ends, and the white space there.

What may come back before it, in this order: the cue that was asked for, everything from the beginning, or less than
the anchor, as long as it is enough to tell its place. No I/O.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from enum import StrEnum

from engine.rescue import Continuation, Way
from engine.wording import WHITE_SPACE, halves, plain, repeats_itself, whole_letters, written_length

OVERLAP_CHARS_MIN = 10  # of the last words, where less than the anchor comes back; fewer are found by chance
OVERLAP_CHARS_MAX = 240  # as many as are held back
TRIMMED_TAIL_CHARS_MIN = 10  # of a tail without the white space before it, by which going on is told from a new start
RESTART_CHARS = 40  # that equal the beginning: a restart, however long it takes to the seam
BLANKS_MAX = 240  # of white space at the seam; more than any indentation
FENCE = re.compile(r"```[\w+.#-]{0,20}[ \t]*\n")  # a model that is to go on inside a code block opens it again
FENCE_BEGUN = re.compile(r"`{1,3}|```[\w+.#-]{0,20}[ \t]*")


class Misfit(StrEnum):
    """Why a stream cannot go on with what the client has."""

    OTHER_WORDS = "other_words"  # a preamble, another answer, or the rest with nothing to join it by
    DIVERGED = "diverged"  # a restart that became another answer
    TOO_LONG = "too_long"  # without a match, in characters
    TOO_LATE = "too_late"  # and in seconds
    WHITE_SPACE = "white_space"  # the words fit, the white space at the seam does not
    ENDED = "ended"  # before it came to the seam
    DOUBLED = "doubled"  # the anchor comes twice
    NOT_JSON = "not_json"  # the whole answer, where JSON was asked for


Runs = Set[tuple[str, str]]  # of white space that came back: as the client has it, as the stream writes it


@dataclass(frozen=True, slots=True)
class Found:
    """The end of what the client has, in a new stream."""

    end: int  # behind the last word
    runs: Runs


class Place:
    """Looks for the end of the client's text at the beginning of a stream."""

    def __init__(self, text: str, asked: Continuation) -> None:
        self._text = text.rstrip()
        self.blank = text[len(self._text) :]  # the white space that the client has behind the last word
        self.begun: Restart | None = None  # once the stream is nothing but a restart
        self._whole = plain(self._text).lstrip()
        self._cue = plain(asked.cue).strip()
        self._cue_has_blank = asked.cue[:1].isspace()  # before it
        self._way = asked.way
        self._overlapping = "" if asked.way is Way.AGAIN else self._whole[1:][-OVERLAP_CHARS_MAX:]
        self._in_fence = asked.way is Way.REASK and text.count("```") % 2 == 1

    def find(self, new: str, *, ended: bool) -> Found | Misfit | None:
        """Where the client's text ends in a stream that begins so; None while more of it has to be seen."""
        starts = list(self._starts(new))
        for start, words in starts:
            if self._is_cue(words, blank_before=start > 0):
                again = words[len(self._cue) :].lstrip()
                if self._way is Way.REASK and again.startswith(self._cue):
                    return Misfit.DOUBLED
                if ended or self._way is not Way.REASK or not self._cue.startswith(again):
                    return self._found(new, start, len(self._cue))
                return None  # it may be saying the anchor twice
            if words.startswith(self._whole):
                return self._found(new, start, len(self._whole))
        restarts = [words for _, words in starts if self._whole.startswith(words)]
        waiting = any(self._may_echo(words, blank_before=start > 0) for start, words in starts)
        fence_comes = self._in_fence and FENCE_BEGUN.fullmatch(new.lstrip()) is not None
        if not ended and (waiting or restarts or fence_comes):
            if not waiting and len(restarts[0] if restarts else "") >= RESTART_CHARS:
                self.begun = Restart(self._whole, restarts[0])
            return None
        for start, words in starts:
            if overlap := self._overlap(words):
                return self._found(new, start, overlap)
        if restarts or waiting:
            return Misfit.ENDED
        half = RESTART_CHARS // 2
        return Misfit.DIVERGED if starts[0][1][:half] == self._whole[:half] else Misfit.OTHER_WORDS

    def _starts(self, new: str) -> Iterator[tuple[int, str]]:
        """Where in the stream its own words may begin, and these in their plain form."""
        start = len(new) - len(new.lstrip())
        yield start, plain(new[start:])
        if self._in_fence and (fence := FENCE.match(new, start)):
            start = fence.end() + len(new[fence.end() :]) - len(new[fence.end() :].lstrip())
            yield start, plain(new[start:])

    def _found(self, new: str, start: int, plain_length: int) -> Found:
        end = start + written_length(new[start:], plain_length)
        theirs = WHITE_SPACE.findall(new[start:end])
        ours = WHITE_SPACE.findall(self._text)[-len(theirs) :] if theirs else []
        return Found(end, frozenset(zip(ours, theirs, strict=True)))

    def _is_cue(self, words: str, *, blank_before: bool) -> bool:
        return bool(self._cue) and words.startswith(self._cue) and self._cue_may_stand(blank_before)

    def _cue_may_stand(self, blank_before: bool) -> bool:
        """Whether what looks like the cue would be the cue. A tail comes with the white space before it; some servers
        trim that away, and then only a long tail that is not the beginning of the answer tells it from a new one."""
        if self._way is not Way.PREFILL or blank_before == self._cue_has_blank:
            return True
        return len(self._cue) >= TRIMMED_TAIL_CHARS_MIN and not self._whole.startswith(self._cue)

    def _may_echo(self, words: str, *, blank_before: bool) -> bool:
        """Whether this may become the cue, or a longer piece of the last words than has come so far."""
        if self._cue.startswith(words) and self._cue_may_stand(blank_before):
            return bool(self._cue)
        return 0 <= self._overlapping.find(words) <= len(self._overlapping) - OVERLAP_CHARS_MIN

    def _overlap(self, words: str) -> int:
        """How many of these are the client's last; 0 where these are too few, or stand elsewhere in its text too."""
        last = self._overlapping
        for length in range(min(len(last), len(words)), OVERLAP_CHARS_MIN - 1, -1):
            overlap = last[-length:]
            if words.startswith(overlap):
                once = self._whole.find(overlap) == len(self._whole) - length
                return length if once and not repeats_itself(overlap) else 0
        return 0


class Restart:
    """A stream that brings everything again from the beginning, followed to the place where the client's text ends."""

    def __init__(self, whole: str, begun: str) -> None:
        """Both in their plain form."""
        self._whole = whole
        self._at = len(begun)
        self._in_blank = begun.endswith(" ")

    def feed(self, text: str) -> Found | Misfit | None:
        words = plain(text)
        merged = int(self._in_blank and words.startswith(" "))  # one run of white space in two pieces
        words = words[merged:]
        left = len(self._whole) - self._at
        if words[:left] != self._whole[self._at : self._at + len(words)]:
            return Misfit.DIVERGED
        if len(words) >= left:
            return Found(written_length(text, left + merged), frozenset())
        self._at += len(words)
        self._in_blank = words.endswith(" ") if words else self._in_blank
        return None


class Joint:
    """The white space at the seam, and an emoji that it may go through: what of the stream is news to the client."""

    def __init__(self, blank: str, half: str, runs: Runs) -> None:
        """`blank` and `half` are how the client's text ends: white space, and the first half of a character."""
        self._blank = blank
        self._half = half
        self._runs = runs
        self._held = ""

    def feed(self, text: str) -> str | Misfit | None:
        """What goes on, once it is known where the white space of the seam ends."""
        self._held = whole_letters(self._held + text)
        rest = self._held.lstrip()
        run = self._held[: len(self._held) - len(rest)]
        if not self._half:
            if not self._blank:
                return self._held
            if run.startswith(self._blank) and all(ours == theirs for ours, theirs in self._runs):
                return self._held[len(self._blank) :]
        if not rest or (self._half and rest == self._half):
            return Misfit.WHITE_SPACE if len(run) > BLANKS_MAX else None
        more = more_white_space(self._blank, run, self._runs)
        if more is None:
            return Misfit.WHITE_SPACE
        if not self._half:
            return more + rest
        first, second = halves(rest[0])
        return second + rest[1:] if not more and first == self._half else Misfit.OTHER_WORDS

    def end(self) -> str | Misfit:
        """The stream ends here. White space at the end of an answer is worth nothing; half an emoji is no end."""
        return Misfit.ENDED if self._half else ""


# How a model may write the white space of a passage that it repeats; which one shows in what it has repeated so far.
REWRITINGS: tuple[Callable[[str], str], ...] = (
    lambda run: run,
    lambda run: " ",
    lambda run: run.replace("\n", " "),
    lambda run: run.replace(" ", "  "),
)


def more_white_space(ours: str, theirs: str, runs: Runs) -> str | None:
    """What the client lacks of the white space between two words of which it has `ours` and the stream `theirs`; None
    where they contradict each other."""
    for rewrite in REWRITINGS:
        written = rewrite(ours)
        if theirs.startswith(written) and all(rewrite(one) == other for one, other in runs):
            return theirs[len(written) :]
    if not theirs:
        return None  # one word there, two here
    if "\n" not in theirs:
        return ""  # blanks stand for a line end
    lines_ours, lines_theirs = ours.split("\n"), theirs.split("\n")
    if len(lines_theirs) > len(lines_ours):
        return "\n" + "\n".join(lines_theirs[len(lines_ours) :])
    indent_ours, indent_theirs = lines_ours[-1], lines_theirs[-1]
    return indent_theirs[len(indent_ours) :] if indent_theirs.startswith(indent_ours) else None
