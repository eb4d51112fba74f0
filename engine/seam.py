"""Where a second stream joins what the client has: verified before a byte goes out (SPEC 14.5).

The new stream has to bring something first that the client has already: the tail of a prefill, the anchor of a
re-ask, or all of it where the model started over. That is dropped, and what follows is the rest. White space and
quotation marks may differ in what comes back, so two texts are compared in their plain form; at the seam itself the
white space is reckoned up exactly. Whatever else the stream begins with is no continuation, and it is given up: the
client's text must always be one that a single answer could have had. `engine/place.py` finds the seam; here is what
is held back, given on and given up. No I/O; `now` is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.place import Found, Joint, Misfit, Place, Restart
from engine.rescue import Continuation
from engine.story import Story
from engine.wording import is_first_half, is_unfinished, whole_letters
from wire.chat import Event, chunk_of, frame
from wire.jsontext import JSON, load_inner

HELD_CHARS_MAX = 240  # SPEC 14.5, as is the next
HELD_S = 3.0  # from the first word


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done about one batch: these events go to the client, none while the stream is held back. `misfit`:
    the stream is given up, behind these events."""

    events: list[Event]
    misfit: Misfit | None = None


class Seam:
    """One attempt to go on. `joined` once the client's text and the stream's are one: from then on the stream is the
    answer, and only NOT_JSON can still end it."""

    def __init__(self, story: Story, asked: Continuation) -> None:
        text, self._half = story.text_and_half()
        self.joined = not text.strip() and not self._half
        self._story = story
        self._lacks_more = is_unfinished(text)  # as long as nothing has been added to it
        self._place = Place(text, asked)
        self._restart: Restart | None = None
        self._joint: Joint | None = None
        self._held = ""
        self._since: float | None = None  # its first word came
        self._skips_blank = self.joined and bool(text)  # the client has the white space before the first word
        self._json: list[str] | None = [text] if asked.is_json else None  # the answer so far, where it must be JSON

    @property
    def holding(self) -> bool:
        """Whether words are held back whose place is not known yet, for no longer than HELD_S."""
        return not self.joined and self._since is not None and self._restart is None

    def feed(self, events: list[Event], now: float) -> Step:
        """Take the stream's next events, or none where only time has passed."""
        out: list[Event] = []
        misfit: Misfit | None = None
        for event in events:
            if misfit := self._event(event, now, out):
                break
        if misfit is None and not self.joined and self._since is not None and now - self._since > HELD_S:
            misfit = self._no_longer(out, Misfit.TOO_LATE)
        return Step(out, misfit)

    def end(self) -> Step:
        """The stream has ended without saying how."""
        out: list[Event] = []
        return Step(out, self._ended(out) or (self._unfinished() if self._story.open else None))

    def _event(self, event: Event, now: float, out: list[Event]) -> Misfit | None:
        """Reasoning and role are left out: the client has them, or is past them."""
        delta = event.delta
        if text := delta.get("content"):
            if self._since is None and not text.isspace():
                self._since = now
            if misfit := self._text(text, out):
                return misfit
        more = {name: delta[name] for name in ("refusal", "tool_calls") if delta.get(name)}
        finish = event.finish
        if not more and not finish:
            return None
        if misfit := self._ended(out):
            return misfit
        if finish == "stop" and (misfit := self._unfinished()):
            return misfit
        self._give(more, out, finish)
        return None

    def _unfinished(self) -> Misfit | None:
        """Why no answer ends here, if none does."""
        if self._lacks_more:
            return Misfit.ENDED
        if self._json is not None and load_inner("".join(self._json)) is None:
            self._story.spoilt = True
            return Misfit.NOT_JSON
        return None

    def _give(self, delta: JSON, out: list[Event], finish: str | None = None) -> None:
        chunk = chunk_of(self._story.head, delta, finish)
        out.append(Event(frame(chunk), chunk))

    def _give_text(self, text: str, out: list[Event]) -> None:
        self.joined = True
        if self._skips_blank:
            text = text.lstrip()
            self._skips_blank = not text
        if self._json is not None:
            self._json.append(text)
        self._lacks_more = self._lacks_more and not text.strip()
        if text:
            self._give({"content": text}, out)

    def _text(self, text: str, out: list[Event]) -> Misfit | None:
        if self.joined:
            self._give_text(text, out)
            return None
        if self._joint is not None:
            return self._rest(self._joint.feed(text), out)
        self._held = whole_letters(self._held + text)
        half = self._held[-1] if is_first_half(self._held[-1]) else ""
        ready = self._held.removesuffix(half)
        if self._restart is not None:
            found, self._held = self._restart.feed(ready), half
        else:
            found = self._place.find(ready, ended=False)
        if isinstance(found, Found):
            return self._found(found, ready + half, out)
        if found is None and self._restart is None:
            if (begun := self._place.begun) is not None:
                self._restart, self._held = begun, half
            elif len(ready) > HELD_CHARS_MAX:
                return self._no_longer(out, Misfit.TOO_LONG)
        return found

    def _found(self, found: Found, text: str, out: list[Event]) -> Misfit | None:
        self._joint = Joint(self._place.blank, self._half, found.runs)
        return self._rest(self._joint.feed(text[found.end :]), out)

    def _rest(self, given: str | Misfit | None, out: list[Event]) -> Misfit | None:
        if given is None or isinstance(given, Misfit):
            return given
        self._give_text(given, out)
        return None

    def _no_longer(self, out: list[Event], misfit: Misfit) -> Misfit | None:
        """No more waiting: what has come decides. A restart that fits so far is a match, and so is a seam in whose
        white space the stream stands."""
        if self._restart is not None or self._joint is not None:
            return None
        found = self._place.find(self._held, ended=True)
        return self._found(found, self._held, out) if isinstance(found, Found) else misfit

    def _ended(self, out: list[Event]) -> Misfit | None:
        """No more text comes; a misfit unless the seam has been passed."""
        if self.joined:
            return None
        if self._restart is not None:
            return Misfit.ENDED
        if self._joint is None:
            found = self._place.find(self._held, ended=True)
            if not isinstance(found, Found):
                return found
            if misfit := self._found(found, self._held, out):
                return misfit
        return None if self.joined or self._joint is None else self._rest(self._joint.end(), out)
