"""The tool calls of an answer, brought into the one form that clients read.

A whole answer's calls get ids, types, the client's own names and readable arguments. A stream's come in pieces, and
servers disagree about what a piece says: which index, whether the id again, whether the name. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from adapters.text_rescue import CALL_CHARS_MAX, declared_tools, mended_arguments
from protection import Failure, UpstreamError
from wire.chat import Chat
from wire.jsontext import JSON, dump


def lost_turn() -> UpstreamError:
    return UpstreamError(Failure.MALFORMED, "The model's tool call cannot be read.", status=200)


def made_id(answer: JSON, place: int) -> str:
    """An id for a call that came without one: unlike those of other answers, because they meet in one history."""
    seed = f"{answer.get('id')}\0{answer.get('created')}\0{place}"
    return f"call_{blake2b(seed.encode(errors='replace'), digest_size=9).hexdigest()}"


def called(answer: JSON, place: int, name: str, arguments: str) -> JSON:
    function = {"name": name, "arguments": arguments}
    return {"id": made_id(answer, place), "type": "function", "function": function}


# --- Whole answers --------------------------------------------------------------------------------------------------
def mend_whole_calls(calls: list[JSON], answer: JSON, chat: Chat, *, cut: bool) -> bool:
    """True when something had to change (a call cut off by length stays so). Raises UpstreamError."""
    changed = False
    tools = declared_tools(chat.body)
    for place, call in enumerate(calls):
        if not call.get("id"):
            call["id"], changed = made_id(answer, place), True
        changed |= mend_call(call)
        function = call.get("function")
        if not isinstance(function, dict):
            continue
        name, arguments = function.get("name"), function.get("arguments")
        if name in tools and isinstance(arguments, str) and not cut:
            mended = mended_arguments(arguments, tools[name])
            if mended is None:
                raise lost_turn()
            if mended is not arguments:
                function["arguments"], changed = mended, True
        if isinstance(name, str) and name in chat.tool_names:
            function["name"], changed = chat.tool_names[name], True
    return changed


def mend_call(call: JSON) -> bool:
    """A tool call with a type, and arguments as text."""
    changed = False
    if not call.get("type"):
        call["type"], changed = "function", True
    function = call.get("function")
    if isinstance(function, dict):
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            function["arguments"], changed = dump(arguments).decode(), True
        elif arguments is None or arguments == "":
            function["arguments"], changed = "{}", True
    return changed


# --- Streams --------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Begun:
    """A call whose first piece has gone out."""

    id: str
    name: str = ""  # as the provider calls it; may come after the first piece
    argued: bool = False  # some of its arguments have come
    held: str | None = None  # arguments that began as text within text: they are mended when all are there


class StreamedCalls:
    """One stream's calls so far. Each gets the next index, and says id, type and name once: clients join repeats."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._begun: list[Begun] = []
        self._places: dict[int | str, int] = {}  # by the index that the provider gives

    def __len__(self) -> int:
        return len(self._begun)

    def mend(self, pieces: list[JSON], answer: JSON) -> bool:
        """True when something had to change."""
        changed = False
        for piece in pieces:
            place = self._place_of(piece)
            if piece.get("index") != place:
                piece["index"], changed = place, True
            if place == len(self._begun):
                changed |= self._begin(piece, answer)
            else:
                for repeated in ("id", "type"):
                    changed |= piece.pop(repeated, None) is not None
            function = piece.get("function")
            if isinstance(function, dict):
                changed |= self._mend_function(function, self._begun[place])
        return changed

    def add(self, name: str, arguments: str, answer: JSON) -> JSON:
        """A call that came in another form, as one piece."""
        place = len(self._begun)
        call = called(answer, place, self._chat.tool_names.get(name, name), arguments)
        self._begun.append(Begun(call["id"], name, argued=True))
        return {"index": place, **call}

    def rest(self, *, cut: bool) -> list[JSON]:
        """The pieces that are missing when the answer ends: arguments held back, and `{}` where none came."""
        pieces = []
        for place, begun in enumerate(self._begun):
            if begun.held is not None:
                schema = declared_tools(self._chat.body).get(begun.name)
                text, begun.held = mended_arguments(begun.held, schema) or begun.held, None
            elif begun.argued or cut:
                continue
            else:
                text, begun.argued = "{}", True
            pieces.append({"index": place, "function": {"arguments": text}})
        return pieces

    def _place_of(self, piece: JSON) -> int:
        """Which call a piece belongs to. With a new id and a name it begins one, whatever index it claims (some count
        none, some call all of them 0); so does a name, where there are neither ids nor indexes."""
        given, call_id = piece.get("index"), piece.get("id")
        given = given if isinstance(given, int | str) else None
        named = bool((piece.get("function") or {}).get("name"))
        known = None if given is None else self._places.get(given)
        if call_id:
            same = next((place for place, begun in enumerate(self._begun) if begun.id == call_id), None)
            place = same if same is not None else len(self._begun) if named or known is None else known
        elif given is not None:
            place = len(self._begun) if known is None else known
        else:
            place = len(self._begun) if named or not self._begun else len(self._begun) - 1
        if given is not None:
            self._places[given] = place
        return place

    def _begin(self, piece: JSON, answer: JSON) -> bool:
        changed = False
        if not piece.get("id"):
            piece["id"], changed = made_id(answer, len(self._begun)), True
        if not piece.get("type"):
            piece["type"], changed = "function", True
        self._begun.append(Begun(piece["id"]))
        return changed

    def _mend_function(self, function: JSON, begun: Begun) -> bool:
        changed = False
        name, arguments = function.get("name"), function.get("arguments")
        if name and begun.name:
            del function["name"]
            changed = True
        elif name:
            begun.name = name
            if name in self._chat.tool_names:
                function["name"], changed = self._chat.tool_names[name], True
        if isinstance(arguments, dict):
            function["arguments"], begun.argued = dump(arguments).decode(), True
            return True
        if not arguments:
            return changed
        if begun.held is None and (begun.argued or arguments[0] != '"'):
            begun.argued = True
            return changed
        held = (begun.held or "") + arguments
        begun.held, function["arguments"] = (held, "") if len(held) <= CALL_CHARS_MAX else (None, held)
        begun.argued = True
        return True
