"""What the engine tells, and asks of, the state that several gateways share (SPEC 20). Without GATEWAY_STATE there is
none, and nobody calls it."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Protocol

from protection import Effect
from routing.clients import Admission, Client
from routing.route import Route


class Shared(Protocol):
    """Nothing here waits longer than SPEC 20.3 allows, and nothing raises because Redis is away."""

    async def start(self) -> None:
        """Before the first request."""

    def jobs(self) -> list[Coroutine[Any, Any, None]]:
        """What runs beside the requests."""

    async def close(self) -> None:
        """After the last one."""

    async def recall(self, session: str) -> None:
        """Learn of a conversation that began at another gateway."""

    async def admits(self, route: Route) -> bool:
        """Whether this attempt may begin, as far as the others are concerned."""

    async def admit_client(self, client: Client, admission: Admission) -> None:
        """Count a client's request against its limits. Raises GatewayError 429."""

    def client_settled(self, client: Client, admission: Admission, requests: int, tokens: int) -> None:
        """It has used so much more, or less, than was counted."""

    def applied(self, effect: Effect, session: str, route: Route, began: float, now: float) -> None:
        """An attempt that began then has changed something here."""

    def trial_ended(self, model: int) -> None:
        """Others may try it now."""

    def cooldowns_cleared(self) -> None:
        """By the operator."""

    def bans_lifted(self) -> None:
        """By the operator."""

    def catalogue_changed(self) -> None:
        """By the operator: those who use the same database read it again."""
