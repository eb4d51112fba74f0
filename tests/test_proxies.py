"""Providers behind the operator's proxies: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY (SPEC 1.3)."""

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from certificates import certificate
from conftest import API_KEY, case, client_of
from fake_provider import FakeProvider, answer, error

from config.proxies import proxies
from config.settings import SettingsError
from transport.upstream import ConnectionBroken, Upstream
from wire.http import Endpoint, Proxies, matches

GREETING = base64.b64encode(b"me:s3cr@t").decode()


@dataclass
class Proxy:
    """A forward proxy that tunnels and passes on; with `login` it insists on one."""

    login: str = ""
    asked: list[str] = field(default_factory=list)  # the request lines it has seen
    headers: list[dict[str, str]] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Proxy"]:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        try:
            yield self
        finally:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        there: asyncio.StreamWriter | None = None
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, target, _ = lines[0].split(" ")
                if not self._admits(lines):
                    writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                    continue
                if there is None:
                    host, _, port = (target if method == "CONNECT" else target.split("/")[2]).rpartition(":")
                    answers, there = await asyncio.open_connection(host, int(port))
                    self._tasks.add(asyncio.create_task(pipe(answers, writer)))
                if method == "CONNECT":
                    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    await pipe(reader, there)
                    break
                passed = [line for line in lines[1:] if not line.lower().startswith("proxy-")]
                there.write("\r\n".join([f"{method} /{target.split('/', 3)[3]} HTTP/1.1", *passed]).encode())
                there.write(await reader.readexactly(int(self.headers[-1].get("content-length", "0"))))
        for end in filter(None, (there, writer)):
            end.close()

    def _admits(self, lines: list[str]) -> bool:
        headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines[1:-2])}
        self.asked.append(lines[0])
        self.headers.append(headers)
        return not self.login or headers.get("proxy-authorization") == f"Basic {self.login}"


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    async with Proxy().serving() as running:
        yield running


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
async def test_a_provider_is_called_through_the_proxy(start_gateway, fake, proxy, name, streaming):
    gateway = await start_gateway(["a"], {name: f"http://{proxy.address}"})
    fake.script("a", answer("by proxy"))

    for _ in range(2):
        assert (await gateway.ask(streaming=streaming)).text == "by proxy"

    address = fake.url("a")
    assert proxy.asked == [f"POST {address}/chat/completions HTTP/1.1"] * 2
    assert (fake.called, fake.connections) == (["a", "a"], 1)


async def test_a_login_in_the_proxys_address_is_sent_to_the_proxy_alone(start_gateway, fake, proxy):
    proxy.login = GREETING
    gateway = await start_gateway(["a"], {"HTTP_PROXY": f"me:s3cr%40t@{proxy.address}"})
    fake.script("a", answer("known"))

    assert (await gateway.chat()).text == "known"

    assert "proxy-authorization" not in fake.requests[0].headers
    assert fake.requests[0].headers["authorization"].startswith("Bearer ")


async def test_a_proxy_that_refuses_is_a_failed_attempt(start_gateway, fake, proxy):
    proxy.login = GREETING
    gateway = await start_gateway(["a"], {"HTTP_PROXY": proxy.address})

    assert (await gateway.chat()).status >= 400
    assert fake.called == []


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
@pytest.mark.parametrize("exempt", ["127.0.0.1", "example.com, 127.0.0.0/8", "*"])
async def test_what_no_proxy_names_is_called_directly(start_gateway, fake, proxy, name, exempt):
    gateway = await start_gateway(["a"], {"HTTP_PROXY": proxy.address, name: exempt})

    assert (await gateway.chat()).status == 200

    assert proxy.asked == []


async def test_a_proxy_for_https_is_not_used_for_http(start_gateway, fake, proxy):
    gateway = await start_gateway(["a"], {"HTTPS_PROXY": proxy.address})

    assert (await gateway.chat()).status == 200

    assert proxy.asked == []


@pytest.mark.parametrize("login", ["", GREETING], ids=["open", "with a login"])
async def test_tls_goes_through_the_proxys_tunnel(start_process, tmp_path, proxy, login):
    pem = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    proxy.login = login
    address = f"http://me:s3cr%40t@{proxy.address}" if login else proxy.address
    async with FakeProvider().serving(tls=context) as secure:
        settings = {"GATEWAY_API_KEY": API_KEY, "SSL_CERT_FILE": str(pem), "https_proxy": address}
        running = await start_process({"a": {"base_url": secure.url("a")}}, settings)
        async with client_of(running) as client:
            for streaming in (False, True):
                assert (await client.ask(streaming=streaming)).text == "hello from a"
        host = secure.url("a").split("/")[2]
        assert proxy.asked == [f"CONNECT {host} HTTP/1.1"]
        assert "authorization" not in proxy.headers[0]  # the provider's key is inside the tunnel


async def test_a_tunnel_that_is_refused_raises_our_own_exception(proxy):
    proxy.login = GREETING
    async with Upstream(1.0, proxies=Proxies(https=f"http://{proxy.address}")) as upstream:
        with pytest.raises(ConnectionBroken) as raised:
            await upstream.start("POST", Endpoint("https://127.0.0.1:1/v1", {"Authorization": "Bearer sk-1"}), b"{}")
    assert "sk-1" not in str(raised.value)


async def test_a_silent_tunnel_counts_as_connecting(fake):
    fake.script("x", error(500))
    async with await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0) as silent:
        address = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        async with Upstream(0.05, proxies=Proxies(https=address)) as upstream:
            with pytest.raises(Exception, match="in time"):
                await upstream.start("POST", Endpoint("https://127.0.0.1:1/v1", {}), b"{}")


# --- Reading the settings -------------------------------------------------------------------------------------------

EXEMPT = ("a.example", ".b.example", "10.0.0.0/8")
READ = {
    "none": ({}, Proxies()),
    "with a scheme": ({"HTTPS_PROXY": "http://p:1"}, Proxies(https="http://p:1")),
    "without one": ({"HTTP_PROXY": "p:1"}, Proxies(http="http://p:1")),
    "lower case first": ({"http_proxy": "low:1", "HTTP_PROXY": "up:1"}, Proxies(http="http://low:1")),
    "one for all": ({"ALL_PROXY": "p:1", "HTTPS_PROXY": "s:1"}, Proxies(http="http://p:1", https="http://s:1")),
    "over TLS": ({"HTTPS_PROXY": "https://p"}, Proxies(https="https://p")),
    "exempt": ({"NO_PROXY": " a.example, .b.example ,,10.0.0.0/8 "}, Proxies(exempt=EXEMPT)),
}


@pytest.mark.parametrize(("environ", "expected"), READ.values(), ids=READ)
def test_the_proxies_are_read_from_the_environment(environ, expected):
    assert proxies(environ) == expected


@pytest.mark.parametrize("text", ["socks5://me:secret@p:1", "http://", "http://p:99999", "http://[::1", "ftp://secret"])
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_that_cannot_be_used_stops_the_start_and_is_not_shown(name, text):
    with pytest.raises(SettingsError) as refused:
        proxies({name: text})

    assert name in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "http://" in str(refused.value)


MATCHES = [
    ("*", "api.example.com", 443, True),
    ("example.com", "example.com", 443, True),
    ("example.com", "api.example.com", 443, True),
    ("example.com", "notexample.com", 443, False),
    (".example.com", "api.example.com", 443, True),
    ("*.example.com", "api.example.com", 443, True),
    ("EXAMPLE.com", "api.Example.COM", 443, True),
    ("example.com:443", "example.com", 443, True),
    ("example.com:8443", "example.com", 443, False),
    ("127.0.0.1", "127.0.0.1", 80, True),
    ("127.0.0.1:80", "127.0.0.1", 80, True),
    ("127.0.0.1:80", "127.0.0.1", 81, False),
    ("10.0.0.0/8", "10.1.2.3", 80, True),
    ("10.0.0.0/8", "11.1.2.3", 80, False),
    ("::1", "::1", 80, True),
    ("[::1]:80", "::1", 80, True),
    ("[::1]:81", "::1", 80, False),
    ("fd00::/8", "fd12::1", 80, True),
    ("localhost", "localhost", 80, True),
    ("10.0.0.0/8", "example.com", 80, False),
    (".", "example.com", 80, False),
]


def test_no_proxy_names_hosts_domains_networks_and_ports():
    for entry, host, port, expected in MATCHES:
        with case((entry, host, port)):
            assert matches(entry, host, port) is expected
