-- Today's whole schema. A file made by an earlier version reaches it through records/migrations.py.
-- Timestamps are ISO-8601 UTC with milliseconds and Z: julianday() reads them, and text order is time order.

-- One row per model of the catalogue; facts come from catalog.json at every start, `enabled` belongs to the user.
-- A rank of NULL: unranked (SPEC 2.4).
CREATE TABLE models (
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
    -- NULL while the model is in the catalogue; afterwards what `enabled` was, to be restored when it comes back
    enabled_before    INTEGER,
    kind              TEXT NOT NULL DEFAULT 'chat' CHECK (kind IN ('chat', 'embedding')),
    UNIQUE (platform, model_id)
);

-- The fallback chain: the order of mode `priority`, and which models take part in any automatic choice.
CREATE TABLE fallback_config (
    model_db_id INTEGER PRIMARY KEY REFERENCES models (id) ON DELETE CASCADE,
    priority    INTEGER NOT NULL,
    enabled     INTEGER NOT NULL DEFAULT 1
);

-- Credentials, AES-256-GCM with a random 96-bit iv each. `fingerprint` is a keyed hash, to know a key again unread.
-- AUTOINCREMENT: what is remembered of a deleted key's id must never be taken for another key's.
CREATE TABLE api_keys (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    platform      TEXT NOT NULL,
    label         TEXT NOT NULL DEFAULT '',
    encrypted_key BLOB NOT NULL,
    iv            BLOB NOT NULL,
    auth_tag      BLOB NOT NULL,
    fingerprint   BLOB NOT NULL,
    status        TEXT NOT NULL DEFAULT 'unknown' CHECK (status IN ('unknown', 'healthy', 'rate_limited', 'invalid')),
    enabled       INTEGER NOT NULL DEFAULT 1,
    gone          INTEGER NOT NULL DEFAULT 0,  -- disabled because its environment variable went, not by the user
    last_error    TEXT,
    created_at    TEXT NOT NULL,
    -- Overrides what the catalogue says of the platform, for example on a paid plan; NULL: as the platform
    trains_on_prompts INTEGER CHECK (trains_on_prompts IN (0, 1)),
    UNIQUE (platform, fingerprint)
);

-- One row per attempt, and one for a request that was refused before any attempt. No prompts, no answers.
CREATE TABLE requests (
    id              INTEGER PRIMARY KEY,
    request_id      TEXT NOT NULL,
    created_at      TEXT NOT NULL,
    platform        TEXT,
    model_id        TEXT,
    key_id          INTEGER,
    requested_model TEXT,
    routing_mode    TEXT,
    status          TEXT NOT NULL CHECK (status IN ('success', 'error', 'cancelled')),
    error_kind      TEXT,
    http_status     INTEGER,
    error           TEXT,
    input_tokens    INTEGER,
    output_tokens   INTEGER,
    latency_ms      INTEGER,
    ttfb_ms         INTEGER,
    attempt         INTEGER NOT NULL,
    streamed        INTEGER NOT NULL,
    skipped_models  TEXT,
    client          INTEGER,                     -- clients.id; NULL for the gateway's own key
    cached          INTEGER NOT NULL DEFAULT 0,  -- answered from memory (SPEC 18)
    resumed_at      INTEGER,                     -- from which delivered character on; NULL on a first attempt (SPEC 14.8)
    drill           INTEGER NOT NULL DEFAULT 0,  -- broken on purpose; feeds no statistics (SPEC 14.10)
    waited_ms       INTEGER,                     -- the request's wait for capacity before this attempt (SPEC 5.5)
    -- Says nothing of what to expect of its model: its health gate was open, or the gateway itself failed (SPEC 10.4)
    uncounted       INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX requests_by_time ON requests (created_at);
CREATE INDEX requests_by_request ON requests (request_id);

-- Keys that the operator gives to clients (SPEC 19). Only a hash of each is kept: 256 random bits need no salt.
-- AUTOINCREMENT: rows of the log go on naming a client that is gone.
CREATE TABLE clients (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    name       TEXT NOT NULL,
    key_hash   BLOB NOT NULL UNIQUE,  -- SHA-256
    masked     TEXT NOT NULL,
    enabled    INTEGER NOT NULL DEFAULT 1,
    rpm_limit  INTEGER,
    rpd_limit  INTEGER,
    tpd_limit  INTEGER,
    models     TEXT,     -- a JSON list of models and modes; NULL: all
    min_rank   INTEGER,  -- SPEC 21.3
    privacy    TEXT CHECK (privacy IN ('no-train')),
    expires_at TEXT,
    created_at TEXT NOT NULL
);

-- What the gateway made for itself; secrets in here are encrypted like keys.
CREATE TABLE settings (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
