"""What the operator says: settings from flags, environment and `.env`, and the catalogue files.

Everything is read once, at start, into frozen objects. What is malformed stops the start with one line that names it;
a secret's value is never in that line. Reads files and nothing else.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
KEY_CHARS_MIN = 16  # of a client key, wherever others can reach the port (SPEC 13.1)


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
    wait_for_capacity_ms: int = 20_000
    first_heartbeat_ms: int = 30_000
    request_budget_ms: int = 300_000
    analytics_window_days: int = 7
    stats_refresh_ms: int = 60_000
    max_body_bytes: int = 32 * 1024 * 1024
    content_filter: str = "propagate"
    log_retention_days: int = 90
    log_level: str = "info"
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)  # for the names the catalogue gives


WHOLE = (
    "TRANSIENT_COOLDOWN_MS", "THREAD_COOLDOWN_MS", "STICKY_TTL_MS", "RATE_LIMIT_COOLDOWN_MS", "KEEPALIVE_INTERVAL_MS",
    "MAX_STREAM_STALL_MS", "FIRST_TOKEN_TIMEOUT_MS", "CONNECT_TIMEOUT_MS", "REQUEST_TIMEOUT_MS",
    "MAX_FALLBACK_ATTEMPTS", "REQUEST_BUDGET_MS", "ANALYTICS_WINDOW_DAYS", "STATS_REFRESH_MS", "MAX_BODY_BYTES",
    "LOG_RETENTION_DAYS", "FIRST_HEARTBEAT_MS",
)  # fmt: skip
WHOLE_OR_NONE = ("WAIT_FOR_CAPACITY_MS",)  # 0 switches it off
CHOICES = {"CONTENT_FILTER": ("propagate", "failover"), "LOG_LEVEL": ("debug", "info", "warning", "error")}
DIGITS_MAX = 18  # int() refuses thousands of them by itself, with a traceback
QUOTED_CHARS_MAX = 100  # of a malformed value in the one line that the operator gets
WHOLE_MAX = 10**12  # 31 years in milliseconds: above it a clock would overflow, and it is a typing error anyway


def load_settings(argv: Sequence[str], environ: Mapping[str, str], cwd: Path) -> Settings:
    """Flags over environment over `.env`. Raises SettingsError."""
    flags = parse_flags(argv)
    given = {**read_dotenv(cwd / ".env"), **environ}
    given.update({f"GATEWAY_{name.upper()}": value for name, value in flags.items() if value is not None})
    given = {name: value.strip() for name, value in given.items() if value.strip()}
    values: dict[str, Any] = {"environ": given}
    for name in WHOLE:
        if name in given:
            values[name.lower()] = whole(name, given[name], 1, WHOLE_MAX)
    for name in WHOLE_OR_NONE:
        if name in given:
            values[name.lower()] = whole(name, given[name], 0, WHOLE_MAX)
    for name, accepted in CHOICES.items():
        if name in given:
            values[name.lower()] = choice(name, given[name], accepted)
    if "GATEWAY_PORT" in given:
        values["port"] = whole("GATEWAY_PORT", given["GATEWAY_PORT"], 0, 65_535)
    for name in ("GATEWAY_HOST", "GATEWAY_API_KEY", "GATEWAY_ADMIN_KEY"):
        if name in given:
            values[name.removeprefix("GATEWAY_").lower()] = printable(name, given[name])
    for name in ("GATEWAY_DB", "GATEWAY_CATALOG"):
        if name in given:
            values[name.removeprefix("GATEWAY_").lower()] = cwd / given[name]
    if "THREAD_PROTECTION_PLATFORMS" in given:
        values["thread_protection_platforms"] = given["THREAD_PROTECTION_PLATFORMS"]
    if "ENCRYPTION_KEY" in given:
        values["encryption_key"] = hex_key("ENCRYPTION_KEY", given["ENCRYPTION_KEY"])
    values.setdefault("db", cwd / "gateway.db")
    return Settings(**values)


def parse_flags(argv: Sequence[str]) -> dict[str, str | None]:
    parser = argparse.ArgumentParser(prog="gateway.py", description="One endpoint over many LLM providers.")
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", help="port to listen on (default 8000; 0 picks a free one)")
    parser.add_argument("--db", help="SQLite file (default gateway.db)")
    parser.add_argument("--catalog", help="JSON file merged over the built-in catalogue")
    return dict(vars(parser.parse_args(argv)))


DOTENV_LINE = re.compile(r"^(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)$")


def read_dotenv(path: Path) -> dict[str, str]:
    """NAME=value lines; `#` begins a comment, quotes are taken off."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f".env cannot be read: {error}") from None
    values = {}
    for line_number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        found = DOTENV_LINE.match(line)
        if not found:
            raise SettingsError(f".env line {line_number}: expected NAME=value")
        name, value = found.groups()
        if value[:1] in ("'", '"') and value.find(value[0], 1) > 0:
            value = value[1 : value.index(value[0], 1)]
        else:
            value = re.split(r"\s+#", value, maxsplit=1)[0].strip()
        values[name] = value
    return values


def spelled(text: str) -> int | None:
    """The whole number that these digits spell; None for anything else, and for more digits than SQLite can hold."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= DIGITS_MAX else None


def whole(name: str, text: str, low: int, high: int) -> int:
    number = spelled(text)
    if number is None or not low <= number <= high:
        raise SettingsError(f"{name}={text[:QUOTED_CHARS_MAX]!r}: expected a whole number from {low} to {high}")
    return number


def choice(name: str, text: str, accepted: Sequence[str]) -> str:
    if text.lower() not in accepted:
        raise SettingsError(f"{name}={text!r}: expected one of {', '.join(accepted)}")
    return text.lower()


def printable(name: str, text: str) -> str:
    """A value that fits into one HTTP header or one address. A key is not quoted back."""
    if not all(33 <= ord(char) <= 126 for char in text):
        given = f"{name}={text!r}" if name == "GATEWAY_HOST" else name
        raise SettingsError(f"{given}: expected printable ASCII without spaces")
    return text


def hex_key(name: str, text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise SettingsError(f"{name}: expected 64 hex digits (the value is not shown)")
    return bytes.fromhex(text)


def check_binding(host: str, keys: Sequence[str]) -> None:
    """Where others can reach the port, short keys are refused (SPEC 13.1)."""
    if host not in LOOPBACK_HOSTS and any(len(key) < KEY_CHARS_MIN for key in keys):
        raise SettingsError(
            f"GATEWAY_HOST={host!r}: listening beyond loopback needs GATEWAY_API_KEY and GATEWAY_ADMIN_KEY "
            f"of at least {KEY_CHARS_MIN} characters"
        )
