"""The pool: bounded waits, one error for "no answer", recovery, the timing hook."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from cli.embedded import EmbeddedPostgres
from core.db import ConstraintError, Database, Queries, connect_pool, migrate
from core.errors import StoreUnavailableError, TallygateError
from tests.support import free_port, wait_until_async

CREATOR = ("cre_1", "Ann", "ann@example.com")


async def insert(db: Database) -> int:
    return await db.execute("ensure_demo_creator", *CREATOR)


def with_query(db: Database, name: str, sql: str) -> None:
    db.queries = Queries(dict(db.queries) | {name: sql})


def test_queries_are_timed_and_tell_success(database: str) -> None:
    seen: list[tuple[str, bool]] = []

    async def run() -> None:
        db = await connect_pool(database, size=2, timeout_s=5, require=False)
        assert not db.healthy
        db.on_query = lambda name, seconds, ok: seen.append((name, ok and 0 < seconds < 5))
        assert await insert(db) == 1
        assert await insert(db) == 0
        assert db.healthy
        with pytest.raises(ConstraintError) as caught:
            await db.execute("create_creator", *CREATOR, None)
        assert db.healthy
        assert "created_at" in str(caught.value)
        await db.close()

    asyncio.run(run())
    assert seen == [
        ("ensure_demo_creator", True),
        ("ensure_demo_creator", True),
        ("create_creator", False),
    ]


def test_a_transaction_commits_whole_or_not_at_all(database: str) -> None:
    async def run() -> None:
        db = await connect_pool(database, size=2, timeout_s=5)

        async def failing() -> None:
            async with db.transaction() as transaction:
                await transaction.execute("ensure_demo_creator", *CREATOR)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await failing()
        assert await db.fetch("list_creators", "", 10) == []
        async with db.transaction() as transaction:
            await transaction.execute("ensure_demo_creator", *CREATOR)
        assert len(await db.fetch("list_creators", "", 10)) == 1
        await db.close()

    asyncio.run(run())


def test_a_statement_and_a_wait_for_a_connection_end_in_time(database: str) -> None:
    async def run() -> None:
        db = await connect_pool(database, size=1, timeout_s=0.3)
        with_query(db, "slow", "SELECT pg_sleep(30)")
        started = time.monotonic()
        results = await asyncio.gather(
            *(db.fetchval("slow") for _ in range(3)), return_exceptions=True
        )
        assert time.monotonic() - started < 3
        assert [type(result) for result in results] == [StoreUnavailableError] * 3
        await wait_until_async(db.ping)
        await db.close()

    asyncio.run(run())


def test_a_mistake_in_the_arguments_stays_visible(database: str) -> None:
    async def run() -> None:
        db = await connect_pool(database, size=1, timeout_s=5)
        with pytest.raises(Exception, match="server expects") as caught:
            await db.fetch("get_creator", "a", "b")
        assert not isinstance(caught.value, TallygateError)
        await db.close()

    asyncio.run(run())


def test_no_postgres_at_the_start() -> None:
    url = f"postgresql://postgres@127.0.0.1:{free_port()}/x"

    async def run() -> None:
        with pytest.raises(StoreUnavailableError):
            await connect_pool(url, size=1, timeout_s=1)
        db = await connect_pool(url, size=1, timeout_s=1, require=False)
        assert not await db.ping()
        await db.close()
        with pytest.raises(TallygateError, match=r"postgres\.url"):
            await connect_pool("mysql://x", size=1, timeout_s=1)

    asyncio.run(run())


def test_postgres_killed_and_back(server_dir: Path) -> None:
    port = free_port()
    with EmbeddedPostgres(server_dir / "p", port=port) as server:

        async def killed_inside(db: Database) -> None:
            async with db.transaction() as transaction:
                await transaction.fetchval("ping")
                server.kill()
                await transaction.fetchval("ping")

        async def run() -> None:
            await migrate(server.url)
            db = await connect_pool(server.url, size=2, timeout_s=2)
            await insert(db)
            server.kill()
            with pytest.raises(StoreUnavailableError):
                await insert(db)
            assert not db.healthy
            with pytest.raises(StoreUnavailableError):
                async with db.transaction() as transaction:
                    await transaction.fetchval("ping")
            server.start()
            await wait_until_async(db.ping)
            assert db.healthy
            with pytest.raises(StoreUnavailableError):
                await killed_inside(db)
            server.start()
            await wait_until_async(db.ping)
            await db.close()

        asyncio.run(run())
