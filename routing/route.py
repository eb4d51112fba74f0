"""A route: the (model, key) pair chosen for one attempt, with the capacity reserved for it."""

from __future__ import annotations

from enum import IntEnum

from msgspec import Struct

from routing.catalog import Key, Model
from routing.ledger import Reservation


class Rung(IntEnum):
    """Where a model stands for one request; a rung is tried when those above it have nothing left (SPEC 4.10)."""

    FREE = 1
    HELD_BACK = 2  # used by other conversations
    EXCLUDED = 3  # from the mode
    DOUBTED = 4  # banned for the session, or its health gate is open
    RESTING = 5  # after a transient failure
    KEY_RESTING = 6  # after a 429 that named no time


FIRST_TRIAL = Rung.DOUBTED  # from this rung on a model is asked by one request at a time


class Route(Struct, frozen=True):
    """A (model, key) pair chosen for one attempt. `trial`: whoever holds it is the only one who asks this model, until
    the attempt is committed or settled."""

    model: Model
    key: Key
    reservation: Reservation | None
    rung: Rung = Rung.FREE
    trial: bool = False
    tried_at: float = 0.0  # by which the trial is given back
