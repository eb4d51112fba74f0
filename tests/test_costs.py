"""What an attempt's end costs, as tables: outcome, level and keys left in; effects out (SPEC 5.2, 7.3, 7.9, 10.4)."""

import itertools

import pytest
from worlds import World

from protection import (
    HINTLESS_STEPS,
    RULES,
    Answered,
    AvoidNext,
    Ban,
    Cancelled,
    ClearKeyPin,
    ClearPin,
    Facts,
    Failed,
    Failure,
    FeedGate,
    KeyStatus,
    Level,
    LostRace,
    MarkKey,
    Penalise,
    Phase,
    Pin,
    Recover,
    RestKey,
    RestModel,
    Rests,
    Scope,
    Skip,
    UpstreamError,
    costs,
    retry_s,
)

NOW = 1000.0
BEFORE, MID = Phase.BEFORE_STREAM, Phase.MID_STREAM
BAN, SKIP, OFF = Level.PROVIDER_BAN, Level.MODEL_SKIP, Level.OFF
SUCCESS = (Recover(), Pin(), FeedGate(ok=True))


def facts(level: Level = SKIP, *, keys_left: bool = False, strikes: int = 0) -> Facts:
    return Facts(level, keys_left, strikes, Rests(transient_s=15.0, rate_limit_s=120.0))


def failed(
    failure: Failure, phase: Phase = BEFORE, *, status: int | None = None, after_s: float | None = None
) -> Failed:
    return Failed(UpstreamError(failure, "words", status=status, retry_after_s=after_s), phase)


def ours(failure: Failure) -> Failed:
    return Failed(UpstreamError(failure, "our own file limit", ours=True), BEFORE)


# --- Whatever the level -------------------------------------------------------------------------------------------

MODEL, KEY = Skip(Scope.MODEL, again=False), Skip(Scope.KEY, again=True)
AGAIN = Skip(Scope.MODEL, again=True)
SICK = FeedGate(ok=False)
TRANSIENT = (RestModel(NOW + 15), AGAIN, SICK)
LIMITED = MarkKey(KeyStatus.RATE_LIMITED)
# Each failure's effects on routing and on everybody, with other keys left and without. SPEC 5.2, row by row.
FAILURES = {
    "500": (failed(Failure.SERVER_ERROR, status=500), TRANSIENT, TRANSIENT),
    "529": (failed(Failure.SERVER_ERROR, status=529), TRANSIENT, TRANSIENT),
    "408": (failed(Failure.SERVER_ERROR, status=408), TRANSIENT, TRANSIENT),
    "stall": (failed(Failure.STALL, status=504), TRANSIENT, TRANSIENT),
    "timeout": (failed(Failure.TIMEOUT, status=504), TRANSIENT, TRANSIENT),
    "no connection": (failed(Failure.CONNECTION), TRANSIENT, TRANSIENT),
    "429 with a time": (
        failed(Failure.RATE_LIMITED, status=429, after_s=7.0),
        (RestKey(NOW + 7, firm=True), LIMITED, KEY),
        (RestKey(NOW + 7, firm=True), LIMITED, KEY, Penalise()),
    ),
    "429 without": (
        failed(Failure.RATE_LIMITED, status=429),
        (RestKey(NOW + 7.5, firm=False), LIMITED, KEY),
        (RestKey(NOW + 7.5, firm=False), LIMITED, KEY, Penalise()),
    ),
    "401": (
        failed(Failure.AUTH, status=401),
        *[(MarkKey(KeyStatus.INVALID, "words"), ClearKeyPin(), Skip(Scope.KEY, again=False))] * 2,
    ),
    "402": (failed(Failure.OUT_OF_CREDIT, status=402), *[(RestKey(NOW + 3600, firm=True), KEY)] * 2),
    "402 that tells its reset": (
        failed(Failure.OUT_OF_CREDIT, status=402, after_s=60.0), *[(RestKey(NOW + 60, firm=True), KEY)] * 2
    ),
    "403": (failed(Failure.FORBIDDEN, status=403), *[(RestKey(NOW + 120, firm=True), KEY)] * 2),
    "400": (failed(Failure.BAD_REQUEST, status=400), *[(MODEL,)] * 2),
    "404": (failed(Failure.NOT_FOUND, status=404), *[(MODEL, SICK)] * 2),
    "no JSON": (failed(Failure.MALFORMED, status=200), *[(MODEL, SICK)] * 2),
    "empty": (failed(Failure.EMPTY, status=200), *[(MODEL, SICK)] * 2),
    "an error in a 200": (failed(Failure.WRAPPED, status=200), *[(MODEL, SICK)] * 2),
    "truncated": (failed(Failure.TRUNCATED), *[(MODEL, SICK)] * 2),
    "too long": (failed(Failure.CONTEXT_LENGTH, status=400), *[(Skip(Scope.WINDOW, again=False),)] * 2),
    "filtered": (failed(Failure.CONTENT_FILTER, status=400), *[(Skip(Scope.REQUEST, again=False),)] * 2),
    "no file left": (ours(Failure.CONNECTION), *[(MODEL,)] * 2),
}  # fmt: skip


@pytest.mark.parametrize(("outcome", "with_keys", "without"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("phase", Phase)
def test_a_failure_costs_the_same_whether_it_comes_before_or_in_mid_stream(outcome, with_keys, without, phase):
    outcome = Failed(outcome.error, phase)

    assert set(costs(outcome, facts(OFF, keys_left=True), NOW)) == set(with_keys)
    assert set(costs(outcome, facts(OFF), NOW)) == set(without)


def test_the_table_has_every_failure():
    assert {outcome.error.failure for outcome, _, _ in FAILURES.values()} == set(Failure)


# --- For the session ----------------------------------------------------------------------------------------------

# What protection calls each failure, and whether another key of the model would spare the session.
KINDS = {
    "500": ("5xx", False), "529": ("retryable", False), "408": ("retryable", False), "stall": ("5xx", False),
    "timeout": ("5xx", False), "no connection": ("retryable", False), "429 with a time": ("retryable", True),
    "429 without": ("retryable", True), "402": ("retryable", True), "402 that tells its reset": ("retryable", True),
    "403": ("retryable", True), "no JSON": ("retryable", False), "empty": ("retryable", False),
    "an error in a 200": ("retryable", False), "truncated": ("truncation", False), "too long": ("truncation", False),
}  # fmt: skip
EVERY = list(itertools.product(FAILURES, Level, Phase, [False, True]))


@pytest.mark.parametrize(("name", "level", "phase", "keys_left"), EVERY)
def test_a_session_pays_as_its_platforms_level_says(name, level, phase, keys_left):
    outcome, with_keys, without = FAILURES[name]
    kind, spared = KINDS.get(name, (None, False))
    reason = f"{level}:{kind}:{phase}"

    paid = set(costs(Failed(outcome.error, phase), facts(level, keys_left=keys_left), NOW))
    paid -= set(with_keys if keys_left else without)

    if kind is None or (spared and keys_left) or level is OFF:
        assert paid == set()
    elif level is BAN:
        assert paid == {Ban(reason), ClearPin()}
    else:  # before the stream the model is skipped in this request, which knows it already
        assert paid == ({AvoidNext()} if phase is MID else set())


# --- What is no failure -------------------------------------------------------------------------------------------

ENDINGS = {
    "an answer": (Answered(), dict.fromkeys(Level, SUCCESS)),
    "an answer cut short": (
        Answered(cut_short=True),
        {
            BAN: (*SUCCESS, Ban("provider-ban:truncation:mid-stream"), ClearPin()),
            SKIP: (*SUCCESS, AvoidNext()),
            OFF: SUCCESS,
        },
    ),
    "a client that left": (Cancelled(), dict.fromkeys(Level, ())),
    "a lost race": (LostRace(), dict.fromkeys(Level, ())),
}


@pytest.mark.parametrize(("outcome", "expected"), ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("level", Level)
def test_an_ending_that_is_no_failure_costs(outcome, expected, level):
    assert costs(outcome, facts(level), NOW) == expected[level]


# --- 429s that name no time (SPEC 7.9) ----------------------------------------------------------------------------


def test_a_rest_without_a_named_time_doubles_from_a_sixteenth_to_the_whole_setting():
    rests = []
    for strikes in range(8):
        effects = costs(failed(Failure.RATE_LIMITED, status=429), facts(strikes=strikes), NOW)
        (rest,) = [effect for effect in effects if isinstance(effect, RestKey)]
        rests.append(rest.until - NOW)
        assert not rest.firm

    assert rests == [7.5, 15.0, 30.0, 60.0, 120.0, 120.0, 120.0, 120.0]


def test_rate_limits_in_a_row_are_counted_for_each_key_and_model_until_a_success(world_store):
    world = World({}, {})
    world.keep_books(world_store)
    now, left = NOW, []
    for _ in range(3):
        world.fail(world.route(1), Failure.RATE_LIMITED, now)
        left.append(world.protection.keys.left((101, 1), now))
        now += 200.0
    world.fail(world.route(2), Failure.RATE_LIMITED, now)
    assert left == [7.5, 15.0, 30.0]
    assert world.protection.keys.left((102, 2), now) == 7.5

    world.settle(world.route(1), Answered(), now)
    world.fail(world.route(1), Failure.RATE_LIMITED, now + 1)

    assert world.protection.keys.left((101, 1), now + 1) == 7.5


def test_a_rate_limit_that_names_its_time_ends_no_row_and_begins_none(world_store):
    world = World({})
    world.keep_books(world_store)
    for after_s in (None, 3.0, None):
        world.fail(world.route(1), Failure.RATE_LIMITED, NOW, retry_after_s=after_s)

    assert world.protection.strikes == {(101, 1): 2}


def test_a_row_of_rate_limits_never_overflows(world_store):
    world = World({})
    world.keep_books(world_store)
    for n in range(5_000):
        world.fail(world.route(1), Failure.RATE_LIMITED, NOW + 1000.0 * n)

    assert world.protection.strikes[101, 1] == HINTLESS_STEPS


# --- A pinned model's second chance (SPEC 5.1) --------------------------------------------------------------------

RETRIES = {
    "500": (UpstreamError(Failure.SERVER_ERROR, "", status=500), 0.4),
    "502": (UpstreamError(Failure.SERVER_ERROR, "", status=502), 0.4),
    "503": (UpstreamError(Failure.SERVER_ERROR, "", status=503), None),
    "504": (UpstreamError(Failure.SERVER_ERROR, "", status=504), None),
    "a broken connection": (UpstreamError(Failure.CONNECTION, ""), 0.4),
    "an error 500 in a 200": (UpstreamError(Failure.SERVER_ERROR, "", status=500), 0.4),
    "no file left": (UpstreamError(Failure.CONNECTION, "", ours=True), None),
    "silence": (UpstreamError(Failure.STALL, "", status=504), None),
    "too slow": (UpstreamError(Failure.TIMEOUT, "", status=504), None),
    "429, at once": (UpstreamError(Failure.RATE_LIMITED, "", status=429, retry_after_s=0.0), 0.0),
    "429, in 5 s": (UpstreamError(Failure.RATE_LIMITED, "", status=429, retry_after_s=5.0), 5.0),
    "429, later": (UpstreamError(Failure.RATE_LIMITED, "", status=429, retry_after_s=5.1), None),
    "429, without a time": (UpstreamError(Failure.RATE_LIMITED, "", status=429), None),
    "401": (UpstreamError(Failure.AUTH, "", status=401), None),
    "400": (UpstreamError(Failure.BAD_REQUEST, "", status=400), None),
    "empty": (UpstreamError(Failure.EMPTY, "", status=200), None),
}


@pytest.mark.parametrize(("error", "seconds"), RETRIES.values(), ids=RETRIES)
def test_a_pinned_route_is_asked_again_after(error, seconds):
    assert retry_s(error) == seconds


def test_every_failure_has_its_rule():
    assert set(RULES) == set(Failure)
