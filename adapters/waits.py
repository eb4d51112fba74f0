"""How long a failing provider asks to be left alone.

Headers, body fields, prose and counters tell it, as seconds, durations ("2m59.56s") or moments, in a dozen spellings;
where no time is told, the kind of limit tells it: of the day, the week, the month, the session. No I/O.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from adapters.errors import NO_QUIRKS, Fault, packed_json
from routing.day import until_reset_s, zone

RETRY_AFTER_MAX_S = 86_400.0  # a longer wish is a mistake more often than a plan
RETRY_AFTER_MIN_S = 0.5  # some send 0, or a moment that has passed: without a floor the key would be asked at once
WINDOW_S = 3_600.0  # of a limit "per session" or "hourly" without a time: such windows last 1 to 5 h
HINT_DEPTH_MAX = 7  # how deep in an error body a retry hint is looked for; a backend's error in another's nests 7

UNIT = r"(?:milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)"
JOINT = r"\s*(?:,\s*|and\s+)?"
DURATION = rf"(?:\d+(?:\.\d+)?\s*{UNIT}\b{JOINT}|\d+(?:\.\d+)?{UNIT}(?=\d){JOINT})+"
DURATION_PART = re.compile(rf"(\d+(?:\.\d+)?)\s*({UNIT})")
UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
PROSE = re.compile(
    r"(?:(?:try(?:ing)? again|retry(?:ing)?|available(?: again)?|resets?|renews?) (?:in|after)|wait(?:ing)?(?: for)?)"
    rf"\s+(?:about |around |approximately |at least |~)?({DURATION})",
    re.IGNORECASE,
)  # "Please try again in 7m12s", "Please wait 52220 seconds", "Resets in 3 days"
MOMENT = re.compile(
    r"(?:reset\w*|again|available|until|after|renew\w*)\s+(?:at|on|after|until)?\s*"
    r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d(?::\d\d)?)(?:\.\d+)?\s*(Z\b|UTC\b|GMT\b|[+-]\d\d:?\d\d)?"
    r"|(\d{4}-\d\d-\d\d \d\d:\d\d(?::\d\d)?)\s*(?:后|重置|恢复)",
    re.IGNORECASE,
)
# Kinds of limits, in a code or in words that give no time; words alone never make a failure a quota.
DAILY = re.compile(r"\bdaily\b|\bper[ -]?day\b|\btoday\b|/\s*day\b|\bPerDay\b|\bByDay\b|\b[RT]PD\b", re.IGNORECASE)
LONGER = re.compile(r"\b(?:weekly|monthly)\b|\b(?:per[ -]|this )(?:week|month)\b|/\s*(?:week|month)\b", re.IGNORECASE)
WINDOW = re.compile(
    r"\bhourly\b|\bsession (?:usage )?(?:limit|quota)\b|\b(?:limit|quota) (?:for|of) (?:this|the) session\b",
    re.IGNORECASE,
)
HINTS = frozenset(
    {"retrydelay", "retry_after", "retry_after_seconds", "retryafter", "retry-after", "x-ratelimit-reset"}
)
RATE_HEADER = re.compile(r"rate-?limit")
PAIR = re.compile(r"(\w+)\s*=\s*\"?([\d.]+)")


def retry_after_s(
    fault: Fault,
    headers: Mapping[str, str],
    body: object,
    utc: float,
    quirks: Mapping[str, Any] = NO_QUIRKS,
    reset: str = "UTC",
) -> float | None:
    """How long the provider asks to be left alone: header, then body fields, then prose, then its counters, then the
    kind of limit; `reset` is when its day begins. None when nothing tells."""
    found = told_s(fault, {name.lower(): value for name, value in headers.items()}, body, utc, quirks, reset)
    return None if found is None else min(max(found, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)


def told_s(
    fault: Fault, headers: Mapping[str, str], body: object, utc: float, quirks: Mapping[str, Any], reset: str
) -> float | None:
    if fault.daily:  # of its hints only a moment means the quota, not the next second
        return moment_s(fault.message, reset, utc) or until_reset_s(reset, utc)
    for found in (
        header_delay_s(headers, utc),
        hint_s(body, HINT_DEPTH_MAX, utc),
        prose_s(fault.message),
        moment_s(fault.message, reset, utc),
        counters_s(headers, utc),
    ):
        if found is not None:
            return found
    used_up = any(headers.get(name.lower(), "").strip() == "0" for name in quirks.get("daily_headers", ()))
    words = f"{fault.code or ''} {fault.message}".replace("_", " ")
    if LONGER.search(words):
        return RETRY_AFTER_MAX_S
    if used_up or DAILY.search(words):
        return until_reset_s(reset, utc)
    return WINDOW_S if WINDOW.search(words) else None


# --- Times ----------------------------------------------------------------------------------------------------------
def duration_s(text: str) -> float | None:
    """Seconds of "7.66s", "2m59.56s", "680ms", "1 minute and 5 seconds", or a bare number of seconds."""
    text = text.strip().lower()
    try:
        seconds = float(text)
    except ValueError:
        parts = DURATION_PART.findall(text)
        if not parts or DURATION_PART.sub("", text).replace("and", "").strip(" ,"):
            return None
        seconds = sum(
            float(count) * UNIT_S["ms" if unit.startswith(("ms", "mil")) else unit[0]] for count, unit in parts
        )
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def since_epoch_s(seconds: float, utc: float) -> float:
    """A reset may be told as a moment: in seconds or milliseconds since 1970."""
    if seconds > 1e11:
        seconds /= 1000
    return max(0.0, seconds - utc) if seconds > 1e8 else seconds


def delay_s(text: str, utc: float) -> float | None:
    """A duration, or a moment as seconds since 1970, an HTTP date or an ISO date."""
    text = text.strip()
    if (seconds := duration_s(text)) is not None:
        return since_epoch_s(seconds, utc)
    try:
        moment = datetime.fromisoformat(text) if text[4:5] == "-" else parsedate_to_datetime(text)
        return max(0.0, moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() - utc)
    except (ValueError, OverflowError):
        return None


# --- Places ---------------------------------------------------------------------------------------------------------
def header_delay_s(headers: Mapping[str, str], utc: float) -> float | None:
    """Retry-After, also in milliseconds as some send it."""
    if (given := headers.get("retry-after-ms")) and (milliseconds := duration_s(given)) is not None:
        return milliseconds / 1000
    return delay_s(headers.get("retry-after", ""), utc)


def hint_s(value: object, depth: int, utc: float) -> float | None:
    """A retry field anywhere in an error body."""
    if depth == 0:
        return None
    if isinstance(value, dict):
        for name, item in value.items():
            lower = str(name).lower()
            if isinstance(item, str | int | float) and not isinstance(item, bool):
                if lower in HINTS and (seconds := delay_s(str(item), utc)) is not None:
                    return seconds
                packed = packed_json(item) if isinstance(item, str) else None
                if packed and (seconds := hint_s(packed, depth - 1, utc)) is not None:
                    return seconds
            elif (seconds := hint_s(item, depth - 1, utc)) is not None:
                return seconds
    elif isinstance(value, list):
        for item in value[:20]:
            if (seconds := hint_s(item, depth - 1, utc)) is not None:
                return seconds
    return None


def prose_s(message: str) -> float | None:
    found = PROSE.search(message)
    return duration_s(found.group(1)) if found else None


def moment_s(message: str, reset: str, utc: float) -> float | None:
    """ "… will reset at 2026-09-01 00:00:00", in the platform's own time where it names no zone."""
    if (found := MOMENT.search(message)) is None:
        return None
    offset = (found[2] or "").upper()
    offset = "+00:00" if offset in ("Z", "UTC", "GMT") else offset
    try:
        moment = datetime.fromisoformat((found[1] or found[3]) + offset)
        moment = moment.replace(tzinfo=moment.tzinfo or zone(reset.rpartition(" ")[2]))
        return max(0.0, moment.timestamp() - utc)
    except (ValueError, OverflowError):
        return None


def counters_s(headers: Mapping[str, str], utc: float) -> float | None:
    """From rate-limit headers: the longest reset among the counters that stand at zero; where no counter is told, the
    soonest reset. `RateLimit: "api";r=0;t=55` and `x-ratelimit-remaining-tokens: 0` are the two families."""
    spent: list[float] = []
    untold: list[float] = []
    for name, value in headers.items():
        if not RATE_HEADER.search(name):
            continue
        if name == "ratelimit":
            spent += structured_resets(value)
        elif "remaining" in name and is_zero(value):
            reset = headers.get(name.replace("remaining", "reset")) or headers.get(
                name.replace("remaining", "reset-after"), ""
            )
            spent += [] if (seconds := delay_s(reset, utc)) is None else [seconds]
        elif "reset" in name and name.replace("reset-after", "reset").replace("reset", "remaining") not in headers:
            untold += [] if (seconds := delay_s(value, utc)) is None else [seconds]
    return max(spent, default=min(untold, default=None))


def structured_resets(value: str) -> Iterator[float]:
    """The resets of spent counters in a `RateLimit` header: in its older form `limit=9, remaining=0, reset=55`, in its
    newer one `"a";r=0;t=55, "b";r=3;t=9`."""
    items = [value] if "remaining" in value else value.split(",")
    for item in items:
        pairs = {name.lower(): text for name, text in PAIR.findall(item)}
        left, reset = pairs.get("remaining", pairs.get("r", "0")), pairs.get("reset", pairs.get("t"))
        if is_zero(left) and reset is not None and (seconds := duration_s(reset)) is not None:
            yield seconds


def is_zero(value: str) -> bool:
    try:
        return float(value) <= 0
    except ValueError:
        return False
