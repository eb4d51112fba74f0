"""Compaction: a conversation as one opaque item that only this gateway reads back (SPEC 9.5).

A client that runs out of room asks for it, by an item in its input or at an address of its own. A model of the chain is
asked for a summary like for any other answer; the summary, sealed with the gateway's key, is the item. In later input
it is the summary again. No I/O: sealing comes from the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wire.jsontext import JSON

TRIGGER = "compaction_trigger"
ITEM_TYPES = frozenset({"compaction", "compaction_summary"})
ASKED_FOR = (
    "The conversation above has become too long to go on with and will be replaced by your summary of it. Write that "
    "summary for whoever takes over, who sees nothing else. Say what the user has asked for and decided, in the user's "
    "own words where these matter; what has been done, found out and changed, with the exact names, paths, commands, "
    "values and errors that are needed to go on; what is still to do, and what comes next. Do not answer the user, do "
    "not call tools, and leave out pleasantries: give the summary alone."
)
INTRODUCED = "[The conversation up to here has been summarised to save room. This is the summary.]\n\n"
UNREADABLE = (
    "[An earlier part of the conversation was summarised by another server, or with another key, and cannot be read "
    "here. Ask the user for what is missing.]"
)


@dataclass(frozen=True, slots=True)
class Seal:
    """Makes a text unreadable for everybody else, and readable again."""

    close: Callable[[str], str]
    open: Callable[[str], str | None]  # None for what this gateway has not sealed


NO_SEAL = Seal(lambda text: text, lambda sealed: None)  # for whoever neither makes such items nor reads them


def summary_in(item: JSON, seal: Seal) -> str:
    """What a compaction item stands for, as a user's message says it to a model."""
    sealed = item.get("encrypted_content")
    summary = seal.open(sealed) if isinstance(sealed, str) else None
    return UNREADABLE if summary is None else INTRODUCED + summary
