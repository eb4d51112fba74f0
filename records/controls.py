"""What the operator changes in the database: keys, models and the fallback chain.

Each function is one transaction's work, for `Control.apply` or `Store.read`; it returns None where the id is unknown.
Secrets go in and never come out: a key leaves here masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from records.connection import Connection
from records.keys import add_key
from records.vault import Vault, mask
from routing.catalog import KeyStatus

KEY_COLUMNS = ("id", "platform", "label", "status", "enabled", "last_error", "created_at", "trains_on_prompts")
MODEL_COLUMNS = (
    "id", "platform", "model_id", "display_name", "intelligence_rank", "speed_rank", "context_window", "rpm_limit",
    "rpd_limit", "tpm_limit", "tpd_limit", "supports_tools", "supports_vision", "enabled", "kind",
)  # fmt: skip
CHANGEABLE = {"label", "enabled", "trains_on_prompts"}  # columns of `api_keys`
FLAGS = ("enabled", "supports_tools", "supports_vision")


def list_keys(db: Connection, vault: Vault, id: int | None = None) -> list[dict[str, Any]]:
    """Every key, or the one with this id, as it may be shown."""
    entries = []
    for *shown, ciphertext, iv, tag in db.execute(
        f"SELECT {', '.join(KEY_COLUMNS)}, encrypted_key, iv, auth_tag FROM api_keys "
        "WHERE id = COALESCE(:id, id) ORDER BY id",
        {"id": id},
    ):
        entry = dict(zip(KEY_COLUMNS, shown, strict=True))
        entry["enabled"] = bool(entry["enabled"])
        if entry["trains_on_prompts"] is not None:
            entry["trains_on_prompts"] = bool(entry["trains_on_prompts"])
        entries.append(entry | {"masked": mask(vault.decrypt(ciphertext, iv, tag))})
    return entries


def show_key(db: Connection, vault: Vault, id: int) -> dict[str, Any] | None:
    return next(iter(list_keys(db, vault, id)), None)


def read_secret(db: Connection, vault: Vault, id: int) -> tuple[str, str] | None:
    """A key's platform and the key itself, for a call to its provider."""
    row = db.execute("SELECT platform, encrypted_key, iv, auth_tag FROM api_keys WHERE id = ?", (id,)).fetchone()
    return (row[0], vault.decrypt(*row[1:])) if row else None


def put_key(db: Connection, vault: Vault, platform: str, secret: str, changes: Mapping[str, Any]) -> tuple[int, bool]:
    """Store a key; gives its id, and whether it is new.

    Giving a known key again is a wish to use it: its row is switched on, and tried again if it was invalid. One whose
    variable has gone loses the variable's label too, or the next start would switch it off again.
    """
    known = {id for (id,) in db.execute("SELECT id FROM api_keys WHERE platform = ?", (platform,))}
    id = add_key(db, vault, platform, secret, "")
    if id in known:
        db.execute(
            "UPDATE api_keys SET enabled = 1, gone = 0, label = CASE gone WHEN 1 THEN '' ELSE label END, "
            "status = CASE status WHEN 'invalid' THEN 'unknown' ELSE status END, "
            "last_error = CASE status WHEN 'invalid' THEN NULL ELSE last_error END WHERE id = ?",
            (id,),
        )
    set_columns(db, id, changes)
    return id, id not in known


def change_key(db: Connection, id: int, changes: Mapping[str, Any], *, reset: bool) -> None:
    """Change these columns; `reset` makes the key's status unknown, so that it is tried again."""
    set_columns(db, id, changes)
    if reset:
        set_status(db, id, KeyStatus.UNKNOWN, None)


def set_columns(db: Connection, id: int, changes: Mapping[str, Any]) -> None:
    for name in CHANGEABLE & changes.keys():
        db.execute(f"UPDATE api_keys SET {name} = ? WHERE id = ?", (changes[name], id))
    if "enabled" in changes:
        db.execute("UPDATE api_keys SET gone = 0 WHERE id = ?", (id,))


def set_status(db: Connection, id: int, status: KeyStatus | None, last_error: str | None) -> None:
    """Note what a check has found; a status of None says nothing of the key."""
    db.execute(
        "UPDATE api_keys SET status = COALESCE(?, status), last_error = ? WHERE id = ?", (status, last_error, id)
    )


def forget_status(db: Connection, id: int) -> None:
    """An invalid key is to be tried again; what was wrong with it can still be read."""
    db.execute("UPDATE api_keys SET status = 'unknown' WHERE id = ? AND status = 'invalid'", (id,))


def delete_key(db: Connection, id: int) -> bool:
    return db.execute("DELETE FROM api_keys WHERE id = ?", (id,)).rowcount > 0


def count_keys(db: Connection) -> dict[str, int]:
    """How many keys each platform has, those switched off too."""
    return dict(db.execute("SELECT platform, COUNT(*) FROM api_keys GROUP BY platform").fetchall())


def list_models(db: Connection, id: int | None = None) -> list[dict[str, Any]]:
    """Rows of `models`, those gone from the catalogue too."""
    entries = []
    for row in db.execute(
        f"SELECT {', '.join(MODEL_COLUMNS)} FROM models WHERE id = COALESCE(:id, id) ORDER BY id", {"id": id}
    ):
        entry = dict(zip(MODEL_COLUMNS, row, strict=True))
        entries.append(entry | {name: bool(entry[name]) for name in FLAGS})
    return entries


def set_model_enabled(db: Connection, id: int, enabled: bool) -> dict[str, Any]:
    db.execute("UPDATE models SET enabled = ?, enabled_before = NULL WHERE id = ?", (enabled, id))
    return list_models(db, id)[0]


@dataclass(frozen=True, slots=True)
class Link:
    """One change to the chain; None leaves as it was."""

    model_db_id: int
    priority: int | None
    enabled: bool | None


def change_chain(db: Connection, links: Sequence[Link]) -> None:
    """Apply all changes. Where two models of a kind would share a priority, the one given now comes first, the other
    moves on."""
    query = "SELECT model_db_id, priority, f.enabled, kind FROM fallback_config f JOIN models m ON m.id = model_db_id"
    rows = db.execute(query).fetchall()
    old: Mapping[int, tuple[int, int]] = {id: (priority, enabled) for id, priority, enabled, _ in rows}
    kinds = {id: kind for id, _, _, kind in rows}
    wanted = dict(old)
    given: dict[int, int] = {}  # model: its place among those given a priority
    for link in links:
        priority, enabled = wanted[link.model_db_id]
        if link.priority is not None:
            priority = link.priority
            given[link.model_db_id] = len(given)
        wanted[link.model_db_id] = (priority, enabled if link.enabled is None else int(link.enabled))
    order = sorted(wanted, key=lambda id: (wanted[id][0], given.get(id, len(given)), old[id][0], id))
    last = dict.fromkeys(kinds.values(), -1)
    for id in order:
        place = last[kinds[id]] = max(last[kinds[id]] + 1, wanted[id][0]) if given else wanted[id][0]
        if (place, wanted[id][1]) != tuple(old[id]):
            db.execute(
                "UPDATE fallback_config SET priority = ?, enabled = ? WHERE model_db_id = ?", (place, wanted[id][1], id)
            )
