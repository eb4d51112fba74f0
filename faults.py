"""What a provider's failing answer says: its status, code, words and wish to be left alone.

Providers put errors into every status, 200 included, and in a dozen shapes; here they are read once (SPEC 6). Naming
what they mean is protection.classify's work. No I/O.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

RETRY_AFTER_MAX_S = 86_400.0  # a longer wish is a mistake more often than a plan
HINT_DEPTH_MAX = 6  # how deep in an error body a retry hint is looked for; providers nest it up to 4
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
    "aborted": 409, "already_exists": 409, "request_too_large": 413, "unimplemented": 501,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """An error body, read. `status` is what the body names; None when it names none."""

    status: int | None
    code: str | None
    message: str


def wrapped(body: Mapping[str, Any]) -> Fault | None:
    """The error inside a 200's body or a streamed event, if there is one (SPEC 6.1)."""
    error = body.get("error")
    if error and isinstance(error, str | dict):
        return read(body)
    if "choices" not in body or body["choices"] is None:
        if body.get("errors") or body.get("success") is False or body.get("object") == "error":
            return read(body)
        if body.get("code") and ("message" in body or "msg" in body):  # flat
            return read(body)
        return None
    if body.get("success") is False and body.get("errors"):
        return read(body)
    choices = body["choices"]
    first = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(first, dict):
        inner = first.get("error")
        if inner and isinstance(inner, str | dict):
            return read({"error": inner})
        if first.get("finish_reason") in ("error", "network_error"):
            return Fault(None, None, "The model's answer ended with an error.")
    return None


def read(body: object) -> Fault:
    """Status, code and message of an error body of any known shape."""
    if isinstance(body, list) and body:  # some wrap errors in a one-element array
        body = body[0]
    if not isinstance(body, dict):
        return Fault(None, None, str(body)[:500] if body else "")
    places = list(error_places(body))
    return Fault(found_status(places), found_code(places), found_message(body, places))


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
    """Words from a message that may be text, an object, or a list of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        return as_text(value[0])
    if isinstance(value, dict):
        for name in ("message", "msg", "detail", "error"):
            if text := as_text(value.get(name)):
                return text
    return ""


def with_raw(text: str, error: object) -> str:
    """An aggregator's "Provider returned error" says nothing without the backend's own words."""
    metadata = error.get("metadata") if isinstance(error, dict) else None
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    return f"{text}: {raw}" if isinstance(raw, str) and raw else text


DURATION = r"(?:\d+(?:\.\d+)?\s*(?:milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|h|days?|d)\s*)+"
DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|h|days?|d)")
UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
PROSE = re.compile(
    rf"(?:try again in|retry in|retry after|please wait|resets in|wait)\s+({DURATION})", re.IGNORECASE
)  # "Please try again in 7m12s", "Please wait 52220 seconds", "Resets in 3 days"
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


def unit_s(unit: str) -> float:
    return UNIT_S["ms" if unit.startswith(("ms", "mil")) else unit[0]]


def retry_after_s(headers: Mapping[str, str], body: object, message: str, utc: float) -> float | None:
    """How long the provider asks to be left alone: header, then body fields, then prose, then its reset headers."""
    for found in (
        header_delay_s(headers.get("Retry-After", ""), utc),
        hint_s(body, HINT_DEPTH_MAX),
        prose_s(message),
        reset_s(headers, utc),
    ):
        if found is not None:
            return min(found, RETRY_AFTER_MAX_S)
    return None


def header_delay_s(value: str, utc: float) -> float | None:
    """Retry-After as seconds or an HTTP date."""
    if not value:
        return None
    if (seconds := duration_s(value)) is not None:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - utc)
    except (ValueError, OverflowError):
        return None


def hint_s(value: object, depth: int) -> float | None:
    """A retry field anywhere in an error body."""
    if depth == 0:
        return None
    if isinstance(value, dict):
        for name, item in value.items():
            if name.lower() in HINTS and isinstance(item, str | int | float) and not isinstance(item, bool):
                if (seconds := duration_s(str(item))) is not None:
                    return seconds
            elif (seconds := hint_s(item, depth - 1)) is not None:
                return seconds
    elif isinstance(value, list):
        for item in value[:20]:
            if (seconds := hint_s(item, depth - 1)) is not None:
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
    """Remove the key this call was made with, whole or in its parts, and whatever else looks like one."""
    if secret:
        for part in sorted({secret, *secret.split(":")}, key=len, reverse=True):
            if len(part) >= 4:
                text = text.replace(part, "***")
    return KEY_LIKE.sub("***", text)
