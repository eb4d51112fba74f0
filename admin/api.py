"""The control plane: what the operator sees and changes over HTTP.

Plain Starlette endpoints over the same state the engine serves from. A change goes through control.py: one transaction,
then a new snapshot for routing. Errors are raised as GatewayError and answered in one place, by gateway.py.
"""

from __future__ import annotations

from starlette.routing import Route

from admin.chain import Chain
from admin.clients import Clients
from admin.control import Control
from admin.drill import Drills
from admin.explain import Explain
from admin.keys import Keys
from admin.live import Live
from admin.quota import Quota
from admin.reports import LogReports
from engine.exchange import Engine
from transport.siblings import Siblings


def admin_routes(engine: Engine, control: Control, siblings: Siblings | None = None) -> list[Route]:
    """Everything under /api, and /metrics; with `siblings` this worker speaks for all of them."""
    chain = Chain(engine, control)
    parts = (
        Live(engine, siblings),
        Keys(engine, control),
        Clients(engine, control),
        chain,
        LogReports(engine, chain),
        Quota(engine),
        Explain(engine, siblings),
        Drills(engine),
    )
    return [route for part in parts for route in part.routes()]
