"""The one source of time outside Redis.

Windows and periods are decided by Redis `TIME` inside the scripts. Everything else that needs a
wall clock (key expiry, log lines, SQL parameters) takes a `Clock`, so a test can inject one.
Inside the code a time is an integer: milliseconds since the Unix epoch, UTC.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], int]


def now_ms() -> int:
    """Wall clock: integer milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


# Seconds from an arbitrary start, never going back: for time-outs and durations only. The function
# itself, as it is called several times a request.
monotonic: Callable[[], float] = time.monotonic


def to_datetime(ms: int) -> datetime:
    """Epoch milliseconds as an aware UTC datetime, exact to the millisecond."""
    seconds, millis = divmod(ms, 1000)
    return datetime.fromtimestamp(seconds, tz=UTC).replace(microsecond=millis * 1000)


def from_datetime(value: datetime) -> int:
    """An aware datetime as epoch milliseconds, rounded down.

    Raises:
        ValueError: the datetime has no timezone.
    """
    if value.tzinfo is None:
        raise ValueError("a datetime without a timezone has no place on the time line")
    delta = value - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1000 + delta.microseconds // 1000


def isoformat(ms: int) -> str:
    """Epoch milliseconds as RFC 3339 in UTC, e.g. `2026-11-22T12:50:00.000Z`."""
    return to_datetime(ms).strftime("%Y-%m-%dT%H:%M:%S.") + f"{ms % 1000:03d}Z"
