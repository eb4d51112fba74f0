"""The gateway as a process of its own, from its first line of output to its exit status."""

import asyncio
import contextlib
import re
import signal
from dataclasses import dataclass, field

import aiohttp
from fake_provider import until


@dataclass
class Process:
    """`python gateway.py` in a directory of its own."""

    process: asyncio.subprocess.Process
    output: list[str] = field(default_factory=list)
    _readers: list[asyncio.Task] = field(default_factory=list)

    def __post_init__(self) -> None:
        for pipe in (self.process.stdout, self.process.stderr):
            self._readers.append(asyncio.create_task(self._read(pipe)))

    async def _read(self, pipe: asyncio.StreamReader) -> None:
        async for line in pipe:
            self.output.append(line.decode())

    @property
    def text(self) -> str:
        return "".join(self.output)

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    async def ready(self) -> str:
        """The base URL, once the gateway answers there."""
        pattern = re.compile(r"http://[\w.\[\]:]+:\d+")
        await until(lambda: pattern.search(self.text) or not self.running, within_s=20)
        found = pattern.search(self.text)
        assert found, f"stopped with {self.process.returncode}: {self.text}"
        async with aiohttp.ClientSession() as http, asyncio.timeout(10):
            while True:
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    async with http.get(f"{found[0]}/healthz") as response:
                        if response.status == 200:
                            return found[0]
                await asyncio.sleep(0.01)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def ended(self, within_s: float = 20) -> int:
        """Its exit status, once it has ended and all its output has been read."""
        async with asyncio.timeout(within_s):
            status = await self.process.wait()
            await asyncio.gather(*self._readers)
        return status


async def end(running: Process) -> None:
    if running.running:
        running.signal(signal.SIGKILL)
    await running.ended()
