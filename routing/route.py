"""A route: the (model, key) pair chosen for one attempt, with the capacity reserved for it."""

from __future__ import annotations

from dataclasses import dataclass

from routing.catalog import Key, Model
from routing.ledger import Reservation


@dataclass(frozen=True, slots=True)
class Route:
    """A (model, key) pair chosen for one attempt."""

    model: Model
    key: Key
    reservation: Reservation | None
