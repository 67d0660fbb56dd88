"""LISTEN: notifications arrive, and a lost connection comes back by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import asyncpg

from core import directory
from core.db import Listener, connect_pool
from core.secrets import KeyHasher
from tests.support import wait_until_async

END_LISTENERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'tallygate listen'
"""


class Recorder:
    def __init__(self) -> None:
        self.payloads: list[str] = []
        self.connects = 0
        self.losses = 0

    def connected(self) -> None:
        self.connects += 1

    def lost(self) -> None:
        self.losses += 1

    def listener(self, url: str, on_notify: Callable[[str], None] | None = None) -> Listener:
        return Listener(
            url,
            "tallygate_changed",
            on_notify=on_notify or self.payloads.append,
            on_connect=self.connected,
            on_loss=self.lost,
        )


def test_changes_of_keys_and_subscriptions_are_announced(database: str) -> None:
    async def run() -> None:
        seen = Recorder()
        listener = seen.listener(database)
        listener.start()
        await wait_until_async(lambda: seen.connects)
        db = await connect_pool(database, size=1, timeout_s=5)
        creator = await directory.create_creator(db, name="Ann", email="ann@example.com")
        customer = await directory.create_customer(
            db, creator_id=creator.id, name="Bob", email="bob@example.com"
        )
        sub = await directory.create_subscription(db, customer_id=customer.id, plan="free")
        hasher = KeyHasher("pepper")
        new = await directory.create_key(db, hasher, subscription_id=sub.id)
        digest = hasher.digest(new.secret.encode())
        await directory.touch_keys(db, {digest: 1_800_000_000_000})  # announced to nobody
        await directory.update_key(db, new.key.id, name="other")  # nor this
        await directory.set_plan(db, sub.id, "free")  # nor what changes nothing
        await directory.update_key(db, new.key.id, active=False)
        await directory.set_status(db, sub.id, "paused")
        await directory.revoke_key(db, new.key.id)
        key, subscription = f"key:{digest.hex()}", f"subscription:{sub.id}"
        await wait_until_async(lambda: len(seen.payloads) >= 5)
        assert seen.payloads == [subscription, key, key, subscription, key]
        await listener.close()
        await db.close()

    asyncio.run(run())


def test_a_cut_connection_is_reported_and_comes_back(database: str) -> None:
    async def run() -> None:
        seen = Recorder()
        listener = seen.listener(database)
        listener.start()
        await wait_until_async(lambda: listener.connected)
        connection = await asyncpg.connect(database)
        await connection.execute(END_LISTENERS)
        await wait_until_async(lambda: seen.connects == 2)
        assert seen.losses == 1
        await connection.execute("NOTIFY tallygate_changed, 'subscription:after'")
        await wait_until_async(lambda: "subscription:after" in seen.payloads)
        await listener.close()
        assert (seen.losses, listener.connected) == (1, False)  # closing is no loss
        await connection.close()

    asyncio.run(run())


def test_a_callback_that_raises_does_not_end_the_listener(database: str) -> None:
    async def run() -> None:
        calls: list[str] = []

        def broken(payload: str) -> None:
            calls.append(payload)
            raise RuntimeError("a bug")

        seen = Recorder()
        listener = seen.listener(database, broken)
        listener.start()
        await wait_until_async(lambda: listener.connected)
        connection = await asyncpg.connect(database)
        for number in range(2):
            await connection.execute(f"NOTIFY tallygate_changed, '{number}'")
        await wait_until_async(lambda: calls == ["0", "1"])
        assert seen.losses == 0
        await listener.close()
        await connection.close()

    asyncio.run(run())
