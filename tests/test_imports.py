"""The architecture as data: who may import whom, what pure modules do without, and how long things may get."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("wire", "dialects", "routing", "adapters", "records", "config", "transport", "shared", "engine", "admin")
OWNERS_FILES = ("gateway", "providers", "router", "protection")  # the project's owner wants these at the root
FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 60

# A layer is a folder, or one of the owner's files. Imports point down this table, never back (DESIGN's house).
ALLOWED: dict[str, set[str]] = {
    "wire": set(),
    "protection": {"wire"},
    "dialects": {"wire"},
    "routing": {"wire", "protection"},
    "router": {"routing", "protection", "wire"},
    "adapters": {"routing", "protection", "wire"},
    "records": {"routing", "protection", "wire"},
    "config": {"routing", "wire"},
    "transport": {"wire"},
    "shared": {"routing", "router", "protection", "wire"},
    "providers": {"adapters", "transport", "routing", "protection", "wire"},
}
ALLOWED["engine"] = set(ALLOWED)
ALLOWED["admin"] = set(ALLOWED)
ALLOWED["gateway"] = set(ALLOWED)
PURE = {"wire", "protection", "dialects", "routing", "router", "adapters"}
IMPURE = {"time", "os", "asyncio", "aiohttp", "sqlite3", "socket", "threading", "starlette", "uvicorn", "random"}
OWNED = {
    "aiohttp": {"transport.upstream"},
    "sqlite3": {"records.sqlite", "records.rows", "records.checkup"},
    "asyncpg": {"records.postgres", "records.postgres_link", "records.postgres_news"},
    "cryptography": {"records.aes_gcm"},
    "prometheus_client": {"records.metrics"},
    "redis": {"shared.link"},
}
SQL = re.compile(r"\b(SELECT\s.+\sFROM|INSERT\s+INTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM|PRAGMA\s)", re.DOTALL)
IMPORTED_TEST = re.compile(r"^\s*(?:from|import)\s+(test_\w+)", re.MULTILINE)

MODULES = {path.stem: path for path in ROOT.glob("*.py")}
MODULES |= {f"{folder}.{path.stem}": path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
SOURCES = [*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").glob("*.py")]


def layer(module: str) -> str:
    return module.partition(".")[0]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All that a module is made of: walked through once, and looked at by many tests."""
    return list(ast.walk(parsed(path)))


@cache
def imported(path: Path) -> set[str]:
    """The top-level names of everything a module imports, anywhere in it."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # The class is the type of an argument, `rng`; what would be a hidden input is the module's own generator.
            only_the_type = node.module == "random" and [alias.name for alias in node.names] == ["Random"]
            names |= set() if only_the_type else {(node.module or "").split(".")[0]}
    return names


def imported_modules(path: Path) -> set[str]:
    """The modules of ours that this one imports from, by their dotted names."""
    froms = [n for n in nodes(path) if isinstance(n, ast.ImportFrom) and n.module]
    named = {node.module for node in froms} | {f"{n.module}.{alias.name}" for n in froms for alias in n.names}
    return named & set(MODULES)


every_module = pytest.mark.parametrize("name", sorted(MODULES))


def test_the_root_shows_the_owners_modules_and_nothing_else_in_python():
    assert {path.stem for path in ROOT.glob("*.py")} == set(OWNERS_FILES)
    assert {layer(name) for name in MODULES} == set(FOLDERS) | set(OWNERS_FILES)
    assert set(ALLOWED) == {layer(name) for name in MODULES}


@every_module
def test_a_module_imports_only_what_its_layer_allows(name):
    used = imported(MODULES[name]) & set(ALLOWED) - {layer(name)}

    assert used <= ALLOWED[layer(name)], f"{name} may not import {sorted(used - ALLOWED[layer(name)])}"


def test_there_is_no_cycle_between_layers_nor_between_modules():
    layers: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        layers.setdefault(layer(name), set()).update(imported(path) & set(ALLOWED) - {layer(name)})
    TopologicalSorter(layers).prepare()
    TopologicalSorter({name: imported_modules(path) for name, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("name", sorted(name for name in MODULES if layer(name) in PURE))
def test_a_pure_module_does_no_io_and_knows_no_clock(name):
    assert imported(MODULES[name]) & IMPURE == set()


@pytest.mark.parametrize(("library", "owners"), OWNED.items(), ids=OWNED)
def test_a_library_has_one_owner(library, owners):
    assert {name for name, path in MODULES.items() if library in imported(path)} <= owners


def test_what_only_several_gateways_need_is_not_loaded_by_one():
    look = "import gateway, sys; print(*{name.partition('.')[0] for name in sys.modules})"

    loaded = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)

    assert "gateway" in loaded.stdout.split()
    assert {"redis", "asyncpg", "shared"} & set(loaded.stdout.split()) == set()


@every_module
def test_sql_is_written_in_the_records_only(name):
    texts = [node.value for node in nodes(MODULES[name]) if isinstance(node, ast.Constant)]

    assert layer(name) == "records" or not [text for text in texts if isinstance(text, str) and SQL.search(text)]


def test_what_several_tests_use_stands_in_a_module_of_its_own():
    tests = (ROOT / "tests").rglob("test_*.py")

    assert {path.name: found for path in tests if (found := IMPORTED_TEST.findall(path.read_text()))} == {}


@every_module
def test_no_import_hides_in_a_function(name):
    functions = [node for node in nodes(MODULES[name]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    imports = [node for node in nodes(MODULES[name]) if isinstance(node, ast.Import | ast.ImportFrom)]

    hidden = [n.lineno for n in imports if any(f.lineno <= n.lineno <= f.end_lineno for f in functions)]

    assert hidden == []


def test_no_file_and_no_function_is_too_long():
    """In one piece, for one of the suite's processes: reading all that there is takes two seconds."""
    long = {}
    for path in SOURCES:
        if (lines := len(path.read_text().splitlines())) > FILE_LINES_MAX:
            long[path.name] = lines
        functions = [n for n in nodes(path) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        for function in functions:
            if function.end_lineno - function.lineno >= FUNCTION_LINES_MAX:
                long[f"{path.name}:{function.name}"] = function.end_lineno - function.lineno + 1

    assert long == {}


@cache
def shipped_names() -> tuple[set[str], set[str]]:
    catalog = json.loads((ROOT / "catalog.json").read_text())
    adapters = {platform["adapter"] for platform in catalog["platforms"]}  # a wire format may bear its maker's name
    platforms = {platform["id"] for platform in catalog["platforms"]} - adapters
    return platforms, {model["model_id"] for model in catalog["models"] if model["platform"] != "demo"}


@every_module
def test_no_platform_and_no_model_is_named_in_a_module(name):
    platforms, models = shipped_names()
    source = MODULES[name].read_text().lower()

    words = set(re.findall(r"[a-z0-9_-]+", source))

    assert platforms & words == set()
    assert {model for model in models if f'"{model.lower()}"' in source} == set()
