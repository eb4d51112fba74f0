"""A look at a database that changes nothing, for the doctor: is it ours, whole, and ours to read?"""

from __future__ import annotations

import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from records.connection import Connection
from records.database import postgres_at
from records.migrations import SCHEMA_VERSION
from records.vault import StoreError, Vault, key_file_of, read_key_file

BUSY_S = 1.0  # a running gateway holds the file for milliseconds at a time


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A provider's key as it is kept."""

    platform: str
    label: str
    secret: str = field(repr=False)
    enabled: bool
    trains_on_prompts: bool | None = None


@dataclass(frozen=True, slots=True)
class Checkup:
    """What was found in a database."""

    version: int  # of the schema
    latest: int  # that this gateway knows
    keys: tuple[StoredKey, ...]
    client_key: str | None = field(repr=False)  # that the gateway made for itself
    open_key_file: Path | None  # a key file that others may read

    @property
    def is_older(self) -> bool:
        return self.version < self.latest


def look_into(path: Path, encryption_key: bytes | None, address: str | None = None) -> Checkup | None:
    """Into the file, or the PostgreSQL at this address. None where there is no database yet. Raises StoreError, whose
    text says what is wrong."""
    if address is not None:
        server = postgres_at(address, path, encryption_key)
        with ThreadPoolExecutor(1) as thread:  # it waits, and a loop may be running here
            found: Checkup | None = thread.submit(
                server.look, lambda db, versions: examined(db, versions, path, encryption_key)
            ).result()
        return found
    if not path.parent.is_dir():
        raise StoreError(f"{path}: the folder does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise StoreError(f"{path}: cannot be written")
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=BUSY_S)) as db:
            return examined_file(db, path, encryption_key)
    except sqlite3.Error as error:
        raise StoreError(f"{path}: cannot be used as a database: {error}") from None


def examined_file(db: sqlite3.Connection, path: Path, encryption_key: bytes | None) -> Checkup | None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise StoreError(f"{path}: made by a newer version of the gateway (schema {version})")
    if not version:
        return None
    (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise StoreError(f"{path}: damaged: {verdict}")
    trains = "trains_on_prompts" if version > 1 else "NULL"  # the first edition did not ask
    return examined(db, (version, SCHEMA_VERSION), path, encryption_key, trains)


def examined(
    db: Connection,
    versions: tuple[int, int],
    path: Path,
    encryption_key: bytes | None,
    trains_column: str = "trains_on_prompts",
) -> Checkup:
    kept = dict(db.execute("SELECT key, value FROM settings WHERE key IN ('key_check', 'api_key')").fetchall())
    key_file = key_file_of(path)
    vault = Vault(encryption_key or read_key_file(key_file, must_exist=True))
    for sealed in kept.values():
        vault.unseal(sealed)
    keys = tuple(
        StoredKey(
            platform, label, vault.decrypt(ciphertext, iv, tag), bool(enabled), None if trains is None else bool(trains)
        )
        for platform, label, enabled, ciphertext, iv, tag, trains in db.execute(
            f"SELECT platform, label, enabled, encrypted_key, iv, auth_tag, {trains_column} FROM api_keys "
            "ORDER BY platform, id"
        )
    )
    is_open = encryption_key is None and key_file.stat().st_mode & 0o077
    client_key = vault.unseal(kept["api_key"]) if "api_key" in kept else None
    return Checkup(*versions, keys, client_key, key_file if is_open else None)
