"""What the operator reads: one line of JSON per event on standard output.

Lines are written by a thread of their own, so that a reader that has stopped reading holds up nobody. Never keys,
prompts or answers.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from typing import Any

import msgspec
import orjson
from msgspec import Struct, field

from records.rows import iso

LEVELS = ("debug", "info", "warning", "error", "critical")
LINES_MAX = 10_000  # waiting for a slow reader; then the oldest are lost and counted
PAUSE_S = 0.05  # lines of one such moment are written together
STOP_S = 1.0  # for the last lines, when nobody reads them


def moment() -> str:
    return iso(time.time())


class Line(Struct, kw_only=True):
    """One event with fields of its own, in the order in which they are written."""

    at: str = field(default_factory=moment)
    level: str
    event: str


LINES = msgspec.json.Encoder()


class Handler(logging.Handler):
    """What libraries log. Python would write it to standard error at once, and wait for whoever reads that."""

    def __init__(self, log: EventLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if not self._log.running and logging.lastResort is not None:  # a start that fails must say why
            logging.lastResort.handle(record)
            return
        raised = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        words = record.getMessage()[:500].strip()
        self._log.write(record.levelname.lower(), "library", logger=record.name, message=words, raised=raised)


class EventLog:
    """Owns its thread from `start` to `stop`."""

    def __init__(self, level: str = "info") -> None:
        self.dropped = 0
        self._wanted = frozenset(LEVELS[LEVELS.index(level) :])
        self._lines: deque[bytes] = deque()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(STOP_S)

    @property
    def running(self) -> bool:
        return self._thread is not None and not self._stopping.is_set()

    def wants(self, level: str) -> bool:
        return level in self._wanted

    def write(self, level: str, event: str, **fields: Any) -> None:
        if level in self._wanted:
            self._append(orjson.dumps({"at": moment(), "level": level, "event": event, **fields}, default=str))

    def write_line(self, line: Line) -> None:
        """The same for an event that comes with every request."""
        if line.level in self._wanted:
            self._append(LINES.encode(line))

    def _append(self, line: bytes) -> None:
        if len(self._lines) >= LINES_MAX:
            self._lines.popleft()
            self.dropped += 1
        self._lines.append(line)
        if not self._wake.is_set():
            self._wake.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait()
            self._wake.clear()
            self._stopping.wait(PAUSE_S)
            self._drain()

    def _drain(self) -> None:
        lines = []
        while self._lines:
            lines.append(self._lines.popleft())
        if lines:
            text = b"\n".join(lines) + b"\n"
            try:  # past Python's own buffer: its lock, held while nobody reads, is waited for at the exit
                while text:
                    text = text[os.write(sys.stdout.fileno(), text) :]
            except (OSError, ValueError, AttributeError):  # nobody reads any more, or there is no output at all
                self.dropped += len(lines)
