"""The catalogue files: `catalog.json` with the operator's own file merged over it, checked field by field.

What is malformed stops the start with one line that names the entry; a secret's value is never in that line.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import orjson

from config.settings import Settings, SettingsError
from config.shapes import COUNT, FLAG, NUMBER, OBJECT, TEXT, TEXTS, WHOLE, Shape, one_of
from routing.catalog import DEMO_ADAPTER, Level, Model, ModelKind, Platform, Prefill
from routing.day import is_known
from routing.quirk_names import QUIRKS
from wire.chat import MODES

CONTEXT_WINDOW = 32_768  # tokens, of a model whose entry does not say


@dataclass(frozen=True, slots=True)
class GivenKey:
    """A credential the operator handed over. `env` names the variable it came from, if one did."""

    platform: str
    secret: str = field(repr=False)
    label: str
    env: str | None = None
    trains_on_prompts: bool | None = None


@dataclass(frozen=True, slots=True)
class CatalogFiles:
    """The built-in catalogue with the operator's file and environment merged over it. Models have no id yet."""

    platforms: Mapping[str, Platform]
    models: tuple[Model, ...]
    keys: tuple[GivenKey, ...]
    aliases: Mapping[str, str]
    warnings: tuple[str, ...]


RANK = NUMBER.or_null()
PREFILL = one_of(*Prefill)
SHAPES_OF_QUIRKS = {list: TEXTS, bool: FLAG, dict: OBJECT, int: WHOLE, str: TEXT}
PLATFORM_FIELDS: Mapping[str, Shape] = {
    "id": TEXT, "name": TEXT, "adapter": TEXT, "base_url": TEXT, "env": TEXTS, "protection": one_of(*Level),
    "keyless": FLAG, "quirks": OBJECT, "signup_url": TEXT, "key_format": TEXT, "discover": FLAG, "opt_in": FLAG,
    "local": FLAG, "prefill": PREFILL, "completions": FLAG, "trains_on_prompts": FLAG.or_null(),
    "terms_url": TEXT.or_null(), "terms_checked": TEXT.or_null(), "check_path": TEXT.or_null(), "daily_reset": TEXT,
}  # fmt: skip
MODEL_FIELDS: Mapping[str, Shape] = {
    "platform": TEXT, "model_id": TEXT, "name": TEXT, "kind": one_of(*ModelKind), "family": TEXT, "dimensions": COUNT,
    "intelligence_rank": RANK, "speed_rank": RANK, "context_window": COUNT, "max_output": COUNT, "rpm": COUNT,
    "rpd": COUNT, "tpm": COUNT, "tpd": COUNT, "tools": FLAG, "vision": FLAG, "exclude_from": TEXTS,
    "prefer_in": TEXTS, "quirks": OBJECT, "prefill": PREFILL, "completions": FLAG,
}  # fmt: skip
KEY_FIELDS: Mapping[str, Shape] = {
    "platform": TEXT, "key": TEXT, "label": TEXT, "trains_on_prompts": FLAG.or_null(),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Listed:
    """What one catalogue file says, entry by entry."""

    platforms: list[dict[str, Any]]
    models: list[dict[str, Any]]
    keys: list[dict[str, Any]]
    aliases: dict[str, str]
    warnings: list[str]


def load_catalog(settings: Settings, adapters: Collection[str]) -> CatalogFiles:
    """Read and check the catalogue files, whose platforms speak one of these adapters' formats.

    Raises SettingsError naming file and entry.
    """
    built_in = listed(settings.built_in_catalog)
    own = listed(settings.catalog) if settings.catalog is not None else Listed([], [], [], {}, [])
    warnings = [*built_in.warnings, *own.warnings]
    platforms: dict[str, dict[str, Any]] = {}
    models: dict[tuple[str, str], dict[str, Any]] = {}
    keys: list[GivenKey] = []
    for file in (built_in, own):
        for entry in file.platforms:
            platforms.setdefault(entry["id"], {}).update(entry)
        for entry in file.models:
            models.setdefault((entry["platform"], entry["model_id"]), {}).update(entry)
        for entry in file.keys:
            if entry["platform"] not in platforms:
                raise SettingsError(f"{settings.catalog}: a key names the unknown platform {entry['platform']!r}")
            secret = provider_key(f"{settings.catalog}: the key for {entry['platform']}", entry["key"])
            trains = entry.get("trains_on_prompts")
            keys.append(GivenKey(entry["platform"], secret, entry.get("label", ""), trains_on_prompts=trains))
    named = {entry["id"] for entry in own.platforms} | {entry["platform"] for entry in (*own.models, *own.keys)}
    asked_for = {id for id, fields in platforms.items() if not fields.get("opt_in") or id in named}
    asked_for |= {id for id in platforms if base_url_variable(id) in settings.environ}
    made = {
        id: make_platform(platforms[id], settings.environ, adapters, warnings) for id in platforms if id in asked_for
    }
    for platform in made.values():
        keys += keys_from_environment(platform, settings.environ)
    placed = tuple(make_model(fields, made, warnings) for fields in models.values())
    return CatalogFiles(made, placed, tuple(keys), {**built_in.aliases, **own.aliases}, tuple(warnings))


def listed(path: Path) -> Listed:
    content = read_catalog(path)
    warnings: list[str] = []
    aliases = content.get("aliases", {})
    if not isinstance(aliases, dict) or not all(isinstance(name, str) and name for name in aliases.values()):
        raise SettingsError(f"{path}: aliases: expected an object of names, each with a mode or a model")
    return Listed(
        entries(content, "platforms", PLATFORM_FIELDS, ("id",), path, warnings),
        entries(content, "models", MODEL_FIELDS, ("platform", "model_id"), path, warnings),
        entries(content, "keys", KEY_FIELDS, ("platform", "key"), path, warnings),
        aliases,
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
        raise SettingsError(f"{path}: expected an object with platforms, models, keys and aliases")
    return content


def entries(
    content: dict[str, Any],
    section: str,
    fields: Mapping[str, Shape],
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
            if name in fields and not fields[name].fits(value):
                raise SettingsError(f"{place}: {name}: expected {fields[name].words}")
        if unknown := sorted(entry.keys() - fields.keys()):
            warnings.append(f"{place}: ignored unknown {', '.join(unknown)}")
        checked.append({name: value for name, value in entry.items() if name in fields})
    return checked


def make_platform(
    fields: dict[str, Any], environ: Mapping[str, str], adapters: Collection[str], warnings: list[str]
) -> Platform:
    """A platform from the fields of all files, whose types are right."""
    id = fields["id"]
    for name in ("adapter", "base_url"):
        if not fields.get(name):
            raise SettingsError(f"platform {id}: {name} is missing")
    if fields["adapter"] not in adapters:
        raise SettingsError(f"platform {id}: adapter: expected one of {', '.join(adapters)}")
    if not is_known(fields.get("daily_reset", "UTC")):
        warnings.append(
            f"platform {id}: daily_reset: {fields['daily_reset']!r} is not known here; its days end as in UTC"
        )
    if not is_date(fields.get("terms_checked")):
        raise SettingsError(f"platform {id}: terms_checked: expected a date like 2026-11-23")
    variable = base_url_variable(id)
    base_url = environ.get(variable, fields["base_url"]).rstrip("/")
    if fields["adapter"] != DEMO_ADAPTER and not re.fullmatch(r"https?://[^\s/]+[^\s]*", base_url):
        source = variable if variable in environ else f"platform {id}: base_url"
        raise SettingsError(f"{source}={base_url!r}: expected an address that begins with http:// or https://")
    given = {name: value for name, value in fields.items() if value is not None and name != "opt_in"}
    made = {
        "name": id,
        **given,
        "base_url": base_url,
        "env": tuple(fields.get("env", ())),
        "protection": Level(fields.get("protection", Level.MODEL_SKIP)),
        "prefill": Prefill(fields.get("prefill", Prefill.NONE)),
        "quirks": checked_quirks(fields.get("quirks", {}), f"platform {id}", warnings),
    }
    return Platform(**made)


def is_date(text: str | None) -> bool:
    try:
        return text is None or bool(date.fromisoformat(text))
    except ValueError:
        return False


def base_url_variable(id: str) -> str:
    return re.sub(r"[^A-Z0-9]", "_", id.upper()) + "_BASE_URL"


def checked_quirks(quirks: Mapping[str, Any], place: str, warnings: list[str]) -> dict[str, Any]:
    """Quirks that we know, each of its type."""
    if not quirks:
        return {}
    if unknown := sorted(quirks.keys() - QUIRKS.keys()):
        warnings.append(f"{place}: ignored unknown quirks {', '.join(unknown)}")
    known = {name: value for name, value in quirks.items() if name in QUIRKS}
    for name, value in known.items():
        shape = SHAPES_OF_QUIRKS[QUIRKS[name]]
        if not shape.fits(value):
            raise SettingsError(f"{place}: quirks: {name}: expected {shape.words}")
    return known


def make_model(fields: dict[str, Any], platforms: Mapping[str, Platform], warnings: list[str]) -> Model:
    """A model from the fields of all files, whose types are right."""
    label = f"model {fields['platform']}/{fields['model_id']}"
    if fields["platform"] not in platforms:
        raise SettingsError(f"{label}: unknown platform")
    for name in ("exclude_from", "prefer_in"):
        if wrong := [mode for mode in fields.get(name, ()) if mode not in MODES]:
            raise SettingsError(f"{label}: {name}: {wrong[0]!r} is no mode; expected {', '.join(sorted(MODES))}")
    platform = platforms[fields["platform"]]
    kind = ModelKind(fields.get("kind", ModelKind.CHAT))
    made = {
        **dict.fromkeys(("intelligence_rank", "speed_rank", "max_output", "rpm", "rpd", "tpm", "tpd")),
        "name": fields["model_id"],
        "tools": kind is ModelKind.CHAT,
        "vision": False,
        "completions": platform.completions,
        **fields,
        "platform": platform,
        "kind": kind,
        "family": fields.get("family") or fields["model_id"],
        "context_window": fields.get("context_window") or CONTEXT_WINDOW,
        "prefill": Prefill(fields.get("prefill", platform.prefill)),
        "exclude_from": frozenset(fields.get("exclude_from", ())),
        "prefer_in": frozenset(fields.get("prefer_in", ())),
        "quirks": {**platform.quirks, **checked_quirks(fields.get("quirks", {}), label, warnings)},
    }
    return Model(id=0, enabled=True, priority=0, in_chain=True, **made)


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
