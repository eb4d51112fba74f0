"""How clients spell the address of an endpoint and where they put their key. Pure.

Clients are configured with a base URL, which users copy from elsewhere: with /v1 and without, twice, with the prefix of
another product, with a slash too many. What is meant is nearly always clear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Given = Mapping[bytes, bytes]  # a request's headers
SLASHES = re.compile(r"/{2,}")
PREFIXES = re.compile(r"(?:/api(?=/v1/))?(?:/openai|/v1(?=/))+")  # in front of an endpoint's own name
# As Azure and the first edition of OpenAI's API have it: the model is part of the address.
DEPLOYMENT = re.compile(
    r"/(?:deployments|engines)/(?P<model>.+?)(?P<endpoint>/(?:chat/completions|completions|embeddings|responses))"
)
ENDPOINTS = ("/chat/completions", "/completions", "/embeddings", "/messages", "/models", "/responses")
KEY_HEADERS = (b"x-api-key", b"api-key", b"x-goog-api-key")  # beside Authorization; each API has its own


def tidy_path(path: str) -> tuple[str, str | None]:
    """The path that is meant, and the model that it names, if any."""
    path = SLASHES.sub("/", path)
    if len(path) > 1:
        path = path.rstrip("/")
    found = PREFIXES.match(path)
    rest = path[found.end() :] if found else path
    if deployed := DEPLOYMENT.fullmatch(rest):
        return "/v1" + deployed["endpoint"], deployed["model"]
    if any(rest == name or rest.startswith(name + "/") for name in ENDPOINTS):
        return "/v1" + rest, None
    return path, None


def credentials(headers: Given) -> list[bytes]:
    """What may be the client's key: a bearer token, a bare Authorization, and the headers of other APIs."""
    keys = list(filter(None, map(headers.get, KEY_HEADERS)))
    if given := headers.get(b"authorization", b"").strip():
        keys.insert(0, given[7:].strip() if given[:7].lower() == b"bearer " else given)
    return keys
