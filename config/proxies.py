"""HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY: which proxy providers are called through.

Read as curl and the openai client read them: in lower case first, a proxy without a scheme speaks http, NO_PROXY names
hosts, domains (their subdomains too), networks, or `*`. A value that cannot be used stops the start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from config.settings import SettingsError
from wire.http import Proxies


def proxies(environ: Mapping[str, str]) -> Proxies:
    """The operator's proxies. Raises SettingsError, which never shows a value: it may hold a password."""
    shared = proxy(environ, "ALL_PROXY")
    exempt = environ.get("no_proxy", environ.get("NO_PROXY", ""))
    return Proxies(
        http=proxy(environ, "HTTP_PROXY") or shared,
        https=proxy(environ, "HTTPS_PROXY") or shared,
        exempt=tuple(entry for entry in re.split(r"[,\s]+", exempt) if entry),
    )


def proxy(environ: Mapping[str, str], name: str) -> str | None:
    text = environ.get(name.lower(), environ.get(name, "")).strip()
    if not text:
        return None
    address = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(address)
        usable = parts.scheme.lower() in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise SettingsError(f"{name}: expected http:// or https:// with a host and perhaps a port (not shown)")
    return address
