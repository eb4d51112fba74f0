"""A gateway that has been used for a long time, for bench/run.py: many models, keys, conversations and rows of log.

python bench/crowd.py rows gateway.db MODEL       a database with ROWS rows over the last week
python bench/crowd.py sessions http://… KEY       SESSIONS conversations, one short request each
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from records.rows import Row, insert_rows  # noqa: E402
from records.sqlite import SCHEMA, SCHEMA_VERSION  # noqa: E402

MODELS, PLATFORMS, KEYS, SESSIONS, ROWS = 200, 20, 500, 10_000, 1_000_000
WEEK_S = 7 * 86_400
AT_ONCE = 32


def catalog(base_url: str, model: str) -> dict[str, Any]:
    """The measured model and others, all at one server."""
    names = [f"crowd{number}" for number in range(PLATFORMS)]
    others = [{"platform": names[n % PLATFORMS], "model_id": f"{model}-{n}"} for n in range(1, MODELS)]
    models = [{"platform": names[0], "model_id": model}, *others]
    for number, entry in enumerate(models):
        entry.update(context_window=1_000_000, intelligence_rank=number % 37, speed_rank=number % 31)
    return {
        "platforms": [{"id": name, "adapter": "openai", "base_url": base_url, "protection": "off"} for name in names],
        "models": models,
        "keys": [{"platform": names[n % PLATFORMS], "key": f"sk-crowd-{n:06d}", "label": str(n)} for n in range(KEYS)],
    }


def fill(path: Path, model: str) -> None:
    """Rows of a week, one in twenty a failure."""
    rng, now = random.Random(1), time.time()
    db = sqlite3.connect(path, isolation_level=None)
    db.executescript(f"PRAGMA journal_mode = WAL; {SCHEMA.read_text()}; PRAGMA user_version = {SCHEMA_VERSION};")
    for start in range(0, ROWS, 10_000):
        rows = []
        for number in range(start, start + 10_000):
            at, which = now - WEEK_S * (1 - number / ROWS), rng.randrange(MODELS)
            row = Row(f"req_{int(at * 1000):012x}{number:012x}", at, platform=f"crowd{which % PLATFORMS}", attempt=1)
            row.model_id, row.requested_model = f"{model}-{which}" if which else model, "auto"
            row.routing_mode, row.status = "balanced", "error" if rng.random() < 0.05 else "success"
            row.error_kind = "server_error" if row.status == "error" else None
            row.latency_ms, row.ttfb_ms = rng.randrange(300, 9000), rng.randrange(50, 900)
            row.input_tokens, row.output_tokens = rng.randrange(20, 4000), rng.randrange(10, 900)
            rows.append(row)
        db.execute("BEGIN")
        insert_rows(db, rows)
        db.execute("COMMIT")
    db.close()


async def converse(url: str, key: str) -> None:
    waiting = iter(range(SESSIONS))

    async def one_after_another(http: aiohttp.ClientSession) -> None:
        for number in waiting:
            headers = {"Authorization": f"Bearer {key}", "X-Session-Id": f"conversation {number}"}
            body = {"model": "auto-fast", "messages": [{"role": "user", "content": "hi"}]}
            async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
                await response.read()

    async with aiohttp.ClientSession() as http:
        await asyncio.gather(*(one_after_another(http) for _ in range(AT_ONCE)))


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "rows":
        fill(Path(given[0]), given[1])
    else:
        asyncio.run(converse(given[0], given[1]))
