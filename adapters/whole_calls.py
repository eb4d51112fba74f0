"""Tool calls of a stream, whole or not at all (SPEC 14.7).

A client cannot do anything with half a call, and a stream that breaks within one cannot be continued once a piece of it
has gone out. So the pieces of a call are held until its arguments are complete and the next call, a finish or the end
has come; then the call goes out in two pieces, who is called and with what. Nothing that is held has been sent, so it
commits nobody to this answer. No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from msgspec import field

from adapters.text_rescue import declared_tools, mended_arguments
from adapters.tool_calls import lost_turn
from protection import Failure, UpstreamError
from wire.chat import Chat
from wire.jsontext import JSON
from wire.unshown import Unshown

HELD_CHARS_MAX = 8 * 1024 * 1024  # of all calls that one stream holds at a time (SPEC 14.7)


class HeldCall(Unshown):
    """A call that has not gone out. `first` is its first piece without arguments."""

    first: JSON
    arguments: list[str] = field(default_factory=list)
    judged: int = 0  # how many pieces of its arguments there were when they were last found incomplete


class WholeCalls(Unshown):
    """One stream's calls on their way out, as pieces that StreamedCalls has mended: numbered without gaps, with id and
    name in the first."""

    _chat: Chat
    _schemas: Mapping[str, JSON] | None = None  # of the tools, by the client's names; most streams call none
    _held: dict[int, HeldCall] = field(default_factory=dict)  # by index; the lowest goes out first
    _sent: int = 0  # how many have gone out
    _chars: int = 0  # held now
    taken_chars: int = 0  # ever held

    @property
    def holding(self) -> bool:
        return bool(self._held)

    def take(self, pieces: list[JSON]) -> list[JSON]:
        """Hold these pieces; gives what can go out. Raises UpstreamError when too much would have to be held."""
        for piece in pieces:
            place = piece["index"]
            if place < self._sent:  # it was complete without this
                continue
            if (call := self._held.get(place)) is None:
                call = self._held[place] = HeldCall({"index": place, "function": {}})
            function = piece.get("function") or {}
            call.first.update((name, value) for name, value in piece.items() if name != "function")
            call.first["function"].update(function, arguments="")
            arguments = function.get("arguments") or ""
            if arguments:
                call.arguments.append(arguments)
            self._chars += len(arguments)
            self.taken_chars += len(function.get("name") or "") + len(arguments)
        if self._chars > HELD_CHARS_MAX:
            raise UpstreamError(Failure.MALFORMED, "The model's tool calls are larger than 8 MiB.", status=200)
        return self._released(before=max(self._held, default=0))

    def release(self) -> list[JSON]:
        """Something else follows, text or a finish: a call that is complete has ended."""
        return self._released(before=inf)

    def finish(self, *, cut: bool) -> list[JSON]:
        """The rest, at the end of the answer. What is not complete where `length` cut it off is left out, also one of
        which only the name has come: nobody knows what would have followed. Raises UpstreamError for one that is no
        call."""
        pieces = self._released(before=inf if cut else None)
        if not cut and any(call.arguments or "name" in call.first["function"] for call in self._held.values()):
            raise lost_turn()
        self._held.clear()
        return pieces

    def _released(self, before: float | None) -> list[JSON]:
        """The pieces of the calls at the head of the line that are complete; all of them where `before` is None."""
        pieces: list[JSON] = []
        for place in sorted(self._held):
            if before is not None and place >= before:
                break
            call = self._held[place]
            if (arguments := self._whole(call, ended=before is None)) is None:
                break
            del self._held[place]
            self._sent = place + 1
            self._chars -= sum(map(len, call.arguments))
            pieces += [call.first, {"index": place, "function": {"arguments": arguments}}]
        return pieces

    def _whole(self, call: HeldCall, *, ended: bool) -> str | None:
        """A call's arguments, readable; None while they are not. What an unknown tool is called with goes out as it is,
        once there is no more of it."""
        name = call.first["function"].get("name")
        if not name or not (ended or self._may_be_complete(call)):
            return None
        call.judged = len(call.arguments)
        text = "".join(call.arguments)
        if self._schemas is None:
            sent = declared_tools(self._chat.body)
            self._schemas = {self._chat.tool_names.get(name, name): schema for name, schema in sent.items()}
        schema = self._schemas.get(name)
        mended = mended_arguments(text, schema)
        return text if mended is None and schema is None and ended else mended

    @staticmethod
    def _may_be_complete(call: HeldCall) -> bool:
        """Whether there is something new that ends like JSON: the whole is not read again with each piece."""
        new = len(call.arguments) > call.judged
        return new and call.arguments[-1].rstrip()[-1:] in ("}", '"', "`")
