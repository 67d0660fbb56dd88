"""Subscriptions: which plan a customer is on, in which status, billed from which anchor."""

from __future__ import annotations

from dataclasses import dataclass

from core import clock, ids
from core.clock import Clock
from core.db import Database, Row
from core.directory import fields
from core.errors import NotFoundError
from core.policy import Status


@dataclass(frozen=True, slots=True)
class Subscription:
    """`anchor_ms`: billing periods are counted from there."""

    id: str
    creator_id: str
    customer_id: str
    plan: str
    status: Status
    anchor_ms: int
    created_at_ms: int
    updated_at_ms: int


async def create_subscription(
    db: Database,
    *,
    customer_id: str,
    plan: str,
    status: str = Status.ACTIVE,
    anchor_ms: int | None = None,
    now: Clock = clock.now_ms,
) -> Subscription:
    """A new subscription (`sub_…`) of a customer; the anchor is now unless given.

    Whether `plan` is in the configuration is for the caller to check: this package reads none.
    """
    now_ms = now()
    anchor = now_ms if anchor_ms is None else fields.time_ms("anchor", anchor_ms)
    row = await db.fetchrow(
        "create_subscription",
        ids.new("sub"),
        fields.identifier("customer", customer_id),
        fields.plan(plan),
        fields.status(status),
        clock.to_datetime(anchor),
        clock.to_datetime(now_ms),
    )
    if row is None:
        raise NotFoundError(f"customer {customer_id!r} does not exist: list them to find it")
    return _subscription(row)


async def get_subscription(db: Database, subscription_id: str) -> Subscription:
    row = await db.fetchrow("get_subscription", fields.identifier("subscription", subscription_id))
    if row is None:
        raise _no_subscription(subscription_id)
    return _subscription(row)


async def list_subscriptions(
    db: Database,
    *,
    creator_id: str | None = None,
    customer_id: str | None = None,
    after: str = "",
    limit: int = 100,
) -> list[Subscription]:
    """Subscriptions of one creator, one customer, or (both None) all."""
    if creator_id is not None:
        creator_id = fields.identifier("creator", creator_id)
    if customer_id is not None:
        customer_id = fields.identifier("customer", customer_id)
    after = fields.identifier("after", after)
    rows = await db.fetch(
        "list_subscriptions", after, fields.page_limit(limit), creator_id, customer_id
    )
    return [_subscription(row) for row in rows]


async def set_plan(
    db: Database, subscription_id: str, plan: str, *, now: Clock = clock.now_ms
) -> Subscription:
    """Move a subscription to another plan; gateways follow within a second."""
    return await _update(db, subscription_id, now, plan=fields.plan(plan))


async def set_status(
    db: Database, subscription_id: str, status: str, *, now: Clock = clock.now_ms
) -> Subscription:
    """Set one of `core.policy.Status`; gateways follow within a second."""
    return await _update(db, subscription_id, now, status=fields.status(status))


async def set_anchor(
    db: Database, subscription_id: str, anchor_ms: int, *, now: Clock = clock.now_ms
) -> Subscription:
    """Count billing periods from `anchor_ms`; gateways follow within a second."""
    return await _update(db, subscription_id, now, anchor_ms=fields.time_ms("anchor", anchor_ms))


async def _update(
    db: Database,
    subscription_id: str,
    now: Clock,
    *,
    plan: str | None = None,
    status: str | None = None,
    anchor_ms: int | None = None,
) -> Subscription:
    row = await db.fetchrow(
        "update_subscription",
        fields.identifier("subscription", subscription_id),
        plan,
        status,
        None if anchor_ms is None else clock.to_datetime(anchor_ms),
        clock.to_datetime(now()),
    )
    if row is None:
        raise _no_subscription(subscription_id)
    return _subscription(row)


def _no_subscription(subscription_id: str) -> NotFoundError:
    return NotFoundError(f"subscription {subscription_id!r} does not exist: list them to find it")


def _subscription(row: Row) -> Subscription:
    return Subscription(
        row["id"],
        row["creator_id"],
        row["customer_id"],
        row["plan"],
        Status(row["status"]),
        clock.from_datetime(row["anchor"]),
        clock.from_datetime(row["created_at"]),
        clock.from_datetime(row["updated_at"]),
    )
