"""Real Postgres servers with every setting that loses something."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest

from core.doctor import Crash, Severity
from tests.integration.doctor.ask import CONFIG, diagnosed, one
from tests.support import wait_until

if TYPE_CHECKING:
    from cli.embedded import EmbeddedPostgres, EmbeddedValkey


async def _execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def test_postgres_that_does_not_wait_for_its_disk(durable: EmbeddedValkey, database: str) -> None:
    found = diagnosed(durable.url, database)  # the tests' server runs without any fsync
    for check in ("postgres.fsync", "postgres.synchronous_commit"):
        item = one(found, check)
        assert (item.severity, Crash.POWER in item.loses) == (Severity.CRITICAL, True)
        assert "ALTER SYSTEM SET" in item.fix
    assert one(found, "postgres.full_page_writes").severity is Severity.WARNING
    assert one(found, "postgres.schema").severity is Severity.OK
    assert not found.safe


def test_postgres_that_takes_no_writes(durable: EmbeddedValkey, ledger: EmbeddedPostgres) -> None:
    name = "ALTER DATABASE tallygate"
    asyncio.run(_execute(ledger.url, f"{name} SET default_transaction_read_only = on"))
    try:
        found = diagnosed(durable.url, ledger.url)
        assert one(found, "postgres.default_transaction_read_only").severity is Severity.CRITICAL
    finally:
        words = ("SET default_transaction_read_only = off", f"{name} RESET ALL")
        asyncio.run(_execute(ledger.url, *words))
    # commits that wait for nobody although a standby is named
    asyncio.run(
        _execute(
            ledger.url,
            "SET synchronous_commit = local",
            "ALTER SYSTEM SET synchronous_standby_names = 'other'",
            f"{name} SET synchronous_commit = local",
            "SELECT pg_reload_conf()",
        )
    )
    try:
        # a reload takes effect a moment later
        item = wait_until(
            lambda: one(diagnosed(durable.url, ledger.url), "postgres.synchronous_standby_names")
        )
        assert Crash.FAILOVER in item.loses
        assert item.severity is Severity.WARNING
    finally:
        asyncio.run(
            _execute(
                ledger.url,
                "ALTER SYSTEM RESET synchronous_standby_names",
                "SELECT pg_reload_conf()",
                f"{name} RESET ALL",
            )
        )


def test_a_standby_and_its_primary(durable: EmbeddedValkey, server_dir: Path) -> None:
    from cli.embedded import EmbeddedPostgres
    from core.db import migrate

    primary = EmbeddedPostgres(server_dir / "primary", fast=True)
    with primary:
        asyncio.run(migrate(primary.url))
    # a copy of the stopped server, owners and all, is a base backup
    subprocess.run(["cp", "-a", server_dir / "primary", server_dir / "standby"], check=True)
    (server_dir / "standby" / "data" / "standby.signal").touch()
    with primary:
        standby = EmbeddedPostgres(
            server_dir / "standby", fast=True, config={"primary_conninfo": primary.url}
        )
        with standby:
            item = one(diagnosed(durable.url, standby.url), "postgres.standby")
            assert item.severity is Severity.CRITICAL
            assert "target_session_attrs" in item.fix
            item = wait_until(
                lambda: one(
                    diagnosed(durable.url, primary.url), "postgres.synchronous_standby_names"
                ),
                30,
                what="replication",
            )
            assert item.severity is Severity.WARNING
            assert "1 standbys, and no commit waits for one" in item.text
            assert Crash.FAILOVER in item.loses


@pytest.mark.parametrize(
    ("statement", "text", "fix"),
    [
        ("DROP TABLE schema_migrations", "empty", "tallygate migrate"),
        ("DELETE FROM schema_migrations WHERE version > 1", "0001", "tallygate migrate"),
        ("INSERT INTO schema_migrations VALUES (9999, 'x', '')", "newer", "newer version"),
    ],
)
def test_a_schema_of_another_version(
    durable: EmbeddedValkey, database: str, statement: str, text: str, fix: str
) -> None:
    asyncio.run(_execute(database, statement))
    item = one(diagnosed(durable.url, database), "postgres.schema")
    assert item.severity is Severity.CRITICAL
    assert text in item.text
    assert fix in item.fix


def test_more_connections_than_postgres_has(
    durable: EmbeddedValkey, ledger: EmbeddedPostgres
) -> None:
    many = CONFIG.replace("workers: 2", "workers: 20") + "\npostgres: {pool: 10}\n"
    found = diagnosed(durable.url, ledger.url, many)
    item = one(found, "postgres.max_connections")
    assert "may open 240 connections and the server has 97" in item.text
    assert (item.severity, found.safe) == (Severity.NOTE, True)
