"""One reconciler of several works; another takes over from one that was killed or stopped."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from core.db import Database, connect_pool
from core.errors import StoreUnavailableError
from reconciler.lease import Lease
from tests.integration.reconciler.test_process import (
    CONFIG,
    assert_exact,
    clean,
    load,
    start,
    total,
)
from tests.support import Process, free_port, wait_until

TTL_MS = 600_000


def run(url: str, check: Callable[[Database], Awaitable[None]]) -> None:
    async def main() -> None:
        database = await connect_pool(url, size=2, timeout_s=10, require=False)
        try:
            await check(database)
        finally:
            await database.close()

    asyncio.run(main())


def lease(database: Database, holder: str, told: list[bool] | None = None) -> Lease:
    return Lease(
        database, "work", holder, lambda: TTL_MS, (told if told is not None else []).append
    )


async def expire(url: str) -> None:
    """As if its time had passed by Postgres' clock."""
    connection = await asyncpg.connect(url)
    await connection.execute("UPDATE leases SET expires_at = clock_timestamp()")
    await connection.close()


def test_one_holds_it_until_its_time_is_up(database: str) -> None:
    async def check(db: Database) -> None:
        told: list[bool] = []
        one, other = lease(db, "one", told), lease(db, "other")
        assert await one.renew()
        assert not await other.renew()
        assert await one.renew()
        assert not other.held
        await expire(database)
        assert await other.renew()
        assert (
            one.held
        )  # nothing tells it before it asks again: what it does meanwhile is repeatable
        assert not await one.renew()
        assert not one.held
        assert told == [True, False]

    run(database, check)


def test_an_expired_lease_that_nobody_took_is_kept(database: str) -> None:
    async def check(db: Database) -> None:
        one = lease(db, "one")
        assert await one.renew()
        await expire(database)
        assert await one.renew()
        assert not await lease(db, "other").renew()

    run(database, check)


def test_a_released_lease_is_free_at_once_and_only_its_holder_releases(database: str) -> None:
    async def check(db: Database) -> None:
        told: list[bool] = []
        one, other = lease(db, "one", told), lease(db, "other")
        assert await one.renew()
        await other.release()
        assert not await other.renew()
        await one.release()
        assert not one.held
        assert await other.renew()
        assert told == [True, False]

    run(database, check)


def test_of_many_that_ask_at_once_one_gets_it(database: str) -> None:
    async def check(db: Database) -> None:
        found = await asyncio.gather(*(lease(db, f"h{n}").renew() for n in range(20)))
        assert sum(found) == 1
        await expire(database)
        found = await asyncio.gather(*(lease(db, f"i{n}").renew() for n in range(20)))
        assert sum(found) == 1

    run(database, check)


def test_without_postgres_it_is_held_for_its_time_and_not_longer(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(db: Database) -> None:
        now = 1_000.0
        monkeypatch.setattr("core.clock.monotonic", lambda: now)
        told: list[bool] = []
        one = lease(db, "one", told)
        assert await one.renew()

        async def away(*_: object) -> None:
            raise StoreUnavailableError("away")

        db.fetchval = away  # type: ignore[method-assign]
        now += TTL_MS / 1000 - 1
        assert await one.renew()
        now += 1
        assert not one.held
        assert not await one.renew()
        assert told == [True, False]

    run(database, check)


def test_no_postgres_at_all_is_no_lease() -> None:
    async def check(db: Database) -> None:
        assert not await lease(db, "one").renew()

    run(f"postgresql://x@127.0.0.1:{free_port()}/x", check)


# Processes


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


@contextmanager
def two(config: Path, valkey: str, database: str) -> Iterator[tuple[Process, Process]]:
    """The one that holds the lease, and the one in waiting."""
    with start(config, valkey, database) as leader:
        leader.wait_for_output("lease_gained")
        with start(config, valkey, database) as waiting:
            assert "lease_gained" not in waiting.output
            yield leader, waiting


def leaders(config: Path) -> float:
    from prometheus_client.parser import text_string_to_metric_families

    from core.telemetry.exposition import render

    page = render(config.parent / "metrics").decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "tallygate_reconciler_leader"
    )


def test_a_killed_leader_is_replaced(config: Path, valkey: str, database: str) -> None:
    with load(valkey, 4) as thread, two(config, valkey, database) as (leader, waiting):
        wait_until(lambda: total(thread) > 50, what="some load")
        assert leaders(config) == 1
        leader.kill()
        waiting.wait_for_output("lease_gained")
        before = total(thread)
        wait_until(lambda: total(thread) > before + 50, what="more load")
        wait_until(lambda: leaders(config) == 1)
        thread.stop.set()
        thread.join()
        wait_until(lambda: clean(thread), what="the last flush")
    assert_exact(thread, valkey, database)


def test_a_stopped_leader_is_replaced_and_may_wake(
    config: Path, valkey: str, database: str
) -> None:
    with load(valkey, 4) as thread, two(config, valkey, database) as (leader, waiting):
        wait_until(lambda: total(thread) > 50, what="some load")
        leader.signal(signal.SIGSTOP)
        try:
            waiting.wait_for_output("lease_gained")
            before = total(thread)
            wait_until(lambda: total(thread) > before + 50, what="more load")
        finally:
            leader.signal(signal.SIGCONT)
        leader.wait_for_output("lease_lost")
        wait_until(lambda: leaders(config) == 1)
        thread.stop.set()
        thread.join()
        wait_until(lambda: clean(thread), what="the last flush")
        assert "_failed" not in leader.output + waiting.output
    assert_exact(thread, valkey, database)


def test_a_clean_stop_hands_over_at_once(config: Path, valkey: str, database: str) -> None:
    config.write_text(CONFIG.replace("lease: 1s", "lease: 5m"))
    with two(config, valkey, database) as (leader, waiting):
        assert leader.terminate() == 0
        waiting.wait_for_output("lease_gained", deadline_s=60)  # and not five minutes
