"""The `api_keys` table: provider credentials from files and environment, and their status."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence

from records.connection import Connection
from records.rows import iso
from records.vault import Vault
from routing.catalog import WRITTEN, KeyStatus, Platform, how_written, is_templated


def client_key(db: Connection, vault: Vault) -> tuple[str, bool]:
    """The API key kept in `settings`, and whether it was made just now."""
    row = db.execute("SELECT value FROM settings WHERE key = 'api_key'").fetchone()
    if row is not None:
        return vault.unseal(row[0]), False
    key = f"fw-{secrets.token_urlsafe(32)}"
    db.execute("INSERT INTO settings VALUES ('api_key', ?)", (vault.seal(key),))
    return key, True


def add_key(db: Connection, vault: Vault, platform: str, secret: str, label: str) -> int:
    """Store a key once; the same key of the same platform is the same row. Gives its id."""
    fingerprint = vault.fingerprint(platform, secret)
    known = ("SELECT id FROM api_keys WHERE platform = ? AND fingerprint = ?", (platform, fingerprint))
    row = db.execute(*known).fetchone()
    if row is not None:
        return int(row[0])
    ciphertext, iv, tag = vault.encrypt(secret)
    db.execute(
        "INSERT INTO api_keys (platform, label, encrypted_key, iv, auth_tag, fingerprint, created_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (platform, label, ciphertext, iv, tag, fingerprint, iso(time.time())),
    )
    return int(db.execute(*known).fetchone()[0])


def sync_file_keys(db: Connection, vault: Vault, given: Sequence[tuple[str, str, str, bool | None]]) -> None:
    """Store (platform, secret, label, trains_on_prompts) once; a key that a variable gave before is the file's now.

    What the file says of training holds from this start on; what it does not say stays as the operator set it.
    """
    for platform, secret, label, trains in given:
        id = add_key(db, vault, platform, secret, label)
        db.execute("UPDATE api_keys SET trains_on_prompts = COALESCE(?, trains_on_prompts) WHERE id = ?", (trains, id))
        db.execute(
            "UPDATE api_keys SET label = ?, enabled = CASE gone WHEN 1 THEN 1 ELSE enabled END, gone = 0 "
            "WHERE id = ? AND label LIKE 'env:%'",
            (label, id),
        )


def sync_environment_keys(db: Connection, vault: Vault, given: Sequence[tuple[str, str, str]]) -> None:
    """Upsert (platform, secret, `env:NAME`); a key whose variable has gone is disabled until it comes back."""
    present = set()
    for platform, secret, label in given:
        id = add_key(db, vault, platform, secret, label)
        present.add(id)
        db.execute("UPDATE api_keys SET label = ? WHERE id = ? AND label LIKE 'env:%'", (label, id))
        db.execute("UPDATE api_keys SET enabled = 1, gone = 0 WHERE id = ? AND gone = 1", (id,))
    for (id,) in db.execute("SELECT id FROM api_keys WHERE label LIKE 'env:%'").fetchall():
        if id not in present:
            db.execute("UPDATE api_keys SET enabled = 0, gone = 1 WHERE id = ? AND enabled = 1", (id,))


def judge_keys(db: Connection, vault: Vault, platforms: Mapping[str, Platform]) -> None:
    """A key that is not written as its platform needs it is invalid, whatever else is said of it (SPEC 2.5).

    Part of every change, so it holds however a key came in. One that is right now (the platform has got another
    address, say) is tried again.
    """
    rows = db.execute("SELECT id, platform, status, last_error, encrypted_key, iv, auth_tag FROM api_keys").fetchall()
    for id, name, status, last_error, *sealed in rows:
        platform = platforms.get(name)
        if platform is None or not (is_templated(platform) or (last_error or "").startswith(WRITTEN)):
            continue
        words = how_written(platform, vault.decrypt(*sealed))
        if words is not None and (status, last_error) != (KeyStatus.INVALID, words):
            set_key_status(db, id, KeyStatus.INVALID, words)
        elif words is None and (last_error or "").startswith(WRITTEN):
            set_key_status(db, id, KeyStatus.UNKNOWN, None)


def set_key_status(db: Connection, id: int, status: KeyStatus, last_error: str | None) -> None:
    db.execute("UPDATE api_keys SET status = ?, last_error = ? WHERE id = ?", (status, last_error, id))
