"""What a provider's failing answer says: its status, its code and its words.

Providers put errors into every status, 200 included, and in a dozen shapes; they are read here once (SPEC 6). How long
to leave the provider alone is waits.py's affair, naming what a failure means is protection.classify's. No I/O.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

ANSWER_FIELDS = frozenset(
    {"id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage"}
)
MESSAGE_CHARS_MAX = 500  # of a body that is plain words
# Finish reasons with which a server says that it failed; each with the status that it amounts to, if any.
FAILED_FINISHES: Mapping[str, int | None] = {
    "error": None, "network_error": None, "abort": None, "aborted": None, "failed": None, "cancelled": None,
    "canceled": None, "user_cancel": None, "error_limit": None, "error_toxic": None, "server_error": 500,
    "internal_error": 500, "insufficient_system_resource": 503, "overloaded": 503, "timeout": 504,
}  # fmt: skip
SUCCESSES = frozenset({"0", "200", "ok", "success", "none", "null"})
# Where vendors account for a request beside OpenAI's form: the object (the root where it is none), its code, its words.
ACCOUNTS = (
    ("", "code", "message"), ("", "code", "msg"), ("", "error_code", "error_msg"), ("header", "code", "message"),
    ("base_resp", "status_code", "status_msg"),
)  # fmt: skip
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
NO_QUOTA = re.compile(r"\blimit: 0\b(?!\.\d)")  # not in this key's plan
NO_QUIRKS: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Fault:
    """An error body, read. `status` is what the body names; None when it names none."""

    status: int | None
    code: str | None
    message: str
    sure: bool = False  # the body knows better than the HTTP status it came with
    daily: bool = False  # a quota of the day: it comes back when the platform's next day begins, not when a hint says


def wrapped(body: Mapping[str, Any], quirks: Mapping[str, Any] = NO_QUIRKS) -> Fault | None:
    """The error inside a 200's body or a streamed event, if there is one (SPEC 6.1)."""
    if body.get("choices") and ANSWER_FIELDS.issuperset(body):  # nothing stands beside the answer
        return wrapped_in_choice(body["choices"], quirks)
    if is_error(body.get("error")):
        return read(body, quirks)
    if not body.get("choices"):
        if (fault := reported(body, quirks)) is not None:
            return fault
    elif body.get("success") is False and body.get("errors"):
        return read(body, quirks)
    return wrapped_in_choice(body.get("choices"), quirks) or wrapped_by_vendor(body, quirks)


def reported(body: Mapping[str, Any], quirks: Mapping[str, Any]) -> Fault | None:
    """The error that a body without an answer reports at its root, in one of the forms in use."""
    answers = "choices" in body and body["choices"] is not None  # with none: a usage at the end says no more
    if not answers and (body.get("errors") or body.get("success") is False or body.get("object") == "error"):
        return read(body, quirks)
    for account, code, words in ACCOUNTS:
        place = body.get(account) if account else body
        if isinstance(place, dict) and failed_code(place.get(code)) and isinstance(place.get(words), str):
            return read({"code": place[code], "message": place[words]}, quirks)
    if answers or "usage" in body or ("code" in body and not failed_code(body["code"])):
        return None
    detail = body.get("detail")
    listed = isinstance(detail, list) and bool(detail) and isinstance(detail[0], dict)
    said = listed or isinstance(detail, str) or isinstance(body.get("message"), str)
    return read(body, quirks) if said else None


def failed_code(code: object) -> bool:
    """Whether a code says that something failed: some also report success by one."""
    return code not in (None, "", False) and str(code).lower() not in SUCCESSES


def wrapped_in_choice(choices: object, quirks: Mapping[str, Any]) -> Fault | None:
    """An error beside or in place of the answer's own words, or an ending that is a failure."""
    choice = choices[0] if isinstance(choices, list) and choices else choices
    if not isinstance(choice, dict):
        return None
    if is_error(choice.get("error")):
        return read({"error": choice["error"]}, quirks)
    finish = choice.get("finish_reason")
    if isinstance(finish, str) and finish.lower() in FAILED_FINISHES:
        return Fault(FAILED_FINISHES[finish.lower()], finish, f"The model's answer ended with {finish!r}.")
    return None


def wrapped_by_vendor(body: Mapping[str, Any], quirks: Mapping[str, Any]) -> Fault | None:
    """An error in an object of the vendor's own: `x_vendor.error`."""
    for name in body:
        if name[:2] == "x_" and isinstance(vendor := body[name], dict) and is_error(vendor.get("error")):
            return read({"error": vendor["error"]}, quirks)
    return None


def is_error(value: object) -> bool:
    """Whether the value of a field `error` says that something failed."""
    if isinstance(value, list):
        return bool(value) and is_error(value[0])
    return isinstance(value, str | dict) and bool(value)


def read(body: object, quirks: Mapping[str, Any] = NO_QUIRKS) -> Fault:
    """Status, code and message of an error body of any known shape; `quirks` has the platform's own codes."""
    body = unwrapped(body)
    if not isinstance(body, dict):
        message = str(body)[:MESSAGE_CHARS_MAX] if body else ""
        return renamed([], message, quirks) or Fault(None, None, message)
    places = list(error_places(body))
    message = found_message(body, places)
    return (
        refused_quota(body, message)
        or renamed(places, message, quirks)
        or moderated(body, message)
        or Fault(found_status(places), found_code(places), message)
    )


def unwrapped(body: object) -> object:
    """An error body without what some put around it: a list of one, or text that is itself JSON."""
    if isinstance(body, list) and body:
        body = body[0]
    if isinstance(body, str) and (packed := packed_json(body)) is not None:
        body = packed
    if not isinstance(body, dict):
        return body
    given = error = body.get("error")
    if isinstance(error, list) and error:
        error = error[0]
    if isinstance(error, str) and (packed := packed_json(error)) is not None:
        error = packed["error"] if is_error(packed.get("error")) else packed
    return body if error is given else {**body, "error": error}


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
    for place in (error, body):  # a backend's error body, passed on as the text of another's message
        message = place.get("message") if isinstance(place, dict) else None
        if isinstance(message, str) and (packed := packed_json(message)) is not None:
            yield from error_places(packed)


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
        inner = packed_json(value)
        return value if inner is None else as_text(inner) or value
    if isinstance(value, list) and value:
        return as_text(value[0])
    if isinstance(value, dict):
        for name in ("message", "msg", "detail", "error"):
            if text := as_text(value.get(name)):
                return text
    return ""


def packed_json(text: str) -> dict[str, Any] | None:
    """The object that a text holds as JSON, perhaps in a list of one: some gateways pass a backend's error on so."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, dict) else None


def with_raw(text: str, error: object) -> str:
    """An aggregator's "Provider returned error" says nothing without the backend's own words."""
    metadata = error.get("metadata") if isinstance(error, dict) else None
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    return f"{text}: {as_text(raw)}" if isinstance(raw, str) and raw else text


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
