"""From every released schema to this one: rows stay, and the release before goes on running.

Gateways and reconcilers are replaced one by one, so the queries of a release must still run, and
mean the same, on the schema of the next.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from core.db import migrate
from core.db.migrate import load_migrations
from tests.integration.db.released import QUERIES

MIGRATIONS = Path(__file__).parents[3] / "core" / "db" / "migrations"
LATEST = len(load_migrations())
JANUARY = datetime(2026, 1, 31, 22, 30, tzinfo=UTC)

# What is filled in at a version: statements that are valid from there on.
ROWS = {
    1: """
INSERT INTO creators (id, name, email) VALUES ('cre_1', 'n', 'e'), ('cre_2', 'n', 'e');
INSERT INTO customers (id, creator_id, name, email) VALUES ('cus_1', 'cre_1', 'n', 'e');
INSERT INTO subscriptions (id, creator_id, customer_id, plan, status, anchor)
VALUES ('s', 'cre_1', 'cus_1', 'p', 'active', '2026-01-01'),
       ('t', 'cre_1', 'cus_1', 'p', 'canceled', '2026-01-31');
INSERT INTO api_keys (id, subscription_id, name, prefix, digest)
VALUES ('key_1', 's', 'n', 'tg_', decode(repeat('ab', 32), 'hex'));
INSERT INTO meters (name, decimals, aggregation)
VALUES ('requests', 0, 'sum'), ('credits', 2, 'sum');
INSERT INTO ledger_subjects (subject, epoch, version) VALUES ('s', 2, 70), ('t', 1, 3);
INSERT INTO ledger_periods
    (subject, meter, period_start, period_end, total, overage, epoch, version)
SELECT s, m, p, p + interval '1 month', 10.25, 1, 1, 9
FROM unnest(ARRAY['s', 't']) s, unnest(ARRAY['requests', 'credits']) m,
     generate_series(timestamptz '2025-11-01', '2026-04-01', '1 month') p;
INSERT INTO ledger_hours (subject, meter, period_start, hour_start, total, overage, epoch, version)
SELECT s, 'requests', date_trunc('month', h), h, extract(day FROM h), 0.5, 1, 9
FROM unnest(ARRAY['s', 't']) s,
     generate_series(timestamptz '2025-11-30', '2026-04-02', '5 hours') h;
INSERT INTO ledger_hours (subject, meter, period_start, hour_start, total, epoch, version)
VALUES ('s', 'requests', '1999-12-01', '1999-12-31 23:00', 4, 1, 1),
       ('s', 'requests', '2000-01-01', '2000-01-01', 5, 1, 1),
       ('s', 'requests', '2033-01-01', '2033-01-31 23:00', 6, 1, 1);
INSERT INTO limit_events (subject, limit_name, meter, kind, threshold, usage, limit_quantity,
                          period_start, period_end, occurred_at)
SELECT 's', 'l', 'requests', 'reset', 0, 7, height, p, p + interval '1 month', p + interval '5 min'
FROM unnest(ARRAY[10, 20, 30]) height, unnest(ARRAY[timestamptz '2026-01-01', '2026-02-01']) p;
INSERT INTO limit_events (subject, limit_name, meter, kind, threshold, usage, limit_quantity,
                          period_start, period_end, occurred_at)
SELECT 's', 'l', 'requests', 'warning', 80, 7, height, p, p + interval '1 month', p
FROM unnest(ARRAY[10, 20]) height, unnest(ARRAY[timestamptz '2026-01-01', '2026-02-01']) p;
"""
}

TABLES = (
    "creators", "customers", "subscriptions", "api_keys", "meters", "ledger_subjects",
    "ledger_periods", "ledger_hours",
)  # fmt: skip


def run(url: str, sql: str, *args: Any) -> list[dict[str, Any]]:
    async def main() -> list[dict[str, Any]]:
        connection = await asyncpg.connect(url, server_settings={"timezone": "UTC"})
        try:
            if not args:
                return [dict(row) for row in await connection.fetch(sql)]
            return [dict(row) for row in await connection.fetch(sql, *args)]
        finally:
            await connection.close()

    return asyncio.run(main())


def script(url: str, sql: str) -> None:
    async def main() -> None:
        connection = await asyncpg.connect(url, server_settings={"timezone": "UTC"})
        try:
            await connection.execute(sql)
        finally:
            await connection.close()

    asyncio.run(main())


@pytest.fixture
def released(tmp_path: Path) -> Any:
    """The migrations of a release that ended at a version."""

    def up_to(version: int) -> Path:
        directory = tmp_path / f"to{version}"
        directory.mkdir()
        for path in sorted(MIGRATIONS.glob("*.sql"))[:version]:
            shutil.copy(path, directory)
        return directory

    return up_to


def contents(url: str, columns: dict[str, list[str]]) -> dict[str, list[tuple[Any, ...]]]:
    found = {}
    for table, names in columns.items():
        rows = run(url, f"SELECT {', '.join(names)} FROM {table}")
        found[table] = sorted(tuple(map(repr, row.values())) for row in rows)
    return found


def columns_of(url: str) -> dict[str, list[str]]:
    rows = run(
        url,
        "SELECT table_name, column_name FROM information_schema.columns "
        "WHERE table_schema = 'public' ORDER BY table_name, ordinal_position",
    )
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["table_name"] in TABLES:
            found.setdefault(row["table_name"], []).append(row["column_name"])
    return found


@pytest.mark.parametrize("version", range(1, LATEST))
def test_every_row_of_a_release_is_kept(empty_database: str, released: Any, version: int) -> None:
    asyncio.run(migrate(empty_database, released(version)))
    for at in range(1, version + 1):
        script(empty_database, ROWS.get(at, ""))
    columns = columns_of(empty_database)
    assert sorted(columns) == sorted(TABLES)
    before = contents(empty_database, columns)
    assert all(before.values())
    events = run(empty_database, "SELECT * FROM limit_events ORDER BY id")

    assert len(asyncio.run(migrate(empty_database))) == LATEST - version
    assert contents(empty_database, columns) == before
    # the first of each reset stays, and everything that is none
    kept, told = [], set()
    for event in events:
        key = (event["subject"], event["limit_name"], event["period_start"])
        if event["kind"] != "reset" or key not in told:
            kept.append(event)
        if event["kind"] == "reset":
            told.add(key)
    after = run(empty_database, "SELECT * FROM limit_events ORDER BY id")
    assert [{name: row[name] for name in kept[0]} for row in after] == kept
    assert len(kept) == len(events) - 4

    # each hour in the partition of its month, none in the default
    places = run(
        empty_database,
        "SELECT DISTINCT tableoid::regclass::text AS place, to_char(hour_start, 'YYYYMM') AS month "
        "FROM ledger_hours",
    )
    assert {row["place"] for row in places} == {f"ledger_hours_{row['month']}" for row in places}
    assert {row["month"] for row in places} >= {"199912", "200001", "202512", "202601", "203301"}


def test_the_schema_is_the_same_whether_it_was_migrated_full_or_empty(
    empty_database: str, database: str, released: Any
) -> None:
    asyncio.run(migrate(empty_database, released(1)))
    script(empty_database, ROWS[1])
    asyncio.run(migrate(empty_database))
    sql = (
        "SELECT table_name, column_name, data_type, is_nullable, column_default "
        "FROM information_schema.columns WHERE table_schema = 'public' "
        "AND table_name !~ '^ledger_hours_\\d' ORDER BY table_name, ordinal_position"
    )
    assert run(empty_database, sql) == run(database, sql)
    sql = (
        "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' "
        "AND tablename !~ '^ledger_hours_\\d' ORDER BY 1, 2"
    )
    assert run(empty_database, sql) == run(database, sql)


def test_the_queries_of_the_release_before_are_valid(database: str) -> None:
    async def main() -> dict[str, str]:
        connection = await asyncpg.connect(database)
        failed = {}
        for name, sql in QUERIES.items():
            try:
                await connection.prepare(sql)
            except asyncpg.PostgresError as error:
                failed[name] = str(error)
        await connection.close()
        return failed

    assert len(QUERIES) > 15
    assert asyncio.run(main()) == {}


def columns(*rows: Sequence[Any]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def test_the_release_before_goes_on_counting(database: str) -> None:
    """Its flush, events and reading, on the new schema."""
    start, end = JANUARY.replace(day=1, hour=0, minute=0), datetime(2026, 2, 1, tzinfo=UTC)
    hours = [JANUARY.replace(minute=0) + timedelta(hours=n) for n in range(4)]

    def flush(version: int, total: int) -> None:
        rows = run(database, QUERIES["accept_states"], ["s"], [1], [version])
        assert [tuple(row.values()) for row in rows] == [("s", version)]
        amounts = (Decimal(total), Decimal(0), 1, version)
        run(
            database,
            QUERIES["store_periods"],
            *columns(("s", "requests", start, end, *amounts)),
        )
        run(
            database,
            QUERIES["store_hours"],
            *columns(*(("s", "requests", start, hour, *amounts) for hour in hours)),
        )

    run(database, QUERIES["pin_meters"], ["requests"], [0], ["sum"])
    for version in (1, 2, 2):
        flush(version, version * 5)
    found = run(database, QUERIES["hours_of_subject"], "s", start, end + timedelta(days=1))
    assert [(row["hour_start"], row["total"]) for row in found] == [(hour, 10) for hour in hours]
    found = run(database, QUERIES["span_totals"], ["s"], ["requests"], [start], [hours[2]])
    assert found[0]["total"] == 20
    (record,) = run(database, QUERIES["latest_records"], ["s"])
    assert (record["total"], record["hour_start"]) == (10, hours[3])
    event = ("s", "l", "requests", "reset", 0, Decimal(4), Decimal(9), end, end, end, "1-1")
    assert len(run(database, QUERIES["store_events"], *columns(event))) == 1
    assert run(database, QUERIES["store_events"], *columns(event)) == []
    # A reset of this period under another height: refused, which that release logs and leaves out.
    again = (*event[:6], Decimal(8), *event[7:])
    with pytest.raises(asyncpg.UniqueViolationError):
        run(database, QUERIES["store_events"], *columns(again))
