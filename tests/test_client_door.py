"""SPEC 3.9: how clients reach the door: addresses, keys, packed bodies, other protocols, web pages."""

import asyncio
import gzip
import json
import zlib
from functools import partial

import brotli
import pytest
from backports import zstd
from conftest import API_KEY, assert_error, case

from engine.address import tidy_path

KEY = f"Bearer {API_KEY}"

# --- Addresses ------------------------------------------------------------------------------------------------------

SPELLINGS = [
    "/v1/chat/completions/", "/v1/v1/chat/completions", "/chat/completions", "/v1//chat/completions",
    "//v1/chat/completions", "/v1/chat//completions//", "/openai/v1/chat/completions", "/openai/chat/completions",
    "/v1/openai/v1/chat/completions", "/openai/v1//chat/completions?api-version=2024-10-21",
    "/api/v1/chat/completions",
]  # fmt: skip


@pytest.fixture
async def gateway(start_gateway):
    return await start_gateway(["a", "b"])


@pytest.mark.parametrize("path", SPELLINGS)
async def test_the_address_may_be_spelled_in_several_ways(gateway, path):
    assert (await gateway.send(gateway.request(), path=path)).text == "hello from a"


DEPLOYMENTS = {
    "/openai/deployments/b-model/chat/completions?api-version=2024-10-21": "b",
    "/openai/deployments/b%2Fb-model/chat/completions": "b",
    "/openai/deployments/b/b-model/chat/completions": "b",
    "/openai//deployments/b-model//chat/completions/": "b",
    "/deployments/b-model/chat/completions": "b",
    "/v1/openai/deployments/b-model/chat/completions": "b",
    "/v1/engines/b-model/chat/completions": "b",
    "/openai/deployments/auto-priority/chat/completions": "a",
}


@pytest.mark.parametrize(("path", "platform"), DEPLOYMENTS.items())
@pytest.mark.parametrize("model", ["a-model", "gpt-4", None])
async def test_the_model_may_stand_in_the_address(gateway, path, platform, model):
    got = await gateway.send(gateway.request(model=model), path=path)

    assert got.text == f"hello from {platform}"
    assert got.headers["X-Routed-Via"] == f"{platform}/{platform}-model"


async def test_a_deployment_that_is_no_model_is_a_model_not_found(gateway, fake):
    got = await gateway.send(gateway.request(), path="/openai/deployments/nothing/chat/completions")

    assert_error(got, 400, "invalid_request_error", "model_not_found")
    assert "nothing" in got.error["message"]
    assert fake.called == []


async def test_other_endpoints_may_be_spelled_so_too(gateway):
    ids = [entry["id"] for entry in (await gateway.get("/v1/models")).json["data"]]
    for path in ("/openai/v1/models", "/models", "/v1//models/", "/openai/models?api-version=x"):
        with case(path):
            assert [entry["id"] for entry in (await gateway.get(path)).json["data"]] == ids
    got = await gateway.send({"model": "a-model", "input": "hi"}, path="/openai/v1/responses")
    assert got.json["output_text"] == "hello from a"


UNTOUCHED = [
    "/",
    "/healthz",
    "/api/keys",
    "/api/keys/1",
    "/metrics",
    "/v1",
    "/v2/models",
    "/nothing/v1/models",
    "/openai",
]


def test_what_is_no_spelling_of_an_endpoint_stays_as_it_is():
    assert [tidy_path(path) for path in UNTOUCHED] == [(path, None) for path in UNTOUCHED]


# --- Keys -----------------------------------------------------------------------------------------------------------

RIGHT = [
    {"authorization": KEY}, {"authorization": API_KEY}, {"authorization": f"bearer  {API_KEY} "},
    {"x-api-key": API_KEY}, {"api-key": API_KEY}, {"x-goog-api-key": API_KEY},
    {"authorization": "Bearer wrong", "x-api-key": API_KEY}, {"authorization": KEY, "api-key": "wrong"},
    {"x-api-key": "wrong", "x-goog-api-key": API_KEY}, {"authorization": "", "x-api-key": API_KEY},
]  # fmt: skip
WRONG = [
    {}, {"authorization": "Bearer"}, {"authorization": "wrong"}, {"authorization": f"Basic {API_KEY}"},
    {"x-api-key": "wrong", "api-key": "wrong", "x-goog-api-key": "wrong"}, {"x-api-key": KEY}, {"key": API_KEY},
]  # fmt: skip


async def status(gateway, headers: dict[str, str]) -> int:
    async with gateway.http.post(
        f"{gateway.base_url}/v1/chat/completions", json=gateway.request(), headers=headers
    ) as got:
        return got.status


async def test_one_right_key_is_enough_wherever_it_stands(gateway):
    for headers in RIGHT:
        with case(headers):
            assert await status(gateway, headers) == 200
    for headers in WRONG:
        with case(headers):
            assert await status(gateway, headers) == 401


# --- Packed bodies --------------------------------------------------------------------------------------------------


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def streamed_zstd(data: bytes) -> bytes:
    """As a client packs that does not know the length beforehand."""
    packer = zstd.ZstdCompressor()
    return packer.compress(data[:10], packer.FLUSH_BLOCK) + packer.compress(data[10:]) + packer.flush()


PACKERS = {
    "gzip": ("gzip", gzip.compress),
    "gzip by its old name": ("x-gzip", gzip.compress),
    "gzip in two members": ("gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("deflate", raw_deflate),
    "brotli": ("br", brotli.compress),
    "zstd": ("zstd", zstd.compress),
    "zstd, streamed": ("zstd", streamed_zstd),
    "zstd in two frames": ("zstd", lambda data: zstd.compress(data[:9]) + zstd.compress(data[9:])),
    "in capitals": ("ZSTD", zstd.compress),
    "twice": ("gzip, br", lambda data: brotli.compress(gzip.compress(data))),
    "not at all": ("identity", bytes),
}


@pytest.mark.parametrize(("encoding", "pack"), PACKERS.values(), ids=PACKERS)
async def test_a_packed_body_is_unpacked(gateway, fake, encoding, pack):
    packed = pack(json.dumps(gateway.request("hello")).encode())

    assert (await gateway.send(packed, headers={"content-encoding": encoding})).text == "hello from a"

    assert fake.requests[0].prompt == "hello"


async def test_every_endpoint_unpacks(gateway):
    packed = zstd.compress(json.dumps({"model": "a-model", "input": "hi"}).encode())

    got = await gateway.send(packed, path="/v1/responses", headers={"content-encoding": "zstd"})

    assert got.json["output_text"] == "hello from a"


BLANKS = b" " * 40_000_000
WIDE = {zstd.CompressionParameter.window_log: 27}  # 128 MB to unpack it, which a few bytes can ask for
BROKEN = {
    "not compressed": (b"{}", "gzip", 400),
    "gzip cut off": (gzip.compress(b'{"messages": []}' * 100)[:30], "gzip", 400),
    "brotli cut off": (brotli.compress(b'{"messages": []}' * 100)[:-2], "br", 400),
    "zstd cut off": (zstd.compress(b'{"messages": []}' * 100)[:-2], "zstd", 400),
    "zstd of too much memory": (zstd.compress(b"{}", options=WIDE)[:4] + b"\x00\x88" + b"\x00" * 9, "zstd", 400),
    "nothing": (b"", "gzip", 400),
    "nothing of brotli": (b"", "br", 400),
    "nothing of zstd": (b"", "zstd", 400),
    "an unknown packer": (b"{}", "compress", 415),
    "too many layers": (b"{}", "gzip, gzip, gzip, gzip", 415),
}
BOMBS = {  # packed in the test: it takes a moment, and each of the suite's processes reads this
    "a bomb": (gzip.compress, "gzip"),
    "a bomb of brotli": (partial(brotli.compress, quality=5), "br"),
    "a bomb of zstd": (zstd.compress, "zstd"),
    "a bomb in a bomb": (lambda data: brotli.compress(gzip.compress(data)), "gzip, br"),
}


@pytest.mark.parametrize(("content", "encoding", "status"), BROKEN.values(), ids=BROKEN)
async def test_a_body_that_cannot_be_unpacked_is_refused(gateway, fake, content, encoding, status):
    got = await gateway.send(content, headers={"content-encoding": encoding})

    assert got.status == status
    assert got.error["type"] == "invalid_request_error"
    assert fake.called == []


@pytest.mark.parametrize(("pack", "encoding"), BOMBS.values(), ids=BOMBS)
async def test_a_body_that_unpacks_without_end_is_refused(gateway, fake, pack, encoding):
    got = await gateway.send(pack(BLANKS), headers={"content-encoding": encoding})

    assert got.status == 413
    assert got.error["type"] == "invalid_request_error"
    assert fake.called == []


# --- Other protocols ------------------------------------------------------------------------------------------------

OFFER = [
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
]


class Wire:
    """One connection, byte by byte."""

    def __init__(self, gateway) -> None:
        self._address = gateway.base_url.removeprefix("http://").split(":")

    async def __aenter__(self) -> "Wire":
        self._reader, self.writer = await asyncio.open_connection(*self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(5):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            return int(head[0].split(" ")[1]), headers, await self._reader.readexactly(int(headers["content-length"]))


def request_bytes(gateway, *headers: str, prompt: str = "hi", chunked: bool = False) -> bytes:
    body = json.dumps(gateway.request(prompt)).encode()
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", f"Authorization: {KEY}", *headers, length, "", ""]
    if chunked:
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:7], body[7:])) + b"0\r\n\r\n"
    return "\r\n".join(head).encode() + body


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("step", [1, 7, 300, 100_000])
async def test_an_offer_of_http2_is_declined_and_the_body_served(gateway, fake, chunked, step):
    data = request_bytes(gateway, *OFFER, chunked=chunked)
    async with Wire(gateway) as wire:
        for place in range(0, len(data), step):
            wire.writer.write(data[place : place + step])
            await asyncio.sleep(0)

        code, _, body = await wire.answer()

    assert (code, json.loads(body)["choices"][0]["message"]["content"]) == (200, "hello from a")
    assert fake.requests[0].prompt == "hi"


@pytest.mark.parametrize(
    "offer", [["Connection: upgrade", "Upgrade: h2c"], ["Upgrade: TLS/1.0", "Connection: keep-alive,Upgrade"]]
)
async def test_a_connection_goes_on_after_offers(gateway, fake, offer):
    plain, offering = request_bytes(gateway, prompt="plain"), request_bytes(gateway, *offer, prompt="offering")
    async with Wire(gateway) as wire:
        wire.writer.write(plain + offering + offering + plain)

        answers = [(await wire.answer())[0] for _ in range(4)]

    assert answers == [200] * 4
    assert [request.prompt for request in fake.requests] == ["plain", "offering", "offering", "plain"]


async def test_an_offer_without_a_body_is_declined_too(gateway):
    lines = ["GET /v1/models HTTP/1.1", "Host: localhost", f"Authorization: {KEY}", *OFFER, "", ""]
    async with Wire(gateway) as wire:
        wire.writer.write("\r\n".join(lines).encode())

        assert (await wire.answer())[0] == 200


async def test_a_head_that_never_ends_is_refused_with_an_offer_as_without(gateway):
    async with Wire(gateway) as wire:
        wire.writer.write("\r\n".join(["POST / HTTP/1.1", "Host: localhost", *OFFER, "X: " + "x" * 100_000]).encode())

        assert (await wire.answer())[0] == 431


WEBSOCKET = [
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
]


@pytest.mark.parametrize(
    "path",
    ["/v1/responses", "/v1/realtime?model=x", "/v1/chat/completions", "/v1//responses", "/v1", "/openai/v1/responses"],
)
@pytest.mark.parametrize("authorized", [True, False])
async def test_a_websocket_attempt_is_told_to_come_back_without(gateway, path, authorized):
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: localhost",
        *WEBSOCKET,
        *([f"Authorization: {KEY}"] if authorized else []),
        "",
        "",
    ]
    async with Wire(gateway) as wire:
        wire.writer.write("\r\n".join(lines).encode())
        code, headers, body = await wire.answer()
        wire.writer.write(request_bytes(gateway))
        again = (await wire.answer())[0]

    assert (code, json.loads(body)["error"]["code"], headers["upgrade"]) == (426, "upgrade_required", "http/1.1")
    assert again == 200


# --- Web pages ------------------------------------------------------------------------------------------------------

PAGE = "https://chat.example"
ASKING = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}


@pytest.fixture
async def open_to_pages(start_gateway):
    return await start_gateway(["a"], {"GATEWAY_ORIGINS": f"{PAGE}, http://localhost:3000"})


async def options(gateway, path: str, headers: dict[str, str]):
    async with gateway.http.options(gateway.base_url + path, headers=headers) as got:
        await got.read()
        return got


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/models", "/v1/responses", "/v1//chat/completions", "/chat/completions"]
)
async def test_a_listed_page_may_ask_without_a_key_whether_it_may_ask(open_to_pages, path):
    for origin in (PAGE, "http://localhost:3000"):
        got = await options(open_to_pages, path, {"origin": origin, **ASKING})

        assert got.status == 204
        assert got.headers["access-control-allow-origin"] == origin
        assert "POST" in got.headers["access-control-allow-methods"]
        assert got.headers["access-control-allow-headers"] == ASKING["access-control-request-headers"]
        assert "access-control-allow-credentials" not in got.headers


async def test_a_listed_page_may_read_every_answer(open_to_pages):
    for headers, status in (({}, 200), ({"authorization": "Bearer wrong"}, 401)):
        got = await open_to_pages.chat(headers={"origin": PAGE, **headers})
        assert (got.status, got.headers["access-control-allow-origin"], got.headers["vary"]) == (status, PAGE, "Origin")
    got = await open_to_pages.stream(headers={"origin": PAGE})
    assert got.headers["access-control-allow-origin"] == PAGE
    got = await open_to_pages.get("/v1/models", headers={"origin": PAGE})
    assert got.headers["access-control-allow-origin"] == PAGE
    got = await open_to_pages.send({"messages": 5}, headers={"origin": PAGE})
    assert (got.status, got.headers["access-control-allow-origin"]) == (400, PAGE)


async def test_a_local_address_may_be_asked_from_the_web_where_the_browser_wants_to_know(open_to_pages):
    got = await options(
        open_to_pages, "/v1/models", {"origin": PAGE, "access-control-request-private-network": "true", **ASKING}
    )

    assert got.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://chat.example", f"{PAGE}.evil.example", "null", f"{PAGE}:444"]
)
async def test_other_pages_get_nothing(open_to_pages, origin):
    asked = await options(open_to_pages, "/v1/chat/completions", {"origin": origin, **ASKING})
    got = await open_to_pages.chat(headers={"origin": origin})

    assert asked.status == 401
    assert not [name for name in (*asked.headers, *got.headers) if name.lower().startswith("access-control-")]


@pytest.mark.parametrize("path", ["/api/keys", "/metrics", "/healthz", "/"])
async def test_the_operators_side_is_open_to_no_page(open_to_pages, path):
    asked = await options(open_to_pages, path, {"origin": PAGE, **ASKING})
    got = await open_to_pages.get(path, headers={"origin": PAGE})

    assert not [name for name in (*asked.headers, *got.headers) if name.lower().startswith("access-control-")]


async def test_a_star_opens_to_every_page_but_not_under_a_foreign_host(start_gateway):
    gateway = await start_gateway(["a"], {"GATEWAY_ORIGINS": "*"})

    assert (await gateway.chat(headers={"origin": "https://any.example"})).headers["access-control-allow-origin"]
    assert (await options(gateway, "/v1/models", {"origin": PAGE, "host": "evil.example", **ASKING})).status == 403
