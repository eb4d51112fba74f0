"""What the client is told when nothing is left to try (SPEC 5.3). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from protection import RULES, Cooling, Failure, UpstreamError
from routing.fit import below_floor
from routing.plan import Plan
from routing.route import Route
from wire.errors import GatewayError, NoProviders, PromptTooLong

WAITING = {f for f, rule in RULES.items() if rule.cooling in (Cooling.KEY, Cooling.INVALID)}
REFUSAL_STATUSES = {400, 422}  # with these a provider calls the request itself bad
TOO_LONG_OR_FILTERED = {Failure.CONTEXT_LENGTH, Failure.CONTENT_FILTER}
REFUSALS_MAX = 3  # platforms in a row that call a request bad are believed (SPEC 5.3)


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """One call to a provider that failed."""

    route: Route
    error: UpstreamError
    ms: int

    def in_mid_stream(self) -> GatewayError:
        """What the client is told of it when it has a part of the answer already."""
        error = self.error
        stalled = error.failure is Failure.STALL
        words = "stopped sending" if stalled else "failed in the middle of its answer"
        message = f"{self.route.model.platform.name} {words}. The answer is incomplete; send the request again."
        if stalled:
            return GatewayError(message, status=504, type="stream_timeout")
        status = error.status if error.status is not None and error.status >= 400 else 502
        return GatewayError(message, status=status, type="stream_error")

    @property
    def calls_request_bad(self) -> bool:
        return self.error.failure is Failure.BAD_REQUEST and self.error.status in REFUSAL_STATUSES

    def as_json(self) -> dict[str, Any]:
        model, error = self.route.model, self.error
        return {
            "platform": model.platform.id,
            "model": model.model_id,
            "status": error.status,
            "kind": str(error.failure),
            "ms": self.ms,
            "message": error.message,
        }


def request_is_bad(attempts: Sequence[FailedAttempt]) -> bool:
    """Whether so many platforms in a row have called the request itself bad that they are believed."""
    platforms = set()
    for attempt in reversed(attempts):
        if not attempt.calls_request_bad:
            break
        platforms.add(attempt.route.model.platform.id)
    return len(platforms) >= REFUSALS_MAX


def refusal(attempts: Sequence[FailedAttempt]) -> GatewayError:
    """The provider's own verdict on the request, as the client's 400."""
    error = attempts[-1].error
    codes = {Failure.CONTEXT_LENGTH: "context_length_exceeded", Failure.CONTENT_FILTER: "content_filter"}
    return GatewayError(
        error.message,
        status=error.status if error.status and 400 <= error.status < 500 else 400,
        type="invalid_request_error",
        code=error.code or codes.get(error.failure, "bad_request"),
        attempts=[attempt.as_json() for attempt in attempts],
    )


def exhausted(
    plan: Plan, attempts: Sequence[FailedAttempt], *, stream: bool, retry_after_s: float | None = None
) -> GatewayError:
    """What the client is told when nothing is left to try (SPEC 5.3)."""
    failures = [attempt.error.failure for attempt in attempts]
    waiting = all(f in WAITING for f in failures)  # a later request may find these keys usable again
    blocked = plan.blocked.values()
    details: dict[str, Any] = {"retry_after_s": retry_after_s, "attempts": [attempt.as_json() for attempt in attempts]}
    refused = [a for a in attempts if a.calls_request_bad or a.error.failure in TOO_LONG_OR_FILTERED]
    if request_is_bad(attempts) or (attempts and len(refused) == len(attempts)):
        if attempts[-1].error.failure is Failure.CONTEXT_LENGTH:
            window = max(attempt.route.model.context_window for attempt in attempts)
            return PromptTooLong(max(plan.need.tokens, window + 1), window, attempts=details["attempts"])
        return refusal(attempts)
    if plan.floored:
        return below_floor(plan.need, **details)
    if waiting and (plan.banned or any(b.reason in ("transient", "trial") for b in blocked)):
        message = "Every model that could serve this is resting after failures. Try again shortly."
        return GatewayError(message, status=503, type="routing_error", code="all_models_exhausted", **details)
    if waiting and (blocked or any(f is not Failure.AUTH for f in failures)):
        message = "Every key that could serve this is rate-limited. Wait, or add another key or platform."
        return GatewayError(message, status=429, type="rate_limit_error", code="rate_limited", **details)
    if not failures:
        return NoProviders()
    if failures[-1] in (Failure.STALL, Failure.TIMEOUT):
        name = "stream_timeout" if stream else "timeout"
        message = "The last provider tried did not answer in time. Try again, or add another platform."
        return GatewayError(message, status=504, type=name, code=name, **details)
    message = "Every provider that could serve this failed. Try again; error.attempts says what each one answered."
    return GatewayError(message, status=502, type="provider_error", code="all_attempts_failed", **details)
