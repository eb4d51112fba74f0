"""What a provider's failing answer says: its status, code, words and wish to be left alone.

Providers put errors into every status, 200 included, and in a dozen shapes; here they are read once (SPEC 6). Naming
what they mean is protection.classify's work. No I/O.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from routing.day import until_reset_s, zone

RETRY_AFTER_MAX_S = 86_400.0  # a longer wish is a mistake more often than a plan
HINT_DEPTH_MAX = 7  # how deep in an error body a retry hint is looked for; a backend's error in another's nests 7
STATUS_BY_NAME = {
    "resource_exhausted": 429, "rate_limit_exceeded": 429, "rate_limit_error": 429, "rate_limited": 429,
    "too_many_requests": 429, "too_many_requests_error": 429, "insufficient_quota": 429, "quota_exceeded": 429,
    "request_quota_exceeded": 429, "token_quota_exceeded": 429, "rpm_rate_limit_exceeded": 429,
    "tpm_rate_limit_exceeded": 429, "freeusagelimiterror": 429,
    "unavailable": 503, "service_unavailable": 503, "overloaded": 503, "overloaded_error": 503,
    "provider_overloaded": 503, "queue_exceeded": 503, "engine_overloaded": 503,
    "internal": 500, "internal_error": 500, "internal_server_error": 500, "server_error": 500, "api_error": 500,
    "unknown": 500, "data_loss": 500, "bad_gateway": 502, "deadline_exceeded": 504, "timeout": 504,
    "unauthenticated": 401, "invalid_api_key": 401, "api_key_invalid": 401, "wrong_api_key": 401,
    "authentication_error": 401, "autherror": 401,
    "payment_required": 402, "payment_required_error": 402, "insufficient_credits": 402, "out_of_credit": 402,
    "permission_denied": 403, "permission_error": 403, "forbidden": 403, "access_denied": 403,
    "freetiererror": 403,
    "not_found": 404, "not_found_error": 404, "model_not_found": 404, "modelerror": 404, "invalid_model": 404,
    "model_decommissioned": 404,
    "invalid_argument": 400, "invalid_request_error": 400, "invalid_request": 400, "bad_request": 400,
    "failed_precondition": 400, "out_of_range": 400, "context_length_exceeded": 400, "tokens_too_long": 400,
    "content_filter": 400, "content_policy_violation": 400, "tool_use_failed": 400, "json_validate_failed": 400,
    "aborted": 409, "already_exists": 409, "request_too_large": 413, "unimplemented": 501, "daily_quota": 429,
}  # fmt: skip
DAILY_QUOTA = "daily_quota"  # what `error_codes` calls a quota of the day
NO_QUIRKS: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Fault:
    """An error body, read. `status` is what the body names; None when it names none."""

    status: int | None
    code: str | None
    message: str
    sure: bool = False  # the body knows better than the HTTP status it came with
    daily: bool = False  # a quota that comes back only with the platform's next day, whatever else it hints


def wrapped(body: Mapping[str, Any], quirks: Mapping[str, Any] = NO_QUIRKS) -> Fault | None:
    """The error inside a 200's body or a streamed event, if there is one (SPEC 6.1)."""
    error = body.get("error")
    if error and isinstance(error, str | dict):
        return read(body, quirks)
    if "choices" not in body or body["choices"] is None:
        if body.get("errors") or body.get("success") is False or body.get("object") == "error":
            return read(body, quirks)
        if body.get("code") and ("message" in body or "msg" in body):  # flat
            return read(body, quirks)
        if "usage" not in body and any(isinstance(body.get(name), str) for name in ("message", "detail")):  # bare words
            return read(body, quirks)
        return None
    if body.get("success") is False and body.get("errors"):
        return read(body, quirks)
    choices = body["choices"]
    first = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(first, dict):
        inner = first.get("error")
        if inner and isinstance(inner, str | dict):
            return read({"error": inner}, quirks)
        if first.get("finish_reason") in ("error", "network_error"):
            return Fault(None, None, "The model's answer ended with an error.")
    return None


def read(body: object, quirks: Mapping[str, Any] = NO_QUIRKS) -> Fault:
    """Status, code and message of an error body of any known shape; `quirks` has the platform's own codes."""
    if isinstance(body, list) and body:  # some wrap errors in a one-element array
        body = body[0]
    if not isinstance(body, dict):
        message = str(body)[:500] if body else ""
        return renamed([], message, quirks) or Fault(None, None, message)
    places = list(error_places(body))
    message = found_message(body, places)
    return (
        refused_quota(body, message)
        or renamed(places, message, quirks)
        or moderated(body, message)
        or Fault(found_status(places), found_code(places), message)
    )


def renamed(places: list[dict[str, Any]], message: str, quirks: Mapping[str, Any]) -> Fault | None:
    """What the catalogue knows of the platform's own codes, or of its words where it has no codes."""
    names: Mapping[str, str] = quirks.get("error_codes", {})
    found = [str(place.get(field)) for place in places for field in ("code", "type", "status") if place.get(field)]
    name = next((names[code] for code in found if code in names), None)
    if name is None:
        name = next((name for text, name in quirks.get("error_texts", {}).items() if text in message), None)
    if name is None:
        return None
    return Fault(STATUS_BY_NAME.get(name), name, message, sure=True, daily=name == DAILY_QUOTA)


def refused_quota(body: dict[str, Any], message: str) -> Fault | None:
    """A structured account of which quota is used up (google.rpc.QuotaFailure): its ids tell days from minutes."""
    error = body.get("error")
    details = error.get("details") if isinstance(error, dict) else None
    violations = [
        violation
        for detail in (details if isinstance(details, list) else ())
        if isinstance(detail, dict) and isinstance(detail.get("violations"), list)
        for violation in detail["violations"]
        if isinstance(violation, dict)
    ]
    nothing = violations and NO_QUOTA.search(message)  # a zero may be left out of the structure
    if nothing or any(str(violation.get("quotaValue")) == "0" for violation in violations):  # not in this key's plan
        return Fault(403, "permission_denied", message, sure=True, daily=True)
    if any("PerDay" in str(violation.get("quotaId")) for violation in violations):
        return Fault(429, DAILY_QUOTA, message, sure=True, daily=True)
    return None


def moderated(body: dict[str, Any], message: str) -> Fault | None:
    """An aggregator's 403 may be its backend's content filter."""
    error = body.get("error")
    metadata = error.get("metadata") if isinstance(error, dict) else None
    if isinstance(metadata, dict) and metadata.get("reasons") and "flagged_input" in metadata:
        return Fault(400, "content_filter", message, sure=True)
    return None


def error_places(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects that may carry code, status and message, most telling first."""
    error, errors = body.get("error"), body.get("errors")
    if isinstance(error, dict):
        metadata = error.get("metadata")
        if isinstance(metadata, dict) and "error_type" in metadata:
            yield {"code": metadata["error_type"]}
        for detail in error["details"] if isinstance(error.get("details"), list) else ():
            if isinstance(detail, dict) and isinstance(detail.get("reason"), str):  # google.rpc.ErrorInfo
                yield {"code": detail["reason"]}
        yield error
        if isinstance(error.get("errors"), list):
            yield from (item for item in error["errors"] if isinstance(item, dict))
    if isinstance(errors, list):
        yield from (item for item in errors if isinstance(item, dict))
    elif isinstance(errors, dict):
        yield errors
    yield body


def found_status(places: list[dict[str, Any]]) -> int | None:
    for place in places:
        for name in ("code", "status", "status_code", "raw_status_code"):
            if (status := whole_status(place.get(name))) is not None:
                return status
    for place in places:
        for name in ("code", "status", "type"):
            value = place.get(name)
            if isinstance(value, str) and (status := STATUS_BY_NAME.get(value.lower())) is not None:
                return status
    return None


def whole_status(value: object) -> int | None:
    """A finite whole number from 100 to 599, also spelled as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return int(number) if math.isfinite(number) and number == int(number) and 100 <= number <= 599 else None


def found_code(places: list[dict[str, Any]]) -> str | None:
    """The first code in words; else the first at all."""
    codes = [place.get(name) for place in places for name in ("code", "status")]
    names = [code for code in codes if isinstance(code, str) and code and not code.isdecimal()]
    if names:
        return names[0]
    return next((str(code) for code in codes if isinstance(code, int | str) and code), None)


def found_message(body: dict[str, Any], places: list[dict[str, Any]]) -> str:
    error = body.get("error")
    if isinstance(error, str) and error:
        return error
    for name in ("message", "msg", "detail", "title"):
        for place in places:
            if text := as_text(place.get(name)):
                return with_raw(text, error)
    return as_text(error) or as_text(body.get("errors")) or "The provider reported an error without words."


def as_text(value: object) -> str:
    """Words from a message that may be text, an object, or a list of them; the text may be an object's JSON."""
    if isinstance(value, str):
        inner = packed_object(value)
        return value if inner is None else as_text(inner) or value
    if isinstance(value, list) and value:
        return as_text(value[0])
    if isinstance(value, dict):
        for name in ("message", "msg", "detail", "error"):
            if text := as_text(value.get(name)):
                return text
    return ""


def packed_object(text: str) -> dict[str, Any] | None:
    """The error body of a backend, which some gateways pass on as text."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def with_raw(text: str, error: object) -> str:
    """An aggregator's "Provider returned error" says nothing without the backend's own words."""
    metadata = error.get("metadata") if isinstance(error, dict) else None
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    return f"{text}: {as_text(raw)}" if isinstance(raw, str) and raw else text


DURATION = r"(?:\d+(?:\.\d+)?\s*(?:milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|h|days?|d)\s*)+"
DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|h|days?|d)")
UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
PROSE = re.compile(
    rf"(?:try again (?:in|after)|retry (?:in|after)|please wait|resets? (?:in|after)|wait)\s+({DURATION})",
    re.IGNORECASE,
)  # "Please try again in 7m12s", "Please wait 52220 seconds", "Resets in 3 days"
MOMENT = re.compile(r"reset\w*\s+(?:at|on)\s+(\d{4}-\d\d-\d\d[ T]\d\d:\d\d(?::\d\d)?)", re.IGNORECASE)
# Of a text that gives no time at all; a text alone never makes a failure a quota.
DAILY = re.compile(r"\bdaily\b|\bper[ -]?day\b|\btoday\b|/\s*day\b|\bPerDay\b|\bByDay\b|\b[RT]PD\b", re.IGNORECASE)
MONTHLY = re.compile(r"\bmonthly\b|\bper[ -]month\b|/\s*month\b", re.IGNORECASE)
NO_QUOTA = re.compile(r"\blimit: 0\b(?!\.\d)")
HINTS = frozenset({"retrydelay", "retry_after", "retry_after_seconds", "retryafter", "retry-after"})


def duration_s(text: str) -> float | None:
    """Seconds of "7.66s", "2m59.56s", "680ms", "1h 2m", or a bare number of seconds."""
    text = text.strip().lower()
    try:
        seconds = float(text)
    except ValueError:
        parts = DURATION_PART.findall(text)
        if not parts or DURATION_PART.sub("", text).strip():
            return None
        seconds = sum(
            float(count) * UNIT_S["ms" if unit.startswith(("ms", "mil")) else unit[0]] for count, unit in parts
        )
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def retry_after_s(
    fault: Fault,
    headers: Mapping[str, str],
    body: object,
    utc: float,
    quirks: Mapping[str, Any] = NO_QUIRKS,
    reset: str = "UTC",
) -> float | None:
    """How long the provider asks to be left alone: header, then body fields, then prose, then its counters; `reset` is
    when its day begins."""
    if fault.daily:  # of its hints only a moment means the quota, not the next second
        told = moment_s(fault.message, reset, utc)
        return min(told, RETRY_AFTER_MAX_S) if told else until_reset_s(reset, utc)
    for found in (
        header_delay_s(headers.get("Retry-After", ""), utc),
        hint_s(body, HINT_DEPTH_MAX, utc),
        prose_s(fault.message),
        moment_s(fault.message, reset, utc),
        reset_s(headers, utc),
    ):
        if found is not None:
            return min(found, RETRY_AFTER_MAX_S)
    used_up = any(headers.get(name, "").strip() == "0" for name in quirks.get("daily_headers", ()))
    if used_up or DAILY.search(fault.message):
        return until_reset_s(reset, utc)
    return RETRY_AFTER_MAX_S if MONTHLY.search(fault.message) else None


def moment_s(message: str, reset: str, utc: float) -> float | None:
    """ "… will reset at 2026-09-01 00:00:00", told in the platform's own time."""
    if (found := MOMENT.search(message)) is None:
        return None
    try:
        moment = datetime.fromisoformat(found[1]).replace(tzinfo=zone(reset.rpartition(" ")[2]))
    except ValueError:
        return None
    return max(0.0, moment.timestamp() - utc)


def header_delay_s(value: str, utc: float) -> float | None:
    """Retry-After as seconds or an HTTP date."""
    if not value:
        return None
    if (seconds := duration_s(value)) is not None:
        return seconds
    try:
        moment = parsedate_to_datetime(value)
        return max(0.0, moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() - utc)
    except (ValueError, OverflowError):
        return None


def hint_s(value: object, depth: int, utc: float) -> float | None:
    """A retry field anywhere in an error body."""
    if depth == 0:
        return None
    if isinstance(value, dict):
        for name, item in value.items():
            lower = str(name).lower()
            if isinstance(item, str | int | float) and not isinstance(item, bool):
                if lower in HINTS and (seconds := duration_s(str(item))) is not None:
                    return seconds
                if lower == "x-ratelimit-reset" and (seconds := duration_s(str(item))) is not None:
                    return since_epoch_s(seconds, utc)
                packed = packed_object(item) if isinstance(item, str) else None
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


def reset_s(headers: Mapping[str, str], utc: float) -> float | None:
    """From x-ratelimit-remaining-*/-reset-*: the longest reset among the counters that stand at zero."""
    waits = []
    for name, value in headers.items():
        lower = name.lower()
        if "ratelimit-remaining" in lower and value.strip() in ("0", "0.0"):
            reset = headers.get(lower.replace("remaining", "reset"), "")
            if (seconds := duration_s(reset)) is not None:
                waits.append(since_epoch_s(seconds, utc))
    return max(waits, default=None)


def since_epoch_s(seconds: float, utc: float) -> float:
    """A reset may be told as a moment: in seconds or milliseconds since 1970."""
    if seconds > 1e11:
        seconds /= 1000
    return max(0.0, seconds - utc) if seconds > 1e8 else seconds


KEY_LIKE = re.compile(
    r"\b(?:sk|gsk|csk|hf|ak|nvapi|pk|key)[-_][A-Za-z0-9_\-]{12,}|\bAIza[A-Za-z0-9_\-]{20,}|(?i:bearer\s+)[^\s\"']{8,}"
)


def redact(text: str, secret: str) -> str:
    """Remove the key this call was made with, whole or in its parts, and whatever else looks like one.

    What comes out fits into a log row and an error body: half an emoji and NUL, which JSON may spell, do not.
    """
    text = text.encode(errors="replace").decode().replace("\0", " ")
    if secret:
        for part in sorted({secret, *secret.split(":")}, key=len, reverse=True):
            if len(part) >= 4:
                text = text.replace(part, "***")
    return KEY_LIKE.sub("***", text)
