"""Real processes, killed at each step of closing, sealing and rolling up: the result is the same.

The stores' clocks are real, so what is prepared lies in the past: states and rows as a reconciler
finds them that was away for months.
"""

from __future__ import annotations

import asyncio
import signal
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from core.clock import from_datetime, to_datetime
from core.period import HOUR_MS, billing_period
from reconciler.retention import month_of
from tests.integration.reconciler.sealing import CONFIG as CATALOGUE
from tests.integration.reconciler.sealing import execute
from tests.support import Process, run_module, wait_until
from tests.support.scripts import Scripts

CONFIG = (
    """
redis: {url: "${TALLYGATE_REDIS_URL}"}
postgres: {url: "${TALLYGATE_POSTGRES_URL}"}
reconciler: {flush_interval: 10ms, lease: 1s, seal_after: 1s, retention: {hours: 62d}}
log: {format: json}
"""
    + CATALOGUE
)

SUBJECTS = 6
LIVE, UNFLUSHED, IDLE = 0, 1, 2  # by number modulo 3


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def start(config: Path, redis_url: str, postgres_url: str, failpoint: str = "") -> Process:
    return run_module(
        "reconciler",
        "--config",
        str(config),
        env={
            "TALLYGATE_REDIS_URL": redis_url,
            "TALLYGATE_POSTGRES_URL": postgres_url,
            "TALLYGATE_METRICS_DIR": str(config.parent / "metrics"),
            "TALLYGATE_FAILPOINTS": failpoint,
        },
    )


def fetch(url: str, sql: str, *args: object) -> list[dict[str, Any]]:
    async def run() -> list[dict[str, Any]]:
        connection = await asyncpg.connect(url)
        try:
            return [dict(row) for row in await connection.fetch(sql, *args)]
        finally:
            await connection.close()

    return asyncio.run(run())


def prepare(redis_url: str, postgres_url: str, every: int | None = None) -> int:
    """Six subscriptions that used something half a year ago; the start of that period in ms."""
    scripts = Scripts(redis_url, controlled=False)
    now_ms = int(scripts.redis.time()[0]) * 1000
    anchor = month_of(to_datetime(now_ms)).replace(day=10)
    anchor_ms = from_datetime(anchor) - 190 * 24 * HOUR_MS
    start_ms, end_ms = billing_period(anchor_ms, 1, anchor_ms)
    hour = start_ms - start_ms % HOUR_MS

    async def fill() -> None:
        connection = await asyncpg.connect(postgres_url)
        await connection.execute(
            "INSERT INTO creators VALUES ('cre_1', 'n', 'e'); "
            "INSERT INTO customers VALUES ('cus_1', 'cre_1', 'n', 'e'); "
            "INSERT INTO meters (name, decimals, aggregation) VALUES ('requests', 0, 'sum')"
        )
        for number in range(SUBJECTS):
            subject, total = f"sub_{number}", 7 + number
            await connection.execute(
                "INSERT INTO subscriptions (id, creator_id, customer_id, plan, status, anchor) "
                "VALUES ($1, 'cre_1', 'cus_1', 'small', 'active', $2)",
                subject,
                to_datetime(anchor_ms),
            )
            kind = number % 3 if every is None else every
            if kind != IDLE:
                fields = {
                    "p:requests": f"{start_ms} {end_ms} {hour}",
                    "m:requests": f"{total} {total - 5} {total} {total - 5} {total}",
                }
                scripts.seed(subject, fields, version=total)
            if kind == UNFLUSHED:
                key = scripts.keyspace.state(subject)
                # as the script would have: since the hour that was never flushed
                scripts.redis.zadd(scripts.keyspace.dirty(0), {key: hour})
                continue
            await connection.execute(
                "INSERT INTO ledger_subjects VALUES ($1, 1, $2)", subject, total
            )
            at, amounts = to_datetime(start_ms), (Decimal(total), Decimal(total - 5))
            await connection.execute(
                "INSERT INTO ledger_periods VALUES ($1, 'requests', $2, $3, $4, $5, 1, $6)",
                subject, at, to_datetime(end_ms), *amounts, total,
            )  # fmt: skip
            await connection.execute(
                "INSERT INTO ledger_hours VALUES ($1, 'requests', $2, $3, $4, $5, 1, $6)",
                subject, at, to_datetime(hour), *amounts, total,
            )  # fmt: skip
        await connection.close()

    asyncio.run(fill())
    return start_ms


def check(postgres_url: str, start_ms: int) -> None:
    rows = fetch(
        postgres_url,
        "SELECT * FROM ledger_periods WHERE period_start = $1 ORDER BY subject",
        to_datetime(start_ms),
    )
    assert [(row["subject"], row["total"], row["overage"]) for row in rows] == [
        (f"sub_{number}", 7 + number, 2 + number) for number in range(SUBJECTS)
    ]
    assert [(row["seals"], row["peak_hour"]) for row in rows] == [
        (1, 7 + number) for number in range(SUBJECTS)
    ]
    events = fetch(postgres_url, "SELECT * FROM limit_events ORDER BY subject")
    assert [(row["subject"], row["limit_name"], row["kind"], row["usage"]) for row in events] == [
        (f"sub_{number}", "monthly", "reset", 7 + number) for number in range(SUBJECTS)
    ]
    totals = fetch(
        postgres_url, "SELECT subject, sum(total) FROM ledger_periods GROUP BY 1 ORDER BY 1"
    )
    assert [row["sum"] for row in totals] == [7 + number for number in range(SUBJECTS)]


def sealed(postgres_url: str, start_ms: int) -> bool:
    rows = fetch(
        postgres_url,
        "SELECT count(*) FILTER (WHERE sealed_at IS NOT NULL) AS n FROM ledger_periods "
        "WHERE period_start = $1",
        to_datetime(start_ms),
    )
    return bool(rows[0]["n"] == SUBJECTS)


def settled(redis_url: str, postgres_url: str, start_ms: int) -> bool:
    scripts = Scripts(redis_url, controlled=False)
    keys = scripts.keyspace
    return (
        sealed(postgres_url, start_ms)
        and scripts.redis.zcard(keys.dirty(0)) == 0
        and scripts.redis.xlen(keys.events(0)) == 0
    )


@pytest.mark.parametrize("failpoint", ["periods.rolled", "periods.sealed", "periods.sealed:2"])
def test_killed_while_sealing(config: Path, valkey: str, database: str, failpoint: str) -> None:
    start_ms = prepare(valkey, database)
    with start(config, valkey, database, failpoint) as process:
        assert process.wait() == -signal.SIGKILL
    with start(config, valkey, database) as process:
        wait_until(lambda: settled(valkey, database, start_ms), 30, what="all periods sealed")
        assert process.terminate() == 0
    assert "_failed" not in process.output
    check(database, start_ms)


@pytest.mark.parametrize("failpoint", ["retention.rolled_up", "retention.dropped"])
def test_killed_while_rolling_up(config: Path, valkey: str, database: str, failpoint: str) -> None:
    start_ms = prepare(valkey, database, every=IDLE)
    asyncio.run(
        execute(
            database, "UPDATE ledger_periods SET sealed_at = now(), seals = 1, peak_hour = total"
        )
    )
    # as a reconciler left it that made the month's partition when it was young
    asyncio.run(
        execute(database, "SELECT tallygate_add_hours_partition($1)", to_datetime(start_ms))
    )
    days = "SELECT subject, total, overage, peak_hour, hours FROM ledger_days ORDER BY subject"
    with start(config, valkey, database, failpoint) as process:
        assert process.wait() == -signal.SIGKILL
    assert fetch(database, days) == []
    hours = fetch(database, "SELECT count(*) AS n FROM ledger_hours WHERE total > 0")
    assert hours[0]["n"] == SUBJECTS
    with start(config, valkey, database) as process:
        wait_until(lambda: fetch(database, days), 30, what="the roll-up")
        assert process.terminate() == 0
    assert [tuple(row.values()) for row in fetch(database, days)] == [
        (f"sub_{number}", 7 + number, 2 + number, 7 + number, 1) for number in range(SUBJECTS)
    ]
    until = fetch(database, "SELECT until FROM ledger_rolled")[0]["until"]
    assert until > to_datetime(start_ms)
    assert fetch(database, "SELECT * FROM ledger_hours WHERE hour_start < $1", until) == []
    assert until <= datetime.now(UTC)
