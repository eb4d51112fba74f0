"""Issue 4, must-show 5: the built-in catalogue; and servers whose models are what they list themselves."""

import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import IN_ORDER
from fake_provider import answer, body, error, until

from adapters.quirks import EFFORTS
from adapters.registry import ADAPTERS
from config.catalog_files import load_catalog
from config.settings import load_settings
from routing.day import is_known
from routing.quirk_names import QUIRKS
from wire.chat import MODES

HERE = Path(__file__).resolve().parent.parent
RAW = json.loads((HERE / "catalog.json").read_text())
PLATFORMS, MODELS = RAW["platforms"], RAW["models"]
PLATFORM_QUIRKS = {platform["id"]: platform.get("quirks", {}) for platform in PLATFORMS}


def loaded(tmp_path, **environ: str):
    return load_catalog(load_settings([], environ, tmp_path), ADAPTERS)


def test_the_whole_catalogue_loads_in_less_than_50_ms_and_without_a_warning(tmp_path):
    took = []
    for _ in range(3):
        began = time.perf_counter()
        files = loaded(tmp_path)
        took.append(time.perf_counter() - began)

    assert min(took) < 0.05
    assert files.warnings == ()
    assert len(files.models) == len(MODELS) > 170


def test_ids_are_unique():
    platforms = Counter(platform["id"] for platform in PLATFORMS)
    models = Counter((model["platform"], model["model_id"]) for model in MODELS)
    assert [id for id, count in (platforms + models).items() if count > 1] == []


def test_every_model_belongs_to_a_platform_and_every_number_is_sane():
    ids = {platform["id"] for platform in PLATFORMS}
    for model in MODELS:
        name = f"{model['platform']}/{model['model_id']}"
        assert model["platform"] in ids, name
        assert model["model_id"] == model["model_id"].strip(), name
        if model.get("kind") == "embedding":
            assert model["family"], name
            assert model["platform"] == "demo" or 64 <= model["dimensions"] <= 16_384, name
            continue
        assert 1 <= model["intelligence_rank"] <= 100, name
        assert 1 <= model["speed_rank"] <= 100, name
        assert 1_000 <= model["context_window"] <= 10_000_000, name
        assert model.get("max_output", 1) <= model["context_window"], name
        assert model.get("rpm", 1) <= model.get("rpd", 10**9), name
        assert model.get("tpm", 1) <= model.get("tpd", 10**12), name
        assert set(model.get("exclude_from", [])) | set(model.get("prefer_in", [])) <= MODES, name
        assert set(model.get("quirks", {})) <= set(QUIRKS), name


def test_embedding_models_of_one_family_have_vectors_of_one_length_and_no_chat_model_in_it():
    embeddings = [model for model in MODELS if model.get("kind") == "embedding"]
    lengths: dict[str, set[int]] = {}
    for model in embeddings:
        lengths.setdefault(model["family"], set()).add(model.get("dimensions"))
        assert not {"tools", "vision", "intelligence_rank", "speed_rank", "max_output"} & model.keys(), model
    assert {len(sizes) for sizes in lengths.values()} == {1}
    assert not lengths.keys() & {model.get("family") for model in MODELS if model not in embeddings}
    assert "demo" in {model["platform"] for model in embeddings}


def weights(model: dict) -> str:
    """An id without what platforms add to a model's own name: its maker, a price, a precision, how it is spelt."""
    name = model["model_id"].lower().rpartition("/")[2].removesuffix(":free").removesuffix("-free")
    return re.sub(r"[^a-z0-9]", "", re.sub(r"-(fp8|fast|it|instruct)\b", "", name))


def test_the_same_weights_on_different_platforms_are_one_family():
    families: dict[str, set[str]] = {}
    for model in MODELS:
        if not model["model_id"].endswith("/free"):  # a router, with weights of no name
            families.setdefault(weights(model), set()).add(model["family"])
    assert {name: found for name, found in families.items() if len(found) > 1} == {}


def test_what_is_said_of_training_has_a_source_and_only_ones_own_machines_are_local():
    for platform in PLATFORMS:
        said = platform.get("trains_on_prompts") is not None
        assert said <= (platform.get("terms_url", "").startswith("https://")), platform["id"]
        assert bool(platform.get("terms_url")) == bool(platform.get("terms_checked")), platform["id"]
        assert platform.get("local", False) == (platform.get("opt_in", False) or platform["adapter"] == "demo")


def test_only_the_models_of_the_specification_carry_marks():
    marked = {(m["platform"], m["model_id"]): m for m in MODELS if m.get("exclude_from") or m.get("prefer_in")}
    assert {id for platform, id in marked if platform != "longcat"} == {"openrouter/owl-alpha"}
    assert all(m["exclude_from"] == ["balanced"] and m["prefer_in"] == ["smart"] for m in marked.values())
    assert next(m["platform"] for m in MODELS if m.get("prefer_in")) == "longcat"
    assert all(m in marked.values() for m in MODELS if m["platform"] == "longcat")


def test_platforms_are_reachable_safely_and_nobodys_prompts_go_to_strangers_unasked():
    for platform in PLATFORMS:
        local = platform.get("opt_in", False)
        if platform["adapter"] != "demo":
            assert platform["base_url"].startswith("http://127.0.0.1:" if local else "https://"), platform["id"]
            assert not platform["base_url"].endswith("/"), platform["id"]
        assert platform.get("keyless", False) == (local or platform["adapter"] == "demo"), platform["id"]
        assert local or platform.get("env") or platform["adapter"] == "demo", platform["id"]
        assert platform.get("protection") == ("provider-ban" if platform["id"] == "longcat" else None)
    variables = Counter(name for platform in PLATFORMS for name in platform.get("env", []))
    assert max(variables.values()) == 1


def test_patterns_and_regions_in_quirks_are_real():
    for platform in PLATFORMS:
        quirks = platform.get("quirks", {})
        re.compile(quirks.get("tool_call_id_pattern", ""))
        assert is_known(platform.get("daily_reset", "UTC"))
        assert set(quirks.get("reasoning_efforts", [])) <= set(EFFORTS)


def test_no_module_names_a_platform():
    """SPEC 4.9; the names of adapters are wire formats, and `demo` is built in."""
    names = {platform["id"] for platform in PLATFORMS} - {"google", "demo", "navy", "nara", "aion", "bai", "reka"}
    for module in HERE.glob("*.py"):
        text = module.read_text().lower()
        assert [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)] == [], module.name


def test_a_models_quirks_go_over_its_platforms(tmp_path):
    by_name = {model.label: model for model in loaded(tmp_path).models}
    plain, gemma = by_name["google/gemini-3.8-flash"], by_name["google/gemma-4-31b-it"]
    assert (plain.quirks["thinking"], plain.quirks.get("system_as_user")) == ("level", None)
    assert (gemma.quirks["thinking"], gemma.quirks["system_as_user"]) == ("none", True)
    assert gemma.quirks["error_codes"] == plain.quirks["error_codes"]


# --- Servers of one's own -------------------------------------------------------------------------------------------


def test_a_local_server_is_asked_only_when_it_is_named(tmp_path):
    assert "lmstudio" not in loaded(tmp_path).platforms
    named = loaded(tmp_path, LMSTUDIO_BASE_URL="http://10.0.0.5:1234/v1").platforms["lmstudio"]
    assert (named.base_url, named.keyless, named.discover) == ("http://10.0.0.5:1234/v1", True, True)


def test_a_local_server_may_be_named_in_the_operators_file(tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"platforms": [{"id": "local-ollama"}]}))
    assert "local-ollama" in loaded(tmp_path, GATEWAY_CATALOG=str(mine)).platforms


def listing(*rows: object, root: object = None):
    """A server that lists these models and answers as any of them."""

    def reply(request):
        if request.method == "GET":
            assert request.path == "/mine/v1/models"
            return body({"object": "list", "data": list(rows)} if root is None else root)
        return answer(f"I am {request.json['model']}")(request)

    return reply


MINE = {"mine": {"keyless": True, "discover": True, "models": []}}


async def models_of(gateway, platform: str = "mine") -> dict[str, dict]:
    rows = (await gateway.get("/api/models")).json
    return {row["model_id"]: row for row in rows if row["platform"] == platform and row["enabled"]}


async def discovered(gateway) -> list[str]:
    found: list[str] = []

    async def look() -> bool:
        found[:] = sorted(await models_of(gateway))
        served = {model["id"] for model in (await gateway.get("/v1/models")).json["data"]}  # routing learns it last
        return bool(found) and served.issuperset(found)

    for _ in range(500):
        if await look():
            return found
    return found


LISTS = {
    "OpenAI's form": (listing({"id": "b:7b", "object": "model"}, {"id": "a:1b"}), ["a:1b", "b:7b"]),
    "with windows": (listing({"id": "a:1b", "max_model_len": 4096}), ["a:1b"]),
    "names": (listing(root={"models": [{"name": "models/a:1b"}]}), ["a:1b"]),
    "a bare list": (listing(root=[{"id": "a:1b"}, "b:7b"]), ["a:1b", "b:7b"]),
    "not for chat": (listing({"id": "nomic-embed-text"}, {"id": "a:1b"}, {"id": "whisper-1"}), ["a:1b"]),
    "rubbish between": (listing({"id": "a:1b"}, None, 7, {"id": 7}, {}), ["a:1b"]),
    "what no database takes": (listing({"id": "half \ud83d"}, {"id": "a:1b", "n_ctx": 2**70}), ["a:1b"]),
}


@pytest.mark.parametrize(("server", "expected"), LISTS.values(), ids=LISTS)
async def test_the_models_that_a_server_lists_are_served(start_gateway, fake, server, expected):
    fake.script("mine", server)
    gateway = await start_gateway(MINE)

    assert await discovered(gateway) == expected

    assert (await gateway.chat(model="a:1b")).text == "I am a:1b"
    assert (await gateway.chat(model=IN_ORDER)).text.startswith("I am ")
    listed = (await gateway.get("/v1/models")).json["data"]
    assert set(expected) <= {model["id"] for model in listed}


async def test_a_listed_window_is_the_models_window(start_gateway, fake):
    fake.script("mine", listing({"id": "a:1b", "context_length": 4096, "capabilities": ["vision"]}, {"id": "b:7b"}))
    gateway = await start_gateway(MINE)
    await discovered(gateway)

    models = await models_of(gateway)

    assert (models["a:1b"]["context_window"], models["b:7b"]["context_window"]) == (4096, 32_768)
    assert (models["a:1b"]["supports_vision"], models["b:7b"]["supports_vision"]) == (1, 0)


@pytest.mark.parametrize(
    "reply", [error(500), body("<html>"), body({"data": "x"}), body({}), body([])], ids=["500", "HTML", "x", "{}", "[]"]
)
async def test_a_server_that_lists_nothing_disturbs_nobody(start_gateway, fake, reply):
    fake.script("mine", reply)
    gateway = await start_gateway(MINE | {"b": {}})
    await fake.arrived()

    assert (await gateway.chat()).text == "hello from b"


async def test_what_the_file_says_of_a_model_holds(start_gateway, fake):
    fake.script("mine", listing({"id": "a:1b", "context_length": 4096}, {"id": "b:7b"}))
    models = [{"model_id": "a:1b", "context_window": 9_999}]
    gateway = await start_gateway({"mine": MINE["mine"] | {"models": models}})

    await fake.arrived()
    for _ in range(500):
        if len(found := await models_of(gateway)) == 2:
            break

    assert found["a:1b"]["context_window"] == 9_999


async def test_a_discovered_model_stays_switched_off_over_a_restart(start_gateway, fake):
    fake.script("mine", listing({"id": "a:1b"}, {"id": "b:7b"}))
    gateway = await start_gateway(MINE)
    await discovered(gateway)
    id = (await models_of(gateway))["a:1b"]["id"]
    async with gateway.http.patch(
        f"{gateway.base_url}/api/models/{id}",
        json={"enabled": False},
        headers={"authorization": f"Bearer {gateway.api_key}"},
    ) as response:
        assert response.status == 200
    await gateway.stop()

    again = await start_gateway(MINE)

    assert await discovered(again) == ["b:7b"]


async def test_a_new_model_is_there_on_demand(start_gateway, fake):
    fake.script("mine", listing({"id": "a:1b"}))
    fake.script("off", error(500))
    gateway = await start_gateway(MINE | {"off": {"keyless": True, "discover": True, "models": []}})
    assert await discovered(gateway) == ["a:1b"]
    fake.script("mine", listing({"id": "a:1b"}, {"id": "b:7b"}))

    told = await gateway.send({}, path="/api/models/discover")

    assert told.json == [{"platform": "mine", "models": 2}, {"platform": "off", "models": None}]
    assert sorted(await models_of(gateway)) == ["a:1b", "b:7b"]
    assert (await gateway.chat(model="b:7b")).text == "I am b:7b"


async def test_a_model_that_is_no_longer_listed_is_gone_from_what_protection_shows(start_gateway, fake):
    fake.script("mine", listing({"id": "a:1b"}, {"id": "b:7b"}))
    gateway = await start_gateway(MINE)
    await discovered(gateway)
    fake.script("mine", lambda request: error(503) if request.method == "POST" else listing({"id": "b:7b"})(request))
    assert (await gateway.chat("hi", model="auto-smart")).status == 502
    assert set(await gateway.cooled_models()) == {"a:1b", "b:7b"}

    await gateway.send({}, path="/api/models/discover")

    assert set(await gateway.cooled_models()) == {"b:7b"}


async def test_a_server_with_a_key_is_asked_with_its_key(start_gateway, fake):
    fake.script("mine", listing({"id": "a:1b"}))
    await start_gateway({"mine": {"discover": True, "models": [], "keys": ["sk-my-own-key-0001"]}})

    await until(lambda: fake.requests)

    assert fake.requests[0].key == "sk-my-own-key-0001"


STRANGERS = {"kilo": "kilo-auto/free", "ovh": "gpt-oss-20b", "aihorde": "google/gemma-4-31b"}


async def test_public_services_without_keys_are_off_until_the_operators_file_says_keyless(start_gateway, fake):
    platforms = {id: {"keys": [], "models": [], "quirks": PLATFORM_QUIRKS.get(id, {})} for id in STRANGERS}
    gateway = await start_gateway(platforms)
    for platform, model in STRANGERS.items():
        assert (await gateway.chat(model=f"{platform}/{model}")).status == 503
    assert fake.called == []
    await gateway.stop()

    gateway = await start_gateway({id: given | {"keyless": True} for id, given in platforms.items()})

    for platform, model in STRANGERS.items():
        assert (await gateway.chat(model=f"{platform}/{model}")).text == f"hello from {platform}"
    sent = {request.platform: request.headers.get("authorization") for request in fake.requests}
    assert sent == {"kilo": None, "ovh": None, "aihorde": "Bearer 0000000000"}
