"""The architecture as data: who may import whom, what pure modules do without, and how long things may get."""

import ast
import json
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in ROOT.glob("*.py")}
SOURCES = [*MODULES.values(), *(ROOT / "tests").glob("*.py"), *(ROOT / "bench").glob("*.py")]
FILE_LINES_MAX = 700
FUNCTION_LINES_MAX = 70

# Imports point down, never back. Who may be imported is written out; a new module needs a place here.
CORE = {
    "wire": set(),
    "protection": set(),
    "faults": set(),
    "schemas": set(),
    "rescue": {"wire"},
    "calls": {"protection", "rescue", "wire"},
    "messages": {"wire"},
    "chat": {"messages", "wire"},
    "response_events": {"wire"},
    "response_items": {"messages", "response_events", "wire"},
    "responses": {"chat", "messages", "response_events", "response_items", "wire"},
    "catalog": {"protection", "wire"},
    "ledger": {"catalog"},
    "scores": {"catalog", "wire"},
    "router": {"catalog", "ledger", "protection", "scores", "wire"},
    "outgoing": {"catalog", "messages", "protection", "schemas", "wire"},
    "adapters": {"calls", "catalog", "outgoing", "protection", "rescue", "wire"},
    "gemini": {"adapters", "catalog", "outgoing", "protection", "schemas", "wire"},
}
SHELL = {
    "deadlines": set(),
    "client": {"deadlines", "wire"},
    "page": set(),
    "settings": {"catalog", "outgoing", "protection", "wire"},
    "upstream": {"adapters"},
    "providers": {"adapters", "catalog", "deadlines", "faults", "gemini", "protection", "router", "upstream", "wire"},
    "store": {"catalog", "scores"},
    "eventlog": {"store"},
    "controls": {"catalog", "store"},
    "analytics": {"store"},
    "metrics": {"store"},
}
TOP = {
    "exchange": set(CORE) | {"client", "deadlines", "eventlog", "metrics", "providers", "settings", "store"},
    "admin": {"client", "deadlines", "discovery", "exchange", "store", "analytics", "controls", "metrics", "settings"}
    | set(CORE),
    "discovery": {"catalog", "exchange", "protection", "settings", "store"},
    "connection": {"wire"},
    "gateway": {"exchange", "admin", "connection", "discovery"} | set(CORE) | set(SHELL),
}
ALLOWED = CORE | SHELL | TOP

IMPURE = {"time", "os", "asyncio", "aiohttp", "sqlite3", "socket", "threading", "starlette", "uvicorn", "random"}
STORE = {"store", "controls", "analytics"}  # what is kept, what the operator changes in it, what is read out of it
OWNED = {"aiohttp": {"upstream"}, "sqlite3": STORE, "cryptography": {"store"}, "prometheus_client": {"metrics"}}
SQL = re.compile(r"\b(SELECT\s.+\sFROM|INSERT\s+INTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM|PRAGMA\s)", re.DOTALL)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@cache
def imported(path: Path) -> set[str]:
    """The top-level names of everything a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # The class is the type of an argument, `rng`; what would be a hidden input is the module's own generator.
            only_the_type = node.module == "random" and [alias.name for alias in node.names] == ["Random"]
            names |= set() if only_the_type else {(node.module or "").split(".")[0]}
    return names


every_module = pytest.mark.parametrize("name", sorted(MODULES))
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)


@every_module
def test_a_module_imports_only_what_its_place_allows(name):
    assert name in ALLOWED, "a new module needs a place in the graph"
    ours = imported(MODULES[name]) & set(MODULES)

    assert ours <= ALLOWED[name], f"{name} may not import {sorted(ours - ALLOWED[name])}"


def test_there_is_no_cycle():
    TopologicalSorter({name: imported(path) & set(MODULES) for name, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("name", sorted(set(CORE) & set(MODULES)))
def test_a_pure_module_does_no_io_and_knows_no_clock(name):
    assert imported(MODULES[name]) & IMPURE == set()


@pytest.mark.parametrize(("library", "owners"), OWNED.items(), ids=OWNED)
def test_a_library_has_one_owner(library, owners):
    assert {name for name, path in MODULES.items() if library in imported(path)} <= owners


@every_module
def test_sql_is_written_in_the_store_only(name):
    texts = [node.value for node in ast.walk(parsed(MODULES[name])) if isinstance(node, ast.Constant)]

    assert name in STORE or not [text for text in texts if isinstance(text, str) and SQL.search(text)]


@every_module
def test_no_import_hides_in_a_function(name):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    inner = [node for node in ast.walk(parsed(MODULES[name])) if isinstance(node, functions)]

    hidden = [n.lineno for function in inner for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]

    assert hidden == []


@every_source
def test_no_file_and_no_function_is_too_long(path):
    assert len(path.read_text().splitlines()) <= FILE_LINES_MAX
    functions = [n for n in ast.walk(parsed(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= FUNCTION_LINES_MAX}
    assert long == {}


@every_module
def test_no_platform_and_no_model_is_named_in_a_module(name):
    catalog = json.loads((ROOT / "catalog.json").read_text())
    adapters = {platform["adapter"] for platform in catalog["platforms"]}  # a wire format may bear its maker's name
    platforms = {platform["id"] for platform in catalog["platforms"]} - adapters
    models = {model["model_id"] for model in catalog["models"] if model["platform"] != "demo"}
    source = MODULES[name].read_text().lower()

    words = set(re.findall(r"[a-z0-9_-]+", source))

    assert platforms & words == set()
    assert {model for model in models if f'"{model.lower()}"' in source} == set()
