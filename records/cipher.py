"""Encrypting beside this process for as long as it starts, and in it afterwards.

The package that encrypts brings an OpenSSL of its own: 8 of 63 MB (measured) that a gateway would hold for some
milliseconds of work, nearly all of it at start. So `main` has a start's work done by a process that ends with the
start. Whoever needs a cipher later, when the operator adds or looks at keys, has the package loaded here.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TextIO

PROGRAM = Path(__file__).with_name("aes_gcm.py")
ANSWER_S = 10.0  # for the process to start and to answer, which takes 0.05 s where nothing else runs


class Cipher(Protocol):
    """One key's AES-256-GCM."""

    def encrypt(self, iv: bytes, data: bytes) -> bytes:
        """Ciphertext and tag."""

    def decrypt(self, iv: bytes, sealed: bytes) -> bytes | None:
        """None for what was not encrypted with this key."""


MakeCipher = Callable[[bytes], Cipher]  # from its key


def local_cipher(key: bytes) -> Cipher:
    """In this process."""
    made: Cipher = import_module("records.aes_gcm").AesGcm(key)
    return made


class NoProcess(Exception):
    """There is none, or none any more."""


class CipherProcess:
    """`with CipherProcess() as process:` and then `process.cipher(key)`, which goes on without it after the block.

    Questions and answers are lines over a pair of sockets, which nobody else can read. The process ends when its socket
    is closed, also by the end of this one.
    """

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._lines: TextIO | None = None

    def __enter__(self) -> Self:
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(ANSWER_S)
        # A session of its own: ^C is for the gateway. -P: the files beside the program are no modules of libraries.
        command = [self._python, "-P", str(PROGRAM)]
        with theirs:
            try:
                self._child = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError:  # no process is to be had: then all is done here
                self._ours.close()
                return self
        self._lines = self._ours.makefile("rw", encoding="ascii", newline="\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._end()

    def cipher(self, key: bytes) -> Cipher:
        return StartCipher(key, self)

    def ask(self, what: str, *parts: bytes) -> bytes | None:
        """What the process answers; None where that is that the key is wrong. Raises NoProcess."""
        question = " ".join([what, *(part.hex() for part in parts)])
        with self._lock:
            if self._lines is None:
                raise NoProcess
            try:
                self._lines.write(f"{question}\n")
                self._lines.flush()
                told, _, answer = self._lines.readline().rstrip("\n").partition(" ")
            except OSError:
                told = ""
            if not told:
                self._end()
                raise NoProcess
        return bytes.fromhex(answer) if told == "done" else None

    def _end(self) -> None:
        if self._child is None or self._lines is None:
            return
        try:
            self._ours.shutdown(socket.SHUT_WR)
            while self._lines.readline():  # to its end, which is the process's
                pass
        except OSError:
            self._child.kill()
        self._child.wait()
        with contextlib.suppress(OSError):  # of a question that nobody has taken
            self._lines.close()
        self._ours.close()
        self._child = self._lines = None


class StartCipher:
    """By the process, as long as there is one."""

    def __init__(self, key: bytes, process: CipherProcess) -> None:
        self._key = key
        self._process = process

    def encrypt(self, iv: bytes, data: bytes) -> bytes:
        try:
            sealed = self._process.ask("encrypt", self._key, iv, data)
        except NoProcess:
            return self._here.encrypt(iv, data)
        assert sealed is not None  # no key is wrong for it
        return sealed

    def decrypt(self, iv: bytes, sealed: bytes) -> bytes | None:
        try:
            return self._process.ask("decrypt", self._key, iv, sealed)
        except NoProcess:
            return self._here.decrypt(iv, sealed)

    @cached_property
    def _here(self) -> Cipher:
        return local_cipher(self._key)
