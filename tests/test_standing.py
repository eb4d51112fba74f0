"""Protection's memory as tables: what rests, what sessions keep and avoid, and how a request stands (SPEC 7)."""

import pytest
from worlds import World

from protection import Failed, Failure, Kind, Level, Phase, UpstreamError
from routing.cooldowns import Cooldowns
from routing.sessions import SESSIONS_MAX, Banned, Sessions, Uses
from routing.standing import NO_STANDING, Protection

TTL_S = 1800.0
BEFORE, MID = Phase.BEFORE_STREAM, Phase.MID_STREAM
PHASES = {BEFORE: "before-stream", MID: "mid-stream"}


# --- Cooldowns (SPEC 7.4) -----------------------------------------------------------------------------------------


def test_a_cooldown_counts_down_and_ends_by_itself():
    cooldowns = Cooldowns[str]()
    cooldowns.set("a", until=15.0, now=0.0)

    assert [cooldowns.left("a", now) for now in (0.0, 10.0, 14.5, 15.0, 99.0)] == [15.0, 5.0, 0.5, 0.0, 0.0]
    assert cooldowns.left("b", 0.0) == 0.0
    assert len(cooldowns) == 0  # read after its end: gone


def test_a_later_failure_lengthens_a_cooldown_and_never_shortens_it():
    cooldowns = Cooldowns[str]()
    cooldowns.set("a", until=100.0, now=0.0)
    cooldowns.set("a", until=15.0, now=1.0)
    assert cooldowns.left("a", 2.0) == 98.0

    cooldowns.set("a", until=120.0, now=2.0)
    assert cooldowns.left("a", 2.0) == 118.0


def test_a_cooldown_that_would_be_over_already_is_none():
    cooldowns = Cooldowns[str]()
    cooldowns.set("a", until=5.0, now=5.0)

    assert len(cooldowns) == 0


# When something that rests may be tried: its failures and how long each rests it, whether until a time that the
# provider named, and when the first trial is due.
TRIALS = {
    "a second after the failure": ([(0.0, 15.0, False)], 1.0),
    "a second after the last failure": ([(0.0, 15.0, False), (4.0, 15.0, False)], 5.0),
    "when the rest is over, if that is sooner": ([(0.0, 0.5, False)], 0.5),
    "never before a time that was named": ([(0.0, 15.0, True)], 15.0),
    "a named time counts beside a later guess": ([(0.0, 10.0, True), (2.0, 60.0, False)], 10.0),
    "a named time counts beside an earlier guess": ([(0.0, 60.0, False), (2.0, 30.0, True)], 32.0),
    "the later of two named times": ([(0.0, 60.0, True), (2.0, 30.0, True)], 60.0),
}


@pytest.mark.parametrize(("failures", "trial_at"), TRIALS.values(), ids=TRIALS)
def test_what_rests_may_be_tried(failures, trial_at):
    cooldowns = Cooldowns[str]()
    for now, rest_s, firm in failures:
        cooldowns.set("a", now + rest_s, now, firm=firm)

    assert cooldowns.get("a", failures[-1][0]).trial_at() == trial_at


def test_a_success_ends_a_rest_unless_that_was_set_after_it_began():
    cooldowns = Cooldowns[str]()
    cooldowns.set("a", until=100.0, now=5.0)
    assert not cooldowns.lift("a", began=4.0, now=6.0)
    assert cooldowns.left("a", 6.0) == 94.0

    assert cooldowns.lift("a", began=5.5, now=6.0)
    assert cooldowns.left("a", 6.0) == 0.0
    assert not cooldowns.lift("a", began=9.0, now=9.0)


def test_listing_cooldowns_shows_those_that_last_and_forgets_the_others():
    cooldowns = Cooldowns[str]()
    for name, until in {"a": 10.0, "b": 20.0, "c": 30.0}.items():
        cooldowns.set(name, until, now=0.0)

    assert dict(cooldowns.active(now=15.0)) == {"b": 5.0, "c": 15.0}
    assert len(cooldowns) == 2
    cooldowns.clear(now=0.0)
    assert dict(cooldowns.active(now=15.0)) == {}


def test_a_full_map_of_cooldowns_makes_room_by_forgetting_the_expired_first():
    cooldowns = Cooldowns[int](entries_max=100)
    for n in range(100):
        cooldowns.set(n, until=10.0 if n % 2 else 1000.0, now=0.0)

    cooldowns.set(100, until=50.0, now=20.0)

    assert {n for n, _ in cooldowns.active(now=20.0)} == {*range(0, 100, 2), 100}


def test_a_map_full_of_live_cooldowns_never_grows_and_loses_what_ends_soonest():
    cooldowns = Cooldowns[int](entries_max=100)
    for n in range(1000):
        cooldowns.set(n, until=1000.0 + n, now=0.0)
        assert len(cooldowns) <= 100

    assert {n for n, _ in cooldowns.active(now=0.0)} == set(range(900, 1000))


# --- Sessions (SPEC 7.1) ------------------------------------------------------------------------------------------


def test_a_session_keeps_its_model_and_key_until_it_has_not_been_used_for_its_time():
    sessions = Sessions(TTL_S)
    sessions.pin("s", model=1, key_id=2, now=0.0)
    sessions.pin("s", model=1, key_id=2, now=1000.0)

    kept = sessions.get("s", 1000.0 + TTL_S - 0.001)
    assert (kept.model, kept.key) == (1, 2)
    assert sessions.get("s", 1000.0 + TTL_S) is None
    assert len(sessions) == 0


def test_looking_at_a_session_does_not_prolong_it():
    sessions = Sessions(TTL_S)
    sessions.pin("s", model=1, key_id=2, now=0.0)
    assert sessions.get("s", TTL_S - 1) is not None

    assert sessions.get("s", TTL_S + 1) is None


def test_bans_survive_the_clearing_of_the_models_pin():
    sessions = Sessions(TTL_S)
    sessions.ban("s", "x", "why", now=0.0)
    sessions.pin("s", model=1, key_id=2, now=1.0)

    sessions.clear_model("s", model=1, now=2.0)

    session = sessions.get("s", 3.0)
    assert (session.model, session.key, set(session.bans)) == (None, None, {"x"})


def test_bans_survive_a_new_pin():
    sessions = Sessions(TTL_S)
    sessions.ban("s", "x", "why", now=0.0)
    sessions.pin("s", model=1, key_id=2, now=1.0)
    sessions.pin("s", model=3, key_id=4, now=2.0)

    assert set(sessions.get("s", 3.0).bans) == {"x"}


def test_a_ban_counts_from_itself_however_much_the_session_is_used():
    sessions = Sessions(TTL_S)
    sessions.ban("s", "x", "the first", now=0.0)
    sessions.ban("s", "y", "the only one", now=100.0)
    for now in (0.5 * TTL_S, TTL_S - 1):
        sessions.pin("s", model=1, key_id=2, now=now)
    assert sessions.get("s", TTL_S - 1).banned(TTL_S - 1) == {
        "x": Banned(TTL_S, "the first"), "y": Banned(TTL_S + 100, "the only one"),
    }  # fmt: skip

    assert set(sessions.get("s", TTL_S).banned(TTL_S)) == {"y"}
    assert sessions.get("s", TTL_S + 100).banned(TTL_S + 100) == {}
    assert sessions.get("s", TTL_S + 100).model == 1


def test_a_ban_met_again_is_renewed_with_its_new_reason():
    sessions = Sessions(TTL_S)
    sessions.ban("s", "x", "the first", now=0.0)
    sessions.ban("s", "x", "the second", now=60.0)

    assert sessions.get("s", 61.0).banned(61.0) == {"x": Banned(60.0 + TTL_S, "the second")}


def test_lifting_the_bans_ends_them_all_and_says_how_many_there_were():
    sessions = Sessions(TTL_S)
    for session, platform, now in (("s", "x", 0.0), ("s", "y", 900.0), ("t", "x", 900.0)):
        sessions.ban(session, platform, "why", now=now)
    sessions.pin("s", model=1, key_id=2, now=900.0)

    assert sessions.lift_bans(TTL_S) == 2  # one had ended by itself
    assert [session.banned(TTL_S) for _, session in sessions.active(TTL_S)] == [{}, {}]
    assert sessions.get("s", TTL_S).model == 1
    assert sessions.lift_bans(TTL_S) == 0


def test_a_session_is_a_conversation_from_its_second_request_on():
    sessions = Sessions(TTL_S)
    told = []
    for now in (0.0, 1.0, 2.0):
        sessions.arrived("s", now)
        told.append(sessions.is_conversation("s", now))

    assert told == [False, True, True]
    assert not sessions.is_conversation("another", 2.0)
    assert not sessions.is_conversation("s", 2.0 + TTL_S)


def test_what_a_session_has_to_avoid_is_avoided_by_its_next_request_only():
    sessions = Sessions(TTL_S)
    sessions.arrived("s", 0.0)
    sessions.avoid_next("s", model=1, now=0.0)
    seen = []
    for now in (1.0, 2.0):
        sessions.arrived("s", now)
        seen.append(set(sessions.get("s", now).avoid))

    assert seen == [{1}, set()]


def test_only_the_pinned_model_is_cleared():
    sessions = Sessions(TTL_S)
    sessions.pin("s", model=1, key_id=2, now=0.0)

    sessions.clear_model("s", model=9, now=0.0)

    assert sessions.get("s", 0.0).model == 1


def test_clearing_the_key_keeps_the_model():
    sessions = Sessions(TTL_S)
    sessions.pin("s", model=1, key_id=2, now=0.0)
    sessions.clear_key("s", key_id=9, now=0.0)
    assert sessions.get("s", 0.0).key == 2

    sessions.clear_key("s", key_id=2, now=0.0)

    session = sessions.get("s", 0.0)
    assert (session.model, session.key) == (1, None)


def test_without_a_session_key_every_operation_does_nothing():
    sessions = Sessions(TTL_S)
    sessions.pin("", model=1, key_id=2, now=0.0)
    sessions.ban("", "x", "why", now=0.0)
    sessions.arrived("", now=0.0)
    sessions.avoid_next("", model=1, now=0.0)
    sessions.clear_model("", model=1, now=0.0)
    sessions.clear_key("", key_id=2, now=0.0)

    assert sessions.get("", 0.0) is None
    assert len(sessions) == 0


def test_twenty_thousand_sessions_leave_the_newest_ten_thousand():
    sessions = Sessions(TTL_S)
    largest = 0
    for n in range(20_000):
        sessions.pin(f"s{n}", model=1, key_id=2, now=n / 100)
        largest = max(largest, len(sessions))

    assert largest == len(sessions) == SESSIONS_MAX == 10_000
    assert {key for key, _ in sessions.active(200.0)} == {f"s{n}" for n in range(10_000, 20_000)}


def test_the_oldest_use_counts_and_not_the_first():
    sessions = Sessions(TTL_S, entries_max=3)
    for now, key in enumerate(["a", "b", "c", "a", "d"]):
        sessions.pin(key, model=1, key_id=2, now=float(now))

    assert [key for key, _ in sessions.active(5.0)] == ["c", "a", "d"]


def test_expired_sessions_go_before_live_ones():
    sessions = Sessions(TTL_S, entries_max=100)
    for n in range(60):
        sessions.pin(f"old{n}", model=1, key_id=2, now=0.0)
    for n in range(40):
        sessions.pin(f"live{n}", model=1, key_id=2, now=TTL_S - 1)

    sessions.pin("new", model=1, key_id=2, now=TTL_S + 1)

    assert {key for key, _ in sessions.active(TTL_S + 1)} == {*(f"live{n}" for n in range(40)), "new"}
    assert len(sessions) == 41


# --- Uses (SPEC 7.5) ----------------------------------------------------------------------------------------------


def used(*uses: tuple[str, str, float]) -> Uses:
    """What was used by whom and when."""
    record = Uses()
    for thing, session, now in uses:
        record.record(thing, session, now)
    return record


USES = {
    "nothing was used": ([], "me", 0.0, set()),
    "by another": ([("m", "you", 1.0)], "me", 0.0, {"m"}),
    "by myself only": ([("m", "me", 1.0)], "me", 0.0, set()),
    "by another, before": ([("m", "you", 1.0)], "me", 1.0, set()),
    "by another and then by me": ([("m", "you", 1.0), ("m", "me", 2.0)], "me", 0.0, {"m"}),
    "by me and then by another": ([("m", "me", 1.0), ("m", "you", 2.0)], "me", 1.5, {"m"}),
    "by another long ago, by me just now": ([("m", "you", 1.0), ("m", "me", 9.0)], "me", 5.0, set()),
    "in turns": ([("m", "me", 1.0), ("m", "you", 2.0), ("m", "me", 3.0)], "me", 1.5, {"m"}),
    "often by me since": ([("m", "you", 1.0), ("m", "me", 2.0), ("m", "me", 3.0)], "me", 0.0, {"m"}),
    "by a third": ([("m", "x", 1.0), ("m", "you", 2.0), ("m", "me", 3.0)], "me", 1.5, {"m"}),
    "several things": ([("m", "you", 1.0), ("n", "you", 2.0), ("o", "me", 3.0)], "me", 1.5, {"n"}),
}


@pytest.mark.parametrize(("uses", "session", "since", "expected"), USES.values(), ids=USES)
def test_what_others_used_lately_is_known(uses, session, since, expected):
    assert used(*uses).by_others(session, since) == expected


# --- What protection says of a request (SPEC 7.5 to 7.7) ----------------------------------------------------------

BANNING, SKIPPING, OFF = "banning", "skipping", "indifferent"


def protection(levels: dict[str, Level] | None = None) -> Protection:
    given = {BANNING: Level.PROVIDER_BAN, SKIPPING: Level.MODEL_SKIP, OFF: Level.OFF} if levels is None else levels
    return Protection(levels=given, sticky_ttl_s=TTL_S, thread_cooldown_s=180.0)


def test_a_platform_nobody_mentions_is_on_model_skip():
    assert protection({}).level("anything") is Level.MODEL_SKIP


def talk(state: Protection, *sessions: str, now: float = 0.0) -> None:
    """These sessions have had their second request."""
    for session in sessions:
        state.sessions.arrived(session, now)
        state.sessions.arrived(session, now)


@pytest.mark.parametrize(
    ("platform", "same_model", "other_model"), [(BANNING, True, True), (SKIPPING, True, False), (OFF, False, False)]
)
def test_what_another_session_used_is_held_back_as_far_as_the_level_says(platform, same_model, other_model):
    state = protection()
    talk(state, "you")
    state.used("you", platform, 1, now=0.0)

    standing = state.standing("me", 179.0, auto=True)
    assert standing.holds_back(1, platform) is same_model
    assert standing.holds_back(2, platform) is other_model
    assert not standing.holds_back(3, "elsewhere")
    assert not state.standing("me", 181.0, auto=True).holds_back(1, platform)


@pytest.mark.parametrize("platform", [BANNING, SKIPPING])
def test_a_sessions_own_model_is_never_held_back_by_what_others_used(platform):
    state = protection()
    talk(state, "me", "you")
    state.sessions.pin("me", model=1, key_id=1, now=0.0)
    state.used("me", platform, 1, now=0.0)
    state.used("you", platform, 1, now=1.0)

    assert not state.standing("me", 2.0, auto=True).holds_back(1, platform)
    assert state.standing("another", 2.0, auto=True).holds_back(1, platform)


@pytest.mark.parametrize("session", ["", "one-shot"])
def test_what_a_request_without_a_conversation_uses_holds_nobody_back(session):
    state = protection()
    state.sessions.arrived(session, 0.0)
    state.used(session, BANNING, 1, now=0.0)
    state.begin(session, BANNING, 1, now=0.0)

    assert not state.standing("me", 1.0, auto=True).holds_back(1, BANNING)
    assert not state.standing("", 1.0, auto=True).holds_back(1, BANNING)


def test_a_platform_that_serves_a_session_now_is_held_back_from_all_others():
    state = protection()
    talk(state, "you")
    entry = state.begin("you", BANNING, 1, now=0.0)

    assert state.standing("me", 1.0, auto=True).holds_back(2, BANNING)
    assert state.standing("", 1.0, auto=True).holds_back(2, BANNING)
    assert not state.standing("you", 1.0, auto=True).holds_back(2, BANNING)
    assert state.standing("", 1.0, auto=False) is NO_STANDING

    state.end(entry)
    assert not state.standing("me", 1.0, auto=True).holds_back(2, BANNING)


@pytest.mark.parametrize("platform", [SKIPPING, OFF])
def test_other_levels_serve_several_sessions_at_a_time(platform):
    state = protection()
    talk(state, "you")
    state.begin("you", platform, 1, now=0.0)

    assert not state.standing("me", 1.0, auto=True).holds_back(1, platform)


def test_two_attempts_of_a_session_are_two_entries():
    state = protection()
    talk(state, "you")
    first, second = (state.begin("you", BANNING, 1, now=0.0) for _ in range(2))
    state.end(first)
    assert state.standing("me", 1.0, auto=True).holds_back(1, BANNING)

    state.end(second)
    assert not state.active


def test_looking_at_how_a_request_stands_changes_nothing():
    state = protection()
    talk(state, "me", "you")
    state.sessions.pin("me", model=1, key_id=1, now=0.0)
    state.sessions.avoid_next("me", model=2, now=0.0)
    state.used("you", SKIPPING, 1, now=0.0)

    first, second = (state.standing("me", 1.0, auto=True) for _ in range(2))

    assert first == second
    assert len(state.sessions) == 2
    assert state.standing("a stranger", 1.0, auto=True).preferred_model is None
    assert len(state.sessions) == 2


# --- What a failure costs a session (SPEC 7.3) --------------------------------------------------------------------

FAILURE_OF = {
    Kind.SERVER: UpstreamError(Failure.SERVER_ERROR, "", status=503),
    Kind.TRUNCATION: UpstreamError(Failure.TRUNCATED, ""),
    Kind.RETRYABLE: UpstreamError(Failure.EMPTY, ""),
}


@pytest.fixture
def world(world_store) -> World:
    """One model each on platforms of the three levels, and books."""
    levels = {BANNING: Level.PROVIDER_BAN, SKIPPING: Level.MODEL_SKIP, OFF: Level.OFF}
    made = World({"platform": BANNING}, {"platform": SKIPPING}, {"platform": OFF}, levels=levels)
    made.keep_books(world_store)
    return made


def meet(world: World, session: str, platform: str, kind: Kind, phase: Phase, now: float) -> None:
    """The session's attempt on the platform's model fails."""
    (model,) = (model for model in world.models if model.platform.id == platform)
    world.settle(world.route(model.id), Failed(FAILURE_OF[kind], phase), now, session=session)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("kind", Kind)
def test_a_ban_clears_the_pin_and_holds_for_that_session_alone(world, kind, phase):
    state = world.protection
    for session in ("me", "you"):
        state.sessions.pin(session, model=1, key_id=1, now=0.0)

    meet(world, "me", BANNING, kind, phase, now=1.0)

    mine, yours = (state.standing(session, 2.0, auto=True) for session in ("me", "you"))
    assert (mine.preferred_model, mine.preferred_key, set(mine.banned)) == (None, None, {BANNING})
    assert (yours.preferred_model, set(yours.banned)) == (1, set())
    reason = f"provider-ban:{kind.value}:{PHASES[phase]}"
    assert state.bans(2.0) == [("me", {BANNING: Banned(1.0 + TTL_S, reason)})]
    assert state.bans(1.0 + TTL_S) == []


@pytest.mark.parametrize("kind", Kind)
def test_a_skipped_model_of_a_broken_stream_comes_last_in_the_next_request_only(world, kind):
    state = world.protection
    state.sessions.pin("me", model=2, key_id=1, now=0.0)

    meet(world, "me", SKIPPING, kind, MID, now=1.0)

    standings = []
    for now in (2.0, 3.0):
        state.sessions.arrived("me", now)
        standings.append(state.standing("me", now, auto=True))
    first, second = standings
    assert first.preferred_model is None
    assert first.holds_back(2, SKIPPING)
    assert not first.holds_back(1, SKIPPING)
    assert second.preferred_model == 2
    assert not second.holds_back(2, SKIPPING)
    assert state.bans(2.0) == []


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("kind", Kind)
def test_off_changes_nothing_for_the_session(world, kind, phase):
    state = world.protection
    state.sessions.pin("me", model=3, key_id=1, now=0.0)
    before = state.standing("me", 0.5, auto=True)

    meet(world, "me", OFF, kind, phase, now=1.0)

    state.sessions.arrived("me", 2.0)
    assert state.standing("me", 2.0, auto=True) == before


def test_a_request_without_a_session_is_not_banned(world):
    meet(world, "", BANNING, Kind.SERVER, BEFORE, now=0.0)

    assert world.protection.bans(0.0) == []
    assert len(world.protection.sessions) == 0
