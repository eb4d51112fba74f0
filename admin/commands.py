"""What `python gateway.py WORD` does instead of serving: doctor, clients, drill.

Each command takes the same flags as the server, after its word, and gives an exit status: 0 when all is well, 1 when
something needs doing, 2 when it could not even look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from admin.doctor import Verdict, own_address
from admin.doctor import doctor as examination
from admin.recipes import recipes
from config.settings import Settings, SettingsError, load_settings
from records.checkup import look_into
from records.vault import StoreError
from transport.upstream import CallFailed, Upstream
from wire.http import Endpoint

README = Path(__file__).parent.parent / "README.md"
DRILL_S = 900.0  # six cases, of which each ends within its request's budget; they take half a minute as a rule
CONNECT_S = 5.0
Tell = Callable[[str], None]
Command = Callable[[Sequence[str], Mapping[str, str], Path, Tell], int]


def doctor(argv: Sequence[str], environ: Mapping[str, str], cwd: Path, tell: Tell) -> int:
    async def examine() -> int:
        things = 0
        async for finding in examination(argv, environ, cwd):
            tell(str(finding))
            things += finding.verdict is Verdict.ACT
        return things

    things = asyncio.run(examine())
    tell("All is well." if not things else f"{things} thing{'s' if things > 1 else ''} to do, marked {Verdict.ACT}.")
    return 1 if things else 0


def clients(argv: Sequence[str], environ: Mapping[str, str], cwd: Path, tell: Tell) -> int:
    try:
        tell(recipes(README.read_text(), own_address(load_settings(argv, environ, cwd))))
    except (SettingsError, OSError, ValueError) as error:
        tell(f"freeway: {error}")
        return 2
    return 0


def drill(argv: Sequence[str], environ: Mapping[str, str], cwd: Path, tell: Tell) -> int:
    try:
        settings = load_settings(argv, environ, cwd)
        key = admin_key(settings)
        told = asyncio.run(drilled(own_address(settings), key))
    except (SettingsError, StoreError) as error:
        tell(f"freeway: {error}")
        return 2
    except CallFailed:
        tell(f"freeway: no gateway answers at {own_address(settings)}. Is it running there? `make run` starts one.")
        return 2
    except (TimeoutError, ValueError) as error:
        tell(f"freeway: no drill at {own_address(settings)}: {error or 'it took too long'}")
        return 2
    for line in table(told["cases"]):
        tell(line)
    tell("Every answer was whole." if told["passed"] else "Not every answer was whole.")
    return 0 if told["passed"] else 1


def admin_key(settings: Settings) -> str:
    """The operator's own, as the running gateway knows it."""
    found = look_into(settings.db, settings.encryption_key, settings.log)
    return settings.admin_key or settings.api_key or (found.client_key if found is not None else None) or ""


async def drilled(address: str, key: str) -> Any:
    """What POST /api/drill says. Raises CallFailed, TimeoutError, or ValueError for another answer."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    async with asyncio.timeout(DRILL_S), Upstream(CONNECT_S) as upstream:
        response = await upstream.call("POST", Endpoint(f"{address}/api/drill", headers), b"{}")
        pieces = []
        while piece := await response.read():
            pieces.append(piece)
        response.close()
    told = orjson.loads(b"".join(pieces))
    if response.status != 200:
        raise ValueError(told["error"]["message"])
    return told


def table(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each case, in columns."""
    rows = [("case", "answer", "from", "calls", "ms", "")]
    for case in cases:
        route = f"{case['platform']}/{case['model_id']}" if case["platform"] is not None else "-"
        answer = "whole" if case["whole"] else "BROKEN"
        rows.append((case["case"], answer, route, str(case["calls"]), str(case["ms"]), case["error"] or ""))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    columns = [[cell.ljust(width) for cell, width in zip(row, widths, strict=False)] for row in rows]
    return ["  ".join((*cells, row[5])).rstrip() for cells, row in zip(columns, rows, strict=True)]


COMMANDS: Mapping[str, Command] = {"doctor": doctor, "clients": clients, "drill": drill}
