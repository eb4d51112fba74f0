"""How a file made by an earlier version reaches today's schema.sql.

The n-th script brings a file from `user_version` n to n + 1; a fresh file starts at the last. A script runs in one
transaction with foreign keys off, so that a table others refer to can be built anew. Scripts are never changed once
released.
"""

from __future__ import annotations

from collections.abc import Sequence

# The second edition. SQLite cannot make a column nullable, so `models` is built anew; columns are added at a table's
# end, which costs the same however many rows there are.
SECOND_EDITION = """
CREATE TABLE new_models (
    id                INTEGER PRIMARY KEY,
    platform          TEXT NOT NULL,
    model_id          TEXT NOT NULL,
    display_name      TEXT NOT NULL,
    intelligence_rank REAL,
    speed_rank        REAL,
    context_window    INTEGER NOT NULL,
    rpm_limit         INTEGER,
    rpd_limit         INTEGER,
    tpm_limit         INTEGER,
    tpd_limit         INTEGER,
    supports_tools    INTEGER NOT NULL,
    supports_vision   INTEGER NOT NULL,
    enabled           INTEGER NOT NULL DEFAULT 1,
    enabled_before    INTEGER,
    kind              TEXT NOT NULL DEFAULT 'chat' CHECK (kind IN ('chat', 'embedding')),
    UNIQUE (platform, model_id)
);
INSERT INTO new_models
    SELECT id, platform, model_id, display_name, intelligence_rank, speed_rank, context_window, rpm_limit, rpd_limit,
           tpm_limit, tpd_limit, supports_tools, supports_vision, enabled, enabled_before, 'chat'
    FROM models;
DROP TABLE models;
ALTER TABLE new_models RENAME TO models;

ALTER TABLE api_keys ADD COLUMN trains_on_prompts INTEGER CHECK (trains_on_prompts IN (0, 1));

ALTER TABLE requests ADD COLUMN client INTEGER;
ALTER TABLE requests ADD COLUMN cached INTEGER NOT NULL DEFAULT 0;
ALTER TABLE requests ADD COLUMN resumed_at INTEGER;
ALTER TABLE requests ADD COLUMN drill INTEGER NOT NULL DEFAULT 0;
ALTER TABLE requests ADD COLUMN waited_ms INTEGER;

CREATE TABLE clients (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    name       TEXT NOT NULL,
    key_hash   BLOB NOT NULL UNIQUE,
    masked     TEXT NOT NULL,
    enabled    INTEGER NOT NULL DEFAULT 1,
    rpm_limit  INTEGER,
    rpd_limit  INTEGER,
    tpd_limit  INTEGER,
    models     TEXT,
    min_rank   INTEGER,
    privacy    TEXT CHECK (privacy IN ('no-train')),
    expires_at TEXT,
    created_at TEXT NOT NULL
);
"""
UNCOUNTED_ATTEMPTS = """
ALTER TABLE requests ADD COLUMN uncounted INTEGER NOT NULL DEFAULT 0;
"""
MIGRATIONS: Sequence[str] = (SECOND_EDITION, UNCOUNTED_ATTEMPTS)
SCHEMA_VERSION = 1 + len(MIGRATIONS)
