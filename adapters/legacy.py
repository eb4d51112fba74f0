"""Legacy completions at platforms that have an endpoint for them: the request. Their answers say `text` where chat says
`message` or `delta`, which shapes.py puts right for every answer. No I/O.
"""

from __future__ import annotations

from functools import lru_cache

from adapters.base import Request, base_url, bearer_headers
from adapters.quirks import apply_quirks
from routing.catalog import Key, Model
from wire.chat import Chat
from wire.http import ENDPOINTS_MAX, Endpoint
from wire.jsontext import JSON, dump


@lru_cache(maxsize=ENDPOINTS_MAX)
def endpoint(model: Model, key: Key) -> Endpoint:
    url, secret = base_url(model.platform, key)
    return Endpoint(f"{url}/completions", bearer_headers(secret, model.quirks))


def takes_prompts(model: Model, prompt: JSON) -> bool:
    """Whether this legacy request goes to an endpoint for prompts."""
    return model.completions and ("suffix" not in prompt or not model.quirks.get("no_suffix"))


def legacy_request(model: Model, key: Key, chat: Chat) -> Request:
    assert chat.legacy is not None
    body: JSON = {**chat.legacy, "model": model.model_id}
    if chat.stream and not model.quirks.get("no_stream"):
        body["stream"] = True
        if not model.quirks.get("no_stream_usage"):
            body["stream_options"] = {"include_usage": True}
    text = {name: body.pop(name) for name in ("prompt", "suffix") if name in body}  # no rule about fields touches them
    apply_quirks(body, model.quirks, model.answer_max(chat.prompt_tokens))
    return Request(endpoint(model, key), dump({**text, **body}))
