"""SPEC 3.3 and 3.10: what clients call a model, and which model or mode that is."""

import json

import pytest
from conftest import assert_error

from routing.catalog import Catalog, Model, Platform
from wire.chat import Need, parse_model

ALIASES = {"gpt-4o-mini": "auto-fast", "My-Model": "b/Shared-Model", "odd": "auto:smart", "gone": "nothing", "x": "x-1"}
IDS = {
    "a": ["Llama-3", "shared-model", "openai/gpt-oss", "vendor/big"],
    "b": ["Shared-Model", "llama-3:latest", "gpt-oss", "x", "x-1"],
}


def catalog() -> Catalog:
    platforms = {id: Platform(id, id, "openai", "http://127.0.0.1/v1", keyless=True) for id in IDS}
    models = [
        Model(
            number, platforms[id], name, name, 1, 1, 10**6, 1000, None, None, None, None, True, True, frozenset(),
            frozenset(), True, number, True,
        )
        for number, (id, name) in enumerate((id, name) for id, names in IDS.items() for name in names)
    ]  # fmt: skip
    return Catalog(platforms.values(), models, [], ALIASES)


MEANT = {
    "": "balanced", "auto": "balanced", "AUTO": "balanced", " Auto ": "balanced", "auto:latest": "balanced",
    "openai/auto": "balanced", "auto-smart": "smart", "Auto-Smart": "smart", "auto:FAST": "fast",
    "openai/auto-fast": "fast", "freellmapi/auto-fast": "fast", "FreeLLMAPI/auto:smart": "smart",
    "auto-smart:latest": "smart", "auto-nothing": "auto-nothing",
    # a model's own name
    "Llama-3": "Llama-3", "llama-3": "Llama-3", "LLAMA-3": "Llama-3", "llama-3:latest": "llama-3:latest",
    "llama-3:LATEST": "Llama-3", "openai/Llama-3": "Llama-3", "openai/llama-3:latest": "Llama-3",
    "shared-model": "shared-model", "Shared-Model": "Shared-Model", "SHARED-MODEL": "shared-model",
    "openai/gpt-oss": "openai/gpt-oss", "OpenAI/GPT-OSS": "openai/gpt-oss", "gpt-oss": "gpt-oss",
    "GPT-OSS:latest": "gpt-oss", "vendor/big": "vendor/big", "Vendor/Big": "vendor/big", "big": "big",
    # with its platform
    "a/Llama-3": "a/Llama-3", "A/llama-3": "a/Llama-3", "b/llama-3": "b/llama-3:latest", "b/GPT-OSS": "b/gpt-oss",
    "openai/b/gpt-oss": "b/gpt-oss", "a/vendor/big": "a/vendor/big", "a/gpt-oss": "a/gpt-oss",
    # by an alias
    "gpt-4o-mini": "fast", "GPT-4o-mini": "fast", "openai/gpt-4o-mini": "fast", "gpt-4o-mini:latest": "fast",
    "my-model": "b/Shared-Model", "odd": "smart", "gone": "nothing", "x": "x-1",
    "unknown": "unknown",
}  # fmt: skip


@pytest.mark.parametrize(("name", "meant"), MEANT.items())
def test_a_name_means_a_mode_or_a_model_as_the_catalogue_spells_it(name, meant):
    mode, pinned = parse_model(name)

    need = catalog().meant(Need(mode, pinned, tokens=0))

    assert (need.pinned or need.mode) == meant


@pytest.fixture
async def gateway(start_gateway, tmp_path):
    running = await start_gateway({"a": {}, "b": {"model": {"model_id": "Mixed-Case"}}})
    await running.stop()
    path = tmp_path / "test-catalog.json"
    content = json.loads(path.read_text()) | {"aliases": {"gpt-4o": "b/mixed-case", "gpt-4o-mini": "auto-priority"}}
    path.with_name("aliases.json").write_text(json.dumps(content))
    return await start_gateway({}, {"GATEWAY_CATALOG": str(path.with_name("aliases.json"))})


@pytest.mark.parametrize(
    ("model", "platform"),
    [("gpt-4o", "b"), ("GPT-4o-mini", "a"), ("openai/gpt-4o", "b"), ("MIXED-CASE:latest", "b"), ("A/A-Model", "a")],
)
async def test_the_model_meant_answers(gateway, fake, model, platform):
    got = await gateway.chat(model=model)

    assert got.text == f"hello from {platform}"
    row = await gateway.row(request_id=got.headers["X-Request-Id"])
    assert row["requested_model"] == model
    assert row["routing_mode"] == ("priority" if model == "GPT-4o-mini" else "balanced")


async def test_a_model_is_shown_under_every_name_that_means_it(gateway):
    for name in ("gpt-4o", "mixed-case", "openai/Mixed-Case", "b/mixed-case:latest", "AUTO", "gpt-4o-mini"):
        got = await gateway.get(f"/v1/models/{name}")
        assert (got.status, got.json["object"]) == (200, "model"), name
        assert got.json["context_window"], name
    assert_error(await gateway.get("/v1/models/nothing"), 404, "invalid_request_error", "model_not_found")


async def test_a_name_for_no_model_says_so(gateway, fake):
    assert_error(await gateway.chat(model="openai/nothing"), 400, "invalid_request_error", "model_not_found")
    assert fake.called == []
