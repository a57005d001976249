"""Moments that can be compared and added to, whatever was written into an object.

Called wherever a time from the API server meets arithmetic. A status or a RayJob may hold any text that the API server
takes for a date: without a zone, or in a year in which adding an hour leaves the calendar.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

__all__ = ["after", "sane", "seconds_between", "whole", "written"]

_EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
_LATEST = datetime(2200, 1, 1, tzinfo=UTC)
_CENTURY_SECONDS = 3_155_760_000


def sane(moment: datetime) -> datetime:
    """`moment` with a zone (UTC when it has none), and not before 2000 or after 2200."""
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    # The year is looked at first: comparing the year 1 in another zone with UTC leaves the calendar.
    if aware.year < _EARLIEST.year:
        return _EARLIEST
    return aware if aware.year < _LATEST.year else _LATEST


def whole(moment: datetime) -> datetime:
    """`moment` without fractions of a second, as Kubernetes writes times."""
    return moment.replace(microsecond=0)


def after(moment: datetime, seconds: float) -> datetime:
    """The moment `seconds` later; never beyond 2200."""
    later = sane(moment) + timedelta(seconds=seconds if seconds < _CENTURY_SECONDS else _CENTURY_SECONDS)
    return later if later.year < _LATEST.year else _LATEST


def seconds_between(start: datetime, end: datetime) -> float:
    """Seconds from `start` to `end`; none when a clock went backwards."""
    return max(0.0, (sane(end) - sane(start)).total_seconds())


def written(moment: datetime) -> str:
    """`moment`, which has a zone, as Kubernetes writes times: in UTC, in whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
