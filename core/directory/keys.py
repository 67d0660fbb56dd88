"""API keys: created with a secret that is shown once, stored as a digest, listed by prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from core import clock, ids, secrets
from core.clock import Clock
from core.db import Database, Row
from core.directory import fields
from core.errors import NotFoundError
from core.secrets import KeyHasher


class Unchanged(Enum):
    """Tells "leave it" from None, which clears a column."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is listed: never its secret. None: no expiry, never used."""

    id: str
    subscription_id: str
    name: str
    prefix: str
    active: bool
    expires_at_ms: int | None
    last_used_at_ms: int | None
    created_at_ms: int


@dataclass(frozen=True, slots=True)
class NewKey:
    """`secret` exists here only; it can never be read back."""

    key: ApiKey
    secret: str


async def create_key(
    db: Database,
    hasher: KeyHasher,
    *,
    subscription_id: str,
    name: str = "default",
    expires_at_ms: int | None = None,
    now: Clock = clock.now_ms,
) -> NewKey:
    """A new key (`key_…`) for a subscription."""
    secret = secrets.generate_key()
    expires = None if expires_at_ms is None else fields.time_ms("expires_at", expires_at_ms)
    row = await db.fetchrow(
        "create_key",
        ids.new("key"),
        fields.identifier("subscription", subscription_id),
        fields.name(name),
        secrets.prefix(secret),
        hasher.digest(secret.encode()),
        None if expires is None else clock.to_datetime(expires),
        clock.to_datetime(now()),
    )
    if row is None:
        raise NotFoundError(
            f"subscription {subscription_id!r} does not exist: list them to find it"
        )
    return NewKey(_key(row), secret)


async def get_key(db: Database, key_id: str) -> ApiKey:
    row = await db.fetchrow("get_key", fields.identifier("key", key_id))
    if row is None:
        raise _no_key(key_id)
    return _key(row)


async def list_keys(
    db: Database, *, subscription_id: str | None = None, after: str = "", limit: int = 100
) -> list[ApiKey]:
    """Keys of one subscription, or of all when it is None."""
    if subscription_id is not None:
        subscription_id = fields.identifier("subscription", subscription_id)
    after = fields.identifier("after", after)
    rows = await db.fetch("list_keys", after, fields.page_limit(limit), subscription_id)
    return [_key(row) for row in rows]


async def update_key(
    db: Database,
    key_id: str,
    *,
    name: str | None = None,
    active: bool | None = None,
    expires_at_ms: int | Literal[Unchanged.UNCHANGED] | None = UNCHANGED,
) -> ApiKey:
    """Change what is given; `expires_at_ms=None` removes the expiry."""
    expires = None
    if isinstance(expires_at_ms, int):
        expires = clock.to_datetime(fields.time_ms("expires_at", expires_at_ms))
    row = await db.fetchrow(
        "update_key",
        fields.identifier("key", key_id),
        None if name is None else fields.name(name),
        active,
        expires,
        expires_at_ms is not UNCHANGED,
    )
    if row is None:
        raise _no_key(key_id)
    return _key(row)


async def revoke_key(db: Database, key_id: str) -> None:
    """Delete a key for good; gateways refuse it within a second."""
    if await db.fetchval("delete_key", fields.identifier("key", key_id)) is None:
        raise _no_key(key_id)


async def touch_keys(db: Database, used: Mapping[bytes, int]) -> None:
    """Record when keys were last used: digest -> epoch milliseconds; unknown ones are ignored."""
    await db.execute("touch_keys", list(used), [clock.to_datetime(ms) for ms in used.values()])


def _no_key(key_id: str) -> NotFoundError:
    return NotFoundError(f"key {key_id!r} does not exist: list them to find it")


def _key(row: Row) -> ApiKey:
    expires, used = row["expires_at"], row["last_used_at"]
    return ApiKey(
        row["id"],
        row["subscription_id"],
        row["name"],
        row["prefix"],
        row["active"],
        None if expires is None else clock.from_datetime(expires),
        None if used is None else clock.from_datetime(used),
        clock.from_datetime(row["created_at"]),
    )
