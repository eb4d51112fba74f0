"""What the operator says: settings from flags, environment and `.env`, and the catalogue files.

Everything is read once, at start, into frozen objects. What is malformed stops the start with one line that names it;
a secret's value is never in that line. Reads files and nothing else.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from catalog import Model, Platform
from outgoing import QUIRKS
from protection import LEVELS, Level
from wire import MODES

BUILT_IN_CATALOG = Path(__file__).with_name("catalog.json")
ADAPTERS = ("openai", "google", "demo")
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
    max_fallback_attempts: int = 10
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
    "LOG_RETENTION_DAYS",
)  # fmt: skip
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


@dataclass(frozen=True, slots=True)
class GivenKey:
    """A credential the operator handed over. `env` names the variable it came from, if one did."""

    platform: str
    secret: str = field(repr=False)
    label: str
    env: str | None = None


@dataclass(frozen=True, slots=True)
class CatalogFiles:
    """The built-in catalogue with the operator's file and environment merged over it. Models have no id yet."""

    platforms: dict[str, Platform]
    models: list[Model]
    keys: list[GivenKey]
    warnings: list[str]


JSON_TYPES = {list: "a list of texts", bool: "true or false", dict: "an object", int: "a whole number", str: "text"}
NUMBER, TEXT, FLAG, TEXTS, OBJECT, COUNT = "a number", "text", "true or false", "a list of texts", "an object", (
    "a whole number ≥ 1 or null"
)  # fmt: skip
PLATFORM_FIELDS = {
    "id": TEXT, "name": TEXT, "adapter": TEXT, "base_url": TEXT, "env": TEXTS, "protection": TEXT, "keyless": FLAG,
    "quirks": OBJECT, "signup_url": TEXT, "key_format": TEXT, "discover": FLAG, "opt_in": FLAG,
}  # fmt: skip
MODEL_FIELDS = {
    "platform": TEXT, "model_id": TEXT, "name": TEXT, "family": TEXT, "intelligence_rank": NUMBER,
    "speed_rank": NUMBER, "context_window": COUNT, "max_output": COUNT, "rpm": COUNT, "rpd": COUNT, "tpm": COUNT,
    "tpd": COUNT, "tools": FLAG, "vision": FLAG, "exclude_from": TEXTS, "prefer_in": TEXTS, "quirks": OBJECT,
}  # fmt: skip
KEY_FIELDS = {"platform": TEXT, "key": TEXT, "label": TEXT}


@dataclass(frozen=True, slots=True)
class Listed:
    """What one catalogue file says, entry by entry."""

    platforms: list[dict[str, Any]]
    models: list[dict[str, Any]]
    keys: list[dict[str, Any]]
    warnings: list[str]


def load_catalog(settings: Settings) -> CatalogFiles:
    """Read and check the catalogue files. Raises SettingsError naming file and entry."""
    own = listed(settings.catalog) if settings.catalog is not None else Listed([], [], [], [])
    warnings = [*built_in().warnings, *own.warnings]
    platforms: dict[str, dict[str, Any]] = {}
    models: dict[tuple[str, str], dict[str, Any]] = {}
    keys: list[GivenKey] = []
    for file in (built_in(), own):
        for entry in file.platforms:
            platforms.setdefault(entry["id"], {}).update(entry)
        for entry in file.models:
            models.setdefault((entry["platform"], entry["model_id"]), {}).update(entry)
        for entry in file.keys:
            if entry["platform"] not in platforms:
                raise SettingsError(f"{settings.catalog}: a key names the unknown platform {entry['platform']!r}")
            secret = provider_key(f"{settings.catalog}: the key for {entry['platform']}", entry["key"])
            keys.append(GivenKey(entry["platform"], secret, entry.get("label", "")))
    named = {entry["id"] for entry in own.platforms} | {entry["platform"] for entry in (*own.models, *own.keys)}
    asked_for = {id for id, fields in platforms.items() if not fields.get("opt_in") or id in named}
    asked_for |= {id for id in platforms if base_url_variable(id) in settings.environ}
    made = {id: make_platform(platforms[id], settings.environ, warnings) for id in platforms if id in asked_for}
    for platform in made.values():
        keys += keys_from_environment(platform, settings.environ)
    return CatalogFiles(made, [make_model(fields, made, warnings) for fields in models.values()], keys, warnings)


@lru_cache(maxsize=1)
def built_in() -> Listed:
    return listed(BUILT_IN_CATALOG)


def listed(path: Path) -> Listed:
    content = read_catalog(path)
    warnings: list[str] = []
    return Listed(
        entries(content, "platforms", PLATFORM_FIELDS, ("id",), path, warnings),
        entries(content, "models", MODEL_FIELDS, ("platform", "model_id"), path, warnings),
        entries(content, "keys", KEY_FIELDS, ("platform", "key"), path, warnings),
        warnings,
    )


def read_catalog(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise SettingsError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected an object with platforms, models and keys")
    return content


def entries(
    content: dict[str, Any],
    section: str,
    fields: Mapping[str, str],
    required: Sequence[str],
    path: Path,
    warnings: list[str],
) -> list[dict[str, Any]]:
    """One section of a catalogue file, each entry's fields of the right type."""
    listed = content.get(section, [])
    if not isinstance(listed, list):
        raise SettingsError(f"{path}: {section}: expected a list")
    checked = []
    for index, entry in enumerate(listed):
        place = f"{path}: {section}[{index}]"
        if not isinstance(entry, dict):
            raise SettingsError(f"{place}: expected an object")
        for name in required:
            if not entry.get(name):
                raise SettingsError(f"{place}: {name} is missing")
        place = f"{path}: {section[:-1]} {'/'.join(str(entry[name]) for name in required if name != 'key')}"
        for name, value in entry.items():
            if name in fields and not has_type(value, fields[name]):
                raise SettingsError(f"{place}: {name}: expected {fields[name]}")
        if unknown := sorted(entry.keys() - fields.keys()):
            warnings.append(f"{place}: ignored unknown {', '.join(unknown)}")
        checked.append({name: value for name, value in entry.items() if name in fields})
    return checked


def has_type(value: object, expected: str) -> bool:
    if expected == TEXT:
        return isinstance(value, str)
    if expected == FLAG:
        return isinstance(value, bool)
    if expected == TEXTS:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if expected == OBJECT:
        return isinstance(value, dict)
    if expected == COUNT:
        return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)
    return isinstance(value, int | float) and not isinstance(value, bool)


def make_platform(fields: dict[str, Any], environ: Mapping[str, str], warnings: list[str]) -> Platform:
    id = fields["id"]
    for name in ("adapter", "base_url"):
        if not fields.get(name):
            raise SettingsError(f"platform {id}: {name} is missing")
    if fields["adapter"] not in ADAPTERS:
        raise SettingsError(f"platform {id}: adapter: expected one of {', '.join(ADAPTERS)}")
    protection = fields.get("protection", Level.MODEL_SKIP)
    if protection not in LEVELS:
        raise SettingsError(f"platform {id}: protection: expected one of {', '.join(Level)}")
    variable = base_url_variable(id)
    base_url = environ.get(variable, fields["base_url"]).rstrip("/")
    if fields["adapter"] != "demo" and not re.fullmatch(r"https?://[^\s/]+[^\s]*", base_url):
        source = variable if variable in environ else f"platform {id}: base_url"
        raise SettingsError(f"{source}={base_url!r}: expected an address that begins with http:// or https://")
    return Platform(
        id=id,
        name=fields.get("name", id),
        adapter=fields["adapter"],
        base_url=base_url,
        env=tuple(fields.get("env", ())),
        keyless=fields.get("keyless", False),
        protection=Level(protection),
        signup_url=fields.get("signup_url"),
        key_format=fields.get("key_format"),
        discover=fields.get("discover", False),
        quirks=checked_quirks(fields.get("quirks", {}), f"platform {id}", warnings),
    )


def base_url_variable(id: str) -> str:
    return re.sub(r"[^A-Z0-9]", "_", id.upper()) + "_BASE_URL"


def checked_quirks(quirks: Mapping[str, Any], place: str, warnings: list[str]) -> dict[str, Any]:
    """Quirks that we know, each of its type."""
    if unknown := sorted(quirks.keys() - QUIRKS.keys()):
        warnings.append(f"{place}: ignored unknown quirks {', '.join(unknown)}")
    known = {name: value for name, value in quirks.items() if name in QUIRKS}
    for name, value in known.items():
        if type(value) is not QUIRKS[name] or (isinstance(value, list) and not has_type(value, TEXTS)):
            raise SettingsError(f"{place}: quirks: {name}: expected {JSON_TYPES[QUIRKS[name]]}")
    return known


def make_model(fields: dict[str, Any], platforms: Mapping[str, Platform], warnings: list[str]) -> Model:
    label = f"model {fields['platform']}/{fields['model_id']}"
    if fields["platform"] not in platforms:
        raise SettingsError(f"{label}: unknown platform")
    for name in ("exclude_from", "prefer_in"):
        if wrong := [mode for mode in fields.get(name, ()) if mode not in MODES]:
            raise SettingsError(f"{label}: {name}: {wrong[0]!r} is no mode; expected {', '.join(sorted(MODES))}")
    platform = platforms[fields["platform"]]
    return Model(
        id=0,
        platform=platform,
        model_id=fields["model_id"],
        name=fields.get("name", fields["model_id"]),
        intelligence_rank=fields.get("intelligence_rank", 50),
        speed_rank=fields.get("speed_rank", 50),
        context_window=fields.get("context_window") or 32_768,
        max_output=fields.get("max_output"),
        rpm=fields.get("rpm"),
        rpd=fields.get("rpd"),
        tpm=fields.get("tpm"),
        tpd=fields.get("tpd"),
        tools=fields.get("tools", True),
        vision=fields.get("vision", False),
        exclude_from=frozenset(fields.get("exclude_from", ())),
        prefer_in=frozenset(fields.get("prefer_in", ())),
        enabled=True,
        priority=0,
        in_chain=True,
        quirks={**platform.quirks, **checked_quirks(fields.get("quirks", {}), label, warnings)},
        discovered=fields.get("discovered", False),
    )


def keys_from_environment(platform: Platform, environ: Mapping[str, str]) -> list[GivenKey]:
    """The platform's keys, several in one variable separated by commas."""
    found = []
    accounts = [environ[name] for name in platform.quirks.get("env_account", ()) if name in environ]
    for name in platform.env:
        for secret in filter(None, (part.strip() for part in environ.get(name, "").split(","))):
            two_parts = "{" in platform.base_url and ":" not in secret and accounts
            key = provider_key(name, f"{accounts[0]}:{secret}" if two_parts else secret)
            found.append(GivenKey(platform.id, key, f"env:{name}", name))
    return found


def provider_key(where: str, text: str) -> str:
    """A credential as pasted: quotes, "Bearer " and white space around it are taken off. Never quoted back."""
    key = text.strip().strip("\"'").removeprefix("Bearer ").strip()
    if not key or not all(33 <= ord(char) <= 126 for char in key):
        raise SettingsError(f"{where}: expected printable ASCII without spaces (the value is not shown)")
    return key


def check_binding(host: str, keys: Sequence[str]) -> None:
    """Where others can reach the port, short keys are refused (SPEC 13.1)."""
    if host not in LOOPBACK_HOSTS and any(len(key) < KEY_CHARS_MIN for key in keys):
        raise SettingsError(
            f"GATEWAY_HOST={host!r}: listening beyond loopback needs GATEWAY_API_KEY and GATEWAY_ADMIN_KEY "
            f"of at least {KEY_CHARS_MIN} characters"
        )
