"""The rules of protection as tables: levels, what `evaluate` decides, what kind each failure is (SPEC 5.2, 7)."""

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
