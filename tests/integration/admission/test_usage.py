"""What a subscription has used: Redis over the ledger, and the command that shows it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from core import clock, directory
from core.admission.program import Program, calendar_use, compile_program
from core.config import Snapshot, load
from core.db import Database, connect_pool
from core.errors import NotFoundError
from core.keyspace import Keyspace
from core.meters import MeterRegistry
from core.period import DAY_MS, HOUR_MS, billing_period
from core.redis.store import Store
from core.usage import LimitUsage, Usage, read_usage
from core.usage_limits import LimitStatus, percentage, status_of
from reconciler.events import EventStore
from reconciler.flush import Flusher
from tests.support import free_port
from tests.support.ledger import packed
from tests.support.processes import ROOT
from tests.support.scripts import Scripts

CONFIG = """
redis: {url: "${TALLYGATE_REDIS_URL:-}"}
postgres: {url: "${TALLYGATE_POSTGRES_URL:-}"}
meters:
  credits: {unit: credit, decimals: 2}
plans:
  pro:
    limits:
      per_week: {rate: 60/w, burst: 50}
      per_day: {window: 1d, limit: 40}
      a_week: {window: 1w, limit: 1000, sliding: true}
      monthly: {period: billing, limit: 20, action: overage}
      daily: {period: day, limit: 100, enforce: false}
      credits: {period: billing, meter: credits, limit: 4.5, action: warn}
      slots: {concurrency: 25}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


class World:
    """One subscription of plan `pro`, whose requests the real scripts decide."""

    def __init__(self, database: Database, store: Store, snapshot: Snapshot, url: str) -> None:
        self.database, self.store, self.snapshot = database, store, snapshot
        self.scripts = Scripts(url, controlled=False)
        self.keyspace = Keyspace()
        self.plan = snapshot.plans["pro"]
        self.calendars = calendar_use([self.plan])

    async def create(self) -> None:
        creator = await directory.create_creator(self.database, name="Ann", email="ann@x.com")
        customer = await directory.create_customer(
            self.database, creator_id=creator.id, name="Bob", email="bob@x.com"
        )
        self.now_ms = await self.store.now_ms()
        self.subscription = await directory.create_subscription(
            self.database, customer_id=customer.id, plan="pro", anchor_ms=self.now_ms - 90 * DAY_MS
        )
        self.span = billing_period(self.subscription.anchor_ms, 1, self.now_ms)
        counters = {
            f"q:{meter}:{kind}": "0 0 0"
            for meter, kinds in self.calendars.items()
            for kind in kinds
        }
        self.scripts.seed(self.subscription.id, counters)
        self.scripts.now_us = self.now_ms * 1000

    def program(self, **costs: int) -> Program:
        return compile_program(self.plan, costs, self.snapshot.meters, self.calendars)

    def spend(self, times: int, **costs: int) -> None:
        program = self.program(**(costs or {"requests": 1, "credits": 15}))
        for _ in range(times):
            assert self.scripts.admit(self.subscription.id, program, span=self.span).admitted

    async def flush(self) -> None:
        meters = MeterRegistry(self.snapshot.meters)
        await Flusher(self.store, self.database, self.keyspace, meters).flush_all()
        await EventStore(self.store, self.database, self.keyspace, meters).store_all()

    async def usage(self, **options: Any) -> Usage:
        return await read_usage(
            self.database, self.store, self.snapshot, self.subscription.id, **options
        )


def run(
    redis_url: str,
    postgres_url: str,
    config: Path,
    check: Callable[[World], Awaitable[Any]],
    *,
    store_url: str | None = None,
) -> Any:
    async def main() -> Any:
        store = Store.connect(store_url or redis_url, 2.0)
        database = await connect_pool(postgres_url, size=2, timeout_s=10)
        try:
            world = World(database, store, load(config, {}), redis_url)
            await world.create()
            return await check(world)
        finally:
            await store.close()
            await database.close()

    return asyncio.run(main())


def by_name(usage: Usage) -> dict[str, LimitUsage]:
    return {limit.name: limit for limit in usage.limits}


def test_live_counts_over_an_empty_ledger(valkey: str, database: str, config: Path) -> None:
    async def check(w: World) -> None:
        w.spend(23)
        usage = await w.usage()
        assert (usage.redis, usage.note, usage.plan) == (True, "", "pro")
        meters = {row.meter: row for row in usage.meters}
        requests, credits_used = meters["requests"], meters["credits"]
        assert (requests.total, requests.overage, requests.live) == (23, 3, True)
        assert (credits_used.total, credits_used.unit) == (Decimal("3.45"), "credit")
        assert (requests.start_ms, requests.end_ms) == w.span
        limits = by_name(usage)
        monthly = limits["monthly"]
        assert (monthly.used, monthly.remaining, monthly.percentage) == (23, 0, "115.0")
        assert (monthly.status, monthly.action) == (LimitStatus.EXCEEDED, "overage")
        assert (monthly.start_ms, monthly.reset_ms) == w.span
        shown = limits["credits"]
        assert (shown.limit, shown.used) == (Decimal("4.50"), Decimal("3.45"))
        assert (shown.remaining, shown.percentage) == (Decimal("1.05"), "76.7")
        assert (limits["daily"].used, limits["daily"].enforce) == (23, False)
        assert (limits["per_day"].used, limits["per_day"].remaining) == (23, 17)
        assert limits["per_day"].reset_ms == w.now_ms - w.now_ms % DAY_MS + DAY_MS
        assert (limits["a_week"].algorithm, limits["a_week"].used) == ("sliding_window", 23)
        assert (limits["per_week"].algorithm, limits["per_week"].used) == ("gcra", 23)
        assert limits["per_week"].reset_ms is not None
        assert (limits["slots"].used, limits["slots"].meter) == (23, None)
        assert limits["slots"].status is LimitStatus.WARNING
        # the scripts say the same about the next request
        answers = w.scripts.admit(w.subscription.id, w.program(requests=1), span=w.span).limits
        names = [limit.name for limit in w.program(requests=1).limits]
        for name, answer in zip(names, answers, strict=True):
            if name != "monthly":
                assert answer.remaining == limits[name].remaining - 1, name
        assert usage.lag.unflushed is True
        assert usage.lag.since_ms is not None
        assert w.now_ms <= usage.lag.since_ms <= usage.as_of_ms
        assert (usage.lag.ledger_version, usage.lag.live_version) == (None, 23)
        assert [(row.meter, row.total, row.live) for row in usage.hours] == [
            ("credits", Decimal("3.45"), True),
            ("requests", 23, True),
        ]

    run(valkey, database, config, check)


def test_ledger_and_live_together(valkey: str, database: str, config: Path) -> None:
    async def check(w: World) -> None:
        w.spend(18)
        await w.flush()
        usage = await w.usage()
        assert (usage.lag.unflushed, usage.lag.since_ms) == (False, None)
        assert usage.lag.ledger_version == usage.lag.live_version == 18
        assert [(event.limit, event.kind, event.threshold) for event in usage.events] == [
            ("monthly", "warning", 80),
            ("monthly", "warning", 90),
        ]
        earlier = clock.to_datetime(w.now_ms - w.now_ms % HOUR_MS - 5 * HOUR_MS)
        await w.database.execute(
            "store_hours",
            *packed(
                [w.subscription.id], ["requests"], [clock.to_datetime(w.span[0])], [earlier],
                [Decimal(4)], [Decimal(0)], [1], [1],
            ),
        )  # fmt: skip
        w.spend(1)
        usage = await w.usage(hours_from=w.now_ms - 6 * HOUR_MS, hours_to=w.now_ms + HOUR_MS)
        rows = [(row.total, row.live) for row in usage.hours if row.meter == "requests"]
        assert rows == [(4, False), (19, True)]
        assert usage.lag.unflushed is True
        assert (await w.usage(hours_from=0, hours_to=1)).hours == ()

    run(valkey, database, config, check)


def test_a_subject_without_state_is_read_from_the_ledger(
    valkey: str, database: str, config: Path
) -> None:
    async def check(w: World) -> None:
        w.spend(19)
        await w.flush()
        before = by_name(await w.usage())
        w.scripts.redis.flushdb()
        usage = await w.usage()
        after = by_name(usage)
        for name in ("monthly", "daily", "credits", "per_day", "a_week"):
            assert after[name] == before[name]
        assert after["slots"].used == 0
        assert not any(row.live for row in (*usage.meters, *usage.hours))
        assert (usage.redis, usage.lag.live_version, usage.lag.unflushed) == (True, None, False)

    run(valkey, database, config, check)


def test_without_redis_the_ledger_answers(valkey: str, database: str, config: Path) -> None:
    async def check(w: World) -> None:
        w.spend(17)
        await w.flush()
        w.spend(1)
        away = Store.connect(f"redis://127.0.0.1:{free_port()}/0", 1.0)
        usage = await read_usage(w.database, away, w.snapshot, w.subscription.id)
        await away.close()
        assert usage.redis is False
        assert "Redis does not answer" in usage.note
        assert (usage.lag.unflushed, usage.lag.ledger_version) == (None, 17)
        limits = by_name(usage)
        assert limits["monthly"].used == limits["daily"].used == limits["per_day"].used == 17
        assert limits["monthly"].percentage == "85.0"
        assert limits["monthly"].status is LimitStatus.WARNING
        assert {name for name, limit in limits.items() if not limit.known} == {"per_week", "slots"}

    run(valkey, database, config, check)


def test_a_redis_older_than_the_ledger_is_told_apart(
    valkey: str, database: str, config: Path
) -> None:
    async def check(w: World) -> None:
        w.spend(2)
        old = w.scripts.state(w.subscription.id)
        w.spend(3)
        await w.flush()
        assert (await w.usage()).lag.behind is False
        w.scripts.redis.hset(w.keyspace.state(w.subscription.id), mapping=old)
        lag = (await w.usage()).lag
        assert (lag.behind, lag.live_version, lag.ledger_version) == (True, 2, 5)

    run(valkey, database, config, check)


def test_unknown_subscription_and_unknown_plan(valkey: str, database: str, config: Path) -> None:
    async def check(w: World) -> None:
        with pytest.raises(NotFoundError, match="sub_nobody"):
            await read_usage(w.database, w.store, w.snapshot, "sub_nobody")
        w.spend(2)
        await directory.set_plan(w.database, w.subscription.id, "retired")
        usage = await w.usage()
        assert usage.limits == ()
        assert "'retired' is not in the configuration" in usage.note
        assert usage.meters[0].total == 2

    run(valkey, database, config, check)


@pytest.mark.parametrize(
    ("used", "limit", "text", "status"),
    [
        (0, 100, "0.0", "ok"),
        (79_999, 100_000, "80.0", "ok"),
        (80, 100, "80.0", "warning"),
        (94_999, 100_000, "95.0", "warning"),
        (95, 100, "95.0", "critical"),
        (100, 100, "100.0", "critical"),
        (101, 100, "101.0", "exceeded"),
        (5_100, 10_000, "51.0", "ok"),
        (1, 3, "33.3", "ok"),
        (0, 0, "0.0", "ok"),
        (3, 0, "100.0", "exceeded"),
        (9 * 10**15, 9 * 10**15 + 1, "100.0", "critical"),
        (-5, 100, "-5.0", "ok"),
    ],
)
def test_percentage_and_status(used: int, limit: int, text: str, status: str) -> None:
    assert (percentage(used, limit), status_of(used, limit)) == (text, status)


# The command


def command(
    config: Path, redis_url: str, postgres_url: str, *options: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli.main", "usage", "--config", str(config), *options],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "TALLYGATE_REDIS_URL": redis_url,
            "TALLYGATE_POSTGRES_URL": postgres_url,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_agrees_with_redis_and_ledger(valkey: str, database: str, config: Path) -> None:
    async def check(w: World) -> World:
        w.spend(16)
        await w.flush()
        w.spend(3)
        return w

    world = run(valkey, database, config, check)
    subscription = world.subscription.id
    shown = command(config, valkey, database, "--subscription", subscription, "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    meters = {row["meter"]: row for row in found["meters"]}
    state = world.scripts.state(subscription)
    assert meters["requests"]["total"] == state["m:requests"].split()[0] == "19"
    assert meters["credits"]["total"] == "2.85"
    start, end, _ = (clock.isoformat(int(part)) for part in state["p:requests"].split())
    assert (meters["requests"]["start"], meters["requests"]["end"]) == (start, end)
    assert datetime.fromisoformat(found["as_of"]).tzinfo is not None
    limits = {row["name"]: row for row in found["limits"]}
    assert limits["monthly"]["percentage"] == "95.0"
    assert limits["monthly"]["status"] == "critical"
    assert limits["monthly"]["reset"] == end
    assert limits["slots"]["reset"] is None
    assert found["lag"]["ledger_version"] == 16
    assert found["lag"]["live_version"] == 19
    assert found["lag"]["since"] is not None
    assert [event["threshold"] for event in found["events"]] == [80]

    text = command(config, valkey, database, "--subscription", subscription)
    assert text.returncode == 0, text.stderr
    lines = {line.split()[0]: line.split() for line in text.stdout.splitlines() if line.split()}
    assert lines["monthly"][:8] == [
        "monthly", "quota", "requests", "19", "20", "1", "95.0", "critical",
    ]  # fmt: skip
    assert "unflushed since" in text.stdout
    none = command(config, valkey, database, "--subscription", subscription, "--hours", "0")
    assert "Hours: none" in none.stdout

    away = f"redis://127.0.0.1:{free_port()}/0"
    text = command(config, away, database, "--subscription", subscription)
    assert text.returncode == 0, text.stderr
    assert "Redis does not answer" in text.stdout
    assert "unknown" in text.stdout


def test_the_command_says_what_is_wrong(valkey: str, database: str, config: Path) -> None:
    unknown = command(config, valkey, database, "--subscription", "sub_nobody")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr == (
        "tallygate: subscription 'sub_nobody' does not exist: list them to find it\n"
    )
    unset = command(config, "", database, "--subscription", "sub_nobody")
    assert unset.returncode == 1
    assert "TALLYGATE_REDIS_URL" in unset.stderr
    away = command(config, valkey, f"postgresql://127.0.0.1:{free_port()}/x", "--subscription", "s")
    assert away.returncode == 1
    assert "Postgres did not answer" in away.stderr
    assert "Traceback" not in away.stderr
