"""SPEC 1.2 to 1.5, 2.1 to 2.3 and CONTRACT's catalogue: what is accepted, what is merged, what survives a restart."""

import contextlib
import json
import os
import re
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import case, catalog_of, client_of, default_key, stored_keys
from fake_provider import until

import gateway
from adapters.registry import ADAPTERS
from config.catalog_files import load_catalog
from config.settings import READERS, SettingsError, load_settings, read_dotenv
from routing.catalog import Catalog, Key, ModelKind, keeps_prompts_private
from wire.errors import ModelNotFound

KEY = {"GATEWAY_API_KEY": "fw-test-0123456789abcdef"}


def execute(db: Path, statement: str, *values: object) -> list[dict]:
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(statement, values)]


# --- Settings ---------------------------------------------------------------------------------------------------

DURATIONS = [
    "TRANSIENT_COOLDOWN_MS", "THREAD_COOLDOWN_MS", "STICKY_TTL_MS", "RATE_LIMIT_COOLDOWN_MS", "KEEPALIVE_INTERVAL_MS",
    "MAX_STREAM_STALL_MS", "FIRST_TOKEN_TIMEOUT_MS", "CONNECT_TIMEOUT_MS", "REQUEST_TIMEOUT_MS", "REQUEST_BUDGET_MS",
    "STATS_REFRESH_MS", "ANALYTICS_WINDOW_DAYS", "LOG_RETENTION_DAYS", "MAX_FALLBACK_ATTEMPTS", "MAX_BODY_BYTES",
    "KEY_RECHECK_MS", "RESCUE_AFTER_MS", "CACHE_TTL_MS",
]  # fmt: skip
ZERO_IS_OFF = ["WAIT_FOR_CAPACITY_MS", "HEDGE_PERCENT", "CACHE_MB"]
NO_DURATIONS = ["0", "-5", "1.5", "ten", "10ms", "0x10", "1_000", "NaN"]
MALFORMED = [
    *[(name, value) for name in DURATIONS for value in NO_DURATIONS],
    *[(name, value) for name in ZERO_IS_OFF for value in NO_DURATIONS if value != "0"],
    ("HEDGE_PERCENT", "101"),
    ("RESCUE", "maybe"),
    ("TOOL_CALLS", "pieces"),
    ("GATEWAY_PRIVACY", "trust-me"),
    ("GATEWAY_ORIGINS", "chat.example"),
    ("GATEWAY_ORIGINS", "https://chat.example/path"),
    ("GATEWAY_PORT", "65536"),
    ("GATEWAY_PORT", "-1"),
    ("GATEWAY_PORT", "http"),
    ("STICKY_TTL_MS", "9" * 5000),
    ("GATEWAY_HOST", "my laptop"),
    ("LOG_LEVEL", "loud"),
    ("CONTENT_FILTER", "maybe"),
    ("GROQ_BASE_URL", "not a url"),
    ("GROQ_BASE_URL", "ftp://files.example"),
]


def test_a_malformed_setting_is_named_with_its_value_in_one_line(tmp_path):
    for name, value in MALFORMED:
        with case((name, value[:20])):
            with pytest.raises(SettingsError) as refused:
                gateway.Gateway(load_settings([], {**KEY, name: value}, tmp_path))

            message = str(refused.value)
            assert name in message
            assert value[:100] in message
            assert "\n" not in message


@pytest.mark.parametrize("value", ["00" * 31, "00" * 33, "zz" * 32, "secret"])
def test_a_malformed_encryption_key_is_never_shown(tmp_path, value):
    with pytest.raises(SettingsError) as refused:
        load_settings([], {**KEY, "ENCRYPTION_KEY": value}, tmp_path)

    assert "ENCRYPTION_KEY" in str(refused.value)
    assert "64" in str(refused.value)
    assert value not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATEWAY_STATE", "http://:pass-w0rd@cache:6379"),
        ("GATEWAY_STATE", "redis://:pass w0rd@cache"),
        ("GATEWAY_STATE", "redis://"),
        ("GATEWAY_LOG", "mysql://me:pass-w0rd@db/log"),
        ("GATEWAY_LOG", "pass-w0rd"),
        ("GATEWAY_API_KEY", "pass-w0rd with blanks"),
    ],
)
def test_a_malformed_address_or_key_is_never_shown(tmp_path, name, value):
    with pytest.raises(SettingsError) as refused:
        load_settings([], {**KEY, name: value}, tmp_path)

    assert name in str(refused.value)
    assert "w0rd" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_good_address_is_kept_and_never_printed(tmp_path):
    given = {"GATEWAY_STATE": "rediss://:pass-w0rd@cache:6379/1", "GATEWAY_LOG": "postgresql://me@db/log"}

    settings = load_settings([], {**KEY, **given}, tmp_path)

    assert (settings.state, settings.log) == tuple(given.values())
    assert "w0rd" not in repr(settings)


def test_web_origins_are_written_as_browsers_send_them(tmp_path):
    given = {**KEY, "GATEWAY_ORIGINS": " https://Chat.Example:8443/ ,app://obsidian.md,,http://localhost:3000"}

    assert load_settings([], given, tmp_path).origins == (
        "https://chat.example:8443", "app://obsidian.md", "http://localhost:3000",
    )  # fmt: skip
    assert load_settings([], {**KEY, "GATEWAY_ORIGINS": "*"}, tmp_path).origins == ("*",)


def test_switches_are_read_in_any_case_and_0_is_off_where_the_table_says_so(tmp_path):
    given = {"RESCUE": "OFF", "TOOL_CALLS": "Stream", **dict.fromkeys(ZERO_IS_OFF, "0")}

    settings = load_settings([], {**KEY, **given}, tmp_path)

    assert (settings.rescue, settings.tool_calls) == (False, "stream")
    assert (settings.wait_for_capacity_ms, settings.hedge_percent, settings.cache_mb) == (0, 0, 0)


def settings_table() -> dict[str, str]:
    """The README's settings: each with its default as written there."""
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    table = {}
    for line in text[text.index("## Settings") :].splitlines():
        names, default = ([*line.split(" | "), ""])[:2]
        found = re.findall(r"`([A-Z_]+)`", names)
        table.update(zip(found, default.split(", ") * (len(found) if default == "–" else 1), strict=False))
    return table


def test_settings_have_the_defaults_of_the_readmes_table(tmp_path):
    settings, table = load_settings([], KEY, tmp_path), settings_table()
    assert set(READERS) <= set(table)

    for name in READERS:
        value = getattr(settings, name.removeprefix("GATEWAY_").lower())
        with case(name):
            if type(value) is bool:
                assert table[name] == ("on" if value else "off")
            elif type(value) is int:
                assert table[name] == str(value)
            elif not value:
                assert not table[name].isdigit()
    assert (settings.host, settings.db, settings.log_level) == ("127.0.0.1", tmp_path / "gateway.db", "info")
    assert "fw-test-0123456789abcdef" not in repr(settings)


def test_flags_beat_the_environment_which_beats_the_env_file(tmp_path):
    (tmp_path / ".env").write_text(
        '# a comment\n\nGATEWAY_PORT=1111\nLOG_LEVEL="debug"\nexport STICKY_TTL_MS = 77\nGATEWAY_HOST=::1\n'
    )
    environment = {**KEY, "GATEWAY_PORT": "2222", "GATEWAY_HOST": "localhost"}

    settings = load_settings(["--port", "3333"], environment, tmp_path)

    assert (settings.port, settings.host) == (3333, "localhost")
    assert (settings.log_level, settings.sticky_ttl_ms) == ("debug", 77)


ENV_FILES = {
    "A=b # a comment": {"A": "b"},
    "A = b": {"A": "b"},
    "export A=b": {"A": "b"},
    "A=b#c": {"A": "b#c"},
    "A='b # c' # d": {"A": "b # c"},
    "A=b=c": {"A": "b=c"},
    "A=\r\nB=2\r\n": {"A": "", "B": "2"},
    "\ufeffA=b": {"A": "b"},
    "A='two\nlines'": {"A": "two\nlines"},
    "A=${B}": {"A": "${B}"},
}


@pytest.mark.parametrize(("text", "values"), ENV_FILES.items(), ids=repr)
def test_an_env_file_is_read_as_other_tools_read_it(tmp_path, text, values):
    (tmp_path / ".env").write_text(text, newline="")

    assert read_dotenv(tmp_path / ".env") == values


@pytest.mark.parametrize("line", ["GROQ_API_KEY", "=secret", "GROQ_API_KEY secret", "A='secret", 'A="b" secret'])
def test_a_malformed_line_of_an_env_file_is_named_by_its_number_and_never_shown(tmp_path, line):
    (tmp_path / ".env").write_text(f"# first\nB=1\n{line}\nC=2\n")

    with pytest.raises(SettingsError, match=r"^\.env line 3: expected NAME=value$"):
        load_settings([], KEY, tmp_path)


# --- Catalogue files --------------------------------------------------------------------------------------------

PLATFORM = {"id": "a", "adapter": "openai", "base_url": "http://127.0.0.1:9/v1"}
MODEL = {"platform": "a", "model_id": "m"}
BAD_CATALOGS = {
    "not JSON": "{",
    "a list": "[]",
    "platforms as an object": {"platforms": {}},
    "a platform without id": {"platforms": [{"adapter": "openai", "base_url": "http://x/v1"}]},
    "a platform without adapter": {"platforms": [{"id": "a", "base_url": "http://x/v1"}]},
    "a platform without base_url": {"platforms": [{"id": "a", "adapter": "openai"}]},
    "an unknown adapter": {"platforms": [PLATFORM | {"adapter": "smtp"}]},
    "a base_url that is none": {"platforms": [PLATFORM | {"base_url": "nowhere"}]},
    "an unknown protection": {"platforms": [PLATFORM | {"protection": "maybe"}]},
    "keyless as text": {"platforms": [PLATFORM | {"keyless": "yes"}]},
    "quirks as a list": {"platforms": [PLATFORM | {"quirks": ["drop"]}]},
    "a model without model_id": {"platforms": [PLATFORM], "models": [{"platform": "a"}]},
    "a model of an unknown platform": {"models": [MODEL | {"platform": "nowhere"}]},
    "a rank as text": {"platforms": [PLATFORM], "models": [MODEL | {"intelligence_rank": "best"}]},
    "a window of a fraction": {"platforms": [PLATFORM], "models": [MODEL | {"context_window": 1.5}]},
    "tools as text": {"platforms": [PLATFORM], "models": [MODEL | {"tools": "yes"}]},
    "a limit as a list": {"platforms": [PLATFORM], "models": [MODEL | {"rpm": [1]}]},
    "exclude_from as text": {"platforms": [PLATFORM], "models": [MODEL | {"exclude_from": "balanced"}]},
    "an unknown mode": {"platforms": [PLATFORM], "models": [MODEL | {"prefer_in": ["clever"]}]},
    "an unknown prefill": {"platforms": [PLATFORM | {"prefill": "maybe"}]},
    "an unknown prefill of a model": {"platforms": [PLATFORM], "models": [MODEL | {"prefill": "maybe"}]},
    "training as text": {"platforms": [PLATFORM | {"trains_on_prompts": "no"}]},
    "terms read some day": {"platforms": [PLATFORM | {"terms_checked": "lately"}]},
    "local as a number": {"platforms": [PLATFORM | {"local": 1}]},
    "a check that is no path": {"platforms": [PLATFORM | {"check_path": True}]},
    "an unknown kind": {"platforms": [PLATFORM], "models": [MODEL | {"kind": "image"}]},
    "dimensions of zero": {"platforms": [PLATFORM], "models": [MODEL | {"dimensions": 0}]},
    "a family as a number": {"platforms": [PLATFORM], "models": [MODEL | {"family": 7}]},
    "training of a key as text": {
        "platforms": [PLATFORM],
        "keys": [{"platform": "a", "key": "sk-secret-value", "trains_on_prompts": "no"}],
    },
    "aliases as a list": {"aliases": ["gpt-4o-mini"]},
    "an alias for a number": {"aliases": {"gpt-4o-mini": 7}},
    "an alias for nothing": {"aliases": {"gpt-4o-mini": ""}},
    "a key of an unknown platform": {"keys": [{"platform": "nowhere", "key": "sk-secret-value"}]},
    "a key of a number": {"platforms": [PLATFORM], "keys": [{"platform": "a", "key": 7}]},
    "a key with a line break": {"platforms": [PLATFORM], "keys": [{"platform": "a", "key": "sk-secret\nvalue"}]},
    "a key beyond ASCII": {"platforms": [PLATFORM], "keys": [{"platform": "a", "key": "sk-schlüssel"}]},
}


@pytest.mark.parametrize("content", BAD_CATALOGS.values(), ids=BAD_CATALOGS)
def test_a_bad_catalogue_stops_the_start_with_its_place_in_one_line(tmp_path, content):
    file = tmp_path / "mine.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))

    with pytest.raises(SettingsError) as refused:
        gateway.Gateway(load_settings([], {**KEY, "GATEWAY_CATALOG": str(file)}, tmp_path))

    assert any(place in str(refused.value) for place in ("mine.json", "platform a", "model "))
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)
    assert not (tmp_path / "gateway.db").exists()


def test_a_missing_catalogue_is_named_in_one_line(tmp_path):
    with pytest.raises(SettingsError, match=r"gone\.json"):
        gateway.Gateway(load_settings([], {**KEY, "GATEWAY_CATALOG": str(tmp_path / "gone.json")}, tmp_path))


async def test_an_unknown_field_is_ignored_with_a_warning(start_process, fake):
    running = await start_process({"a": {"colour_of_the_logo": "red"}}, KEY)
    async with client_of(running) as client:
        assert (await client.chat()).text == "hello from a"
    running.signal(signal.SIGTERM)
    await running.ended()

    assert "colour_of_the_logo" in running.text


async def test_a_platform_and_a_model_given_again_are_merged_field_by_field(start_gateway, fake, tmp_path):
    mine = catalog_of({"a": {"model": {"context_window": 2_000, "tools": False, "vision": True}}}, fake)
    mine["platforms"].append({"id": "a", "name": "My own A"})
    mine["models"].append({"platform": "a", "model_id": "a-model", "context_window": 9_000})
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    running = await start_gateway(["ignored"], {"GATEWAY_CATALOG": str(tmp_path / "mine.json")})

    (row,) = execute(running.db, "SELECT * FROM models WHERE platform = 'a'")

    assert (row["context_window"], row["supports_tools"], row["supports_vision"]) == (9_000, 0, 1)
    assert (await running.chat()).text == "hello from a"


async def test_what_a_model_does_not_say_has_the_defaults(start_gateway, fake, tmp_path):
    mine = catalog_of(["a"], fake) | {"models": [{"platform": "a", "model_id": "plain"}]}
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    running = await start_gateway(["ignored"], {"GATEWAY_CATALOG": str(tmp_path / "mine.json")})

    (row,) = execute(running.db, "SELECT * FROM models WHERE platform = 'a'")

    assert (row["intelligence_rank"], row["speed_rank"], row["context_window"]) == (None, None, 32_768)
    assert [row[name] for name in ("rpm_limit", "rpd_limit", "tpm_limit", "tpd_limit")] == [None] * 4
    assert (row["supports_tools"], row["supports_vision"], row["enabled"]) == (1, 0, 1)


def catalog_with(tmp_path: Path, **content: object):
    (tmp_path / "mine.json").write_text(json.dumps(content))
    settings = load_settings([], {**KEY, "GATEWAY_CATALOG": str(tmp_path / "mine.json")}, tmp_path)
    return load_catalog(settings, ADAPTERS)


def test_what_a_platform_says_holds_for_its_models_until_they_say_otherwise(tmp_path):
    files = catalog_with(
        tmp_path,
        platforms=[PLATFORM | {"prefill": "partial", "completions": True}],
        models=[MODEL, MODEL | {"model_id": "own", "prefill": "none", "completions": False, "family": "f"}],
    )
    plain, own = (next(m for m in files.models if m.label == label) for label in ("a/m", "a/own"))

    assert (plain.prefill, plain.completions, plain.family, plain.kind) == ("partial", True, "m", "chat")
    assert (own.prefill, own.completions, own.family) == ("none", False, "f")


def test_an_embedding_model_is_none_for_chat_and_calls_no_tools(tmp_path):
    embedding = MODEL | {"kind": "embedding", "dimensions": 768}
    files = catalog_with(tmp_path, platforms=[PLATFORM], models=[embedding, MODEL | {"model_id": "c"}])
    models = [replace(m, id=n) for n, m in enumerate(files.models, start=1) if m.platform.id == "a"]
    catalog = Catalog([models[0].platform], models, [])

    assert [m.model_id for m in catalog.embeddings] == ["m"]
    assert [m.model_id for m in catalog.chain] == ["c"]
    assert (models[0].kind, models[0].dimensions, models[0].tools) == ("embedding", 768, False)
    assert catalog.resolve("m", ModelKind.EMBEDDING) == [models[0]]
    for name, kind in (("m", ModelKind.CHAT), ("a/m", ModelKind.CHAT), ("c", ModelKind.EMBEDDING)):
        with pytest.raises(ModelNotFound):
            catalog.resolve(name, kind)


def test_aliases_of_the_operators_file_are_carried(tmp_path):
    assert catalog_with(tmp_path, aliases={"gpt-4o-mini": "auto-fast"}).aliases["gpt-4o-mini"] == "auto-fast"


TRAINING = {
    "unknown": ({}, None, False),
    "known to train": ({"trains_on_prompts": True}, None, False),
    "known not to train": ({"trains_on_prompts": False}, None, True),
    "a paid key": ({"trains_on_prompts": True}, False, True),
    "a free key of a platform that does not": ({"trains_on_prompts": False}, True, False),
    "one's own machine": ({"local": True}, None, True),
    "one's own machine, whatever is said": ({"local": True, "trains_on_prompts": True}, True, True),
    "an address on loopback alone": ({"base_url": "http://127.0.0.1:9/v1"}, None, False),
}


@pytest.mark.parametrize(("platform", "key", "private"), TRAINING.values(), ids=TRAINING)
def test_prompts_are_private_only_where_that_is_known(tmp_path, platform, key, private):
    keys = [{"platform": "a", "key": "sk-value", "trains_on_prompts": key}]
    files = catalog_with(tmp_path, platforms=[PLATFORM | platform], keys=keys)
    (given,) = [key for key in files.keys if key.platform == "a"]

    made = Key(1, "a", given.secret, trains_on_prompts=given.trains_on_prompts)

    assert keeps_prompts_private(files.platforms["a"], made) is private


async def test_the_built_in_catalogue_works_with_a_key_and_an_address_from_the_environment(start_gateway, fake):
    keys = {"GROQ_API_KEY": "gsk_first_0001, gsk_second_0002", "GROQ_BASE_URL": fake.url("groq")}
    running = await start_gateway([], keys)

    for _ in range(2):
        assert (await running.chat()).text == "hello from groq"

    assert {request.key for request in fake.requests} == {"gsk_first_0001", "gsk_second_0002"}
    assert fake.requests[0].path == "/groq/v1/chat/completions"


# --- Keys -------------------------------------------------------------------------------------------------------


async def test_keys_are_stored_once_and_encrypted(start_gateway, fake):
    platforms = {"a": {"keys": ["sk-same", "sk-other"]}, "b": {"keys": ["sk-same"]}}
    for _ in range(3):
        running = await start_gateway(platforms)
        await running.stop()

    rows = execute(running.db, "SELECT * FROM api_keys ORDER BY id")
    assert [row["platform"] for row in rows] == ["a", "a", "b"]
    assert {len(bytes_of(row["iv"])) for row in rows} == {12}
    assert {len(bytes_of(row["auth_tag"])) for row in rows} == {16}
    assert len({bytes_of(row["iv"]) for row in rows}) == 3
    assert len({bytes_of(row["encrypted_key"]) for row in rows}) == 3
    assert all(row["created_at"].endswith("Z") for row in rows)


def bytes_of(value: bytes | str) -> bytes:
    return value if isinstance(value, bytes) else bytes.fromhex(value)


async def test_what_the_file_says_of_a_keys_training_holds_from_the_next_start_on(start_gateway, fake, tmp_path):
    stored = []
    for trains in ({"trains_on_prompts": False}, {}, {"trains_on_prompts": True}):
        mine = catalog_of({"a": {"keys": []}}, fake)
        mine["keys"] = [{"platform": "a", "key": "sk-paid-for-0001", "label": "paid", **trains}]
        (tmp_path / "mine.json").write_text(json.dumps(mine))
        running = await start_gateway(["ignored"], {"GATEWAY_CATALOG": str(tmp_path / "mine.json")})
        await running.stop()
        stored.append(stored_keys(running.db)["paid"]["trains_on_prompts"])

    assert stored == [0, 0, 1]


async def test_a_key_of_the_environment_comes_and_goes_with_its_name(start_gateway, fake):
    platforms = {"a": {"keys": [], "env": ["A_KEY", "A_TOKEN"]}, "b": {}}
    label = "env:A_KEY"
    running = await start_gateway(platforms, {"A_KEY": "sk-from-environment"})
    assert (await running.chat()).text == "hello from a"
    assert fake.requests[-1].key == "sk-from-environment"
    await running.stop()
    assert stored_keys(running.db)[label]["enabled"] == 1

    running = await start_gateway(platforms)
    assert (await running.chat()).text == "hello from b"
    await running.stop()
    assert stored_keys(running.db)[label]["enabled"] == 0

    running = await start_gateway(platforms, {"A_KEY": "sk-from-environment"})
    assert (await running.chat()).text == "hello from a"
    assert len([row for row in execute(running.db, "SELECT * FROM api_keys") if row["platform"] == "a"]) == 1


async def test_a_key_that_moves_from_the_environment_into_the_file_goes_on_serving(start_gateway, fake):
    platforms = {"a": {"env": ["A_KEY"], "keys": []}, "b": {}}
    moved = {"a": {"env": ["A_KEY"], "keys": ["sk-from-environment"]}, "b": {}}
    for given, settings in ((platforms, {"A_KEY": "sk-from-environment"}), (platforms, {}), (moved, {})):
        running = await start_gateway(given, settings)
        served = (await running.chat()).text
        await running.stop()

    assert served == "hello from a"
    row = stored_keys(running.db)["a-0"]
    assert (row["enabled"], row["gone"]) == (1, 0)


async def test_a_key_that_moves_from_the_environment_to_the_dashboard_goes_on_serving(start_gateway, fake):
    platforms = {"a": {"env": ["A_KEY"], "keys": []}, "b": {}}
    running = await start_gateway(platforms, {"A_KEY": "sk-from-environment"})
    await running.stop()
    running = await start_gateway(platforms)
    added = await running.send({"platform": "a", "key": "sk-from-environment"}, path="/api/keys")
    assert (added.status, added.json["label"], added.json["enabled"]) == (200, "", True)
    await running.stop()

    running = await start_gateway(platforms)

    assert (await running.chat()).text == "hello from a"


async def test_a_disabled_key_is_never_used(start_gateway, fake):
    platforms = {"a": {}, "b": {}}
    running = await start_gateway(platforms)
    await running.stop()
    execute(running.db, "UPDATE api_keys SET enabled = 0 WHERE platform = 'a'")

    running = await start_gateway(platforms)

    assert (await running.chat(model="a-model")).text == "hello from b"
    assert {request.key for request in fake.requests} == {default_key("b")}


async def test_the_demo_serves_while_no_key_is_enabled(start_gateway, fake):
    running = await start_gateway(["a"])
    await running.stop()
    execute(running.db, "UPDATE api_keys SET enabled = 0")

    running = await start_gateway(["a"])

    got = await running.chat()
    assert got.headers["X-Routed-Via"].startswith("demo/")
    assert fake.called == []


# --- Sync -------------------------------------------------------------------------------------------------------


async def test_a_model_gone_from_the_catalogue_is_disabled_and_not_deleted(start_gateway, fake):
    running = await start_gateway(["a", "b"])
    await running.stop()
    (before,) = execute(running.db, "SELECT * FROM models WHERE platform = 'a'")

    running = await start_gateway(["b"])
    assert (await running.chat(model="a-model")).error["code"] == "model_not_found"
    assert "a-model" not in (await running.get("/v1/models")).body.decode()
    await running.stop()
    (gone,) = execute(running.db, "SELECT * FROM models WHERE platform = 'a'")
    assert (gone["id"], gone["enabled"]) == (before["id"], 0)

    running = await start_gateway(["a", "b"])
    assert (await running.chat(model="a-model")).text == "hello from a"


async def test_the_users_order_of_the_chain_survives_a_sync(start_gateway, fake):
    running = await start_gateway(["a", "b"])
    await running.stop()
    (last,) = execute(running.db, "SELECT MAX(priority) AS priority FROM fallback_config")
    where = "model_db_id = (SELECT id FROM models WHERE platform = 'a')"
    execute(running.db, f"UPDATE fallback_config SET priority = ? WHERE {where}", last["priority"] + 1)

    for _ in range(2):
        running = await start_gateway(["a", "b", "new"])
        assert (await running.chat()).text == "hello from b"
        await running.stop()


async def test_a_model_switched_off_in_the_chain_can_still_be_pinned(start_gateway, fake):
    running = await start_gateway(["a", "b"])
    await running.stop()
    where = "model_db_id = (SELECT id FROM models WHERE platform = 'a')"
    execute(running.db, f"UPDATE fallback_config SET enabled = 0 WHERE {where}")

    running = await start_gateway(["a", "b"])

    assert (await running.chat()).text == "hello from b"
    assert (await running.chat(model="a-model")).text == "hello from a"


async def test_a_model_the_user_disabled_stays_so_and_is_unknown_to_clients(start_gateway, fake):
    running = await start_gateway(["a", "b"])
    await running.stop()
    execute(running.db, "UPDATE models SET enabled = 0 WHERE platform = 'a'")

    running = await start_gateway(["a", "b"])

    assert (await running.chat()).text == "hello from b"
    got = await running.chat(model="a-model")
    assert (got.status, got.error["code"]) == (400, "model_not_found")
    assert "a-model" in got.error["message"]
    assert (await running.get("/v1/models/a-model")).status == 404


async def test_nothing_enabled_gives_no_providers(start_gateway, fake):
    running = await start_gateway(["a"])
    await running.stop()
    execute(running.db, "UPDATE models SET enabled = 0 WHERE platform = 'a'")

    running = await start_gateway(["a"])

    got = await running.chat()
    assert (got.status, got.error["code"]) == (503, "no_providers")


async def test_facts_of_the_catalogue_are_brought_up_to_date(start_gateway, fake):
    running = await start_gateway({"a": {"model": {"rpm": 5}}})
    await running.stop()

    running = await start_gateway({"a": {"model": {"rpm": 6}}})

    assert execute(running.db, "SELECT rpm_limit FROM models WHERE platform = 'a'") == [{"rpm_limit": 6}]


# --- Tables -----------------------------------------------------------------------------------------------------

TABLES = {
    "models": "id platform model_id display_name intelligence_rank speed_rank context_window rpm_limit rpd_limit "
    "tpm_limit tpd_limit supports_tools supports_vision enabled",
    "fallback_config": "model_db_id priority enabled",
    "api_keys": "id platform label encrypted_key iv auth_tag status enabled last_error created_at",
    "requests": "id request_id created_at platform model_id key_id requested_model routing_mode status error_kind "
    "http_status error input_tokens output_tokens latency_ms ttfb_ms attempt streamed skipped_models",
    "settings": "key value",
}


async def test_the_tables_have_the_columns_of_the_contract(start_gateway, fake):
    running = await start_gateway()

    for table, columns in TABLES.items():
        found = {row["name"] for row in execute(running.db, f"PRAGMA table_info({table})")}
        assert set(columns.split()) <= found, table
    assert execute(running.db, "PRAGMA journal_mode") == [{"journal_mode": "wal"}]
    assert execute(running.db, "PRAGMA user_version")[0]["user_version"] >= 1


async def test_the_key_file_is_for_its_owner_only(start_gateway, fake):
    running = await start_gateway()
    await until(lambda: running.db.with_name("gateway.db.key").exists())

    assert os.stat(running.db.with_name("gateway.db.key")).st_mode & 0o777 == 0o600
