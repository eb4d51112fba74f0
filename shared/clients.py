"""The limits of client keys (SPEC 19), counted by all gateways together in the same way as those of providers' keys."""

from __future__ import annotations

import time

from routing.clients import Admission, Client, over_limit
from shared.account import Account, Limits
from shared.shares import SharedLedger

WAIT_S_MIN = 1.0  # said to a client that is refused


class SharedClients:
    def __init__(self, ledger: SharedLedger) -> None:
        self._ledger = ledger

    async def admit(self, client: Client, admission: Admission) -> None:
        """Take its place among all gateways. Raises GatewayError 429."""
        limits = client.limits
        account = self._account(client)
        if account is None or limits.rpm is limits.rpd is limits.tpd is None:
            return
        now = time.monotonic()
        account.roll(admission.day)
        if self._ledger.taken(account, admission.tokens, now, admission.day):
            return
        if account.denied_until <= now or admission.tokens < account.denied_tokens:
            if await self._ledger.granted(account, admission.tokens, admission.at):
                return
            now = time.monotonic()
        asked = f"{limits.rpm} requests per minute, {limits.rpd} and {limits.tpd} tokens per day".replace("None", "any")
        raise over_limit(asked, max(WAIT_S_MIN, account.denied_until - now))

    def settled(self, client: Client, admission: Admission, requests: int, tokens: int) -> None:
        """It has used so much more, or less, than was counted."""
        account = self._account(client)
        if account is not None and (requests or tokens):
            self._ledger.correct(account, admission.at, admission.day, requests, tokens)

    def _account(self, client: Client) -> Account | None:
        own = client.limits
        limits = Limits(own.rpm, own.rpd, None, own.tpd)
        return self._ledger.account(("client", client.id), limits, lambda: f"client:{client.key_hash[:12].hex()}")
