"""The `models` and `fallback_config` tables, synced from the catalogue; and the snapshot that routing works from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from records.clients import load_clients
from records.connection import Connection
from records.vault import Vault
from routing.catalog import Catalog, Key, KeyStatus, Model, Platform, by_rank
from routing.clients import Client


def sync_models(db: Connection, models: Sequence[Model]) -> None:
    """Bring the tables to the catalogue's facts; what the user changed stays, what has gone is disabled (SPEC 2.1)."""
    known = {(row[1], row[2]): row[0] for row in db.execute("SELECT id, platform, model_id FROM models")}
    last = db.execute("SELECT COALESCE(MAX(priority), 0) FROM fallback_config").fetchone()[0]
    for model in by_rank(models):
        facts = (
            model.name, model.intelligence_rank, model.speed_rank, model.context_window, model.rpm, model.rpd,
            model.tpm, model.tpd, model.tools, model.vision, model.kind,
        )  # fmt: skip
        id = known.pop((model.platform.id, model.model_id), None)
        if id is not None:
            db.execute(
                "UPDATE models SET display_name = ?, intelligence_rank = ?, speed_rank = ?, context_window = ?, "
                "rpm_limit = ?, rpd_limit = ?, tpm_limit = ?, tpd_limit = ?, supports_tools = ?, supports_vision = ?, "
                "kind = ?, enabled = COALESCE(enabled_before, enabled), enabled_before = NULL WHERE id = ?",
                (*facts, id),
            )
            continue
        last += 1
        db.execute(
            "INSERT INTO models (display_name, intelligence_rank, speed_rank, context_window, rpm_limit, rpd_limit, "
            "tpm_limit, tpd_limit, supports_tools, supports_vision, kind, platform, model_id) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*facts, model.platform.id, model.model_id),
        )
        db.execute(
            "INSERT INTO fallback_config (model_db_id, priority) "
            "SELECT id, ? FROM models WHERE platform = ? AND model_id = ?",
            (last, model.platform.id, model.model_id),
        )
    for id in known.values():
        db.execute(
            "UPDATE models SET enabled_before = enabled, enabled = 0 WHERE id = ? AND enabled_before IS NULL", (id,)
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The catalogue in force, the status of every enabled key, and the client keys."""

    catalog: Catalog
    key_status: dict[int, KeyStatus]
    clients: list[Client]


def load_snapshot(
    db: Connection,
    vault: Vault,
    platforms: Mapping[str, Platform],
    models: Sequence[Model],
    aliases: Mapping[str, str],
) -> Snapshot:
    """Facts from the catalogue files; ids, switches, order and keys from the database.

    What another gateway with another catalogue (a newer one, say) has marked as gone is not gone here.
    """
    state = {
        (platform, model_id): (id, bool(enabled), priority, bool(in_chain))
        for id, platform, model_id, enabled, priority, in_chain in db.execute(
            "SELECT m.id, m.platform, m.model_id, COALESCE(m.enabled_before, m.enabled), f.priority, f.enabled "
            "FROM models m JOIN fallback_config f ON f.model_db_id = m.id"
        )
    }
    placed = []
    for model in models:
        id, enabled, priority, in_chain = state[model.platform.id, model.model_id]
        placed.append(replace(model, id=id, enabled=enabled, priority=priority, in_chain=in_chain))
    keys, status = [], {}
    for id, platform, label, trains, state_name, ciphertext, iv, tag in db.execute(
        "SELECT id, platform, label, trains_on_prompts, status, encrypted_key, iv, auth_tag FROM api_keys "
        "WHERE enabled = 1 ORDER BY id"
    ):
        if platform in platforms:
            trains_on_prompts = None if trains is None else bool(trains)
            keys.append(Key(id, platform, vault.decrypt(ciphertext, iv, tag), label, trains_on_prompts))
            status[id] = KeyStatus(state_name)
    return Snapshot(Catalog(platforms.values(), placed, keys, aliases), status, load_clients(db))
