"""A gateway as a process of its own: started over fake providers, and watched from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from fake_provider import FakeProvider  # noqa: E402

KEY = "fw-bench-0123456789abcdef"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


def catalog_of(platforms: Mapping[str, Mapping[str, Any]], fake: FakeProvider) -> dict[str, list[Any]]:
    """A catalogue file of these platforms: each with one model and one key, or with its own `models` and `keys`."""
    catalog: dict[str, list[Any]] = {"platforms": [], "models": [], "keys": []}
    for name, options in platforms.items():
        catalog["platforms"].append({"id": name, "adapter": "openai", "base_url": fake.url(name)})
        for model in options.get("models", [{}]):
            usual = {"platform": name, "model_id": f"{name}-model", "context_window": 100_000_000}
            catalog["models"].append(usual | model)
        catalog["keys"] += [{"platform": name, "key": key} for key in options.get("keys", [f"sk-{name}-0123456789"])]
    return catalog


class Gateway:
    """The process, and what the system and itself say of it."""

    def __init__(self, process: asyncio.subprocess.Process, base_url: str, db: Path) -> None:
        self.process, self.base_url, self.db = process, base_url, db
        self.events: list[dict[str, Any]] = []  # its event log, once `listen` is called
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        folder: Path,
        fake: FakeProvider,
        platforms: Sequence[str] | Mapping[str, Mapping[str, Any]],
        settings: Mapping[str, str],
        before: Callable[[], None] | None = None,
    ) -> Gateway:
        """`before` runs in the child, to give it limits."""
        options = platforms if isinstance(platforms, Mapping) else {name: {} for name in platforms}
        catalog = catalog_of(options, fake)
        (folder / "catalog.json").write_text(json.dumps(catalog))
        flags = ["--port", "0", "--db", str(folder / "gateway.db"), "--catalog", str(folder / "catalog.json")]
        environment = {**os.environ, "GATEWAY_API_KEY": KEY, **settings}
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(ROOT / "gateway.py"), *flags, cwd=folder, env=environment, preexec_fn=before,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, limit=2**16,
        )  # fmt: skip
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        return cls(process, line.split()[-1].removesuffix("/v1"), folder / "gateway.db")

    def listen(self) -> None:
        """Read the event log from now on."""
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self.events.append(json.loads(line))

    async def ended(self) -> int:
        code = await self.process.wait()
        if self._listening is not None:
            await self._listening
        return code

    def status_line(self, name: str) -> str:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(line for line in lines if line.startswith(f"{name}:"))

    def status(self, name: str) -> int:
        """A number out of what the system says of the process."""
        return int(self.status_line(name).split()[1])

    def gone(self) -> bool:
        """Whether it has ended; asyncio would also wait for the end of what it has written."""
        try:
            return "Z" in self.status_line("State")
        except FileNotFoundError:
            return True

    def memory_mb(self) -> float:
        return self.status("VmRSS") / 1024

    def forget_peak(self) -> None:
        """Let VmHWM begin anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def ask(self, path: str) -> str:
        async with aiohttp.ClientSession() as http, http.get(self.base_url + path, headers=AUTHORIZED) as got:
            return await got.text()

    async def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, summed over the labels that are left out of its name: all but the status."""
        found: Counter[str] = Counter()
        for line in (await self.ask("/metrics")).splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name if name.startswith("freeway_requests_total") else name.partition("{")[0]] += float(value)
        return found

    def rows(self, query: str) -> dict[Any, Any]:
        """What the database says, as {first column: second column}."""
        with contextlib.closing(sqlite3.connect(self.db)) as connection:
            return dict(connection.execute(query).fetchall())
