"""SPEC 1, 2.3 and 12.2 at the real thing: `python gateway.py` started, stopped, killed and misconfigured."""

import asyncio
import contextlib
import re
import resource
import signal
import socket
import sqlite3
import time

import aiohttp
import pytest
from conftest import API_KEY, Client, Process, client_of, files_of, logged, stored_keys
from fake_provider import Wait, answer, assert_in_time, chunk, event, in_time, sse, until

GIVEN_KEY = {"GATEWAY_API_KEY": API_KEY}
FIRST = event(chunk("begun "))
ANOTHER_KEY = "ab" * 32


def printed_key(running: Process) -> str:
    """The API key that a first start prints."""
    (line,) = [line for line in running.output if re.search(r"\bapi key\b", line, re.IGNORECASE)]
    (key,) = re.findall(r"[A-Za-z0-9_-]{16,}", line)
    return key


# --- First start ------------------------------------------------------------------------------------------------


async def test_a_first_start_without_anything_prints_what_is_needed_and_the_demo_answers(start_process, tmp_path):
    running = await start_process()
    base_url = await running.ready()
    await until(lambda: re.search("api key", running.text, re.IGNORECASE))

    async with client_of(running, printed_key(running)) as client:
        for name in (..., "auto", "auto-smart", "auto-fast", "auto-priority", "demo"):
            whole = await client.chat("hello there", model=name)
            streamed = await client.stream("hello there", model=name)
            assert "demo" in whole.text.lower()
            assert "demo" in streamed.text.lower()
            assert streamed.finishes == ["stop"]
            streamed.assert_done_once()
            assert whole.headers["X-Routed-Via"].startswith("demo/")
        assert (await client.send({"messages": []})).status == 400

    assert base_url in running.text
    assert {"gateway.db", "gateway.db.key"} <= set(files_of(tmp_path))
    assert (tmp_path / "gateway.db.key").stat().st_mode & 0o777 == 0o600
    running.signal(signal.SIGINT)
    assert await running.ended() == 0


async def test_a_second_start_keeps_the_key_and_does_not_print_it(start_process, tmp_path):
    first = await start_process()
    await first.ready()
    await until(lambda: re.search("api key", first.text, re.IGNORECASE))
    key = printed_key(first)
    first.signal(signal.SIGTERM)
    assert await first.ended() == 0

    second = await start_process()

    async with client_of(second, key) as client:
        assert (await client.chat()).status == 200
    second.signal(signal.SIGTERM)
    assert await second.ended() == 0
    assert key not in second.text
    assert key.encode() not in b"".join(files_of(tmp_path).values())


async def test_the_demo_steps_back_for_a_real_platform_but_answers_to_its_name(start_process, fake):
    running = await start_process({"a": {"keyless": True}}, GIVEN_KEY)

    async with client_of(running) as client:
        assert (await client.chat(model="auto")).text == "hello from a"
        assert (await client.chat(model="demo")).headers["X-Routed-Via"].startswith("demo/")

    assert fake.called == ["a"]


async def test_the_start_names_the_platforms_with_keys(start_process, fake):
    running = await start_process({"plat-with-key": {}, "plat-without": {"keys": []}}, GIVEN_KEY)
    await running.ready()
    await until(lambda: "plat-with-key" in running.text)
    running.signal(signal.SIGTERM)
    assert await running.ended() == 0

    assert "plat-without" not in running.text
    assert "sk-plat-with-key" not in running.text


# --- Stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_lets_streams_finish_writes_their_rows_and_exits_cleanly(start_process, fake, tmp_path, number):
    go_on = asyncio.Event()
    fake.script("a", sse(chunk("begun "), Wait(go_on), chunk("and done"), chunk(finish="stop")))
    running = await start_process(["a"], GIVEN_KEY)

    async with client_of(running) as client, contextlib.AsyncExitStack() as open_streams:
        opening = [client.post(client.request(stream=True)) for _ in range(10)]
        streams = [await open_streams.enter_async_context(stream) for stream in opening]
        for stream in streams:
            assert await stream.content.readexactly(len(FIRST)) == FIRST
        running.signal(number)
        await until(lambda: refuses(client.base_url))
        go_on.set()
        rests = await asyncio.gather(*[stream.read() for stream in streams])

    assert await running.ended() == 0
    assert all(rest.endswith(b"data: [DONE]\n\n") and b"and done" in rest for rest in rests)
    assert [row["status"] for row in logged(tmp_path / "gateway.db")] == ["success"] * 10
    assert "Traceback" not in running.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_right_after_the_announcement_is_not_lost(start_process, number):
    running = await start_process(settings=GIVEN_KEY)
    await until(lambda: running.output)
    running.signal(number)

    assert await running.ended() == 0
    assert "Traceback" not in running.text


def refuses(base_url: str) -> bool:
    host, port = base_url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


async def test_a_stop_right_after_an_answer_loses_no_row(start_process, fake, tmp_path):
    running = await start_process(["a"], GIVEN_KEY)
    async with client_of(running) as client:
        answers = await asyncio.gather(*[client.chat(f"request {n}") for n in range(50)])
        running.signal(signal.SIGTERM)
    assert await running.ended() == 0

    assert {row["request_id"] for row in logged(tmp_path / "gateway.db")} == {
        answer.headers["X-Request-Id"] for answer in answers
    }


async def test_a_kill_under_load_harms_no_file_and_loses_the_last_moment_at_most(start_process, fake, tmp_path):
    running = await start_process(["a", "b"], GIVEN_KEY)
    answered: dict[str, float] = {}

    async def load(client: Client) -> None:
        while running.running:
            try:
                got = await client.ask(streaming=len(answered) % 2 == 0)
            except (aiohttp.ClientError, OSError):
                return
            answered[got.headers["X-Request-Id"]] = time.time()

    async with client_of(running) as client:
        clients = [asyncio.create_task(load(client)) for _ in range(20)]
        await until(lambda: len(answered) > 300, within_s=20)
        killed_at = time.time()
        running.signal(signal.SIGKILL)
        await running.ended()
        await asyncio.gather(*clients)

    with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    kept = {row["request_id"] for row in logged(tmp_path / "gateway.db")}
    lost = [answered_at for request_id, answered_at in answered.items() if request_id not in kept]
    oldest_s = max((killed_at - answered_at for answered_at in lost), default=0.0)
    assert_in_time(oldest_s, 0.15)  # 100 ms, and ours to notice the answer
    again = await start_process(["a", "b"], GIVEN_KEY)
    async with client_of(again) as client:
        assert (await client.chat()).text == "hello from a"


# --- The encryption key -----------------------------------------------------------------------------------------


async def test_a_wrong_encryption_key_stops_the_start_and_changes_nothing(start_gateway, start_process, fake, tmp_path):
    await stopped_once(start_gateway, {"ENCRYPTION_KEY": "cd" * 32})
    before = files_of(tmp_path)

    refused = await start_process(["a"], GIVEN_KEY | {"ENCRYPTION_KEY": ANOTHER_KEY})

    assert await refused.ended() != 0
    assert_one_clear_line(refused, "ENCRYPTION_KEY")
    assert ANOTHER_KEY not in refused.text
    assert files_of(tmp_path) == before


async def test_a_lost_key_file_stops_the_start_and_changes_nothing(start_gateway, start_process, fake, tmp_path):
    await stopped_once(start_gateway, {})
    (tmp_path / "gateway.db.key").unlink()
    before = files_of(tmp_path)

    refused = await start_process(["a"], GIVEN_KEY)

    assert await refused.ended() != 0
    assert_one_clear_line(refused, "gateway.db.key")
    assert files_of(tmp_path) == before


async def test_a_damaged_key_file_stops_the_start_and_changes_nothing(start_gateway, start_process, fake, tmp_path):
    await stopped_once(start_gateway, {})
    (tmp_path / "gateway.db.key").write_text("not a key")
    before = files_of(tmp_path)

    refused = await start_process(["a"], GIVEN_KEY)

    assert await refused.ended() != 0
    assert_one_clear_line(refused, "gateway.db.key")
    assert files_of(tmp_path) == before


async def test_a_file_that_is_no_database_stops_the_start_and_stays(start_process, fake, tmp_path):
    (tmp_path / "gateway.db").write_bytes(b"my only copy of something else " * 100)
    before = (tmp_path / "gateway.db").read_bytes()

    refused = await start_process(["a"], GIVEN_KEY)

    assert await refused.ended() != 0
    assert_one_clear_line(refused, "gateway.db")
    assert (tmp_path / "gateway.db").read_bytes() == before


async def stopped_once(start_gateway, settings: dict[str, str]) -> None:
    """A database with keys in it."""
    running = await start_gateway(["a"], settings)
    assert (await running.chat()).status == 200
    await running.stop()


def assert_one_clear_line(running: Process, *words: str) -> None:
    """The output is one line for a human, which names what is wrong."""
    lines = [line for line in running.output if line.strip()]
    assert len(lines) == 1, running.text
    for word in words:
        assert word in lines[0]


# --- Settings of the process ------------------------------------------------------------------------------------


async def test_a_malformed_setting_stops_the_start_with_one_line(start_process):
    refused = await start_process(settings={"MAX_STREAM_STALL_MS": "soon"})

    assert await refused.ended() != 0
    assert_one_clear_line(refused, "MAX_STREAM_STALL_MS", "soon")


async def test_an_unknown_flag_stops_the_start(start_process):
    refused = await start_process(flags=("--colour", "red"))

    assert await refused.ended() != 0
    assert "--colour" in refused.text
    assert "Traceback" not in refused.text


async def test_a_port_in_use_stops_the_start_with_one_line(start_process):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])

        refused = await start_process(settings=GIVEN_KEY, flags=("--port", port))

        assert await refused.ended() != 0
        assert_one_clear_line(refused, port)


async def test_a_short_key_is_refused_where_others_can_reach_it(start_process):
    refused = await start_process(settings={"GATEWAY_API_KEY": "tiny-api-key", "GATEWAY_HOST": "0.0.0.0"})

    assert await refused.ended() != 0
    assert_one_clear_line(refused, "16")
    assert "tiny-api-key" not in refused.text


async def test_flags_beat_the_environment_which_beats_the_env_file(start_process, fake, tmp_path):
    (tmp_path / ".env").write_text("GATEWAY_DB=from-file.db\nGATEWAY_API_KEY=fw-file-0123456789abcdef\n# a comment\n")
    environment = {"GATEWAY_DB": "from-environment.db"}

    running = await start_process(["a"], environment, flags=("--db", "from-flag.db"))

    async with client_of(running, "fw-file-0123456789abcdef") as client:
        assert (await client.chat()).text == "hello from a"
    assert {path.name for path in tmp_path.glob("*.db")} == {"from-flag.db"}


async def test_a_database_that_is_locked_delays_no_request_and_loses_no_row(start_gateway, fake, tmp_path):
    gateway = await start_gateway(["a"], {"STATS_REFRESH_MS": "20"})
    fake.script("a", answer())
    with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        async with in_time(1):
            for n in range(20):
                assert (await gateway.ask(streaming=bool(n % 2))).status == 200
        assert (await gateway.get("/api/requests")).json == {"rows": []}  # by now the statistics have waited in vain
        assert (await gateway.chat()).status == 200
        other.execute("ROLLBACK")
    await gateway.rows(21)
    assert {key["status"] for key in stored_keys(tmp_path / "gateway.db").values()} == {"healthy"}
    assert (await gateway.chat()).status == 200


async def test_a_gateway_that_may_open_no_more_files_blames_no_provider_for_it(start_process, fake):
    elsewhere = {"base_url": fake.url("b").replace("127.0.0.1", "127.0.0.2")}  # no connection of a's will do
    running = await start_process({"a": {}, "b": elsewhere}, GIVEN_KEY)
    pid = running.process.pid
    async with client_of(running) as client:
        assert (await client.chat(model="a-model")).status == 200  # from now on there is a connection to each side
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))

        got = await client.chat(model="b-model")

        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert (got.text, got.headers["X-Fallback-Trail"]) == ("hello from a", "b/b-model=connection")
        assert await client.cooled_models() == {}


async def test_old_rows_are_removed_at_start(start_gateway, fake, tmp_path):
    await stopped_once(start_gateway, {})
    with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db")) as connection, connection:
        connection.execute("UPDATE requests SET created_at = '2020-01-01T00:00:00.000Z'")

    running = await start_gateway(["a"])
    request_id = (await running.chat()).headers["X-Request-Id"]

    await until(lambda: {row["request_id"] for row in logged(tmp_path / "gateway.db")} == {request_id})
