"""The `clients` table: keys that the operator gives to clients. A key is kept as its hash; nobody can read it again."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson

from records.connection import Connection
from records.rows import iso
from records.vault import mask
from routing.clients import Client, Limits, hash_of

COLUMNS = (
    "id", "name", "masked", "enabled", "rpm_limit", "rpd_limit", "tpd_limit", "models", "min_rank", "privacy",
    "expires_at", "created_at",
)  # fmt: skip
LIMITS = {"rpm": "rpm_limit", "rpd": "rpd_limit", "tpd": "tpd_limit"}


def list_clients(db: Connection, id: int | None = None) -> list[dict[str, Any]]:
    """Every client, or the one with this id, in the contract's shape."""
    entries = []
    for row in db.execute(
        f"SELECT {', '.join(COLUMNS)} FROM clients WHERE id = COALESCE(:id, id) ORDER BY id", {"id": id}
    ):
        entry = dict(zip(COLUMNS, row, strict=True))
        entry["enabled"] = bool(entry["enabled"])
        entry["limits"] = {name: entry.pop(column) for name, column in LIMITS.items()}
        entry["models"] = orjson.loads(entry["models"]) if entry["models"] is not None else None
        entries.append(entry)
    return entries


def show_client(db: Connection, id: int) -> dict[str, Any] | None:
    return next(iter(list_clients(db, id)), None)


def load_clients(db: Connection) -> list[Client]:
    """All clients as routing knows them."""
    hashes: dict[int, bytes] = dict(db.execute("SELECT id, key_hash FROM clients").fetchall())
    return [
        Client(
            id=entry["id"],
            name=entry["name"],
            key_hash=hashes[entry["id"]],
            enabled=entry["enabled"],
            limits=Limits(**entry["limits"]),
            models=None if entry["models"] is None else frozenset(entry["models"]),
            min_rank=entry["min_rank"],
            private=entry["privacy"] is not None,
            expires_at=None if entry["expires_at"] is None else parse_time(entry["expires_at"]),
        )
        for entry in list_clients(db)
    ]


def add_client(db: Connection, changes: Mapping[str, Any]) -> tuple[int, str]:
    """Make a client with a new key; gives its id and the key, which is nowhere to be had again."""
    key = f"fwc-{secrets.token_urlsafe(32)}"
    key_hash = hash_of(key.encode())
    db.execute(
        "INSERT INTO clients (name, key_hash, masked, created_at) VALUES (?, ?, ?, ?)",
        (changes["name"], key_hash, mask(key), iso(time.time())),
    )
    (id,) = db.execute("SELECT id FROM clients WHERE key_hash = ?", (key_hash,)).fetchone()
    change_client(db, id, changes)
    return id, key


def change_client(db: Connection, id: int, changes: Mapping[str, Any]) -> None:
    """Change what is given; of `limits` too, one by one."""
    columns = {name: value for name, value in changes.items() if name in COLUMNS}
    if "limits" in changes:
        limits = changes["limits"] or dict.fromkeys(LIMITS)
        columns |= {LIMITS[name]: limit for name, limit in limits.items()}
    if changes.get("models") is not None:
        columns["models"] = orjson.dumps(changes["models"]).decode()
    for name, value in columns.items():
        db.execute(f"UPDATE clients SET {name} = ? WHERE id = ?", (value, id))


def delete_client(db: Connection, id: int) -> bool:
    return db.execute("DELETE FROM clients WHERE id = ?", (id,)).rowcount > 0


def client_names(db: Connection) -> dict[int, str]:
    return dict(db.execute("SELECT id, name FROM clients").fetchall())


def parse_time(text: str) -> float:
    """ISO-8601 as seconds since 1970; UTC where it names no zone. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
