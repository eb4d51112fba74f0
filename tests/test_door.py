"""The door: which key opens which path, which hosts are let in, and how keys are compared."""

import ast
import asyncio
import hmac
import sys
from itertools import product
from pathlib import Path
from types import FrameType

import pytest
from conftest import API_KEY
from starlette.routing import Route

import gateway as service
from engine import door

ADMIN_KEY = "admin-test-0123456789abcdef"
OPEN = {"/", "/healthz", "/api/hello"}  # the last is how one client greets a gateway, and no door of the operator's


def all_routes(app: service.Gateway) -> list[tuple[str, str, bool]]:
    """(method, path, whether it is the operator's) of everything that the service answers."""
    routes = [route for route in app.endpoints.routes if isinstance(route, Route)]
    known = {(method, route.path) for route in routes for method in route.methods or {"GET"}}
    known |= {("POST", path) for path in app.paths}
    filled = [(method, path.replace("{id}", "1").replace("{id:path}", "auto")) for method, path in sorted(known)]
    return [(m, p.replace("{token}", "x"), p.startswith(("/api", "/metrics"))) for m, p in filled]


@pytest.fixture
async def two_keys(start_gateway):
    """A gateway whose operator has a key of their own."""
    return await start_gateway(["a"], {"GATEWAY_ADMIN_KEY": ADMIN_KEY})


async def status_of(gateway, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict | None]:
    data = b'{"cases": []}' if path == "/api/drill" else b"{}"  # none: a whole drill takes its time
    async with gateway.http.request(method, gateway.base_url + path, headers=headers, data=data) as response:
        content = await response.read()
        is_error = response.status >= 400 and method != "HEAD"
        return response.status, (await response.json())["error"] if is_error and content else None


def routes_of(gateway) -> list[tuple[str, str, bool]]:
    app = gateway._server.config.app
    routes = all_routes(app)
    assert len(routes) >= 20
    assert {path for _, path, _ in routes} >= OPEN | {"/metrics", "/api/keys", "/v1/chat/completions", "/v1/models"}
    return routes


WRONG_HEADERS = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer "},
    {"authorization": "Bearer wrong"},
    {"authorization": f"Bearer {API_KEY}x"},
    {"authorization": f"Bearer {API_KEY[:-1]}"},
    {"authorization": f"Basic {API_KEY}"},
    {"authorization": "Bearer \u00fc"},
    {"x-api-key": "wrong"},
    {"cookie": f"key={API_KEY}"},
]


async def test_no_route_but_the_page_and_the_health_opens_without_the_right_key(two_keys):
    for (method, path, _), headers in product(routes_of(two_keys), WRONG_HEADERS):
        status, error = await status_of(two_keys, method, path, headers)
        if path in OPEN:
            assert status == 200, (method, path)
        else:
            assert status == 401, (method, path, headers)
            in_all_dialects = {
                "message": "Missing or wrong API key. Send it as 'Authorization: Bearer <key>'.",
                "type": "authentication_error",
            }
            in_openais = {} if path.startswith("/v1/messages") else {"code": "invalid_api_key", "param": None}
            assert error is None or error == in_all_dialects | in_openais


async def test_the_clients_key_opens_nothing_of_the_operators_and_the_operators_nothing_of_the_clients(two_keys):
    for method, path, is_operators in routes_of(two_keys):
        if path in OPEN:
            continue
        right, wrong = (ADMIN_KEY, API_KEY) if is_operators else (API_KEY, ADMIN_KEY)
        assert (await status_of(two_keys, method, path, {"authorization": f"Bearer {wrong}"}))[0] == 401, (method, path)
        assert (await status_of(two_keys, method, path, {"authorization": f"Bearer {right}"}))[0] != 401, (method, path)


SHUT = [
    "/nothing", "/api", "/api/", "/api/nothing", "/v1", "/v2/models", "/apikeys", "/metricsx", "//api/keys",
    "/API/keys", "/%61pi/keys", "/api%2fkeys", "/v1/../api/keys", "/./api/keys", "/healthz/x", "/healthz%00",
    "/index.html", "/dashboard.html", "/gateway.db", "/.env", "/static/x", "/docs", "/openapi.json", "/favicon.ico",
    "/v1/v1/v1/models", "/;/api/keys", "/%2e%2e/gateway.db",
]  # fmt: skip


async def status_line(gateway, path: str, *headers: str) -> bytes:
    """The status of a request that no client library would send like this."""
    host, _, port = gateway.base_url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write("\r\n".join([f"GET {path} HTTP/1.1", *headers, "Connection: close", "", ""]).encode())
    line = await reader.readline()
    writer.close()
    return line.split(b" ")[1]


async def test_what_is_not_known_to_be_open_is_shut(two_keys):
    for path in SHUT:
        assert await status_line(two_keys, path, "Host: localhost") == b"401", path


HOSTS = {
    "127.0.0.1": True, "127.0.0.1:8000": True, "localhost": True, "LOCALHOST:1": True, "[::1]": True,
    "[::1]:8000": True, "evil.example": False, "evil.example:8000": False, "127.0.0.1.evil.example": False,
    "localhost.evil.example": False, "127.0.0.2": False, "0.0.0.0": False, "": False, "[::1": False, "::1": False,
    "[::1]evil": False, "localhost:80@evil.example": False, "127.0.0.1:evil": False, "localhost, evil.example": False,
    "[::ffff:127.0.0.1]": False, "user@localhost": False,
}  # fmt: skip


async def test_only_the_loopback_names_are_let_in(start_gateway):
    gateway = await start_gateway(["a"])
    for host, is_ours in HOSTS.items():
        for path in ("/", "/healthz", "/api/keys", "/v1/models"):
            status = await status_line(gateway, path, f"Host: {host}", f"Authorization: Bearer {API_KEY}")
            assert status == (b"200" if is_ours else b"403"), (host, path)


async def test_a_request_without_a_host_is_not_let_in(start_gateway):
    gateway = await start_gateway(["a"])
    name, _, port = gateway.base_url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert (await reader.readline()).split(b" ")[1] == b"403"
    writer.close()


async def test_another_method_on_a_known_path_is_a_405_that_says_which_are_there(two_keys):
    right = {"authorization": f"Bearer {API_KEY}"}
    for path, allowed in (("/v1/chat/completions", "POST"), ("/responses/", "POST"), ("/v1/models", "GET, HEAD")):
        async with two_keys.http.request("DELETE", two_keys.base_url + path, headers=right) as got:
            assert got.status == 405, path
            assert sorted(got.headers["allow"].split(", ")) == allowed.split(", "), path
            assert (await got.json())["error"]["code"] == "method_not_allowed"


async def test_no_other_sites_script_may_ask_or_read_anything(two_keys):
    asking = {"origin": "https://evil.example", "access-control-request-headers": "authorization"}
    for path in {path for _, path, _ in routes_of(two_keys)}:
        for method, more in (("OPTIONS", {"access-control-request-method": "GET"}), ("GET", {})):
            async with two_keys.http.request(method, two_keys.base_url + path, headers=asking | more) as got:
                assert not [name for name in got.headers if name.lower().startswith("access-control-")], path
                assert got.status in (401, 405) or (method == "GET" and path in OPEN), path


@pytest.mark.parametrize("path", ["/api/keys", "/metrics", "/v1/models"])
async def test_keys_are_compared_in_constant_time(start_gateway, path):
    gateway = await start_gateway(["a"])
    compared = []

    def watch(frame: FrameType, event: str, function: object) -> None:
        if event == "c_call" and function is hmac.compare_digest:
            compared.append(frame.f_locals["given"])

    wrong_first = {"authorization": "Bearer wrong", "x-api-key": "wrong too"}
    right_first = {"x-api-key": "wrong", "api-key": "wrong too"}
    sys.setprofile(watch)
    try:
        statuses = [(await gateway.get(path, headers=headers)).status for headers in (wrong_first, right_first)]
    finally:
        sys.setprofile(None)

    assert (statuses, compared) == (
        [401, 200], [b"wrong", b"wrong too", API_KEY.encode(), b"wrong", b"wrong too"]
    )  # whichever is right, all are compared  # fmt: skip


def test_the_keys_are_used_for_nothing_but_that_comparison():
    tree = ast.parse(Path(door.__file__).read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "hmac.compare_digest"]
    assert [ast.unparse(call.args[0]) for call in calls] == ["given"]
    (chosen,) = [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "key"]
    assert [ast.unparse(call.args[1]) for call in calls] == ["key"]
    assert len([n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "key"]) == 2  # set, and compared
    within = set(ast.walk(chosen))
    used = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("_api_key", "_admin_key")]
    assert [ast.unparse(n) for n in used if isinstance(n.ctx, ast.Load) and n not in within] == []
    assert {n.attr for n in used if n in within} == {"_api_key", "_admin_key"}
    compared = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Compare)]
    assert [text for text in compared if "api_key" in text or "admin_key" in text] == []


async def test_the_page_needs_no_key_and_may_talk_to_nobody_else(start_gateway):
    gateway = await start_gateway(["a"])
    page = await gateway.get("/", headers={"authorization": ""})
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    rules = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["img-src"] == "data:"
    assert {rules[name] for name in ("base-uri", "frame-ancestors", "form-action")} == {"'none'"}
    for name in ("script-src", "style-src"):
        assert rules[name].startswith("'sha256-") and "unsafe" not in rules[name]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["cache-control"] == "no-cache"
    for address in (b"http://", b"https://", b"//cdn"):
        assert address not in page.body.replace(b"http://www.w3.org/2000/svg", b"")
    assert b" onclick=" not in page.body and b" style=" not in page.body and b"innerHTML" not in page.body
    assert gateway.api_key.encode() not in page.body


async def test_an_unchanged_page_is_not_sent_again(start_gateway):
    gateway = await start_gateway(["a"])
    etag = (await gateway.get("/")).headers["etag"]
    again = await gateway.get("/", headers={"if-none-match": etag})
    assert (again.status, again.body) == (304, b"")
