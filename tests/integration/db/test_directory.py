"""Creators, customers, subscriptions and keys on a real Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from core import directory, secrets
from core.db import Database, connect_pool
from core.errors import InvalidValueError, NotFoundError
from core.policy import Status
from core.secrets import KeyHasher

NOW = 1_800_000_000_123
HASHER = KeyHasher("pepper")


def run(url: str, function: Callable[[Database], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        db = await connect_pool(url, size=2, timeout_s=5)
        try:
            return await function(db)
        finally:
            await db.close()

    return asyncio.run(main())


async def subscription(db: Database, **fields: Any) -> directory.Subscription:
    creator = await directory.create_creator(db, name=" Ann ", email="ann@example.com")
    customer = await directory.create_customer(
        db, creator_id=creator.id, name="Bob", email="bob@example.com"
    )
    return await directory.create_subscription(
        db, customer_id=customer.id, plan="free", now=lambda: NOW, **fields
    )


def test_a_subscription_lives_its_life(database: str) -> None:
    async def check(db: Database) -> None:
        sub = await subscription(db)
        assert (sub.plan, sub.status, sub.anchor_ms) == ("free", Status.ACTIVE, NOW)
        assert sub == await directory.get_subscription(db, sub.id)
        later = lambda: NOW + 5  # noqa: E731
        assert (await directory.set_plan(db, sub.id, "pro", now=later)).plan == "pro"
        assert (await directory.set_status(db, sub.id, "past_due")).status is Status.PAST_DUE
        moved = await directory.set_anchor(db, sub.id, NOW - 77, now=later)
        assert (moved.anchor_ms, moved.updated_at_ms, moved.plan) == (NOW - 77, NOW + 5, "pro")
        [row] = await directory.lookup_subscriptions(db, [sub.id, "sub_none"])
        assert (row.plan, row.anchor_ms, row.status) == ("pro", NOW - 77, Status.PAST_DUE)
        assert (row.customer_id, row.creator_id) == (sub.customer_id, sub.creator_id)

    run(database, check)


def test_a_key_is_shown_once_and_stored_as_its_digest(database: str) -> None:
    async def check(db: Database) -> None:
        sub = await subscription(db)
        new = await directory.create_key(
            db, HASHER, subscription_id=sub.id, name="ci", expires_at_ms=NOW
        )
        assert secrets.looks_valid(new.secret)
        [listed] = await directory.list_keys(db, subscription_id=sub.id)
        assert listed == new.key
        assert new.secret.startswith(listed.prefix)
        stored = await db.fetchrow("get_key", new.key.id)
        assert stored is not None
        assert new.secret not in repr(dict(stored))

        digest = HASHER.digest(new.secret.encode())
        [row] = await directory.lookup_keys(db, [digest, bytes(32)])
        assert (row.digest, row.active, row.expires_at_ms) == (digest, True, NOW)
        assert (row.subscription.id, row.subscription.plan) == (sub.id, "free")

        changed = await directory.update_key(db, new.key.id, active=False)
        assert (changed.active, changed.expires_at_ms, changed.name) == (False, NOW, "ci")
        changed = await directory.update_key(db, new.key.id, expires_at_ms=None)
        assert (changed.active, changed.expires_at_ms) == (False, None)
        [row] = await directory.lookup_keys(db, [digest])
        assert (row.active, row.expires_at_ms) == (False, 0)

        await directory.touch_keys(db, {digest: NOW, bytes(32): NOW})
        await directory.touch_keys(db, {digest: NOW - 1})  # late news
        assert (await directory.get_key(db, new.key.id)).last_used_at_ms == NOW

        await directory.revoke_key(db, new.key.id)
        assert await directory.lookup_keys(db, [digest]) == []

    run(database, check)


def test_lists_come_in_pages_and_by_owner(database: str) -> None:
    async def check(db: Database) -> None:
        sub = await subscription(db)
        other = await subscription(db)
        for _ in range(3):
            await directory.create_subscription(db, customer_id=sub.customer_id, plan="pro")
        mine = await directory.list_subscriptions(db, customer_id=sub.customer_id)
        assert [s.id for s in mine] == sorted(s.id for s in mine)
        assert len(mine) == 4
        first = await directory.list_subscriptions(db, customer_id=sub.customer_id, limit=3)
        rest = await directory.list_subscriptions(
            db, customer_id=sub.customer_id, limit=3, after=first[-1].id
        )
        assert first + rest == mine
        [found] = await directory.list_subscriptions(db, creator_id=other.creator_id)
        assert found == other
        assert len(await directory.list_creators(db)) == 2
        [customer] = await directory.list_customers(db, creator_id=other.creator_id)
        assert customer.id == other.customer_id
        assert customer == await directory.get_customer(db, customer.id)

    run(database, check)


@pytest.mark.parametrize(
    "call",
    [
        lambda db: directory.get_creator(db, "cre_x"),
        lambda db: directory.get_customer(db, "cus_x"),
        lambda db: directory.get_subscription(db, "sub_x"),
        lambda db: directory.get_key(db, "key_x"),
        lambda db: directory.create_customer(
            db, creator_id="cre_x", name="n", email="a@example.com"
        ),
        lambda db: directory.create_subscription(db, customer_id="cus_x", plan="p"),
        lambda db: directory.create_key(db, HASHER, subscription_id="sub_x"),
        lambda db: directory.set_plan(db, "sub_x", "p"),
        lambda db: directory.set_status(db, "sub_x", "active"),
        lambda db: directory.set_anchor(db, "sub_x", 1),
        lambda db: directory.update_key(db, "key_x", active=True),
        lambda db: directory.revoke_key(db, "key_x"),
    ],
)
def test_an_unknown_identifier_is_not_found(
    database: str, call: Callable[[Database], Awaitable[Any]]
) -> None:
    with pytest.raises(NotFoundError, match="_x' does not exist"):
        run(database, call)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("name", lambda db: directory.create_creator(db, name=" ", email="a@example.com")),
        ("name", lambda db: directory.create_creator(db, name="a\0", email="a@example.com")),
        ("name", lambda db: directory.create_creator(db, name="a" * 201, email="a@example.com")),
        ("email", lambda db: directory.create_creator(db, name="a", email="nobody")),
        ("creator", lambda db: directory.get_creator(db, "a\0b")),
        ("plan", lambda db: directory.set_plan(db, "s", "no such thing")),
        ("status", lambda db: directory.set_status(db, "s", "asleep")),
        ("anchor", lambda db: directory.set_anchor(db, "s", 10**18)),
        ("anchor", lambda db: directory.set_anchor(db, "s", -1)),
        ("expires_at", lambda db: directory.update_key(db, "k", expires_at_ms=10**18)),
        ("limit", lambda db: directory.list_keys(db, limit=0)),
        ("after", lambda db: directory.list_keys(db, after="\0")),
    ],
)
def test_a_bad_field_is_named(
    database: str, field: str, call: Callable[[Database], Awaitable[Any]]
) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}: "):
        run(database, call)
