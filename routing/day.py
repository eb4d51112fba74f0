"""When a platform's day ends: daily quotas begin anew at an hour of the platform's own time zone.

Written `[HH:MM ]Time/Zone` in the catalogue. A day in which clocks change has 23 or 25 hours.
"""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo


@lru_cache(maxsize=64)  # the zones of a catalogue, and those that providers name
def zone(name: str) -> tzinfo:
    """A time zone by name; UTC where this machine does not know it."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # ZoneInfoNotFoundError is a KeyError
        return UTC


def is_known(reset: str) -> bool:
    """Whether this machine can tell when that is. Not all have a list of time zones; UTC is used then."""
    at, _, name = reset.rpartition(" ")
    try:
        time.fromisoformat(at or "00:00")
    except ValueError:
        return False
    return name == "UTC" or zone(name) is not UTC


def until_reset_s(reset: str, utc: float) -> float:
    """Seconds until quotas of the day begin anew: at midnight of a time zone, or at "HH:MM Zone"."""
    moment, now = parsed(reset, utc)
    due = datetime.combine(now.date(), moment, now.tzinfo)
    if due <= now:
        due = datetime.combine(now.date() + timedelta(days=1), moment, now.tzinfo)
    return due.timestamp() - utc


def day_began(reset: str, utc: float) -> float:
    """When the platform's present day began, in UTC seconds."""
    moment, now = parsed(reset, utc)
    began = datetime.combine(now.date(), moment, now.tzinfo)
    if began > now:
        began = datetime.combine(now.date() - timedelta(days=1), moment, now.tzinfo)
    return began.timestamp()


def parsed(reset: str, utc: float) -> tuple[time, datetime]:
    """The hour at which days begin, and the platform's wall clock."""
    at, _, name = reset.rpartition(" ")
    try:
        moment = time.fromisoformat(at or "00:00")
    except ValueError:
        moment = time(0)
    return moment, datetime.fromtimestamp(utc, zone(name))
