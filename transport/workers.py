"""Several processes on one port (SPEC 20.4): one that serves nobody starts the others, replaces those that die and
passes a stop on to all.

Each worker has a listening socket of its own on the port (SO_REUSEPORT); the system shares connections out among them.
The first one starts alone, because it may have to create the database.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLACE = "GATEWAY_WORKER"  # `number:folder:pid`, told by the one that starts a worker
LOOK_S = 0.05
READY_S = 30.0  # for the first worker: a large database may have to be migrated
STABLE_S = 10.0  # a worker that has lived so long is replaced at once
PAUSE_S, PAUSE_S_MAX = 0.5, 30.0  # before one that has not, doubling
REFUSED = 2  # a worker's exit status when it cannot start, whatever is tried
Log = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Place:
    """Which worker a process is, the folder in which all of them meet, and who has started it."""

    number: int
    folder: Path
    parent: int

    @property
    def address(self) -> Path:
        return self.folder / f"worker-{self.number}"

    def told(self) -> str:
        return f"{self.number}:{self.parent}:{self.folder}"

    def orphaned(self) -> bool:
        return os.getppid() != self.parent


def place_of(environ: Mapping[str, str]) -> Place | None:
    """None: this process is nobody's worker."""
    if PLACE not in environ:
        return None
    number, parent, folder = environ[PLACE].split(":", 2)
    return Place(int(number), Path(folder), int(parent))


@dataclass(slots=True)
class Worker:
    number: int
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    start_at: float = 0.0
    deaths: int = 0  # in a row, each soon after its start


@dataclass(slots=True)
class Supervisor:
    """Runs until it is stopped or its workers cannot start; `run` gives the exit status."""

    command: Sequence[str]
    count: int
    port_holder: socket.socket  # bound, so that the port stays ours while no worker lives
    stop_s: float  # what a worker may take to stop
    log: Log
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="freeway-")))  # only ours can enter
    workers: list[Worker] = field(default_factory=list)
    stopping: bool = False

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        try:
            self.workers = [Worker(0)]
            self._start(self.workers[0])
            if not self._first_is_ready():
                return self._ended(self.workers[0])
            self.workers += [Worker(number) for number in range(1, self.count)]
            while not self.stopping:
                self._look()
                time.sleep(LOOK_S)
            return self._stop_all()
        finally:
            self._kill_all()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.port_holder.close()

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def _start(self, worker: Worker) -> None:
        place = Place(worker.number, self.folder, os.getpid())
        place.address.unlink(missing_ok=True)
        port = str(self.port_holder.getsockname()[1])
        environ = {**os.environ, PLACE: place.told()}
        # In a session of its own: the terminal's Ctrl-C is ours to pass on, once.
        worker.process = subprocess.Popen([*self.command, "--port", port], env=environ, start_new_session=True)
        worker.began = time.monotonic()

    def _first_is_ready(self) -> bool:
        first, deadline = self.workers[0], time.monotonic() + READY_S
        address = Place(0, self.folder, os.getpid()).address
        while not self.stopping and time.monotonic() < deadline and self._lives(first):
            if address.exists():
                return True
            time.sleep(LOOK_S)
        return False

    def _ended(self, first: Worker) -> int:
        """The exit status where the first worker never began to serve."""
        if self._lives(first):
            return self._stop_all() if self.stopping else 1
        assert first.process is not None
        return first.process.returncode if not self.stopping else 0

    def _look(self) -> None:
        now = time.monotonic()
        for worker in self.workers:
            if worker.process is None:
                if now >= worker.start_at:
                    self._start(worker)
            elif worker.process.poll() is not None:
                self._note_death(worker, now)

    def _note_death(self, worker: Worker, now: float) -> None:
        assert worker.process is not None
        status, worker.process = worker.process.returncode, None
        worker.deaths = 0 if now - worker.began >= STABLE_S and status != REFUSED else worker.deaths + 1
        pause_s = min(PAUSE_S_MAX, PAUSE_S * 2.0 ** (worker.deaths - 1)) if worker.deaths else 0.0
        worker.start_at = now + pause_s
        self.log("warning", "worker_ended", worker=worker.number, status=status, again_in_s=pause_s)

    def _stop_all(self) -> int:
        """Each gets the time that one gateway has to stop."""
        living = [worker.process for worker in self.workers if worker.process is not None]
        for process in living:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.stop_s
        while any(process.poll() is None for process in living) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        return max((abs(process.poll() or 0) for process in living), default=0)

    def _kill_all(self) -> None:
        for worker in self.workers:
            if self._lives(worker):
                assert worker.process is not None
                worker.process.kill()
                worker.process.wait()

    @staticmethod
    def _lives(worker: Worker) -> bool:
        return worker.process is not None and worker.process.poll() is None
