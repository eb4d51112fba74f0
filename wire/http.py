"""Where a platform is called: an address and the headers of every call to it."""

from __future__ import annotations

from dataclasses import dataclass

ENDPOINTS_MAX = 1024  # pairs of model and key in use lately


@dataclass(frozen=True, slots=True, eq=False)
class Endpoint:
    """Where a platform is called, and with which headers; what is found out for it is kept by its identity."""

    url: str
    headers: dict[str, str]
