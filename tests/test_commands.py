"""SPEC 21.5 and 21.6: `python gateway.py doctor`, `clients` and `drill`, as an operator runs them.

Of each kind one runs as a process of its own; the others are called as `main` calls them, which takes a tenth of the
time.
"""

import asyncio
import json
import re
import socket
import time
from email.utils import formatdate

import pytest
from conftest import API_KEY, PLAIN, ROOT, catalog_of, files_of
from fake_provider import STOP, body, chunk, error, refusing_url, sse

from admin.commands import COMMANDS
from admin.doctor import Verdict, about_port
from config.settings import load_settings
from transport.upstream import Upstream
from wire.http import NO_PROXIES

KEY = {"GATEWAY_API_KEY": API_KEY}
README = (ROOT / "README.md").read_text()
SECRET = "sk-a-secret-0001"
MODELS = body({"object": "list", "data": [{"id": "a-model"}]})


async def run_process(start_process, *words: str, platforms=None, settings=None) -> tuple[int, str]:
    running = await start_process(platforms, KEY | (settings or {}), flags=words)
    status = await running.ended()
    assert "Traceback" not in running.text
    return status, running.text


@pytest.fixture
def run(fake, tmp_path):
    """Run a command as `main` does, with these settings only; `platforms=None` leaves the built-in catalogue alone."""

    async def run(word: str, *flags: str, platforms=None, settings=None) -> tuple[int, str]:
        environ = {"GATEWAY_PORT": "0", **PLAIN, **KEY, **(settings or {})}
        if platforms is not None:
            catalog = tmp_path / "asked-catalog.json"
            catalog.write_text(json.dumps(catalog_of(platforms, fake)))
            environ["GATEWAY_CATALOG"] = str(catalog)
        said: list[str] = []
        status = await asyncio.to_thread(COMMANDS[word], flags, environ, tmp_path, said.append)
        return status, "\n".join(said)

    return run


def lines_about(text: str, word: str) -> str:
    """The report's lines that name this, each with what is to be done."""
    return "\n".join(found for found in re.split(r"\n(?=\S)", text) if word in found)


# --- Doctor -----------------------------------------------------------------------------------------------------------


async def test_when_all_is_well_it_says_so_and_changes_nothing(start_process, fake, tmp_path):
    fake.script("a", MODELS)

    status, text = await run_process(start_process, "doctor", platforms=["a"])

    assert (status, text.splitlines()[-1]) == (0, "All is well.")
    for word in ("settings", "catalogue", "database", "port", "clock", "key of a"):
        assert lines_about(text, word), word
    assert "!!" not in text
    assert SECRET not in text and "secret" not in text
    assert {request.method for request in fake.requests} == {"GET"}
    assert files_of(tmp_path) == {}


async def test_each_key_is_asked_for_and_what_is_to_be_done_is_said(run, fake):
    fake.script("a", error(401, f"Incorrect API key provided: {SECRET}"))
    fake.script("b", MODELS)
    fake.script("c", error(429, headers={"retry-after": "7"}))
    with refusing_url() as nowhere:
        platforms = {"a": {"signup_url": "https://keys.test"}, "b": {}, "c": {}, "d": {"base_url": nowhere}}

        status, text = await run("doctor", platforms=platforms)

    assert status == 1
    assert "works" in lines_about(text, "key of b")
    assert "!!" in lines_about(text, "key of a")
    assert "https://keys.test" in lines_about(text, "key of a")
    assert "!!" not in lines_about(text, "key of c")
    assert "D_BASE_URL" in lines_about(text, "key of d")
    assert "secret" not in text and "sk-" not in text


async def test_no_key_at_all_is_something_to_do_and_a_local_server_is_not(run, fake):
    status, text = await run("doctor")
    assert status == 1
    assert "!!" in lines_about(text, "keys")

    fake.script("box", MODELS)
    status, text = await run("doctor", platforms={"box": {"keyless": True, "local": True}})
    assert status == 0, text
    assert "1 models" in lines_about(text, "local server box")


async def test_a_gateway_that_may_ask_nobody_is_told_so(run, fake):
    for name in "ab":
        fake.script(name, MODELS)
    private, paid = {"GATEWAY_PRIVACY": "no-train"}, {"key": "sk-paid", "trains_on_prompts": False}

    status, text = await run("doctor", platforms=["a"], settings=private)
    assert status == 1
    assert "!!" in lines_about(text, "privacy")

    platforms = {"a": {"trains_on_prompts": True}, "b": {"trains_on_prompts": True, "keys": [paid]}}
    status, text = await run("doctor", platforms=platforms, settings=private)
    assert (status, lines_about(text, "privacy")) == (0, "ok  privacy: no-train: b may be asked, and nobody else")
    assert "privacy" not in (await run("doctor", platforms=["a"]))[1]


async def test_a_platform_of_embeddings_alone_has_its_key_checked_too(run, fake):
    fake.script("a", MODELS)
    platforms = {"a": {"model": {"model_id": "e", "kind": "embedding", "family": "e"}}}

    status, text = await run("doctor", platforms=platforms)

    assert (status, "works" in lines_about(text, "key of a")) == (0, True)


async def test_a_local_server_that_is_not_running_is_told(run):
    with refusing_url() as nowhere:
        platforms = {"box": {"keyless": True, "local": True, "base_url": nowhere}}
        status, text = await run("doctor", platforms=platforms)

    assert status == 1
    assert "BOX_BASE_URL" in lines_about(text, "local server box")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"GATEWAY_PORT": "many"}, "GATEWAY_PORT"),
        ({"STICKY_TTL_MS": "0"}, "STICKY_TTL_MS"),
        ({"GATEWAY_HOST": "0.0.0.0", "GATEWAY_API_KEY": "short"}, "16"),
        ({"GATEWAY_CATALOG": "/nowhere.json"}, "nowhere.json"),
        ({"HTTPS_PROXY": "ftp://x"}, "HTTPS_PROXY"),
    ],
)
async def test_settings_that_would_stop_the_start_are_told(run, settings, word):
    status, text = await run("doctor", settings=settings)

    assert status == 1
    assert "!!" in text and word in text


async def test_a_port_that_something_else_has_is_told_and_the_flag_is_read(run):
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as taken:
        port = str(taken.sockets[0].getsockname()[1])
        status, text = await run("doctor", "--port", port)

    assert status == 1
    assert "!!" in lines_about(text, "port")
    assert port in lines_about(text, "port")


async def test_a_port_at_which_nothing_is_ever_said_is_not_waited_for_long(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = load_settings(["--port", str(port)], KEY, tmp_path)

        async with Upstream(1.0, proxies=NO_PROXIES) as here:
            found = await about_port(settings, here, ask_s=0.05)

    assert found.verdict is Verdict.ACT
    assert str(port) in found.words


async def test_a_running_gateway_is_no_trouble(start_gateway, run, fake, tmp_path):
    fake.script("a", MODELS)
    serving = await start_gateway(["a"])
    port = serving.base_url.rpartition(":")[2]

    status, text = await run("doctor", "--port", port, platforms=["a"])

    assert status == 0, text
    assert "already" in lines_about(text, "port")
    assert "1 keys" in lines_about(text, "database")
    assert "key file" in text


async def test_keys_of_the_database_are_checked_though_no_file_names_them(start_gateway, run, fake):
    await start_gateway(["a"])
    fake.script("a", error(401))

    status, text = await run("doctor", platforms={"a": {"keys": []}})

    assert status == 1
    assert "!!" in lines_about(text, "key of a")


async def test_a_key_file_that_is_gone_wrong_or_open_is_told(start_gateway, run, fake, tmp_path):
    fake.script("a", MODELS)
    await start_gateway(["a"])
    key_file = tmp_path / "gateway.db.key"

    key_file.chmod(0o644)
    status, text = await run("doctor", platforms=["a"])
    assert (status, f"chmod 600 {key_file}" in text) == (1, True)
    key_file.chmod(0o600)
    kept = key_file.read_text()
    key_file.write_text("ab" * 32)
    status, text = await run("doctor", platforms=["a"])
    assert status == 1 and "!!" in lines_about(text, "database")
    key_file.unlink()
    status, text = await run("doctor", platforms=["a"])
    assert status == 1 and "missing" in text
    assert not key_file.exists()
    assert kept.strip() not in text


async def test_a_file_that_is_no_database_is_told(run, tmp_path):
    (tmp_path / "other.db").write_bytes(b"not a database at all, whatever its name may say" * 100)

    status, text = await run("doctor", "--db", "other.db")

    assert status == 1
    assert "!!" in lines_about(text, "other.db")
    assert (tmp_path / "other.db").read_bytes().startswith(b"not a database")


@pytest.mark.parametrize(("ahead_s", "status"), [(0, 0), (30, 0), (7200, 1), (-7200, 1)])
async def test_a_clock_that_is_wrong_is_told(run, fake, ahead_s, status):
    date = formatdate(time.time() - ahead_s, usegmt=True)
    fake.script("a", body({"data": []}, headers={"date": date}))

    got, text = await run("doctor", platforms=["a"])

    assert got == status, text
    assert ("!!" in lines_about(text, "clock")) == bool(status)


async def test_an_unknown_word_is_refused(start_process):
    assert (await run_process(start_process, "docter"))[0] == 2


# --- Clients ----------------------------------------------------------------------------------------------------------


async def test_the_recipes_of_all_clients_are_printed_with_this_gateways_address_and_without_its_key(start_process):
    section = README.split("\n## Clients\n")[1].split("\n## ")[0]
    named = re.findall(r"^- \*\*(.+?)\*\*", section, re.MULTILINE)
    assert len(named) >= 8

    status, text = await run_process(start_process, "clients", "--port", "8123")

    assert status == 0
    assert all(f"**{name}**" in text for name in named)
    assert "http://127.0.0.1:8123/v1" in text
    assert "curl" in text and "OpenAI(" in text
    assert ":8000" not in text
    assert API_KEY not in text and "fw-local-development" not in text


async def test_a_gateway_on_every_address_is_reached_by_this_machines_own(run):
    status, text = await run("clients", "--host", "0.0.0.0", "--port", "9")

    assert status == 0
    assert "http://127.0.0.1:9/v1" in text


# --- Drill ------------------------------------------------------------------------------------------------------------

TEXT = "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve and so on"
WORDED = sse(*(chunk(word) for word in re.findall(r"\S+ ?", TEXT)), STOP)
QUICK = {"RESCUE": "on", "RESCUE_AFTER_MS": "60", "GATEWAY_ADMIN_KEY": "admin-0123456789abcdef"}


async def test_a_drill_prints_its_table_and_its_exit_status_tells_how_it_went(start_gateway, start_process, run, fake):
    fake.script("a", WORDED)
    fake.script("b", WORDED)
    serving = await start_gateway(["a", "b"], QUICK)
    port = serving.base_url.rpartition(":")[2]

    status, text = await run_process(start_process, "drill", "--port", port, platforms=["a", "b"], settings=QUICK)

    assert status == 0, text
    head, *rows, last = text.splitlines()
    assert [row.split()[:2] for row in rows] == [
        [case, "whole"] for case in ("cut=2", "stall=2", "error=2", "429", "503", "empty")
    ]
    assert {row.split()[2] for row in rows} <= {"a/a-model", "b/b-model"}
    assert (head.split()[0], last) == ("case", "Every answer was whole.")

    fake.script("b", error(503, "down"))
    fake.script("a", error(503, "down"))
    status, text = await run("drill", "--port", port, platforms=["a", "b"], settings=QUICK)
    assert status == 1
    assert "BROKEN" in text


async def test_a_drill_finds_the_key_that_the_gateway_made(start_gateway, run, fake):
    fake.script("a", WORDED)
    fake.script("b", WORDED)
    unnamed = {"GATEWAY_API_KEY": ""}
    serving = await start_gateway(["a", "b"], {"RESCUE": "on", "RESCUE_AFTER_MS": "60"} | unnamed)

    port = serving.base_url.rpartition(":")[2]
    status, text = await run("drill", "--port", port, platforms=["a", "b"], settings=unnamed)

    assert status == 0, text
    assert "fw-" not in text


async def test_without_a_gateway_there_is_no_drill(run):
    with refusing_url() as nowhere:
        port = nowhere.rpartition(":")[2].partition("/")[0]
        status, text = await run("drill", "--port", port)

    assert status == 2
    assert "running" in text


async def test_the_wrong_admin_key_is_told(start_gateway, run, fake):
    serving = await start_gateway(["a"], QUICK)
    port = serving.base_url.rpartition(":")[2]
    other = {"GATEWAY_ADMIN_KEY": "another-0123456789abcdef"}

    status, text = await run("drill", "--port", port, platforms=["a"], settings=other)

    assert status == 2
    assert "API key" in text and "another" not in text
    assert json.dumps(fake.called) == "[]"
