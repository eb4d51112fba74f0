"""Encryption of credentials at rest: what is encrypted with which key, and the key file."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from records.cipher import MakeCipher, local_cipher

TAG_BYTES, IV_BYTES = 16, 12


class StoreError(Exception):
    """The database cannot be used; the text is one line for the operator."""


class Vault:
    """AES-256-GCM with one key; encrypts credentials, and recognises them without reading them."""

    def __init__(self, key: bytes, make_cipher: MakeCipher = local_cipher) -> None:
        self._key = key
        self._cipher = make_cipher(key)

    def encrypt(self, secret: str) -> tuple[bytes, bytes, bytes]:
        """Ciphertext, iv, tag."""
        iv = secrets.token_bytes(IV_BYTES)
        sealed = self._cipher.encrypt(iv, secret.encode())
        return sealed[:-TAG_BYTES], iv, sealed[-TAG_BYTES:]

    def decrypt(self, ciphertext: bytes, iv: bytes, tag: bytes) -> str:
        secret = self._cipher.decrypt(iv, ciphertext + tag)
        if secret is None:
            raise StoreError(
                "ENCRYPTION_KEY (or the key file) is not the one this database was encrypted with. "
                "Nothing was changed; start with the right key, or with another database."
            )
        return secret.decode()

    def fingerprint(self, platform: str, secret: str) -> bytes:
        return hmac.digest(self._key, f"{platform}\0{secret}".encode(), "sha256")

    def seal(self, text: str) -> str:
        """For `settings`: ciphertext, iv and tag in one hex text."""
        return ".".join(part.hex() for part in self.encrypt(text))

    def unseal(self, sealed: str) -> str:
        ciphertext, iv, tag = (bytes.fromhex(part) for part in sealed.split("."))
        return self.decrypt(ciphertext, iv, tag)

    def opened(self, sealed: str) -> str | None:
        """The same for a text that somebody else brings; None where it was not sealed here, or not with this key."""
        try:
            return self.unseal(sealed)
        except (StoreError, ValueError):
            return None


def mask(secret: str) -> str:
    """What may be shown of a key: `gsk_…a1b2`."""
    if len(secret) < 12:
        return "…"
    prefix = secret[: secret.find("_") + 1] if 0 < secret.find("_") <= 5 else secret[:3]
    return f"{prefix}…{secret[-4:]}"


def read_key_file(path: Path, *, must_exist: bool) -> bytes:
    """The key in this file, which is made on first start, readable by its owner only."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        if must_exist:
            raise StoreError(
                f"{path} is missing, and the database holds what was encrypted with it. Nothing was changed; "
                "put the file back, or set ENCRYPTION_KEY."
            ) from None
        key = secrets.token_bytes(32)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(key.hex() + "\n")
        return key
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise StoreError(f"{path}: expected 64 hex digits (the content is not shown)")
    return key


def unlocked(
    sealed: Sequence[str], encryption_key: bytes | None, database: Path, make_cipher: MakeCipher = local_cipher
) -> Vault:
    """The vault with this key, or with the one in the file beside the database; made where nothing is sealed yet. It
    is proved on what is sealed before anything is written."""
    if encryption_key is None:
        encryption_key = read_key_file(key_file_of(database), must_exist=bool(sealed))
    vault = Vault(encryption_key, make_cipher)
    for value in sealed:
        vault.unseal(value)
    return vault


def key_file_of(database: Path) -> Path:
    return database.with_name(database.name + ".key")
