"""Embeddings as most platforms have them: the request out, vectors back in one form.

What comes back is checked before anybody stores it: as many vectors as texts, in their order, and of the length that
was asked for or that the catalogue knows. No I/O.
"""

from __future__ import annotations

import math
import struct
from base64 import b64decode
from binascii import Error as NotBase64
from functools import lru_cache
from typing import Any

from adapters.base import Reply, Request, base_url, bearer_headers
from adapters.quirks import STANDARD_FIELDS
from protection import Failure, UpstreamError
from routing.catalog import Key, Model
from wire.chat import Chat, Completion, Tally
from wire.http import ENDPOINTS_MAX, Endpoint
from wire.jsontext import JSON, dump

NUMBERS = frozenset({int, float})


@lru_cache(maxsize=ENDPOINTS_MAX)
def endpoint(model: Model, key: Key) -> Endpoint:
    url, secret = base_url(model.platform, key)
    return Endpoint(url + model.quirks.get("embeddings_path", "/embeddings"), bearer_headers(secret, model.quirks))


def embedding_request(model: Model, key: Key, chat: Chat) -> Request:
    """Vectors are asked for as numbers, which every platform has. Raises UpstreamError for a length that this one has
    not, and for more texts than it takes."""
    body: JSON = {**chat.body, "model": model.model_id}
    most = model.quirks.get("batch_max")
    if most is not None and len(texts_of(chat)) > most:
        message = f"This platform takes at most {most} texts in one request: send several."
        raise UpstreamError(Failure.BAD_REQUEST, message, status=400)
    for name in model.quirks.get("drop", ()):
        dropped = body.pop(name, None)
        if name == "dimensions" and dropped not in (None, model.dimensions):
            message = f"This platform has vectors of {model.dimensions} numbers only."
            raise UpstreamError(Failure.BAD_REQUEST, message, status=400)
    for name, value in model.quirks.get("default", {}).items():
        if name not in STANDARD_FIELDS:  # others are about chat
            body.setdefault(name, value)
    return Request(endpoint(model, key), dump(body))


def embedding_reply(body: JSON, chat: Chat, model: Model) -> Reply:
    """A committed answer. Raises UpstreamError for one that must not be stored."""
    vectors = vectors_in(body)
    if len(vectors) != len(texts := texts_of(chat)):
        raise wrong(f"The provider gave {len(vectors)} vectors for {len(texts)} texts.")
    length = chat.body.get("dimensions", model.dimensions)
    lengths = set(map(len, vectors))
    if len(lengths) > 1 or (length is not None and lengths != {length}):
        raise wrong(f"The provider's vectors have {', '.join(map(str, sorted(lengths)))} numbers, not {length}.")
    if model.quirks.get("unit_vectors"):
        vectors = [unit(vector) for vector in vectors]
    return committed(vectors, chat, body.get("model") or model.model_id, body.get("usage"))


def committed(vectors: list[list[float]], chat: Chat, model: object, usage: object) -> Reply:
    """These vectors as an answer in OpenAI's form."""
    tally = Tally(has_text=True)
    tally.note_usage(usage)
    if tally.usage_object is None:
        tally.note_usage({"prompt_tokens": chat.prompt_tokens, "completion_tokens": 0})
    assert tally.usage is not None
    count = tally.usage.input_tokens
    data = [{"object": "embedding", "index": place, "embedding": vector} for place, vector in enumerate(vectors)]
    told = {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    return Reply(tally, completion=Completion(b"", told))


def texts_of(chat: Chat) -> list[Any]:
    """What a vector each is asked for; a list of numbers is one text in tokens."""
    given = chat.body["input"]
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def vectors_in(body: JSON) -> list[list[float]]:
    """In the order of the texts, whichever order they came in."""
    data = body.get("data")
    if not isinstance(data, list) or not data or not all(isinstance(entry, dict) for entry in data):
        raise wrong("The provider's answer has no vectors.")
    places = [entry.get("index", place) for place, entry in enumerate(data)]
    if sorted(places, key=str) != sorted(range(len(data)), key=str):
        raise wrong("The provider's vectors are not in any order.")
    by_place = dict(zip(places, data, strict=True))
    return [vector_of(by_place[place].get("embedding")) for place in range(len(data))]


def vector_of(given: object) -> list[float]:
    """Numbers, or the same as little-endian float32 in base64."""
    if isinstance(given, str):
        try:
            raw = b64decode(given, validate=True)
            return list(struct.unpack(f"<{len(raw) // 4}f", raw))
        except (NotBase64, struct.error):
            raise wrong("The provider's vectors are not numbers.") from None
    if not isinstance(given, list) or not given or not NUMBERS.issuperset(map(type, given)):
        raise wrong("The provider's vectors are not numbers.")
    return given


def unit(vector: list[float]) -> list[float]:
    """Of length 1, as clients expect who compare vectors by their product."""
    length = math.hypot(*vector)
    return [number / length for number in vector] if length else vector


def wrong(message: str) -> UpstreamError:
    return UpstreamError(Failure.MALFORMED, message, status=200)
