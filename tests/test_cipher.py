"""Encrypting beside the gateway: the same as here, and never the reason why something does not work."""

import os
import secrets
import signal
from pathlib import Path

import pytest
from conftest import API_KEY, client_of
from hypothesis import given, settings
from hypothesis import strategies as st

from records.cipher import CipherProcess, local_cipher
from records.vault import StoreError, Vault

KEY, OTHER_KEY, IV = bytes(range(32)), bytes(32), bytes(12)


@pytest.fixture(scope="module")
def beside():
    with CipherProcess() as process:
        yield process


@settings(max_examples=50, deadline=None)
@given(key=st.binary(min_size=32, max_size=32), iv=st.binary(min_size=12, max_size=12), data=st.binary(max_size=5_000))
def test_the_process_encrypts_and_decrypts_as_it_is_done_here(beside, key, iv, data):
    there, here = beside.cipher(key), local_cipher(key)
    sealed = there.encrypt(iv, data)
    assert sealed == here.encrypt(iv, data)
    assert there.decrypt(iv, sealed) == here.decrypt(iv, sealed) == data


@pytest.mark.parametrize("odd", [b"", b"short", secrets.token_bytes(80)], ids=["nothing", "short", "noise"])
def test_what_was_not_encrypted_with_the_key_is_refused_and_the_process_goes_on(beside, odd):
    cipher, sealed = beside.cipher(KEY), local_cipher(OTHER_KEY).encrypt(IV, b"secret")
    for wrong in (sealed, odd):
        for made in (cipher, local_cipher(KEY)):
            assert made.decrypt(IV, wrong) is None
    assert beside.ask("decrypt", OTHER_KEY, IV, sealed) == b"secret"


def test_a_vault_with_the_wrong_key_says_so_through_the_process(beside):
    ciphertext, iv, tag = Vault(OTHER_KEY).encrypt("secret")
    with pytest.raises(StoreError, match="ENCRYPTION_KEY"):
        Vault(KEY, beside.cipher).decrypt(ciphertext, iv, tag)


def test_without_the_process_it_is_done_here(tmp_path):
    with CipherProcess() as process:
        vault = Vault(KEY, process.cipher)
        sealed = vault.seal("before")
        assert process._child is not None
        os.kill(process._child.pid, signal.SIGKILL)
        assert vault.unseal(sealed) == "before"
        assert process._child is None  # and nobody waits for it again
    assert vault.unseal(vault.seal("after")) == "after"

    with CipherProcess(python=str(tmp_path / "no-python")) as process:
        assert Vault(KEY, process.cipher).unseal(sealed) == "before"
    with CipherProcess(python="/bin/true") as process:  # it starts, and is none
        assert Vault(KEY, process.cipher).unseal(sealed) == "before"


def test_the_process_ends_with_its_block_and_with_whoever_asks_it():
    with CipherProcess() as process:
        process.cipher(KEY).encrypt(IV, b"x")
        pid = process._child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_start_leaves_no_encryption_behind_and_keys_can_be_added_later(start_process, fake):
    for added in (True, False):  # the first start encrypts the catalogue's key, the second decrypts that and the other
        running = await start_process(["a", "b"], {"GATEWAY_API_KEY": API_KEY})
        async with client_of(running) as client:
            assert (await client.chat()).status == 200
            of_process = Path(f"/proc/{running.process.pid}")
            assert "cryptography" not in (of_process / "maps").read_text()
            assert (of_process / f"task/{running.process.pid}/children").read_text() == ""
            if added:
                assert (await client.call("POST", "/api/keys", {"platform": "b", "key": "sk-added-later-0123"}))[
                    0
                ] == 201
                assert "cryptography" in (of_process / "maps").read_text()
            masked = [key["masked"] for key in (await client.get("/api/keys")).json]
            assert any(shown.endswith("0123") for shown in masked)
        running.signal(signal.SIGTERM)
        assert await running.ended() == 0
