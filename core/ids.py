"""Identifiers: a type prefix, then 26 characters of time-ordered Crockford base 32 (ULID layout).

48 bits of milliseconds, then 80 random bits: sortable by creation, unguessable in practice, and
readable in a log line (`sub_01K...`).
"""

from __future__ import annotations

import os

from core import clock

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def ulid(at_ms: int | None = None) -> str:
    """26 characters; `at_ms` is epoch milliseconds, now when omitted."""
    stamp = clock.now_ms() if at_ms is None else at_ms
    value = (stamp << 80) | int.from_bytes(os.urandom(10), "big")
    return "".join(_ALPHABET[(value >> shift) & 31] for shift in range(125, -1, -5))


def new(prefix: str) -> str:
    """A fresh identifier such as `sub_01KAM7...`; prefix without the underscore."""
    return f"{prefix}_{ulid()}"
