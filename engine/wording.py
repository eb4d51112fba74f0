"""When two texts read the same: white space and quotation marks may differ, words may not.

A second model repeats a passage as it would write it: a line end becomes a blank, straight quotes become curly ones.
Both are put into one plain form before they are compared. Also where a text may be cut without tearing a letter, and
which passages are too repetitive to be recognised by. No I/O.
"""

from __future__ import annotations

import re
import unicodedata

WHITE_SPACE = re.compile(r"\s+")  # in the sense of str.isspace, as str.strip has it
QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "‟": '"', "‘": "'", "’": "'", "‚": "'", "‛": "'"})
MORE_FOLLOWS = (",", "(", "[", "{", "،", "，", "、")
SURROGATE = re.compile("[\ud800-\udfff]")
HIGH_HALVES = ("\ud800", "\udbff")  # the first and the last
JOINER = "\u200d"  # makes one picture of the emojis on both sides
MARKS_MAX = 32  # that one letter carries; what has more is no letter of any language

# Letters of scripts that write no blanks between words.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u312f\u3190-\ua4cf\uf900-\ufaff\uff00-\uffef\U0001f000-\U0003ffff]"
)


def plain(text: str) -> str:
    """With one blank for each run of white space, and straight quotes."""
    return WHITE_SPACE.sub(" ", text.translate(QUOTES))


def written_length(text: str, plain_length: int) -> int:
    """How many characters of `text` make up that many of its plain form."""
    at, left = 0, plain_length
    for run in WHITE_SPACE.finditer(text):
        if left <= run.start() - at:
            break
        left -= run.start() - at + 1
        at = run.end()
        if not left:
            break
    return at + left


def is_unfinished(text: str) -> bool:
    """Whether no answer ends so: inside a block of code, or where something must follow."""
    return text.count("```") % 2 == 1 or text.rstrip().endswith(MORE_FOLLOWS)


def whole_letters(text: str) -> str:
    """The two halves of an emoji that came in two pieces are one character again."""
    if not SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def is_first_half(letter: str) -> bool:
    """Whether this is the first half of a character whose second half has not come."""
    return HIGH_HALVES[0] <= letter <= HIGH_HALVES[1]


def halves(letter: str) -> tuple[str, str]:
    """The two halves of a character that has them; empty texts for any other."""
    if ord(letter) < 0x10000:
        return "", ""
    offset = ord(letter) - 0x10000
    return chr(0xD800 + (offset >> 10)), chr(0xDC00 + (offset & 0x3FF))


def letter_start(text: str, at: int) -> int:
    """The place at or before `at` where no letter is torn from its marks, and no emoji from its parts."""
    for _ in range(MARKS_MAX):
        if not 0 < at < len(text) or not clings(text[at - 1], text[at]):
            break
        at -= 1
    return at


def clings(before: str, letter: str) -> bool:
    """Whether this belongs to what stands before it."""
    if unicodedata.category(letter).startswith("M") or letter == JOINER or before == JOINER:
        return True
    return "\U0001f3fb" <= letter <= "\U0001f3ff" or (is_flag(letter) and is_flag(before))


def is_flag(letter: str) -> bool:
    """A flag is written with two letters of its own."""
    return "\U0001f1e6" <= letter <= "\U0001f1ff"


def repeats_itself(text: str) -> bool:
    """Whether this is one short passage over and over, such as a line of dashes: then nobody can tell which of several
    is meant. Made for passages of some hundred characters."""
    return any(text[period:] == text[:-period] for period in range(1, len(text) // 2 + 1))
