"""Where a platform is called: an address, the headers of every call to it, and the proxy in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

ENDPOINTS_MAX = 1024  # pairs of model and key in use lately


@dataclass(frozen=True, slots=True, eq=False)
class Endpoint:
    """Where a platform is called, and with which headers; what is found out for it is kept by its identity."""

    url: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxy of each scheme, as an address that may hold a password, and the hosts that are called directly."""

    http: str | None = field(default=None, repr=False)
    https: str | None = field(default=None, repr=False)
    exempt: tuple[str, ...] = ()

    def through(self, scheme: str, host: str, port: int | None) -> str | None:
        """The proxy for a call to this host; None for a direct one."""
        proxy = self.https if scheme == "https" else self.http
        return None if proxy is None or any(matches(entry, host, port) for entry in self.exempt) else proxy


NO_PROXIES = Proxies()


def matches(entry: str, host: str, port: int | None) -> bool:
    """Whether an entry of NO_PROXY names this host: itself, a domain above it, a network around it, or `*`. With a
    port it means that port only."""
    if entry == "*":
        return True
    host, entry = host.strip("[]").lower(), entry.lower()
    name, colon, wanted = entry.rpartition(":")
    if colon and wanted.isdigit() and (":" not in name or name.endswith("]")):  # not the end of a bare IPv6 address
        if int(wanted) != port:
            return False
        entry = name
    entry = entry.strip("[]").removeprefix("*").removeprefix(".")
    try:
        return ip_address(host) in ip_network(entry, strict=False)
    except ValueError:
        return bool(entry) and (host == entry or host.endswith(f".{entry}"))
