"""The errors a client may see. Whoever raises one knows its meaning; engine/door.py turns it into a response."""

from __future__ import annotations

from typing import Any

import orjson


class GatewayError(Exception):
    """What a client may see. One class for each meaning that code asks for; the rest are built where they arise."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 500,
        type: str = "api_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        attempts: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.attempts = attempts

    def body(self) -> bytes:
        error: dict[str, Any] = {"message": self.message, "type": self.type, "code": self.code, "param": self.param}
        if self.attempts:
            error["attempts"] = self.attempts
        return orjson.dumps({"error": error})

    def in_stream(self) -> dict[str, Any]:
        """The same as an event of a stream, where the code stands for the status (SPEC 8.4); what the client alone can
        mend keeps its name, by which clients know it."""
        code = self.code if self.type == "invalid_request_error" and self.code else self.status
        return {"message": self.message, "type": self.type, "code": code, "param": self.param}


class InvalidRequest(GatewayError):
    """The client's request cannot be understood or served as it is; `param` names the offending field."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message, status=status, type="invalid_request_error", code=code, param=param)


class ModelNotFound(InvalidRequest):
    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message, status=status, code="model_not_found", param="model")


class PromptTooLong(InvalidRequest):
    """No model holds this request: `tokens` are needed, and the largest window is `window`. The words are OpenAI's,
    which clients recognise and then shorten the conversation."""

    def __init__(self, tokens: int, window: int, *, attempts: list[dict[str, Any]] | None = None) -> None:
        super().__init__(
            f"This model's maximum context length is {window} tokens. However, your messages resulted in {tokens} "
            "tokens. Please reduce the length of the messages. (context_length_exceeded)",
            param="messages",
            code="context_length_exceeded",
        )
        self.tokens = tokens
        self.window = window
        self.attempts = attempts


class Unauthorized(GatewayError):
    def __init__(self) -> None:
        message = "Missing or wrong API key. Send it as 'Authorization: Bearer <key>'."
        super().__init__(message, status=401, type="authentication_error", code="invalid_api_key")


class NoProviders(GatewayError):
    def __init__(self) -> None:
        message = (
            "No enabled model has a usable key. Set a provider's key in the environment and restart, "
            "or add or repair one with POST /api/keys."
        )
        super().__init__(message, status=503, type="routing_error", code="no_providers")
