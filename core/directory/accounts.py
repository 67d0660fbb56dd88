"""Creators (who sell an API) and their customers (who buy it)."""

from __future__ import annotations

from dataclasses import dataclass

from core import clock, ids
from core.clock import Clock
from core.db import Database, Row
from core.directory import fields
from core.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class Creator:
    id: str
    name: str
    email: str
    created_at_ms: int


@dataclass(frozen=True, slots=True)
class Customer:
    id: str
    creator_id: str
    name: str
    email: str
    created_at_ms: int


async def create_creator(
    db: Database, *, name: str, email: str, now: Clock = clock.now_ms
) -> Creator:
    """A new creator with a fresh `cre_…` identifier."""
    row = await db.fetchrow(
        "create_creator",
        ids.new("cre"),
        fields.name(name),
        fields.email(email),
        clock.to_datetime(now()),
    )
    assert row is not None
    return _creator(row)


async def get_creator(db: Database, creator_id: str) -> Creator:
    row = await db.fetchrow("get_creator", fields.identifier("creator", creator_id))
    if row is None:
        raise _no_creator(creator_id)
    return _creator(row)


async def list_creators(db: Database, *, after: str = "", limit: int = 100) -> list[Creator]:
    after = fields.identifier("after", after)
    return [_creator(r) for r in await db.fetch("list_creators", after, fields.page_limit(limit))]


async def create_customer(
    db: Database, *, creator_id: str, name: str, email: str, now: Clock = clock.now_ms
) -> Customer:
    """A new customer of a creator, with a fresh `cus_…` identifier."""
    row = await db.fetchrow(
        "create_customer",
        ids.new("cus"),
        fields.identifier("creator", creator_id),
        fields.name(name),
        fields.email(email),
        clock.to_datetime(now()),
    )
    if row is None:
        raise _no_creator(creator_id)
    return _customer(row)


async def get_customer(db: Database, customer_id: str) -> Customer:
    row = await db.fetchrow("get_customer", fields.identifier("customer", customer_id))
    if row is None:
        raise NotFoundError(f"customer {customer_id!r} does not exist: list them to find it")
    return _customer(row)


async def list_customers(
    db: Database, *, creator_id: str | None = None, after: str = "", limit: int = 100
) -> list[Customer]:
    """Customers of one creator, or of all when `creator_id` is None."""
    if creator_id is not None:
        creator_id = fields.identifier("creator", creator_id)
    after = fields.identifier("after", after)
    rows = await db.fetch("list_customers", after, fields.page_limit(limit), creator_id)
    return [_customer(row) for row in rows]


def _no_creator(creator_id: str) -> NotFoundError:
    return NotFoundError(f"creator {creator_id!r} does not exist: list them to find it")


def _creator(row: Row) -> Creator:
    return Creator(row["id"], row["name"], row["email"], clock.from_datetime(row["created_at"]))


def _customer(row: Row) -> Customer:
    return Customer(
        row["id"],
        row["creator_id"],
        row["name"],
        row["email"],
        clock.from_datetime(row["created_at"]),
    )
