"""The tool calls of an answer, brought into the one form that clients read.

A whole answer's calls get ids, types, the client's own names and readable arguments. A stream's come in pieces, and
servers disagree about what a piece says: which index, whether the id again, whether the name. whole_calls.py decides
when a streamed call goes out. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

from adapters.text_rescue import CALL_CHARS_MAX, Tools, declared_tools, mended_arguments
from protection import Failure, UpstreamError
from wire.chat import Chat
from wire.jsontext import JSON, dump, load_inner

# What models put before the names of tools, because their own prompts tell of tools so.
NAMESPACES = ("functions.", "default_api.", "default_api:", "functions:", "tools.", "tool.")


def lost_turn() -> UpstreamError:
    """The model called a tool, and nobody can tell how."""
    return UpstreamError(Failure.MALFORMED, "The model's tool call cannot be read.", status=200)


def made_id(answer: JSON, place: int) -> str:
    """An id for a call without a usable one. It differs from answer to answer, because they meet in one history."""
    seed = f"{answer.get('id')}\0{answer.get('created')}\0{place}"
    return f"call_{blake2b(seed.encode(errors='replace'), digest_size=9).hexdigest()}"


def called(answer: JSON, place: int, name: str, arguments: str) -> JSON:
    function = {"name": name, "arguments": arguments}
    return {"id": made_id(answer, place), "type": "function", "function": function}


def declared_name(name: str, tools: Tools) -> str:
    """The declared tool that a name means: some models put a namespace before it, or what their server should have
    read as the end of it behind. The very name where there is no such tool."""
    if name in tools or not tools:
        return name
    bare = name.partition("<|")[0].strip().removesuffix("()")
    for meant in (bare, *(bare.removeprefix(space) for space in NAMESPACES)):
        if meant in tools:
            return meant
    return name


# --- Whole answers --------------------------------------------------------------------------------------------------
def mend_whole_calls(calls: list[JSON], answer: JSON, chat: Chat, *, cut: bool) -> bool:
    """True when something had to change (a call cut off by length stays so). Raises UpstreamError."""
    changed = False
    tools = declared_tools(chat.body)
    ids: set[str] = set()
    for place, call in enumerate(calls):
        if not call.get("id") or call["id"] in ids:  # clients match results to calls by id
            call["id"], changed = made_id(answer, place), True
        ids.add(call["id"])
        changed |= mend_call(call, cut=cut)
        function = call.get("function")
        if not isinstance(function, dict):
            continue
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(name, str) and (meant := declared_name(name, tools)) != name:
            function["name"], name, changed = meant, meant, True
        if name in tools and isinstance(arguments, str) and not cut:
            mended = mended_arguments(arguments, tools[name])
            if mended is None:
                raise lost_turn()
            if mended is not arguments:
                function["arguments"], changed = mended, True
        if isinstance(name, str) and name in chat.tool_names:
            function["name"], changed = chat.tool_names[name], True
    return changed


def mend_call(call: JSON, *, cut: bool) -> bool:
    """A tool call with a type, and arguments as text: none at all is none, unless the call was cut off."""
    changed = False
    if not call.get("type"):
        call["type"], changed = "function", True
    function = call.get("function")
    if isinstance(function, dict):
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            function["arguments"], changed = dump(arguments).decode(), True
        elif arguments is None or (arguments == "" and not cut):
            function["arguments"], changed = "" if cut else "{}", True
    return changed


# --- Streams --------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class ToolCallState:
    """A call whose first piece has been read."""

    id: str  # as the provider calls it, or ours
    given: int | None = None  # the index that the provider gave it
    name: str = ""  # as the provider calls it; may come after the first piece
    argued: bool = False  # some of its arguments have come
    arguments: list[str] = field(default_factory=list)  # their text so far, up to CALL_CHARS_MAX
    chars: int = 0
    held: str | None = None  # arguments that began as text within text: they are mended when all are there

    def add(self, arguments: str) -> None:
        self.argued = True
        self.chars += len(arguments)
        if self.chars <= CALL_CHARS_MAX:
            self.arguments.append(arguments)

    def takes(self, name: str) -> bool:
        """Whether a piece with this name and a new id still belongs to it."""
        if not self.argued:
            return not self.name
        return self.name == name and self.text() is None

    def text(self) -> str | None:
        """The arguments, once they are the whole JSON of an object."""
        text = "".join(self.arguments)
        return text if self.chars <= CALL_CHARS_MAX and isinstance(load_inner(text), dict) else None


class StreamedCalls:
    """One stream's calls so far. Each gets the next index, and says id, type and name once: clients join repeats."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._tools = declared_tools(chat.body) if chat.need.tools else {}
        self._states: list[ToolCallState] = []
        self._places: dict[int, int] = {}  # by the index that the provider gives

    def __len__(self) -> int:
        return len(self._states)

    def mend(self, pieces: list[JSON], answer: JSON) -> bool:
        """True when something had to change."""
        changed = False
        for piece in pieces:
            function = piece.get("function")
            if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
                function["arguments"], changed = dump(function["arguments"]).decode(), True
            given = piece.get("index")
            place = self._place_of(piece, function or {})
            if given is not None:
                self._places[given] = place
            if given != place:
                piece["index"], changed = place, True
            if place == len(self._states):
                changed |= self._begin(piece, given, answer)
            else:
                for repeated in ("id", "type"):
                    changed |= piece.pop(repeated, None) is not None
            if isinstance(function, dict):
                changed |= self._mend_function(function, self._states[place])
        return changed

    def add(self, name: str, arguments: str, answer: JSON) -> JSON:
        """A call that came in another form, as one piece."""
        place = len(self._states)
        call = called(answer, place, self._chat.tool_names.get(name, name), arguments)
        self._states.append(ToolCallState(call["id"], name=name, argued=True))
        return {"index": place, **call}

    def rest(self, *, cut: bool) -> list[JSON]:
        """The pieces that are missing when the answer ends: arguments held back, and `{}` where none came."""
        pieces = []
        for place, state in enumerate(self._states):
            if state.held is not None:
                schema = self._tools.get(state.name)
                text, state.held = mended_arguments(state.held, schema) or state.held, None
            elif state.argued or cut:
                continue
            else:
                text, state.argued = "{}", True
            pieces.append({"index": place, "function": {"arguments": text}})
        return pieces

    def _place_of(self, piece: JSON, function: JSON) -> int:
        """Which call a piece belongs to; the next place where it begins one.

        With a new id and a name it begins one, whatever index it claims (some count none, some call all of them 0),
        unless the call under this index cannot be complete yet: some make a new id for each piece. So does a name,
        where there are neither ids nor indexes. A known id belongs to its call, unless a name comes with
        an index that is new, or with other arguments than those that are complete: some give all calls one id.
        """
        states, following = self._states, len(self._states)
        given, call_id, named = piece.get("index"), piece.get("id"), bool(function.get("name"))
        known = None if given is None else self._places.get(given)
        if not call_id:
            if known is not None:
                place = known
            elif not states or named or (given is not None and states[-1].text() is not None):
                place = following
            else:  # a piece of the call that is being told, whatever index it claims
                place = following - 1
        else:
            same = [place for place, state in enumerate(states) if state.id == call_id]
            if not same:
                goes_on = known is not None and (not named or states[known].takes(str(function["name"])))
                place = known if known is not None and goes_on else following
            elif known in same:
                place = known
            else:
                is_new = named and given is not None and states[same[-1]].given is not None
                place = following if is_new else same[-1]
        if place < following and named and (arguments := function.get("arguments")):
            complete = states[place].text()
            if complete is not None and complete != arguments:
                return following
        return place

    def _begin(self, piece: JSON, given: int | None, answer: JSON) -> bool:
        changed = False
        given_id = piece.get("id")
        if not given_id or any(state.id == given_id for state in self._states):
            piece["id"], changed = made_id(answer, len(self._states)), True
        if not piece.get("type"):
            piece["type"], changed = "function", True
        self._states.append(ToolCallState(given_id or piece["id"], given))
        return changed

    def _mend_function(self, function: JSON, state: ToolCallState) -> bool:
        changed = False
        name, arguments = function.get("name"), function.get("arguments")
        if "name" in function and (not name or state.name):  # once is enough, and later ones are often empty
            del function["name"]
            changed = True
            if name and arguments and arguments == state.text():  # the whole call once more
                function["arguments"] = ""
                return True
        elif name:
            state.name = declared_name(name, self._tools)
            told = self._chat.tool_names.get(state.name, state.name)
            if told != name:
                function["name"], changed = told, True
        if not arguments:
            return changed
        if state.held is None and (state.argued or arguments[0] != '"'):
            state.add(arguments)
            return changed
        held = (state.held or "") + arguments
        state.held, function["arguments"] = (held, "") if len(held) <= CALL_CHARS_MAX else (None, held)
        state.argued = True
        return True
