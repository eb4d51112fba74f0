"""AES-256-GCM by the package cryptography, which nothing else here loads; see cipher.py for why. As a program of its
own it does what it is asked for in lines on standard input."""

from __future__ import annotations

import os
import sys

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


class AesGcm:
    """A `cipher.Cipher`."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def encrypt(self, iv: bytes, data: bytes) -> bytes:
        return self._cipher.encrypt(iv, data, None)

    def decrypt(self, iv: bytes, sealed: bytes) -> bytes | None:
        try:
            return self._cipher.decrypt(iv, sealed, None)
        except InvalidTag:
            return None


def serve() -> None:
    """Answer until nobody can ask any more."""
    for line in sys.stdin:
        what, *parts = line.rstrip("\n").split(" ")
        key, iv, data = map(bytes.fromhex, parts)
        cipher = AesGcm(key)
        answer = cipher.encrypt(iv, data) if what == "encrypt" else cipher.decrypt(iv, data)
        sys.stdout.write("wrong\n" if answer is None else f"done {answer.hex()}\n")
        sys.stdout.flush()
    os._exit(0)  # whoever asked waits for this end, and there is nothing to tidy up


if __name__ == "__main__":
    serve()
