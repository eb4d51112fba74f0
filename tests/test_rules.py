"""The rules of protection as tables: what is decided, what is remembered, for how long and how much of it."""

import itertools

import pytest

from protection import (
    RULES,
    Action,
    Context,
    Cooling,
    Failure,
    Kind,
    Level,
    Phase,
    Scope,
    UpstreamError,
    evaluate,
    parse_levels,
)
from routing.cooldowns import Cooldowns
from routing.sessions import SESSIONS_MAX, Sessions, Uses
from routing.standing import NO_STANDING, Protection

TTL_S = 1800.0
BEFORE, MID = Phase.BEFORE_STREAM, Phase.MID_STREAM


# --- evaluate (SPEC 7.3) ------------------------------------------------------------------------------------------

# What each level costs, whatever the kind and the phase: ban the provider, skip the model, clear the sticky model.
COSTS = {
    Level.PROVIDER_BAN: (True, False, True),
    Level.MODEL_SKIP: (False, True, False),
    Level.OFF: (False, False, False),
}
PHASES = {BEFORE: "before-stream", MID: "mid-stream"}


@pytest.mark.parametrize(("level", "kind", "phase"), list(itertools.product(Level, Kind, Phase)))
def test_a_failure_costs_what_the_platforms_level_says(level, kind, phase):
    ban, skip, clear = COSTS[level]

    action = evaluate(Context(level, kind, phase))

    assert action == Action(ban, skip, clear, f"{level.value}:{kind.value}:{PHASES[phase]}")


def test_there_are_three_levels_three_kinds_and_two_phases():
    assert set(Level) == {"provider-ban", "model-skip", "off"}
    assert set(Kind) == {"5xx", "truncation", "retryable"}
    assert len(Phase) == 2
    assert evaluate(Context(Level.PROVIDER_BAN, Kind.SERVER, MID)).reason == "provider-ban:5xx:mid-stream"


# --- THREAD_PROTECTION_PLATFORMS (SPEC 7.2) -----------------------------------------------------------------------

DEFAULTS = {"longcat": Level.PROVIDER_BAN, "groq": Level.MODEL_SKIP}
LEVEL_TEXTS = {
    "empty": ("", {}, 0),
    "only blanks": ("  \t ", {}, 0),
    "only commas": (",, ,", {}, 0),
    "one pair": ("groq:provider-ban", {"groq": "provider-ban"}, 0),
    "several pairs": ("groq:off,mistral:provider-ban,x:model-skip", {"groq": "off", "mistral": "provider-ban"}, 0),
    "a comma at the end": ("groq:off,", {"groq": "off"}, 0),
    "blanks everywhere": ("  groq : off ,\tmistral:  provider-ban\n", {"groq": "off", "mistral": "provider-ban"}, 0),
    "upper case": ("GROQ:Provider-Ban,Mistral:OFF", {"groq": "provider-ban", "mistral": "off"}, 0),
    "the last of two wins": ("groq:off,groq:provider-ban", {"groq": "provider-ban"}, 0),
    "longcat is kept when others are set": ("mistral:off", {"longcat": "provider-ban", "mistral": "off"}, 0),
    "longcat can be switched off": ("longcat:off", {"longcat": "off"}, 0),
    "longcat can be lowered": ("longcat:model-skip", {"longcat": "model-skip"}, 0),
    "no colon": ("groq", {}, 1),
    "no level": ("groq:", {}, 1),
    "no platform": (":off", {}, 1),
    "only a colon": (":", {}, 1),
    "unknown level": ("groq:strict", {}, 1),
    "almost a level": ("groq:provider_ban", {}, 1),
    "two colons": ("groq:off:off", {}, 1),
    "the malformed leave the others alone": ("groq,longcat:never,mistral:off", {"mistral": "off"}, 2),
}


@pytest.mark.parametrize(("text", "changes", "warned"), LEVEL_TEXTS.values(), ids=LEVEL_TEXTS)
def test_levels_are_read_over_the_catalogues(text, changes, warned):
    levels, warnings = parse_levels(text, DEFAULTS)

    expected = {**DEFAULTS, **changes}
    assert {platform: levels[platform] for platform in expected} == expected
    assert len(warnings) == warned
    assert all(isinstance(level, Level) for level in levels.values())


def test_a_warning_names_what_was_ignored_and_what_would_be_accepted():
    _, (warning,) = parse_levels("groq: strict", DEFAULTS)

    assert "groq: strict" in warning
    assert all(level.value in warning for level in Level)


def test_a_platform_whose_id_has_capitals_can_be_set():
    levels, _ = parse_levels("myplatform:off", {"MyPlatform": Level.PROVIDER_BAN})

    assert levels["MyPlatform"] is Level.OFF


def test_reading_levels_leaves_the_defaults_alone():
    parse_levels("longcat:off", DEFAULTS)

    assert DEFAULTS["longcat"] is Level.PROVIDER_BAN


def test_a_platform_nobody_mentions_is_on_model_skip():
    assert protection({}).level("anything") is Level.MODEL_SKIP


# Failure: what it takes from this request, what from everybody, what protection calls it. SPEC 5.2, row by row.
COST_OF = {
    Failure.SERVER_ERROR: (Scope.MODEL, Cooling.TRANSIENT, Kind.RETRYABLE),
    Failure.STALL: (Scope.MODEL, Cooling.TRANSIENT, Kind.RETRYABLE),
    Failure.TIMEOUT: (Scope.MODEL, Cooling.TRANSIENT, Kind.RETRYABLE),
    Failure.CONNECTION: (Scope.MODEL, Cooling.TRANSIENT, Kind.RETRYABLE),
    Failure.RATE_LIMITED: (Scope.KEY, Cooling.KEY, Kind.RETRYABLE),
    Failure.AUTH: (Scope.KEY, Cooling.INVALID, None),
    Failure.OUT_OF_CREDIT: (Scope.KEY, Cooling.KEY, Kind.RETRYABLE),
    Failure.FORBIDDEN: (Scope.KEY, Cooling.KEY, Kind.RETRYABLE),
    Failure.BAD_REQUEST: (Scope.MODEL, Cooling.NONE, None),
    Failure.NOT_FOUND: (Scope.MODEL, Cooling.NONE, None),
    Failure.MALFORMED: (Scope.MODEL, Cooling.NONE, Kind.RETRYABLE),
    Failure.CONTEXT_LENGTH: (Scope.WINDOW, Cooling.NONE, Kind.TRUNCATION),
    Failure.TRUNCATED: (Scope.MODEL, Cooling.NONE, Kind.TRUNCATION),
    Failure.CONTENT_FILTER: (Scope.REQUEST, Cooling.NONE, None),
    Failure.EMPTY: (Scope.MODEL, Cooling.NONE, Kind.RETRYABLE),
    Failure.WRAPPED: (Scope.MODEL, Cooling.NONE, Kind.RETRYABLE),
}


@pytest.mark.parametrize("failure", Failure)
def test_every_failure_costs_what_the_table_says(failure):
    rule = RULES[failure]

    assert (rule.scope, rule.cooling, rule.kind) == COST_OF[failure]
    assert rule.cooldown_s == (3600 if failure is Failure.OUT_OF_CREDIT else None)


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (Failure.SERVER_ERROR, 500, Kind.SERVER),
        (Failure.SERVER_ERROR, 502, Kind.SERVER),
        (Failure.SERVER_ERROR, 503, Kind.SERVER),
        (Failure.SERVER_ERROR, 504, Kind.SERVER),
        (Failure.SERVER_ERROR, 529, Kind.RETRYABLE),
        (Failure.SERVER_ERROR, 501, Kind.RETRYABLE),
        (Failure.CONNECTION, None, Kind.RETRYABLE),
        (Failure.RATE_LIMITED, 429, Kind.RETRYABLE),
        (Failure.TRUNCATED, 400, Kind.TRUNCATION),
        (Failure.AUTH, 401, None),
        (Failure.BAD_REQUEST, 400, None),
        (Failure.NOT_FOUND, 404, None),
        (Failure.SERVER_ERROR, 408, Kind.RETRYABLE),
        (Failure.SERVER_ERROR, 499, Kind.RETRYABLE),
    ],
)
def test_only_four_statuses_are_a_5xx_to_protection(failure, status, kind):
    assert UpstreamError(failure, "", status=status).kind == kind


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


def test_listing_cooldowns_shows_those_that_last_and_forgets_the_others():
    cooldowns = Cooldowns[str]()
    for name, until in {"a": 10.0, "b": 20.0, "c": 30.0}.items():
        cooldowns.set(name, until, now=0.0)

    assert dict(cooldowns.active(now=15.0)) == {"b": 5.0, "c": 15.0}
    assert len(cooldowns) == 2
    cooldowns.clear()
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
    sessions.ban("s", "x", now=0.0)
    sessions.pin("s", model=1, key_id=2, now=1.0)

    sessions.clear_model("s", model=1, now=2.0)

    session = sessions.get("s", 3.0)
    assert (session.model, session.key, session.bans) == (None, None, {"x"})


def test_bans_survive_a_new_pin():
    sessions = Sessions(TTL_S)
    sessions.ban("s", "x", now=0.0)
    sessions.pin("s", model=1, key_id=2, now=1.0)
    sessions.pin("s", model=3, key_id=4, now=2.0)

    assert sessions.get("s", 3.0).bans == {"x"}


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
    sessions.ban("", "x", now=0.0)
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


@pytest.mark.parametrize(
    ("platform", "same_model", "other_model"), [(BANNING, True, True), (SKIPPING, True, False), (OFF, False, False)]
)
def test_what_another_session_used_is_held_back_as_far_as_the_level_says(platform, same_model, other_model):
    state = protection()
    state.used("you", platform, 1, now=0.0)

    standing = state.standing("me", 179.0, auto=True)
    assert standing.holds_back(1, platform) is same_model
    assert standing.holds_back(2, platform) is other_model
    assert not standing.holds_back(3, "elsewhere")
    assert not state.standing("me", 181.0, auto=True).holds_back(1, platform)


@pytest.mark.parametrize("platform", [BANNING, SKIPPING])
def test_a_sessions_own_model_is_never_held_back_by_what_others_used(platform):
    state = protection()
    state.sessions.pin("me", model=1, key_id=1, now=0.0)
    state.used("me", platform, 1, now=0.0)
    state.used("you", platform, 1, now=1.0)

    assert not state.standing("me", 2.0, auto=True).holds_back(1, platform)
    assert state.standing("another", 2.0, auto=True).holds_back(1, platform)


def test_what_requests_without_a_session_use_holds_nobody_back():
    state = protection()
    state.used("", BANNING, 1, now=0.0)
    state.begin("", BANNING, 1, now=0.0)

    assert not state.standing("me", 1.0, auto=True).holds_back(1, BANNING)


def test_a_platform_that_serves_a_session_now_is_held_back_from_all_others():
    state = protection()
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
    state.begin("you", platform, 1, now=0.0)

    assert not state.standing("me", 1.0, auto=True).holds_back(1, platform)


def test_two_attempts_of_a_session_are_two_entries():
    state = protection()
    first, second = (state.begin("you", BANNING, 1, now=0.0) for _ in range(2))
    state.end(first)
    assert state.standing("me", 1.0, auto=True).holds_back(1, BANNING)

    state.end(second)
    assert not state.active


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("kind", Kind)
def test_a_ban_clears_the_pin_and_holds_for_that_session_alone(kind, phase):
    state = protection()
    for session in ("me", "you"):
        state.sessions.pin(session, model=1, key_id=1, now=0.0)

    state.punish("me", BANNING, 1, kind, phase, now=1.0)

    mine, yours = (state.standing(session, 2.0, auto=True) for session in ("me", "you"))
    assert (mine.preferred_model, mine.preferred_key, set(mine.banned)) == (None, None, {BANNING})
    assert (yours.preferred_model, set(yours.banned)) == (1, set())
    assert state.bans(2.0) == [("me", [BANNING])]
    assert state.bans(1.0 + TTL_S) == []


@pytest.mark.parametrize("kind", Kind)
def test_a_skipped_model_of_a_broken_stream_comes_last_in_the_next_request_only(kind):
    state = protection()
    state.sessions.pin("me", model=1, key_id=1, now=0.0)

    state.punish("me", SKIPPING, 1, kind, MID, now=1.0)

    first, second = (state.standing("me", now, auto=True) for now in (2.0, 3.0))
    assert first.preferred_model is None
    assert first.holds_back(1, SKIPPING)
    assert not first.holds_back(2, SKIPPING)
    assert second.preferred_model == 1
    assert not second.holds_back(1, SKIPPING)
    assert state.bans(2.0) == []


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("kind", Kind)
def test_off_changes_nothing_for_the_session(kind, phase):
    state = protection()
    state.sessions.pin("me", model=1, key_id=1, now=0.0)
    before = state.standing("me", 0.5, auto=True)

    state.punish("me", OFF, 1, kind, phase, now=1.0)

    assert state.standing("me", 2.0, auto=True) == before


def test_a_request_without_a_session_is_not_banned():
    state = protection()
    state.punish("", BANNING, 1, Kind.SERVER, BEFORE, now=0.0)

    assert state.bans(0.0) == []
    assert len(state.sessions) == 0
