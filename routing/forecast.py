"""What is left of each key's day for each model, and when it runs dry (SPEC 21.2).

Pure arithmetic over what was used; the day is the platform's own (routing/day.py). `utc` is in seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from routing.catalog import Model
from routing.day import until_reset_s

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Used:
    """Attempts and their tokens over a span of time."""

    requests: int = 0
    tokens: int = 0


NOTHING = Used()


@dataclass(frozen=True, slots=True)
class Use:
    """What one key has used of one model: in the last minute, in the last hour and in the platform's present day."""

    minute: Used = NOTHING
    hour: Used = NOTHING
    day: Used = NOTHING


@dataclass(frozen=True, slots=True)
class Forecast:
    """None is no limit, nothing left to count down, or never."""

    limits: Mapping[str, int | None]
    used: Mapping[str, int]
    left: Mapping[str, int | None]
    resets_at: float | None  # when the limits of the day begin anew
    dry_at: float | None  # when a limit of the day is used up at the last hour's rate, if that is before the reset


def forecast(model: Model, use: Use, utc: float) -> Forecast:
    """How far one key's limits for one model will reach."""
    limits = {"rpm": model.rpm, "rpd": model.rpd, "tpm": model.tpm, "tpd": model.tpd}
    used = {
        "rpm": use.minute.requests,
        "rpd": use.day.requests,
        "tpm": use.minute.tokens,
        "tpd": use.day.tokens,
    }
    left = {name: None if limit is None else max(0, limit - used[name]) for name, limit in limits.items()}
    if left["rpd"] is None and left["tpd"] is None:
        return Forecast(limits, used, left, resets_at=None, dry_at=None)
    resets_at = utc + until_reset_s(model.platform.daily_reset, utc)
    spent = (hours_left(left["rpd"], use.hour.requests), hours_left(left["tpd"], use.hour.tokens))
    dry_at = min((utc + hours * HOUR_S for hours in spent if hours is not None), default=None)
    return Forecast(limits, used, left, resets_at, dry_at if dry_at is not None and dry_at < resets_at else None)


def hours_left(left: int | None, per_hour: int) -> float | None:
    """Until so much is used up at this rate; None for never."""
    if left is None:
        return None
    if left == 0:
        return 0.0
    return left / per_hour if per_hour else None


def latest(times: Iterable[float | None]) -> float | None:
    """When the last of them has run dry; None when one never does, or there is none."""
    found = list(times)
    known = [time for time in found if time is not None]
    return max(known) if known and len(known) == len(found) else None


def earliest(times: Iterable[float | None]) -> float | None:
    return min((time for time in times if time is not None), default=None)
