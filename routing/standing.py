"""How each request stands: protection's state in memory, and what it says of one request before it is routed.

Sessions, cooldowns, running attempts and trials. Only the effects of protection.costs change it (engine/settle.py), and
the operator. `now` is in seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping

from msgspec import Struct

from protection import HINTLESS_STEPS, Level, RestKey
from routing.cooldowns import COOLDOWNS_MAX, FOLLOWERS_LIMITED, TRIAL_SPACING_S, Cooldowns
from routing.sessions import Banned, Session, Sessions, Uses
from routing.trials import Trials


class Active(Struct, eq=False):
    """One attempt that is running now. `guards`: its session is a conversation, so others keep away (SPEC 7.10)."""

    session: str
    platform: str
    model: int
    since: float
    guards: bool = True


class Standing(Struct, frozen=True):
    """What protection says of one request before it is routed. Ids of models; names of platforms."""

    preferred_model: int | None = None
    preferred_key: int | None = None
    banned: Collection[str] = ()
    avoided_models: Collection[int] = ()  # cut this session's last answer short
    others_models: Collection[Hashable] = ()  # used by other sessions lately
    others_platforms: Collection[Hashable] = ()
    busy_platforms: Collection[Hashable] = ()  # serving another session right now

    def holds_back(self, model: int, platform: str) -> bool:
        """Whether this model comes last. It is not forbidden: it is tried when all others have failed (SPEC 7.7)."""
        if platform in self.busy_platforms or model in self.avoided_models:
            return True
        return model != self.preferred_model and (model in self.others_models or platform in self.others_platforms)


NO_STANDING = Standing()


class Protection:
    """All protection state of one gateway."""

    def __init__(
        self,
        *,
        levels: Mapping[str, Level],
        sticky_ttl_s: float,
        thread_cooldown_s: float,
        trial_spacing_s: float = TRIAL_SPACING_S,
    ) -> None:
        self.levels = dict(levels)
        self.sessions = Sessions(sticky_ttl_s)
        self.transient: Cooldowns[int] = Cooldowns(spacing_s=trial_spacing_s)
        self.keys: Cooldowns[tuple[int, int]] = Cooldowns(  # (key, model)
            spacing_s=trial_spacing_s, followers=FOLLOWERS_LIMITED
        )
        self.strikes: dict[tuple[int, int], int] = {}  # 429s in a row that named no time, by (key, model)
        self.trials = Trials(trial_spacing_s)
        self.trial_spacing_s = trial_spacing_s
        self.active: set[Active] = set()
        self._thread_cooldown_s = thread_cooldown_s
        self._model_uses = Uses()
        self._platform_uses = Uses()

    def level(self, platform: str) -> Level:
        return self.levels.get(platform, Level.MODEL_SKIP)

    def standing(self, session: str, now: float, *, auto: bool, arrived: bool = True) -> Standing:
        """How this request stands; a pinned one (`auto` false) is held back by nobody. Changes nothing.

        `arrived`: its session has counted it already."""
        if not auto:
            return NO_STANDING
        busy: set[Hashable] = {
            entry.platform
            for entry in self.active
            if entry.guards and entry.session != session and self.level(entry.platform) is Level.PROVIDER_BAN
        }
        if not session:
            return Standing(busy_platforms=busy) if busy else NO_STANDING
        own = self.sessions.get(session, now) or Session(now)
        since, avoid = now - self._thread_cooldown_s, own.avoid if arrived else own.avoid_next
        return Standing(
            preferred_model=None if own.model in avoid else own.model,
            preferred_key=own.key,
            banned=tuple(own.banned(now)),
            avoided_models=avoid,
            others_models=self._model_uses.by_others(session, since),
            others_platforms=self._platform_uses.by_others(session, since),
            busy_platforms=busy,
        )

    def begin(self, session: str, platform: str, model: int, now: float) -> Active:
        """Note a running attempt; whoever began it gives the entry to `end` on every way out."""
        entry = Active(session, platform, model, now, bool(session) and self.sessions.is_conversation(session, now))
        self.active.add(entry)
        return entry

    def end(self, entry: Active) -> None:
        self.active.discard(entry)

    def used(self, session: str, platform: str, model: int, now: float) -> None:
        """A conversation was served here: others leave it alone for a while, as far as the level says (SPEC 7.5)."""
        if not session or not self.sessions.is_conversation(session, now):
            return
        level = self.level(platform)
        if level is Level.PROVIDER_BAN:
            self._platform_uses.record(platform, session, now)
        elif level is Level.MODEL_SKIP:
            self._model_uses.record(model, session, now)

    def rest_key(self, key: int, model: int, rest: RestKey, now: float) -> None:
        """Carry a RestKey out, and count those in a row that name no time."""
        self.keys.set((key, model), rest.until, now, firm=rest.firm)
        if not rest.firm:
            if len(self.strikes) >= COOLDOWNS_MAX:  # the oldest row of 429s is the least loss
                del self.strikes[next(iter(self.strikes))]
            self.strikes[key, model] = min(self.strikes.get((key, model), 0) + 1, HINTLESS_STEPS)

    def end_rests(self, key: int, model: int, began: float, now: float) -> bool:
        """Carry Recover out; whether something had rested."""
        self.strikes.pop((key, model), None)
        if not (self.transient.rests or self.keys.rests):
            return False
        lifted = self.transient.lift(model, began, now)
        return self.keys.lift((key, model), began, now) or lifted

    def begun(self, key: int, model: int, now: float) -> None:
        """One more asks, perhaps something that has just rested."""
        if self.transient.recovering or self.keys.recovering:
            self.transient.begun(model, now)
            self.keys.begun((key, model), now)

    def answered(self, key: int, model: int, now: float) -> bool:
        """An answer has begun; whether that makes room for others at what has just rested."""
        if not (self.transient.recovering or self.keys.recovering):
            return False
        room = self.transient.answered(model, now)
        return self.keys.answered((key, model), now) or room

    def space_trials(self, key: int, model: int, now: float) -> None:
        """Carry SpaceTrials out."""
        self.transient.failed(model, now)
        self.keys.failed((key, model), now)

    def bans(self, now: float) -> list[tuple[str, dict[str, Banned]]]:
        return [(key, session.bans) for key, session in self.sessions.active(now) if session.banned(now)]

    def lift_bans(self, now: float) -> int:
        """End every session's bans; gives how many there were."""
        return self.sessions.lift_bans(now)

    def clear_cooldowns(self, now: float) -> None:
        self.transient.clear(now)
        self.keys.clear(now)
        self.strikes.clear()
