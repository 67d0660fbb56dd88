"""Migrations on a real Postgres: fresh, repeated, concurrent, refused."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from core.db import MigrationError, migrate
from core.db.migrate import load_migrations
from core.errors import StoreUnavailableError
from tests.support import free_port

ALL = [migration.label for migration in load_migrations()]


def query(url: str, sql: str) -> list[tuple[object, ...]]:
    async def run() -> list[tuple[object, ...]]:
        connection = await asyncpg.connect(url)
        try:
            return [tuple(row) for row in await connection.fetch(sql)]
        finally:
            await connection.close()

    return asyncio.run(run())


def tables(url: str) -> set[object]:
    return {
        row[0] for row in query(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    }


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    copy = tmp_path / "migrations"
    shutil.copytree(Path(sys.modules["core.db.migrate"].__file__ or "").parent / "migrations", copy)
    return copy


def add(directory: Path, name: str, sql: str) -> None:
    (directory / f"{len(ALL) + 1:04d}_{name}.sql").write_text(sql)


def test_a_fresh_database_gets_everything_and_a_second_run_nothing(empty_database: str) -> None:
    assert asyncio.run(migrate(empty_database)) == ALL
    assert asyncio.run(migrate(empty_database)) == []
    assert tables(empty_database) >= {
        "creators",
        "customers",
        "subscriptions",
        "api_keys",
        "meters",
        "ledger_subjects",
        "ledger_periods",
        "ledger_hours",
        "limit_events",
        "schema_migrations",
    }


def test_several_processes_at_once_apply_each_migration_once(empty_database: str) -> None:
    code = (
        "import asyncio, sys; from core.db import migrate; "
        "print(','.join(asyncio.run(migrate(sys.argv[1]))))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, empty_database],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(5)
    ]
    results = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * 5, results
    assert sorted(out.strip() for out, _ in results) == [""] * 4 + [",".join(ALL)]


def test_a_database_newer_than_the_code_is_refused(empty_database: str, directory: Path) -> None:
    add(directory, "future", "CREATE TABLE future (id text)")
    asyncio.run(migrate(empty_database, directory))
    with pytest.raises(MigrationError, match=r"newer than this version.*_future"):
        asyncio.run(migrate(empty_database))


def test_an_edited_migration_is_refused(empty_database: str, directory: Path) -> None:
    asyncio.run(migrate(empty_database, directory))
    with (directory / f"{ALL[0]}.sql").open("a") as file:
        file.write("-- an afterthought\n")
    with pytest.raises(MigrationError, match=f"{ALL[0]} was edited"):
        asyncio.run(migrate(empty_database, directory))


def test_a_failing_migration_leaves_nothing_and_can_be_mended(
    empty_database: str, directory: Path
) -> None:
    add(directory, "broken", "CREATE TABLE half (id text); SELECT no_such_column;")
    with pytest.raises(MigrationError, match=r"_broken failed and was rolled back"):
        asyncio.run(migrate(empty_database, directory))
    assert "half" not in tables(empty_database)
    assert "creators" in tables(empty_database)
    add(directory, "broken", "CREATE TABLE half (id text);")
    assert len(asyncio.run(migrate(empty_database, directory))) == 1


def test_misnumbered_files_are_refused(empty_database: str, directory: Path) -> None:
    (directory / "0099_gap.sql").write_text("SELECT 1")
    with pytest.raises(MigrationError, match="without gaps"):
        asyncio.run(migrate(empty_database, directory))
    (directory / "0099_gap.sql").rename(directory / "gap.sql")
    with pytest.raises(MigrationError, match="NNNN_what_it_does"):
        asyncio.run(migrate(empty_database, directory))
    assert "schema_migrations" not in tables(empty_database)


def test_no_postgres_says_so() -> None:
    url = f"postgresql://postgres@127.0.0.1:{free_port()}/x"
    with pytest.raises(StoreUnavailableError, match="TALLYGATE_POSTGRES_URL"):
        asyncio.run(migrate(url))


@pytest.mark.parametrize(
    "insert",
    [
        (
            "INSERT INTO subscriptions (id, creator_id, customer_id, plan, status) "
            "VALUES ('s', 'cre_2', 'cus_1', 'p', 'active')"
        ),  # another creator's customer
        (
            "INSERT INTO subscriptions (id, creator_id, customer_id, plan, status) "
            "VALUES ('s', 'cre_1', 'cus_1', 'p', 'sleeping')"
        ),
        (
            "INSERT INTO api_keys (id, subscription_id, name, prefix, digest) "
            "VALUES ('k', 'sub_1', 'n', 'p', 'short')"
        ),
        "INSERT INTO ledger_periods VALUES ('s', 'm', now(), now(), 1, 0, 1, 1, now())",
        (
            "INSERT INTO ledger_periods "
            "VALUES ('s', 'm', now(), now() + interval '1 d', 'NaN', 0, 1, 1, now())"
        ),
        "DELETE FROM customers WHERE id = 'cus_1'",
    ],
)
def test_the_schema_refuses_what_makes_no_sense(database: str, insert: str) -> None:
    query(
        database,
        "WITH a AS (INSERT INTO creators VALUES ('cre_1', 'n', 'e'), ('cre_2', 'n', 'e')) SELECT 1",
    )
    query(database, "INSERT INTO customers VALUES ('cus_1', 'cre_1', 'n', 'e') RETURNING id")
    query(
        database,
        "INSERT INTO subscriptions (id, creator_id, customer_id, plan, status) "
        "VALUES ('sub_1', 'cre_1', 'cus_1', 'p', 'active') RETURNING id",
    )
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        query(database, insert)
