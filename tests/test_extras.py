"""What only several processes need is loaded only where it is asked for (SPEC 20)."""

import subprocess
import sys

from conftest import ROOT

EXTRAS = {"asyncpg", "redis"}


def python(code: str, **environ: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=30, check=False)


def test_without_the_settings_neither_library_is_loaded_nor_what_needs_it():
    ran = python(
        "import asyncio, gateway, sys, tempfile, pathlib\n"
        "from config.settings import Settings\n"
        "made = gateway.Gateway(Settings(db=pathlib.Path(tempfile.mkdtemp()) / 'gateway.db'))\n"
        "asyncio.run(made.store.close())\n"
        f"print(*({EXTRAS} & set(sys.modules)), *(name for name in sys.modules if 'postgres' in name))"
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr


def test_a_setting_whose_library_is_missing_stops_the_start_and_says_how_to_get_it(tmp_path):
    ran = python(
        "import sys; sys.modules['asyncpg'] = None\nimport gateway; sys.exit(gateway.main())",
        GATEWAY_LOG="postgresql://me:pass-w0rd@127.0.0.1/log",
        GATEWAY_DB=str(tmp_path / "gateway.db"),
        GATEWAY_PORT="0",
    )
    assert ran.returncode == 2
    assert "pip install -r requirements-scale.txt" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert "pass-w0rd" not in ran.stderr + ran.stdout
