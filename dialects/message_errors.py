"""Errors in the words of the Messages API, as an answer of their own or as the last event of a stream (SPEC 16.4)."""

from __future__ import annotations

from wire.errors import GatewayError, ModelNotFound, PromptTooLong
from wire.jsontext import JSON

ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 500: "api_error", 529: "overloaded_error",
}  # fmt: skip
OVERLOADED = 529


def status_of(error: GatewayError) -> int:
    """What this API's clients know: 4xx for what only they can mend, 529 for all that may pass."""
    if isinstance(error, PromptTooLong) or error.status == 422:
        return 400
    if isinstance(error, ModelNotFound):
        return 404
    return OVERLOADED if error.status > 500 else error.status


def error_of(error: GatewayError) -> JSON:
    words = error.message.replace("error.attempts", "the header X-Fallback-Trail")
    if isinstance(error, PromptTooLong):  # clients look for these very words, and then shorten the conversation
        words = f"prompt is too long: {error.tokens} tokens > {error.window} maximum"
    return {"type": ERROR_TYPES.get(status_of(error), "invalid_request_error"), "message": words}
