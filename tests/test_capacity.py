"""SPEC 4.10, 5.5 and 10.4 under load: nobody is refused while somebody could answer, and nobody sick is stampeded.

The bad weather of bench/chaos.py, an hour of it in a second: trials follow each other after 50 or 100 ms instead of a
second. Below it what keeps a crowd from doing harm, rule by rule.
"""

import asyncio
import time
from itertools import pairwise

import pytest
from conftest import IN_ORDER, both_ways, case
from fake_provider import (
    PAUSE,
    RESET,
    ROLE,
    STOP,
    Every,
    Request,
    Wait,
    answer,
    assert_in_time,
    chunk,
    completion,
    error,
    event,
    in_time,
    raw,
    sse,
    until,
)
from worlds import NOW, World

from bench.health import replay
from bench.weather import BEFORE, NOT_COOLING, Crowd, End, Fault, Result, Weather, ends
from engine.waiting import WOKEN_AT_ONCE, WaitingRoom
from protection import Answered, Failure, Scope, Skip
from routing.cooldowns import FOLLOWERS_LIMITED, RAMP_S, RAMP_STEP_S, TRIAL_SPACING_S, Cooldowns
from routing.plan import LAST_ATTEMPTS
from routing.route import Rung
from routing.trials import LEASE_S, UNPACED_MAX, Trials

SIX = ("a", "b", "c", "d", "e", "f")
QUICK = {
    "TRIAL_SPACING_MS": "50", "TRANSIENT_COOLDOWN_MS": "1500", "RATE_LIMIT_COOLDOWN_MS": "1600",
    "WAIT_FOR_CAPACITY_MS": "5000",
}  # fmt: skip
IMPATIENT = {"MAX_STREAM_STALL_MS": "300", "FIRST_TOKEN_TIMEOUT_MS": "400", "REQUEST_TIMEOUT_MS": "400"}
AGAIN, NEVER = Skip(Scope.MODEL, again=True), Skip(Scope.MODEL, again=False)


def crowd_of(gateway) -> Crowd:
    return Crowd(gateway.base_url, gateway.http, {"authorization": f"Bearer {gateway.api_key}"}, patience_s=8)


def whole(results: list[Result]) -> int:
    return ends(results)[End.WHOLE]


async def wait_for(gateway, count: int) -> None:
    """Until so many requests wait for a route."""
    async with asyncio.timeout(3):
        while len((await gateway.protection())["waiting"]) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# --- Bad weather --------------------------------------------------------------------------------------------------


async def test_six_platforms_that_fail_half_of_the_time_answer_what_any_of_them_could(start_gateway, fake):
    gateway = await start_gateway(SIX, QUICK | IMPATIENT)
    weather = Weather(7, dict.fromkeys(SIX, 0.46), mid_stream=0.2)
    for platform in SIX:
        fake.script(platform, weather.reply)

    results = await crowd_of(gateway).at_once(range(50), workers=12)

    counted = ends(results)
    assert counted[End.SILENT] == counted[End.HANG] == 0
    fair = [r for r in results if r.end is not End.BROKEN and weather.could_answer(r.question)]
    assert whole(fair) >= 0.97 * len(fair)
    assert len(fake.requests) <= 2.5 * whole(results)


LOUD = tuple(fault for fault in BEFORE if fault is not Fault.STALL)  # no limit of time has to be short for these


@pytest.mark.parametrize(("faults", "rate"), [(LOUD, 0.9), (NOT_COOLING, 1.0)], ids=["any fault", "none that cools"])
async def test_the_one_healthy_platform_of_six_is_found_and_kept(start_gateway, fake, faults, rate):
    gateway = await start_gateway(SIX)
    weather = Weather(3, {**dict.fromkeys(SIX, rate), "d": 0.0}, faults=dict.fromkeys(SIX, faults))
    for platform in SIX:
        fake.script(platform, weather.reply)

    results = await crowd_of(gateway).at_once(range(300), workers=4)

    assert whole(results) >= 0.995 * len(results)
    assert len(fake.requests) <= 1.1 * whole(results)


@pytest.mark.parametrize(("platforms", "models"), [(1, 1), (3, 9)])
async def test_everybody_who_comes_while_nobody_answers_is_answered_soon_after(start_gateway, fake, platforms, models):
    """Fifty requests a second for 0.5 s of outage, which is ten seconds of five on the scale of the trials' spacing."""
    names = [f"p{n}" for n in range(platforms)]
    gateway = await start_gateway(
        {p: {"models": [{"model_id": f"{p}-{n}"} for n in range(models)]} for p in names}, QUICK
    )
    weather = Weather(5, dict.fromkeys(names, 1.0), faults=dict.fromkeys(names, (Fault.ERROR_503,)))
    for name in names:
        fake.script(name, weather.reply)

    asking = asyncio.create_task(crowd_of(gateway).at_rate(50, 0.8))
    await asyncio.sleep(0.5)
    weather.rates = dict.fromkeys(names, 0.0)
    recovered = time.monotonic()
    results = await asking

    assert whole(results) == len(results) == 40
    assert_in_time(min(r.ended for r in results) - recovered, 0.5)
    assert len(fake.requests) <= 2.5 * len(results) + platforms * models  # all of these fail once before they are known


# --- Deep chains --------------------------------------------------------------------------------------------------

DEAD = [{"model_id": f"dead-{n}"} for n in range(12)]
LIMITED = [f"sk-limited-key-{n:02}" for n in range(12)]


@both_ways
@pytest.mark.parametrize(
    ("options", "failing"),
    [({"models": DEAD}, error(500)), ({"keys": LIMITED}, error(429, headers={"retry-after": "30"}))],
    ids=["12 dead models", "12 limited keys"],
)
async def test_what_is_held_back_answers_behind_twelve_failures(start_gateway, fake, options, failing, streaming):
    gateway = await start_gateway({"a": options, "z": {}})
    fake.script("a", failing)
    for _ in range(2):  # from its second request on a conversation holds back what it uses
        assert (await gateway.chat(model="auto-smart", headers={"X-Session-Id": "theirs"})).status == 200
    await gateway.recovered()
    fake.clear()

    got = await gateway.ask(model="auto-smart", headers={"X-Session-Id": "mine"}, streaming=streaming)

    assert got.text == "hello from z"
    assert fake.called == ["a"] * 12 + ["z"]


async def test_the_only_platform_serves_even_a_session_that_has_banned_it(start_gateway, fake):
    gateway = await start_gateway({"a": {"protection": "provider-ban"}}, {"TRANSIENT_COOLDOWN_MS": "1"})
    fake.script("a", error(500), answer("after all"))
    assert (await gateway.chat(model="auto-smart")).status == 502
    assert (await gateway.protection())["bans"]
    await gateway.uncooled()

    assert (await gateway.chat(model="auto-smart")).text == "after all"


@both_ways
async def test_balanced_serves_although_everything_is_excluded_from_it(start_gateway, fake, streaming):
    gateway = await start_gateway({name: {"model": {"exclude_from": ["balanced"]}} for name in "ab"})

    assert (await gateway.ask(model="auto", streaming=streaming)).status == 200


# --- A model that breaks without cooling ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_model_that_breaks_without_cooling_is_left_at_once_and_won_back_within_minutes(seed):
    outage = replay(seed)

    assert outage.first_20 <= 6
    assert outage.back_s <= 120


async def test_an_open_gate_is_shown_and_closed_by_the_operator(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", completion(""))
    for _ in range(4):
        assert (await gateway.chat()).text == "hello from b"

    assert fake.called.count("a") < 5
    (gate,) = (await gateway.protection())["gates"]
    assert gate.keys() == {"model_db_id", "platform", "model_id", "since_ms", "next_trial_ms", "trials_failed"}
    assert (gate["platform"], gate["trials_failed"]) == ("a", 0)
    assert 10_000 < gate["next_trial_ms"] <= 18_000
    assert b"freeway_gates_open 1" in (await gateway.get("/metrics")).body

    await gateway.recovered()

    assert (await gateway.protection())["gates"] == []


@pytest.mark.parametrize(("trial", "left"), [(True, 1), (False, 0)], ids=["a trial", "a client who insists"])
def test_only_trials_that_fail_push_the_next_one_back(trial, left):
    gates = World({}, {}).router.gates
    for _ in range(4):
        gates.feed(1, ok=False, rate=0.9, hold=False, began=NOW, now=NOW, rng=World({}).rng)
    gates.feed(1, ok=False, rate=0.9, hold=False, began=NOW + 1, now=NOW + 1, rng=World({}).rng, trial=trial)

    assert [gate.trials_failed for _, gate in gates.open_gates()] == [left]


# --- Trials -------------------------------------------------------------------------------------------------------


@both_ways
async def test_fifty_at_once_at_a_resting_model_are_one_trial_at_a_time(start_gateway, fake, streaming):
    gateway = await start_gateway(["a"], QUICK)
    fake.script("a", *[error(503)] * 4, answer("well again"))
    await gateway.chat(headers={"X-Max-Wait": "0"})
    fake.clear()

    got = await asyncio.gather(*(gateway.ask(f"number {n}", streaming=streaming) for n in range(50)))

    assert {answer.text for answer in got} == {"well again"}
    assert len(fake.requests) == 50 + 3
    metrics = (await gateway.get("/metrics")).body
    assert b'freeway_trials_total{result="error"} 3' in metrics
    assert b'freeway_trials_total{result="success"} 1' in metrics
    assert b'freeway_waits_total{result="served"} 50' in metrics
    trials = [request.arrived_at for request in fake.requests[:4]]
    assert all(b - a >= 0.045 for a, b in pairwise(trials))


async def test_a_trial_that_has_begun_to_answer_lets_the_others_in(start_gateway, fake):
    gateway = await start_gateway(["a"], QUICK)
    rest_of_it = asyncio.Event()
    fake.script("a", error(503), sse(ROLE, chunk("a long "), Wait(rest_of_it), chunk("answer"), STOP), answer("short"))
    await gateway.chat(headers={"X-Max-Wait": "0"})
    long = asyncio.create_task(gateway.stream())
    await fake.arrived(2)

    assert (await gateway.chat()).text == "short"
    assert (await gateway.protection())["transient_cooldowns"] == []

    rest_of_it.set()
    (await long).assert_whole("a long answer")


async def test_a_client_that_leaves_gives_its_trial_to_the_next_at_once(start_gateway, fake):
    gateway = await start_gateway(["a"], QUICK)
    fake.script("a", error(503), raw(PAUSE), answer("mine"))
    await gateway.chat(headers={"X-Max-Wait": "0"})
    first = asyncio.create_task(gateway.chat())
    await fake.arrived(2)
    second = asyncio.create_task(gateway.chat())
    await wait_for(gateway, 1)

    first.cancel()

    async with in_time(0.3):
        assert (await second).text == "mine"


def test_a_trial_that_says_nothing_keeps_the_others_waiting_for_ten_seconds_only():
    trials = Trials()
    hanging = trials.take(1, NOW)
    assert trials.busy_s(1, NOW + 3) == LEASE_S - 3
    assert trials.busy_s(1, NOW + LEASE_S) == 0

    taken = trials.take(1, NOW + LEASE_S)

    assert not trials.release(1, hanging)  # the other one's
    assert trials.busy_s(1, NOW + LEASE_S + 1) > 0
    assert trials.release(1, taken)
    assert trials.busy_s(1, NOW + LEASE_S + 1) == 0


@pytest.mark.parametrize(("resting", "pause_s"), [(UNPACED_MAX, 0), (UNPACED_MAX + 1, TRIAL_SPACING_S / UNPACED_MAX)])
def test_in_a_long_outage_of_many_models_so_many_trials_a_second_are_enough(resting, pause_s):
    trials = Trials()
    trials.release(1, trials.take(1, NOW))

    assert trials.pause_s(resting, NOW) == pytest.approx(pause_s)
    assert trials.pause_s(resting, NOW + TRIAL_SPACING_S) == 0


def test_a_trial_that_fails_without_cooling_keeps_the_next_at_a_distance(world_store):
    world = World({})
    world.keep_books(world_store)
    world.rest_model(1)
    now = NOW + 2
    trial = world.router.next_route(world.plan(now=now), now)
    assert (trial.rung, trial.trial) == (Rung.RESTING, True)

    world.fail(trial, Failure.EMPTY, now)

    assert world.router.next_route(world.plan(now=now), now) is None
    assert world.router.next_route(world.plan(now=now), now + TRIAL_SPACING_S).trial


# --- Attempts and waiting -------------------------------------------------------------------------------------------


def test_a_request_that_spares_its_attempts_goes_on_when_another_has_been_answered(world_store):
    world = World({})
    world.keep_books(world_store)
    plan, now = world.plan(), NOW
    for _ in range(2):
        plan.attempts_left -= 1
        route = world.router.next_route(plan, now)
        world.protection.transient.set(1, now + 15, now)
        world.protection.trials.release(1, route.tried_at)
        plan.note_failure(route, AGAIN, now, 5.0)
        now += 1.5
    assert world.router.next_route(plan, now) is None
    assert plan.wait_s == pytest.approx(3.5)

    world.protection.end_rests(world.keys["p1"].id, 1, now, now)

    assert world.router.next_route(plan, now).model.id == 1


@pytest.mark.parametrize("then", ["answered", "cleared", "neither"])
def test_what_has_failed_has_passed_when_it_answers_others_or_the_operator_says_so(then):
    cooldowns = Cooldowns[str]()
    cooldowns.set("a", NOW + 15, NOW)
    if then == "answered":
        assert cooldowns.lift("a", NOW + 1, NOW + 2)
    if then == "cleared":
        cooldowns.clear(NOW + 2)

    assert cooldowns.proved_since("a", NOW) is (then != "neither")
    assert not cooldowns.proved_since("a", NOW + 2)  # which failed later


def test_the_last_attempts_are_spread_over_the_wait_where_every_platform_has_been_asked():
    world = World(*({"platform": "p"} for _ in range(30)), {"platform": "q"})
    plan, failed = world.plan(), 0
    while (route := world.router.next_route(plan, NOW)) is not None:
        failed, plan.attempts_left = failed + 1, plan.attempts_left - 1
        plan.note_failure(route, NEVER, NOW, 6.0)

    assert (failed, plan.attempts_left) == (20 - LAST_ATTEMPTS, LAST_ATTEMPTS)
    assert plan.wait_s == pytest.approx(6.0)
    assert world.router.next_route(plan, NOW + 6) is not None


async def test_who_needs_tokens_that_others_only_reserve_waits_until_they_are_given_back(start_gateway, fake):
    """Each request is taken for some 1,000 tokens and uses 18 of them."""
    gateway = await start_gateway({"a": {"model": {"tpm": 2500}}}, QUICK)
    going_on = asyncio.Event()
    fake.script("a", raw(Wait(going_on), *completion("one of many").steps))
    asking = [asyncio.create_task(gateway.chat(f"number {n}")) for n in range(6)]
    await wait_for(gateway, 4)
    await until(lambda: len(fake.requests) == 2)
    going_on.set()

    assert {answer.text for answer in await asyncio.gather(*asking)} == {"one of many"}


async def change(gateway, method: str, path: str, body: object) -> None:
    headers = {"authorization": f"Bearer {gateway.api_key}"}
    async with gateway.http.request(method, gateway.base_url + path, json=body, headers=headers) as got:
        assert got.status in (200, 201), await got.text()


@pytest.mark.parametrize("what", ["a key is added", "a key is switched on", "a model is switched on"])
async def test_who_waits_goes_on_when_the_operator_brings_something_new(start_gateway, fake, what):
    gateway = await start_gateway({"a": {}, "b": {}}, {"WAIT_FOR_CAPACITY_MS": "10000"})
    fake.script("a", error(429, headers={"retry-after": "9"}))
    (key,) = [key for key in (await gateway.get("/api/keys")).json if key["platform"] == "b"]
    (model,) = [model for model in (await gateway.get("/api/models")).json if model["platform"] == "b"]
    if what == "a key is added":
        await change(gateway, "DELETE", f"/api/keys/{key['id']}", None)
    elif what == "a key is switched on":
        await change(gateway, "PATCH", f"/api/keys/{key['id']}", {"enabled": False})
    else:
        await change(gateway, "PATCH", f"/api/models/{model['id']}", {"enabled": False})
    asking = asyncio.create_task(gateway.chat())
    await wait_for(gateway, 1)

    if what == "a key is added":
        await change(gateway, "POST", "/api/keys", {"platform": "b", "key": "sk-b-secret-0002"})
    elif what == "a key is switched on":
        await change(gateway, "PATCH", f"/api/keys/{key['id']}", {"enabled": True})
    else:
        await change(gateway, "PATCH", f"/api/models/{model['id']}", {"enabled": True})

    got = await asking
    assert got.text == "hello from b"
    assert 0 < int(got.headers["X-Waited-Ms"]) < 3000


PINNED_AGAIN = {
    "429 that names a time": (error(429, headers={"retry-after": "0.3"}), 0.3),
    "500": (error(500), 0.4),
    "a broken connection": (raw(RESET), 0.4),
}


@both_ways
async def test_a_pinned_route_is_asked_once_more_when_its_time_has_come(start_gateway, fake, streaming):
    gateway = await start_gateway([f"a{n}" for n in range(len(PINNED_AGAIN))], QUICK)

    async def one(platform: str, name: str) -> None:
        failing, pause_s = PINNED_AGAIN[name]
        fake.script(platform, failing, answer("second thoughts"))
        got = await gateway.ask(model=f"{platform}-model", streaming=streaming)
        with case(name):
            assert got.text == "second thoughts"
            first, second = (r.arrived_at for r in fake.requests if r.platform == platform)
            assert pause_s <= second - first < pause_s + 1
            assert int(got.headers["X-Waited-Ms"]) >= pause_s * 1000 - 10

    await asyncio.gather(*(one(f"a{n}", name) for n, name in enumerate(PINNED_AGAIN)))


NOT_AGAIN = {
    "silence": ([raw(PAUSE)], {}, ["a", "b"]),
    "503": ([error(503)], {}, ["a", "b"]),
    "a 429 that names no time": ([error(429)], {}, ["a", "b"]),
    "a second 500": ([error(500), error(500)], {}, ["a", "a", "b"]),
    "a client that does not wait": ([error(429, headers={"retry-after": "0.3"})], {"X-Max-Wait": "0"}, ["a", "b"]),
}


@pytest.mark.parametrize(("failing", "headers", "called"), NOT_AGAIN.values(), ids=NOT_AGAIN)
async def test_a_pinned_route_is_not_asked_again_after(start_gateway, fake, failing, headers, called):
    gateway = await start_gateway(["a", "b"], QUICK | IMPATIENT)
    fake.script("a", *failing, answer("too late"))

    assert (await gateway.chat(model="a-model", headers=headers)).text == "hello from b"
    assert fake.called == called


def test_a_pinned_model_is_back_within_20_s_of_an_outage_of_a_minute(world_store):
    world, now, recovers = World({}, {}), NOW, NOW + 60
    world.keep_books(world_store)
    while True:
        plan = world.plan("m1", now=now)
        route = world.router.next_route(plan, now)
        while route.model.id == 1 and now < recovers:
            world.fail(route, Failure.SERVER_ERROR, now, plan=plan, status=503)
            route = world.router.next_route(plan, now)
        world.settle(route, Answered(), now, plan=plan)
        if route.model.id == 1:
            break
        now += 1.5

    assert recovers <= now <= recovers + 20


def test_a_pinned_route_is_not_asked_again_before_the_time_that_another_was_told():
    world = World({}, {})
    route = world.router.next_route(world.plan("m1"), NOW)
    world.rest_key(1, 60.0, firm=True)

    assert world.router.again(route, 1, NOW) is None
    assert world.router.again(route, 1, NOW + 60).model.id == 1


# --- A crowd at what has come back ------------------------------------------------------------------------------------


def rested(**options) -> Cooldowns[str]:
    """Something whose rest has just run out."""
    cooldowns = Cooldowns[str](**options)
    cooldowns.set("a", NOW, NOW - 10)
    assert cooldowns.get("a", NOW) is None
    return cooldowns


def begun(cooldowns: Cooldowns[str], now: float) -> int:
    """How many more may ask now."""
    count = 0
    while not cooldowns.room_s("a", now) and count < 100:
        cooldowns.begun("a", now)
        count += 1
    return count


def test_after_a_rest_one_asks_and_each_answer_makes_room_for_a_few_more():
    cooldowns = rested(followers=FOLLOWERS_LIMITED)
    assert begun(cooldowns, NOW) == 1
    for answered in range(1, 6):
        assert cooldowns.answered("a", NOW)
        assert begun(cooldowns, NOW) == FOLLOWERS_LIMITED, answered


def test_who_is_slow_gets_all_who_wait_within_a_second():
    cooldowns, counts = rested(), []
    for step in range(6):
        counts.append(begun(cooldowns, NOW + step * RAMP_STEP_S + 0.001))
    assert counts == [2, 1, 2, 4, 8, 16]
    assert begun(cooldowns, NOW + RAMP_S) == 100  # as many as there are


def test_a_new_failure_ends_a_recovery_and_the_next_rest_begins_another():
    cooldowns = rested()
    begun(cooldowns, NOW)
    cooldowns.set("a", NOW + 5, NOW)

    assert cooldowns.room_s("a", NOW) == 0  # it rests: that is told elsewhere
    assert cooldowns.lift("a", NOW + 1, NOW + 1)
    assert begun(cooldowns, NOW + 1) > 0


@pytest.mark.parametrize("headers", [{}, {"retry-after": "0.2"}], ids=["unnamed", "named"])
async def test_a_limit_that_nobody_has_told_is_not_stormed_again_and_again(start_gateway, fake, headers):
    """The platform takes four requests each 200 ms and refuses the others."""
    gateway = await start_gateway(["a"], QUICK | {"TRIAL_SPACING_MS": "200"})
    taken: list[float] = []

    def limited(request: Request):
        now = time.monotonic()
        if sum(at > now - 0.2 for at in taken) >= 4:
            return error(429, headers=headers)
        taken.append(now)
        return completion("in time")

    fake.script("a", limited)

    got = await asyncio.gather(*(gateway.chat(f"number {n}") for n in range(10)))

    assert {answer.text for answer in got} == {"in time"}
    assert len(fake.requests) <= 10 * 3.5


async def test_nobody_is_refused_because_of_a_crowd(start_gateway, fake):
    """A request that may not wait joins the crowd at a model whose rest has just ended."""
    gateway = await start_gateway(["a"], {"TRANSIENT_COOLDOWN_MS": "1"})
    fake.script("a", error(503), answer("all of you"))
    await gateway.chat()
    await gateway.uncooled()

    got = await asyncio.gather(*(gateway.chat(f"number {n}") for n in range(20)))

    assert {answer.text for answer in got} == {"all of you"}


async def test_a_room_full_of_waiters_is_woken_a_few_at_a_time_and_each_of_them_gets_to_look():
    room, looked, everybody = WaitingRoom(), [], list(range(3 * WOKEN_AT_ONCE))

    async def waits(number: int) -> None:
        while True:
            await room.wait(str(number), number, time.monotonic(), 60.0)
            looked.append(number)

    waiting = [asyncio.create_task(waits(number)) for number in everybody]
    await until(lambda: len(room) == len(everybody))
    room.wake()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert looked == everybody[:WOKEN_AT_ONCE]
    room.wake()  # something has changed since these looked: they look again, but after the others

    await until(lambda: looked.count(0) == 2)
    assert looked[: len(everybody)] == everybody
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


# --- Streams that never begin, or never end (SPEC 8.4) ----------------------------------------------------------

NOTHING = {
    "comments": b": working\n\n",
    "line breaks": b"\n",
    "empty deltas": event(chunk("")),
    "roles": event(ROLE),
    "blanks": event(chunk(" ")),
}


@pytest.mark.parametrize("filler", NOTHING.values(), ids=NOTHING)
async def test_a_stream_that_says_nothing_is_given_up_before_its_first_token(start_gateway, fake, filler):
    gateway = await start_gateway(["a", "b"], {"FIRST_TOKEN_TIMEOUT_MS": "150"})
    fake.script("a", sse(Every(0.02, filler)))

    (await gateway.stream()).assert_whole("hello from b")

    await fake.closed()


@pytest.mark.parametrize("filler", [NOTHING[name] for name in ("comments", "line breaks", "empty deltas")])
async def test_a_stream_that_goes_on_saying_nothing_ends_after_its_first_token(start_gateway, fake, filler):
    gateway = await start_gateway(["a"], {"FIRST_TOKEN_TIMEOUT_MS": "150", "RESCUE": "off"})
    fake.script("a", sse(ROLE, chunk("Once "), Every(0.02, filler)))

    got = await gateway.stream(model=IN_ORDER)

    assert got.error["type"] == "stream_timeout"
    got.assert_done_once()
    await fake.closed()
