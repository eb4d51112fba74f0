"""What the operator says: settings from flags, environment and `.env`, and the catalogue files.

Everything is read once, at start, into frozen objects. What is malformed stops the start with one line that names it;
a secret's value is never in that line. Reads files and nothing else.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dotenv.parser import parse_stream

BUILT_IN_CATALOG = Path(__file__).parent.parent / "catalog.json"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
KEY_CHARS_MIN = 16  # of a client key, wherever others can reach the port (SPEC 13.1)
DIGITS_MAX = 18  # int() refuses thousands of them by itself, with a traceback
QUOTED_CHARS_MAX = 100  # of a malformed value in the one line that the operator gets
WHOLE_MAX = 10**12  # 31 years in milliseconds: above it a clock would overflow, and it is a typing error anyway
WORKERS_MAX = 256  # more than a machine has cores
CACHE_MB_MAX = 1_000_000  # more memory than any machine has


EPILOG = "Instead of serving: `gateway.py doctor`, `clients` or `drill`, with the same flags after the word."


class SettingsError(Exception):
    """The start stops; the text is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of SPEC 1.3, in its units. Durations are in milliseconds, as named."""

    host: str = "127.0.0.1"
    port: int = 8000
    db: Path = Path("gateway.db")
    catalog: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    encryption_key: bytes | None = field(default=None, repr=False)
    thread_protection_platforms: str = ""
    transient_cooldown_ms: int = 15_000
    thread_cooldown_ms: int = 180_000
    sticky_ttl_ms: int = 1_800_000
    rate_limit_cooldown_ms: int = 120_000
    keepalive_interval_ms: int = 15_000
    max_stream_stall_ms: int = 45_000
    first_token_timeout_ms: int = 120_000
    connect_timeout_ms: int = 5_000
    request_timeout_ms: int = 120_000
    max_fallback_attempts: int = 20
    wait_for_capacity_ms: int = 20_000  # 0: never
    trial_spacing_ms: int = 1_000  # between a failure and the next trial of what rests after it (SPEC 4.10)
    first_heartbeat_ms: int = 30_000  # of a stream that has sent nothing (SPEC 8.3)
    request_budget_ms: int = 300_000
    key_recheck_ms: int = 60_000
    rescue: bool = True
    rescue_after_ms: int = 15_000
    tool_calls: str = "whole"
    hedge_percent: int = 5  # 0: never
    late_first_token_ms: tuple[int, int] = (2_000, 8_000)  # the earliest, and where a model's pace is not known; like
    late_answer_ms: tuple[int, int] = (5_000, 30_000)  # this of whole answers it has no name in the environment
    cache_mb: int = 0  # 0: no cache
    cache_ttl_ms: int = 3_600_000
    state: str | None = field(default=None, repr=False)  # its address may hold a password, like the next one's
    log: str | None = field(default=None, repr=False)
    workers: int = 1  # processes on one port (SPEC 20.4)
    privacy: str | None = None
    origins: tuple[str, ...] = ()
    analytics_window_days: int = 7
    stats_refresh_ms: int = 60_000
    max_body_bytes: int = 32 * 1024 * 1024
    content_filter: str = "propagate"
    log_retention_days: int = 90
    log_level: str = "info"
    # These two have no name in the environment.
    error_body_ms: int = 2_000  # for the rest of a provider's error: its status says enough without it (SPEC 5.3)
    built_in_catalog: Path = BUILT_IN_CATALOG  # what `catalog` is merged over
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)  # for the names the catalogue gives


# Readers: each gives the value of a setting, or raises SettingsError with one line that says what is accepted.
Reader = Callable[[str, str], Any]


def spelled(text: str) -> int | None:
    """The whole number that these digits spell; None for anything else, and for more digits than SQLite can hold."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= DIGITS_MAX else None


def whole(low: int, high: int = WHOLE_MAX) -> Reader:
    def read(name: str, text: str) -> int:
        number = spelled(text)
        if number is None or not low <= number <= high:
            raise SettingsError(f"{name}={text[:QUOTED_CHARS_MAX]!r}: expected a whole number from {low} to {high}")
        return number

    return read


def one_of(*accepted: str) -> Reader:
    def read(name: str, text: str) -> str:
        if text.lower() not in accepted:
            raise SettingsError(f"{name}={text[:QUOTED_CHARS_MAX]!r}: expected {' or '.join(accepted)}")
        return text.lower()

    return read


def on_or_off(name: str, text: str) -> bool:
    return bool(one_of("on", "off")(name, text) == "on")


def as_text(name: str, text: str) -> str:
    return text


def as_path(name: str, text: str) -> Path:
    return Path(text)


def host(name: str, text: str) -> str:
    if not printable(text):
        raise SettingsError(f"{name}={text[:QUOTED_CHARS_MAX]!r}: expected a host name or an address, without spaces")
    return text


def credential(name: str, text: str) -> str:
    """A key that fits into one HTTP header. It is never quoted back."""
    if not printable(text):
        raise SettingsError(f"{name}: expected printable ASCII without spaces (the value is not shown)")
    return text


def printable(text: str) -> bool:
    return all(33 <= ord(char) <= 126 for char in text)


def hex_key(name: str, text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise SettingsError(f"{name}: expected 64 hex digits (the value is not shown)")
    return bytes.fromhex(text)


def address(*schemes: str) -> Reader:
    """The address of a server that needs a login. It is never quoted back."""

    def read(name: str, text: str) -> str:
        scheme, _, rest = text.partition("://")
        if scheme.lower() not in schemes or not rest.strip("/") or not printable(text):
            wanted = f"an address that begins with {' or '.join(f'{scheme}://' for scheme in schemes)}"
            raise SettingsError(f"{name}: expected {wanted} (the value is not shown: it may hold a password)")
        return text

    return read


def web_origins(name: str, text: str) -> tuple[str, ...]:
    """`https://host:port`, separated by commas; browsers send an origin in lower case and without a path."""
    origins = [part.strip().rstrip("/").lower() for part in text.split(",") if part.strip()]
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+", origin):
            accepted = "web origins like https://chat.example:8443, separated by commas, or *"
            raise SettingsError(f"{name}={origin[:QUOTED_CHARS_MAX]!r}: expected {accepted}")
    return tuple(origins)


# By the names in the environment; a field of Settings is named likewise, in lower case and without GATEWAY_.
READERS: Mapping[str, Reader] = {
    "GATEWAY_HOST": host,
    "GATEWAY_PORT": whole(0, 65_535),
    "GATEWAY_DB": as_path,
    "GATEWAY_CATALOG": as_path,
    "GATEWAY_API_KEY": credential,
    "GATEWAY_ADMIN_KEY": credential,
    "ENCRYPTION_KEY": hex_key,
    "THREAD_PROTECTION_PLATFORMS": as_text,  # read by protection.py, which forgives malformed pairs (SPEC 7.2)
    **dict.fromkeys(
        (
            "TRANSIENT_COOLDOWN_MS", "THREAD_COOLDOWN_MS", "STICKY_TTL_MS", "RATE_LIMIT_COOLDOWN_MS",
            "KEEPALIVE_INTERVAL_MS", "MAX_STREAM_STALL_MS", "FIRST_TOKEN_TIMEOUT_MS", "CONNECT_TIMEOUT_MS",
            "REQUEST_TIMEOUT_MS", "MAX_FALLBACK_ATTEMPTS", "REQUEST_BUDGET_MS", "KEY_RECHECK_MS", "RESCUE_AFTER_MS",
            "TRIAL_SPACING_MS", "FIRST_HEARTBEAT_MS",
            "CACHE_TTL_MS", "ANALYTICS_WINDOW_DAYS", "STATS_REFRESH_MS", "MAX_BODY_BYTES", "LOG_RETENTION_DAYS",
        ),
        whole(1),
    ),
    "WAIT_FOR_CAPACITY_MS": whole(0),
    "HEDGE_PERCENT": whole(0, 100),
    "CACHE_MB": whole(0, CACHE_MB_MAX),
    "RESCUE": on_or_off,
    "TOOL_CALLS": one_of("whole", "stream"),
    "CONTENT_FILTER": one_of("propagate", "failover"),
    "LOG_LEVEL": one_of("debug", "info", "warning", "error"),
    "GATEWAY_STATE": address("redis", "rediss"),
    "GATEWAY_LOG": address("postgresql", "postgres"),
    "GATEWAY_WORKERS": whole(1, WORKERS_MAX),
    "GATEWAY_PRIVACY": one_of("no-train"),
    "GATEWAY_ORIGINS": web_origins,
}  # fmt: skip


def load_settings(argv: Sequence[str], environ: Mapping[str, str], cwd: Path) -> Settings:
    """Flags over environment over `.env`. Raises SettingsError."""
    flags = parse_flags(argv)
    given = {**read_dotenv(cwd / ".env"), **environ}
    given.update({f"GATEWAY_{name.upper()}": value for name, value in flags.items() if value is not None})
    given = {name: value.strip() for name, value in given.items() if value.strip()}
    read = {name: reader(name, given[name]) for name, reader in READERS.items() if name in given}
    values = {name.removeprefix("GATEWAY_").lower(): value for name, value in read.items()}
    values["db"] = cwd / values.get("db", Settings().db)
    if "catalog" in values:
        values["catalog"] = cwd / values["catalog"]
    if values.get("workers", 1) > 1 and "state" not in values:
        raise SettingsError(
            f"GATEWAY_WORKERS={values['workers']}: several workers need GATEWAY_STATE, a Redis through which they share"
        )
    return Settings(**values, environ=given)


def parse_flags(argv: Sequence[str]) -> dict[str, str | None]:
    about = "One endpoint over many LLM providers."
    parser = argparse.ArgumentParser(prog="gateway.py", description=about, epilog=EPILOG)
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", help="port to listen on (default 8000; 0 picks a free one)")
    parser.add_argument("--db", help="SQLite file (default gateway.db)")
    parser.add_argument("--catalog", help="JSON file merged over the built-in catalogue")
    return dict(vars(parser.parse_args(argv)))


def read_dotenv(path: Path) -> dict[str, str]:
    """The values of a `.env` file. python-dotenv's parser alone, because its loader skips malformed lines."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = list(parse_stream(file))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f".env cannot be read: {error}") from None
    for line in lines:
        if line.error or (line.key is not None and line.value is None):
            raise SettingsError(f".env line {line.original.line}: expected NAME=value")
    return {line.key: line.value or "" for line in lines if line.key is not None}


def check_binding(host: str, keys: Sequence[str]) -> None:
    """Where others can reach the port, short keys are refused (SPEC 13.1)."""
    if host not in LOOPBACK_HOSTS and any(len(key) < KEY_CHARS_MIN for key in keys):
        raise SettingsError(
            f"GATEWAY_HOST={host!r}: listening beyond loopback needs GATEWAY_API_KEY and GATEWAY_ADMIN_KEY "
            f"of at least {KEY_CHARS_MIN} characters"
        )
