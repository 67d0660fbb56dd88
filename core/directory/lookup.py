"""What a gateway asks for: many keys or subscriptions in one query."""

from __future__ import annotations

from dataclasses import dataclass

from core.db import Database, Row
from core.policy import Status


@dataclass(frozen=True, slots=True)
class SubscriptionRow:
    id: str
    plan: str
    status: Status
    anchor_ms: int
    customer_id: str
    creator_id: str


@dataclass(frozen=True, slots=True)
class KeyRow:
    """`expires_at_ms` is 0 for a key that does not expire."""

    digest: bytes
    active: bool
    expires_at_ms: int
    subscription: SubscriptionRow


async def lookup_keys(db: Database, digests: list[bytes]) -> list[KeyRow]:
    """The keys that exist, in no particular order; those missing are unknown."""
    return [
        KeyRow(row["digest"], row["active"], row["expires_at_ms"], _subscription(row))
        for row in await db.fetch("lookup_keys", digests)
    ]


async def lookup_subscriptions(db: Database, ids: list[str]) -> list[SubscriptionRow]:
    """The subscriptions that exist, in no particular order."""
    return [_subscription(row) for row in await db.fetch("lookup_subscriptions", ids)]


def _subscription(row: Row) -> SubscriptionRow:
    return SubscriptionRow(
        row["id"],
        row["plan"],
        Status(row["status"]),
        row["anchor_ms"],
        row["customer_id"],
        row["creator_id"],
    )
