"""Checks of what people and callers fill in; each message names the field and the fix."""

from __future__ import annotations

import re
from datetime import datetime

from core import clock
from core.errors import InvalidValueError
from core.policy import Status

MAX_PAGE = 1_000
_MAX_NAME = 200
_MAX_EMAIL = 254  # RFC 5321
_EMAIL = re.compile(r"^[^@\s]+@[^@\s]+\.[^@\s.]+$")
_PLAN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
# Within what Postgres and datetime both hold, with room for a billing period added.
_MIN_TIME_MS = 0
_MAX_TIME_MS = clock.from_datetime(datetime.fromisoformat("9000-01-01T00:00:00+00:00"))


def name(value: str) -> str:
    """A display name, trimmed."""
    text = value.strip()
    if not text:
        raise InvalidValueError("name: empty: give a name to show")
    if len(text) > _MAX_NAME:
        raise InvalidValueError(f"name: {len(text)} characters: use at most {_MAX_NAME}")
    if not text.isprintable():
        raise InvalidValueError("name: has control characters: remove them")
    return text


def email(value: str) -> str:
    """An e-mail address, trimmed; whether it exists only a mail can tell."""
    text = value.strip()
    if len(text) > _MAX_EMAIL or not text.isprintable() or not _EMAIL.match(text):
        raise InvalidValueError(f"email: {text[:80]!r} is no address: write it as ann@example.com")
    return text


def plan(value: str) -> str:
    """The name of a plan; whether the configuration has it is for the caller to check."""
    if not _PLAN.match(value):
        raise InvalidValueError(
            f"plan: {value[:80]!r} cannot be a plan's name: use a name from `plans` in the config"
        )
    return value


def status(value: str) -> Status:
    try:
        return Status(value)
    except ValueError:
        known = ", ".join(Status)
        raise InvalidValueError(f"status: {value[:80]!r} is unknown: use one of {known}") from None


def time_ms(field: str, value: int) -> int:
    """Epoch milliseconds between 1970 and 9000."""
    if not _MIN_TIME_MS <= value < _MAX_TIME_MS:
        raise InvalidValueError(
            f"{field}: {value} is out of range: give milliseconds since 1970 UTC, before year 9000"
        )
    return value


def page_limit(value: int) -> int:
    if not 1 <= value <= MAX_PAGE:
        raise InvalidValueError(f"limit: {value}: use 1 to {MAX_PAGE}")
    return value


def identifier(field: str, value: str) -> str:
    """Any text Postgres can hold; NUL is the one it cannot."""
    if "\0" in value or not value.isprintable():
        raise InvalidValueError(f"{field}: has control characters: remove them")
    return value
